"""Teachers behind an OpenAI-compatible endpoint: vLLM, ``transformers serve``, llama.cpp, or a hosted one.

`EndpointTeacher.answers` is a batch writer for `Generate`. Requests go out side by side, each is tried again when the
endpoint is busy or the line is cut, every answer is on disk before the next one is waited for, and a budget ends the
job before it is overspent. What cannot get better by waiting (a dead endpoint, a refused key, an unknown model) ends
it at once with one line.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import math
import os
import queue
import random
import re
import threading
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, ValidationError

from stillhouse.base.errors import ConfigError, Interrupted, RunError, StillhouseError, one_line, suggest
from stillhouse.base.files import locked
from stillhouse.base.table import Column, Table
from stillhouse.teachers.answers import Answer, AnswerStore, Request, Sampling, request_keys
from stillhouse.teachers.schema import Schema

FEATURES = {  # what a server may refuse -> words by which its refusal is known
    "logprobs": ("logprobs",),
    "response_format": ("response_format", "json_schema", "guided", "grammar", "structured"),
    "max_tokens": ("max_completion_tokens",),
}


@dataclass(frozen=True, kw_only=True)
class Retry:
    """How often and how long to wait when a request fails for a reason that may pass.

    The n-th wait is drawn between half and all of ``first * 2**n`` seconds, at most ``longest``; a server that says
    ``Retry-After`` is obeyed, and stops the job if it says more than ``patience`` seconds. ``in_a_row`` requests that
    fail for good, one after the other, end the job.
    """

    attempts: int = 6
    first: float = 0.5
    longest: float = 60.0
    patience: float = 300.0
    in_a_row: int = 20

    def wait(self, attempt: int, asked: float | None) -> float:
        """Seconds to wait after ``attempt`` (from 0), if the server asked for ``asked``."""
        backoff = min(self.longest, self.first * 2**attempt) * random.uniform(0.5, 1.0)
        return backoff if asked is None else asked + 0.1 * backoff


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


class _Refused(Exception):
    """An attempt that failed; ``again``: it may go better later, ``after`` so many seconds if the server said so."""

    def __init__(self, message: str, *, again: bool = True, after: float | None = None, dead: bool = False) -> None:
        super().__init__(message)
        self.again, self.after, self.dead = again, after, dead


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
        self.url, self.model = _checked_url(url), model
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
        _key(api_key_env)  # an unusable one is found before anything else is done

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


def _checked_url(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018  raises if it is not a number
    except ValueError:
        parts = urllib.parse.urlsplit("")
    if parts.username or parts.password:
        raise ConfigError("endpoint: no user name or key in the URL (it would be written down); see api_key_env")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"endpoint={url!r} is not the URL of an endpoint; expected something like http://HOST:8000/v1"
        )
    return url.rstrip("/")


def _key(variable: str) -> str | None:
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):  # perhaps the key itself: it is not repeated
        raise ConfigError("api_key_env is not the name of an environment variable; put the key into one and name it")
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"the key in {variable} has characters that no key has; copy it again")
    return key or None


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
    answered: int = 0
    failing: int = 0  # requests that failed for good since the last answer
    failed: dict[str, Answer] = field(default_factory=dict)
    lacks: set[str] = field(default_factory=set)
    out_of_budget: bool = False
    resting_until: float = 0.0

    def __post_init__(self) -> None:
        self.key = _key(self.teacher.api_key_env)
        self.used = [self.store.prompt_tokens, self.store.completion_tokens] if self.store else [0, 0]
        self.reserved: dict[str, tuple[int, int]] = {}  # for requests on their way
        self.changed = asyncio.Condition()

    # -- the bridge: an event loop in a thread, so that it does not matter whether the caller runs one (notebooks do)

    def stream(self, left: Mapping[str, Request]) -> Iterator[tuple[str, Answer]]:
        """Answers as they come in."""
        out: queue.SimpleQueue[Any] = queue.SimpleQueue()
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._work(left, out))

        def work() -> None:
            ending: BaseException | None = None
            try:
                loop.run_until_complete(task)
            except BaseException as error:
                ending = error
            finally:
                loop.close()
                out.put(ending)

        thread = threading.Thread(target=work, name="endpoint", daemon=True)
        thread.start()
        try:
            while isinstance(item := out.get(), tuple):
                yield item
            if item is not None:
                raise item
        finally:
            with contextlib.suppress(RuntimeError):  # the loop is closed already
                loop.call_soon_threadsafe(task.cancel)
            thread.join()

    async def _work(self, left: Mapping[str, Request], out: queue.SimpleQueue[Any]) -> None:
        import openai

        teacher = self.teacher
        self.openai = openai
        todo = iter(left.items())
        client = openai.AsyncOpenAI(
            api_key=self.key or "none", base_url=teacher.url, max_retries=0, timeout=teacher.timeout
        )
        async with client as self.client:
            workers = [asyncio.create_task(self._worker(todo, out)) for _ in range(min(teacher.concurrency, len(left)))]
            try:
                await asyncio.gather(*workers)
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)

    async def _worker(self, todo: Iterator[tuple[str, Request]], out: queue.SimpleQueue[Any]) -> None:
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
                self.answered, self.failing = self.answered + 1, 0
                out.put((key, answer))
            else:
                self.failed[key] = answer
                self.failing += 1
                if self.failing >= self.teacher.retry.in_a_row:
                    raise self._end(f"{self.failing} requests in a row failed for good; the last: {answer.error}")
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
            f"{self.kept + self.answered} of {total} answers are kept: run the same again with a larger budget to go on"
        )

    # -- one request

    async def _answer(self, request: Request) -> Answer:
        """Ask until there is an answer that fits, or no hope left."""
        teacher, retry = self.teacher, self.teacher.retry
        messages = [dict(message) for message in request.messages]
        attempt = misfits = prompt_tokens = completion_tokens = 0
        estimated = False
        while True:
            try:
                reply = await self._attempt(messages)
            except _Refused as refused:
                attempt += 1
                if refused.again and attempt < retry.attempts:
                    await self._rest(attempt - 1, refused.after)
                    continue
                tried = f" ({attempt} tries)" if attempt > 1 else ""
                if refused.dead:
                    raise self._end(f"{refused}{tried}") from None
                return Answer(
                    prompt_tokens=prompt_tokens, completion_tokens=completion_tokens, error=f"{refused}{tried}"
                )
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
                error = self._clean(f"{error} (finish_reason {choice.finish_reason})")
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
                error = problem and self._clean(f"no valid answer in {misfits + 1} tries: {problem}")
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

    async def _attempt(self, messages: list[dict[str, str]]) -> _Reply:
        """One try; raises `_Refused`, or a `StillhouseError` if the whole job is lost."""
        while (wait := self.resting_until - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        while True:
            body = self._body(messages)
            before = set(self.lacks)
            try:
                async with asyncio.timeout(self.teacher.timeout):
                    raw = await self.client.chat.completions.with_raw_response.create(**body)
                return _Reply.model_validate_json(raw.content)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"])) or "JSON"
                said = self._clean(raw.content[:80].decode(errors="replace"))
                raise _Refused(f"the reply is no chat completion ({where}: {first['msg']}): {said}") from None
            except (TimeoutError, self.openai.APITimeoutError) as error:
                raise self._cut(error, f"no whole reply within {self.teacher.timeout:g} s") from None
            except self.openai.APIConnectionError as error:
                reason = self._clean(one_line(error.__cause__ or error))
                raise self._cut(error, f"the connection was cut ({reason})") from None
            except self.openai.APIStatusError as error:
                if before == self.lacks and not self._does_without(error):
                    raise await self._judged(error) from None

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
                    self.teacher.say(f"the endpoint refuses {name}; going on without ({self._said(error)})")
                return True
        return False

    async def _judged(self, error: Any) -> Exception:
        """What a reply with an error status means."""
        status, said = error.status_code, self._said(error)
        teacher = self.teacher
        if status == 401:
            known = (
                f"refuses the key in {teacher.api_key_env}" if self.key else f"wants a key: set {teacher.api_key_env}"
            )
            return self._end(f"the endpoint {known} ({said})")
        if status == 404 or error.code == "model_not_found":
            return self._end(f"not found (404): {await self._what_is_there()}")
        if error.code == "insufficient_quota":
            return self._end(f"the account has no credit left ({said})")
        if status in (408, 409, 425, 429) or status >= 500:
            after = retry_after(error.response.headers)
            if after is not None and after > teacher.retry.patience:
                message = f"the endpoint asks to come back in {after:,.0f} s ({status})"
                return Interrupted(f"{message}; {self._so_far()}")
            return _Refused(f"status {status}: {said}", after=after)
        return _Refused(f"status {status}: {said}", again=False)

    async def _what_is_there(self) -> str:
        teacher = self.teacher
        try:
            async with asyncio.timeout(min(10.0, teacher.timeout)):
                models = [model.id for model in (await self.client.models.list()).data]
        except Exception:
            return f"is the URL right (most end in /v1), and is there a model {teacher.model!r}?"
        if teacher.model in models:
            return "the model is listed, but does not take chats; use one that does"
        return f"the endpoint does not know the model {teacher.model!r}{suggest(teacher.model, models)}"

    def _cut(self, error: BaseException, message: str) -> Exception:
        """What a try without a reply means. If nobody listens, and nobody did before, waiting will not help."""
        if type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout"):
            return _Refused(message)
        message = f"cannot connect ({self._clean(one_line(error.__cause__ or error))}); is the server running?"
        return _Refused(message, dead=True) if self.answered else self._end(message)

    async def _rest(self, attempt: int, asked: float | None) -> None:
        wait = self.teacher.retry.wait(attempt, asked)
        if asked is not None:  # the server means everybody
            self.resting_until = max(self.resting_until, time.monotonic() + asked)
        await asyncio.sleep(wait)

    # -- words

    def _so_far(self) -> str:
        kept = self.kept + self.answered
        return f"{kept} answers are kept; run the same again to go on" if kept else "nothing was answered"

    def _end(self, message: str) -> StillhouseError:
        return RunError(f"{self.teacher.url}: {message}; {self._so_far()}")

    def _said(self, error: Any) -> str:
        """What the server itself said of an error status."""
        said = error.message.removeprefix(f"Error code: {error.status_code}").removeprefix(" - ")
        return self._clean(said or error.response.text or "no more was said")

    def _clean(self, text: object) -> str:
        """Short, on one line, and without the key, which some servers repeat."""
        line = " ".join(str(text).split())
        return (line.replace(self.key, "***") if self.key else line)[:200]


def retry_after(headers: Mapping[str, str], *, now: float | None = None) -> float | None:
    """Seconds a server asks to wait (``Retry-After``, in seconds or as a date, or ``Retry-After-Ms``), if it does."""
    for name, unit in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        value = headers.get(name, "")
        with contextlib.suppress(ValueError):
            seconds = float(value) * unit
            return seconds if math.isfinite(seconds) and seconds >= 0 else None
        with contextlib.suppress(ValueError, TypeError):
            until = email.utils.parsedate_to_datetime(value).timestamp()
            return max(0.0, until - (time.time() if now is None else now))
    return None


def _logprobs(choice: _Choice) -> list[dict[str, Any]] | None:
    if choice.logprobs is None or choice.logprobs.content is None:
        return None
    return [
        {"token": p.token, "logprob": p.logprob, "top": [t.model_dump() for t in p.top_logprobs]}
        for p in choice.logprobs.content
    ]
