"""What language models say of single sequences, and of domains: losses a row, perplexities a domain.

Shapes: B rows of a batch, N rows, T tokens, D hidden width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from stillhouse.core.observed import Batch, Observed
from stillhouse.losses.token_logprobs import Head, token_logprobs
from stillhouse.models.causal_lm import output_head

MOST_NATS = 80.0  # exp of it is a number, and a model whose loss is larger has failed anyhow


@torch.no_grad()
def sequence_nats(model: nn.Module, batches: Iterable[Batch], *, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The summed negative log-likelihood of every row, in nats, and its predicted tokens: (N), (N) in float64.

    ``batches`` hold ``input_ids`` (B, T), and optionally ``loss_mask`` or ``attention_mask``. The model should be in
    evaluation mode; full logits are never held.
    """
    head = output_head(model)
    layer = model.get_submodule(head.path)
    weight, bias = layer.weight, getattr(layer, "bias", None)
    assert isinstance(weight, Tensor)
    opened = Head(weight[:vocab_size], None if bias is None else bias[:vocab_size], head.logit_scale, head.softcap)
    hidden = Observed(model).tap(head.path, of="input").detach()
    nats, tokens = [], []
    for batch in batches:
        labels_BT = batch["input_ids"][:, 1:]
        mask_BT = batch.get("loss_mask", batch.get("attention_mask", torch.ones_like(batch["input_ids"])))[:, 1:].bool()
        kept_ND = hidden(batch)[:, :-1][mask_BT]
        lost_BT = torch.zeros(labels_BT.shape, dtype=torch.float64, device=labels_BT.device)
        lost_BT[mask_BT] = -token_logprobs(kept_ND, opened, labels_BT[mask_BT]).double()
        nats.append(lost_BT.sum(-1).cpu())
        tokens.append(mask_BT.sum(-1).double().cpu())
    return torch.cat(nats), torch.cat(tokens)


def mean_loss(model: nn.Module, batches: Iterable[Batch], *, vocab_size: int) -> float:
    """Nats a predicted token of all rows together; the model is put into evaluation mode meanwhile."""
    training = model.training
    model.eval()
    try:
        nats_N, tokens_N = sequence_nats(model, batches, vocab_size=vocab_size)
    finally:
        model.train(training)
    return float(nats_N.sum() / tokens_N.sum().clamp_min(1))


def perplexity(loss: float) -> float:
    """exp of a loss in nats a token, kept finite."""
    return math.exp(min(MOST_NATS, loss))
