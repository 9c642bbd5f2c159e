"""Teachers that run in this process: a local causal language model writes the answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from stillhouse.core.run import digest
from stillhouse.teachers.answers import Answer, Request, Sampling, request_keys


class LocalTeacher:
    """A causal language model of ``transformers`` as a teacher that writes.

    Args:
        name: identifies the model in keys.
        model, tokenizer: as `load_causal_lm` gives them. Without a chat template, a request is its messages as plain
            text, a blank line between them, which is what base models want.
        batch_size: requests written at one time.

    A batch is always made of the same requests and has a random state of its own, so what was written before a kill
    and after it is the same.
    """

    def __init__(
        self, name: str, model: nn.Module, tokenizer: Any, *, sampling: Sampling | None = None, batch_size: int = 8
    ) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.sampling = sampling or Sampling()
        self.batch_size = batch_size

    def keyed(self, requests: Sequence[Request]) -> dict[str, Request]:
        """``key -> request``; equal requests fall together."""
        return request_keys(self.name, self.sampling, None, requests)

    def answers(
        self, requests: Mapping[str, Request], *, everything: Mapping[str, Request] | None = None
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        """Write answers to ``requests``, which are what is left of ``everything``."""
        everything = everything or requests
        names = list(everything)
        for start in range(0, len(names), self.batch_size):
            keys = names[start : start + self.batch_size]
            if any(key in requests for key in keys):
                found = self._write([everything[key] for key in keys], seed=digest(keys))
                for key, answer in zip(keys, found, strict=True):
                    if key in requests:
                        yield key, answer.record()

    @torch.no_grad()
    def _write(self, requests: Sequence[Request], *, seed: str) -> list[Answer]:
        texts = [self._prompt(request) for request in requests]
        special = not self.tokenizer.chat_template  # a template writes its own
        sampling, tokenizer = self.sampling, self.tokenizer
        device = next(self.model.parameters()).device
        rows = tokenizer(texts, add_special_tokens=special, padding=True, padding_side="left", return_tensors="pt")
        end = tokenizer.eos_token_id
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else end
        how: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            how = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p or 1.0, "top_k": 0}
        if sampling.stop:
            how |= {"stop_strings": list(sampling.stop), "tokenizer": tokenizer}
        with torch.random.fork_rng():
            torch.manual_seed(int(seed, 16) % 2**63 + (sampling.seed or 0))
            written = self.model.generate(  # type: ignore[operator]
                input_ids=rows["input_ids"].to(device),
                attention_mask=rows["attention_mask"].to(device),
                max_new_tokens=sampling.max_tokens,
                pad_token_id=pad,
                **how,
            )
        answers = []
        for asked, ids in zip(rows["attention_mask"], written[:, rows["input_ids"].shape[1] :].tolist(), strict=True):
            length = ids.index(end) + 1 if end in ids else len(ids)
            answers.append(
                Answer(
                    text=tokenizer.decode(ids[:length], skip_special_tokens=True),
                    finish_reason="stop" if end in ids else "length",
                    prompt_tokens=int(asked.sum()),
                    completion_tokens=length,
                )
            )
        return answers

    def _prompt(self, request: Request) -> str:
        if self.tokenizer.chat_template:
            messages = [dict(message) for message in request.messages]
            return self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        return "\n\n".join(message["content"] for message in request.messages)
