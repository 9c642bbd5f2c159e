"""LSG attention: every token reads tokens near it, some of those further away, and a few global ones.

Condevaux and Harispe (2022, arXiv 2210.15497). A text is cut into blocks. The tokens of a block read it and the blocks
beside it (local); of the ``factor`` blocks beyond these, on either side, one in ``factor`` tokens (sparse); and learned
global tokens that stand before the text, read everything and are read by all. Time and memory grow with the length.

`lsg_classes` makes the model classes: BERT or RoBERTa of ``transformers`` under a model type of their own
(``lsg-bert``), with the same weights and the global tokens' embeddings.

Shapes: B texts, H heads, T tokens, G global tokens, N blocks, P tokens of a block, S those of them that are sparse, K
keys that a block reads, D width of a head.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.base.errors import ModelError

PREFIX = "lsg-"
IMPLEMENTATION = "stillhouse_lsg"
Sparse = Literal["norm", "pooling", "lsh", "strided", "block-strided", "none"]
Chosen = tuple[Tensor, Tensor, Tensor]  # keys, values, and which of them are there


# -- the attention --------------------------------------------------------------------------------------------------


def lsg_attention(
    query_BHTD: Tensor,
    key_BHTD: Tensor,
    value_BHTD: Tensor,
    mask_BT: Tensor | None = None,
    *,
    block: int,
    factor: int,
    selection: Sparse,
    global_tokens: int = 0,
    scaling: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attention of the first ``global_tokens`` to everything, of the others to what is near, sparse or global.

    Args:
        mask_BT: False where there is padding; without one, all tokens are there.
        block: P.
        factor: one token in so many is read beyond the neighbouring blocks, in so many blocks on either side.
        selection: see `choose`.
        scaling: of the scores, 1 / sqrt(D) by default.
        dropout: share of the attention weights that is dropped.

    Returns:
        (B, H, T, D), global tokens first as they came.
    """
    G, T = global_tokens, query_BHTD.shape[2]
    scaling = query_BHTD.shape[-1] ** -0.5 if scaling is None else scaling
    mask_BT = torch.ones_like(key_BHTD[:, 0, :, 0], dtype=torch.bool) if mask_BT is None else mask_BT.bool()

    def blocks(x: Tensor) -> Tensor:
        """(B, H, T, D) -> (B, H, N, P, D) without the global tokens, filled up at the end."""
        return F.pad(x[:, :, G:], (0, 0, 0, (G - T) % block)).unflatten(2, (-1, block))

    query, key, value = blocks(query_BHTD), blocks(key_BHTD), blocks(value_BHTD)
    there_B1NP = F.pad(mask_BT[:, G:], (0, (G - T) % block)).unflatten(1, (-1, block))[:, None]
    near = [-1, 0, 1]
    parts = [tuple(_beside(one, near) for one in (key, value, there_B1NP))]
    if selection != "none":
        far = [step for away in range(2, 2 + factor) for step in (-away, away)]
        parts.append(tuple(_beside(one, far) for one in choose(key, value, there_B1NP, factor, selection)))
    if G:
        to_all = [one[:, :, None, :G].expand(-1, -1, query.shape[2], -1, -1) for one in (key_BHTD, value_BHTD)]
        parts.append((*to_all, mask_BT[:, None, None, :G].expand(-1, -1, query.shape[2], -1)))
    keys_BHNKD, values_BHNKD = (torch.cat([part[index] for part in parts], 3) for index in (0, 1))
    heads = query.shape[1]
    seen_BHNK = torch.cat([part[2].expand(-1, heads, -1, -1) for part in parts], 3)
    text = _read(query, keys_BHNKD, values_BHNKD, seen_BHNK, scaling, dropout).flatten(2, 3)[:, :, : T - G]
    if not G:
        return text
    whole = _read(query_BHTD[:, :, :G], key_BHTD, value_BHTD, mask_BT[:, None], scaling, dropout)
    return torch.cat([whole, text], 2)


def choose(key: Tensor, value: Tensor, there_B1NP: Tensor, factor: int, selection: Sparse) -> Chosen:
    """One in ``factor`` tokens of every block: keys and values (B, H, N, P, D) -> (B, H, N, S, D), and which are there.

    ``norm``: those with the longest keys. ``pooling``: means of ``factor`` neighbours, padding left out. ``lsh``: means
    of tokens with like keys, which the nearest of S fixed random directions tells (Andoni et al., 2015). ``strided``:
    every ``factor``-th token, another one for the next head. ``block-strided``: S in a row, others for the next head.
    """
    heads, size = key.shape[1], key.shape[3] // factor
    if selection == "norm":
        norm_BHNP = key.norm(dim=-1).masked_fill(~there_B1NP, -1.0)
        best_BHNS = norm_BHNP.topk(size, dim=-1).indices
        picked = best_BHNS[..., None].expand(*best_BHNS.shape, key.shape[-1])
        seen = there_B1NP.expand(-1, heads, -1, -1).gather(3, best_BHNS)
        return key.gather(3, picked), value.gather(3, picked), seen
    if selection == "pooling":
        there = there_B1NP.unflatten(3, (size, factor))
        share = there / there.sum(-1, keepdim=True).clamp(min=1)
        means = [(one.unflatten(3, (size, factor)) * share[..., None].to(one)).sum(4) for one in (key, value)]
        return means[0], means[1], there.any(-1)
    if selection == "lsh":
        directions_DS = _directions(key.shape[-1], size).to(key)
        kind_BHNP = (key @ directions_DS).argmax(-1)
        kinds_BHNSP = F.one_hot(kind_BHNP, size).mT * there_B1NP[..., None, :]
        count_BHNS = kinds_BHNSP.sum(-1)
        share_BHNSP = kinds_BHNSP.to(key) / count_BHNS.clamp(min=1)[..., None]
        return share_BHNSP @ key, share_BHNSP @ value, count_BHNS > 0
    strided = selection == "strided"
    sizes, axis = ((size, factor), 4) if strided else ((factor, size), 3)
    turn = torch.arange(heads, device=key.device) % factor

    def of_each_head(one: Tensor) -> Tensor:
        cut = one.expand(-1, heads, *one.shape[2:]).unflatten(3, sizes)
        where = turn.view(1, heads, *[1] * (cut.ndim - 2)).expand(*cut.shape[:axis], 1, *cut.shape[axis + 1 :])
        return cut.gather(axis, where).squeeze(axis)

    return of_each_head(key), of_each_head(value), of_each_head(there_B1NP)


def _directions(width: int, count: int) -> Tensor:
    """Random directions, each with its opposite (a cross-polytope), the same ones everywhere: (D, count)."""
    one_way = torch.randn(width, (count + 1) // 2, generator=torch.Generator().manual_seed(0))
    return torch.cat([one_way, -one_way], 1)[:, :count] / one_way.norm(dim=0).repeat(2)[:count]


def _beside(x: Tensor, steps: Sequence[int]) -> Tensor:
    """What stands so many blocks away, side by side: (B, H, N, P, ...) -> (B, H, N, steps P, ...), zeros beyond."""
    most, count = max(map(abs, steps)), x.shape[2]
    wide = F.pad(x, (*[0] * (2 * (x.ndim - 3)), most, most))
    return torch.cat([wide[:, :, most + step : most + step + count] for step in steps], 3)


def _read(query: Tensor, key: Tensor, value: Tensor, seen: Tensor, scaling: float, dropout: float) -> Tensor:
    """Softmax attention to the keys that are ``seen`` (..., keys)."""
    scores = query @ key.transpose(-1, -2) * scaling
    scores = scores.masked_fill(~seen[..., None, :], torch.finfo(scores.dtype).min)
    return F.dropout(scores.softmax(-1), dropout, training=dropout > 0) @ value


# -- the models -----------------------------------------------------------------------------------------------------


def check_lsg(*, block: int, factor: int, selection: str) -> None:
    """Raises ModelError unless a block can be cut by ``factor``."""
    if block < 1 or factor < 1 or (selection != "none" and block % factor):
        raise ModelError(f"block_size={block}, sparsity_factor={factor}: the block must be a multiple of the factor")


@functools.cache
def lsg_classes(base_type: str) -> dict[str, Any]:
    """Config, masked language model and tagger of an LSG ``"bert"`` or ``"roberta"``, known to the Auto classes.

    Keys are ``Config``, ``ForMaskedLM`` and ``ForTokenClassification``. The config's ``lsg`` holds ``block``,
    ``factor``, ``selection`` and ``global_tokens``. The pooler of a tagger reads the text's first token, as before.
    Hidden states between the layers have the global tokens in front; the last ones do not.
    """
    import transformers
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, _attend)
    AttentionMaskInterface.register(IMPLEMENTATION, _as_given)
    name = {"bert": "Bert", "roberta": "Roberta"}[base_type]
    base_config: Any = getattr(transformers, f"{name}Config")

    class Config(base_config):
        model_type = PREFIX + base_type

    Config.__name__ = Config.__qualname__ = f"LSG{name}Config"
    transformers.AutoConfig.register(Config.model_type, Config)
    found: dict[str, Any] = {"Config": Config}
    for task, auto in (
        ("ForMaskedLM", transformers.AutoModelForMaskedLM),
        ("ForTokenClassification", transformers.AutoModelForTokenClassification),
    ):
        found[task] = _with_lsg(getattr(transformers, name + task), Config, f"LSG{name}{task}")
        auto.register(Config, found[task])
    return found


def _with_lsg(base: Any, config_type: Any, name: str) -> Any:
    class Model(base):
        config_class = config_type

        def __init__(self, config: Any) -> None:
            config._attn_implementation = IMPLEMENTATION
            super().__init__(config)
            body, count = getattr(self, self.base_model_prefix), config.lsg["global_tokens"]
            if count:
                body.embeddings.LayerNorm = GlobalsInFront(config, count)
                body.encoder.layer[-1].register_forward_hook(_Drop(count))

    Model.__name__ = Model.__qualname__ = name
    return Model


class GlobalsInFront(nn.LayerNorm):
    """The norm of the embeddings, with the global tokens put in front of the text."""

    def __init__(self, config: Any, count: int) -> None:
        super().__init__(config.hidden_size, eps=config.layer_norm_eps)
        self.global_tokens = nn.Parameter(torch.randn(count, config.hidden_size) * config.initializer_range)

    def forward(self, text_BTD: Tensor) -> Tensor:
        front = self.global_tokens.to(text_BTD.dtype).expand(len(text_BTD), -1, -1)
        return super().forward(torch.cat([front, text_BTD], 1))


class _Drop:
    """A hook that takes the global tokens out of what a layer gives."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __call__(self, _layer: nn.Module, _args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return output[0][:, self.count :], *output[1:]
        return output[:, self.count :]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, None]:
    """`lsg_attention` as the attention of ``transformers`` is called: gives (B, T, H, D)."""
    if attention_mask is not None:  # of the text alone
        attention_mask = F.pad(attention_mask, (query.shape[2] - attention_mask.shape[1], 0), value=True)
    out = lsg_attention(query, key, value, attention_mask, scaling=scaling, dropout=dropout, **module.config.lsg)
    return out.transpose(1, 2).contiguous(), None


def _as_given(*_args: Any, attention_mask: Tensor | None = None, **_: Any) -> Tensor | None:
    """The mask of padding as it is (B, T), not (B, 1, T, T)."""
    return attention_mask
