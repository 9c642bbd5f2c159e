"""Prompts with responses as batches: padded at the right, with a mask on what was responded.

Shapes: B rows, T tokens.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from stillhouse.base.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Row = tuple[Sequence[int], Sequence[int]]
"""(ids of the prompt, ids of the response)."""


@dataclass(frozen=True)
class Coder:
    """Prompts and responses to ids and back, with a tokenizer.

    Args:
        tokenizer: of the model that reads and writes.
        chat: write prompts with the tokenizer's chat template, as a user's turn; by default where it has one.
    """

    tokenizer: PreTrainedTokenizerBase
    chat: bool | None = None

    def __post_init__(self) -> None:
        if self.tokenizer.eos_token_id is None:
            raise ModelError("the tokenizer has no end-of-text token, so no response would ever end; set eos_token")
        if self.chat and not self.tokenizer.chat_template:
            raise ModelError("chat=true, but the tokenizer has no chat template; set chat=false")

    @property
    def pad(self) -> int:
        padding = self.tokenizer.pad_token_id
        return int(self.end if padding is None else padding)

    @property
    def end(self) -> int:
        return int(self.tokenizer.eos_token_id)

    def prompt(self, text: str) -> list[int]:
        """The ids of a prompt, up to where the response begins."""
        if self.tokenizer.chat_template if self.chat is None else self.chat:
            turn = [{"role": "user", "content": text}]
            found: Any = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
            return list(found)
        return list(self.tokenizer(text)["input_ids"])

    def response(self, text: str) -> list[int]:
        """The ids of a whole response, its end included."""
        return [*self.tokenizer(text, add_special_tokens=False)["input_ids"], self.end]

    def row(self, prompt: str, response: str) -> Row:
        return self.prompt(prompt), self.response(response)

    def text(self, ids: Sequence[int]) -> str:
        """A response's text."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))

    def batch(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """``input_ids``, ``attention_mask`` and ``loss_mask`` (1 on responses), each (B, T)."""
        return pack_rows(rows, self.pad)

    def pairs(self, pairs: Sequence[tuple[Row, Row]]) -> dict[str, Tensor]:
        """The batch of pairs of a better and a worse row: all better ones first."""
        return self.batch([*(better for better, _ in pairs), *(worse for _, worse in pairs)])


def filled(template: str, **parts: str) -> str:
    """``template`` with each ``{name}`` replaced by the part of that name; nothing else in it is special."""
    return re.sub(r"\{(\w+)\}", lambda found: parts.get(found[1], found[0]), template)


def pack_rows(rows: Sequence[Row], pad: int) -> dict[str, Tensor]:
    """See `Coder.batch`."""
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    ids_BT = torch.full((len(rows), longest), pad)
    masks_2BT = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for row, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        ids_BT[row, :end] = torch.tensor([*prompt, *response])
        masks_2BT[0, row, :end] = 1
        masks_2BT[1, row, len(prompt) : end] = 1
    return {"input_ids": ids_BT, "attention_mask": masks_2BT[0], "loss_mask": masks_2BT[1]}


def response_tokens(batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(at, label, row) of the N response tokens of a batch, row by row.

    ``at`` is a mask (B, T - 1) of the positions that predict them, ``label`` (N) their ids, ``row`` (N) their rows.
    """
    at_BT = batch["loss_mask"][:, 1:].bool()
    return at_BT, batch["input_ids"][:, 1:][at_BT], at_BT.nonzero()[:, 0]
