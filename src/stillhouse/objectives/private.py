"""Objectives that keep private tokens from a student: Swing distillation, and DP-SGD to compare it with.

Shapes: B sequences, T predictions of each, D and E hidden widths, P weights.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.func import functional_call, grad_and_value, vmap

from stillhouse.core.objective import Term, TermValue
from stillhouse.core.observed import Batch, Observed
from stillhouse.core.schedule import Progress
from stillhouse.losses.linear_divergence import OutputLayer
from stillhouse.losses.tempered import (
    Noise,
    Shape,
    key_of,
    linear_tempered_kd,
    soft_share,
    swing_temperature,
)
from stillhouse.objectives.language import LanguageHead, fused_values, predicted
from stillhouse.teachers.cache import SAMPLE_ID

PRIVACY = "privacy"  # the entry of a batch that says how likely each of its tokens is private
Draw = Literal["context", "place", "step"]


def draw_keys(batch: Batch, progress: Progress, *, draw: Draw, context: int, seed: int) -> Tensor:
    """What the noise of each prediction depends on: 64-bit keys (B, T - 1).

    - ``draw="context"``: the last ``context`` tokens read. What is repeated in the text gets the same noise again.
    - ``draw="place"``: the sequence (``batch["sample_id"]``) and the place in it: one draw a token.
    - ``draw="step"``: these and the step: a fresh draw each time, which students can average away.
    """
    ids_BT = batch["input_ids"][:, :-1]
    if draw == "context":
        parts = [torch.nn.functional.pad(ids_BT, (back, 0), value=-1)[:, : ids_BT.shape[1]] for back in range(context)]
        return key_of(seed, *parts)
    place_T = torch.arange(ids_BT.shape[1], device=ids_BT.device)
    parts = [batch[SAMPLE_ID][:, None].to(ids_BT.device), place_T]
    if draw == "step":
        parts.append(torch.full_like(place_T, progress.step))
    return key_of(seed, *parts)


class SwingTokens(Term):
    """A share of the label and of the teacher, softened and noised, that depend on how private each token is.

    ``batch["privacy"]`` (B, T) has the tokens' s; see `linear_tempered_kd` for the loss.

    Args:
        student, teacher: output heads.
        base, most, shape: the temperature of tokens with s = 0 and s = 1, and the way between.
        student_at: temperature of the student's side: the "same", or for tokens above ``base`` 1 ("one").
        alpha: share of the teacher where s = 0. ``hide_labels``: it grows to 1 with s.
        noise, scale, by, support: kind and scale of the noise; on all tokens, or times s; on how many outcomes.
        draw, context: see `draw_keys`.
    """

    def __init__(
        self,
        student: LanguageHead,
        teacher: LanguageHead,
        *,
        base: float,
        most: float,
        shape: Shape = "geometric",
        student_at: Literal["same", "one"] = "same",
        alpha: float = 0.9,
        hide_labels: bool = True,
        noise: Noise = "laplace",
        scale: float = 0.05,
        by: Literal["all", "private"] = "all",
        support: int | None = None,
        draw: Draw = "context",
        context: int = 4,
        vocab_size: int,
        seed: int = 0,
        name: str = "Swing",
    ) -> None:
        super().__init__(name=name, **student.signals("student"), **teacher.signals("teacher", detach=True))
        self.heads = (student, teacher)
        self.base, self.most, self.shape, self.student_at = base, most, shape, student_at
        self.alpha, self.hide_labels = alpha, hide_labels
        self.noise, self.scale, self.by, self.support = noise, scale, by, support
        self.draw, self.context, self.seed = draw, context, seed
        self.vocab_size = vocab_size

    def compute(
        self,
        *,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher_hidden: Tensor,
        teacher_weight: Tensor,
        batch: Batch,
        progress: Progress,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
    ) -> list[TermValue]:
        labels_BT, weight_BT = predicted(batch)
        score_BT = batch[PRIVACY][:, 1:].to(student_hidden.device, torch.float32)
        T_BT = swing_temperature(score_BT, base=self.base, most=self.most, shape=self.shape)
        student, teacher = self.heads
        result = linear_tempered_kd(
            student_hidden[:, :-1],
            OutputLayer(student_weight, student_bias, student.scale, student.softcap, self.vocab_size),
            teacher_hidden[:, :-1],
            OutputLayer(teacher_weight, teacher_bias, teacher.scale, teacher.softcap, self.vocab_size),
            labels_BT,
            soft_N=soft_share(score_BT if self.hide_labels else torch.zeros_like(score_BT), alpha=self.alpha),
            temperature_N=T_BT,
            student_temperature_N=T_BT.where(self.base >= T_BT, 1.0) if self.student_at == "one" else None,
            factor=self.base**2,
            weight_N=weight_BT,
            noise=self.noise,
            noise_scale_N=self.scale * (score_BT if self.by == "private" else torch.ones_like(score_BT)),
            key_N=draw_keys(batch, progress, draw=self.draw, context=self.context, seed=self.seed),
            support=self.support,
        )
        self.log("private", (score_BT * weight_BT).sum() / weight_BT.sum())
        return fused_values(self.name, result, 1.0, 1.0)


class PrivateCrossEntropy(Term):
    """Next-token cross-entropy whose gradient is DP-SGD's (Abadi et al., CCS 2016, arXiv 1607.00133, algorithm 1).

    Each sequence's gradient is scaled down to norm ``clip``, they are added up, Gaussian noise of standard deviation
    ``multiplier`` x ``clip`` is added, and all is divided by their number. The value is the mean loss. Any optimizer
    takes the result for a gradient. It holds a gradient a sequence, so it is for small models; the privacy that this
    buys (epsilon, delta) depends on the batches and is not accounted for here.
    """

    def __init__(
        self,
        student: Observed,
        *,
        clip: float = 1.0,
        multiplier: float = 1.0,
        vocab_size: int,
        seed: int = 0,
        name: str | None = None,
    ) -> None:
        trained = next(key for key, weight in student.module.named_parameters() if weight.requires_grad)
        super().__init__(name=name or "PrivateCrossEntropy", anchor=student.parameter(trained))  # no forward needed
        self._model = (student.module,)  # not a part of this module: its weights are the player's
        self.clip, self.multiplier, self.seed = clip, multiplier, seed
        self.vocab_size = vocab_size

    def _loss(self, weights: dict[str, Tensor], ids_T: Tensor, weight_T: Tensor, attend_T: Tensor) -> Tensor:
        T = len(ids_T)
        blocked_TT = torch.ones(T, T, dtype=torch.bool, device=ids_T.device).triu(1) | (attend_T == 0)
        mask_11TT = torch.zeros(T, T, device=ids_T.device).masked_fill(blocked_TT, -1e9)[None, None]
        inputs = {"input_ids": ids_T[None], "attention_mask": mask_11TT, "use_cache": False}
        logits_TV = functional_call(self._model[0], weights, (), inputs).logits[0, :-1, : self.vocab_size].float()
        nats_T = torch.nn.functional.cross_entropy(logits_TV, ids_T[1:], reduction="none")
        return (nats_T * weight_T).sum() / weight_T.sum().clamp(min=1)

    def compute(self, *, anchor: Tensor, batch: Batch, progress: Progress, **_: Any) -> Tensor:
        (model,) = self._model
        weights = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
        held = {name: weight.detach() for name, weight in weights.items()}
        ids_BT = batch["input_ids"]
        attend_BT = batch.get("attention_mask", torch.ones_like(ids_BT))
        each = vmap(grad_and_value(self._loss), in_dims=(None, 0, 0, 0), randomness="different")
        gradients, loss_B = each(held, ids_BT, predicted(batch)[1].float(), attend_BT)
        norm_B = torch.stack([g.flatten(1).square().sum(1) for g in gradients.values()]).sum(0).sqrt()
        factor_B = (self.clip / norm_B.clamp(min=torch.finfo(norm_B.dtype).tiny)).clamp(max=1.0)
        self.log("clipped", (factor_B < 1).float().mean())
        pulled = anchor.sum() * 0.0
        random = torch.Generator().manual_seed(self.seed * 1_000_003 + progress.step)
        for name, weight in weights.items():
            summed = torch.einsum("b,b...->...", factor_B, gradients[name])
            noise = torch.randn(weight.shape, generator=random).to(summed) * (self.multiplier * self.clip)
            pulled = pulled + (weight * ((summed + noise) / len(ids_BT))).sum()
        return loss_B.mean().detach() + pulled - pulled.detach()
