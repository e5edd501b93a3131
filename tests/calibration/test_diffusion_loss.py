"""Training losses of denoisers: against the formulas of the papers, worked out in another way."""

import math
from dataclasses import replace

import pytest
import torch
from compress.calibration.diffusion_loss import FlowTask, NoiseTask, task_for
from compress.calibration.label_dropout import drop_rate, labels_as_given
from compress.calibration.sampler import place
from compress.calibration.seeds import generator_for
from compress.errors import StageError
from compress.models.open import open_model
from compress.progress import SilentProgress
from compress.recipes.schema import ModelRef
from torch.distributions import Normal, kl_divergence


def opened(folder):
    return open_model(ModelRef(id=str(folder)), device="cpu", progress=SilentProgress())


def generators(count, step=0):
    return [generator_for(0, "test", step, row) for row in range(count)]


def noised_at(task, timesteps, channels=4, seed=0):
    """Items at timesteps of one's own: what `draw` gives, with these in the place of the drawn ones."""
    latents = torch.randn(len(timesteps), channels, 4, 4, generator=torch.Generator().manual_seed(seed))
    noised = task.draw(latents, {}, torch.Generator().manual_seed(seed + 1))
    timestep = torch.tensor(timesteps)
    signal, noisy = task.schedule.levels(timestep, latents)
    return replace(noised, timestep=timestep, noisy=signal * latents + noisy * noised.noise)


@pytest.fixture
def dit_task(tiny_dit):
    return task_for(opened(tiny_dit))


def betas():
    """The linear schedule of DiT, in double precision."""
    return torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64)


def step_before(noised, clean, index):
    """Posterior of the state one step before, by Bayes: the product of two Gaussians over it."""
    beta, timestep = betas(), int(noised.timestep[index])
    kept = torch.cumprod(1 - beta, 0)
    before = kept[timestep - 1] if timestep else torch.tensor(1.0, dtype=torch.float64)
    state, sample = noised.noisy[index].double(), clean[index].double()
    prior_mean, prior_variance = before.sqrt() * sample, 1 - before
    # The state is sqrt(1 - beta) times the one before, plus noise: as a Gaussian over the one before.
    factor = (1 - beta[timestep]).sqrt()
    likely_mean, likely_variance = state / factor, beta[timestep] / factor**2
    variance = 1 / (1 / prior_variance + 1 / likely_variance)
    return variance * (prior_mean / prior_variance + likely_mean / likely_variance), variance


def test_noise_is_added_as_the_schedule_says(dit_task):
    latents = torch.randn(64, 4, 4, 4, generator=torch.Generator().manual_seed(3))
    noised = dit_task.draw(latents, {}, torch.Generator().manual_seed(4))
    kept = torch.cumprod(1 - betas(), 0)[noised.timestep].view(-1, 1, 1, 1)
    expected = kept.sqrt() * latents + (1 - kept).sqrt() * noised.noise
    assert torch.allclose(noised.noisy.double(), expected, atol=1e-5)
    assert torch.equal(noised.call["hidden_states"], noised.noisy)
    assert torch.equal(noised.call["timestep"], noised.timestep)


def test_all_timesteps_are_equally_likely(dit_task):
    drawn = dit_task.draw(torch.zeros(4000, 1, 1, 1), {}, torch.Generator().manual_seed(0)).timestep
    assert drawn.min() >= 0 and drawn.max() <= 999
    counts = torch.bincount(drawn // 100, minlength=10)
    assert (counts - 400).abs().max() < 4 * math.sqrt(400 * 0.9)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_right_prediction_costs_nothing(dit_task, prediction):
    task = NoiseTask(dit_task.inputs, dit_task.schedule, prediction, False)
    noised = noised_at(task, [0, 10, 500, 999])
    kept = torch.cumprod(1 - betas(), 0)[noised.timestep].view(-1, 1, 1, 1)
    right = {
        "epsilon": noised.noise.double(),
        "sample": noised.clean.double(),
        "v_prediction": kept.sqrt() * noised.noise - (1 - kept).sqrt() * noised.clean,
    }[prediction].float()
    assert task.losses(right, noised).max() < 1e-10
    wrong = right + 0.5
    assert torch.allclose(task.losses(wrong, noised), torch.full((4,), 0.25), atol=1e-4)
    # Whatever is predicted, it says the same of the clean sample.
    assert torch.allclose(task._clean(right, noised)[:3], noised.clean[:3], atol=2e-3)


def test_the_bound_is_the_divergence_from_the_true_step(dit_task):
    noised = noised_at(dit_task, [1, 37, 500, 999])
    generator = torch.Generator().manual_seed(9)
    output = torch.cat(
        [noised.noise + 0.3 * torch.randn(noised.noise.shape, generator=generator),
         torch.rand(noised.noise.shape, generator=generator) * 2 - 1], dim=1
    )  # fmt: skip
    kept = torch.cumprod(1 - betas(), 0)
    found = dit_task.losses(output, noised).double()
    for index, timestep in enumerate(noised.timestep.tolist()):
        epsilon, fraction = output[index, :4].double(), (output[index, 4:].double() + 1) / 2
        guess = (noised.noisy[index] - (1 - kept[timestep]).sqrt() * epsilon) / kept[timestep].sqrt()
        mean, _ = step_before(noised, guess[None].expand(index + 1, -1, -1, -1), index)
        true_mean, true_variance = step_before(noised, noised.clean, index)
        log_variance = fraction * betas()[timestep].log() + (1 - fraction) * true_variance.log()
        bound = kl_divergence(
            Normal(true_mean, true_variance.sqrt()), Normal(mean, (0.5 * log_variance).exp())
        )
        mse = (epsilon - noised.noise[index]).square().mean()
        assert found[index].item() == pytest.approx((mse + bound.mean() / math.log(2)).item(), rel=2e-3)


def test_the_step_before_is_what_bayes_says(dit_task):
    noised = noised_at(dit_task, [1, 2, 300, 999])
    mean, log_variance = dit_task.schedule.posterior(noised.clean, noised.noisy, noised.timestep)
    for index in range(4):
        expected, variance = step_before(noised, noised.clean, index)
        assert torch.allclose(mean[index].double(), expected, atol=1e-5)
        # The scheduler's own table has single precision.
        assert log_variance[index].item() == pytest.approx(variance.log().item(), abs=3e-4)


def test_the_first_step_is_judged_by_the_sample_in_bins(dit_task):
    noised = noised_at(dit_task, [0])
    clean = noised.clean.clone()
    clean[0, 0, 0] = torch.tensor([-1.0, 1.0, 0.5, -0.5])  # both open bins
    clean = clean.clamp(-1, 1)
    output = torch.cat([noised.noise, torch.ones_like(noised.noise)], dim=1)
    signal, noisy = dit_task.schedule.levels(noised.timestep, clean)
    noised = replace(noised, clean=clean, noisy=signal * clean + noisy * noised.noise)
    found = dit_task.losses(output, noised).item()
    mean, spread = clean.double(), betas()[0].sqrt()  # at the first step the mean is the guess itself
    normal = Normal(mean, spread)
    upper, lower = normal.cdf(clean.double() + 1 / 255), normal.cdf(clean.double() - 1 / 255)
    share = torch.where(clean <= -0.999, upper, torch.where(clean >= 0.999, 1 - lower, upper - lower))
    assert found == pytest.approx(-share.log2().mean().item(), rel=1e-3)


def test_the_mean_learns_from_the_square_error_alone(dit_task):
    noised = noised_at(dit_task, [0, 5, 700])
    output = torch.randn(3, 8, 4, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    (slope,) = torch.autograd.grad(dit_task.loss(output, noised), output)
    square = 2 * (output[:, :4] - noised.noise) / noised.noise.numel()
    assert torch.allclose(slope[:, :4], square, atol=1e-7)
    assert (slope[:, 4:].abs().flatten(1).sum(1) > 0).all()
    (slope,) = torch.autograd.grad(
        dit_task.distillation_loss(output, torch.zeros_like(output), noised), output
    )
    assert torch.allclose(slope[:, :4], 2 * output[:, :4] / noised.noise.numel(), atol=1e-7)


def test_a_teacher_is_the_target_and_learns_nothing(dit_task):
    noised = noised_at(dit_task, [3, 400])
    generator = torch.Generator().manual_seed(2)
    teacher = torch.randn(2, 8, 4, 4, generator=generator, requires_grad=True)
    assert dit_task.distillation_losses(teacher.detach(), teacher, noised).abs().max() < 1e-6
    student = teacher.detach() + 0.1 * torch.randn(2, 8, 4, 4, generator=generator)
    found = dit_task.distillation_losses(student.requires_grad_(), teacher, noised)
    kept = torch.cumprod(1 - betas(), 0)
    for index, timestep in enumerate(noised.timestep.tolist()):
        ends = []
        for output in (teacher, student):
            one = output.detach()[index].double()
            guess = (noised.noisy[index] - (1 - kept[timestep]).sqrt() * one[:4]) / kept[timestep].sqrt()
            mean, least = step_before(noised, guess[None].expand(index + 1, -1, -1, -1), index)
            share = (one[4:] + 1) / 2
            ends.append(
                Normal(mean, (0.5 * (share * betas()[timestep].log() + (1 - share) * least.log())).exp())
            )
        mse = (student[index, :4] - teacher[index, :4]).detach().square().mean()
        expected = mse + kl_divergence(*ends).mean() / math.log(2)
        assert found[index].item() == pytest.approx(expected.item(), rel=5e-3)
    found.sum().backward()
    assert teacher.grad is None


def test_labels_are_dropped_outside_of_the_model(tiny_dit):
    model = opened(tiny_dit)
    task = task_for(model)
    assert drop_rate(model.module) == (0.1, 10)
    labels = torch.arange(3000) % 10
    noised = task.draw(torch.zeros(3000, 4, 1, 1), {"class_labels": labels}, torch.Generator().manual_seed(0))
    dropped = noised.call["class_labels"] == 10
    assert 240 < dropped.sum() < 360
    assert torch.equal(noised.call["class_labels"][~dropped], labels[~dropped])


def test_what_an_item_gets_does_not_depend_on_its_batch(dit_task):
    latents = torch.randn(6, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(6)
    whole = dit_task.draw(latents, {"class_labels": labels}, generators(6))
    rest = dit_task.draw(latents[4:], {"class_labels": labels[4:]}, generators(6)[4:])
    assert torch.equal(whole.noise[4:], rest.noise) and torch.equal(whole.timestep[4:], rest.timestep)
    assert torch.equal(whole.call["class_labels"][4:], rest.call["class_labels"])
    assert not torch.equal(whole.noise, dit_task.draw(latents, {}, generators(6, step=1)).noise)


def test_a_training_module_sees_the_labels_as_they_are_given(tiny_dit):
    model = opened(tiny_dit)
    call = model.family.example_inputs(model.module, 64, torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.module(**call).sample
        model.module.train()
        state = torch.get_rng_state()
        with labels_as_given(model.module):
            found = model.module(**call).sample
        torch.set_rng_state(state)
        dropping = model.module(**call).sample
    assert torch.allclose(found, expected, atol=1e-6)
    assert not torch.allclose(dropping, expected, atol=1e-3)
    assert drop_rate(model.module) == (0.1, 10)


def test_flow_matching_learns_the_velocity(tiny_sd3):
    model = opened(tiny_sd3)
    task = task_for(model)
    assert isinstance(task, FlowTask) and task.shift == 3.0
    call = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(0))
    latents = call.pop("hidden_states")
    call.pop("timestep")
    noised = task.draw(latents, call, torch.Generator().manual_seed(1))
    level = (noised.timestep / 1000).view(-1, 1, 1, 1)
    assert torch.allclose(noised.noisy, (1 - level) * latents + level * noised.noise, atol=1e-6)
    # From the noisy state a step against the velocity, as long as the level, leads to the sample.
    assert torch.allclose(noised.noisy - level * (noised.noise - latents), latents, atol=1e-5)
    assert task.losses(noised.noise - latents, noised).max() < 1e-12
    with torch.no_grad():
        output = model.module(**place(noised.call, model.module)).sample
    assert task.losses(output, noised).shape == (2,) and task.loss(output, noised).isfinite()
    assert task.distillation_loss(output, output + 1, noised).item() == pytest.approx(1.0, abs=1e-5)


def test_the_odds_of_a_level_are_shifted(tiny_sd3):
    task = task_for(opened(tiny_sd3))
    level = task.draw(torch.zeros(4001, 1, 1, 1), {}, torch.Generator().manual_seed(0)).timestep / 1000
    assert level.median().item() == pytest.approx(3 / 4, abs=0.03)  # odds of one half, times three
    odds = torch.logit(level.double())
    assert odds.mean().item() == pytest.approx(math.log(3), abs=0.07)
    assert odds.std().item() == pytest.approx(1.0, abs=0.05)


@pytest.mark.parametrize("family", ["pixart", "unet"])
def test_other_denoisers_have_a_loss(request, family):
    model = opened(request.getfixturevalue(f"tiny_{family}"))
    task = task_for(model)
    call = model.family.example_inputs(model.module, 2, torch.Generator().manual_seed(0))
    latents = call.pop(model.family.latents)
    call.pop("timestep")
    noised = task.draw(latents, call, torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = model.module(**place(noised.call, model.module)).sample
    assert task.losses(output, noised).isfinite().all()
    assert task.learned == (family == "pixart")


def test_an_unknown_scheduler_is_refused(tiny_dit):
    import diffusers

    model = opened(tiny_dit)
    model.scheduler = diffusers.DDPMScheduler(prediction_type="epsilon")
    assert task_for(model).prediction == "epsilon"
    model.scheduler.register_to_config(prediction_type="score")
    with pytest.raises(StageError, match="no training loss is known for DDPMScheduler"):
        task_for(model)
