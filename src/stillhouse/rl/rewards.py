"""Rewards of responses: rules on top of a verifier, and reward models."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from stillhouse.base.errors import ModelError
from stillhouse.data.verifiers import Judgement, Record, Verifier, judged


@dataclass(frozen=True)
class Unclosed:
    """A verifier that does not read ``closing`` at the end of a response."""

    verifier: Verifier
    closing: str

    def __call__(self, text: str, record: Record) -> Judgement:
        return judged(self.verifier, text.strip().removesuffix(self.closing), record)


@dataclass(frozen=True)
class ShapedReward:
    """The verifier's reward, less ``per_token`` for every token beyond ``free``, and ``bonus`` for a closed response.

    Args:
        tokens: how many tokens a text has.
        closing: what a closed response ends with.
    """

    verifier: Verifier
    tokens: Callable[[str], int]
    free: int = 0
    per_token: float = 0.0
    closing: str = ""
    bonus: float = 0.0

    def __call__(self, text: str, record: Record) -> float:
        said = judged(self.verifier, text, record).reward
        closed = bool(self.closing) and text.strip().endswith(self.closing)
        return said - self.per_token * max(0, self.tokens(text) - self.free) + self.bonus * closed


class RewardModel:
    """The score of a sequence classifier with one output: directory or hub id (safetensors).

    The conversation is written with its own tokenizer's chat template, or as prompt and response joined by a line.
    """

    def __init__(self, name: str, *, device: Any = "cpu", trust_remote_code: bool = False) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from stillhouse.models.errors import clear_errors

        with clear_errors(name):
            options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
            model = AutoModelForSequenceClassification.from_pretrained(name, use_safetensors=True, **options)
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, **options)
        if model.config.num_labels != 1:
            raise ModelError(f"{name}: has {model.config.num_labels} outputs; a reward model has one")
        self.model: Any = model.to(device).eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, text: str, record: Record) -> float:
        read = read_as(self.tokenizer, record["prompt"], text, return_tensors="pt")
        return float(self.model(**read.to(self.model.device)).logits.squeeze())


def read_as(tokenizer: Any, prompt: str, text: str, **options: Any) -> Any:
    """What a reward model reads of a prompt and its response: the tokenizer's encoding."""
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": text}]
        return tokenizer.apply_chat_template(turns, return_dict=True, **options)
    return tokenizer(f"{prompt}\n{text}", **options)


@dataclass(frozen=True)
class Added:
    """The sum of several rewards: a verifier's and a reward model's, say."""

    parts: tuple[Verifier, ...]

    def __call__(self, text: str, record: Record) -> float:
        return sum(judged(part, text, record).reward for part in self.parts)
