"""What all clients of OpenAI-compatible endpoints share: side by side, tried again, and ended with one line.

A request is tried again when the endpoint is busy or the line is cut. What cannot get better by waiting (a dead
endpoint, a refused key, an unknown model) ends the job at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import itertools
import math
import os
import queue
import random
import re
import threading
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from stillhouse.base.errors import ConfigError, Interrupted, one_line, suggest

Reply = TypeVar("Reply", bound=BaseModel)


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


class Refused(Exception):
    """A request that failed; ``again``: it may go better later, ``after`` so many seconds if the server said so."""

    def __init__(self, message: str, *, again: bool = False, after: float | None = None, dead: bool = False) -> None:
        super().__init__(message)
        self.again, self.after, self.dead = again, after, dead


@dataclass
class Client:
    """A line to one endpoint, open inside ``async with client.open()``.

    Args:
        key: sent as a bearer token; ``key_name`` is where the user has put it.
        timeout: seconds a request may take as a whole.
        takes: what is asked of the model there, in words.
        ending: makes the error with which a job ends that cannot go on, from the reason.
        so_far: what a user is told whose job was stopped by a long ``Retry-After``.
        answered: good answers so far. Before the first one an endpoint that cannot be reached ends the job at once;
            later it may be restarting.
    """

    url: str
    model: str
    key: str | None
    retry: Retry
    timeout: float
    ending: Callable[[str], Exception]
    so_far: Callable[[], str]
    key_name: str = "OPENAI_API_KEY"
    takes: str = "chats"
    answered: int = 0
    _resting_until: float = 0.0

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Keep connections open until the block ends."""
        import openai

        self._openai = openai
        async with openai.AsyncOpenAI(
            api_key=self.key or "none", base_url=self.url, max_retries=0, timeout=self.timeout
        ) as self._line:
            yield

    async def reply(
        self,
        send: Callable[[Any], Awaitable[Any]],
        form: type[Reply],
        *,
        adapts: Callable[[Any], bool] = lambda error: False,
    ) -> Reply:
        """What the endpoint replies, read as ``form``.

        Args:
            send: makes one request of an ``openai.AsyncOpenAI``, through ``with_raw_response``.
            adapts: told of an error status; True if ``send`` will do without what was refused.

        Raises:
            Refused: it failed for good, but others may not.
            Exception: what ``ending`` makes, or `Interrupted`: the whole job is over.
        """
        for attempt in itertools.count(1):
            try:
                return await self._attempt(send, form, adapts)
            except Refused as refused:
                if refused.again and attempt < self.retry.attempts:
                    await self._rest(attempt - 1, refused.after)
                    continue
                message = f"{refused}" + (f" ({attempt} tries)" if attempt > 1 else "")
                raise self.ending(message) if refused.dead else Refused(message) from None
        raise AssertionError("unreachable")

    async def _attempt(
        self, send: Callable[[Any], Awaitable[Any]], form: type[Reply], adapts: Callable[[Any], bool]
    ) -> Reply:
        while (wait := self._resting_until - time.monotonic()) > 0:
            await asyncio.sleep(wait)
        while True:
            try:
                async with asyncio.timeout(self.timeout):
                    raw = await send(self._line)
                return form.model_validate_json(raw.content)
            except ValidationError as error:
                first = error.errors()[0]
                where = ".".join(map(str, first["loc"])) or "JSON"
                said = self.clean(raw.content[:80].decode(errors="replace"))
                raise Refused(f"the reply is no completion ({where}: {first['msg']}): {said}", again=True) from None
            except (TimeoutError, self._openai.APITimeoutError) as error:
                raise self._cut(error, f"no whole reply within {self.timeout:g} s") from None
            except self._openai.APIConnectionError as error:
                reason = self.clean(one_line(error.__cause__ or error))
                raise self._cut(error, f"the connection was cut ({reason})") from None
            except self._openai.APIStatusError as error:
                if not adapts(error):
                    raise await self._judged(error) from None

    async def _judged(self, error: Any) -> Exception:
        """What a reply with an error status means."""
        status, said = error.status_code, self.said(error)
        if status == 401:
            known = f"refuses the key in {self.key_name}" if self.key else f"wants a key: set {self.key_name}"
            return self.ending(f"the endpoint {known} ({said})")
        if status == 404 or error.code == "model_not_found":
            return self.ending(f"not found (404): {await self._what_is_there()}")
        if error.code == "insufficient_quota":
            return self.ending(f"the account has no credit left ({said})")
        if status in (408, 409, 425, 429) or status >= 500:
            after = retry_after(error.response.headers)
            if after is not None and after > self.retry.patience:
                message = f"the endpoint asks to come back in {after:,.0f} s ({status})"
                return Interrupted(f"{message}; {self.so_far()}")
            return Refused(f"status {status}: {said}", again=True, after=after)
        return Refused(f"status {status}: {said}")

    async def _what_is_there(self) -> str:
        try:
            async with asyncio.timeout(min(10.0, self.timeout)):
                models = [model.id for model in (await self._line.models.list()).data]
        except Exception:
            return f"is the URL right (most end in /v1), and is there a model {self.model!r}?"
        if self.model in models:
            return f"the model is listed, but does not take {self.takes}; use one that does"
        return f"the endpoint does not know the model {self.model!r}{suggest(self.model, models)}"

    def _cut(self, error: BaseException, message: str) -> Exception:
        """What a try without a reply means. If nobody listens, and nobody did before, waiting will not help."""
        if type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout"):
            return Refused(message, again=True)
        message = f"cannot connect ({self.clean(one_line(error.__cause__ or error))}); is the server running?"
        return Refused(message, again=True, dead=True) if self.answered else self.ending(message)

    async def _rest(self, attempt: int, asked: float | None) -> None:
        wait = self.retry.wait(attempt, asked)
        if asked is not None:  # the server means everybody
            self._resting_until = max(self._resting_until, time.monotonic() + asked)
        await asyncio.sleep(wait)

    # -- words

    def said(self, error: Any) -> str:
        """What the server itself said of an error status."""
        said = error.message.removeprefix(f"Error code: {error.status_code}").removeprefix(" - ")
        return self.clean(said or error.response.text or "no more was said")

    def clean(self, text: object) -> str:
        """Short, on one line, and without the key, which some servers repeat."""
        line = " ".join(str(text).split())
        return (line.replace(self.key, "***") if self.key else line)[:200]


# -- many at a time -------------------------------------------------------------------------------------------------


def streamed(work: Callable[[Callable[[Any], None]], Coroutine[Any, Any, None]]) -> Iterator[Any]:
    """What ``work(put)`` puts, as it comes in; its exception is raised here, and leaving early cancels it.

    It runs in an event loop of its own, in a thread, so that it does not matter whether the caller runs one (notebooks
    do).
    """
    out: queue.SimpleQueue[tuple[bool, Any]] = queue.SimpleQueue()
    loop = asyncio.new_event_loop()
    task = loop.create_task(work(lambda item: out.put((True, item))))

    def run() -> None:
        ending: BaseException | None = None
        try:
            loop.run_until_complete(task)
        except BaseException as error:
            ending = error
        finally:
            loop.close()
            out.put((False, ending))

    thread = threading.Thread(target=run, name="endpoint", daemon=True)
    thread.start()
    try:
        while True:
            more, item = out.get()
            if more:
                yield item
            elif item is None:
                return
            else:
                raise item
    finally:
        with contextlib.suppress(RuntimeError):  # the loop is closed already
            loop.call_soon_threadsafe(task.cancel)
        thread.join()


async def side_by_side(worker: Callable[[], Coroutine[Any, Any, None]], count: int) -> None:
    """``count`` workers; the first that fails ends them all."""
    workers = [asyncio.create_task(worker()) for _ in range(count)]
    try:
        await asyncio.gather(*workers)
    finally:
        for one in workers:
            one.cancel()
        await asyncio.gather(*workers, return_exceptions=True)


# -- what a user gives ----------------------------------------------------------------------------------------------


def checked_url(url: str) -> str:
    """An endpoint's base, without a slash at its end. Raises `ConfigError` if it is none, or holds a key."""
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


def key_in(variable: str) -> str | None:
    """The key in an environment variable, if there is one. Raises `ConfigError` for what can be no key."""
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", variable):  # perhaps the key itself: it is not repeated
        raise ConfigError("api_key_env is not the name of an environment variable; put the key into one and name it")
    key = os.environ.get(variable, "").strip()
    if not key.isascii() or not key.isprintable():
        raise ConfigError(f"the key in {variable} has characters that no key has; copy it again")
    return key or None


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
