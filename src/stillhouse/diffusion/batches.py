"""Batches for training denoisers and generators: data, noise, and times, all drawn from one seed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stillhouse.diffusion.processes import Process

DrawData = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


class NoisyBatches:
    """A source of batches with everything that is random in a step.

    Entries: ``real`` (B, C, H, W) and ``real_labels`` (B,); ``class_labels`` (B,), for samples that are generated;
    ``noise`` (B, S, C, H, W), one a step of the generator, and ``step``, the step it is trained at now; and for each
    level of noise ``NAME_t`` (B,) and ``NAME_eps`` (B, C, H, W), for `at_noise`.

    Args:
        draw: ``draw(count, generator)`` gives data and their classes.
        levels: name -> the part of the schedule that its times are drawn from, evenly, as two fractions; or a function
            ``(count, generator) -> times``.
        classes: classes of generated samples are drawn evenly from so many,
        first_class: beginning with this one.
        steps: S. ``step`` is the same in all processes of a job, which then do the same number of forwards.
        noised_data: the generator's inputs are noised data (of the same classes) in place of its own samples.
        drop_label: share of ``real_labels`` replaced by ``null_class``, for guidance.
    """

    def __init__(
        self,
        draw: DrawData,
        process: Process,
        *,
        batch_size: int,
        levels: Mapping[str, tuple[float, float] | Callable[[int, torch.Generator], Tensor]],
        classes: int = 1,
        first_class: int = 0,
        steps: int = 1,
        noised_data: bool = False,
        drop_label: float = 0.0,
        null_class: int = 0,
        seed: int = 0,
    ) -> None:
        self.draw = draw
        self.process = process
        self.batch_size = batch_size
        self.levels = dict(levels)
        self.classes, self.first_class, self.steps = classes, first_class, steps
        self.noised_data = noised_data
        self.drop_label, self.null_class = drop_label, null_class
        self.epoch = 0
        self.shard = (0, 1)
        self._seed = seed
        self._drawn = 0

    def __next__(self) -> dict[str, Any]:
        rank, world = self.shard
        if self.batch_size % world:
            raise ValueError(f"batch size {self.batch_size} does not divide among {world} processes")
        common = torch.Generator().manual_seed(self._seed * 1_000_003 + self._drawn)
        step = int(torch.randint(self.steps, (1,), generator=common))
        own = torch.Generator().manual_seed(int(torch.randint(2**62, (world,), generator=common)[rank]))
        self._drawn += 1
        return self._batch(self.batch_size // world, step, own)

    def _batch(self, count: int, step: int, generator: torch.Generator) -> dict[str, Any]:
        real, labels_B = self.draw(count, generator)
        dropped_B = torch.rand(count, generator=generator) < self.drop_label
        batch = {
            "real": real,
            "real_labels": labels_B.masked_fill(dropped_B, self.null_class),
            "class_labels": self.first_class + torch.randint(self.classes, (count,), generator=generator),
            "noise": torch.randn(count, self.steps, *real.shape[1:], generator=generator),
            "step": step,
        }
        if self.noised_data:
            batch |= {"noised_data": real, "class_labels": labels_B}
        for name, part in self.levels.items():
            if callable(part):
                batch[f"{name}_t"] = part(count, generator)
            else:
                batch[f"{name}_t"] = self.process.sample_t(count, generator, low=part[0], high=part[1])
            batch[f"{name}_eps"] = torch.randn(real.shape, generator=generator)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self._drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._drawn = state["drawn"]
