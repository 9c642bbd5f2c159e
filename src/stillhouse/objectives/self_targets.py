"""Terms of a model that is its own teacher: a smoothed target, and the others ranked with a weak inner head (USKD).

Shapes: B batch, T tokens, D width of the inner feature, V classes or vocabulary, N = B (T - 1) predicted tokens, 1 an
axis of size one.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.base.errors import ModelError
from stillhouse.core.objective import Term, TermValue
from stillhouse.core.observed import Batch, Observed, Signal
from stillhouse.losses.divergences import ForwardKL, log_softmax
from stillhouse.losses.linear_divergence import linear_divergence
from stillhouse.losses.self_targets import ZipfNonTargets, nontarget_zipf, smoothed_target
from stillhouse.losses.token_logprobs import Head, token_logprobs
from stillhouse.models.exit_heads import blocks_of
from stillhouse.objectives.language import LanguageHead, predicted


def image_feature(model: Observed, path: str | None = None) -> Signal:
    """An inner feature of an image classifier as one vector an image, (B, D).

    Feature maps are averaged over their places. Of tokens the first is taken where the model has a class token, and the
    mean where it has none.

    Args:
        path: of a sub-module; by default the last but one of the model's stages or blocks.
    """
    tokens = any(name.endswith("cls_token") for name, _ in model.module.named_parameters())

    def pooled(feature: Tensor) -> Tensor:
        if feature.ndim == 4:
            return feature.mean((2, 3))
        if feature.ndim == 3:
            return feature[:, 0] if tokens else feature.mean(1)
        return feature

    return model.tap(path or blocks_of(model.module)[-2]).map(pooled)


def token_feature(model: Observed, layer: int | None = None) -> Signal:
    """What a language model's ``layer``-th block puts out (counted from 1; by default half-way up): (B, T, D).

    Raises:
        ModelError: the model has no such layer below its last.
    """
    blocks = blocks_of(model.module)
    number = len(blocks) // 2 if layer is None else layer
    if not 1 <= number < len(blocks):
        raise ModelError(f"{model.name}: no layer {number} below the last; give one between 1 and {len(blocks) - 1}")
    return model.tap(blocks[number - 1])


class SelfTargets(Term):
    """a L_target + b L_others + mu L_weak of a classifier (USKD, Yang et al., ICCV 2023, arXiv 2303.13005).

    Labels are ``batch[target]`` (B,), or distributions (B, V), of which the two likeliest classes are targets as far as
    they are above 0. The weak head is trained with its player, and so is what lies under it.

    Args:
        student: logits (B, V). feature: (B, D).
        classes: V.
        a, b, mu: weights of the smoothed target, of the ranked others, and of the weak head's own loss.
        smoothing: of the weak head's labels.
    """

    def __init__(
        self,
        student: Signal,
        feature: Signal,
        *,
        classes: int,
        a: float = 1.0,
        b: float = 0.1,
        mu: float = 0.005,
        smoothing: float = 0.1,
        target: str = "labels",
        name: str = "USKD",
    ) -> None:
        super().__init__(name=name, student=student, feature=feature)
        self.weak = nn.LazyLinear(classes)
        self.a, self.b, self.mu, self.smoothing, self.target = a, b, mu, smoothing, target

    def compute(self, *, student: Tensor, feature: Tensor, batch: Batch, **_: Any) -> list[TermValue]:
        label = batch[self.target]
        z_BV, w_BV = student.float(), self.weak(feature).float()
        if label.is_floating_point():
            value_BK, label_BK = label.topk(2, dim=-1)
        else:
            value_BK, label_BK = torch.ones_like(label[:, None], dtype=z_BV.dtype), label[:, None]
        log_q_BK = log_softmax(z_BV).gather(-1, label_BK)
        p_BK = torch.stack(
            [smoothed_target(log_q.exp(), value_N=value) for log_q, value in zip(log_q_BK.T, value_BK.T, strict=True)],
            dim=-1,
        )
        target_BV = torch.zeros_like(z_BV, dtype=torch.bool).scatter_(-1, label_BK, value_BK > 0)
        return [
            TermValue(f"{self.name}.target", -(p_BK * log_q_BK).sum(-1).mean(), self.a),
            TermValue(f"{self.name}.others", nontarget_zipf(z_BV, w_BV, target_BV).mean(), self.b),
            TermValue(f"{self.name}.weak", F.cross_entropy(w_BV, label, label_smoothing=self.smoothing), self.mu),
        ]


class TokenSelfTargets(Term):
    """Next-token cross-entropy + `SelfTargets` of a language model, in fused passes: full logits are never held.

    The label is the next token; the weak head predicts it from ``feature`` (B, T, D), layer-normalised. The smoothed
    target is a cross-entropy whose tokens count 1 + a P: one pass does it and the cross-entropy.

    Args:
        width: D.
        vocab_size: the real vocabulary, V.
        a, b, mu, smoothing: see `SelfTargets`.
    """

    def __init__(
        self,
        student: LanguageHead,
        feature: Signal,
        *,
        width: int,
        vocab_size: int,
        a: float = 1.0,
        b: float = 0.1,
        mu: float = 0.005,
        smoothing: float = 0.1,
        name: str = "USKD",
    ) -> None:
        super().__init__(name=name, feature=feature, **student.signals("student"))
        self.head = student
        self.weak = nn.Linear(width, vocab_size, bias=False)
        self.a, self.b, self.mu, self.smoothing = a, b, mu, smoothing

    def compute(
        self,
        *,
        feature: Tensor,
        student_hidden: Tensor,
        student_weight: Tensor,
        batch: Batch,
        student_bias: Tensor | None = None,
        **_: Any,
    ) -> list[TermValue]:
        labels_BT, mask_BT = predicted(batch)
        weight_BT = mask_BT.to(torch.promote_types(student_hidden.dtype, torch.float32))
        hidden_BTD, V = student_hidden[:, :-1], self.weak.out_features
        inner_BTD = F.layer_norm(feature[:, :-1], feature.shape[-1:])
        with torch.no_grad():
            bias_V = None if student_bias is None else student_bias[:V]
            head = Head(student_weight[:V], bias_V, self.head.scale, self.head.softcap)
            log_q_y_BT = token_logprobs(hidden_BTD.flatten(0, 1), head, labels_BT.flatten()).view_as(weight_BT)
            p_BT = smoothed_target(log_q_y_BT.exp(), weight_N=weight_BT)
            total = weight_BT.sum().clamp_min(1e-9)
            plain, smoothed = (-(weight_BT * x_BT * log_q_y_BT).sum() / total for x_BT in (torch.ones_like(p_BT), p_BT))
        ranked = linear_divergence(
            hidden_BTD,
            student_weight,
            inner_BTD.detach(),
            self.weak.weight.detach(),
            divergence=ZipfNonTargets(),
            student_bias_V=student_bias,
            student_logit_scale=self.head.scale,
            student_softcap=self.head.softcap,
            labels_N=labels_BT,
            divergence_weight=self.b,
            cross_entropy_weight=1 + self.a,  # the mean of 1 + a P, which the weighted mean divides by
            weight_N=weight_BT,
            label_weight_N=weight_BT * (1 + self.a * p_BT),
            vocab_size=V,
        )
        flat_BT1, flat_V1 = inner_BTD.new_zeros(*labels_BT.shape, 1), self.weak.weight.new_zeros(V, 1)
        weak = (
            linear_divergence(  # to labels smoothed evenly, which differ from a "teacher" of equal logits by a constant
                inner_BTD,
                self.weak.weight,
                flat_BT1,
                flat_V1,
                divergence=ForwardKL(),
                labels_N=labels_BT,
                divergence_weight=self.smoothing,
                cross_entropy_weight=1 - self.smoothing,
                weight_N=weight_BT,
            )
        )
        nothing = torch.zeros_like(plain)
        return [
            TermValue(f"{self.name}.others", ranked.divergence, self.b, carrier=ranked.loss),
            TermValue("CrossEntropy", plain, carrier=nothing),
            TermValue(f"{self.name}.target", smoothed, self.a, carrier=nothing),
            TermValue(f"{self.name}.weak", weak.loss, self.mu),
        ]
