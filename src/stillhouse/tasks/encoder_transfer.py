"""What encoders found without labels are worth: fine-tuned on labelled text as GLUE has it, probed, and ranked.

Works on any `EncoderTask`; ranking needs an `ElasticTask`. Shapes: N examples, T tokens, H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.stage import Context, Evaluate, Stage
from stillhouse.data.labelled import Labelled, load_labelled
from stillhouse.metrics.objectives import mean_values
from stillhouse.metrics.probe import linear_probe
from stillhouse.metrics.ranking import rank_correlation
from stillhouse.models.elastic import ElasticBert, SubNetwork, extract, load_encoder, load_encoder_classifier
from stillhouse.models.subspaces import SubSpace
from stillhouse.models.text_classifier import new_text_classifier, with_labels
from stillhouse.objectives.relations import last_relations
from stillhouse.tasks.elastic import ElasticTask
from stillhouse.tasks.encoder import COLUMNS, DEMO, EncoderTask
from stillhouse.tasks.text_classification import TextClassificationSystem, TextClassificationTask, demo_labelled

PROBED = 1000  # labelled examples a probe is fitted on, and as many it is tested on

# -- labelled text --------------------------------------------------------------------------------------------------


class FoundOnLabels(TextClassificationTask):
    """A `TextClassificationTask` whose classifiers may stand on slim encoders, which only this package knows."""

    def load(self, artifact: Artifact) -> Any:
        return load_encoder_classifier(artifact.path).to(self.run.fabric.device)


def labelled_task(
    task: EncoderTask, data: str, *, lr: float, epochs: float, steps: int | None, batch_size: int, examples: int | None
) -> TextClassificationTask:
    """Labelled text for the encoders of ``task``: ``demo``, or what `load_labelled` reads; ``examples`` at most.

    Raises:
        DataError: see `load_labelled`.
    """
    outer = task.system
    system = TextClassificationSystem(
        data=data,
        length=outer.window,
        lr=lr,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        weight_decay=outer.weight_decay,
        clip=outer.clip,
        seed=outer.seed,
    )
    train, validation = demo_labelled() if data == DEMO else load_labelled(data)
    if validation is None:
        train, validation = train.held_out(system.validation)
    train, selection = train.held_out(system.selection)
    if examples is not None:
        train = train.few(examples, seed=outer.seed)
    return FoundOnLabels(system, task.run, outer.teacher, task.tokenizer, train, selection, validation)


def classifier_on(encoder: Any, classes: Sequence[str] | None, *, seed: int) -> Any:
    """A classifier that begins with the weights of a BERT or RoBERTa encoder; its pooler and its head are new."""
    model = new_text_classifier(with_labels(encoder.config, classes or ()), seed=seed)
    model.base_model.load_state_dict(encoder.state_dict(), strict=False)
    return model


def fine_tuning(task: EncoderTask, labelled: TextClassificationTask, found: Artifact, name: str) -> Generator[
    Stage, Artifact, None
]:  # fmt: skip
    """Fine-tune the encoder ``found``, one of its shape with new weights, and the teacher; a table of the three."""
    seed = task.system.seed
    encoder = load_encoder(found.path)
    models = {
        "student": classifier_on(encoder, labelled.classes, seed=seed),
        "new weights": new_text_classifier(with_labels(encoder.config, labelled.classes or ()), seed=seed),
        "teacher": classifier_on(task.teacher.base_model, labelled.classes, seed=seed),
    }
    tuned: dict[str, Artifact] = {}
    for role, model in models.items():
        tuned[role] = yield labelled.finetune(f"{name}-{role.replace(' ', '-')}", model)
    table = labelled.evaluation(tuned, reference="teacher")
    table.name = name
    yield table


@torch.no_grad()
def pooled_states(labelled: TextClassificationTask, encoder: Any, data: Labelled) -> Tensor:
    """Last hidden states of a frozen encoder, averaged over the tokens of each example: (N, H)."""
    encoder.eval()
    found = []
    for batch in labelled.batches_of(data):
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
        output = encoder(**inputs)
        hidden_NTH = output["hidden"] if isinstance(output, dict) and "hidden" in output else output.last_hidden_state
        mask_NT1 = batch["attention_mask"][..., None].to(hidden_NTH.dtype)
        found.append(((hidden_NTH * mask_NT1).sum(1) / mask_NT1.sum(1)).float().cpu())
    return torch.cat(found)


def probe_accuracy(labelled: TextClassificationTask, encoder: Any) -> float:
    """What a linear classifier reads of the labels in a frozen encoder's states, on held-out examples."""
    parts = [data.select(range(min(PROBED, len(data)))) for data in (labelled.train, labelled.validation)]
    states = [pooled_states(labelled, encoder, data) for data in parts]
    return linear_probe(states[0], parts[0].labels, states[1], parts[1].labels)


# -- is what weights inherit a guide to what a network can learn? ---------------------------------------------------


def ranking(
    task: ElasticTask,
    homes: Mapping[str, Artifact],
    spaces: Sequence[SubSpace],
    labelled: TextClassificationTask | None,
    *,
    count: int,
    steps: int,
) -> Generator[Stage, Artifact, None]:
    """Train ``count`` sub-networks each on its own, from the teacher's slice, and compare with what they inherit.

    The table's last figures are rank correlations of the held-out relation loss with inherited weights, by which
    `ElasticTask.search` chooses, with the loss after separate training and with the accuracy of a linear probe.
    """
    every = [(space.name, sub) for space in spaces for sub in space.all()]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(task.system.seed)).tolist()
    chosen = [every[place] for place in sorted(order[:count])]
    alone: list[Artifact] = []
    for number, (_, sub) in enumerate(chosen):
        model = extract(task.new_super_network(), sub)
        name = f"alone-{number + 1}"
        student = Observed(model, name=name)
        objective = task.match(last_relations(student), task.observed_teacher())
        alone.append((yield task.train(name, model, objective, student, steps=steps)))
    yield Evaluate("ranking", partial(_ranking, task, homes, chosen, alone, labelled))


def _ranking(
    task: ElasticTask,
    homes: Mapping[str, Artifact],
    chosen: Sequence[tuple[str, SubNetwork]],
    alone: Sequence[Artifact],
    labelled: TextClassificationTask | None,
    context: Context,
) -> Table:
    supers = {name: task.load_super_network(home) for name, home in homes.items()}
    rows: list[dict[str, Any]] = []
    for (space, sub), artifact in zip(chosen, alone, strict=True):
        trained = load_encoder(artifact.path).to(task.run.fabric.device)
        row: dict[str, Any] = {"name": f"{space} {sub}", **task.cost(sub)}
        row["relation_loss"] = task.relation_losses(supers[space], {"it": sub}, task.windows.selection)["it"]
        term = task.match(last_relations(Observed(trained)), task.observed_teacher())
        row["alone"] = mean_values({"it": term}, task.batches_of(task.windows.selection))["it"]
        if labelled is not None and labelled.classes:
            row["probe"] = _probed(labelled, supers[space], sub)
            row["probe_alone"] = probe_accuracy(labelled, trained)
        rows.append(row)
    inherited = [row["relation_loss"] for row in rows]
    others: dict[str, Callable[[dict[str, Any]], float]] = {"alone": lambda row: row["alone"]}
    if rows and "probe" in rows[0]:
        others |= {"probe": lambda row: -row["probe"], "probe_alone": lambda row: -row["probe_alone"]}
    notes = []
    for name, figure in others.items():
        found = rank_correlation(inherited, [figure(row) for row in rows])
        context.results |= {f"{name}/{kind}": value for kind, value in found.items()}
        notes.append(f"{LABELS[name]}: Spearman {found['spearman']:.2f}, Kendall {found['kendall']:.2f}.")
    return Table(
        f"{len(rows)} sub-networks, inherited against trained alone",
        [column for column in RANKING if rows and column.key in rows[0]],
        rows,
        ["Rank correlation of the relation loss with inherited weights with ...", *notes],
    )


def _probed(labelled: TextClassificationTask, elastic: ElasticBert, sub: SubNetwork) -> float:
    with elastic.active(sub):
        return probe_accuracy(labelled, elastic)


LABELS = {
    "alone": "the loss after separate training",
    "probe": "the error of a linear probe of the inherited weights",
    "probe_alone": "the error of a linear probe after separate training",
}
RANKING = [
    *COLUMNS[:3],
    Column(
        "alone", "trained alone", ".4f", "lower", "relation loss after training on its own, from the teacher's slice"
    ),
    Column("probe", "probe", ".1%", "higher", "accuracy of a linear probe on labelled text, with inherited weights"),
    Column("probe_alone", "probe, alone", ".1%", "higher", "the same after training on its own"),
]
