"""The language task for SwiftKV: one model that is both, the original and the converted, and what a prompt costs."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import fields, replace
from functools import cached_property, partial

from torch import nn

from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Column
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage, Transform
from stillhouse.data.windows import WindowSplit
from stillhouse.models.conversion import attention_paths
from stillhouse.models.swiftkv import convert_swiftkv, is_swiftkv, load_swiftkv, prefill_cost
from stillhouse.tasks.language import LanguageSystem, LanguageTask, save_pretrained

LONGEST = 2048  # counting needs attention that is written out: 0.5 GB a layer at this length and 32 heads
COST = [
    Column("prefill_flops", "prefill FLOPs", ".3g", "lower", "counted, for one prompt up to the next token's logits"),
    Column("prefill_share", "prefill share", ".1%", "lower", "of the original's FLOPs"),
    Column("cache_bytes", "cache bytes", ",d", "lower", "keys and values after that prompt, counted"),
    Column("cache_share", "cache share", ".1%", "lower", "of the original's cache"),
]


class SwiftKVTask(LanguageTask):
    """A `LanguageTask` whose students are the teacher with SwiftKV in it."""

    first: int
    group: int

    @staticmethod
    def prepare_swiftkv(
        system: LanguageSystem, run: Run, *, first: int | None, group: int, windows: int | None
    ) -> Generator[Stage, Artifact, SwiftKVTask]:
        """Build the task.

        Args:
            first, group: see `convert_swiftkv`; ``first`` is half of the layers by default.
            windows: train on the first windows of the text only.
        """
        if system.pretrain:
            raise ConfigError(f"{system.name()}: the student is made from the teacher, so there is nothing to pretrain")
        if system.gradient_checkpointing or system.compile:
            raise ConfigError(
                f"{system.name()}: gradient_checkpointing and compile run a layer's code again or apart, which does "
                "not go with keys and values that many layers read; set both to false"
            )
        base = yield from LanguageTask.prepare(system, run)
        task = SwiftKVTask(**{field.name: getattr(base, field.name) for field in fields(LanguageTask)})
        task.first = first if first is not None else max(1, len(attention_paths(task.teacher)) // 2)
        task.group = group
        task.teacher.float()  # what trains is in float32, and the frozen rest is the same tensors
        task.new_student = partial(convert_swiftkv, task.teacher, first=task.first, group=group)
        if windows is not None and windows < len(task.windows.train):
            task.windows = replace(task.windows, train=WindowSplit(task.windows.train[slice(windows)]))
        return task

    def converted(self) -> Transform:
        """The stage that leaves the model as the surgery makes it, before any training."""
        return Transform(
            "converted", lambda _: self.new_student(), save=partial(save_pretrained, tokenizer=self.tokenizer)
        )

    def load(self, artifact: Artifact) -> nn.Module:
        if not is_swiftkv(artifact.path):
            return super().load(artifact)
        return load_swiftkv(artifact.path).to(self.run.fabric.device)

    @cached_property
    def _whole_cost(self) -> dict[str, int]:
        return prefill_cost(self.teacher, min(self.system.window, LONGEST))

    def cost(self, model: nn.Module) -> dict[str, float]:
        """What a prompt as long as a window, `LONGEST` tokens at most, costs a model beside the teacher: see `COST`."""
        own, whole = prefill_cost(model, min(self.system.window, LONGEST)), self._whole_cost
        shares = {
            "prefill_share": own["flops"] / whole["flops"],
            "cache_share": own["cache_bytes"] / whole["cache_bytes"],
        }
        return {"prefill_flops": own["flops"], "cache_bytes": own["cache_bytes"], **shares}
