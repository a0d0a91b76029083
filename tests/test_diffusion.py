"""Both objectives against facts known on paper."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import create_diffusion
from diffusion.gaussian_diffusion import GaussianDiffusion, discretized_gaussian_nll, gaussian_kl

SHAPE, Y, DATA_MEAN, DATA_STD = (2, 4, 3, 3), torch.tensor([1, 3]), 0.7, 0.5


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def label_model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Predict the label everywhere, on 2C channels."""
    return y.float().view(-1, 1, 1, 1).expand(len(x), 2 * x.shape[1], *x.shape[2:])


def echo_model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Predict x_t itself, on 2C channels."""
    return torch.cat([x, x], dim=1)


def echo_in_training(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    return echo_model(x, t, y), {}


def gaussian_model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Predict E[eps | x_t] of data ~ N(DATA_MEAN, DATA_STD^2), and the largest variance."""
    alpha_bar = GaussianDiffusion().alpha_bar[t.long()].float().view(-1, 1, 1, 1)
    variance = alpha_bar * DATA_STD**2 + 1 - alpha_bar
    eps = (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * DATA_MEAN) / variance
    return torch.cat([eps, torch.ones_like(eps)], dim=1)


# -- rectified flow


def test_rectified_flow_loss_is_zero_for_the_true_velocity_whatever_the_other_channels():
    latents, noise = randn(*SHAPE), randn(*SHAPE, seed=1)

    def model(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        prediction = torch.cat([noise - latents, torch.full_like(x, 9.0)], dim=1)
        return prediction, {"switch": torch.tensor(2.0)}

    loss = create_diffusion("rf").training_loss(model, latents, Y, noise=noise)
    assert torch.equal(loss.per_sample, torch.zeros(2))
    assert loss.aux_losses == {"switch": 2.0}
    assert list(loss.terms) == ["mse"]


def test_rectified_flow_model_sees_the_straight_line_at_unscaled_t():
    latents, noise, t = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([0.25, 1.0])
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        seen.extend([x, t])
        return x, torch.tensor(0.0)

    create_diffusion("rf").training_loss(model, latents, Y, t=t, noise=noise)
    torch.testing.assert_close(seen[0][0], 0.75 * latents[0] + 0.25 * noise[0])
    assert torch.equal(seen[0][1], noise[1])
    assert torch.equal(seen[1], t)


def test_rectified_flow_draws_t_whose_logit_is_standard_normal():
    t = create_diffusion("rf").draw_t(torch.empty(20_000, 1), seeded())
    assert t.logit().mean().item() == pytest.approx(0.0, abs=0.03)
    assert t.logit().std().item() == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("num_steps", [1, 7])
def test_euler_is_exact_on_a_constant_velocity(num_steps: int):
    noise = randn(*SHAPE)
    latents = create_diffusion("rf").sample(label_model, noise, Y, num_steps=num_steps)
    torch.testing.assert_close(latents, noise - Y.view(-1, 1, 1, 1))


def test_heun_is_exact_on_a_velocity_linear_in_t():
    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return t.view(-1, 1, 1, 1).expand_as(x)

    noise = randn(*SHAPE)
    latents = create_diffusion("rf").sample(model, noise, Y, sampler="heun", num_steps=1)
    torch.testing.assert_close(latents, noise - 0.5)


@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
def test_error_of_flow_samplers_shrinks_by_their_order(sampler: str, order: int):
    def error(num_steps: int) -> float:
        noise = torch.ones(1, 1, 1, 1)
        sample = create_diffusion("rf").sample(
            lambda x, t, y: x, noise, Y[:1], sampler=sampler, num_steps=num_steps
        )
        return abs(sample.item() - math.exp(-1.0))  # dx/dt = x from t = 1 to 0

    assert math.log2(error(8) / error(16)) == pytest.approx(order, abs=0.15)


# -- DDPM


def test_chain_of_all_levels_has_the_linear_betas_and_the_posterior_of_bayes():
    levels = GaussianDiffusion().levels
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    torch.testing.assert_close(levels.log_beta.exp(), beta)
    # Precisions of q(x_t | x_{t-1}) and q(x_{t-1} | x_0) add up.
    precision = (1 - beta[1:]) / beta[1:] + levels.noise_scale_prev[1:] ** -2
    torch.testing.assert_close(levels.posterior_log_variance[1:].exp(), 1 / precision)


def test_ddpm_model_sees_data_at_timestep_0_and_noise_at_999():
    latents, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    x_t = GaussianDiffusion().add_noise(latents, noise, torch.tensor([0, 999]))
    torch.testing.assert_close(x_t[0], latents[0], atol=0.04, rtol=0)
    torch.testing.assert_close(x_t[1], noise[1], atol=0.02, rtol=0)


def test_ddpm_draws_every_timestep_and_hands_it_over_as_a_float():
    t = GaussianDiffusion().draw_t(torch.empty(20_000, 1), seeded())
    assert t.dtype == torch.float32
    assert sorted(set(t.tolist())) == list(range(1000))


def test_bound_is_zero_for_the_true_noise_with_the_true_variance():
    latents, noise = randn(*SHAPE), randn(*SHAPE, seed=1)

    def model(x: Tensor, t: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([noise, torch.full_like(x, -1.0)], dim=1), torch.tensor(0.0)

    t = torch.tensor([1, 600])
    loss = create_diffusion("ddpm").training_loss(model, latents, Y, t=t, noise=noise)
    torch.testing.assert_close(loss.per_sample, torch.zeros(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("t", [0, 500])
def test_bound_trains_the_variance_only(t: int):
    prediction = randn(2, 8, 3, 3).requires_grad_()
    latents, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    loss = create_diffusion("ddpm").training_loss(
        lambda *_: (prediction, 0.0), latents, Y, t=torch.tensor([t, t]), noise=noise
    )
    loss.per_sample.sum().backward()
    assert prediction.grad is not None
    mse_gradient = 2 * (prediction[:, :4] - noise) / noise[0].numel()
    torch.testing.assert_close(prediction.grad[:, :4], mse_gradient)
    assert prediction.grad[:, 4:].isfinite().all()
    assert prediction.grad[:, 4:].abs().max() > 0
    torch.testing.assert_close(loss.per_sample, loss.terms["mse"] + loss.terms["vb"])


def test_without_learned_variance_the_loss_is_the_mean_squared_error():
    prediction, noise = randn(*SHAPE), randn(*SHAPE, seed=1)
    diffusion = create_diffusion("ddpm", learn_sigma=False)
    loss = diffusion.training_loss(lambda *_: (prediction, 0.0), noise, Y, noise=noise)
    torch.testing.assert_close(loss.per_sample, (prediction - noise).square().mean((1, 2, 3)))
    assert list(loss.terms) == ["mse"]


def test_pixel_bins_share_out_the_whole_mass_of_a_gaussian():
    pixels = torch.linspace(-1, 1, 256)
    mean, log_std = torch.tensor(0.3), torch.tensor(-1.0)
    mass = (-discretized_gaussian_nll(pixels, mean, log_std)).exp()
    assert mass.sum().item() == pytest.approx(1.0, abs=1e-4)


def test_kl_of_gaussians_agrees_with_torch_distributions():
    mean, log_variance, mean2, log_variance2 = randn(4, 5)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * log_variance).exp()),
        torch.distributions.Normal(mean2, (0.5 * log_variance2).exp()),
    )
    torch.testing.assert_close(gaussian_kl(mean, log_variance, mean2, log_variance2), expected)


def test_respacing_keeps_both_ends_and_one_step_starts_from_noise():
    respaced = {n: GaussianDiffusion().respace(n)[0] for n in (1, 2, 250, 1000)}
    assert respaced[1] == [999]
    assert respaced[2] == [0, 999]
    assert (respaced[250][0], respaced[250][-1], len(set(respaced[250]))) == (0, 999, 250)
    assert respaced[1000] == list(range(1000))


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_ddpm_samplers_recover_a_gaussian_from_its_exact_noise_prediction(
    sampler: str, learn_sigma: bool
):
    diffusion = create_diffusion("ddpm", learn_sigma=learn_sigma)
    samples = diffusion.sample(
        gaussian_model, randn(8, 2, 16, 16), torch.zeros(8), sampler=sampler, generator=seeded()
    )
    assert samples.mean().item() == pytest.approx(DATA_MEAN, abs=0.03)
    assert samples.std().item() == pytest.approx(DATA_STD, abs=0.04)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("num_steps", [1, 2])
def test_ddpm_samplers_take_as_few_steps_as_one(sampler: str, num_steps: int):
    samples = create_diffusion("ddpm").sample(
        *(gaussian_model, randn(*SHAPE), Y), sampler=sampler, num_steps=num_steps,
        generator=seeded(),
    )  # fmt: skip
    assert samples.isfinite().all()
    assert samples.mean().item() == pytest.approx(DATA_MEAN, abs=0.3)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_any_number_of_steps_calls_the_model_as_often_at_times_of_the_chain(sampler: str):
    for num_steps in [*range(1, 131), 201, 999, 1000]:  # dpm++ once made 62 of them in 61 steps
        times = [t for t, _ in GaussianDiffusion().steps(sampler, num_steps, None)]
        assert len(times) == len(set(times)) == num_steps
        assert times == sorted(times, reverse=True)
        assert (times[0], times[-1] >= 0) == (999, True)


@pytest.mark.parametrize("learn_sigma", [True, False])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_ddpm_samples_are_float32_on_the_device_of_the_noise(sampler: str, learn_sigma: bool):
    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return x.repeat(1, 1 + learn_sigma, 1, 1)

    diffusion = create_diffusion("ddpm", learn_sigma=learn_sigma)
    for device in ("cpu", "meta"):
        noise = torch.zeros(SHAPE, device=device)
        samples = diffusion.sample(model, noise, Y.to(device), sampler=sampler, num_steps=3)
        assert (samples.dtype, samples.device.type) == (torch.float32, device)


@pytest.mark.parametrize("index", [0, 700, 999])
def test_gaussian_one_level_below_is_float32_without_learned_variance(index: int):
    diffusion = GaussianDiffusion(learn_sigma=False)
    back = diffusion.p_mean_variance(diffusion.levels.at(index), randn(*SHAPE), randn(*SHAPE))
    assert back.mean.dtype == back.log_variance.dtype == torch.float32
    beta = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)[index].float()
    torch.testing.assert_close(back.log_variance, beta.log().expand(SHAPE))


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
@pytest.mark.parametrize("value", [0.6, -2.0])
def test_ddpm_samplers_of_pixels_end_on_the_data_if_it_is_one_image_or_at_its_bound(
    sampler: str, value: float
):
    """Predict the noise as if all data were `value`, which is out of the range for -2."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        level = GaussianDiffusion().levels_at(t.long())
        eps = (x - level.signal_scale * value) / level.noise_scale
        return torch.cat([eps, -torch.ones_like(eps)], dim=1)

    pixels, latents = (
        create_diffusion("ddpm", x0_range=x0_range).sample(
            model, randn(*SHAPE), Y, sampler=sampler, num_steps=20, generator=seeded()
        )
        for x0_range in ((-1.0, 1.0), None)
    )
    torch.testing.assert_close(pixels, torch.full(SHAPE, max(value, -1.0)), atol=2e-3, rtol=0)
    torch.testing.assert_close(latents, torch.full(SHAPE, value), atol=2e-3, rtol=0)


def test_an_error_of_the_first_prediction_does_not_push_pixels_out_of_their_range():
    """An error of 1 in the noise at t = 999 is one of 157 in x_0, far beyond any image."""
    seen: list[Tensor] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(x)
        return torch.cat([x + 1, torch.zeros_like(x)], dim=1)

    diffusion = GaussianDiffusion(x0_range=(-1.0, 1.0))
    diffusion.sample(model, randn(*SHAPE), Y, sampler="ddim", num_steps=2)
    x0, eps = diffusion.data_and_noise(diffusion.levels.at(999), model(seen[0], Y, Y), seen[0])
    assert (x0.min(), x0.max()) == (-1.0, -1.0)
    level = diffusion.levels.at(999)
    torch.testing.assert_close(level.signal_scale * x0 + level.noise_scale * eps, seen[0])
    assert seen[1].abs().max() < 5  # data in range and the noise that x_t leaves for it


def test_clamping_changes_no_loss_and_no_sample_within_the_range():
    latents, generator = randn(*SHAPE).clamp(-1, 1), seeded()
    losses = [
        create_diffusion("ddpm", x0_range=x0_range).training_loss(
            echo_in_training, latents, Y, t=torch.tensor([0, 999]), noise=randn(*SHAPE, seed=1)
        )
        for x0_range in ((-1.0, 1.0), None)
    ]
    assert torch.equal(losses[0].per_sample, losses[1].per_sample)
    wide, none = (
        create_diffusion("ddpm", x0_range=x0_range).sample(
            gaussian_model, randn(*SHAPE), Y, num_steps=4, generator=generator.manual_seed(0)
        )
        for x0_range in ((-1e6, 1e6), None)
    )
    assert torch.equal(wide, none)


# -- what both share


def recorded(rows: list[int]) -> Any:
    """Return a model that notes the rows of every call."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        rows.append(len(x))
        return label_model(x, t, y)

    return model


def test_guidance_moves_away_from_the_unconditional_prediction():
    noise = randn(*SHAPE)
    latents = create_diffusion("rf").sample(
        label_model, noise, Y, num_steps=1, cfg_scale=4.0, null_label=10
    )
    velocity = (10 + 4.0 * (Y - 10)).view(-1, 1, 1, 1)
    torch.testing.assert_close(latents, noise - velocity)


@pytest.mark.parametrize(("objective", "channels"), [("ddpm", 3), ("rf", 4)])
def test_guidance_acts_on_the_first_channels_and_never_beyond_the_latents(
    objective: str, channels: int
):
    diffusion = create_diffusion(objective)

    def guided_channels(**settings: Any) -> int:
        plain, guided = (
            diffusion.sample(
                label_model, randn(*SHAPE), Y, num_steps=1, cfg_scale=s, null_label=10, **settings
            )
            for s in (1.0, 4.0)
        )
        return int((plain != guided).any(dim=0).flatten(1).any(dim=1).sum())

    assert guided_channels() == channels
    assert guided_channels(cfg_channels=1) == 1
    assert guided_channels(cfg_channels=9) == 4


def test_learned_variance_stays_that_of_the_conditional_half():
    seen: list[Tensor] = []
    diffusion = GaussianDiffusion()
    original = diffusion.p_mean_variance

    def spy(level: Any, prediction: Tensor, x_t: Tensor, x0_range: Any = None) -> Any:
        seen.append(prediction)
        return original(level, prediction, x_t, x0_range)

    diffusion.p_mean_variance = spy  # type: ignore[method-assign]
    diffusion.sample(label_model, randn(*SHAPE), Y, num_steps=1, cfg_scale=4.0, null_label=10)
    assert torch.equal(seen[0][:, 3:, 0, 0], Y.view(-1, 1).expand(2, 5).float())


@pytest.mark.parametrize("objective", ["rf", "ddpm"])
def test_guidance_doubles_the_batch_only_within_its_closed_interval(objective: str):
    rows: list[int] = []
    times: list[float] = []
    create_diffusion(objective).sample(
        recorded(rows),
        randn(*SHAPE),
        Y,
        num_steps=10,
        cfg_scale=2.0,
        null_label=10,
        cfg_interval=(0.3, 0.8),
        callback=lambda step, t: times.append(t),
    )
    assert rows == [4 if 0.3 <= t <= 0.8 else 2 for t in times]
    assert rows.count(4) == {"rf": 6, "ddpm": 5}[objective]  # rf at 0.3 and 0.8 exactly, too


def test_guidance_scale_of_one_runs_single_batches_and_needs_no_null_label():
    rows: list[int] = []
    create_diffusion("rf").sample(recorded(rows), randn(*SHAPE), Y, num_steps=2)
    assert rows == [2, 2]


@pytest.mark.parametrize(("objective", "sampler"), [("rf", "heun"), ("ddpm", "ddim")])
def test_callback_comes_before_the_model_calls_of_each_step(objective: str, sampler: str):
    events: list[Any] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        events.append("model")
        return label_model(x, t, y)

    create_diffusion(objective).sample(
        model,
        randn(*SHAPE),
        Y,
        sampler=sampler,
        num_steps=2,
        callback=lambda step, t: events.append((step, t)),
    )
    expected = {
        "heun": [(0, 1.0), "model", "model", (1, 0.5), "model", "model"],
        "ddim": [(0, 0.999), "model", (1, 0.0), "model"],
    }
    assert events == expected[sampler]


@pytest.mark.parametrize(("objective", "sampler"), [("rf", "heun"), ("ddpm", "ddpm")])
def test_a_trajectory_ends_in_the_sample_and_leaves_gradients_as_they_were(
    objective: str, sampler: str
):
    diffusion, grad_modes = create_diffusion(objective), []
    options: dict[str, Any] = {"sampler": sampler, "num_steps": 3}
    model = gaussian_model if objective == "ddpm" else label_model
    steps = []
    for latents in diffusion.trajectory(model, randn(*SHAPE), Y, generator=seeded(0), **options):
        steps.append(latents)
        grad_modes.append(torch.is_grad_enabled())
    sample = diffusion.sample(model, randn(*SHAPE), Y, generator=seeded(0), **options)
    assert len(steps) == 3 and torch.equal(steps[-1], sample)
    assert not torch.equal(steps[0], steps[1]) and not sample.requires_grad
    assert grad_modes == [True] * 3


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_ddpm_samplers_repeat_themselves_given_a_generator(sampler: str):
    def sample(seed: int) -> Tensor:
        return create_diffusion("ddpm").sample(
            gaussian_model, randn(*SHAPE), Y, sampler=sampler, num_steps=4, generator=seeded(seed)
        )

    assert torch.equal(sample(1), sample(1))
    assert torch.equal(sample(1), sample(2)) == (sampler != "ddpm")


@pytest.mark.parametrize("objective", ["rf", "ddpm"])
def test_training_draws_repeat_given_a_generator_and_differ_between_seeds(objective: str):
    def loss(seed: int) -> Tensor:
        diffusion, generator = create_diffusion(objective), seeded(seed)
        return diffusion.training_loss(
            echo_in_training, randn(*SHAPE), Y, generator=generator
        ).per_sample

    assert torch.equal(loss(1), loss(1))
    assert not torch.equal(loss(1), loss(2))


@pytest.mark.parametrize("objective", ["rf", "ddpm"])
def test_cpu_generator_serves_latents_on_another_device_with_the_same_draws(objective: str):
    def state_after_loss_and_sample(device: str) -> Tensor:
        diffusion, generator = create_diffusion(objective), seeded()
        latents = torch.zeros(SHAPE, device=device)
        diffusion.training_loss(echo_in_training, latents, Y, generator=generator)
        samples = diffusion.sample(echo_model, latents, Y, num_steps=3, generator=generator)
        assert samples.device.type == device
        return generator.get_state()

    assert torch.equal(state_after_loss_and_sample("meta"), state_after_loss_and_sample("cpu"))


@pytest.mark.parametrize("objective", ["rf", "ddpm"])
def test_arithmetic_is_float32_around_a_bfloat16_model(objective: str):
    seen: list[tuple[torch.dtype, torch.dtype]] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append((x.dtype, t.dtype))
        return echo_model(x, t, y).bfloat16()

    diffusion, latents = create_diffusion(objective), randn(*SHAPE).bfloat16()
    loss = diffusion.training_loss(lambda *a: (model(*a), 0.0), latents, Y, noise=latents)
    samples = diffusion.sample(model, latents, Y, num_steps=2)
    assert loss.per_sample.dtype == samples.dtype == torch.float32
    assert set(seen) == {(torch.float32, torch.float32)}


def test_unknown_objective_is_refused_by_name():
    with pytest.raises(ValueError, match="rf, ddpm; got 'edm'"):
        create_diffusion("edm")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampler": "ddpm"}, "euler, heun, sde; got 'ddpm'"),
        ({"num_steps": 0}, "at least 1, got 0"),
        ({"cfg_scale": 2.0}, "needs null_label"),
        ({"cfg_channels": 0}, "at least 1, got 0"),
        ({"cfg_interval": (0.5, 0.2)}, "low <= high"),
        ({"cfg_interval": (0.0, 1.5)}, "got 0.0, 1.5"),
    ],
)
def test_sampling_settings_outside_their_range_are_refused(settings: Any, message: str):
    with pytest.raises(ValueError, match=message):
        create_diffusion("rf").sample(label_model, randn(*SHAPE), Y, **settings)


def test_more_steps_than_ddpm_has_timesteps_are_refused():
    with pytest.raises(ValueError, match=r"1\.\.1000, got 1001"):
        create_diffusion("ddpm").sample(label_model, randn(*SHAPE), Y, num_steps=1001)
