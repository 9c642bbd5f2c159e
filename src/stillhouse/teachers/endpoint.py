"""Teachers behind an OpenAI-compatible endpoint: vLLM, ``transformers serve``, llama.cpp, or a hosted one.

`EndpointTeacher.answers` is a batch writer for `Generate`. Requests go out side by side, each is tried again when the
endpoint is busy or the line is cut, every answer is on disk before the next one is waited for, and a budget ends the
job before it is overspent. What cannot get better by waiting (a dead endpoint, a refused key, an unknown model) ends
it at once with one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field

from stillhouse.base.errors import ConfigError, Interrupted, RunError
from stillhouse.base.files import locked
from stillhouse.base.table import Column, Table
from stillhouse.teachers.answers import Answer, AnswerStore, Request, Sampling, request_keys
from stillhouse.teachers.client import Client, Refused, Retry, checked_url, key_in, side_by_side, streamed
from stillhouse.teachers.schema import Schema

FEATURES = {  # what a server may refuse -> words by which its refusal is known
    "logprobs": ("logprobs",),
    "response_format": ("response_format", "json_schema", "guided", "grammar", "structured"),
    "max_tokens": ("max_completion_tokens",),
}


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What a job may use, with what is in its answer store already: tokens, and money at prices per million tokens.

    A request is sent only if the longest answer it can have still fits, so neither is overspent as far as prompts are
    counted right (see ``tokenizer`` of `EndpointTeacher`).
    """

    tokens: int | None = None
    cost: float | None = None
    price_in: float | None = None
    price_out: float | None = None

    def __post_init__(self) -> None:
        if self.cost is not None and (self.price_in is None or self.price_out is None):
            raise ConfigError("a cost budget needs prices: give price_in and price_out, per million tokens")

    def price(self, prompt_tokens: float, completion_tokens: float) -> float | None:
        """What so many tokens cost, if prices are known."""
        if self.price_in is None or self.price_out is None:
            return None
        return (prompt_tokens * self.price_in + completion_tokens * self.price_out) / 1e6

    def allows(self, prompt_tokens: float, completion_tokens: float) -> bool:
        """Whether a job may use so many tokens in all."""
        if self.tokens is not None and prompt_tokens + completion_tokens > self.tokens:
            return False
        return self.cost is None or (self.price(prompt_tokens, completion_tokens) or 0.0) <= self.cost


class EndpointTeacher:
    """A teacher behind an OpenAI-compatible endpoint.

    Args:
        url: the endpoint's base, such as ``http://localhost:8000/v1``.
        model: the model's name there.
        sampling: how it is to answer.
        schema: a JSON schema, or a pydantic model, that answers must fit. It is sent along (``response_format``) where
            the server supports it; answers are checked here in any case.
        re_asks: how often an answer that does not fit is sent back with the reason.
        api_key_env: the environment variable that holds the key; a server without keys needs none.
        concurrency: requests on their way at one time.
        timeout: seconds a request may take as a whole.
        store: the file that keeps answers; without one they live as long as this object's caller keeps them.
        tokenizer: counts prompt tokens exactly: anything with ``apply_chat_template`` or ``encode``.
        say: told about what the user should know (a feature the server lacks, requests that failed for good).

    Raises:
        ConfigError: an unusable URL or key, or a cost budget without prices.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        sampling: Sampling | None = None,
        schema: Mapping[str, Any] | type[BaseModel] | None = None,
        re_asks: int = 2,
        api_key_env: str = "OPENAI_API_KEY",
        concurrency: int = 16,
        timeout: float = 600.0,
        retry: Retry | None = None,
        budget: Budget | None = None,
        store: Path | None = None,
        tokenizer: Any = None,
        say: Callable[[str], None] = lambda message: None,
    ) -> None:
        self.url, self.model = checked_url(url), model
        self.sampling = sampling or Sampling()
        self.schema = Schema(schema) if schema is not None else None
        self.re_asks = re_asks
        self.api_key_env = api_key_env
        self.concurrency = concurrency
        self.timeout = timeout
        self.retry = retry or Retry()
        self.budget = budget or Budget()
        self.store = store
        self.tokenizer = tokenizer
        self.say = say
        key_in(api_key_env)  # an unusable one is found before anything else is done

    def keyed(self, requests: Sequence[Request]) -> dict[str, Request]:
        """``key -> request``; equal requests fall together."""
        return request_keys(self.model, self.sampling, self.schema and self.schema.json, requests)

    def answers(self, requests: Mapping[str, Request]) -> Iterator[tuple[str, dict[str, Any]]]:
        """Answer ``requests``: ``(key, record of an Answer)`` in the order in which they come in; failures come last.

        Raises:
            Interrupted: the budget is used up, or the endpoint asks for a long wait; what was answered is in the store.
            RunError: the endpoint is dead, refuses the key, does not know the model, or fails at everything.
        """
        with self._own_store() as store:
            kept = {key: store.answers[key] for key in requests if key in store.answers} if store else {}
            for key, answer in kept.items():
                yield key, answer.record()
            left = {key: request for key, request in requests.items() if key not in kept}
            if not left:
                return
            session = _Session(self, store, len(kept))
            for key, answer in session.stream(left):
                yield key, answer.record()
            if session.out_of_budget:
                raise Interrupted(session.spent_up(len(requests)))
            if session.failed:
                first = next(iter(session.failed.values())).error
                self.say(f"{len(session.failed)} of {len(requests)} requests failed for good; first: {first}")
            for key, answer in session.failed.items():
                yield key, answer.record()

    @contextlib.contextmanager
    def _own_store(self) -> Iterator[AnswerStore | None]:
        """The answer store, if there is one, which nobody else writes to meanwhile."""
        if self.store is None:
            yield None
            return
        place = self.store

        def refuse() -> None:
            raise RunError(f"{place} is in use by another process; wait for it or choose another store")

        with locked(place.with_name(place.name + ".lock"), refuse):
            yield AnswerStore(place)

    def ask(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer ``requests``, in their order; see `answers`."""
        found = dict(self.answers(self.keyed(requests)))
        return [Answer(**found[key]) for request in requests for key in self.keyed([request])]

    def price(self, requests: Sequence[Request]) -> Table:
        """What answering ``requests`` would take, asking nothing: tokens, and money if prices are known."""
        keyed = self.keyed(requests)
        store = AnswerStore(self.store) if self.store is not None and self.store.exists() else None
        left = [request for key, request in keyed.items() if store is None or key not in store.answers]
        prompts = sum(self.count(request) for request in left)
        rows: list[dict[str, Any]] = []

        def row(name: str, asked: int, prompt: float, completion: float) -> None:
            cost = self.budget.price(prompt, completion)
            used = {"prompt": round(prompt), "completion": round(completion)}
            rows.append({"name": name, "requests": asked, **used, **({} if cost is None else {"cost": cost})})

        if store is not None:
            row("used so far", len(store.answers), store.prompt_tokens, store.completion_tokens)
        if store is not None and store.answers:
            mean = store.completion_tokens / len(store.answers)
            row("still to ask, with answers as long as so far", len(left), prompts, len(left) * mean)
        row("still to ask, at most", len(left), prompts, len(left) * self.sampling.max_tokens)
        columns = [Column("requests", "requests", ",d"), Column("prompt", "prompt tokens", ",d")]
        columns += [Column("completion", "answer tokens", ",d"), Column("cost", "cost", ",.4f")]
        how = "counted with the tokenizer" if self.tokenizer is not None else "estimated (a token for four bytes)"
        notes = [f"Nothing was asked. Prompt tokens are {how}; tries that fail and are repeated come on top."]
        if self.budget.price(0, 0) is None:
            columns.pop()
            notes.append("For the cost, give price_in and price_out, per million tokens.")
        return Table(f"{self.model} at {self.url}", columns, rows, notes)

    def count(self, request: Request) -> int:
        """Tokens of a prompt: counted if there is a tokenizer, else estimated."""
        texts = [str(message["content"]) for message in request.messages]
        if self.tokenizer is None:
            return sum(4 + math.ceil(len(text.encode()) / 4) for text in texts) + 3
        if getattr(self.tokenizer, "chat_template", None):
            ids = self.tokenizer.apply_chat_template(
                [dict(message) for message in request.messages], add_generation_prompt=True, return_dict=False
            )
            return len(ids)
        return sum(4 + len(self.tokenizer.encode(text)) for text in texts) + 3


# -- one sitting ----------------------------------------------------------------------------------------------------


class _Usage(BaseModel):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Token(BaseModel):
    token: str
    logprob: float


class _Place(_Token):
    top_logprobs: list[_Token] = []


class _Logprobs(BaseModel):
    content: list[_Place] | None = None


class _Message(BaseModel):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    logprobs: _Logprobs | None = None


class _Reply(BaseModel):
    """What is read of a chat completion; everything else in it is ignored."""

    choices: list[_Choice] = Field(min_length=1)
    usage: _Usage | None = None


@dataclass
class _Session:
    """One sitting with an endpoint: its client, what it was found not to support, and how things go."""

    teacher: EndpointTeacher
    store: AnswerStore | None
    kept: int
    failing: int = 0  # requests that failed for good since the last answer
    failed: dict[str, Answer] = field(default_factory=dict)
    lacks: set[str] = field(default_factory=set)
    out_of_budget: bool = False

    def __post_init__(self) -> None:
        teacher = self.teacher
        self.client = Client(
            teacher.url,
            teacher.model,
            key_in(teacher.api_key_env),
            teacher.retry,
            teacher.timeout,
            ending=lambda reason: RunError(f"{teacher.url}: {reason}; {self._so_far()}"),
            so_far=self._so_far,
            key_name=teacher.api_key_env,
        )
        self.used = [self.store.prompt_tokens, self.store.completion_tokens] if self.store else [0, 0]
        self.reserved: dict[str, tuple[int, int]] = {}  # for requests on their way
        self.changed = asyncio.Condition()

    def stream(self, left: Mapping[str, Request]) -> Iterator[tuple[str, Answer]]:
        """Answers as they come in."""

        async def work(put: Callable[[Any], None]) -> None:
            todo = iter(left.items())
            async with self.client.open():
                await side_by_side(lambda: self._worker(todo, put), min(self.teacher.concurrency, len(left)))

        return streamed(work)

    async def _worker(self, todo: Iterator[tuple[str, Request]], put: Callable[[Any], None]) -> None:
        for key, request in todo:
            if not await self._room(key, request):
                return
            try:
                answer = await self._answer(request)
            finally:
                del self.reserved[key]
            self.used[0] += answer.prompt_tokens
            self.used[1] += answer.completion_tokens
            if self.store is not None:
                self.store.add(key, answer)
            if answer.error is None:
                self.client.answered, self.failing = self.client.answered + 1, 0
                put((key, answer))
            else:
                self.failed[key] = answer
                self.failing += 1
                if self.failing >= self.teacher.retry.in_a_row:
                    raise self.client.ending(
                        f"{self.failing} requests in a row failed for good; the last: {answer.error}"
                    )
            async with self.changed:
                self.changed.notify_all()

    # -- the budget

    async def _room(self, key: str, request: Request) -> bool:
        """Wait until the budget surely allows one more answer; False if it never will."""
        budget = self.teacher.budget
        limited = budget.tokens is not None or budget.cost is not None
        needs = self._most(request) if limited else (0, 0)
        async with self.changed:
            while not self.out_of_budget:
                held = [self.used[i] + needs[i] + sum(r[i] for r in self.reserved.values()) for i in (0, 1)]
                if not limited or budget.allows(*held):
                    self.reserved[key] = needs
                    return True
                if not self.reserved:
                    self.out_of_budget = True
                    break
                await self.changed.wait()
        return False

    def _most(self, request: Request) -> tuple[int, int]:
        """The most prompt and answer tokens that a request can take, answers that are sent back included."""
        teacher, most = self.teacher, self.teacher.sampling.max_tokens
        prompt = teacher.count(request)
        if teacher.schema is None:
            return prompt, most
        complaint = teacher.count(Request([{"role": "user", "content": teacher.schema.complaint("x" * 200)}]))
        return prompt + teacher.re_asks * (prompt + most + complaint), most * (1 + teacher.re_asks)

    def spent_up(self, total: int) -> str:
        """One line about a budget that ended the job."""
        budget = self.teacher.budget
        cost = budget.price(*self.used)
        limits = [f"{budget.tokens:,} tokens"] if budget.tokens is not None else []
        limits += [f"{budget.cost:g} in money"] if budget.cost is not None else []
        used = f"{sum(self.used):,} tokens" + (f", {cost:.4f} in money" if cost is not None else "")
        return (
            f"the budget of {' and '.join(limits)} does not hold another answer ({used} used); "
            f"{self.kept + self.client.answered} of {total} answers are kept: run the same again with a larger budget "
            "to go on"
        )

    # -- one request

    async def _answer(self, request: Request) -> Answer:
        """Ask until there is an answer that fits, or no hope left."""
        teacher = self.teacher
        messages = [dict(message) for message in request.messages]
        misfits = prompt_tokens = completion_tokens = 0
        estimated = False
        while True:
            try:
                reply = await self._reply(messages)
            except Refused as refused:
                return Answer(prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, error=str(refused))
            choice = reply.choices[0]
            text = choice.message.content or ""
            if reply.usage is None:
                estimated = True
            usage = reply.usage or _Usage(
                prompt_tokens=teacher.count(Request(messages)), completion_tokens=math.ceil(len(text.encode()) / 4)
            )
            prompt_tokens += usage.prompt_tokens
            completion_tokens += usage.completion_tokens
            error = None
            if not text.strip():
                error = f"refused: {choice.message.refusal}" if choice.message.refusal else "an empty answer"
                error = self.client.clean(f"{error} (finish_reason {choice.finish_reason})")
            elif teacher.schema is not None:
                text, problem = teacher.schema.read(text)
                if problem and misfits < teacher.re_asks:
                    misfits += 1
                    messages = [
                        *map(dict, request.messages),
                        {"role": "assistant", "content": text},
                        {"role": "user", "content": teacher.schema.complaint(problem)},
                    ]
                    continue
                error = problem and self.client.clean(f"no valid answer in {misfits + 1} tries: {problem}")
            return Answer(
                text=None if error else text,
                finish_reason=choice.finish_reason,
                reasoning=choice.message.reasoning_content or choice.message.reasoning,
                prompt_tokens=prompt_tokens,
                completion_tokens=completion_tokens,
                estimated=estimated,
                logprobs=_logprobs(choice),
                error=error,
            )

    async def _reply(self, messages: list[dict[str, str]]) -> _Reply:
        """What the endpoint says to ``messages``; what it turns out not to support is left out."""
        before: set[str] = set()

        async def send(line: Any) -> Any:
            before.update(self.lacks)
            return await line.chat.completions.with_raw_response.create(**self._body(messages))

        def adapts(error: Any) -> bool:
            return before != self.lacks or self._does_without(error)

        return await self.client.reply(send, _Reply, adapts=adapts)

    def _body(self, messages: list[dict[str, str]]) -> dict[str, Any]:
        teacher, sampling = self.teacher, self.teacher.sampling
        limit = "max_completion_tokens" if "max_tokens" in self.lacks else "max_tokens"
        body: dict[str, Any] = {"model": teacher.model, "messages": messages, limit: sampling.max_tokens}
        body |= {
            name: value for name in ("temperature", "top_p", "seed") if (value := getattr(sampling, name)) is not None
        }
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.top_logprobs and "logprobs" not in self.lacks:
            body |= {"logprobs": True, "top_logprobs": sampling.top_logprobs}
        if teacher.schema is not None and "response_format" not in self.lacks:
            body["response_format"] = teacher.schema.response_format()
        if sampling.extra:
            body["extra_body"] = dict(sampling.extra)
        return body

    def _does_without(self, error: Any) -> bool:
        """Whether the endpoint refused a field that can be left out; it is left out from then on."""
        if error.status_code not in (400, 422):
            return False
        said = f"{error.param} {error.message} {error.body}".lower()
        sent = {"max_tokens"}
        sent |= {"logprobs"} if self.teacher.sampling.top_logprobs else set()
        sent |= {"response_format"} if self.teacher.schema is not None else set()
        for name in sorted(sent - self.lacks):
            if any(word in said for word in FEATURES[name]):
                self.lacks.add(name)
                if name != "max_tokens":
                    said = self.client.said(error)
                    self.teacher.say(f"the endpoint refuses {name}; going on without ({said})")
                return True
        return False

    # -- words

    def _so_far(self) -> str:
        kept = self.kept + self.client.answered
        return f"{kept} answers are kept; run the same again to go on" if kept else "nothing was answered"


def _logprobs(choice: _Choice) -> list[dict[str, Any]] | None:
    if choice.logprobs is None or choice.logprobs.content is None:
        return None
    return [
        {"token": p.token, "logprob": p.logprob, "top": [t.model_dump() for t in p.top_logprobs]}
        for p in choice.logprobs.content
    ]
