"""Terms of the cross-tokenizer task, bound to its teacher and a student: what a system of that task adds up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.data.token_bytes import nearest_spelling
from stillhouse.losses.chunks import ChunkDivergence
from stillhouse.objectives.cross_tokenizer import (
    ChunkHidden,
    ChunkMatch,
    DualSpaceMatch,
    SortedMatch,
    SpellingMatch,
    paired_head,
)
from stillhouse.objectives.gradient_balance import GradientBalance
from stillhouse.objectives.language import head_of
from stillhouse.tasks.cross_tokenizer import TEACHER, CrossTokenizerTask, HiddenLayers, decoder_layers, embeddings_path


def chunk_match(
    task: CrossTokenizerTask,
    student: Observed,
    divergence: ChunkDivergence,
    *,
    merge: float | None = None,
    append: bool = False,
    weighting: Literal["chunks", "tokens"] = "chunks",
) -> ChunkMatch:
    """Likelihoods of chunks; see `ChunkMatch`."""
    teacher, own = task.pairing.teacher, task.pairing.student
    return ChunkMatch(
        head_of(student),
        paired_head(task.listened_teacher),
        divergence,
        vocab_sizes=task.vocab_sizes,
        boundaries=(own.boundaries(), teacher.boundaries()),
        special=teacher.special,
        merge=merge,
        append=append,
        weighting=weighting,
    )


def other_match(task: CrossTokenizerTask, student: Observed, name: Literal["uld", "mined", "dskd"]) -> Objective:
    """What ALM is compared with: sorted distributions (ULD), spelling (MinED), attention between the texts (DSKD)."""
    heads, sizes = (head_of(student), paired_head(task.listened_teacher)), task.vocab_sizes
    if name == "uld":
        return SortedMatch(*heads, vocab_sizes=sizes)
    if name == "mined":
        nearest = nearest_spelling(task.pairing.teacher, task.pairing.student)
        return SpellingMatch(*heads, nearest=nearest, vocab_sizes=sizes)
    own = student.tap(embeddings_path(student.module))
    theirs = task.listened_teacher.view(TEACHER).tap(embeddings_path(task.teacher))
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(task.system.seed)
        return DualSpaceMatch(*heads, embedded=(own, theirs), widths=task.widths(student), vocab_sizes=sizes)


def hidden_match(
    task: CrossTokenizerTask, student: Observed, layers: HiddenLayers, *, project: bool = False
) -> ChunkHidden:
    """Hidden states where chunks end; see `ChunkHidden`."""
    return ChunkHidden(*task.hidden_pairs(student, layers), task.widths(student), project=project)


def balanced(terms: Sequence[Objective], student: Observed) -> GradientBalance:
    """Terms whose gradients in the student's last layer are brought to one norm."""
    last = decoder_layers(student.module)[-1]
    return GradientBalance(terms, list(student.module.get_submodule(last).parameters()))


def text_bits(figures: Mapping[str, float]) -> float:
    """Bits per byte of the student, or of all models together where there are several."""
    return figures.get("ensemble/bits_per_byte", figures["student/bits_per_byte"])
