"""Terms between models of different tokenizers, on paired batches (`stillhouse.data.alignment`).

The teacher is read through its view ``"teacher"`` of the batch. Any system can take them: they are terms like others,
and work on what the data, the teacher or (by `stillhouse.data.alignment.Paired`) the student wrote.

Shapes: B sequences, T teacher's and S student's tokens, C chunks, D and E hidden widths, N rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.core.objective import Term
from stillhouse.core.observed import Batch, Observed, Signal
from stillhouse.losses.chunks import (
    ChunkDivergence,
    chunk_sums,
    last_positions,
    likelihoods,
    merge_chunks,
    sorted_distance,
)
from stillhouse.losses.divergences import ForwardKL
from stillhouse.losses.linear_divergence import linear_cross_entropy
from stillhouse.losses.token_logprobs import Head, head_divergence, in_chunks
from stillhouse.objectives.language import LanguageHead, head_of

TEACHER = "teacher"


def paired_head(teacher: Observed) -> LanguageHead:
    """The output head of a teacher that reads its own tokens of a paired batch."""
    return head_of(teacher.view(TEACHER))


def _opened(head: LanguageHead, weight: Tensor, bias: Tensor | None, vocab_size: int) -> Head:
    return Head(weight[:vocab_size], None if bias is None else bias[:vocab_size], head.scale, head.softcap)


def _next(mask_BT: Tensor) -> Tensor:
    """(B, T) whether the next token is named by a mask."""
    return nn.functional.pad(mask_BT[:, 1:], (0, 1)).bool()


class _Pair(Term):
    """Base: the two heads, opened at the real vocabularies."""

    def __init__(
        self,
        student: LanguageHead,
        teacher: LanguageHead,
        vocab_sizes: tuple[int, int],
        *,
        name: str,
        more: Mapping[str, Signal] | None = None,
    ) -> None:
        heads = {**student.signals("student"), **teacher.signals("teacher", detach=True)}
        super().__init__(name=name, **heads, **(more or {}))
        self.heads = (student, teacher)
        self.vocab_sizes = vocab_sizes

    def opened(self, tensors: dict[str, Any]) -> tuple[Head, Head]:
        """Student's and teacher's heads from what a term is given."""
        student, teacher = (
            _opened(head, tensors[f"{side}_weight"], tensors.get(f"{side}_bias"), size)
            for head, side, size in zip(self.heads, ("student", "teacher"), self.vocab_sizes, strict=True)
        )
        return student, teacher


class ChunkMatch(_Pair):
    """Approximate likelihood matching: a divergence between what both models give to each chunk of the text.

    A chunk's likelihood is the product of its tokens'. (Minixhofer, Vulic and Ponti, 2025, arXiv 2503.20083.)

    Args:
        student, teacher: output heads (`head_of`, `paired_head`).
        divergence: of two log-likelihoods.
        vocab_sizes: real sizes of the student's and the teacher's vocabulary.
        boundaries: (V) of both sides, which tokens begin what ends a word; needed for the next two.
        merge: close a chunk only where the teacher gives a word's end at least this probability, else go on.
        append: add the log-likelihood that a word ends after the chunk, on both sides.
        special: (V) the teacher's special tokens: what ends with one is always closed, and nothing is added to it.
        weighting: a chunk counts once, or as many times as it has tokens of the teacher.
    """

    boundary: Tensor
    teacher_boundary: Tensor
    special: Tensor

    def __init__(
        self,
        student: LanguageHead,
        teacher: LanguageHead,
        divergence: ChunkDivergence,
        *,
        vocab_sizes: tuple[int, int],
        boundaries: tuple[Any, Any] | None = None,
        special: Any = None,
        merge: float | None = None,
        append: bool = False,
        weighting: Literal["chunks", "tokens"] = "chunks",
        chunk_tokens: int | None = None,
        name: str = "ALM",
    ) -> None:
        super().__init__(student, teacher, vocab_sizes, name=name)
        if (merge is not None or append) and boundaries is None:
            raise ValueError("merge and append need to know the boundary tokens; pass boundaries")
        self.divergence = divergence
        self.merge, self.append, self.weighting, self.chunk_tokens = merge, append, weighting, chunk_tokens
        self.bounded = merge is not None or append
        none = torch.zeros(0, dtype=torch.bool)
        first, second = (none, none) if boundaries is None else map(torch.as_tensor, boundaries)
        self.register_buffer("boundary", first, persistent=False)
        self.register_buffer("teacher_boundary", second, persistent=False)
        self.register_buffer(
            "special",
            torch.zeros(vocab_sizes[1], dtype=torch.bool) if special is None else torch.as_tensor(special),
            persistent=False,
        )

    def compute(self, *, batch: Batch, **tensors: Any) -> Tensor:
        a_BC, b_BC, weight_BC = self.chunks(batch, tensors)
        self.log("gap", ((a_BC - b_BC).abs() * (weight_BC > 0)).sum() / (weight_BC > 0).sum().clamp(min=1))
        loss_BC = self.divergence(a_BC.detach(), b_BC)
        return (loss_BC * weight_BC).sum() / weight_BC.sum().clamp(min=1)

    def chunks(self, batch: Batch, tensors: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher's and student's log-likelihoods of the chunks and their weights, each (B, C)."""
        student, teacher = self.opened(tensors)
        theirs: Batch = batch[TEACHER]
        count = batch["chunks"].shape[1]
        sides = []
        for side, head, text, boundary in (
            ("teacher", teacher, theirs, self.teacher_boundary),
            ("student", student, batch, self.boundary),
        ):
            chunks, wanted = text["chunks"], text["chunks"] >= 0
            with torch.set_grad_enabled(side == "student" and torch.is_grad_enabled()):
                found = likelihoods(
                    tensors[f"{side}_hidden"],
                    head,
                    text["input_ids"],
                    wanted,
                    boundary if self.bounded else None,
                    chunk_tokens=self.chunk_tokens,
                )
            last = last_positions(chunks, count)
            sides.append((chunk_sums(found.token, chunks, count).clamp(max=0.0), found.boundary.gather(1, last), last))
        (a_BC, a_end_BC, last_BC), (b_BC, b_end_BC, _) = sides
        tokens_BC = chunk_sums((theirs["chunks"] >= 0).to(a_BC.dtype), theirs["chunks"], count)
        valid_BC = tokens_BC > 0
        special_BC = self.special[theirs["input_ids"].gather(1, last_BC)] & valid_BC
        if self.merge is not None:
            merged = merge_chunks((a_end_BC.exp() > self.merge) | special_BC, valid_BC)
            a_BC, b_BC, tokens_BC = (chunk_sums(x * valid_BC, merged.number, count) for x in (a_BC, b_BC, tokens_BC))
            a_end_BC, b_end_BC = a_end_BC.gather(1, merged.closer), b_end_BC.gather(1, merged.closer)
            special_BC, valid_BC = special_BC.gather(1, merged.closer), merged.valid
        if self.append:
            a_BC, b_BC = (x + end.masked_fill(special_BC, 0.0) for x, end in ((a_BC, a_end_BC), (b_BC, b_end_BC)))
        # Of chunks that do not count nothing must come: not even a gradient of 0 * inf.
        a_BC, b_BC = (torch.where(valid_BC, x, torch.full_like(x, -1.0)) for x in (a_BC, b_BC))
        weight_BC = valid_BC.to(a_BC.dtype) if self.weighting == "chunks" else tokens_BC * valid_BC
        return a_BC, b_BC, weight_BC


class ChunkHidden(Term):
    """Hidden states where chunks end: mean square of W h_S - h_T, over the mean square of h_T; the mean of all pairs.

    Args:
        student, teacher: hidden states, in pairs.
        widths: (student's, teacher's) of each pair; where they differ, or with ``project``, W is learned.
    """

    def __init__(
        self,
        student: Sequence[Signal],
        teacher: Sequence[Signal],
        widths: tuple[int, int],
        *,
        project: bool = False,
        name: str = "hidden",
    ) -> None:
        pairs = {f"student_{n}": signal for n, signal in enumerate(student)}
        pairs |= {f"teacher_{n}": signal.detach() for n, signal in enumerate(teacher)}
        super().__init__(name=name, **pairs)
        self.count = len(student)
        learned = project or widths[0] != widths[1]
        self.project = nn.ModuleList(nn.Linear(*widths) if learned else nn.Identity() for _ in student)

    def compute(self, *, batch: Batch, **hidden: Any) -> Tensor:
        count = batch["chunks"].shape[1]
        sides = [last_positions(text["chunks"], count) for text in (batch, batch[TEACHER])]
        valid_BC = chunk_sums((batch["chunks"] >= 0).float(), batch["chunks"], count) > 0
        losses = []
        for number, project in enumerate(self.project):
            h_s, h_t = (
                hidden[f"{side}_{number}"].gather(
                    1, last[..., None].expand(-1, -1, hidden[f"{side}_{number}"].shape[-1])
                )
                for side, last in (("student", sides[0]), ("teacher", sides[1]))
            )
            h_t_ND, h_s_ND = h_t[valid_BC].float(), project(h_s[valid_BC].float())
            scale = h_t_ND.square().sum() + 1e-8
            losses.append((h_s_ND - h_t_ND).square().sum() / scale)
        return torch.stack(losses).mean()


class SortedMatch(_Pair):
    """ULD: the sorted distributions of both models, position by position as far as both go.

    Positions are not aligned: token k of one text is compared with token k of the other. (Boizard et al., 2024, arXiv
    2402.12030.) It goes beside a cross-entropy.
    """

    def __init__(self, student: LanguageHead, teacher: LanguageHead, *, vocab_sizes: tuple[int, int]) -> None:
        super().__init__(student, teacher, vocab_sizes, name="ULD")

    def compute(self, *, batch: Batch, **tensors: Any) -> Tensor:
        student, teacher = self.opened(tensors)
        rows = [_ranked(_next(text["loss_mask"])) for text in (batch, batch[TEACHER])]
        both = min(rank.shape[1] for rank, _ in rows)
        keep = rows[0][1][:, :both] & rows[1][1][:, :both]
        h_s, h_t = (
            tensors[f"{side}_hidden"].gather(
                1, rank[:, :both, None].expand(-1, -1, tensors[f"{side}_hidden"].shape[-1])
            )[keep]
            for side, (rank, _) in zip(("student", "teacher"), rows, strict=True)
        )

        def chunk(h_s_CD: Tensor, h_t_CE: Tensor) -> Tensor:
            with torch.no_grad():
                z_t = teacher.logits(h_t_CE)
            return sorted_distance(student.logits(h_s_CD), z_t)

        size = max(self.vocab_sizes)
        return in_chunks(chunk, h_s, h_t, vocab_size=size).sum() / keep.sum().clamp(min=1)


def _ranked(mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The positions that a mask names, first ones first, and which of them are there: each (B, most of a row)."""
    order = torch.argsort(mask_BT.logical_not().long(), dim=1, stable=True)
    there = mask_BT.gather(1, order)
    most = int(mask_BT.sum(1).max().clamp(min=1))
    return order[:, :most], there[:, :most]


class SpellingMatch(_Pair):
    """MinED: where a chunk is one token on both sides, KL to the teacher's distribution carried over by spelling.

    The probability of a student's token is that of the teacher's token nearest to it in spelling
    (`stillhouse.data.token_bytes.nearest_spelling`), normalised anew; elsewhere the text's own token is the target.
    (Wan et al., 2024, arXiv 2401.10491; as in Minixhofer et al.'s comparison.)

    Args:
        nearest: (V) the teacher's id for every id of the student.
    """

    nearest: Tensor

    def __init__(
        self,
        student: LanguageHead,
        teacher: LanguageHead,
        *,
        nearest: Any,
        vocab_sizes: tuple[int, int],
        temperature: float = 1.0,
    ) -> None:
        super().__init__(student, teacher, vocab_sizes, name="MinED")
        self.temperature = temperature
        self.register_buffer("nearest", torch.as_tensor(nearest), persistent=False)

    def compute(self, *, batch: Batch, **tensors: Any) -> Tensor:
        student, teacher = self.opened(tensors)
        theirs: Batch = batch[TEACHER]
        count = batch["chunks"].shape[1]
        sizes = [chunk_sums((text["chunks"] >= 0).float(), text["chunks"], count) for text in (batch, theirs)]
        single_BC = (sizes[0] == 1) & (sizes[1] == 1)
        matched = [_next(_of_chunks(text["chunks"], single_BC)) for text in (batch, theirs)]
        rest_BT = _next(batch["loss_mask"]) & ~matched[0]
        h_s, h_t = tensors["student_hidden"], tensors["teacher_hidden"]
        bias_V = None if teacher.bias is None else teacher.bias[self.nearest]
        nearest = teacher._replace(weight=teacher.weight[self.nearest], bias=bias_V)
        options = {"divergence": ForwardKL(temperature=self.temperature), "reduction": "sum"}
        transferred = head_divergence(h_s[matched[0]], student, h_t[matched[1]], nearest, **options).loss
        labels_BT = nn.functional.pad(batch["input_ids"][:, 1:], (0, 1))
        own = linear_cross_entropy(
            h_s[rest_BT],
            student.weight,
            labels_BT[rest_BT],
            bias_V=student.bias,
            logit_scale=student.scale,
            softcap=student.softcap,
            reduction="sum",
        )
        total = matched[0].sum() + rest_BT.sum()
        return (transferred + own) / total.clamp(min=1)


def _of_chunks(chunks_BT: Tensor, wanted_BC: Tensor) -> Tensor:
    """(B, T) whether a token belongs to one of the wanted chunks."""
    return wanted_BC.gather(1, chunks_BT.clamp(min=0)) & (chunks_BT >= 0)


class DualSpaceMatch(_Pair):
    """DSKD: each model's hidden states are carried into the other's space by attention between the two texts.

    Queries are made of the student's embeddings (of a token and the next), keys of the teacher's. The sum of three
    terms: the carried teacher learns to predict the student's tokens, through the student's own head, held still; the
    student learns from it wherever it is right; and the carried student learns from the teacher in the teacher's
    space. (Zhang et al., 2024, Dual-Space Knowledge Distillation, arXiv 2406.17328, with cross-model attention.) The
    three matrices are trained with the student. It goes beside a cross-entropy.

    Args:
        embedded: outputs of the student's and the teacher's embeddings.
        widths: hidden widths of both.
    """

    def __init__(
        self,
        student: LanguageHead,
        teacher: LanguageHead,
        *,
        embedded: tuple[Signal, Signal],
        widths: tuple[int, int],
        vocab_sizes: tuple[int, int],
        temperature: float = 1.0,
    ) -> None:
        more = {"student_embedded": embedded[0], "teacher_embedded": embedded[1].detach()}
        super().__init__(student, teacher, vocab_sizes, name="DSKD", more=more)
        self.temperature = temperature
        self.query = nn.Linear(2 * widths[0], 2 * widths[1])
        self.to_teacher = nn.Linear(widths[0], widths[1])
        self.to_student = nn.Linear(widths[1], widths[0])

    def compute(self, *, batch: Batch, **tensors: Any) -> Tensor:
        student, teacher = self.opened(tensors)
        theirs: Batch = batch[TEACHER]
        t2s_BSD, s2t_BTE = self.carried(batch, tensors)
        h_s, h_t = tensors["student_hidden"][:, :-1], tensors["teacher_hidden"][:, :-1]
        still = student._replace(
            weight=student.weight.detach(), bias=None if student.bias is None else student.bias.detach()
        )
        labels, weight = batch["input_ids"][:, 1:], batch["loss_mask"][:, 1:]
        learns = linear_cross_entropy(
            t2s_BSD, still.weight, labels, bias_V=still.bias, logit_scale=still.scale, softcap=still.softcap,
            weight_N=weight,
        )  # fmt: skip
        with torch.no_grad():
            guess = in_chunks(
                lambda h_CD: still.logits(h_CD).argmax(-1), t2s_BSD.flatten(0, 1), vocab_size=len(still.weight)
            )
        right = (guess.view_as(labels) == labels) & weight.bool()
        self.log("right", right.sum() / weight.sum().clamp(min=1))
        divergence = ForwardKL(temperature=self.temperature)
        to_student = head_divergence(h_s, student, t2s_BSD.detach(), still, divergence=divergence, weight_N=right).loss
        options = {"divergence": divergence, "weight_N": theirs["loss_mask"][:, 1:]}
        to_teacher = head_divergence(s2t_BTE, teacher, h_t, teacher, **options).loss
        return learns + to_student + to_teacher

    def carried(self, batch: Batch, tensors: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """The teacher's states in the student's space (B, S - 1, D), the student's in the teacher's (B, T - 1, E)."""
        x_s, x_t = tensors["student_embedded"], tensors["teacher_embedded"]
        h_s, h_t = tensors["student_hidden"][:, :-1], tensors["teacher_hidden"][:, :-1]
        pair_s = torch.cat([x_s[:, :-1], x_s[:, 1:]], -1)
        pair_t = torch.cat([x_t[:, :-1], x_t[:, 1:]], -1)
        keys = pair_t / pair_t.std()
        scores_BST = self.query(pair_s) @ keys.transpose(1, 2) / keys.shape[-1] ** 0.5
        there_BST = batch["attention_mask"][:, 1:, None] * batch[TEACHER]["attention_mask"][:, None, 1:]
        scores_BST = scores_BST.float().masked_fill(there_BST == 0, torch.finfo(torch.float32).min / 2)
        values_t = self.to_student(h_t / h_t.std() + x_t[:, 1:] / x_t[:, 1:].std())
        t2s = scores_BST.softmax(-1).to(values_t.dtype) @ values_t
        return t2s, scores_BST.transpose(1, 2).softmax(-1).to(h_s.dtype) @ self.to_teacher(h_s)
