"""Looking at the valley that checkpoints of a language model lie in: losses between them, gradients, curvature."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Batch, Observed
from stillhouse.core.stage import Context
from stillhouse.metrics.curvature import movement, slope
from stillhouse.metrics.landscape import gradient_cosine, losses_between
from stillhouse.metrics.language import compare_causal_lms
from stillhouse.objectives.lr_schedules import Segment
from stillhouse.tasks.language import LanguageTask
from stillhouse.tasks.pictures import curves_picture

POINTS = 5
SHARES = [f"{place / (POINTS - 1):.0%}" for place in range(POINTS)]


@dataclass(frozen=True)
class Valley:
    """Measures checkpoints of the task's student on the text to choose by."""

    task: LanguageTask
    gradients: int = 4

    def loss(self, model: nn.Module) -> float:
        batches = self.task.batches_of(self.task.windows.selection, self.task.system.eval_windows)
        return compare_causal_lms({"model": model}, batches, vocab_size=self.task.vocab_size)["model"].loss

    def losses(self, model: nn.Module) -> list[Callable[[], Tensor]]:
        """The losses of training batches that follow one another, as functions of the weights the model has then."""
        objective = self.task.cross_entropy(Observed(model, name="checkpoint", options={"use_cache": False}))
        size, train = self.task.system.batch_size, self.task.windows.train
        places = [list(range(at, min(at + size, len(train)))) for at in range(0, size * self.gradients, size)]
        batches = [self.task.run.fabric.to_device(train[place]) for place in places if place]

        def loss(batch: Batch) -> Tensor:
            return objective(batch)

        return [partial(loss, batch) for batch in batches]

    def cosine(self, model: nn.Module) -> float:
        """Mean cosine between the gradients of batches that follow one another."""
        return gradient_cosine(model, self.losses(model))

    def dynamics(
        self,
        parts: Sequence[tuple[Segment, Artifact | None, Artifact]],
        new: Callable[[], nn.Module],
        context: Context,
    ) -> Table:
        """A row for each part of a schedule (segment, what it began with, what it left).

        At its end the norm of a batch's gradient, the curvature along it and the cosine of batches that follow one
        another, and how far weights went in it. ``new`` makes what a part without a beginning began with.
        """
        rows: list[dict[str, Any]] = []
        for segment, begun, left in parts:
            before, model = new() if begun is None else self.task.load(begun), self.task.load(left)
            found = [slope(model, loss) for loss in self.losses(model)]
            row: dict[str, Any] = {
                "name": "decay" if segment.target is not None else "stable",
                "gradient": sum(one.norm for one in found) / len(found),
                "curvature": sum(one.curvature for one in found) / len(found),
                "cosine": self.cosine(model),
                "movement": movement(before.state_dict(), model.state_dict()) / (segment.end - segment.begin),
            }
            rows.append(row)
            context.results |= {f"{row['name']}/{key}": value for key, value in row.items() if key != "name"}
        columns = [
            Column("gradient", "gradient", ".4f", None, "mean norm of a batch's gradient at the end"),
            Column("curvature", "curvature", ".4f", None, "mean curvature of a batch's loss along its gradient"),
            Column("cosine", "cosine", ".3f", None, "mean cosine of gradients of consecutive batches"),
            Column("movement", "movement", ".3e", None, "root mean square of a weight's way, net, over the steps"),
        ]
        return Table("Dynamics", columns, rows)

    def measure(self, lines: Mapping[str, Sequence[Artifact]], context: Context) -> tuple[Table, dict[str, Any]]:
        """A row for each two neighbouring checkpoints of a kind: losses on the way, cosine of gradients at its end."""
        rows: list[dict[str, Any]] = []
        for kind, checkpoints in lines.items():
            for number, (before, after) in enumerate(itertools.pairwise(checkpoints), 1):
                one, other = self.task.load(before), self.task.load(after)
                losses = losses_between(one, other, self.loss, points=POINTS)
                row = {"name": f"{kind} {number} to {number + 1}", **dict(zip(SHARES, losses, strict=True))}
                dip = min(losses[1:-1]) - min(losses[0], losses[-1])
                rows.append({**row, "dip": dip, "cosine": self.cosine(other)})
        context.results = {f"{row['name']}/{key}": row[key] for row in rows for key in ("dip", "cosine")}
        columns = [
            *(Column(share, share, ".4f", None, "loss at this share of the way") for share in SHARES),
            Column("dip", "dip", ".4f", None, "lowest loss inside minus the lower end: negative in a valley"),
            Column("cosine", "cosine", ".3f", None, "mean cosine of gradients of consecutive batches, at the end"),
        ]
        drawn = {row["name"]: [(i / (POINTS - 1), row[share]) for i, share in enumerate(SHARES)] for row in rows}
        picture = curves_picture(drawn, x="share of the way", y="loss, nats per token")
        return Table("Between checkpoints", columns, rows), {"between.svg": picture}
