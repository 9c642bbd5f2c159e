"""The language task for systems that replace the teacher's attention: converted models and layer-by-layer stages."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Any, Literal

import torch
from torch import nn

from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Signal
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.sources import Batches
from stillhouse.data.text import load_text
from stillhouse.data.windows import tokenize_windows
from stillhouse.models.causal_lm import load_causal_lm, new_causal_lm
from stillhouse.models.conversion import Inherit, convert, is_converted, load_converted
from stillhouse.models.state_space import StateSpaceMixer
from stillhouse.models.tokenizers import train_bpe
from stillhouse.objectives.layerwise import observe_layers
from stillhouse.tasks.embedded_lm import reader, small_llama
from stillhouse.tasks.language import DEMO, LanguageSystem, LanguageTask

Aligned = Literal["mixer", "block"]
"""What `hidden_alignment` compares: the outputs of the mixers, or of whole layers."""

Embedded = Literal["words", "characters"]
"""The embedded task: that of all language systems, or a small model of characters on which many steps are cheap."""

Match = Callable[[Mapping[int, Signal], Mapping[int, Signal]], Objective]


@dataclass(frozen=True)
class CharacterTeacher:
    """How the small teacher is made; part of its fingerprint in the cache."""

    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    window: int = 64
    batch_size: int = 16
    steps: int = 1500
    lr: float = 2e-3
    weight_decay: float = 0.1
    seed: int = 0


class ConvertedTask(LanguageTask):
    """A `LanguageTask` whose students are converted models (`stillhouse.models.conversion`)."""

    @staticmethod
    def prepare(
        system: LanguageSystem, run: Run, *, embedded: Embedded = "words"
    ) -> Generator[Stage, Artifact, ConvertedTask]:
        """Build the task; ``embedded`` says which of two embedded ones, where neither teacher nor data is given."""
        if system.pretrain:
            raise ConfigError(f"{system.name()}: the student is made from the teacher, so there is nothing to pretrain")
        if embedded == "words":
            task = yield from LanguageTask.prepare(system, run)
        elif system.teacher == DEMO and system.data == DEMO:
            task = yield from _character_task(system, run)
        else:
            raise ConfigError(
                "embedded=characters is the demo's text with a teacher of its own; give no teacher or data"
            )
        return ConvertedTask(**{field.name: getattr(task, field.name) for field in fields(LanguageTask)})

    def load(self, artifact: Artifact) -> nn.Module:
        if not is_converted(artifact.path):
            return super().load(artifact)
        return load_converted(artifact.path).to(self.run.fabric.device)

    def converted(
        self, attention_layers: Sequence[int], *, state_size: int, conv_width: int, inherit: Inherit
    ) -> Transform:
        """The stage that makes the student: the teacher with mixers in place of its attention, see `convert`."""

        def new(_: Context) -> nn.Module:
            return convert(
                self.teacher,
                attention_layers=attention_layers,
                state_size=state_size,
                conv_width=conv_width,
                inherit=inherit,
            )

        return Transform("converted", new, save=self.save)

    def begin_as(self, artifact: Artifact) -> None:
        """From now on new students begin as the converted model a stage left."""
        self.new_student = partial(load_converted, artifact.path, dtype=torch.float32)

    def layerwise(
        self,
        name: str,
        before: Artifact,
        match: Match,
        *,
        give: Literal["matrix", "mixer", "block"],
        steps: int,
        window: int | None = None,
    ) -> Train:
        """A stage that trains the mixers of the model ``before``, each on the teacher's input to its layer.

        Args:
            match: makes the objective from the student's and the teacher's signals by layer.
            give, window: see `observe_layers`. For ``matrix`` only the parts of a mixer that make it are trained.
        """
        system = self.system
        model = load_converted(before.path, dtype=torch.float32)  # whatever the teacher was saved in
        layers = model.config.mixers["layers"]
        student, ours, theirs = observe_layers(model, layers, self.observed_teacher(), give=give, window=window)
        mixers = [path for path, module in student.module.named_modules() if isinstance(module, StateSpaceMixer)]
        parts = StateSpaceMixer.IN_MATRIX if give == "matrix" else ("",)
        trained = tuple(f"{mixer}.{part}" for mixer in mixers for part in parts)
        player = Player(
            name,
            student,
            match(ours, theirs),
            optimizer=adamw(system.lr, betas=(0.9, system.beta2), weight_decay=system.weight_decay),
            lr=system.learning_rate(),
            clip=system.clip,
            trainable=lambda parameter: parameter.startswith(trained),
        )
        return Train(
            name,
            player,
            source=Batches(self.windows.train, system.batch_size, seed=system.seed, gather=True),
            steps=steps,
            accumulate=system.accumulate,
            evaluate=partial(self.selection_figures, model),
            result=model,
            save=self.save,
        )


def _character_task(system: LanguageSystem, run: Run) -> Generator[Stage, Artifact, LanguageTask]:
    """The demo's text byte by byte, with a teacher of two layers that the first run trains."""
    recipe = CharacterTeacher()
    data = load_text(DEMO)
    tokenizer = train_bpe([], vocab_size=257)
    held_out: dict[str, Any] = {"validation": system.validation, "selection": system.selection}
    windows = tokenize_windows(data, tokenizer, window=system.window, **held_out)
    reads = tokenize_windows(data, tokenizer, window=recipe.window, **held_out)
    config = small_llama(
        tokenizer,
        width=recipe.hidden_size,
        feed_forward=4 * recipe.hidden_size,
        layers=recipe.layers,
        heads=recipe.heads,
        tied=True,
    )
    trained = yield reader(
        "teacher",
        config,
        reads.train,
        tokenizer,
        batch_size=recipe.batch_size,
        steps=recipe.steps,
        lr=recipe.lr,
        betas=(0.9, 0.99),
        weight_decay=recipe.weight_decay,
        warmup=0.05,
        seed=recipe.seed,
        cache={**asdict(recipe), **held_out, "task": "characters", "data": data.fingerprint},
    )
    teacher, _ = load_causal_lm(str(trained.path))
    new_student = partial(new_causal_lm, config, seed=system.seed)
    return LanguageTask(system, run, teacher, tokenizer, data, windows, len(tokenizer), new_student)


def stage_arms(named: str = "", **common: Any) -> dict[str, dict[str, Any]]:
    """Arms of one budget: all stages as they stand, the mixing matrices left out, and the logits alone.

    ``named`` is added to their names: arms of two experiments of one system must not share a name.
    """
    return {
        f"three stages{named}": common,
        f"stages 2 and 3{named}": {**common, "orientation": 0.0, "alignment": 0.5},
        f"stage 3 alone{named}": {**common, "orientation": 0.0, "alignment": 0.0},
    }
