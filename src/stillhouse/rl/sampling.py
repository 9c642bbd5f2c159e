"""Who writes responses: a model in this process, or a server.

Anything with `Sampler`'s one method will do. `LiveSampler` asks the very module that is being trained, so it always
writes with the current weights. `ServerSampler` asks an OpenAI-compatible server (vLLM and others), whose weights are
whatever was loaded there: its responses may be stale.
"""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from stillhouse.base.errors import ModelError, one_line
from stillhouse.base.sharded import whole
from stillhouse.data.responses import Coder


@dataclass(frozen=True)
class Response:
    """One response: its tokens (the end included where it ended by itself), its text, and whether it did so."""

    ids: tuple[int, ...]
    text: str
    finished: bool


class Sampler(Protocol):
    """Writes ``n`` responses to each prompt; the same ``seed`` gives the same ones as far as the writer can."""

    def sample(self, prompts: Sequence[str], *, n: int, seed: int) -> list[list[Response]]: ...


@contextmanager
def resting(module: nn.Module) -> Iterator[None]:
    """``module`` in evaluation mode, without gradients; every part of it is put back afterwards."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@dataclass
class LiveSampler:
    """Samples with ``transformers``' ``generate`` from a module of this process, as it is at the moment.

    Args:
        model: a causal LM; it is put into evaluation mode while it writes, and back.
        coder: its tokenizer.
        max_new_tokens: longest response.
        temperature: 0 is greedy.
        top_p: nucleus; 1 leaves the distribution alone, as policy gradients need it.
        batch_rows: responses written at one time.
        autocast: entered around it: the run's precision.
        sharded: wrappers (FSDP2) that must be gathered first.
    """

    model: Any
    coder: Coder
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    batch_rows: int = 256
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    sharded: Sequence[nn.Module] = ()

    def sample(self, prompts: Sequence[str], *, n: int, seed: int) -> list[list[Response]]:
        device = next(self.model.parameters()).device
        rows = [ids for prompt in prompts for ids in [self.coder.prompt(prompt)] * n]
        written: list[Response] = []
        devices = [device] if device.type == "cuda" else []
        with resting(self.model), whole(self.sharded), self.autocast(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for start in range(0, len(rows), self.batch_rows):
                written += self._write(rows[start : start + self.batch_rows], device)
        return [written[start : start + n] for start in range(0, len(written), n)]

    def _write(self, rows: Sequence[list[int]], device: torch.device) -> list[Response]:
        from transformers import GenerationConfig

        longest, pad, end = max(map(len, rows)), self.coder.pad, self.coder.end
        ids_BT = torch.tensor([[pad] * (longest - len(row)) + row for row in rows], device=device)
        mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        # Everything a model's own generation_config might bend is set: what is not None here is not taken from it.
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if self.temperature else {}
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=self.temperature > 0,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            num_beams=1,
            num_return_sequences=1,
            min_new_tokens=0,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=end,
            **drawn,
        )
        written_BT = self.model.generate(input_ids=ids_BT, attention_mask=mask_BT, generation_config=config)
        return [self._response(ids, end) for ids in written_BT[:, longest:].tolist()]

    def _response(self, ids: list[int], end: int) -> Response:
        finished = end in ids
        kept = ids[: ids.index(end) + 1] if finished else ids
        return Response(tuple(kept), self.coder.text(kept), finished)


@dataclass(frozen=True)
class ServerSampler:
    """Samples from an OpenAI-compatible server, ``POST {url}/completions``.

    Args:
        url: such as ``http://localhost:8000/v1``.
        model: the name the server knows it by.
        coder: the tokenizer of the model that is trained: texts come back and become its tokens.
        key: sent as a bearer token, if given.
        timeout: seconds for one request.
    """

    url: str
    model: str
    coder: Coder
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    key: str = ""
    timeout: float = 600.0

    def sample(self, prompts: Sequence[str], *, n: int, seed: int) -> list[list[Response]]:
        return [self._ask(prompt, n, seed + index) for index, prompt in enumerate(prompts)]

    def _ask(self, prompt: str, n: int, seed: int) -> list[Response]:
        asked = {
            "model": self.model,
            "prompt": self.coder.prompt(prompt),  # ids: the template is ours
            "n": n,
            "seed": seed % 2**31,
            "max_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
        }
        headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {self.key}"} if self.key else {})}
        request = urllib.request.Request(
            f"{self.url.rstrip('/')}/completions", json.dumps(asked).encode(), headers, method="POST"
        )
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as answer:
                said = json.load(answer)
            return [self._response(choice) for choice in said["choices"]]
        except (urllib.error.URLError, OSError, ValueError, KeyError, TypeError) as error:
            raise ModelError(
                f"{self.url}: no completion from {self.model!r} ({one_line(error)}); check that an OpenAI-compatible "
                "server runs there and knows the model"
            ) from error

    def _response(self, choice: dict[str, Any]) -> Response:
        finished = choice.get("finish_reason") == "stop"
        ids = self.coder.response(choice["text"])
        return Response(tuple(ids if finished else ids[:-1]), choice["text"], finished)
