"""Later objectives and samplers against facts on paper: times, v, SNR weights, SDE, guides."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import create_diffusion
from diffusion.gaussian_diffusion import GaussianDiffusion
from diffusion.rectified_flow import RectifiedFlow
from diffusion.times import TimeLaw, shifted

SHAPE = (2, 4, 3, 3)
Y = torch.tensor([1, 3])
MEAN, STD = 0.7, 0.5  # of data that is normal


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def label_model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Predict the label everywhere."""
    return y.float().view(-1, 1, 1, 1).expand_as(x)


def true_velocity(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
    """Return E[noise - data | x_t] of normal data."""
    t = t.view(-1, 1, 1, 1)
    rest = (x - (1 - t) * MEAN) / ((1 - t) ** 2 * STD**2 + t**2)
    return t * rest - (MEAN + (1 - t) * STD**2 * rest)


def true_v(diffusion: GaussianDiffusion) -> Any:
    """Return a model of E[v | x_t] of normal data, and of the largest variance."""

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        level = diffusion.levels_at(t.long())
        a, b = level.signal_scale, level.noise_scale
        rest = (x - a * MEAN) / (a**2 * STD**2 + b**2)
        v = a * (b * rest) - b * (MEAN + a * STD**2 * rest)
        return torch.cat([v, torch.ones_like(v)], dim=1)

    return model


# ------------------------------------------------------------------------------ times


def test_a_shift_adds_its_logarithm_to_the_logit_and_leaves_both_ends():
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(shifted(t, 3.0).logit(), t.logit() + math.log(3.0))
    assert (shifted(0.0, 3.0), shifted(1.0, 3.0), shifted(0.5, 3.0)) == (0.0, 1.0, 0.75)
    assert torch.equal(shifted(t, 1.0), t)


def test_as_by_default_times_are_drawn_to_the_last_bit():
    drawn = create_diffusion("rf").draw_t(torch.empty(50, 1), seeded(3))
    assert torch.equal(drawn, torch.randn(50, generator=seeded(3)).sigmoid())
    given = create_diffusion("rf", time_shift=1.0, time_sampling=["lognormal", "0", "1"])
    assert torch.equal(given.draw_t(torch.empty(50, 1), seeded(3)), drawn)


def test_logits_of_lognormal_times_have_the_mean_and_deviation_given_and_the_shift():
    diffusion = create_diffusion(
        "rf", time_sampling=["lognormal", -0.5, 2.0], time_shift=3.0, time_scale=1000.0
    )
    logits = (diffusion.draw_t(torch.empty(50_000, 1), seeded()) / 1000).double().logit()
    assert logits.mean().item() == pytest.approx(-0.5 + math.log(3.0), abs=0.03)
    assert logits.std().item() == pytest.approx(2.0, abs=0.03)


@pytest.mark.parametrize("scale", [-1.0, 0.0, 1.29, 1.75])
def test_times_of_mode_have_the_density_of_its_inverse(scale: float):
    """P(t <= f(u)) = 1 - u, since f falls."""
    t = TimeLaw.parse(["mode", scale]).draw(50_000, torch.device("cpu"), seeded())
    for u in (0.1, 0.35, 0.5, 0.8):
        edge = 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)
        assert (t <= edge).double().mean().item() == pytest.approx(1 - u, abs=0.01)
    assert t.min() >= 0 and t.max() <= 1


def test_uniform_times_are_uniform():
    t = TimeLaw.parse(["uniform"]).draw(50_000, torch.device("cpu"), seeded())
    assert torch.histc(t, 10, 0, 1).tolist() == pytest.approx([5000] * 10, rel=0.05)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["cosine"], "'cosine' is none of lognormal, uniform, mode"),
        (["lognormal", "1"], "lognormal 1: lognormal takes mean and deviation, or its defaults"),
        (["uniform", "1"], "uniform 1: uniform takes nothing"),
        (["mode", "much"], "mode much: after mode come numbers"),
        (["mode", "2"], r"mode 2: scale is not in \[-1, 1.7519"),
        (["lognormal", "0", "0"], r"deviation is not in \[0.01, 100\]"),
        (["lognormal", "nan", "1"], "mean is not in"),
    ],
)
def test_laws_of_time_that_are_none_are_refused(words: list[str], message: str):
    with pytest.raises(ValueError, match=message):
        create_diffusion("rf", time_sampling=words)


@pytest.mark.parametrize("sampler", ["euler", "heun", "sde"])
def test_sampling_takes_shifted_steps_from_noise_to_data(sampler: str):
    times: list[float] = []

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        times.append(t[0].item())
        return label_model(x, t, y)

    create_diffusion("rf", time_shift=3.0).sample(
        model, randn(*SHAPE), Y, sampler=sampler, num_steps=2
    )
    expected = {"heun": [1.0, 0.75, 0.75, 0.0]}.get(sampler, [1.0, 0.75])
    assert times == pytest.approx(expected)


def test_settings_of_the_other_objective_are_refused_and_defaults_are_not():
    with pytest.raises(ValueError, match="prediction v: only DDPM has one, not rf"):
        create_diffusion("rf", prediction="v")
    with pytest.raises(ValueError, match=r"time_shift 2.0: only rectified flow has one, not ddpm"):
        create_diffusion("ddpm", time_shift=2.0)
    with pytest.raises(ValueError, match="time_shift must be positive, got 0"):
        create_diffusion("rf", time_shift=0.0)
    create_diffusion("rf", zero_terminal_snr=False, min_snr_gamma=None)


# ------------------------------------------------------------------------------ SDE


@pytest.mark.parametrize("num_steps", [1, 3, 50])
def test_sde_ends_on_the_data_if_it_is_one_image(num_steps: int):
    image = randn(*SHAPE, seed=5)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return (x - image) / t.view(-1, 1, 1, 1)

    sample = create_diffusion("rf").sample(
        model, randn(*SHAPE), Y, sampler="sde", num_steps=num_steps
    )
    torch.testing.assert_close(sample, image)


@pytest.mark.parametrize(("sampler", "shift"), [("sde", 1.0), ("sde", 3.0), ("euler", 3.0)])
def test_flow_samplers_recover_a_gaussian_from_its_exact_velocity(sampler: str, shift: float):
    samples = create_diffusion("rf", time_shift=shift).sample(
        *(true_velocity, randn(8, 2, 32, 32), torch.zeros(8)),
        sampler=sampler, num_steps=200, generator=seeded(1),
    )  # fmt: skip
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.02)
    assert samples.std().item() == pytest.approx(STD, abs=0.02)


def test_sde_draws_noise_of_its_own_for_each_sample_and_repeats_it():
    def sample(seeds: list[int]) -> Tensor:
        return create_diffusion("rf").sample(
            *(true_velocity, torch.zeros(SHAPE), Y),
            sampler="sde", num_steps=5, generator=[seeded(seed) for seed in seeds],
        )  # fmt: skip

    first = sample([1, 2])
    assert torch.equal(first, sample([1, 2]))
    assert torch.equal(first[1], sample([3, 2])[1])
    assert not torch.equal(first[0], sample([3, 2])[0])


def test_a_step_of_sde_is_that_of_the_paper():
    """Euler-Maruyama of dx = (v - w s / 2) dt + sqrt(w) dW with the score of normal data."""
    x, t, t_next = randn(1, 2, 3, 3), 0.6, 0.5
    variance = (1 - t) ** 2 * STD**2 + t**2
    score = -(x - (1 - t) * MEAN) / variance
    velocity = true_velocity(x, torch.tensor([t]), Y)
    noise = torch.randn(x.shape, generator=seeded(4))
    expected = x + (t_next - t) * (velocity - t * score / 2) + math.sqrt(t * 0.1) * noise
    _, update = RectifiedFlow().steps("sde", 10, seeded(4))[4]
    found = update(lambda x, t: true_velocity(x, torch.tensor([t]), Y), x)
    torch.testing.assert_close(found, expected)


# ------------------------------------------------------------------------------ v, SNR


def test_a_chain_that_ends_in_noise_is_the_linear_one_moved_and_scaled():
    diffusion = GaussianDiffusion(prediction="v", zero_terminal_snr=True)
    expected, last, product = [], 0.0, 1.0
    for k in range(1000):  # a loop of its own over the betas
        product *= 1 - (1e-4 + (0.02 - 1e-4) * k / 999)
        expected.append(math.sqrt(product))
    first, last = expected[0], expected[-1]
    expected = [(root - last) * first / (first - last) for root in expected]
    torch.testing.assert_close(diffusion.alpha_bar.sqrt(), torch.tensor(expected).double())
    assert diffusion.alpha_bar[-1] == 0
    noise = randn(*SHAPE, seed=1)
    x_t = diffusion.add_noise(randn(*SHAPE), noise, torch.tensor([999, 999]))
    assert torch.equal(x_t, noise)
    assert all(field.isfinite().all() for field in diffusion.levels)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_loss_of_v_is_zero_for_the_true_one_which_tells_data_and_noise(zero_terminal_snr: bool):
    settings: Any = {"prediction": "v", "zero_terminal_snr": zero_terminal_snr}
    diffusion = GaussianDiffusion(learn_sigma=False, **settings)
    latents, noise, t = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([999, 300])
    level = diffusion.levels_at(t)
    v = level.signal_scale * noise - level.noise_scale * latents
    loss = diffusion.training_loss(lambda *_: (v, {}), latents, Y, t=t, noise=noise)
    assert torch.equal(loss.per_sample, torch.zeros(2))
    x_t = diffusion.add_noise(latents, noise, t)
    for found, expected in zip(
        diffusion.data_and_noise(level, v, x_t), (latents, noise), strict=True
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
@pytest.mark.parametrize("num_steps", [1, 20, 250])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_samplers_recover_a_gaussian_from_its_exact_v(
    sampler: str, num_steps: int, zero_terminal_snr: bool
):
    diffusion = GaussianDiffusion(prediction="v", zero_terminal_snr=zero_terminal_snr)
    samples = diffusion.sample(
        *(true_v(diffusion), randn(8, 2, 16, 16), torch.zeros(8)),
        sampler=sampler, num_steps=num_steps, generator=seeded(),
    )  # fmt: skip
    assert samples.mean().item() == pytest.approx(MEAN, abs=0.05)
    if num_steps > 20:
        assert samples.std().item() == pytest.approx(STD, abs=0.04)


@pytest.mark.parametrize("x0_range", [None, (-1.0, 1.0)])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpm++"])
def test_v_and_the_noise_that_it_implies_draw_the_same(sampler: str, x0_range: Any):
    with_v = GaussianDiffusion(prediction="v", x0_range=x0_range)
    with_noise = GaussianDiffusion(x0_range=x0_range)

    def noise_model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        prediction, level = true_v(with_v)(x, t, y), with_v.levels_at(t.long())
        v, variance = prediction.chunk(2, dim=1)
        return torch.cat([level.signal_scale * v + level.noise_scale * x, variance], dim=1)

    drawn = [
        diffusion.sample(model, randn(*SHAPE), Y, sampler=sampler, num_steps=10, generator=seeded())
        for diffusion, model in ((with_v, true_v(with_v)), (with_noise, noise_model))
    ]
    torch.testing.assert_close(*drawn, rtol=1e-3, atol=1e-3)


def snr_at(t: int) -> float:
    product = math.prod(1 - (1e-4 + (0.02 - 1e-4) * k / 999) for k in range(t + 1))
    return product / (1 - product)


@pytest.mark.parametrize(("prediction", "shift"), [("epsilon", 0.0), ("v", 1.0)])
def test_min_snr_weights_are_those_of_the_paper(prediction: str, shift: float):
    plain, weighted = (
        GaussianDiffusion(learn_sigma=False, prediction=prediction, min_snr_gamma=gamma)
        for gamma in (None, 5.0)
    )
    times = [0, 100, 400, 999]
    batch = [randn(4, 1, 2, 2, seed=seed) for seed in range(3)]
    losses = [
        diffusion.loss_terms(batch[0], batch[1], batch[1], batch[2], torch.tensor(times))["mse"]
        for diffusion in (plain, weighted)
    ]
    expected = [min(snr_at(t), 5.0) / (snr_at(t) + shift) for t in times]
    torch.testing.assert_close(losses[1] / losses[0], torch.tensor(expected))
    assert expected[0] < 0.001 and max(expected) > 0.3


def test_without_a_cap_the_weighted_loss_of_v_is_that_of_the_noise_it_implies():
    weighted = GaussianDiffusion(learn_sigma=False, prediction="v", min_snr_gamma=1e9)
    latents, noise, v = (randn(*SHAPE, seed=seed) for seed in range(3))
    t = torch.tensor([10, 800])
    level, x_t = weighted.levels_at(t), weighted.add_noise(latents, noise, t)
    eps = level.signal_scale * v + level.noise_scale * x_t
    expected = (eps - noise).square().mean((1, 2, 3))
    torch.testing.assert_close(weighted.loss_terms(v, x_t, latents, noise, t)["mse"], expected)


def test_the_weight_leaves_the_bound_alone_and_the_bound_v():
    prediction = randn(2, 8, 3, 3).requires_grad_()
    latents, noise, t = randn(*SHAPE), randn(*SHAPE, seed=1), torch.tensor([0, 700])
    plain, weighted = (
        GaussianDiffusion(prediction="v", zero_terminal_snr=True, min_snr_gamma=gamma)
        for gamma in (None, 5.0)
    )
    x_t = plain.add_noise(latents, noise, t)
    terms = [d.loss_terms(prediction, x_t, latents, noise, t) for d in (plain, weighted)]
    assert torch.equal(terms[0]["vb"], terms[1]["vb"])
    terms[0]["vb"].sum().backward()
    assert prediction.grad is not None
    assert prediction.grad[:, :4].abs().max() == 0 < prediction.grad[:, 4:].abs().max()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"prediction": "x0"}, "epsilon or v, got 'x0'"),
        ({"zero_terminal_snr": True}, "zero_terminal_snr needs prediction v, got epsilon"),
        ({"min_snr_gamma": 0.0}, "min_snr_gamma must be positive, got 0"),
    ],
)
def test_settings_of_ddpm_that_do_not_fit_are_refused(settings: Any, message: str):
    with pytest.raises(ValueError, match=message):
        create_diffusion("ddpm", **settings)


# ------------------------------------------------------------------------------ guidance


def test_a_guide_stands_for_the_unconditional_prediction_of_the_same_labels():
    seen: list[Tensor] = []

    def guide(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        seen.append(y)
        return label_model(x, t, y) / 2

    noise = randn(*SHAPE)
    latents = create_diffusion("rf").sample(
        label_model, noise, Y, num_steps=1, cfg_scale=3.0, guide=guide
    )
    torch.testing.assert_close(latents, noise - (0.5 + 3.0 * 0.5) * Y.view(-1, 1, 1, 1))
    assert torch.equal(seen[0], Y)


def test_a_guide_that_is_the_model_itself_changes_nothing_and_one_is_not_asked_without_need():
    noise, calls = randn(*SHAPE), []

    def guide(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        calls.append(t[0].item())
        return true_velocity(x, t, y)

    def sample(**settings: Any) -> Tensor:
        return create_diffusion("rf").sample(true_velocity, noise, Y, num_steps=4, **settings)

    torch.testing.assert_close(sample(cfg_scale=5.0, guide=guide), sample())
    assert calls == [1.0, 0.75, 0.5, 0.25]
    sample(guide=guide)
    sample(cfg_scale=2.0, guide=guide, cfg_interval=(0.5, 0.8))
    assert calls[4:] == [0.75, 0.5]


def test_rescaled_guidance_has_the_deviation_of_the_conditional_prediction():
    """Velocities y a and, without a class, 10 b: guided by 4, the deviation is known."""
    a, b = randn(*SHAPE, seed=6), randn(*SHAPE, seed=7)

    def model(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        is_null = (y == 10).view(-1, 1, 1, 1)
        return torch.where(is_null, 10 * b.repeat(len(x) // 2, 1, 1, 1), label_model(x, t, y)
                           * a.repeat(len(x) // 2, 1, 1, 1))  # fmt: skip

    def velocity(rescale: float) -> Tensor:
        return -create_diffusion("rf").sample(
            *(model, torch.zeros(SHAPE), Y), num_steps=1, cfg_scale=4.0, null_label=10,
            cfg_rescale=rescale,
        )  # fmt: skip

    cond, plain = Y.view(-1, 1, 1, 1) * a, velocity(0.0)
    torch.testing.assert_close(plain, 10 * b + 4 * (cond - 10 * b))
    whole = velocity(1.0)
    for one, true, free in zip(whole, cond, plain, strict=True):
        torch.testing.assert_close(one.std(), true.std())
        torch.testing.assert_close(one, free * true.std() / free.std())
    torch.testing.assert_close(velocity(0.7), 0.7 * whole + 0.3 * plain)


def test_a_rescaling_outside_0_to_1_is_refused():
    with pytest.raises(ValueError, match=r"cfg_rescale must be in \[0, 1\], got 1.5"):
        create_diffusion("rf").sample(label_model, randn(*SHAPE), Y, cfg_rescale=1.5)
