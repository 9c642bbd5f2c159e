"""Exposure of planted secrets: how far up a model ranks a canary among all it could have been.

exposure = log2 |R| - log2 rank (Carlini et al., USENIX Security 2019, arXiv 1802.08232, definition 2): log2 |R| bits
for the likeliest of the |R| candidates, 1.44 in the mean for a secret that is none. Shapes: B sequences, T tokens,
R candidates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from stillhouse.base.errors import DataError
from stillhouse.base.table import Column, Table
from stillhouse.core.observed import Batch, Observed
from stillhouse.core.stage import Audit, Context
from stillhouse.data.json_lines import json_lines
from stillhouse.losses.token_logprobs import Head, token_logprobs
from stillhouse.models.causal_lm import output_head

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ALPHABETS = {"digits": "0123456789", "letters": "abcdefghijklmnopqrstuvwxyz"}


@dataclass(frozen=True)
class Canary:
    """A text with a secret in it: ``prefix``, then symbols of ``alphabet``, ``separator`` between them."""

    prefix: str
    secret: tuple[str, ...]
    alphabet: tuple[str, ...]
    separator: str = ""

    @property
    def size(self) -> int:
        """|R|."""
        return len(self.alphabet) ** len(self.secret)

    def text(self, symbols: Sequence[str]) -> str:
        return self.prefix + self.separator.join(symbols)

    def candidates(self, most: int, seed: int = 0) -> Iterator[tuple[str, ...]]:
        """All fillings, the secret first; or it and ``most`` - 1 drawn ones, where there are more than ``most``."""
        yield self.secret
        if self.size <= most:
            yield from (one for one in itertools.product(self.alphabet, repeat=len(self.secret)) if one != self.secret)
            return
        random = np.random.default_rng(seed)
        drawn = 1
        while drawn < most:
            one = tuple(self.alphabet[place] for place in random.integers(len(self.alphabet), size=len(self.secret)))
            if one != self.secret:
                drawn += 1
                yield one


def read_canaries(file: str) -> list[Canary]:
    """Canaries from JSON lines: ``prefix``, ``secret``, and if it is not of digits or of letters, ``alphabet``.

    Raises `DataError` that names the line.
    """
    found, like = [], '{"prefix": ..., "secret": ..., "alphabet": ...}'
    for place, record in json_lines(file, like=like):
        try:
            prefix, secret = record["prefix"], str(record["secret"])
        except KeyError as error:
            raise DataError(f"{place}: not a canary; must be {like}") from error
        usual = (symbols for symbols in ALPHABETS.values() if set(secret) <= set(symbols))
        alphabet = record.get("alphabet") or next(usual, "")
        if not secret or not set(secret) <= set(alphabet):
            raise DataError(f"{place}: the secret {secret!r} is not made of its alphabet {alphabet!r}")
        found.append(Canary(prefix, tuple(secret), tuple(dict.fromkeys(alphabet))))
    if not found:
        raise DataError(f"canaries={file}: the file has no canary in it")
    return found


@torch.no_grad()
def next_token_logprobs(model: nn.Module, batch: Batch) -> Tensor:
    """log p(token t + 1 | tokens up to t) of ``input_ids`` (B, T): (B, T - 1); full logits are never held."""
    found = output_head(model)
    layer = model.get_submodule(found.path)
    head = Head(layer.weight, layer.bias, found.logit_scale, found.softcap)  # type: ignore[arg-type]
    hidden_BTD = Observed(model).tap(found.path, of="input").detach()(batch)[:, :-1]
    labels_BT = batch["input_ids"][:, 1:]
    return token_logprobs(hidden_BTD.flatten(0, 1), head, labels_BT.flatten()).view(labels_BT.shape)


@torch.no_grad()
def likelihoods(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], *, batch: int = 250
) -> Tensor:
    """Log-probability of each text from its beginning, nats: (R)."""
    model.eval()
    device = next(model.parameters()).device
    start, found = tokenizer.eos_token_id, []
    for first in range(0, len(texts), batch):
        rows = [list(ids) for ids in tokenizer(list(texts[first : first + batch]))["input_ids"]]
        rows = [ids if ids[:1] == [tokenizer.bos_token_id] else [start, *ids] for ids in rows]
        longest = max(map(len, rows))
        ids_BT = torch.tensor([ids + [start] * (longest - len(ids)) for ids in rows], device=device)
        mask_BT = torch.tensor([[1] * len(ids) + [0] * (longest - len(ids)) for ids in rows], device=device)
        log_p_BT = next_token_logprobs(model, {"input_ids": ids_BT, "attention_mask": mask_BT})
        found.append((log_p_BT.double() * mask_BT[:, 1:]).sum(1).cpu())
    return torch.cat(found)


def rank_of(log_p_R: Tensor) -> float:
    """Rank of the first candidate, 1 the likeliest; candidates as likely as it count half."""
    better, as_good = (log_p_R > log_p_R[0]).sum(), (log_p_R == log_p_R[0]).sum() - 1
    return 1 + float(better) + 0.5 * float(as_good)


def exact_exposure(log_p_R: Tensor) -> float:
    """log2 |R| - log2 rank of the first of all candidates, bits."""
    return math.log2(len(log_p_R)) - math.log2(rank_of(log_p_R))


def skew_normal_exposure(log_p_R: Tensor) -> float:
    """-log2 of the share of candidates at least as likely as the first, by a skew-normal fitted to the others, bits.

    For secrets of whose candidates there are too many to rank (Carlini et al., 2019, section 4.3); it is not bounded by
    log2 |R|.
    """
    from scipy.stats import skewnorm

    others = -log_p_R[1:].double().numpy()
    below = skewnorm.logcdf(-float(log_p_R[0]), *skewnorm.fit(others))
    return float(-below / math.log(2))


@dataclass(frozen=True)
class Exposure:
    """One canary under one model: bits, the rank it has, and out of how many; ``exact`` if these were all."""

    bits: float
    rank: float
    candidates: int
    exact: bool


def expose(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, canary: Canary, *, most: int = 10_000, seed: int = 0
) -> Exposure:
    """The exposure of a canary: exact where it has at most ``most`` candidates, else by the fit to so many of them."""
    texts = [canary.text(symbols) for symbols in canary.candidates(most, seed)]
    log_p_R = likelihoods(model, tokenizer, texts)
    exact = canary.size <= most
    return Exposure(
        exact_exposure(log_p_R) if exact else skew_normal_exposure(log_p_R), rank_of(log_p_R), len(texts), exact
    )


COLUMNS = [
    Column("exposure", "exposure", ".2f", "lower", "mean over the canaries, bits; 1.44 is chance"),
    Column("worst", "worst", ".2f", "lower", "of the most exposed canary, bits"),
    Column("first", "given away", ",d", "lower", "canaries that no other candidate is likelier than"),
    Column("perplexity", "perplexity", ".2f", "lower", "on held-out text"),
]


def exposure_audit(
    name: str,
    models: Callable[[], Mapping[str, nn.Module]],
    tokenizer: PreTrainedTokenizerBase,
    canaries: Sequence[Canary],
    *,
    most: int = 10_000,
    perplexity: Mapping[str, float] | None = None,
) -> Audit:
    """A stage that ranks all canaries under all models; ``perplexity`` by model is shown beside.

    ``models`` is asked when the stage runs.
    """

    def audit(context: Context) -> tuple[Table, dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        details: dict[str, list[dict[str, Any]]] = {}
        for model_name, model in models().items():
            found = [expose(model, tokenizer, canary, most=most, seed=context.seed) for canary in canaries]
            bits = [one.bits for one in found]
            row: dict[str, Any] = {"name": model_name, "exposure": sum(bits) / len(bits), "worst": max(bits)}
            row["first"] = sum(one.rank <= 1 for one in found)
            if perplexity and model_name in perplexity:
                row["perplexity"] = perplexity[model_name]
            rows.append(row)
            details[model_name] = [vars(one) for one in found]
            context.results |= {f"{model_name}/{key}": float(value) for key, value in row.items() if key != "name"}
        size = max(canary.size for canary in canaries)
        note = (
            f"{len(canaries)} canaries of up to {size:,} candidates ({math.log2(size):.2f} bits at most). No guarantee."
        )
        shown = [column for column in COLUMNS if any(column.key in row for row in rows)]
        return Table("Exposure of the canaries", shown, rows, [note]), {"exposure.json": details}

    return Audit(name, audit)
