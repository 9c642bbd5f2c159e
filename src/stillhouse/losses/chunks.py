"""Likelihoods of chunks of text, and divergences between two models' likelihoods of one chunk.

Shapes: B sequences, T tokens, C chunks of a sequence, N tokens, V vocabulary, D hidden width. Likelihoods are logs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from stillhouse.losses.token_logprobs import Head, in_chunks

EPSILON = 1e-6  # keeps a likelihood of 1 off the boundary

ChunkDivergenceName = Literal[
    "binary-ce", "binary-kl", "reverse-binary-kl", "binary-tv", "limit", "absolute", "renyi", "half-square", "k3"
]


class Likelihoods(NamedTuple):
    """Of tokens: log p(token | before it), and log p(a word ends here | before it and it)."""

    token: Tensor
    boundary: Tensor


def log1mexp(log_p: Tensor) -> Tensor:
    """log(1 - p) from log p < 0, exact for p near 0 and near 1 (Maechler, 2012)."""
    # torch.where lets the gradient of the branch not taken through as nan * 0: each branch gets what suits it.
    near = log_p > -math.log(2)
    small = torch.where(near, torch.full_like(log_p, -1.0), log_p)
    large = torch.where(near, log_p, torch.full_like(log_p, -0.5))
    return torch.where(near, torch.log(-torch.expm1(large)), torch.log1p(-torch.exp(small)))


@dataclass(frozen=True)
class ChunkDivergence:
    """A divergence between log-likelihoods of the same chunk, element by element: ``divergence(a, b)``.

    A chunk is one event that happens or does not, with P = p^(1 / temperature) for the teacher (``a`` = log p) and
    Q likewise for the student (``b``). (Minixhofer et al., 2025, arXiv 2503.20083, section 3.)

    - ``binary-ce``: -[P log Q + (1 - P) log(1 - Q)]; ``binary-kl``: the same less the teacher's entropy;
    - ``reverse-binary-kl``: KL of the student to the teacher; ``binary-tv``: \\|P - Q|, their total variation;
    - ``limit``: temperature * binary-kl for temperature -> infinity: (b' - a') + a' log(a' / b') of a' = -a, b' = -b;
    - ``absolute``: \\|a - b|; ``half-square`` and ``k3``: (log P/Q)^2 / 2 and P/Q - 1 - log P/Q;
    - ``renyi``: of order ``order``, at temperature 1.

    Args:
        temperature: of the event. At 1 chunks that are improbable give no gradient; large ones compare negative
            log-likelihoods.
    """

    name: ChunkDivergenceName = "binary-ce"
    temperature: float = 100.0
    order: float = 0.5

    def __post_init__(self) -> None:
        if self.order == 1:
            raise ValueError("a Renyi divergence of order 1 is the KL divergence; use binary-kl at temperature 1")

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        log_p, log_q = a / self.temperature - EPSILON, b / self.temperature - EPSILON
        match self.name:
            case "binary-ce":
                return -(log_p.exp() * log_q - torch.expm1(log_p) * log1mexp(log_q))
            case "binary-kl":
                return _binary_kl(log_p, log_q)
            case "reverse-binary-kl":
                return _binary_kl(log_q, log_p)
            case "binary-tv":
                return (log_p.exp() - log_q.exp()).abs()
            case "limit":
                nll_p, nll_q = EPSILON - a, EPSILON - b
                return nll_q - nll_p + nll_p * (nll_p.log() - nll_q.log())
            case "absolute":
                return (a - b).abs()
            case "renyi":
                log_p, log_q = a - EPSILON, b - EPSILON
                r = self.order
                both = r * log_p + (1 - r) * log_q
                neither = r * log1mexp(log_p) + (1 - r) * log1mexp(log_q)
                return torch.logaddexp(both, neither) / (r - 1)
            case "half-square":
                return (log_p - log_q).square() / 2
            case _:
                return torch.expm1(log_p - log_q) - (log_p - log_q)


def _binary_kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return log_p.exp() * (log_p - log_q) - torch.expm1(log_p) * (log1mexp(log_p) - log1mexp(log_q))


def likelihoods(
    hidden_BTD: Tensor,
    head: Head,
    ids_BT: Tensor,
    wanted_BT: Tensor,
    boundary_V: Tensor | None = None,
    *,
    chunk_tokens: int | None = None,
) -> Likelihoods:
    """Likelihoods (B, T) of tokens and, given which tokens begin what follows a word, of a word's end after each.

    Logits exist a chunk of tokens at a time. Only where ``wanted_BT`` is set are both computed; elsewhere, and for
    the likelihood of the first token, they are 0.
    """
    needed_BT = wanted_BT.bool()
    before_BT = F.pad(needed_BT[:, 1:], (0, 1)) | (needed_BT if boundary_V is not None else torch.zeros_like(needed_BT))
    next_BT = F.pad(ids_BT[:, 1:], (0, 1))
    hidden_ND, next_N = hidden_BTD[before_BT], next_BT[before_BT]

    def chunk(hidden_CD: Tensor, next_C: Tensor) -> Tensor:
        log_q_CV = head.logits(hidden_CD).log_softmax(-1)
        label_C = log_q_CV.gather(1, next_C[:, None])[:, 0]
        if boundary_V is None:
            return torch.stack([label_C, torch.zeros_like(label_C)], -1)
        return torch.stack([label_C, log_q_CV[:, boundary_V].logsumexp(-1).clamp(max=0.0)], -1)

    found_N2 = in_chunks(chunk, hidden_ND, next_N, vocab_size=len(head.weight), chunk_tokens=chunk_tokens)
    both_BT2 = found_N2.new_zeros(*ids_BT.shape, 2).masked_scatter(before_BT[..., None].expand(-1, -1, 2), found_N2)
    return Likelihoods(F.pad(both_BT2[:, :-1, 0], (1, 0)), both_BT2[..., 1])


def chunk_sums(values_BT: Tensor, chunks_BT: Tensor, count: int) -> Tensor:
    """(B, C) the sum of the tokens' values in every chunk; tokens of chunk -1 count nowhere."""
    place_BT = torch.where(chunks_BT < 0, count, chunks_BT)
    return values_BT.new_zeros(len(values_BT), count + 1).scatter_add(1, place_BT, values_BT)[:, :count]


def last_positions(chunks_BT: Tensor, count: int) -> Tensor:
    """(B, C) the position of the last token of every chunk; 0 for chunks without tokens."""
    place_BT = torch.where(chunks_BT < 0, count, chunks_BT)
    position_BT = torch.arange(chunks_BT.shape[1], device=chunks_BT.device).expand_as(chunks_BT)
    empty = torch.zeros(len(chunks_BT), count + 1, dtype=torch.long, device=chunks_BT.device)
    return empty.scatter_reduce(1, place_BT, position_BT, "amax")[:, :count]


class Merged(NamedTuple):
    """Chunks put together: the number each chunk goes to, which numbers count, and the chunk that ends each (B, C)."""

    number: Tensor
    valid: Tensor
    closer: Tensor


def merge_chunks(closed_BC: Tensor, valid_BC: Tensor) -> Merged:
    """Chunks that are not ``closed`` go on into the next one, up to one that is.

    Chunks that do not count (``valid``) are never run across: what leads up to one is left out, and so is what is
    still open at the end.
    """
    count = closed_BC.shape[1]
    ends_BC = closed_BC | ~valid_BC
    number_BC = ends_BC.cumsum(1) - ends_BC.long()
    place_C = torch.arange(count, device=closed_BC.device).expand_as(number_BC)
    closer_BC = torch.zeros_like(number_BC).scatter_reduce(1, number_BC, torch.where(ends_BC, place_C, 0), "amax")
    whole_BC = (ends_BC & valid_BC).long()
    valid = torch.zeros_like(number_BC).scatter_reduce(1, number_BC, whole_BC, "amax").bool()
    return Merged(number_BC, valid, closer_BC)


def sorted_distance(student_NV: Tensor, teacher_NU: Tensor) -> Tensor:
    """(N) L1 distance of two sorted distributions over different vocabularies, the smaller one filled up with 0.

    The universal logit distillation loss (Boizard et al., 2024, arXiv 2402.12030), a Wasserstein distance under a
    uniform cost.
    """
    wide = max(student_NV.shape[-1], teacher_NU.shape[-1])
    sorted_both = [
        F.pad(logits.softmax(-1).sort(-1, descending=True).values, (0, wide - logits.shape[-1]))
        for logits in (student_NV, teacher_NU)
    ]
    return (sorted_both[0] - sorted_both[1]).abs().sum(-1)
