"""`compress plan`: predict a run from configs alone."""

from __future__ import annotations

from typing import Annotated

import typer

from . import _options, _render

WithScores = Annotated[
    bool,
    typer.Option(
        "--with-scores",
        help="Read the weights and the calibration samples, and tell what a pruning stage would remove.",
    ),
]


def plan(
    context: typer.Context,
    recipe: _options.RecipeArgument,
    overrides: _options.Set = None,
    model: _options.Model = None,
    output: _options.OutputPath = None,
    seed: _options.Seed = None,
    device: _options.Device = None,
    with_scores: WithScores = False,
    as_json: _options.AsJson = False,
    quiet: _options.Quiet = False,
    debug: _options.Debug = False,
) -> None:
    """Predict sizes, operations and memory; write nothing.

    No weights are read without --with-scores: the model may be a folder that holds only configs.

    Examples:
      compress plan dit_w4a8
      compress plan dit_xl_w4a8 --model path/to/configs --json
      compress plan vit_isomorphic --with-scores
    """
    sink = _options.sink(context, as_json, quiet, debug)
    loaded = _options.load(recipe, overrides, model, output, seed, device)
    from .. import pipeline

    with sink.progress() as progress:
        document = (pipeline.preview if with_scores else pipeline.plan)(loaded, progress=progress)
    sink.result(document, _render.plan(document))
    options = {"model": model, "output": output, "seed": seed, "device": device}
    sink.hint(_options.command_line("run", recipe, overrides, **options))
