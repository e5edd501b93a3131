"""The search of TinyFusion on denoisers of which it is known which blocks should stay."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from compress.calibration.diffusion_loss import Noised
from compress.compressors.pruning.block_groups import groups_of, kept_of
from compress.compressors.pruning.gates import INITIAL, Annealing, ChoiceGates
from compress.compressors.pruning.search import search
from compress.errors import StageError
from compress.progress import SilentProgress
from compress.recipes.depth import TinyFusionSettings

DIT, LIST = "DiTTransformer2DModel", "transformer_blocks"
WIDTH = 32


def denoiser(depth, seed):
    """A DiT of random weights whose blocks all matter; its embedders are equal."""
    from diffusers import DiTTransformer2DModel

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        module = DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=depth,
            sample_size=8, num_embeds_ada_norm=10,
        )  # fmt: skip
        for block in module.transformer_blocks:
            block.norm1.emb.load_state_dict(module.transformer_blocks[0].norm1.emb.state_dict())
            block.norm1.linear.weight.normal_(0, 0.15)
            for part in (2, 5):
                gate_bias(block, part).add_(0.7)
    return module.eval().requires_grad_(False)


def gate_bias(block, part):
    """A view of the bias of a gate: 2 of the attention, 5 of the feed-forward part."""
    return block.norm1.linear.bias.chunk(6)[part]


def gate_rows(block, part):
    return block.norm1.linear.weight.chunk(6)[part]


class Draws:
    """Noisy latents without data: random numbers."""

    def __init__(self, size):
        self.size = size

    def __call__(self, step, part, parts):
        generator = torch.Generator().manual_seed(1000 + step)
        states = torch.randn(self.size, 4, 8, 8, generator=generator)
        timestep = torch.randint(1000, (self.size,), generator=generator)
        labels = torch.randint(10, (self.size,), generator=generator)
        states, timestep, labels = (item.chunk(parts)[part] for item in (states, timestep, labels))
        call = {"hidden_states": states, "timestep": timestep, "class_labels": labels}
        return Noised(call, states, states, states, timestep)


class Imitation:
    """The loss is the distance to what the model itself puts out with all its blocks."""

    def __init__(self, module):
        self.original = copy.deepcopy(module)

    def loss(self, output, noised):
        with torch.no_grad():
            wanted = self.original(**noised.call, return_dict=False)[0]
        return (output - wanted).square().mean()


def found_by(module, groups, folder, *, seed=0, **keys):
    """Search, and return (kept blocks, what was found, choices as they are left)."""
    settings = TinyFusionSettings.model_validate({"batch_size": 32, "groups": groups, **keys})
    config = {**module.config, "_class_name": DIT}
    chosen = groups_of(config, settings.groups)
    depth = {LIST: config["num_layers"]}
    choices = ChoiceGates(chosen, depth, Annealing(settings.tau, settings.scaling, settings.steps))
    folder.mkdir(exist_ok=True)
    found = search(
        module, DIT, choices, settings, batches=Draws(settings.batch_size), task=Imitation(module), seed=seed,
        key="test", folder=folder, progress=SilentProgress(),
    )  # fmt: skip
    return kept_of(config, chosen, found.decision.choices)[LIST], found, choices


def test_the_decision_is_of_the_moving_average(tmp_path, monkeypatch):
    live = []
    draw = ChoiceGates.masks

    def masks(self, noise, step):
        live.append([item.detach().clone() for item in self.logits])
        return draw(self, noise, step)

    monkeypatch.setattr(ChoiceGates, "masks", masks)
    keys = {"steps": 8, "batch_size": 8, "ema": 0.6, "gate_lr": 0.02}
    _, found, choices = found_by(denoiser(4, 0), "1:2", tmp_path / "search", **keys)
    average = live[0]
    for step, after in enumerate(live[1:]):
        share = 1 - min(0.6, (1 + step) / (10 + step))
        average = [one + share * (new - one) for one, new in zip(average, after, strict=True)]
        expected, told = choices.decide(step, average), found.decisions[step + 1]
        assert told.confidences == pytest.approx(expected.confidences, abs=1e-4)
        assert step == 0 or told.confidences != pytest.approx(
            choices.decide(step, after).confidences, abs=1e-3
        )
    assert list(found.decisions) == list(range(1, 9))
    assert found.decision.confidences == pytest.approx(choices.decide(7).confidences, abs=1e-6)


def test_the_gradient_is_held_to_its_largest_norm(tmp_path):
    """Far below what AdamW adds to its denominator, a gradient moves nothing."""
    moved = {}
    for limit in (1e-14, 1.0, None):
        keys = {"steps": 4, "batch_size": 8, "gate_lr": 0.02, "clip_norm": limit}
        _, _, choices = found_by(denoiser(4, 0), "1:2", tmp_path / f"search-{limit}", **keys)
        moved[limit] = max((item.detach() - INITIAL).abs().max().item() for item in choices.logits)
    assert moved[1e-14] < 1e-5 and min(moved[1.0], moved[None]) > 0.01


def planted(groups, seed):
    """Which half of eight blocks does nothing: drawn anew for every seed, as many of every group."""
    generator = torch.Generator().manual_seed(100 + seed)
    chosen = groups_of({"_class_name": DIT, "num_layers": 8}, groups)
    drawn = [torch.randint(group.choices, (1,), generator=generator).item() for group in chosen]
    return tuple(place for group, choice in zip(chosen, drawn, strict=True) for place in group.places(choice))


def test_other_seeds_plant_other_blocks():
    for groups in ("1:2", "2:4"):
        assert len({planted(groups, seed) for seed in range(3)}) == 3


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("groups", ["1:2", "2:4"])
def test_blocks_that_do_nothing_are_found(groups, seed, tmp_path):
    module, idle = denoiser(8, seed), planted(groups, seed)
    with torch.no_grad():
        for place in idle:
            for part in (2, 5):
                gate_rows(module.transformer_blocks[place], part).mul_(0.02)
                gate_bias(module.transformer_blocks[place], part).mul_(0.02)
    kept, found, _ = found_by(module, groups, tmp_path / "search", seed=seed, steps=150, lora={"rank": 4})
    assert kept == tuple(place for place in range(8) if place not in idle)
    assert min(found.decision.confidences) >= 0.99
    first = next(iter(found.decisions.values()))
    assert max(first.confidences) < 0.9


GAP = 1.2
"""By what factor more the loss rises at once without the offset; far above that both ways keep it."""


def recoverable(seed):
    """Four blocks; block 1 is an offset that others can learn, block 2 a little of everything.

    The offset is as long as is needed for its loss to be felt more than that of block 2, and no longer.
    """
    module = denoiser(4, seed)
    generator = torch.Generator().manual_seed(seed)
    offset, mixed = module.transformer_blocks[1], module.transformer_blocks[2]
    with torch.no_grad():
        for part, gate in ((2, 0.0), (5, 1.0)):
            gate_rows(offset, part).zero_()
            gate_bias(offset, part).fill_(gate)
        direction = torch.randn(WIDTH, generator=generator)
        offset.ff.net[2].weight.zero_()
        for part in (2, 5):
            gate_rows(mixed, part).mul_(0.4)
            gate_bias(mixed, part).mul_(0.4)
        for layer in (mixed.ff.net[0].proj, mixed.ff.net[2]):
            layer.weight.normal_(0, 0.5, generator=generator)
        for length in (3.0, 3.5, 4.0, 4.5, 5.0, 5.5, 6.0):
            offset.ff.net[2].bias.copy_(length * direction * WIDTH**0.5 / direction.norm())
            if loss_without(module, 1) > GAP * loss_without(module, 2):
                return module
    raise AssertionError("no length of the offset makes it the block that hurts more")


def loss_without(module, place):
    task, noised = Imitation(module), Draws(128)(0, 0, 1)
    shallow = copy.deepcopy(module)
    del shallow.transformer_blocks[place]
    with torch.no_grad():
        return task.loss(shallow(**noised.call, return_dict=False)[0], noised).item()


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_the_choice_is_what_recovers_not_what_hurts_least(seed, tmp_path):
    """Without block 1 the loss is larger at once, but low-rank changes make up for that; for block 2 less."""
    module = recoverable(seed)
    assert GAP < loss_without(module, 1) / loss_without(module, 2) < 1.5 * GAP
    keys = {"seed": seed, "steps": 400, "scaling": (30.0, 30.0), "gate_lr": 1e-3}
    groups = ("1:1", "1:2", "1:1")
    kept, _, _ = found_by(module, groups, tmp_path / "frozen", mode="frozen", **keys)
    assert kept == (0, 1, 3)
    kept, _, _ = found_by(module, groups, tmp_path / "lora", mode="lora", lr=1e-2, **keys)
    assert kept == (0, 2, 3)


def test_a_search_that_diverges_names_the_rate_that_counts(tmp_path):
    module = denoiser(4, 0)
    with torch.no_grad():
        module.proj_out_2.weight[0] = float("nan")
    for mode, rate in (("frozen", "gate_lr (0.001)"), ("lora", "lr (0.0001)")):
        with pytest.raises(StageError, match="the loss of step 1 of 4 is not finite") as caught:
            found_by(module, "1:2", tmp_path / mode, mode=mode, steps=4)
        assert caught.value.hint.startswith(f"lower {rate} or clip_norm")


_TOGETHER = """
import importlib.util, json, sys
from pathlib import Path
from accelerate import PartialState
spec = importlib.util.spec_from_file_location("given", sys.argv[1])
given = importlib.util.module_from_spec(spec)
spec.loader.exec_module(given)
found = given.together(Path(sys.argv[2]), accumulate=1)
state = PartialState()
(Path(sys.argv[2]) / f"found-{state.process_index}-{state.num_processes}.json").write_text(json.dumps(found))
state.destroy_process_group()
"""


def together(folder, accumulate):
    """Search a little, and return all decisions and whether the model is what it was."""
    module = denoiser(4, 0)
    before = {name: item.clone() for name, item in module.state_dict().items()}
    keys = {"steps": 6, "batch_size": 8, "accumulate": accumulate, "gate_lr": 0.01, "lr": 1e-2}
    _, found, _ = found_by(module, "1:2", folder, **keys)
    same = all(torch.equal(item, before[name]) for name, item in module.state_dict().items())
    return [[list(one.choices), list(one.confidences)] for one in found.decisions.values()], same


@pytest.mark.slow
def test_two_processes_search_as_one(tmp_path):
    program = tmp_path / "together.py"
    program.write_text(_TOGETHER)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*launcher, str(program), __file__, str(tmp_path / "both")], check=True, timeout=600)
    both = [json.loads((tmp_path / "both" / f"found-{index}-2.json").read_text()) for index in range(2)]
    alone, same = together(tmp_path / "alone", accumulate=2)  # parts of the same size
    assert both[0] == both[1] and both[0][1] and same
    for (choices, sure), (expected, others) in zip(both[0][0], alone, strict=True):
        assert choices == expected and sure == pytest.approx(others, abs=1e-3)
