"""Fidelity: whether a student says what its teacher says, and not only whether it is right.

Agreement (the same answer), rationale fidelity (BLEU of what leads to it, or the cosine of sentence vectors) and
accuracy can come apart (Ramesh et al., Findings of ACL 2025, arXiv 2505.15442).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from stillhouse.base.table import Column, Table
from stillhouse.data.verifiers import final_answer
from stillhouse.metrics.bleu import bleu
from stillhouse.metrics.ranking import rank_correlation
from stillhouse.metrics.significance import paired_t_test


@dataclass(frozen=True)
class Said:
    """What a model says to each prompt.

    Attributes:
        tokens: ids of each response, the end included if it came to one.
        texts: the same as text.
        marker: what the final answer follows in a response; empty: the whole response is the answer.
        embed: gives texts vectors (N, D) of length one, such as a `stillhouse.models.text_encoder.TextEncoder`.
    """

    tokens: Sequence[Sequence[int]]
    texts: Sequence[str]
    marker: str = ""
    embed: Callable[[Sequence[str]], np.ndarray] | None = None

    @cached_property
    def answers(self) -> list[str | None]:
        return [answer_of(text, self.marker) for text in self.texts]

    @cached_property
    def vectors(self) -> np.ndarray | None:
        return None if self.embed is None else self.embed(self.texts)


def answer_of(text: str, marker: str) -> str | None:
    """The final answer of a response, blanks evened out; None where it has none."""
    found = final_answer(text, marker) if marker else text
    return None if found is None else " ".join(found.split())


def agreements(student: Said, teacher: Said) -> list[float]:
    """1 where both give the same answer, 0 elsewhere; no answer agrees with nothing."""
    pairs = zip(student.answers, teacher.answers, strict=True)
    return [float(one is not None and one == other) for one, other in pairs]


def corrects(said: Said, references: Sequence[str]) -> list[float]:
    """1 where the answer is the reference's, 0 elsewhere; ``references`` hold whole responses."""
    wanted = [answer_of(text, said.marker) for text in references]
    return [float(one is not None and one == right) for one, right in zip(said.answers, wanted, strict=True)]


def item_fidelity(student: Said, teacher: Said, *, n: int = 4) -> list[float]:
    """BLEU of each response against the teacher's."""
    return [bleu([one], [other], n=n) for one, other in zip(student.tokens, teacher.tokens, strict=True)]


def mean_cosine(student: Said, teacher: Said) -> float:
    """Mean cosine of the vectors of each response and the teacher's; nan where there are none."""
    if student.vectors is None or teacher.vectors is None:
        return math.nan
    return float((student.vectors * teacher.vectors).sum(-1).mean())


@dataclass(frozen=True)
class Fidelity:
    """Figures of a student beside its teacher; ``accuracy`` and ``correlation`` are nan without references.

    Attributes:
        agreement: share of prompts with the same answer.
        bleu: of all responses against the teacher's, 0 to 1.
        identical: share of responses that are the teacher's, token by token.
        accuracy: share of answers that are right.
        correlation: Spearman's rho over prompts between the BLEU of a response and whether its answer is right.
        cosine: `mean_cosine`, nan where nothing embeds the responses.
    """

    agreement: float
    bleu: float
    identical: float
    accuracy: float
    correlation: float
    cosine: float = math.nan


def fidelity(student: Said, teacher: Said, references: Sequence[str] | None = None, *, n: int = 4) -> Fidelity:
    """Compare what a student and its teacher say to the same prompts."""
    same = [list(one) == list(other) for one, other in zip(student.tokens, teacher.tokens, strict=True)]
    accuracy = correlation = math.nan
    if references is not None:
        right = corrects(student, references)
        accuracy = _mean(right)
        correlation = rank_correlation(item_fidelity(student, teacher, n=n), right)["spearman"]
    return Fidelity(
        _mean(agreements(student, teacher)),
        bleu(student.tokens, teacher.tokens, n=n),
        _mean([float(one) for one in same]),
        accuracy,
        correlation,
        mean_cosine(student, teacher),
    )


COLUMNS = [
    Column("accuracy", "accuracy", ".1%", "higher", "answers that are right"),
    Column("agreement", "agreement", ".1%", "higher", "prompts to which it gives the teacher's answer"),
    Column("bleu", "BLEU to teacher", ".3f", "higher", "of all it says, against what the teacher says; 1 is the same"),
    Column("cosine", "cosine to teacher", ".3f", "higher", "of sentence vectors of the responses, mean over prompts"),
    Column("identical", "same response", ".1%", "higher", "responses that are the teacher's, token by token"),
    Column("correlation", "fidelity and right", ".2f", None, "Spearman's rho of BLEU and being right, over prompts"),
    Column("t", "t", ".2f", None, "paired t of its accuracy (without references: agreement) against the baseline"),
    Column("p", "p", ".3g", None, "chance of such a t where there is no difference"),
]


def fidelity_table(said: Mapping[str, Said], references: Sequence[str] | None = None, *, n: int = 4) -> Table:
    """One row a model; ``said`` holds "teacher", and perhaps "baseline", against which the others are tested."""
    teacher = said["teacher"]

    def scores(one: Said) -> list[float]:
        return agreements(one, teacher) if references is None else corrects(one, references)

    rows: list[dict[str, Any]] = []
    for name, one in said.items():
        found = vars(fidelity(one, teacher, references, n=n))
        if name == "teacher":
            found = {"accuracy": found["accuracy"]}
        elif "baseline" in said and name != "baseline":
            test = paired_t_test(scores(one), scores(said["baseline"]))
            found |= {"t": test.statistic, "p": test.p}
        known = {key: value for key, value in found.items() if not math.isnan(value)}
        rows.append({"name": name, **known})
    shown = [column for column in COLUMNS if any(column.key in row for row in rows)]
    note = f"{len(teacher.texts):,} held-out prompts; the likeliest response of every model."
    if references is None:
        note += " The text has no references, so nothing is said of accuracy."
    return Table("Fidelity to the teacher", shown, rows, [note])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
