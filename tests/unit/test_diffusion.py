"""The diffusion layer against closed forms and against the schedulers of diffusers."""

from __future__ import annotations

import math

import pytest
import torch
from diffusers import (
    CMStochasticIterativeScheduler,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UNet2DModel,
)
from torch import Tensor, nn

from stillhouse.base.errors import DataError, ModelError
from stillhouse.data.densities import MAKERS, density, ring
from stillhouse.data.glyphs import glyphs
from stillhouse.diffusion.batches import NoisyBatches
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.guidance import ClassifierFreeGuidance, guided
from stillhouse.diffusion.parameterisations import (
    EDM,
    Epsilon,
    FlowVelocity,
    Parameterisation,
    Sample,
    V,
    eps_of,
    log_normal_sigmas,
    logit_normal_times,
    min_snr_weight,
    score_of,
    x_0_of_score,
)
from stillhouse.diffusion.pipelines import load_denoiser, read_scheduler, save_pipeline, write_scheduler
from stillhouse.diffusion.processes import DiscreteVP, Karras, Process, RectifiedFlow
from stillhouse.diffusion.samplers import FewStepGenerator, OdeSampler, ancestral, ddim, euler, heun
from stillhouse.losses.adversarial import (
    hinge_discriminator,
    hinge_generator,
    non_saturating_discriminator,
    non_saturating_generator,
    r1_penalty,
)
from stillhouse.losses.score import denoising
from stillhouse.metrics.generative import (
    energy_distance,
    frechet_distance,
    mode_coverage,
    random_features,
    sliced_wasserstein,
)
from stillhouse.models.denoisers import PointDenoiser
from stillhouse.models.discriminators import FeatureDiscriminator

PROCESSES: dict[str, Process] = {
    "vp-linear": DiscreteVP.linear(),
    "vp-scaled-linear": DiscreteVP.scaled_linear(),
    "vp-cosine": DiscreteVP.cosine(),
    "karras": Karras(),
    "flow": RectifiedFlow(),
}
PREDICTIONS: dict[str, Parameterisation] = {
    "eps": Epsilon(),
    "x_0": Sample(),
    "v": V(),
    "flow": FlowVelocity(),
    "edm": EDM(0.7),
}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Exact(nn.Module):
    """The closed-form denoiser of N(mean, std^2 I)."""

    def __init__(self, process: Process, *, mean: float = 0.3, std: float = 0.6) -> None:
        super().__init__()
        self.process, self.mean, self.std = process, mean, std

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor | None = None) -> Tensor:
        alpha, sigma = self.process.levels(timestep, sample)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        return self.mean + gain * (sample - alpha * self.mean)

    def solution(self, x: Tensor, t: Tensor) -> Tensor:
        """Where the probability-flow ODE takes x at time t: the quantile it is of, in the data."""
        alpha, sigma = self.process.levels(t.expand(len(x)), x)
        return self.mean + self.std * (x - alpha * self.mean) / (alpha**2 * self.std**2 + sigma**2).sqrt()


# -- processes ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
def test_noise_grows_along_the_schedule(name):
    process = PROCESSES[name]
    t = process.at(torch.linspace(0, 1, 50))
    ratio = process.sigma(t) / process.alpha(t)
    assert (ratio[1:] >= ratio[:-1]).all() and ratio[-1] > 5 and ratio[0] < 0.05
    if isinstance(process, DiscreteVP):
        torch.testing.assert_close(process.alpha(t) ** 2 + process.sigma(t) ** 2, torch.ones(50))
    torch.testing.assert_close(process.snr(t), 1 / ratio**2)


@pytest.mark.parametrize("name", PROCESSES)
def test_noised_samples_have_the_moments_of_the_process(name):
    process = PROCESSES[name]
    t = process.at(torch.full((1,), 0.4)).expand(40_000)
    x = process.add_noise(torch.full((40_000, 1), 2.0), drawn(40_000, 1), t)
    assert x.mean().item() == pytest.approx(2 * process.alpha(t)[0].item(), abs=0.02 * (1 + process.sigma(t)[0].item()))
    assert x.std().item() == pytest.approx(process.sigma(t)[0].item(), rel=0.02)


def test_discrete_tables_are_those_of_diffusers():
    for process, options in (
        (DiscreteVP.linear(), {"beta_schedule": "linear"}),
        (DiscreteVP.scaled_linear(), {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
        (DiscreteVP.cosine(), {"beta_schedule": "squaredcos_cap_v2"}),
    ):
        theirs = DDPMScheduler(**options)
        torch.testing.assert_close(process.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-4, atol=1e-7)
        t = torch.tensor([0, 400, 999])
        x, eps = drawn(3, 2, 1, 1), drawn(3, 2, 1, 1, seed=1)
        torch.testing.assert_close(process.add_noise(x, eps, t), theirs.add_noise(x, eps, t), rtol=1e-4, atol=1e-5)


def test_discrete_times():
    process = DiscreteVP.linear()
    assert process.few_step_times(4).tolist() == [999, 749, 499, 249]
    assert process.few_step_times(1).tolist() == [999]
    t = process.sample_t(20_000, torch.Generator().manual_seed(0), low=0.02, high=0.98)
    assert (t.min().item(), t.max().item()) == (20, 979)
    whole = process.sample_t(50_000, torch.Generator().manual_seed(0))
    assert (whole.min().item(), whole.max().item()) == (0, 999)
    assert whole.float().mean().item() == pytest.approx(499.5, abs=5)


def test_karras_levels_are_those_of_diffusers():
    theirs = EDMEulerScheduler()
    theirs.set_timesteps(10)
    ours = Karras().at(1 - torch.arange(10) / 9)
    torch.testing.assert_close(ours, theirs.sigmas[:-1].float(), rtol=1e-4, atol=1e-6)
    assert Karras().network_time(torch.tensor([math.e**4])).item() == pytest.approx(1.0)


def test_the_table_survives_a_change_of_precision():
    denoiser = Denoiser(PointDenoiser(), DiscreteVP.linear(), V()).bfloat16()
    assert denoiser.process.alphas_cumprod.dtype == torch.float64
    x = torch.zeros(2, 2, 1, 1, dtype=torch.bfloat16)
    assert denoiser(x, torch.tensor([3, 999])).dtype == torch.bfloat16


# -- parameterisations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("name", PROCESSES)
def test_the_target_stands_for_the_clean_sample(name, prediction):
    process, predicts = PROCESSES[name], PREDICTIONS[prediction]
    if prediction == "edm" and name != "karras":
        pytest.skip("EDM's table is for alpha 1")
    t = process.at(torch.tensor([0.1, 0.5, 0.9]))
    x_0, eps = drawn(3, 4).double(), drawn(3, 4, seed=1).double()
    alpha, sigma = process.levels(t, x_0)
    x_t = process.add_noise(x_0, eps, t)
    target = predicts.target(x_0, eps, alpha, sigma)
    torch.testing.assert_close(predicts.x_0(target, x_t, alpha, sigma), x_0)
    off = target + drawn(3, 4, seed=2).double()  # an error of the output, seen from x_0
    error = (predicts.x_0(off, x_t, alpha, sigma) - x_0).square()
    torch.testing.assert_close(predicts.weight(alpha, sigma) * error, (off - target).square())


def test_edm_keeps_input_output_and_weight_at_unit_scale():
    """Karras et al., appendix B.6: c_in x_t and the target have unit variance; lambda is 1 / c_out^2."""
    edm = EDM(0.5)
    x_0, eps = 0.5 * drawn(200_000), drawn(200_000, seed=1)
    for level in (0.02, 0.5, 5.0):
        sigma = torch.tensor(level)
        assert (edm.c_in(1.0, sigma) * (x_0 + sigma * eps)).std().item() == pytest.approx(1, abs=0.01)
        assert edm.target(x_0, eps, torch.tensor(1.0), sigma).std().item() == pytest.approx(1, abs=0.01)
        assert edm.weight(torch.tensor(1.0), sigma).item() == pytest.approx(level**-2 + 4)


def test_between_predictions():
    alpha, sigma = torch.tensor(0.8), torch.tensor(0.6)
    x_0, eps = drawn(5, 2), drawn(5, 2, seed=1)
    x_t = alpha * x_0 + sigma * eps
    torch.testing.assert_close(eps_of(x_0, x_t, alpha, sigma), eps)
    torch.testing.assert_close(score_of(x_0, x_t, alpha, sigma), -eps / sigma)
    torch.testing.assert_close(x_0_of_score(score_of(x_0, x_t, alpha, sigma), x_t, alpha, sigma), x_0)


def test_weights_and_times_of_the_denoising_loss():
    alpha, sigma = torch.tensor([0.99, 0.5]), torch.tensor([0.14, 0.87])
    torch.testing.assert_close(min_snr_weight(alpha, sigma), torch.tensor([5.0, (0.5 / 0.87) ** 2]))
    generator = torch.Generator().manual_seed(0)
    logs = log_normal_sigmas(20_000, generator).log()
    assert (logs.mean().item(), logs.std().item()) == pytest.approx((-1.2, 1.2), abs=0.05)
    times = logit_normal_times(20_000, generator)
    assert times.min() > 0 and times.max() < 1 and times.median().item() == pytest.approx(0.5, abs=0.02)
    own = batches(levels={"a": log_normal_sigmas})
    assert next(own)["a_t"].shape == (32,)


@pytest.mark.parametrize("prediction", ["eps", "v", "flow"])
def test_plain_networks_of_one_function_are_one_denoiser(prediction):
    """A network that puts out the exact eps, v or u is the exact denoiser, whatever it is called."""
    process = RectifiedFlow() if prediction == "flow" else DiscreteVP.cosine()
    exact = Exact(process)
    predicts = PREDICTIONS[prediction]

    class Net(nn.Module):
        config = type("Config", (), {"num_class_embeds": None})

        def forward(self, sample, timestep, return_dict=True):
            t = timestep / 1000 if prediction == "flow" else timestep
            alpha, sigma = process.levels(t, sample)
            x_0 = exact(sample, t)
            return (predicts.target(x_0, eps_of(x_0, sample, alpha, sigma), alpha, sigma),)

    x, t = drawn(4, 2, 1, 1), process.at(torch.tensor([0.2, 0.4, 0.6, 0.8]))
    torch.testing.assert_close(Denoiser(Net(), process, predicts)(x, t), exact(x, t))


# -- samplers: the exact solution -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROCESSES)
def test_ddim_and_heun_solve_the_ode(name):
    """On the exact score the samplers reach the closed form; Euler's error falls with the step, Heun's is smaller."""
    process = Karras(sigma_max=20) if name == "karras" else PROCESSES[name]
    exact = Exact(process)
    start = process.prior_std * drawn(64, 2)
    errors: dict[str, list[float]] = {"ddim": [], "heun": []}
    for steps in (25, 50, 100):
        t = process.at(1 - torch.arange(steps) / steps)
        wanted = exact.solution(start, t[:1]) if name != "flow" else exact.mean + exact.std * start
        errors["ddim"].append((ddim(exact, start, t, process) - wanted).abs().max().item())
        errors["heun"].append((heun(exact, start, t, process) - wanted).abs().max().item())
        torch.testing.assert_close(euler(exact, start, t, process), ddim(exact, start, t, process))
    assert errors["ddim"][2] < 0.75 * errors["ddim"][1] < 0.6 * errors["ddim"][0]
    assert errors["ddim"][2] < 0.06
    # In sigma / alpha the cosine schedule's first steps are huge, which costs Heun's method its order there.
    assert errors["heun"][2] < (0.8 if name == "vp-cosine" else 0.5) * errors["ddim"][2]


@pytest.mark.parametrize("name", PROCESSES)
def test_ancestral_samples_have_the_right_moments(name):
    process = Karras(sigma_max=20) if name == "karras" else PROCESSES[name]
    exact, generator = Exact(process), torch.Generator().manual_seed(0)
    t = process.at(1 - torch.arange(200) / 200)
    x = ancestral(exact, process.prior_std * drawn(4000, 1), t, process, generator=generator)
    assert x.mean().item() == pytest.approx(exact.mean, abs=0.04)
    assert x.std().item() == pytest.approx(exact.std, rel=0.05)
    other = ancestral(exact, process.prior_std * drawn(4000, 1), t, process, generator=generator)
    assert (x - other).abs().mean() > 0.1  # the same start, other noise


# -- samplers: diffusers --------------------------------------------------------------------------------------------


def step_through(scheduler, x: Tensor, output, generator=None) -> Tensor:
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        x = scheduler.step(output(x, scaled, t), t, x, **({} if generator is None else {"generator": generator}))[0]
    return x


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_ddim_against_diffusers(prediction):
    theirs = DDIMScheduler(clip_sample=False, prediction_type=prediction, steps_offset=0)
    theirs.set_timesteps(20)
    process, predicts = read_scheduler(theirs)
    exact, start = Exact(process), drawn(8, 2)

    def output(x, scaled, t):
        alpha, sigma = process.levels(t.expand(len(x)), x)
        x_0 = exact(x, t.expand(len(x)))
        return predicts.target(x_0, eps_of(x_0, x, alpha, sigma), alpha, sigma)

    # theirs takes alpha before the first step for the last target; ours ends at the clean sample, as set_alpha_to_one
    found = ddim(exact, start, theirs.timesteps, process)
    torch.testing.assert_close(found, step_through(theirs, start, output), rtol=1e-3, atol=1e-4)


def test_ancestral_is_ddpm():
    """On all T steps, DDIM with eta 1 is DDPM with the posterior's variance."""
    theirs = DDPMScheduler(num_train_timesteps=50, clip_sample=False, variance_type="fixed_small")
    theirs.set_timesteps(50)
    process, _ = read_scheduler(theirs)
    exact, start = Exact(process), drawn(30_000, 1)

    def output(x, scaled, t):
        alpha, sigma = process.levels(t.expand(len(x)), x)
        return eps_of(exact(x, t.expand(len(x))), x, alpha, sigma)

    ours = ancestral(exact, start, theirs.timesteps, process, generator=torch.Generator().manual_seed(1))
    other = step_through(theirs, start, output, torch.Generator().manual_seed(1))
    torch.testing.assert_close(ours, other, rtol=1e-3, atol=1e-3)


def test_euler_and_heun_against_edm():
    theirs = EDMEulerScheduler(sigma_max=10.0)
    theirs.set_timesteps(12)
    process, edm = read_scheduler(theirs)
    exact, sigmas = Exact(process), theirs.sigmas[:-1].float()
    start = 10.0 * drawn(8, 2)
    index = {float(t): s for t, s in zip(theirs.timesteps, sigmas, strict=True)}

    def output(x, scaled, t):
        sigma = index[float(t)]
        x_0 = exact(x, sigma.expand(len(x)))
        return (x_0 - edm.c_skip(sigma) * x) / edm.c_out(sigma)

    torch.testing.assert_close(
        euler(exact, start, sigmas, process), step_through(theirs, start, output), rtol=1e-3, atol=1e-4
    )
    heuns = HeunDiscreteScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    heuns.set_timesteps(15)
    whole = Exact(Karras())

    def eps(x, scaled, t):
        sigma = heuns.sigmas[heuns.step_index]
        return (x - whole(x, sigma.expand(len(x)))) / sigma

    begun = float(heuns.init_noise_sigma) * drawn(8, 2)
    levels = torch.cat([heuns.sigmas[:1], heuns.sigmas[1:-1:2]])
    wanted = step_through(heuns, begun, eps)
    torch.testing.assert_close(heun(whole, begun, levels, Karras()), wanted, rtol=1e-3, atol=1e-4)


def test_euler_against_flow_matching():
    theirs = FlowMatchEulerDiscreteScheduler(shift=3.0)
    theirs.set_timesteps(10)
    process, predicts = read_scheduler(theirs)
    assert isinstance(predicts, FlowVelocity) and process.shift == 3.0
    exact, start = Exact(process), drawn(8, 2)

    def output(x, scaled, t):
        time = (t / 1000).expand(len(x))
        return (x - exact(x, time)) / time[:, None]

    found = euler(exact, start, theirs.sigmas[:-1], process)
    torch.testing.assert_close(found, step_through(theirs, start, output), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(process.at(torch.tensor([1.0, 0.5])), torch.tensor([1.0, 0.75]))


# -- few steps ------------------------------------------------------------------------------------------------------


def few(denoiser: Denoiser, steps: int) -> FewStepGenerator:
    return FewStepGenerator(denoiser, denoiser.process.few_step_times(steps))


def small(process: Process | None = None, predicts: Parameterisation | None = None, **options) -> Denoiser:
    torch.manual_seed(3)
    return Denoiser(PointDenoiser(width=16, depth=1, **options), process or DiscreteVP.cosine(), predicts or V())


def test_backward_simulation_is_the_sampler_cut_short():
    """Step j's input is what the sampler would feed it: x_{t'} = a x + s eps' with the noise of that step."""
    model = few(small(), 4)
    noise, process = drawn(6, 4, 2, 1, 1), model.denoiser.process
    x = noise[:, 0]
    for j, t in enumerate([999, 749, 499, 249]):
        if j:
            x = process.add_noise(clean, noise[:, j], torch.full((6,), t))  # noqa: F821
        clean = model.denoiser(x, torch.full((6,), t))
        torch.testing.assert_close(model(noise, j), clean)
    torch.testing.assert_close(model.sample(noise), clean)
    assert not model.sample(noise).requires_grad


def test_only_the_last_step_has_a_gradient():
    model, noise = few(small(), 3), drawn(6, 3, 2, 1, 1)
    model(noise, 2).sum().backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    with torch.no_grad():
        x = model.denoiser.process.add_noise(model(noise, 1), noise[:, 2], torch.full((6,), model.times[2]))
    model.denoiser(x, torch.full((6,), model.times[2])).sum().backward()
    for p, wanted in zip(model.parameters(), found, strict=True):
        torch.testing.assert_close(p.grad, wanted)


def test_on_noised_data_the_generator_is_one_denoiser():
    model, noise, real = few(small(), 2), drawn(6, 2, 2, 1, 1), drawn(6, 2, 1, 1, seed=5)
    t = torch.full((6,), 499)
    wanted = model.denoiser(model.denoiser.process.add_noise(real, noise[:, 1], t), t)
    torch.testing.assert_close(model(noise, 1, noised_data=real), wanted)
    torch.testing.assert_close(model(noise, 0, noised_data=real), model(noise, 0))  # the first input is pure noise


def test_few_steps_against_lcm_scheduler():
    model = few(small(), 4)
    scheduler = write_scheduler(model.denoiser, times=model.times)
    assert isinstance(scheduler, LCMScheduler)
    scheduler.set_timesteps(4)
    assert scheduler.timesteps.tolist() == model.times
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.randn(6, 2, 1, 1, generator=generator) for _ in range(4)], 1)
    generator.manual_seed(0)
    x = torch.randn(6, 2, 1, 1, generator=generator)
    with torch.no_grad():
        theirs = step_through(scheduler, x, lambda x, scaled, t: model.denoiser.output(x, t.expand(6)), generator)
    torch.testing.assert_close(model.sample(noise), theirs, rtol=1e-3, atol=1e-4)


def test_few_steps_against_the_consistency_scheduler():
    denoiser = small(Karras(noise_scale=1000.0), EDM(0.5), time_scale=1e-4)
    model = few(denoiser, 2)
    scheduler = write_scheduler(denoiser, times=model.times)
    assert isinstance(scheduler, CMStochasticIterativeScheduler)
    scheduler.set_timesteps(2)
    torch.testing.assert_close(scheduler.sigmas[:2].float(), torch.tensor(model.times), rtol=1e-4, atol=0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.stack([torch.randn(6, 2, 1, 1, generator=generator) for _ in range(2)], 1)
    generator.manual_seed(0)
    x = scheduler.init_noise_sigma * torch.randn(6, 2, 1, 1, generator=generator)
    with torch.no_grad():
        theirs = step_through(scheduler, x, lambda x, scaled, t: denoiser.net(scaled, t)[0], generator)
    torch.testing.assert_close(model.sample(noise), theirs, rtol=0.02, atol=0.02)  # theirs starts at sigma_min, not 0


def test_the_ode_sampler_is_ddim_on_the_first_noise():
    denoiser = small()
    t = denoiser.process.few_step_times(5)
    noise = drawn(4, 3, 2, 1, 1)
    wanted = ddim(denoiser, noise[:, 0], t, denoiser.process)
    torch.testing.assert_close(OdeSampler(denoiser, denoiser.process, t)(noise), wanted)


# -- guidance -------------------------------------------------------------------------------------------------------


def test_guidance():
    denoiser = small(num_class_embeds=4)
    x, t, labels = drawn(5, 2, 1, 1), torch.full((5,), 300), torch.tensor([0, 1, 2, 0, 1])
    conditional, unconditional = denoiser(x, t, labels), denoiser(x, t, torch.full((5,), 3))
    model = ClassifierFreeGuidance(denoiser, scale=2.5, null_class=3)
    torch.testing.assert_close(model(x, t, labels), unconditional + 2.5 * (conditional - unconditional))
    torch.testing.assert_close(ClassifierFreeGuidance(denoiser, scale=1.0, null_class=3)(x, t, labels), conditional)
    assert not torch.allclose(conditional, unconditional)
    # guiding x_0 is guiding the score
    alpha, sigma = denoiser.process.levels(t, x)
    by_score = guided(score_of(conditional, x, alpha, sigma), score_of(unconditional, x, alpha, sigma), 2.5)
    torch.testing.assert_close(
        x_0_of_score(by_score, x, alpha, sigma), guided(conditional, unconditional, 2.5), rtol=1e-4, atol=1e-5
    )


# -- directories of diffusers ---------------------------------------------------------------------------------------


def unet(**options) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=options.pop("out_channels", 1),
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        add_attention=False,
        **options,
    ).eval()


def test_a_ddpm_pipeline_is_read(tmp_path):
    net = unet()
    DDPMPipeline(net, DDPMScheduler(beta_schedule="squaredcos_cap_v2")).save_pretrained(tmp_path)
    denoiser = load_denoiser(str(tmp_path))
    assert denoiser.shape == (1, 8, 8) and denoiser.classes == 0
    assert isinstance(denoiser.process, DiscreteVP) and denoiser.parameterisation == Epsilon()
    x, t = drawn(2, 1, 8, 8), torch.tensor([10, 700])
    with torch.no_grad():
        alpha, sigma = denoiser.process.levels(t, x)
        torch.testing.assert_close(denoiser(x, t), (x - sigma * net(x, t).sample) / alpha)


def test_a_learned_variance_is_ignored():
    denoiser = Denoiser(unet(out_channels=2), DiscreteVP.linear(), Epsilon())
    assert denoiser(drawn(2, 1, 8, 8), torch.tensor([10, 700])).shape == (2, 1, 8, 8)


@pytest.mark.parametrize("kind", ["points", "images"])
def test_a_saved_student_is_a_pipeline(tmp_path, kind):
    net = PointDenoiser(width=8, depth=1) if kind == "points" else unet(num_class_embeds=3)
    denoiser = Denoiser(net, DiscreteVP.cosine(), V()).eval()
    model = few(denoiser, 4)
    save_pipeline(denoiser, tmp_path, times=model.times)
    again = load_denoiser(str(tmp_path))
    assert again.parameterisation == V()
    torch.testing.assert_close(again.process.alphas_cumprod, denoiser.process.alphas_cumprod, rtol=1e-3, atol=1e-8)
    pipeline = DiffusionPipeline.from_pretrained(tmp_path)
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    labels = [0, 1, 2] if kind == "images" else None
    found = pipeline(3, num_inference_steps=4, class_labels=labels, generator=generator, output_type="pt").images
    generator.manual_seed(0)
    noise = torch.stack([torch.randn(3, *denoiser.shape, generator=generator) for _ in range(4)], 1)
    wanted = model.sample(noise, None if labels is None else torch.tensor(labels))
    torch.testing.assert_close(found, (wanted / 2 + 0.5).clamp(0, 1), rtol=1e-3, atol=1e-3)


def test_a_teacher_survives_saving(tmp_path):
    for process, predicts in (
        (DiscreteVP.linear(), Epsilon()),
        (Karras(sigma_max=7), EDM(0.4)),
        (RectifiedFlow(shift=2.0), FlowVelocity()),
    ):
        denoiser = small(process, predicts).eval()
        folder = tmp_path / type(process).__name__
        save_pipeline(denoiser, folder)
        again = load_denoiser(str(folder))
        assert again.parameterisation == predicts
        x, t = drawn(3, 2, 1, 1), process.at(torch.tensor([0.2, 0.6, 0.9]))
        torch.testing.assert_close(again(x, t), denoiser(x, t), rtol=1e-3, atol=1e-4)


def test_bad_teachers_are_one_clear_line(tmp_path):
    for name, expected in (("nothing-here/at/all", "cannot be loaded"), (str(tmp_path), "no model_index.json")):
        with pytest.raises(ModelError, match=expected) as found:
            load_denoiser(name)
        assert "\n" not in str(found.value)
    save_pipeline(small(), tmp_path / "half")
    (tmp_path / "half/unet/diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(ModelError, match="half"):
        load_denoiser(str(tmp_path / "half"))


# -- batches --------------------------------------------------------------------------------------------------------


def batches(**options) -> NoisyBatches:
    known = density("eight-gaussians")

    def draw(count, generator):
        points, labels = known.draw(count, generator)
        return points[:, :, None, None], labels

    options = {"levels": {"a": (0.5, 1.0)}, **options}
    return NoisyBatches(draw, DiscreteVP.cosine(), batch_size=32, steps=4, **options)


def test_batches_go_on_where_they_stood():
    one, other = batches(seed=1), batches(seed=1)
    first = [next(one) for _ in range(3)]
    state = one.state_dict()
    wanted = next(one)
    other.load_state_dict(state)
    found = next(other)
    assert found.keys() == wanted.keys() and found["step"] == wanted["step"]
    assert all(torch.equal(found[k], wanted[k]) for k in found if k != "step")
    assert not torch.equal(first[0]["noise"], first[1]["noise"])
    assert not torch.equal(next(batches(seed=2))["noise"], first[0]["noise"])
    assert (first[0]["a_t"] >= 500).all()
    assert {next(one)["step"] for _ in range(40)} == {0, 1, 2, 3}


def test_processes_draw_other_noise_for_the_same_step():
    ranks = [batches(seed=1) for _ in range(2)]
    for rank, source in enumerate(ranks):
        source.shard = (rank, 2)
    for _ in range(8):
        one, other = (next(source) for source in ranks)
        assert one["step"] == other["step"] and len(one["real"]) == 16
        assert not torch.equal(one["noise"], other["noise"])


def test_dropped_labels():
    source = batches(drop_label=0.5, null_class=8)
    labels = torch.cat([next(source)["real_labels"] for _ in range(20)])
    assert (labels == 8).float().mean().item() == pytest.approx(0.5, abs=0.1)


# -- losses and heads -----------------------------------------------------------------------------------------------


def test_adversarial_losses_at_nothing():
    zero = torch.zeros(4)
    assert non_saturating_discriminator(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert non_saturating_generator(zero).item() == pytest.approx(math.log(2))
    assert (hinge_discriminator(zero, zero).item(), hinge_generator(zero).item()) == (2.0, 0.0)
    sure = torch.full((4,), 3.0)
    assert hinge_discriminator(sure, -sure).item() == 0.0
    assert non_saturating_discriminator(sure, -sure) < non_saturating_discriminator(-sure, sure)


def test_r1_of_a_linear_discriminator():
    weight, x = torch.tensor([3.0, 4.0], requires_grad=True), drawn(6, 2).requires_grad_()
    penalty = r1_penalty(x @ weight, x)
    assert penalty.item() == pytest.approx(25.0)
    penalty.backward()
    torch.testing.assert_close(weight.grad, 2 * weight.detach())


def test_denoising_weights_samples():
    x, prediction = torch.zeros(2, 1, 2, 2), torch.stack([torch.ones(1, 2, 2), 2 * torch.ones(1, 2, 2)])
    assert denoising(prediction, x).item() == pytest.approx(2.5)
    assert denoising(prediction, x, torch.tensor([1.0, 0.5])).item() == pytest.approx(1.5)


@pytest.mark.parametrize(("channels", "size"), [(96, 1), (64, 4), (48, 8), (32, 16)])
def test_the_discriminator_gives_one_logit_a_sample(channels, size):
    head = FeatureDiscriminator(channels, size)
    assert head(drawn(3, channels, size, size)).shape == (3,)


# -- data and metrics -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MAKERS)
def test_densities(name):
    known = density(name)
    x, labels = known.draw(20_000, torch.Generator().manual_seed(0))
    again, _ = known.draw(20_000, torch.Generator().manual_seed(0))
    assert torch.equal(x, again) and x.shape == (20_000, 2)
    assert sorted(set(labels.tolist())) == list(range(known.classes))
    assert x.mean(0).abs().max() < 0.1 and 0.6 < x.std().item() < 1.4


def test_the_exact_score_of_a_mixture():
    """Against autograd on the log-density of the noised mixture, itself a mixture; and against brute force."""
    known = ring(std=0.3)
    alpha, sigma = torch.full((5,), 0.8), torch.full((5,), 0.6)
    x = drawn(5, 2).requires_grad_()
    spread = math.sqrt((0.8 * 0.3) ** 2 + 0.6**2)
    noised = ring(radius=0.8 * 1.4, std=spread)
    (wanted,) = torch.autograd.grad(noised.log_prob(x).sum(), x)
    found = score_of(known.exact_x_0(x, alpha[:, None], sigma[:, None]), x, 0.8, 0.6)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    x_0, _ = known.draw(400_000, torch.Generator().manual_seed(0))
    weight = (-(x[:1] - 0.8 * x_0).square().sum(1) / (2 * 0.36)).softmax(0)
    torch.testing.assert_close(
        known.exact_x_0(x, alpha[:, None], sigma[:, None])[0], (weight[:, None] * x_0).sum(0), rtol=0.02, atol=0.01
    )


def test_a_density_without_a_score_says_so():
    with pytest.raises(DataError, match="no closed form"):
        density("moons").log_prob(torch.zeros(1, 2))
    with pytest.raises(DataError, match="did you mean 'moons'"):
        density("moon")


def test_glyphs():
    images = glyphs("train", count=200)
    assert images.shape == (1, 16, 16) and images.pixels.min() >= 0 and images.pixels.max() <= 1
    assert torch.equal(images.pixels, glyphs("train", count=200).pixels)
    assert not torch.equal(images.pixels, glyphs("test", count=200).pixels)
    many, held_out = glyphs("train", count=2000), glyphs("test", count=500)
    nearest = torch.cdist(held_out.pixels.flatten(1), many.pixels.flatten(1)).argmin(1)
    accuracy = (many.labels[nearest] == held_out.labels).float().mean().item()
    assert accuracy > 0.8  # the classes can be told, and no image is copied:
    assert torch.cdist(held_out.pixels.flatten(1), many.pixels.flatten(1)).min() > 0


def test_sliced_wasserstein_of_a_shift():
    """Shifting by d costs |d . u| in direction u: in the plane 2 |d| / pi on average."""
    x = drawn(3000, 2)
    assert sliced_wasserstein(x, x) == 0
    shifted = x + torch.tensor([3.0, 4.0])
    assert sliced_wasserstein(x, shifted, projections=4000) == pytest.approx(2 * 5 / math.pi, rel=0.03)
    assert sliced_wasserstein(x, drawn(2000, 2, seed=1)) < 0.1


def test_energy_and_frechet_distances():
    x, y = drawn(1500, 3), drawn(1500, 3, seed=1)
    assert abs(energy_distance(x, y)) < 0.02 < energy_distance(x, y + 1)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(x, x + 2) == pytest.approx(12, rel=1e-5)
    assert frechet_distance(x, 3 * x) == pytest.approx(
        4 * x.double().T.cov().trace().item() + 4 * x.mean(0).square().sum().item(), rel=1e-4
    )
    features = random_features(drawn(4, 1, 16, 16))
    assert features.shape == (4, 64) and torch.equal(features, random_features(drawn(4, 1, 16, 16)))


def test_mode_coverage():
    known = ring()
    x, _ = known.draw(4000, torch.Generator().manual_seed(0))
    whole = mode_coverage(x, known.modes, radius=0.42)
    assert whole.recall == 1 and whole.precision > 0.99 and whole.entropy > 0.99
    half = mode_coverage(known.modes[:4].repeat(10, 1), known.modes, radius=0.42)
    assert half.recall == 0.5 and half.entropy == pytest.approx(math.log(4) / math.log(8))
    assert mode_coverage(torch.full((10, 2), 9.0), known.modes, radius=0.42).precision == 0
