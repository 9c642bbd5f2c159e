"""DMD2 (card 066) against closed forms: the gradient of distribution matching, who learns from whom, and how often."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillhouse import Observed, Run
from stillhouse.base.errors import ConfigError, DataError
from stillhouse.core.stage import Stage
from stillhouse.core.train import Train
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.parameterisations import EDM, Epsilon
from stillhouse.diffusion.pipelines import save_pipeline
from stillhouse.diffusion.processes import DiscreteVP, Karras
from stillhouse.losses.score import distribution_matching, distribution_matching_gradient
from stillhouse.models.denoisers import PointDenoiser
from stillhouse.objectives.diffusion import Denoising, DistributionMatching, at_noise
from stillhouse.systems.diffusion.dmd2 import DMD2
from stillhouse.tasks.diffusion import DiffusionTask, load_generator
from stillhouse.workflow import run_system

SMALL = {"steps": 11, "batch_size": 16, "student_steps": 2, "teacher_steps": 3, "eval_samples": 64, "lr": 1e-3}


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLHOUSE_CACHE", str(tmp_path_factory.getbasetemp() / "dmd2-cache"))


# -- the gradient ---------------------------------------------------------------------------------------------------


def test_the_surrogate_has_the_gradient_it_says():
    x, fake, real = (drawn(4, 3, 2, 2, seed=i).double() for i in range(3))
    x.requires_grad_()
    distribution_matching(x, fake, real).backward()
    scale = (x.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(x.grad, (fake - real) / scale / x.numel())
    loss = distribution_matching(x, fake, real)
    assert loss.item() == pytest.approx((0.5 * ((fake - real) / scale).square().mean()).item())


def test_equal_scores_pull_nowhere():
    x, fake = drawn(4, 2).requires_grad_(), drawn(4, 2, seed=1)
    loss = distribution_matching(x, fake, fake.clone())
    loss.backward()
    assert loss.item() == 0 and x.grad.abs().max() == 0
    assert distribution_matching_gradient(fake, fake, fake).abs().max() == 0  # 0 / 0 is nothing, not nan


def test_no_gradient_reaches_the_predictions():
    x, fake, real = (drawn(4, 2, seed=i).requires_grad_() for i in range(3))
    distribution_matching(x, fake, real).backward()
    assert fake.grad is None and real.grad is None and x.grad is not None


@pytest.mark.parametrize(("c", "s"), [(1.7, 0.8), (0.4, 0.5), (1.0, 1.0)])
def test_it_is_the_gradient_of_the_divergence(c, s):
    """x = c z, target N(0, 1), noise s: E of the gradient in c is s^2 d/dc KL(N(0, c^2 + s^2) || N(0, 1 + s^2))."""
    scale = torch.tensor(c, dtype=torch.float64, requires_grad=True)
    z, eps = drawn(400_000).double(), drawn(400_000, seed=1).double()
    x = scale * z
    x_t = (x + s * eps).detach()
    mu_fake, mu_real = c**2 / (c**2 + s**2) * x_t, x_t / (1 + s**2)
    distribution_matching(x[:, None], mu_fake[:, None], mu_real[:, None], normalise=False).backward()
    wanted = c / (1 + s**2) - c / (c**2 + s**2)
    assert scale.grad.item() / s**2 == pytest.approx(wanted, abs=6e-3)
    if (c, s) == (1.7, 0.8):
        assert wanted == pytest.approx(0.5550, abs=5e-5)


class Gaussian(nn.Module):
    """The exact denoiser of N(mean, std^2) under a process."""

    def __init__(self, process: DiscreteVP, mean: float, std: float) -> None:
        super().__init__()
        self.process, self.mean, self.std = process, mean, std

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        alpha, sigma = self.process.levels(timestep, sample)
        return self.mean + alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2) * (sample - alpha * self.mean)


class Shift(nn.Module):
    """A generator x = m + z."""

    def __init__(self, m: float) -> None:
        super().__init__()
        self.m = nn.Parameter(torch.tensor(m))

    def forward(self, noise: Tensor) -> Tensor:
        return self.m + noise[:, 0]


def test_the_term_follows_the_difference_of_exact_scores():
    """Both models see the same x_t; the generator is pulled from its mean to the teacher's."""
    process = DiscreteVP.cosine()
    generator = Observed(Shift(2.0))
    teacher = Observed(Gaussian(process, -1.0, 1.0), frozen=True)
    critic = Observed(Gaussian(process, 2.0, 1.0))
    x = generator.output()
    term = DistributionMatching(
        x,
        fake=at_noise(critic, process, "m", x=x.detach()).output(),
        real=at_noise(teacher, process, "m", x=x.detach()).output(),
        normalise=False,
    )
    t = torch.full((64,), 500)
    batch = {"noise": drawn(64, 1, 1, 1, 1), "m_t": t, "m_eps": drawn(64, 1, 1, 1, seed=1)}
    term(batch).backward()
    alpha, sigma = (float(level) for level in process.levels(t[:1], torch.zeros(1)))
    shift = (1 - alpha**2 / (alpha**2 + sigma**2)) * 3.0  # mu_fake - mu_real at equal x_t: exact, no Monte Carlo
    assert generator.module.m.grad.item() == pytest.approx(shift, rel=1e-4)


# -- the critic -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eps", "edm"])
def test_the_critic_s_loss_is_the_paper_s(kind):
    """eps networks: plain MSE of eps. EDM: (sigma^-2 + sigma_data^-2) times the error of the denoiser."""
    torch.manual_seed(0)
    process, predicts = (DiscreteVP.linear(), Epsilon()) if kind == "eps" else (Karras(), EDM(0.5))
    denoiser = Denoiser(PointDenoiser(width=8, depth=1, time_scale=1e-3), process, predicts)
    t = process.at(torch.tensor([0.2, 0.5, 0.7, 0.9]))
    batch = {"real": drawn(4, 2, 1, 1), "n_t": t, "n_eps": drawn(4, 2, 1, 1, seed=1)}
    view = at_noise(Observed(denoiser), process, "n")
    found = Denoising(view.output(), x="real", level="n", denoiser=denoiser)(batch)
    x_t = process.add_noise(batch["real"], batch["n_eps"], t)
    if kind == "eps":
        wanted = (denoiser.output(x_t, t) - batch["n_eps"]).square().mean()
    else:
        wanted = ((t**-2 + 4)[:, None, None, None] * (denoiser(x_t, t) - batch["real"]).square()).mean()
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


# -- the players ----------------------------------------------------------------------------------------------------


def play(folder: Path, look: Callable[[DiffusionTask, Train], None], **values: Any) -> Path:
    """Train one stage of the system on a tiny embedded teacher; ``look`` sees it before it runs."""
    system = DMD2.make(demo_steps=3, **{**SMALL, **values})

    def stages(run: Run) -> Generator[Stage, Any, None]:
        task = yield from DiffusionTask.prepare(system, run)
        stage = system._matching("student", task, None, gan=system.gan, steps=system.steps, lr=system.lr)
        stage.evaluate, stage.log_every = None, 1
        look(task, stage)
        yield stage

    run = Run(folder, quiet=True)
    run.execute(stages(run))
    return folder


def log(folder: Path) -> list[dict[str, Any]]:
    (file,) = folder.glob("stages/*-student/metrics.jsonl")
    return [json.loads(line) for line in file.open()]


def gradients(models: list[Observed]) -> list[Tensor]:
    return [p.grad for model in models for p in model.module.parameters() if p.grad is not None]


@pytest.mark.parametrize("r", [1, 5])
def test_two_time_scales(tmp_path, r):
    """The generator steps floor(N / r) + 1 times in steps 0..N, the critic in every one, the teacher never."""
    steps = {"generator": 0, "critic": 0}
    before: dict[str, Tensor] = {}
    kept: list[DiffusionTask] = []

    def look(task: DiffusionTask, stage: Train) -> None:
        kept.append(task)
        before.update({name: tensor.clone() for name, tensor in task.teacher.state_dict().items()})
        for player in stage.players:
            build = player.optimizer

            def counted(groups: Any, build: Any = build, name: str = player.name) -> torch.optim.Optimizer:
                optimizer = build(groups)

                def count(*_: Any) -> None:
                    steps[name] += 1

                optimizer.register_step_post_hook(count)
                return optimizer

            player.optimizer = counted

    play(tmp_path / "run", look, critic_steps=r)
    assert steps == {"generator": 10 // r + 1, "critic": 11}
    after = kept[0].teacher.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_generator_s_turn_leaves_nothing_in_the_critic(tmp_path):
    """When the generator steps, no weight of critic or discriminator has a gradient; and the other way round."""
    seen: list[str] = []

    def look(task: DiffusionTask, stage: Train) -> None:
        for player, others in zip(stage.players, reversed(stage.players), strict=True):
            build = player.optimizer

            def watched(groups: Any, build: Any = build, player: Any = player, others: Any = others) -> Any:
                optimizer = build(groups)

                def check(*_: Any) -> None:
                    mine = gradients(player.trained)
                    assert mine and all(torch.isfinite(gradient).all() for gradient in mine)
                    if player.name == "generator":  # in step 0 it plays first: what is there now is its own doing
                        assert seen or not gradients(others.trained)
                    seen.append(player.name)

                optimizer.register_step_pre_hook(check)
                return optimizer

            player.optimizer = watched

    play(tmp_path / "run", look, critic_steps=2, steps=1)
    assert seen == ["generator", "critic"]


def test_the_critic_s_objective_does_not_reach_the_generator(tmp_path):
    def look(task: DiffusionTask, stage: Train) -> None:
        generator, critic = stage.players
        batch = next(stage.source)
        critic.objective(batch).backward()
        assert gradients(generator.trained) == []
        assert len(critic.trained) == 2 and all(gradients([model]) for model in critic.trained)  # encoder and head
        for model in critic.trained:
            model.module.zero_grad()

    play(tmp_path / "run", look, steps=1)


def test_in_the_beginning_scores_agree(tmp_path):
    """The critic starts as the teacher: without guidance the first distribution-matching loss is exactly 0."""
    folder = play(tmp_path / "run", lambda *_: None, steps=2, critic_steps=1)
    first = next(line for line in log(folder) if line["player"] == "generator")
    assert first["terms"]["DistributionMatching"]["value"] == 0.0
    later = [line for line in log(folder) if line["player"] == "generator"][1]
    assert later["terms"]["DistributionMatching"]["value"] > 0


def test_guidance_moves_the_teacher_and_not_the_critic(tmp_path):
    def look(task: DiffusionTask, stage: Train) -> None:
        generator, critic = stage.players
        batch = {**next(stage.source), "step": 0}
        assert generator.objective(batch).item() > 0  # critic equals teacher, but the teacher is guided
        teacher = task.guided_teacher()
        x, t, labels = batch["real"], torch.full((len(batch["real"]),), 400), batch["class_labels"]
        with torch.no_grad():
            conditional, null = (task.teacher(x, t, c) for c in (labels, torch.full_like(labels, 10)))
            torch.testing.assert_close(teacher(x, t, labels), null + 3 * (conditional - null))
            torch.testing.assert_close(critic.trained[0].module(x, t, labels), conditional)

    play(tmp_path / "run", look, data="glyphs", guidance=3.0, gan=False, steps=1, batch_size=4)


def test_the_gan_pulls_the_generator_through_the_critic(tmp_path):
    """At step 0 the scores agree, so all of the generator's gradient is the GAN's, times its weight."""

    def look(task: DiffusionTask, stage: Train) -> None:
        generator, _ = stage.players
        batch = next(stage.source)
        generator.objective(batch).backward()
        found = torch.cat([g.flatten() for g in gradients(generator.trained)])
        assert found.norm() > 0
        kept.append(found.clone())

    kept: list[Tensor] = []
    for weight in (1e-2, 3e-2):
        play(tmp_path / str(weight), look, gan_weight=weight, steps=1)
    torch.testing.assert_close(kept[1], 3 * kept[0], rtol=1e-3, atol=1e-8)
    with pytest.raises(AssertionError):
        play(tmp_path / "none", look, gan=False, steps=1)


def test_the_gan_sees_noised_samples_of_its_part_of_the_schedule(tmp_path):
    def look(task: DiffusionTask, stage: Train) -> None:
        many = [next(stage.source) for _ in range(20)]
        for name, low, high in (("gan", 0, 299), ("gan_real", 0, 299), ("matching", 20, 979), ("tracking", 0, 999)):
            t = torch.cat([batch[f"{name}_t"] for batch in many])
            assert low <= t.min() and t.max() <= high and t.max() > 0.8 * high, name

    play(tmp_path / "run", look, gan_noise=0.3, steps=1)


# -- the system -----------------------------------------------------------------------------------------------------


def test_all_stages_hand_on_their_weights(tmp_path):
    """Regression, then scores, then the GAN: each begins where the one before it ended; the result samples."""
    values = {**SMALL, "demo_steps": 3, "regression_steps": 2, "score_steps": 3, "lr": 1e-9, "weight_decay": 0.0}
    done = run_system(
        "src/stillhouse/systems/diffusion/dmd2.py", {**values, "trackers": []}, output=tmp_path / "run", quiet=True
    )
    assert list(done.artifacts) == ["teacher", "regression", "scores", "student", "evaluation"]
    student, before = (load_generator(done.artifacts[name].path) for name in ("student", "scores"))
    assert student.times == [999, 499]
    for found, wanted in zip(student.parameters(), before.parameters(), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-7)
    metrics = done.artifacts["evaluation"].metrics
    assert {"student/swd", "teacher/swd", "data/swd", "student/modes"} <= metrics.keys()
    assert math.isfinite(metrics["student/swd"]) and metrics["data/swd"] > 0
    assert "<svg" in (done.artifacts["evaluation"].path / "samples.svg").read_text()


def test_a_pipeline_and_images_of_the_user(tmp_path):
    """A class-conditional UNet2DModel with a DDPM scheduler, and a folder of images: the same class, guided."""
    from diffusers import ConsistencyModelPipeline, DDPMScheduler, DiffusionPipeline, UNet2DModel
    from PIL import Image

    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    options = {"layers_per_block": 1, "norm_num_groups": 4, "add_attention": False, "num_class_embeds": 3}
    net = UNet2DModel(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(8, 8), **blocks, **options)
    ConsistencyModelPipeline(net, DDPMScheduler()).save_pretrained(tmp_path / "teacher")
    for label in ("cats", "dogs"):
        (tmp_path / "images" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (12, 10), (40 * i, 200, 90)).save(tmp_path / "images" / label / f"{i}.png")
    values = {
        **SMALL,
        "steps": 3,
        "teacher": str(tmp_path / "teacher"),
        "data": str(tmp_path / "images"),
        "guidance": 2,
    }
    done = run_system(
        "src/stillhouse/systems/diffusion/dmd2.py",
        {**values, "batch_size": 4, "trackers": []},
        output=tmp_path / "run",
        quiet=True,
    )
    pipeline = DiffusionPipeline.from_pretrained(done.artifacts["student"].path)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(2, num_inference_steps=2, class_labels=[0, 1], output_type="np").images
    assert images.shape == (2, 8, 8, 3)
    assert math.isfinite(done.artifacts["evaluation"].metrics["student/frechet"])
    with pytest.raises(DataError, match="has samples"):
        _prepare(tmp_path / "bad", teacher=str(tmp_path / "teacher"), data="moons")


def _prepare(folder: Path, **values: Any) -> DiffusionTask:
    system, run, kept = DMD2.make(demo_steps=3, **values), Run(folder, quiet=True), []

    def stages() -> Generator[Stage, Any, None]:
        task = yield from DiffusionTask.prepare(system, run)
        task.guided_teacher()
        task.new_generator(system.student_steps, first_timestep=system.first_timestep)
        kept.append(task)

    run.execute(stages())
    return kept[0]


def test_bad_values_are_one_clear_line(tmp_path):
    for number, (values, error, expected) in enumerate(
        [
            ({"guidance": 2.0}, ConfigError, "takes no class"),
            ({"data": "glyphs", "guidance": 2.0, "null_class": 11}, ConfigError, "no class 11"),
            ({"teacher": "demo", "data": "my-images"}, ConfigError, "pass your own teacher"),
            ({"teacher": "demo:nothing"}, ConfigError, "embedded data"),
            ({"first_timestep": 399, "student_steps": 4}, ConfigError, "one step"),
        ]
    ):
        with pytest.raises(error, match=expected) as found:
            _prepare(tmp_path / str(number), **values)
        assert "\n" not in str(found.value)


def test_a_student_of_one_step_can_be_told_another_time(tmp_path):
    folder = tmp_path / "teacher"
    torch.manual_seed(0)
    save_pipeline(Denoiser(PointDenoiser(width=8, depth=1), DiscreteVP.linear(), Epsilon()), folder)
    task = _prepare(tmp_path / "run", teacher=str(folder), student_steps=1, first_timestep=399)
    generator = task.new_generator(1, first_timestep=399)
    assert generator.times == [399]
    noise = drawn(4, 1, 2, 1, 1)
    t = torch.full((4,), 399)
    torch.testing.assert_close(generator(noise, 0), generator.denoiser(noise[:, 0], t))
