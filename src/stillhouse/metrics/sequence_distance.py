"""Distances between two language models as distributions over whole responses.

By the chain rule the divergence of responses is an expected sum over their tokens: of y that is drawn, the sum is exact
over the vocabulary at every token. Shapes: B rows, T tokens, N response tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillhouse.core.observed import Batch, Observed, Signal
from stillhouse.data.responses import response_tokens
from stillhouse.losses.token_logprobs import Head, in_chunks, token_logprobs
from stillhouse.models.causal_lm import output_head


@dataclass(frozen=True)
class Distance:
    """A Monte Carlo estimate in nats a response: its mean, its standard error, and how it spreads over tokens.

    Attributes:
        mean: of the ``responses`` drawn, a response each.
        error: standard error of the mean; the responses of one prompt count as independent.
        tokens: response tokens in all.
    """

    mean: float
    error: float
    responses: int
    tokens: int

    @property
    def per_token(self) -> float:
        """In nats a token, as a training loss that averages over tokens has it."""
        return self.mean * self.responses / max(1, self.tokens)


@torch.no_grad()
def sequence_kl(first: nn.Module, second: nn.Module, drawn: Iterable[Batch], *, vocab_size: int) -> Distance:
    """KL(first || second) of responses: E_{y ~ first} sum_t KL(first(. | y_<t) || second(. | y_<t)).

    ``drawn``: batches of prompts and responses of ``first`` (``input_ids``, ``attention_mask``, ``loss_mask``). Both
    models should be in evaluation mode.
    """
    one, other = _Opened(first, vocab_size), _Opened(second, vocab_size)

    def kl(hidden_ND: Tensor, other_ND: Tensor) -> Tensor:
        log_p_NV, log_q_NV = one.head.logits(hidden_ND).log_softmax(-1), other.head.logits(other_ND).log_softmax(-1)
        return (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1)

    sums, tokens = [], 0
    for batch in drawn:
        at_BT, label_N, row_N = response_tokens(batch)
        kl_N = in_chunks(kl, one.hidden(batch)[at_BT], other.hidden(batch)[at_BT], vocab_size=vocab_size)
        sums.append(_by_row(kl_N, row_N, len(at_BT)))
        tokens += len(label_N)
    return _distance(torch.cat(sums), tokens)


@torch.no_grad()
def sequence_js(
    first: nn.Module, second: nn.Module, of_first: Iterable[Batch], of_second: Iterable[Batch], *, vocab_size: int
) -> Distance:
    """The Jensen-Shannon divergence of responses, symmetric and at most ln 2.

    It is the information a response has on which of the two wrote it, so that by the chain rule
    JS = E_{y ~ (first + second) / 2} sum_t [w KL(first || m) + (1 - w) KL(second || m)], m = w first + (1 - w) second,
    with w the chance, after y_<t, that ``first`` is the writer. ``of_first`` and ``of_second``: as many responses of
    each, as for `sequence_kl`.
    """
    one, other = _Opened(first, vocab_size), _Opened(second, vocab_size)

    def weighted(hidden_ND: Tensor, other_ND: Tensor, odds_N: Tensor) -> Tensor:
        log_p_NV, log_q_NV = one.head.logits(hidden_ND).log_softmax(-1), other.head.logits(other_ND).log_softmax(-1)
        log_w_N1, log_v_N1 = (nn.functional.logsigmoid(sign * odds_N)[:, None] for sign in (1, -1))
        log_m_NV = torch.logaddexp(log_w_N1 + log_p_NV, log_v_N1 + log_q_NV)
        kl_p_N = (log_p_NV.exp() * (log_p_NV - log_m_NV)).sum(-1)
        kl_q_N = (log_q_NV.exp() * (log_q_NV - log_m_NV)).sum(-1)
        return log_w_N1[:, 0].exp() * kl_p_N + log_v_N1[:, 0].exp() * kl_q_N

    found = []
    for drawn in (of_first, of_second):
        sums, tokens = [], 0
        for batch in drawn:
            at_BT, label_N, row_N = response_tokens(batch)
            hidden_ND, other_ND = one.hidden(batch)[at_BT], other.hidden(batch)[at_BT]
            gain_BT = torch.zeros(at_BT.shape, device=at_BT.device)
            gain_BT[at_BT] = token_logprobs(hidden_ND, one.head, label_N) - token_logprobs(
                other_ND, other.head, label_N
            )
            odds_N = (gain_BT.cumsum(-1) - gain_BT)[at_BT]  # of what stands before the token
            js_N = in_chunks(weighted, hidden_ND, other_ND, odds_N, vocab_size=vocab_size)
            sums.append(_by_row(js_N, row_N, len(at_BT)))
            tokens += len(label_N)
        found.append(_distance(torch.cat(sums), tokens))
    return Distance(
        (found[0].mean + found[1].mean) / 2,
        (found[0].error ** 2 + found[1].error ** 2) ** 0.5 / 2,
        sum(one.responses for one in found),
        sum(one.tokens for one in found),
    )


class _Opened:
    """A model's output layer, and the hidden states it reads: (B, T - 1, D), position t predicts token t + 1."""

    def __init__(self, model: nn.Module, vocab_size: int) -> None:
        place = output_head(model)
        layer = model.get_submodule(place.path)
        weight, bias = layer.weight, getattr(layer, "bias", None)
        assert isinstance(weight, Tensor)
        self.head = Head(
            weight[:vocab_size], None if bias is None else bias[:vocab_size], place.logit_scale, place.softcap
        )
        self._hidden: Signal = Observed(model).tap(place.path, of="input").detach()

    def hidden(self, batch: Batch) -> Tensor:
        return self._hidden(batch)[:, :-1]


def _by_row(value_N: Tensor, row_N: Tensor, rows: int) -> Tensor:
    return torch.zeros(rows, dtype=torch.float64, device=value_N.device).index_add(0, row_N, value_N.double())


def _distance(sum_B: Tensor, tokens: int) -> Distance:
    count = len(sum_B)
    error = float(sum_B.std() / count**0.5) if count > 1 else float("nan")
    return Distance(float(sum_B.mean()), error, count, tokens)
