"""Knowledge distillation with a temperature, a noise and a share of the label for every token (Swing distillation).

Shapes: N tokens (any leading shape, e.g. BT), C tokens of one chunk, D student width, E teacher width, V vocabulary.
s in [0, 1] is how likely a token is private, T its temperature, P = softmax(teacher logits / T), P~ the noisy P.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from stillhouse.losses.divergences import common_vocabulary
from stillhouse.losses.linear_divergence import (
    LinearDivergence,
    OutputLayer,
    RowTerm,
    label_term,
    linear_loss,
    row_weights,
)

Shape = Literal["geometric", "linear"]
Noise = Literal["none", "laplace", "gaussian"]


def swing_temperature(score_N: Tensor, *, base: float, most: float, shape: Shape = "geometric") -> Tensor:
    """From ``base`` at s = 0 to ``most`` at s = 1: base (most / base)^s, or along a straight line; (...) -> (...)."""
    if shape == "linear":
        return base + (most - base) * score_N
    return base * (most / base) ** score_N


def soft_share(score_N: Tensor, *, alpha: float) -> Tensor:
    """Weight of the soft target, alpha + (1 - alpha) s: where s = 1 the loss no longer depends on the label."""
    return alpha + (1 - alpha) * score_N


# -- noise that depends on a key ------------------------------------------------------------------------------------


def _signed(value: int) -> int:
    """The 64-bit integer with these bits."""
    return value - 2**64 if value >= 2**63 else value


_STEP, _FIRST, _SECOND = map(_signed, (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def _right(x: Tensor, by: int) -> Tensor:
    return (x >> by) & (2 ** (64 - by) - 1)


def mixed(x: Tensor) -> Tensor:
    """A well-mixed 64-bit number for each: the finaliser of SplitMix64 (Steele, Lea and Flood, OOPSLA 2014)."""
    x = (x ^ _right(x, 30)) * _FIRST
    x = (x ^ _right(x, 27)) * _SECOND
    return x ^ _right(x, 31)


def key_of(seed: int, *parts: Tensor) -> Tensor:
    """A 64-bit key of each tuple of whole numbers; the parts broadcast to (...)."""
    key = torch.as_tensor(seed, dtype=torch.long, device=parts[0].device)
    for part in parts:
        key = mixed(key * _STEP + part.long() + 1)
    return key


def unit_noise(key_N: Tensor, size: int, *, kind: Noise) -> Tensor:
    """Noise of scale 1 for ``size`` outcomes of each key: (N) -> (N, size), float64; the same key, the same noise.

    Scale is b of Laplace(0, b), or the standard deviation of the Gaussian. It needs no generator, so that it does not
    depend on how rows are cut into chunks, nor on the device but for rounding.
    """
    place_V = torch.arange(1, size + 1, device=key_N.device)
    bits_NV = _right(mixed(key_N.unsqueeze(-1) + place_V * _STEP), 11)
    v_NV = (bits_NV.double() + 0.5) * 2.0**-53 - 0.5  # in (-1/2, 1/2)
    if kind == "gaussian":
        return math.sqrt(2) * torch.erfinv(2 * v_NV)
    return -v_NV.sign() * torch.log1p(-2 * v_NV.abs())


def noisy_targets(p_NV: Tensor, noise_NV: Tensor, *, support: int | None = None) -> Tensor:
    """max(0, P + n), divided by its sum: (N, V) -> (N, V).

    With ``support`` only the likeliest so many outcomes get noise, and together they keep the mass they had: over a
    large vocabulary what is cut off at 0 would otherwise add up to more than all of P. A row of which nothing is left
    becomes even.
    """
    chosen_NV = torch.ones_like(p_NV, dtype=torch.bool)
    if support is not None and support < p_NV.shape[-1]:
        chosen_NV = torch.zeros_like(chosen_NV).scatter_(-1, p_NV.topk(support, -1).indices, True)
    mass_N1 = p_NV.where(chosen_NV, 0).sum(-1, keepdim=True)
    raised_NV = (p_NV + noise_NV).clamp(min=0).where(chosen_NV, 0)
    sum_N1 = raised_NV.sum(-1, keepdim=True)
    even_NV = chosen_NV / chosen_NV.sum(-1, keepdim=True)
    share_NV = (raised_NV / sum_N1.where(sum_N1 > 0, 1)).where(sum_N1 > 0, even_NV)
    return (mass_N1 * share_NV).where(chosen_NV, p_NV)


# -- the loss -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class _TemperedTerm(RowTerm):
    """``factor`` KL(P~ || q), every row at its own temperatures (N), with noise of its own scale and key (N)."""

    hidden: Tensor
    head: OutputLayer
    temperature: Tensor
    student_temperature: Tensor
    noise_scale: Tensor
    key: Tensor
    kind: Noise
    support: int | None
    factor: float
    memory: Tensor | None = None

    def _rows(self, rows: slice | Tensor) -> dict[str, Any]:
        names = ("temperature", "student_temperature", "noise_scale", "key")
        return {name: getattr(self, name)[rows] for name in names}

    def keep(self, keep_N: Tensor) -> Self:
        rows = self._rows(keep_N)
        return replace(self, row_weight=self.row_weight[keep_N], hidden=self.hidden[keep_N], **rows)

    def at(self, rows: slice) -> Self:
        return replace(self, **self._rows(rows))

    def ready(self, autocast: torch.dtype | None, like_CV: Tensor) -> Self:
        cast = autocast is not None and self.hidden.dtype != torch.float64
        hidden = self.hidden.to(autocast) if cast else self.hidden
        return replace(self, hidden=hidden, head=self.head.ready(autocast), memory=torch.empty_like(like_CV))

    def target(self, chunk: slice) -> Tensor:
        assert self.memory is not None
        return self.head.logits(self.hidden[chunk], self.memory[: chunk.stop - chunk.start])

    def _sides(self, z_CV: Tensor, target_CV: Tensor) -> tuple[Tensor, Tensor]:
        """P~ and log q."""
        p_CV = (target_CV / self.temperature.unsqueeze(-1)).softmax(-1)
        if self.kind != "none":
            unit_CV = unit_noise(self.key, p_CV.shape[-1], kind=self.kind).to(p_CV.dtype)
            p_CV = noisy_targets(p_CV, self.noise_scale.unsqueeze(-1) * unit_CV, support=self.support)
        return p_CV, (z_CV / self.student_temperature.unsqueeze(-1)).log_softmax(-1)

    def value(self, z_CV: Tensor, target_CV: Tensor) -> Tensor:
        p_CV, log_q_CV = self._sides(z_CV, target_CV)
        return self.factor * (torch.xlogy(p_CV, p_CV) - p_CV * log_q_CV).sum(-1)

    def value_and_grad(self, z_CV: Tensor, target_CV: Tensor, *, overwrite: bool) -> tuple[Tensor, Tensor]:
        p_CV, log_q_CV = self._sides(z_CV, target_CV)
        loss_C = self.factor * (torch.xlogy(p_CV, p_CV) - p_CV * log_q_CV).sum(-1)
        return loss_C, (log_q_CV.exp_() - p_CV) * (self.factor / self.student_temperature.unsqueeze(-1))


def linear_tempered_kd(
    student_hidden_ND: Tensor,
    student: OutputLayer,
    teacher_hidden_NE: Tensor,
    teacher: OutputLayer,
    labels_N: Tensor,
    *,
    soft_N: Tensor,
    temperature_N: Tensor,
    student_temperature_N: Tensor | None = None,
    factor: float = 1.0,
    weight_N: Tensor | None = None,
    noise: Noise = "none",
    noise_scale_N: Tensor | None = None,
    key_N: Tensor | None = None,
    support: int | None = None,
    chunk_tokens: int | None = None,
) -> LinearDivergence:
    """(1 / sum m) sum_j m_j [a_j factor KL(P~_j || q_j) + (1 - a_j) CE_j], straight from hidden states.

    Equals the same on full logits, which never exist (see `linear_divergence`, where the passing of weights, softcaps
    and chunks is described). After Li et al. (2022, arXiv 2212.08349).

    Args:
        soft_N: a, the share of the soft target in every token's loss.
        temperature_N: T of the teacher's side; ``student_temperature_N`` that of the student's, by default the same.
        factor: what the divergence is multiplied with, alike for all tokens: T_j^2 would make private ones loud again.
        weight_N: m, mask or weights.
        noise, noise_scale_N, key_N, support: see `unit_noise` and `noisy_targets`; tokens of one key share their noise.

    Returns the loss, and its two parts as they enter it.
    """
    size = common_vocabulary(min(student.size, len(student.weight)), min(teacher.size, len(teacher.weight)), None)
    shape = student_hidden_ND.shape[:-1]
    if noise != "none" and (noise_scale_N is None or key_N is None):
        raise ValueError(f"noise={noise!r} needs noise_scale_N and key_N")
    weight = row_weights("weight_N", weight_N, student_hidden_ND)
    soft = row_weights("soft_N", soft_N, student_hidden_ND)
    temperature = row_weights("temperature_N", temperature_N, student_hidden_ND)
    own = (
        temperature
        if student_temperature_N is None
        else row_weights("student_temperature_N", student_temperature_N, student_hidden_ND)
    )
    nothing = torch.zeros(len(weight), dtype=torch.long, device=weight.device)
    tempered = _TemperedTerm(
        row_weight=weight * soft,
        coefficient=1.0,
        hidden=teacher_hidden_NE.detach().flatten(0, -2),
        head=replace(teacher, size=size),
        temperature=temperature,
        student_temperature=own,
        noise_scale=torch.zeros_like(weight) if noise_scale_N is None else noise_scale_N.flatten().to(weight.dtype),
        key=nothing if key_N is None else key_N.flatten(),
        kind=noise,
        support=support,
        factor=factor,
    )
    labels = label_term(labels_N, weight * (1 - soft), shape, size, 1.0)
    head = replace(student, size=size)
    loss, (hard, softened) = linear_loss(student_hidden_ND, head, [labels, tempered], chunk_tokens, "sum")
    total = weight.sum().clamp(min=torch.finfo(weight.dtype).tiny)
    return LinearDivergence(loss / total, softened / total, hard / total)
