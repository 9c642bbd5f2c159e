"""Terms on self-attention relations, and objectives over several sub-networks of one model.

Shapes: B sequences, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.core.objective import Objective, Term, TermValue
from stillhouse.core.observed import Batch, Observed, Signal, Turn, View
from stillhouse.core.schedule import Progress
from stillhouse.losses.relations import relation_kl, relation_mse
from stillhouse.models.elastic import RELATED, ElasticBert, SubNetwork
from stillhouse.models.subspaces import SubSpace

RelationForm = Literal["mse", "kl"]


class RelationMatch(Term):
    """The relations among queries, among keys and among values of one layer, student to teacher; three losses summed.

    Args:
        student, teacher: the signals ``query``, ``key`` and ``value``, each (B, T, D) with a D of its own.
        heads: relation heads that both are cut into.
        form: ``"mse"`` on unnormalised scores, as released, or ``"kl"`` on normalised ones, as in the paper.

    Padding is left out by the batch's ``attention_mask``.
    """

    def __init__(
        self,
        student: Mapping[str, Signal],
        teacher: Mapping[str, Signal],
        *,
        heads: int = 12,
        form: RelationForm = "mse",
        name: str | None = None,
    ) -> None:
        signals = {f"student_{key}": student[key] for key in RELATED}
        super().__init__(name=name, **signals, **{f"teacher_{key}": teacher[key].detach() for key in RELATED})
        self.heads = heads
        self.loss: Callable[..., Tensor] = relation_mse if form == "mse" else relation_kl

    def compute(self, *, batch: Batch, **inputs: Any) -> Tensor:
        mask = batch.get("attention_mask")
        values = {
            key: self.loss(inputs[f"student_{key}"], inputs[f"teacher_{key}"], heads=self.heads, mask_BT=mask)
            for key in RELATED
        }
        for key, value in values.items():
            self.log(key, value)
        return values["query"] + values["key"] + values["value"]


def last_relations(model: Observed, encoder: str = "") -> dict[str, Signal]:
    """Query, key and value of the last layer of a BERT or RoBERTa; ``encoder`` is its path in the model."""
    layers = model.module.get_submodule(f"{encoder}.encoder.layer".lstrip("."))
    place = f"{encoder}.encoder.layer.{len(layers) - 1}.attention.self".lstrip(".")  # type: ignore[arg-type]
    return {key: model.tap(f"{place}.{key}") for key in RELATED}


def sub_network(model: Observed, sub: SubNetwork) -> View:
    """An observed `ElasticBert` as one of its sub-networks."""
    elastic = model.module
    assert isinstance(elastic, ElasticBert)
    return model.view(str(sub), around=lambda _module: elastic.active(sub))


def view_relations(view: View) -> dict[str, Signal]:
    """Query, key and value of the last active layer of an `ElasticBert`."""
    return {key: view.output(key) for key in RELATED}


class Sandwich(Objective):
    """One objective on several sub-networks a step, summed: the largest, the smallest and some drawn at random.

    (Yu and Huang, 2019, arXiv 1903.05134; AutoDistil.) Which are drawn depends on the seed and the step only, so that
    a resumed run draws the same.

    Args:
        model: an observed `ElasticBert`.
        space: what is drawn from.
        term: makes the objective of one sub-network from a view of the model.
        random: how many are drawn.
        extremes: whether the largest and the smallest are in every step; without them, all are drawn.
    """

    def __init__(
        self,
        model: Observed,
        space: SubSpace,
        term: Callable[[View], Objective],
        *,
        random: int = 2,
        extremes: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        elastic = model.module
        assert isinstance(elastic, ElasticBert)
        self.name = "Sandwich"
        self.space, self.random, self.extremes, self.seed = space, random, extremes, seed
        self.names = [*(("largest", "smallest") if extremes else ()), *(f"random_{i}" for i in range(random))]
        self.now = self.draw(0)
        for sub in (space.largest, space.smallest):
            elastic.check(sub)

        def around(place: int) -> Callable[[nn.Module], Any]:
            return lambda _module: elastic.active(self.now[place])

        views = [model.view(name, around=around(place)) for place, name in enumerate(self.names)]
        self.terms = nn.ModuleList(term(view).named(name) for view, name in zip(views, self.names, strict=True))

    def draw(self, step: int) -> list[SubNetwork]:
        """The sub-networks of a step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        drawn = self.space.draw(self.random, generator)
        return [self.space.largest, self.space.smallest, *drawn] if self.extremes else drawn

    def signals(self) -> Iterator[Signal]:
        for term in self.terms:
            yield from term.signals()  # type: ignore[operator]

    def evaluate(self, turn: Turn, batch: Batch, progress: Progress) -> list[TermValue]:
        self.now = self.draw(progress.step)
        return [value for term in self.terms for value in term.evaluate(turn, batch, progress)]  # type: ignore[operator]
