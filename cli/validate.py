"""`compress validate`: check a recipe and nothing else."""

from __future__ import annotations

import typer

from . import _options


def validate(
    context: typer.Context,
    recipe: _options.RecipeArgument,
    overrides: _options.Set = None,
    model: _options.Model = None,
    output: _options.OutputPath = None,
    seed: _options.Seed = None,
    device: _options.Device = None,
    as_json: _options.AsJson = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
) -> None:
    """Check a recipe: keys, types, order of stages. The model is not looked at; `plan` does that.

    Examples:
      compress validate my.yaml
      compress validate dit_w4a8 --set stages.0.vidit_q.weight_bits=6
    """
    sink = _options.sink(context, as_json, quiet, debug)
    loaded = _options.load(recipe, overrides, model, output, seed, device)
    stages = " -> ".join(stage.method for stage in loaded.recipe.stages)
    document = {
        "valid": True,
        "file": None if loaded.file is None else str(loaded.file),
        "recipe": loaded.recipe.model_dump(mode="json"),
    }
    sink.result(document, [f"{loaded.file}: valid ({loaded.recipe.model.id}: {stages})"])
    options = {"model": model, "output": output, "seed": seed, "device": device}
    sink.hint(_options.command_line("plan", recipe, overrides, **options))
