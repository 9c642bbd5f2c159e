"""Divergences over a few tokens and one bucket for the rest, and weights by a teacher's certainty.

Shapes: N tokens, V vocabulary, K kept tokens, L = K + 1 with the bucket.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def topk_with_rest(logits_NV: Tensor, index_NK: Tensor) -> Tensor:
    """Log-probabilities of the indexed tokens, and of all others together in the last place: (N, K + 1).

    The rest is summed from its own logits, not as 1 minus the others: it stays exact where it is tiny.
    """
    log_p_NV = logits_NV.log_softmax(-1)
    rest_N1 = log_p_NV.scatter(-1, index_NK, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_p_NV.gather(-1, index_NK), rest_N1], -1)


def topk_bucket_jsd(student_logits_NV: Tensor, teacher_logits_NV: Tensor, *, k: int = 100) -> Tensor:
    """Jensen-Shannon divergence over the student's ``k`` likeliest tokens and a bucket for the rest: (N), at most ln 2.

    1/2 KL(p || m) + 1/2 KL(q || m) with m = (p + q)/2, p the student, q the teacher (no gradient), as in SDPO
    (Huebotter et al., 2026, arXiv 2601.20802). Merging tokens can only lower it; from k = V - 1 on it is the full one.
    """
    k = min(k, student_logits_NV.shape[-1] - 1)
    index_NK = student_logits_NV.detach().topk(k, dim=-1).indices
    log_p_NL = topk_with_rest(student_logits_NV, index_NK)
    log_q_NL = topk_with_rest(teacher_logits_NV.detach(), index_NK)
    log_m_NL = torch.logaddexp(log_p_NL, log_q_NL) - math.log(2)
    kl_p_N = (log_p_NL.exp() * (log_p_NL - log_m_NL)).sum(-1)
    kl_q_N = (log_q_NL.exp() * (log_q_NL - log_m_NL)).sum(-1)
    return 0.5 * (kl_p_N + kl_q_N)


def entropy(logits_NV: Tensor) -> Tensor:
    """Entropy of the softmax, nats: (N)."""
    log_p_NV = logits_NV.log_softmax(-1)
    return -(log_p_NV.exp() * log_p_NV).sum(-1)


def certainty_weights(entropy_N: Tensor, *, beta: float = 1.0) -> Tensor:
    """exp(-beta H) divided by its mean over the tokens: (N), mean 1 (SRPO, Li et al., 2026, arXiv 2604.02288).

    No token, no weight: an empty tensor comes back empty.
    """
    raw_N = torch.exp(-beta * entropy_N)
    return raw_N / raw_N.mean().clamp(min=torch.finfo(raw_N.dtype).tiny) if len(raw_N) else raw_N
