"""Who writes responses: a model in this process, or a server.

Anything with `Sampler`'s one method will do. `LiveSampler` asks the very module that is being trained, so it always
writes with the current weights. `ServerSampler` asks an OpenAI-compatible server (vLLM and others), whose weights are
whatever was loaded there: its responses may be stale.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, TypeVar

import torch
from pydantic import BaseModel, Field
from torch import Tensor, nn

from stillhouse.base.errors import ModelError
from stillhouse.base.sharded import whole
from stillhouse.data.responses import Coder
from stillhouse.teachers.client import Client, Refused, Retry, checked_url, side_by_side, streamed

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Response:
    """One response: its tokens (the end included where it ended by itself), its text, and whether it did so."""

    ids: tuple[int, ...]
    text: str
    finished: bool


class Sampler(Protocol):
    """Writes ``n`` responses to each prompt; the same ``seed`` gives the same ones as far as the writer can."""

    def sample(self, prompts: Sequence[str], *, n: int, seed: int) -> list[list[Response]]: ...


class Writer(Protocol):
    """Goes on from prompts given as tokens: one response to each."""

    def write(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Response]: ...


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
        beams: width of a beam search, which takes the place of sampling.
        top_p: nucleus; 1 leaves the distribution alone, as policy gradients need it.
        batch_rows: responses written at one time.
        autocast: entered around it: the run's precision.
        sharded: wrappers (FSDP2) that must be gathered first.
        teacher, teacher_share: another causal LM of the same vocabulary, and its share of the distribution every token
            is drawn from (MiniLLM's mixed sampling).
        accept: with a teacher, speculative KD's sampling instead: see `TeacherCorrects`.
    """

    model: Any
    coder: Coder
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    batch_rows: int = 256
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    sharded: Sequence[nn.Module] = ()
    teacher: Any = None
    teacher_share: float = 0.0
    accept: int | None = None
    beams: int = 1

    def sample(self, prompts: Sequence[str], *, n: int, seed: int) -> list[list[Response]]:
        rows = [ids for prompt in prompts for ids in [self.coder.prompt(prompt)] * n]
        written = self.write(rows, seed=seed)
        return [written[start : start + n] for start in range(0, len(written), n)]

    def write(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Response]:
        """One response to each prompt, given as tokens."""
        device = next(self.model.parameters()).device
        written: list[Response] = []
        devices = [device] if device.type == "cuda" else []
        with resting(self.model), whole(self.sharded), self.autocast(), torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            for start in range(0, len(prompts), self.batch_rows):
                written += self._write(prompts[start : start + self.batch_rows], device)
        return written

    def _write(self, rows: Sequence[Sequence[int]], device: torch.device) -> list[Response]:
        from transformers import GenerationConfig, LogitsProcessorList

        longest, pad, end = max(map(len, rows)), self.coder.pad, self.coder.end
        ids_BT = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], device=device)
        mask_BT = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=device)
        # Everything a model's own generation_config might bend is set: what is not None here is not taken from it.
        sampling = self.temperature > 0 and self.beams == 1
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": 0} if sampling else {}
        mixing = LogitsProcessorList()
        if self.teacher is not None and self.accept is not None:
            mixing.append(TeacherCorrects(self.teacher, self.accept, mask_BT, self.temperature))
        elif self.teacher is not None:
            mixing.append(TeacherMixture(self.teacher, self.teacher_share, mask_BT, self.temperature))
        config = GenerationConfig(
            max_new_tokens=self.max_new_tokens,
            do_sample=sampling,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            num_beams=self.beams,
            num_return_sequences=1,
            min_new_tokens=0,
            use_cache=True,
            pad_token_id=pad,
            eos_token_id=end,
            **drawn,
        )
        written_BT = self.model.generate(
            input_ids=ids_BT, attention_mask=mask_BT, generation_config=config, logits_processor=mixing
        )
        return [self._response(ids, end) for ids in written_BT[:, longest:].tolist()]

    def _response(self, ids: list[int], end: int) -> Response:
        finished = end in ids
        kept = ids[: ids.index(end) + 1] if finished else ids
        return Response(tuple(kept), self.coder.text(kept), finished)


class TeacherMixture:
    """A logits processor: every token is drawn from (1 - share) student + share teacher (MiniLLM, Gu et al., 2024,
    arXiv 2306.08543, eq. 7), both at ``temperature``. The teacher reads along with a cache of its own.
    """

    def __init__(self, teacher: Any, share: float, mask_BT: Tensor, temperature: float) -> None:
        self.teacher = teacher
        self.share = share
        self.mask_BT = mask_BT
        self.temperature = temperature or 1.0
        self._past: Any = None

    def __call__(self, ids_BT: Tensor, scores_BV: Tensor) -> Tensor:
        new_BT = ids_BT if self._past is None else ids_BT[:, -1:]
        grown = ids_BT.shape[1] - self.mask_BT.shape[1]
        mask_BT = torch.cat([self.mask_BT, self.mask_BT.new_ones(len(ids_BT), grown)], 1)
        position_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)[:, -new_BT.shape[1] :]
        read = self.teacher(
            input_ids=new_BT,
            attention_mask=mask_BT,
            position_ids=position_BT,
            past_key_values=self._past,
            use_cache=True,
            logits_to_keep=1,
        )
        self._past = read.past_key_values
        V = min(scores_BV.shape[-1], read.logits.shape[-1])
        student_BV = (scores_BV[:, :V].float() / self.temperature).softmax(-1)
        teacher_BV = (read.logits[:, -1, :V].float() / self.temperature).softmax(-1)
        mixed_BV = torch.full_like(scores_BV, -torch.inf, dtype=torch.float32)
        # What follows divides by the temperature again.
        mixed_BV[:, :V] = self._mixed(student_BV, teacher_BV).log() * self.temperature
        return mixed_BV

    def _mixed(self, student_BV: Tensor, teacher_BV: Tensor) -> Tensor:
        return torch.lerp(student_BV, teacher_BV, self.share)


class TeacherCorrects(TeacherMixture):
    """A logits processor: the student draws every token, and what is not among the teacher's ``accept`` likeliest the
    teacher draws anew (speculative KD, Xu et al., 2024, arXiv 2410.11325, algorithm 1).

    Put together, a token comes from q on the accepted ones plus (1 - their mass) p, and is drawn from that at once.
    """

    def __init__(self, teacher: Any, accept: int, mask_BT: Tensor, temperature: float) -> None:
        super().__init__(teacher, 0.0, mask_BT, temperature)
        self.accept = accept

    def _mixed(self, student_BV: Tensor, teacher_BV: Tensor) -> Tensor:
        likeliest_BK = teacher_BV.topk(min(self.accept, teacher_BV.shape[-1]), -1).indices
        accepted_BV = torch.zeros_like(student_BV).scatter(-1, likeliest_BK, student_BV.gather(-1, likeliest_BK))
        return accepted_BV + (1 - accepted_BV.sum(-1, keepdim=True)).clamp(min=0) * teacher_BV


class _Text(BaseModel):
    text: str
    finish_reason: str | None = None


class _Completion(BaseModel):
    """What is read of a completion; everything else in it is ignored."""

    choices: list[_Text] = Field(min_length=1)


def _complete(line: Any, *, body: dict[str, Any]) -> Any:
    return line.completions.with_raw_response.create(**body)


@dataclass
class ServerSampler:
    """Samples from an OpenAI-compatible server, ``POST {url}/completions``.

    Prompts go out side by side, and are tried again when the server is busy or the line is cut, as those of
    `EndpointTeacher` are. A server that writes fewer responses than it was asked for is asked for the rest.

    Args:
        url: such as ``http://localhost:8000/v1``.
        model: the name the server knows it by.
        coder: the tokenizer of the model that is trained: texts come back and become its tokens.
        key: sent as a bearer token, if given; ``key_name`` says where the user has put it.
        timeout: seconds for one request.
        concurrency: prompts on their way at one time.
        retry: how often and how long to wait for what may pass.

    Raises:
        ConfigError: an unusable URL.
        ModelError: a prompt got no response, in one line.
        Interrupted: the server asks for a long wait.
    """

    url: str
    model: str
    coder: Coder
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    key: str = ""
    key_name: str = "key="
    timeout: float = 600.0
    concurrency: int = 16
    retry: Retry = field(default_factory=Retry)

    def __post_init__(self) -> None:
        self._client = Client(
            checked_url(self.url),
            self.model,
            self.key or None,
            self.retry,
            self.timeout,
            ending=self._failed,
            so_far=lambda: "run the same again to go on",
            key_name=self.key_name,
            takes="completions",
        )

    def sample(self, prompts: Sequence[str], *, n: int, seed: int) -> list[list[Response]]:
        asked = {index: (prompt, seed + index) for index, prompt in enumerate(prompts)}
        found = dict(self.written(asked, n=n))
        return [found[index] for index in asked]

    def write(self, prompts: Sequence[Sequence[int]], *, seed: int) -> list[Response]:
        """One response to each prompt, given as tokens."""
        found = dict(self._stream({index: (prompt, seed + index) for index, prompt in enumerate(prompts)}, n=1))
        return [found[index][0] for index in range(len(prompts))]

    def written(self, asked: Mapping[Key, tuple[str, int]], *, n: int) -> Iterator[tuple[Key, list[Response]]]:
        """``n`` responses to each of ``asked`` (``key -> (prompt, seed)``), in the order in which they come in."""
        return self._stream({key: (self.coder.prompt(prompt), seed) for key, (prompt, seed) in asked.items()}, n=n)

    def _stream(
        self, asked: Mapping[Key, tuple[Sequence[int], int]], *, n: int
    ) -> Iterator[tuple[Key, list[Response]]]:
        todo = iter([(key, ids, seed) for key, (ids, seed) in asked.items()])

        async def worker(put: Callable[[Any], None]) -> None:
            for key, ids, seed in todo:
                put((key, await self._ask(ids, n, seed)))
                self._client.answered += 1

        async def work(put: Callable[[Any], None]) -> None:
            async with self._client.open():
                await side_by_side(lambda: worker(put), min(self.concurrency, len(asked)))

        for key, texts in streamed(work):
            yield key, [self._response(text) for text in texts]

    async def _ask(self, ids: Sequence[int], n: int, seed: int) -> list[_Text]:
        texts: list[_Text] = []
        while len(texts) < n:
            body: dict[str, Any] = {
                "model": self.model,
                "prompt": list(ids),  # not text: the template is ours
                "n": n - len(texts),
                "seed": (seed + len(texts)) % 2**31,
                "max_tokens": self.max_new_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
            }
            try:
                reply = await self._client.reply(partial(_complete, body=body), _Completion)
            except Refused as refused:
                raise self._failed(str(refused)) from None
            texts += reply.choices
        return texts[:n]

    def _failed(self, reason: str) -> ModelError:
        return ModelError(
            f"{self.url}: no completion from {self.model!r} ({reason}); check that an OpenAI-compatible server runs "
            "there and knows the model"
        )

    def _response(self, choice: _Text) -> Response:
        finished = choice.finish_reason == "stop"
        ids = self.coder.response(choice.text)
        return Response(tuple(ids if finished else ids[:-1]), choice.text, finished)
