"""The encoder task for elastic super-networks: training one, searching it, cutting students out of it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal

from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed, Signal
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Evaluate, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.windows import WindowSplit
from stillhouse.metrics.objectives import mean_values
from stillhouse.models.elastic import (
    ElasticBert,
    SubNetwork,
    check_elastic,
    extract,
    flops,
    load_encoder,
    parameter_count,
    whole,
)
from stillhouse.models.subspaces import SubSpace
from stillhouse.objectives.relations import (
    RelationForm,
    RelationMatch,
    Sandwich,
    last_relations,
    sub_network,
    view_relations,
)
from stillhouse.tasks.encoder import COLUMNS, EncoderSystem, EncoderTask

Search = Literal["agnostic", "proxy"]
"""How a student is chosen: `ElasticTask.search` alone, or `ElasticTask.try_out` among the best it found."""

TOGETHER = 8
"""Sub-networks measured in one pass; their activations are held together."""


@dataclass(frozen=True)
class Budget:
    """What a student may cost; None: anything."""

    parameters: int | None = None
    megaflops: float | None = None

    def allows(self, row: Mapping[str, Any]) -> bool:
        return (self.parameters is None or row["parameters"] <= self.parameters) and (
            self.megaflops is None or row["megaflops"] <= self.megaflops
        )


@dataclass
class ElasticTask(EncoderTask):
    """An `EncoderTask` with the relation loss to its teacher, for super-networks and students.

    ``heads`` relation heads, ``form`` of the loss: see `RelationMatch`.
    """

    heads: int = 12
    form: RelationForm = "mse"

    @staticmethod
    def prepare(
        system: EncoderSystem, run: Run, *, heads: int = 12, form: RelationForm = "mse"
    ) -> Generator[Stage, Artifact, ElasticTask]:
        task = yield from EncoderTask.prepare(system, run)
        check_elastic(task.teacher.config.model_type)
        held = {field.name: getattr(task, field.name) for field in fields(EncoderTask)}
        return ElasticTask(**held, heads=heads, form=form)

    def match(self, student: Mapping[str, Signal], teacher: Observed) -> RelationMatch:
        """The relations of a student to those of the teacher's last layer."""
        return RelationMatch(
            student, last_relations(teacher, self.teacher.base_model_prefix), heads=self.heads, form=self.form
        )

    def new_super_network(self) -> ElasticBert:
        """A super-network that begins as the teacher."""
        model = type(self.teacher.base_model)(self.teacher.config, add_pooling_layer=False)
        model.load_state_dict(self.teacher.base_model.state_dict())
        return ElasticBert(model)

    def load_super_network(self, artifact: Artifact) -> ElasticBert:
        """The super-network a stage left."""
        return ElasticBert(load_encoder(artifact.path).to(self.run.fabric.device))

    def train(
        self, name: str, model: Any, objective: Objective, student: Observed, *, steps: int, **more: Any
    ) -> Train:
        """A stage that trains an encoder on the text as it is; the artifact is ``model``."""
        system = self.system
        player = Player(
            name,
            student,
            objective,
            optimizer=adamw(system.lr, weight_decay=system.weight_decay),
            lr=system.learning_rate(),
            clip=system.clip,
        )
        source = self.batches()
        return Train(
            name, player, source=source, steps=steps, accumulate=system.accumulate, result=model, save=self.save, **more
        )

    def super_network(self, space: SubSpace, *, steps: int, drawn: int, extremes: bool) -> Train:
        """A stage that distils a super-network for one sub-space."""
        name = f"super-{space.name}"
        elastic = self.new_super_network()
        student, teacher = Observed(elastic, name=name), self.observed_teacher()
        sandwich = Sandwich(
            student,
            space,
            lambda view: self.match(view_relations(view), teacher),
            random=drawn if extremes else drawn + 2,
            extremes=extremes,
            seed=self.system.seed,
        )
        ends = {"largest": space.largest, "smallest": space.smallest}
        look = partial(self.relation_losses, elastic, ends, self.windows.selection)
        return self.train(name, elastic.model, sandwich, student, steps=steps, evaluate=look)

    def continued(self, name: str, before: Artifact, *, steps: int) -> Train:
        """A stage that distils a student found on its own."""
        model = load_encoder(before.path)
        student = Observed(model, name=name)
        return self.train(
            name, model, self.match(last_relations(student), self.observed_teacher()), student, steps=steps
        )

    def finetune(self, name: str, before: Artifact, *, steps: int, lr: float, batch_size: int | None = None) -> Train:
        """A stage that fine-tunes an encoder: it fills in masked tokens."""
        return self.fill_in(name, load_encoder(before.path, masked_lm=True), steps=steps, lr=lr, batch_size=batch_size)

    def relation_losses(
        self, elastic: ElasticBert, subs: Mapping[str, SubNetwork], split: WindowSplit
    ) -> dict[str, float]:
        """The held-out relation loss of some sub-networks of a super-network."""
        student, teacher = Observed(elastic), self.observed_teacher()
        found: dict[str, float] = {}
        names = list(subs)
        for start in range(0, len(names), TOGETHER):
            part = names[start : start + TOGETHER]
            terms = {name: self.match(view_relations(sub_network(student, subs[name])), teacher) for name in part}
            found |= mean_values(terms, self.batches_of(split))
        return found

    def cost(self, sub: SubNetwork) -> dict[str, float]:
        """Parameters and MFLOPs of a sub-network."""
        config = self.teacher.config
        work = flops(sub, config, length=self.system.window) / 1e6
        return {"parameters": parameter_count(sub, config), "megaflops": work}

    def search(
        self, homes: Mapping[str, Artifact], spaces: Sequence[SubSpace], budget: Budget
    ) -> Generator[Stage, Artifact, list[dict[str, Any]]]:
        """All sub-networks within the budget, best held-out relation loss first; none is trained."""
        searched = yield Evaluate("search", partial(self._search, homes, spaces, budget))
        return searched.json("candidates.json")

    def _search(
        self, homes: Mapping[str, Artifact], spaces: Sequence[SubSpace], budget: Budget, context: Context
    ) -> tuple[Table, dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for space in spaces:
            affordable = {str(sub): sub for sub in space.all() if budget.allows(self.cost(sub))}
            if affordable:
                elastic = self.load_super_network(homes[space.name])
                losses = self.relation_losses(elastic, affordable, self.windows.selection)
                rows += [
                    {"name": f"{space.name} {name}", "space": space.name, "network": name, **self.cost(sub)}
                    | {"relation_loss": losses[name]}
                    for name, sub in affordable.items()
                ]
        if not rows:
            least = min((self.cost(space.smallest) for space in spaces), key=lambda cost: cost["parameters"])
            raise ConfigError(
                f"no sub-network fits the budget; the smallest has {least['parameters']:,.0f} parameters and "
                f"{least['megaflops']:,.2f} MFLOPs: raise max_parameters or max_megaflops, or give smaller spaces"
            )
        rows.sort(key=lambda row: row["relation_loss"])
        context.results = {"candidates": len(rows), "relation_loss": rows[0]["relation_loss"]}
        note = f"The best of {len(rows)} sub-networks within the budget (layers/heads/hidden/ratio), not trained alone."
        return Table("Search", COLUMNS[:3], rows[:10], [note]), {"candidates.json": rows}

    def try_out(
        self, homes: Mapping[str, Artifact], candidates: Sequence[dict[str, Any]], *, steps: int, lr: float
    ) -> Generator[Stage, Artifact, dict[str, Any]]:
        """Fine-tune each of these candidates of `search` for a while; the best is the one that fills in best."""
        scores: list[tuple[float, int]] = []
        for place, row in enumerate(candidates):
            cut = yield Transform(f"cut-{place + 1}", partial(self.cut, homes, row), save=self.save)
            tried = yield self.finetune(f"proxy-{place + 1}", cut, steps=steps, lr=lr)
            scores.append((tried.metrics["masked_loss"], place))
        return candidates[min(scores)[1]]

    def cut(self, homes: Mapping[str, Artifact], row: Mapping[str, Any], context: Context) -> Any:
        """A candidate of `search` as a model of its own."""
        context.results = {key: row[key] for key in ("parameters", "megaflops", "relation_loss")}
        return extract(self.load_super_network(homes[row["space"]]), SubNetwork.parse(row["network"]))

    def evaluation(
        self,
        homes: Mapping[str, Artifact],
        spaces: Iterable[SubSpace],
        models: Mapping[str, Artifact],
        encoder: Artifact,
        probes: Sequence[str],
        context: Context,
    ) -> Table:
        """Teacher, fine-tuned models, the encoder they began as, and probed sub-networks, on validation text."""
        split, config = self.windows.validation, self.teacher.config
        load: Callable[[Artifact], Any] = lambda one: load_encoder(one.path, masked_lm=True)  # noqa: E731
        tuned = {name: load(artifact).to(self.run.fabric.device) for name, artifact in models.items()}
        rows: list[dict[str, Any]] = [{"name": "teacher", **self.cost(whole(config)), "relation_loss": 0.0}]
        rows[0]["masked_loss"] = self.masked_loss(self.teacher, split)
        bare = Observed(load_encoder(encoder.path).to(self.run.fabric.device))
        relation = mean_values(
            {"student": self.match(last_relations(bare), self.observed_teacher())}, self.batches_of(split)
        )
        for name, model in tuned.items():
            row: dict[str, Any] = {
                "name": name,
                **self.cost(whole(model.config)),
                "masked_loss": self.masked_loss(model, split),
            }
            rows.append({**row, "relation_loss": relation["student"]})
        for probe in probes:
            sub = SubNetwork.parse(probe)
            home = next((space for space in spaces if space.spans(sub)), None)
            if home is None:
                raise ConfigError(f"probes: no sub-space reaches {probe}")
            elastic = self.load_super_network(homes[home.name])
            loss = self.relation_losses(elastic, {probe: sub}, split)[probe]
            rows.append({"name": probe, **self.cost(sub), "relation_loss": loss})
        for row in rows:
            context.results.update({f"{row['name']}/{key}": value for key, value in row.items() if key != "name"})
        note = "The relation loss of a student is that of the encoder found, before it was fine-tuned."
        return Table("Held-out text", COLUMNS, rows, [note])


def mean_relation_loss(probes: Sequence[str]) -> Callable[[Mapping[str, float]], float]:
    """From the figures of `ElasticTask.evaluation`: the relation loss of these probes, on average."""
    return lambda figures: sum(figures[f"{probe}/relation_loss"] for probe in probes) / len(probes)
