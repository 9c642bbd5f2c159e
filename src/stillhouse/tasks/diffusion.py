"""The diffusion task: teachers, data, samples and measurements, embedded or the user's own.

`DiffusionSystem` has the fields that all diffusion systems share; `DiffusionTask.prepare` turns them into a teacher,
data and measurements. Embedded data are densities in the plane and 16 x 16 glyphs; a small teacher is trained on them
once and kept in the cache. The user's teacher is a ``diffusers`` pipeline, and the data a folder or data set of images.

Shapes: B samples (C, H, W); a point in the plane is an image of one pixel with two channels, (2, 1, 1).
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, cast

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError, DataError, one_line
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.ema import EMA
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed, Signal, View
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.schedule import cosine, linear
from stillhouse.core.stage import Context, Evaluate, Stage
from stillhouse.core.system import System
from stillhouse.core.train import Train
from stillhouse.data.densities import MAKERS, Density, density
from stillhouse.data.glyphs import glyphs
from stillhouse.data.images import Images, load_images
from stillhouse.data.text import load_text
from stillhouse.diffusion.batches import DrawData, NoisyBatches
from stillhouse.diffusion.denoiser import Denoiser
from stillhouse.diffusion.guidance import ClassifierFreeGuidance
from stillhouse.diffusion.parameterisations import V
from stillhouse.diffusion.pipelines import load_denoiser, save_pipeline
from stillhouse.diffusion.processes import DiscreteVP
from stillhouse.diffusion.samplers import FewStepGenerator, OdeSampler, ddim
from stillhouse.diffusion.spaces import Pixels, Space
from stillhouse.metrics.generative import (
    energy_distance,
    frechet_distance,
    mode_coverage,
    random_features,
    sliced_wasserstein,
)
from stillhouse.models.discriminators import FeatureDiscriminator
from stillhouse.models.lora import ADAPTER, add_lora, has_lora, load_lora, merged, save_lora
from stillhouse.objectives.diffusion import Denoising, SampleMSE, at_noise
from stillhouse.tasks.pictures import sample_picture

DEMO = "demo"
GLYPHS = "glyphs"
CRITIC = "critic"  # folder of a critic inside its generator's artifact
Sampler = Callable[[int, torch.Generator], Tensor]


@dataclass(kw_only=True)
class DiffusionSystem(System):
    """Fields of every system that distils diffusion models."""

    teacher: Annotated[
        str,
        "directory or hub id of a diffusers pipeline: network and scheduler, perhaps text encoders and autoencoder; "
        "'demo': a small one, trained once on the data; 'demo:NAME': trained on other embedded data",
    ] = DEMO
    data: Annotated[
        str,
        "folder of class folders of images, .parquet, hub data set; or embedded: eight-gaussians, "
        "broad-eight-gaussians, grid, moons, spirals, checkerboard, glyphs",
    ] = "eight-gaussians"
    split: Annotated[str, "split of a data set"] = "train"
    image_field: Annotated[str | None, "column with the images; found by itself by default"] = None
    label_field: Annotated[
        str | None, "column with the classes (for a teacher that reads: captions); found by itself by default"
    ] = None
    prompts: Annotated[
        str | None,
        "text to generate from, for a teacher that reads: .txt with one a line, .jsonl or .parquet with a column text; "
        "by default the names of the data's classes",
    ] = None
    demo_steps: Annotated[
        int | None, "steps the embedded teacher is trained for; by default enough to sample well", Ge(1)
    ] = None
    guidance: Annotated[float, "classifier-free guidance of the teacher; 1 is none", Ge(0)] = 1.0
    null_class: Annotated[
        int | None, "the label that means no class; by default the one after the last (of texts: the empty one)", Ge(0)
    ] = None
    steps: Annotated[int, "steps of the main training", Ge(1)] = 100_000
    batch_size: Annotated[int, "samples in a batch, all processes together", Ge(1)] = 256
    lr: Annotated[float, "learning rate of AdamW", Gt(0)] = 1e-4
    beta1: Annotated[float, "AdamW's first momentum", Ge(0), Lt(1)] = 0.9
    beta2: Annotated[float, "AdamW's second momentum", Gt(0), Lt(1)] = 0.999
    weight_decay: Annotated[float, "decoupled weight decay", Ge(0)] = 0.01
    warmup: Annotated[int, "steps over which the learning rate rises", Ge(0)] = 0
    clip: Annotated[float | None, "largest gradient norm", Gt(0)] = 1.0
    ema: Annotated[
        float, "decay of the average of the student's weights that is kept; 0 keeps the last", Ge(0), Lt(1)
    ] = 0.0
    teacher_steps: Annotated[int, "DDIM steps the teacher is measured with", Ge(1)] = 50
    eval_samples: Annotated[int, "samples that figures are computed from", Ge(64)] = 4096

    demo: ClassVar[dict[str, Any]] = {}

    def is_demo(self) -> bool:
        return self.__dict__["teacher"].partition(":")[0] == DEMO and self.__dict__["data"] in (*MAKERS, GLYPHS)


@dataclass(eq=False)
class GenerativeData:
    """Data to model: how to draw them, and some held out; ``names`` are those of the classes."""

    name: str
    draw: DrawData
    names: tuple[str, ...]
    held_out: Tensor
    fingerprint: str
    density: Density | None = None

    @property
    def classes(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, ...]:
        """(C, H, W)."""
        return tuple(self.held_out.shape[1:])


@dataclass
class DiffusionTask:
    """What a diffusion system works with, once its fields have been turned into objects.

    ``generated`` are the conditions that samples are generated for: the first one, and how many.
    """

    system: DiffusionSystem
    run: Run
    teacher: Denoiser
    data: GenerativeData
    generated: tuple[int, int]

    @staticmethod
    def prepare(system: DiffusionSystem, run: Run) -> Generator[Stage, Artifact, DiffusionTask]:
        """Build the task; on the embedded task this yields the stage that trains the teacher."""
        kind, _, taught = system.teacher.partition(":")
        if kind == DEMO and (taught or system.data) not in (*MAKERS, GLYPHS):
            raise ConfigError(
                f"teacher={system.teacher} is trained on embedded data ({', '.join((*MAKERS, GLYPHS))}); for your own "
                "data pass your own teacher"
            )
        if kind == DEMO:
            teacher = yield from _demo_teacher(_embedded(taught or system.data), run, system.demo_steps)
        else:
            teacher = load_denoiser(system.teacher)
        teacher.space.to(run.fabric.device)
        data = _data(system, teacher)
        prompts = () if system.prompts is None else read_prompts(system.prompts)
        teacher.conditions = teacher.conditions.of(data.names, prompts)
        if data.shape != teacher.shape:
            raise DataError(
                f"data={system.data} has samples {data.shape}, the teacher makes {teacher.shape}; use data it fits"
            )
        if teacher.classes and data.classes > teacher.classes:
            raise DataError(
                f"data={system.data} has {data.classes} classes, the teacher knows {teacher.classes}; use data it fits"
            )
        generated = (data.classes, len(prompts)) if prompts else (0, data.classes)
        return DiffusionTask(system, run, teacher, data, generated)

    # -- models -----------------------------------------------------------------------------------------------------

    def copy_of_teacher(self) -> Denoiser:
        """A network to train that starts as the teacher."""
        return copy.deepcopy(self.teacher).requires_grad_(True)

    def guided_teacher(self) -> nn.Module:
        """The teacher under the system's guidance, called as a denoiser."""
        scale = self.system.guidance
        if scale == 1.0 or not self.teacher.classes:
            if scale != 1.0:
                raise ConfigError(f"guidance={scale}: the teacher takes no class; set guidance=1")
            return self.teacher
        null = self.system.null_class
        null = self.teacher.conditions.null(self.data.classes) if null is None else null
        if null >= self.teacher.classes:
            raise ConfigError(
                f"guidance={scale}: the teacher has no class {null} that could mean none (it has 0 to "
                f"{self.teacher.classes - 1}); set null_class to the one it was trained with, or guidance=1"
            )
        return ClassifierFreeGuidance(self.teacher, scale=scale, null_class=null)

    def observed_teacher(self) -> Observed:
        """The frozen, guided teacher."""
        return Observed(self.guided_teacher(), frozen=True, name="teacher")

    def new_generator(
        self,
        steps: int,
        *,
        first_timestep: int | None = None,
        before: Artifact | None = None,
        lora: tuple[int, float] | None = None,
    ) -> FewStepGenerator:
        """A student: a copy of the teacher, or of what an earlier stage made of it.

        Args:
            steps: network calls for a sample.
            first_timestep: the time that a student of one step is told; by default the noisiest.
            lora: the teacher's weights stay, and adapters of this rank and alpha (`add_lora`) are the student's.
        """
        times = self.teacher.process.few_step_times(steps)
        if first_timestep is not None:
            if steps > 1:
                raise ConfigError("first_timestep is for students of one step; set student_steps=1")
            times = torch.full_like(times, first_timestep)
        if lora is not None:
            denoiser = self.copy_of_teacher()
            add_lora(denoiser.net, rank=lora[0], alpha=lora[1], seed=self.system.seed)
            if before is not None and (before.path / ADAPTER).exists():
                load_lora(denoiser.net, before.path)
        else:
            denoiser = self.copy_of_teacher() if before is None else self.load(before.path)
        return FewStepGenerator(denoiser.train(), times)

    def load(self, folder: Path) -> Denoiser:
        """A denoiser that a stage left; it has the teacher's conditions and space."""
        return load_denoiser(str(folder), like=self.teacher)

    def new_critic(self, before: Artifact | None = None) -> Denoiser:
        """A critic: a copy of the teacher, or the one an earlier stage left beside its generator."""
        saved = None if before is None else before.path / CRITIC
        return self.copy_of_teacher() if saved is None or not saved.exists() else self.load(saved).train()

    def features(self, view: Observed | View) -> Signal:
        """What an observed denoiser sees, as a map (B, C, H, W): its network's middle."""
        module: Any = view.observed.module if isinstance(view, View) else view.module
        return view.tap(module.features).map(as_map)

    def discriminator(self, denoiser: Denoiser) -> FeatureDiscriminator:
        """A new discriminator for the `features` of a denoiser."""
        example = {
            "sample": torch.zeros(1, *self.data.shape),
            "timestep": self.teacher.process.few_step_times(1),
            "class_labels": torch.zeros(1, dtype=torch.long),
        }
        with torch.no_grad():
            _, channels, size, _ = self.features(Observed(denoiser))(example).shape
        return FeatureDiscriminator(channels, size)

    def load_generator(self, artifact: Artifact) -> FewStepGenerator:
        """The few-step generator a stage left."""
        return load_generator(artifact.path, like=self.teacher).to(self.run.fabric.device)

    # -- training ---------------------------------------------------------------------------------------------------

    def player(
        self,
        name: str,
        models: Observed | list[Observed],
        objective: Objective,
        *,
        lr: float | None = None,
        every: int = 1,
        ema: EMA | None = None,
    ) -> Player:
        """A player with the system's optimizer, learning-rate schedule and clipping."""
        system = self.system
        optimizer = adamw(lr or system.lr, betas=(system.beta1, system.beta2), weight_decay=system.weight_decay)
        rate = linear(1.0, 1.0, warmup=system.warmup)
        return Player(name, models, objective, optimizer=optimizer, lr=rate, every=every, clip=system.clip, ema=ema)

    def train_generator(
        self,
        name: str,
        players: Sequence[Player],
        *,
        source: NoisyBatches,
        steps: int,
        critic: Denoiser | None = None,
    ) -> Train:
        """A stage whose first player trains a few-step generator; a critic is saved beside it, for a later stage."""
        generator, *_ = players
        kept = generator.trained[0].module if generator.ema is None else generator.ema.module

        def save(result: FewStepGenerator, folder: Path) -> None:
            save_generator(result, folder)
            if critic is not None:
                save_pipeline(critic, folder / CRITIC)

        def evaluate() -> dict[str, float]:
            return self.figures(self.samples_of(cast(FewStepGenerator, kept)))

        return Train(name, players, source=source, steps=steps, evaluate=evaluate, save=save)

    def regression(self, name: str, model: FewStepGenerator, *, steps: int, ode_steps: int) -> Train:
        """A warm start: the first step's sample from a noise is to be the teacher's from the same noise, by DDIM."""
        generator, process = Observed(model, name="generator"), self.teacher.process
        sampler = OdeSampler(self.guided_teacher(), process, process.few_step_times(ode_steps))
        teacher = Observed(sampler, frozen=True, name="teacher")
        objective = SampleMSE(generator.output(), teacher.output(), name="Regression")
        player = self.player("generator", generator, objective)
        return self.train_generator(name, [player], source=self.batches({}), steps=steps)

    # -- batches ----------------------------------------------------------------------------------------------------

    def batches(self, levels: Mapping[str, Any], *, steps: int = 1, noised_data: bool = False) -> NoisyBatches:
        """Data, noise and times; see `NoisyBatches`."""
        return NoisyBatches(
            self.data.draw,
            self.teacher.process,
            batch_size=self.system.batch_size,
            levels=levels,
            first_class=self.generated[0],
            classes=self.generated[1],
            steps=steps,
            noised_data=noised_data,
            seed=self.system.seed,
        )

    # -- measuring --------------------------------------------------------------------------------------------------

    def samples_of(self, generator: FewStepGenerator, count: int | None = None, *, seed: int = 0) -> Tensor:
        """Samples of a few-step generator; the same noise and classes for every model that is compared."""
        count, steps = count or self.system.eval_samples, len(generator.times)

        def sample(size: int, random: torch.Generator) -> Tensor:
            noise = torch.randn(size, steps, *self.data.shape, generator=random)
            labels = self._conditions(size, random)
            device = self.run.fabric.device
            return generator.sample(noise.to(device), labels.to(device))

        return _in_chunks(sample, count, seed)

    def samples_of_teacher(self, count: int | None = None, *, seed: int = 0) -> Tensor:
        """Samples of the guided teacher, by DDIM in ``teacher_steps`` steps."""
        teacher, process = self.guided_teacher().to(self.run.fabric.device).eval(), self.teacher.process
        times = process.few_step_times(self.system.teacher_steps)

        @torch.no_grad()
        def sample(size: int, random: torch.Generator) -> Tensor:
            noise = process.prior_std * torch.randn(size, *self.data.shape, generator=random)
            labels = self._conditions(size, random).to(self.run.fabric.device)
            return ddim(lambda x, t: teacher(x, t, labels), noise.to(self.run.fabric.device), times, process)

        return _in_chunks(sample, count or self.system.eval_samples, seed)

    def _conditions(self, size: int, random: torch.Generator) -> Tensor:
        first, count = self.generated
        return first + torch.randint(count, (size,), generator=random)

    def figures(self, samples: Tensor) -> dict[str, float]:
        """Distances of samples to held-out data; for densities with modes, what became of them."""
        samples, real = samples.cpu().float(), self.data.held_out
        if not torch.isfinite(samples).all():
            samples = samples.nan_to_num(0.0, 1e3, -1e3)
        found = {"swd": sliced_wasserstein(samples, real), "energy": energy_distance(samples[:2048], real[:2048])}
        known = self.data.density
        if known is None:
            found["frechet"] = frechet_distance(random_features(samples), random_features(real))
        elif known.modes is not None and known.std is not None:
            modes = mode_coverage(samples, known.modes, radius=3.5 * known.std)
            found |= {"modes": modes.recall, "on_mode": modes.precision, "evenness": modes.entropy}
        return found

    def evaluation(self, models: Mapping[str, Artifact]) -> Evaluate:
        """The final table: the teacher beside the generators that were trained, and a picture of their samples."""
        return Evaluate("evaluation", partial(self._evaluate, models))

    def _evaluate(self, artifacts: Mapping[str, Artifact], context: Context) -> tuple[Table, dict[str, Any]]:
        generators = {name: self.load_generator(artifact) for name, artifact in artifacts.items()}
        floor, _ = self.data.draw(self.system.eval_samples, torch.Generator().manual_seed(987))
        samples = {"data": floor, "teacher": self.samples_of_teacher()}
        samples |= {name: self.samples_of(generator) for name, generator in generators.items()}
        calls = {"data": None, "teacher": self.system.teacher_steps * (1 if self.system.guidance == 1.0 else 2)}
        calls |= {name: len(generator.times) for name, generator in generators.items()}
        rows: list[dict[str, Any]] = []
        for name, found in samples.items():
            role = "student" if name in generators else "teacher"
            rows.append({"name": name, "role": role, "calls": calls[name], **self.figures(found)})
            context.results |= {f"{name}/{key}": value for key, value in rows[-1].items() if isinstance(value, float)}
        columns = [column for column in COLUMNS if any(column.key in row for row in rows)]
        notes = [
            f"{self.system.eval_samples:,} samples against {len(self.data.held_out):,} held out of {self.data.name}; "
            "the row 'data' is other real data: what a perfect model would get."
        ]
        return Table("Samples", columns, rows, notes), {
            "samples.svg": sample_picture({name: self.teacher.space.shown(found) for name, found in samples.items()})
        }


COLUMNS = [
    Column("calls", "network calls", ",d", None, "forwards of the network for one sample"),
    Column("swd", "sliced Wasserstein", ".4f", "lower", "mean over 64 fixed directions"),
    Column("energy", "energy distance", ".5f", "lower", "0 in expectation for equal distributions"),
    Column("frechet", "Fréchet", ".4f", "lower", "on a fixed random network's features; not comparable with FID"),
    Column("modes", "modes found", ".0%", "higher", "modes with at least a fifth of their share"),
    Column("on_mode", "on a mode", ".1%", "higher", "samples within 3.5 standard deviations of a mode"),
    Column("evenness", "evenness", ".3f", "higher", "entropy over modes; 1 if all are equally frequent"),
]


def save_generator(generator: FewStepGenerator, folder: Path) -> None:
    """Write a few-step generator as a ``diffusers`` pipeline; adapters, if it has some, are merged and lie beside."""
    own = generator.denoiser
    net = merged(own.net) if has_lora(own.net) else own.net
    denoiser = Denoiser(net, own.process, own.parameterisation, **own.surroundings())
    save_pipeline(denoiser, folder, times=generator.times)
    if has_lora(own.net):
        save_lora(own.net, folder)


def load_generator(folder: Path, *, like: Denoiser | None = None) -> FewStepGenerator:
    """The few-step generator that `save_generator` wrote; for ``like`` see `load_denoiser`."""
    times = json.loads((folder / "few_step.json").read_text(encoding="utf-8"))["times"]
    return FewStepGenerator(load_denoiser(str(folder), like=like), torch.tensor(times)).eval()


def as_map(features: Tensor) -> Tensor:
    """Features as a map (B, C, H, W): tokens (B, N, C) stand row by row in a square."""
    if features.ndim == 4:
        return features
    side = math.isqrt(features.shape[1])
    return features.transpose(1, 2).unflatten(2, (side, side))


def _in_chunks(sample: Sampler, count: int, seed: int, *, chunk: int = 1024) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    sizes = [min(chunk, count - start) for start in range(0, count, chunk)]
    return torch.cat([sample(size, generator).cpu() for size in sizes])


# -- data -------------------------------------------------------------------------------------------------------------


def read_prompts(source: str) -> tuple[str, ...]:
    """Texts of a file: of ``.txt`` every line that is not empty, of others every document."""
    if Path(source).suffix.lower() != ".txt":
        return tuple(load_text(source).documents["text"])
    try:
        lines = Path(source).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"prompts={source}: cannot be read ({one_line(error)}); check the path") from error
    if not (found := tuple(line.strip() for line in lines if line.strip())):
        raise DataError(f"prompts={source}: no prompt in it; write one a line")
    return found


def _data(system: DiffusionSystem, teacher: Denoiser) -> GenerativeData:
    if system.data in MAKERS:
        return _embedded(system.data)
    channels, height, width = teacher.space.image_shape(teacher.shape)
    if system.data == GLYPHS:
        return _of_glyphs(teacher.space, size=height, channels=channels)
    rows = load_images(system.data, split=system.split, image_field=system.image_field, label_field=system.label_field)

    def process(images: list[Any]) -> Tensor:
        import numpy as np

        arrays = [np.asarray(image.resize((width, height)), dtype=np.float32) / 255 for image in images]
        return torch.from_numpy(np.stack(arrays)).reshape(len(images), height, width, -1).permute(0, 3, 1, 2)

    train = rows.images(rows.train, process, channels)
    test = train if rows.test is None else rows.images(rows.test, process, channels)
    return _of_images(system.data, train, test, teacher.space)


def _embedded(name: str) -> GenerativeData:
    if name == GLYPHS:
        return _of_glyphs(Pixels())
    known = density(name)

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        points, labels = known.draw(count, generator)
        return points[:, :, None, None], labels

    held_out, _ = draw(4096, torch.Generator().manual_seed(123_456))
    names = tuple(map(str, range(known.classes)))
    return GenerativeData(name, draw, names, held_out, f"density 1 {name}", known)


def _of_glyphs(space: Space, *, size: int = 16, channels: int = 1) -> GenerativeData:
    """Glyphs at the size (and with the channels) that the teacher's images have."""
    train, test = (glyphs(split, size=size, channels=channels) for split in ("train", "test"))
    return _of_images(GLYPHS, train, test, space)


def _of_images(name: str, train: Images, test: Images, space: Space) -> GenerativeData:
    """Images in [0, 1], drawn with replacement, become images in [-1, 1], and these samples."""

    def draw(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        batch = train[torch.randint(len(train), (count,), generator=generator).tolist()]
        return space.encode(2 * batch["pixel_values"] - 1, generator), batch["labels"]

    held_out = space.encode(2 * test[list(range(min(4096, len(test))))]["pixel_values"] - 1)
    return GenerativeData(name, draw, train.classes, held_out, f"images 1 {train.fingerprint()}")


# -- the embedded teachers --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class DemoTeacher:
    """How an embedded teacher is made; part of its fingerprint in the cache."""

    steps: int
    batch_size: int
    lr: float
    conditional: bool
    ema: float = 0.995
    drop_label: float = 0.1
    seed: int = 0


POINTS = DemoTeacher(steps=3000, batch_size=256, lr=2e-3, conditional=False)
IMAGES = DemoTeacher(steps=1500, batch_size=32, lr=2e-3, conditional=True)


def _demo_net(data: GenerativeData, recipe: DemoTeacher) -> Any:
    classes = data.classes + 1 if recipe.conditional else None
    torch.manual_seed(recipe.seed)
    if data.density is not None:
        from stillhouse.models.denoisers import PointDenoiser

        return PointDenoiser(num_class_embeds=classes)
    from diffusers import UNet2DModel

    channels, size, _ = data.shape
    return UNet2DModel(
        sample_size=size,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
        num_class_embeds=classes,
    )


def _demo_teacher(data: GenerativeData, run: Run, steps: int | None) -> Generator[Stage, Artifact, Denoiser]:
    recipe = POINTS if data.density is not None else IMAGES
    if steps is not None:
        recipe = replace(recipe, steps=steps)
    process = DiscreteVP.cosine()
    batches = NoisyBatches(
        data.draw,
        process,
        batch_size=recipe.batch_size,
        levels={"train": (0.0, 1.0)},
        drop_label=recipe.drop_label if recipe.conditional else 0.0,
        null_class=data.classes,
        seed=recipe.seed,
    )

    def player() -> Player:
        denoiser = Denoiser(_demo_net(data, recipe), process, V())
        teacher = Observed(denoiser, name="teacher")
        objective = Denoising(at_noise(teacher, process, "train").output(), x="real", level="train", denoiser=denoiser)
        return Player(
            "teacher",
            teacher,
            objective,
            optimizer=adamw(recipe.lr, weight_decay=0.0),
            lr=cosine(1.0, 0.0, warmup=0.02),
            clip=1.0,
            ema=EMA(denoiser, recipe.ema),
        )

    net = _demo_net(data, recipe)
    trained = yield Train(
        "teacher",
        player,
        source=batches,
        steps=recipe.steps,
        save=save_pipeline,
        cache={
            **asdict(recipe),
            "data": data.fingerprint,
            # diffusers notes which values were defaults, in an order that changes from process to process.
            "net": {key: value for key, value in net.config.items() if not key.startswith("_")},
        },
    )
    return load_denoiser(str(trained.path))
