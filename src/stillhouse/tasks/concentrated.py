"""The few likeliest tokens of a language task's teacher: kept, judged by their calibration, re-scaled by it.

Shapes: B sequences, T tokens, N predicted tokens, K kept tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.base.table import Column
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.stage import Context, Evaluate, Stage, Transform
from stillhouse.data.domains import named_sources
from stillhouse.data.text import TextData, load_text
from stillhouse.data.windows import WindowSplit, tokenize_windows
from stillhouse.losses.concentrated import Rescale, Side, compared
from stillhouse.metrics.trust import Likeliest, fit_c, likeliest, trust
from stillhouse.objectives.language import predicted
from stillhouse.tasks.language import LanguageTask, endpoint_of
from stillhouse.tasks.language_cache import teacher_from_cache
from stillhouse.tasks.memorisation import taught
from stillhouse.teachers.cache import Numbered
from stillhouse.teachers.scorer import EndpointScorer, Scored, given_teacher

TRUST = [
    Column("token_accuracy", "right", ".1%", "higher", "how often the most likely next token is the text's"),
    Column("confidence", "confidence", ".1%", None, "mean probability of the most likely next token"),
    Column("trust_ece", "ECE, coarse", ".3f", "lower", "expected calibration error in the bins that c is fitted with"),
    Column("trust", "trust", ".3f", "higher", "accuracy - ECE"),
]


@dataclass
class KeptTeacher:
    """A teacher known by its ``k`` likeliest tokens: what stands for it, and what it says of held-out text."""

    observed: Observed
    k: int
    whole: bool  # its logits are kept whole
    source: Callable[[Observed], Any]  # batches of the training text, with what the teacher says of them
    says: Callable[[], Likeliest]  # of the selection text


def tuned(task: LanguageTask, epochs: float) -> Generator[Stage, Artifact, nn.Module | None]:
    """The task's teacher, fine-tuned on the training text for so many passes; 0: it is ready."""
    if epochs and task.teacher is None:
        raise ConfigError("teacher_epochs: a teacher behind an endpoint cannot be trained; set teacher_epochs=0")
    return (yield from taught(task, epochs)) if epochs else task.teacher


def kept_teacher(task: LanguageTask, *, k: int) -> Generator[Stage, Artifact, KeptTeacher]:
    """Ask the teacher once and keep its ``k`` likeliest tokens on disk, or have an endpoint asked for them."""
    k = min(k, task.vocab_size)
    batches, behind = task.batches(), endpoint_of(task.system.teacher)
    if behind is not None:
        scorer = EndpointScorer(*behind, k=k)
        return KeptTeacher(
            given_teacher(), k, False, lambda _: Scored(batches, scorer), partial(_scored, task, scorer, k)
        )
    observed = yield from teacher_from_cache(task, k=k)
    batches.data = Numbered(batches.data)

    def says() -> Likeliest:
        teacher = task.teacher.to(task.run.fabric.device)
        return likeliest(teacher, task.batches_of(task.windows.selection), k=k, vocab_size=task.vocab_size)

    return KeptTeacher(observed, k, k == task.vocab_size, lambda _: batches, says)


def _scored(task: LanguageTask, scorer: EndpointScorer, k: int) -> Likeliest:
    parts = []
    for batch in task.batches_of(task.windows.selection):
        said = scorer.score(batch["input_ids"].cpu(), batch.get("attention_mask"))
        labels_BT, weight_BT = predicted(batch)
        at_BT = weight_BT.bool().cpu()
        parts.append((said["tokens"][at_BT], said["log_p"][at_BT], said["log_rest"][at_BT], labels_BT.cpu()[at_BT]))
    return Likeliest(*map(torch.cat, zip(*parts, strict=True)))


def trustworthy(
    task: LanguageTask, kept: KeptTeacher, rescale: Rescale, *, fit: bool, side: Side, bins: int
) -> Transform:
    """A stage that leaves the ``c`` of ``rescale`` (fitted on the selection text, or as it is) and what it does there.

    Raises `DataError` where no token of the selection text counts.
    """

    def look(context: Context) -> dict[str, Any]:
        said = kept.says()
        if not len(said.labels):
            raise DataError(
                "the selection text has no token to be predicted, so that no c can be fitted; raise selection"
            )
        log_p_NM, correct_N = compared(said.log_p, said.log_rest, side=side).double(), said.correct
        found, curve = fit_c(log_p_NM, correct_N, rescale=rescale, bins=bins) if fit else (rescale, [])
        before, after = (
            trust(form(log_p_NM)[:, 0].exp(), correct_N, bins=bins) for form in (Rescale(form="none"), found)
        )
        context.results = {
            "c": found.c,
            "ece": after.ece,
            "ece_before": before.ece,
            "accuracy": before.accuracy,
            "confidence": after.confidence,
            "confidence_before": before.confidence,
            "mass": float(said.log_p.double().exp().sum(-1).mean()),
        }
        return {**context.results, "tokens": len(correct_N), "kept": kept.k, "curve": curve}

    return Transform("calibration", look)


def trust_figures(
    task: LanguageTask, bins: int, model: nn.Module, split: WindowSplit | None = None
) -> dict[str, float]:
    """The columns `TRUST` of a model on a split; by default the validation text."""
    split = task.windows.validation if split is None else split
    said = likeliest(model, task.batches_of(split), k=1, vocab_size=task.vocab_size)
    found = trust(said.log_p[:, 0].exp(), said.correct, bins=bins)
    return {
        "token_accuracy": found.accuracy,
        "confidence": found.confidence,
        "trust_ece": found.ece,
        "trust": found.score,
    }


def own_sets(task: LanguageTask, elsewhere: str | None) -> dict[str, WindowSplit]:
    """Further evaluation sets by name, in the task's windows: ``NAME=SOURCE,...``, or one source named after its file.

    Raises:
        DataError: what cannot be read, or less than two examples (text: windows) in a set.
    """
    if elsewhere is None:
        return {}
    named = "=" in elsewhere and not Path(elsewhere).expanduser().exists()
    sources = named_sources(elsewhere) if named else {Path(elsewhere).stem: elsewhere}
    return {name: _whole(task, load_text(source)) for name, source in sources.items()}


def _whole(task: LanguageTask, data: TextData) -> WindowSplit:
    """All windows of some data: what would be held out of it, and the rest."""
    windows = tokenize_windows(data, task.tokenizer, window=task.windows.window, validation=1)
    first, rest = windows.validation[:], windows.train[:]
    return WindowSplit({key: torch.cat([column, rest[key]]) for key, column in first.items()})


def trust_evaluation(
    task: LanguageTask, models: dict[str, Artifact], bins: int, elsewhere: Mapping[str, WindowSplit]
) -> Evaluate:
    """The task's table with the columns `TRUST`, and three of them for each set of text from ``elsewhere``."""
    kept = {"token_accuracy", "trust_ece", "trust"}
    columns = [
        replace(column, key=f"{name}_{column.key}", label=f"{column.label}, {name}")
        for name in elsewhere
        for column in TRUST
        if column.key in kept
    ]

    def more(model: nn.Module) -> dict[str, float]:
        found = trust_figures(task, bins, model)
        for name, split in elsewhere.items():
            there = trust_figures(task, bins, model, split)
            found |= {f"{name}_{key}": value for key, value in there.items() if key in kept}
        return found

    return task.evaluation(models, more=more, columns=[*TRUST, *columns])
