"""A language model behind an interface that leaks logits, as closed ones do: limits, rounding, and a meter.

Shapes: V vocabulary, C calls.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError, RunError

CHUNK = 2**20  # logits of several calls on one prompt that are worked out together


@dataclass
class QueryBudget:
    """Counts calls and prompt tokens; raises `RunError` when a limit is passed."""

    most_calls: int | None = None
    calls: int = 0
    tokens: int = 0

    def spend(self, tokens: int, calls: int = 1) -> None:
        if self.most_calls is not None and self.calls + calls > self.most_calls:
            raise RunError(f"the budget of {self.most_calls:,} queries is spent; ask for fewer answers or raise it")
        self.calls += calls
        self.tokens += tokens * calls

    def allows(self, calls: int) -> bool:
        """Whether so many more calls fit."""
        return self.most_calls is None or self.calls + calls <= self.most_calls


class LogitAPI:
    """Answers with what one may see of the next token's distribution.

    Args:
        model: any causal language model of ``transformers``.
        vocab_size: real tokens.
        shows: "logits" (raw, all), or "log-probs".
        top_k: how many entries an answer shows; None: all.
        allows_bias: whether a request may add to logits before they are ranked.
        decimals: what values are rounded to; None: not at all.
        budget: what is counted, and where it ends.
    """

    def __init__(
        self,
        model: nn.Module,
        vocab_size: int,
        *,
        shows: str = "log-probs",
        top_k: int | None = None,
        allows_bias: bool = True,
        decimals: int | None = None,
        budget: QueryBudget | None = None,
    ) -> None:
        if shows not in ("logits", "log-probs"):
            raise ConfigError(f"shows={shows!r}: must be logits or log-probs")
        self.model = model
        self.vocab_size = vocab_size
        self.shows = shows
        self.top_k = min(top_k or vocab_size, vocab_size)
        self.allows_bias = allows_bias
        self.decimals = decimals
        self.budget = budget or QueryBudget()

    @torch.no_grad()
    def _logits(self, prompt: Sequence[int]) -> Tensor:
        device = next(self.model.parameters()).device
        ids = torch.tensor([list(prompt)], device=device)
        return self.model(input_ids=ids).logits[0, -1, : self.vocab_size].double().cpu()

    def _shown(self, logits_V: Tensor, bias_V: Tensor | None) -> tuple[Tensor, Tensor]:
        z_V = logits_V if bias_V is None else logits_V + bias_V
        shown_V = z_V if self.shows == "logits" else z_V.log_softmax(-1)
        values, tokens = shown_V.topk(self.top_k)
        if self.decimals is not None:
            values = values.round(decimals=self.decimals)
        return tokens, values

    def ask(self, prompt: Sequence[int], *, bias: dict[int, float] | None = None) -> tuple[Tensor, Tensor]:
        """One call: the tokens shown and their values, largest first."""
        if bias and not self.allows_bias:
            raise ConfigError("this interface takes no logit bias")
        self.budget.spend(len(prompt))
        added = torch.zeros(self.vocab_size, dtype=torch.float64)
        for token, value in (bias or {}).items():
            added[token] = value
        return self._shown(self._logits(prompt), added if bias else None)

    def calls_for_all(self) -> int:
        """Calls in which `everything` sees the whole vocabulary."""
        return 1 if self.top_k >= self.vocab_size else -(-(self.vocab_size - 1) // max(1, self.top_k - 1))

    def everything(self, prompt: Sequence[int], *, bias: float = 100.0) -> Tensor:
        """Relative logits of all tokens (V), entry 0 the reference: z_i - z_0, from as many calls as it takes.

        Groups of ``top_k`` - 1 tokens and the reference get the same bias, which brings them into view; differences of
        what is shown are then differences of logits, whatever the bias (the forward is run once: a stand-in for a
        remote model, of which every call counts).
        """
        if self.top_k < self.vocab_size and (not self.allows_bias or self.top_k < 2):
            raise ConfigError("to see all tokens, an answer must show two at least and a request may bias them")
        logits_V = self._logits(prompt)
        self.budget.spend(len(prompt), self.calls_for_all())
        if self.top_k >= self.vocab_size:
            tokens, values = self._shown(logits_V, None)
            whole_V = torch.empty(self.vocab_size, dtype=torch.float64).scatter(0, tokens, values)
            return whole_V if self.shows == "logits" else whole_V - whole_V[0]
        found_V = torch.zeros(self.vocab_size, dtype=torch.float64)
        size = self.top_k - 1
        for group in torch.arange(1, self.vocab_size).split(size * max(1, CHUNK // self.vocab_size)):
            call = torch.arange(len(group)) // size
            z_CV = logits_V.repeat(int(call[-1]) + 1, 1)
            z_CV[call, group] += bias
            z_CV[:, 0] += bias
            tokens, values = self._shown(z_CV, None)
            seen_CV = torch.full_like(z_CV, torch.nan).scatter(-1, tokens, values)
            found_V[group] = seen_CV[call, group] - seen_CV[call, 0]
        if found_V.isnan().any():
            raise RunError("a bias of this size does not bring the tokens into view; use a larger one")
        return found_V

    def seen(self, prompt: Sequence[int]) -> tuple[Tensor, Tensor]:
        """What one call shows, relative to its largest: values (V), and where they are known (V)."""
        tokens, values = self.ask(prompt)
        whole_V = torch.zeros(self.vocab_size, dtype=torch.float64).scatter(0, tokens, values - values[0])
        return whole_V, torch.zeros(self.vocab_size, dtype=torch.bool).scatter(
            0, tokens, torch.ones_like(tokens).bool()
        )
