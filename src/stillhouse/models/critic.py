"""A critic: the body of a language model with one number a token.

Shapes: B rows, T tokens, D hidden width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Critic(nn.Module):
    """V(prompt and response so far) after every token: (B, T).

    The head begins at 0, so that the first advantages are the rewards.

    Args:
        model: a causal LM of ``transformers``; its head is not used.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.body = model.base_model
        weight = next(self.body.parameters())
        width = model.config.get_text_config(decoder=True).hidden_size
        self.head = nn.Linear(width, 1, dtype=weight.dtype, device=weight.device)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden_BTD = self.body(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
        return self.head(hidden_BTD).squeeze(-1)
