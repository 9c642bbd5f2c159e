"""What logits give away of the output matrix behind them: their rank, its column space, and a model that wears it.

Logits are W h with W (V, D), V far above D: any collection of them lies in a D-dimensional subspace. After Carlini et
al. (2024, arXiv 2403.06634) and Finlayson et al. (2024, arXiv 2403.09539). Shapes: N answers, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.base.errors import DataError, ModelError
from stillhouse.models.scaling import SIZES, new_causal_lm, student_from_spec


@dataclass(frozen=True)
class Recovered:
    """An output matrix up to an invertible map: ``weight`` (V, rank), so scaled that hidden states have unit power."""

    weight: Tensor
    singular: Tensor
    rank: int

    @property
    def gap(self) -> float:
        """How far the last singular value that counts stands above the next."""
        return gap_after(self.singular, self.rank)


def floored(singular: Tensor) -> Tensor:
    """Singular values, none below what rounding leaves of the largest."""
    return singular.clamp_min(float(singular[0]) * torch.finfo(singular.dtype).eps)


def gap_after(singular: Tensor, rank: int) -> float:
    """s_rank / s_(rank + 1)."""
    values = floored(singular)
    return float(values[rank - 1] / values[rank]) if rank < len(values) else float("nan")


def logit_rank(singular: Tensor, *, window: tuple[int, int] | None = None) -> int:
    """Where the singular values (descending) drop furthest: the i with the largest s_i / s_(i + 1).

    ``window``: the first and last rank to think of. Raises `DataError` if there are too few values to see a drop.
    """
    values = floored(singular)
    first, last = window or (1, len(values) - 1)
    last = min(last, len(values) - 1)
    if first < 1 or last < first:
        raise DataError(f"{len(values)} answers are too few to tell a rank between {first} and {last}; ask more")
    ratios = values[first - 1 : last] / values[first : last + 1]
    return first + int(ratios.argmax())


def recover_head(logits_NV: Tensor, *, rank: int | None = None, window: tuple[int, int] | None = None) -> Recovered:
    """The column space of the output matrix from N answers; ``rank`` if it is known, else where the spectrum drops.

    W = V_rank S_rank / sqrt(N): hidden states that give these logits then have the identity as second moment.
    """
    _, singular, right = torch.linalg.svd(logits_NV.double(), full_matrices=False)
    found = rank or logit_rank(singular, window=window)
    weight = right[:found].T * singular[:found] / len(logits_NV) ** 0.5
    return Recovered(weight.contiguous(), singular, found)


def recover_head_in_parts(
    answers: Callable[[], Iterable[Tensor]],
    vocab_size: int,
    *,
    sketch: int,
    rank: int | None = None,
    window: tuple[int, int] | None = None,
    seed: int = 0,
) -> Recovered:
    """What `recover_head` finds, where N x V numbers are too many to hold or to decompose.

    Every token goes into one of ``sketch`` buckets with a random sign (Clarkson and Woodruff, 2013, arXiv 1207.6365).
    The N x ``sketch`` matrix has the rank of the answers and the same left singular space U, as long as ``sketch`` is
    above that rank; U^T times the answers then spans their row space. Answers of exact rank are recovered exactly, as
    without a sketch; with noise the space is that of a randomised SVD.

    Args:
        answers: gives the answers in parts (n, V), all N in the same order; it is called twice.
        sketch: buckets; four times the width is ample. N x sketch and V x rank numbers are held.
        rank, window: see `recover_head`; the drop is looked for in the spectrum of the sketch.

    Raises:
        DataError: too few answers or buckets to see a drop, or to hold ``rank``.
    """
    generator = torch.Generator().manual_seed(seed)
    bucket_V = torch.randint(sketch, (vocab_size,), generator=generator)
    sign_V = torch.randint(2, (vocab_size,), generator=generator).double() * 2 - 1
    small_NM = torch.cat(
        [
            torch.zeros(len(part), sketch, dtype=torch.float64).index_add_(1, bucket_V, part.double() * sign_V)
            for part in answers()
        ]
    )
    left, values, _ = torch.linalg.svd(small_NM, full_matrices=False)
    found = rank or logit_rank(values, window=window)
    if found >= min(small_NM.shape):
        raise DataError(
            f"{len(small_NM)} answers in {sketch} buckets do not show a width of {found}; raise queries or sketch"
        )
    across_VR = torch.zeros(vocab_size, found, dtype=torch.float64)
    start = 0
    for part in answers():
        across_VR += part.double().T @ left[start : start + len(part), :found]
        start += len(part)
    column_VR, singular, _ = torch.linalg.svd(across_VR, full_matrices=False)
    # Beyond the rank only the sketch knows the spectrum; signs of buckets keep its scale.
    spectrum = torch.cat([singular, values[found:].clamp_max(float(singular[-1]))])
    return Recovered((column_VR * singular / start**0.5).contiguous(), spectrum, found)


def without_mean(matrix_VD: Tensor) -> Tensor:
    """Every column less its mean over the vocabulary: what a softmax can see of an output matrix."""
    return matrix_VD - matrix_VD.mean(0, keepdim=True)


def principal_cosines(one_VD: Tensor, other_VD: Tensor) -> Tensor:
    """Cosines of the principal angles between two column spaces, descending."""
    bases = []
    for matrix in (one_VD.double(), other_VD.double()):
        left, singular, _ = torch.linalg.svd(matrix, full_matrices=False)
        bases.append(left[:, singular > singular[0] * 1e-9])
    return torch.linalg.svdvals(bases[0].T @ bases[1]).clamp_max(1.0)


def low_rank_completion(
    values_NV: Tensor, seen_NV: Tensor, rank: int, *, penalty: float = 1e-2, rounds: int = 10, seed: int = 0
) -> Tensor:
    """Alternating least squares for min sum over seen entries (Y - A B^T)^2 + penalty (|A|^2 + |B|^2): A B^T (N, V)."""
    Y, seen = values_NV.double(), seen_NV.bool()
    generator = torch.Generator().manual_seed(seed)
    B = torch.randn(Y.shape[1], rank, generator=generator, dtype=torch.float64) / rank**0.5
    A = torch.zeros(Y.shape[0], rank, dtype=torch.float64)
    for _ in range(rounds):
        A = _ridge(Y, seen, B, penalty)
        B = _ridge(Y.T, seen.T, A, penalty)
    return A @ B.T


def _ridge(Y: Tensor, seen: Tensor, B: Tensor, penalty: float) -> Tensor:
    """For every row, the ridge regression of its seen entries on the same rows of ``B``."""
    A = torch.zeros(len(Y), B.shape[1], dtype=B.dtype)
    for row, mask in enumerate(seen):
        X, y = B[mask], Y[row, mask]
        if len(X) < B.shape[1]:  # few entries: the dual problem is smaller
            A[row] = X.T @ torch.linalg.solve(X @ X.T + penalty * torch.eye(len(X), dtype=B.dtype), y)
        else:
            A[row] = torch.linalg.solve(X.T @ X + penalty * torch.eye(B.shape[1], dtype=B.dtype), X.T @ y)
    return A


def fitting_width(config: Any, rank: int) -> int:
    """The least width of at least ``rank`` that the architecture's heads divide evenly, into even parts."""
    text = config.get_text_config(decoder=True)
    heads = next(int(getattr(text, name)) for name in SIZES["heads"] if getattr(text, name, None))
    return -(-rank // (2 * heads)) * 2 * heads


def with_frozen_head(
    spec: str, victim_config: Any, head_VD: Tensor, *, frozen: bool = True, seed: int = 0
) -> nn.Module:
    """A new model of the victim's kind that wears ``head_VD``, rotated, as its output matrix; its blocks are new.

    ``spec`` says how deep it is (``layers=4``). The width is the head's; where the architecture cannot have it, the
    next it can, with empty columns. Tied embeddings are the same matrix. ``frozen``: it takes no gradient.
    """
    size, rank = head_VD.shape
    width = fitting_width(victim_config, rank)
    config = student_from_spec(f"{spec},hidden_size={width}", victim_config)
    model = new_causal_lm(config, seed=seed)
    head = model.get_output_embeddings()
    if head is None or head.weight.shape[1] != width or head.weight.shape[0] < size:
        raise ModelError(f"{type(model).__name__} has no output matrix of {size} x {width} to put the recovered one in")
    turn = np.linalg.qr(np.random.default_rng(seed).standard_normal((width, width)))[0]
    with torch.no_grad():
        padded = torch.zeros(size, width, dtype=torch.float64)
        padded[:, :rank] = head_VD.double()
        head.weight[:size] = (padded @ torch.from_numpy(turn)).to(head.weight.dtype)
    if frozen:
        head.weight.requires_grad_(False)
    return model
