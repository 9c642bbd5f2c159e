"""The language task for systems that replace the teacher's attention: converted models and layer-by-layer stages."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Literal

import torch
from torch import nn

from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact, Saver
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Signal
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.sources import Batches
from stillhouse.models.conversion import Inherit, convert, is_converted, load_converted
from stillhouse.models.state_space import StateSpaceMixer
from stillhouse.objectives.layerwise import observe_layers
from stillhouse.tasks.language import LanguageSystem, LanguageTask, save_pretrained

Aligned = Literal["mixer", "block"]
"""What `hidden_alignment` compares: the outputs of the mixers, or of whole layers."""

Match = Callable[[Mapping[int, Signal], Mapping[int, Signal]], Objective]


class ConvertedTask(LanguageTask):
    """A `LanguageTask` whose students are converted models (`stillhouse.models.conversion`)."""

    @staticmethod
    def prepare(system: LanguageSystem, run: Run) -> Generator[Stage, Artifact, ConvertedTask]:
        if system.pretrain:
            raise ConfigError(f"{system.name()}: the student is made from the teacher, so there is nothing to pretrain")
        task = yield from LanguageTask.prepare(system, run)
        return ConvertedTask(**{field.name: getattr(task, field.name) for field in fields(LanguageTask)})

    @property
    def save(self) -> Saver:
        """Writes a model with its tokenizer."""
        return partial(save_pretrained, tokenizer=self.tokenizer)

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
