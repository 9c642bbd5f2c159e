"""What is asked of a teacher that writes, what it answers, and the file in which answers are kept."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillhouse.base.monitor import MetricsFile
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import digest

Message = Mapping[str, str]


@dataclass(frozen=True)
class Request:
    """One thing to ask: a conversation, and which of several samples of its answer is meant."""

    messages: Sequence[Message]
    sample: int = 0

    @staticmethod
    def of(prompt: str, *, system: str | None = None, sample: int = 0) -> Request:
        """A conversation of one user message, after a system message if there is one."""
        before = [{"role": "system", "content": system}] if system else []
        return Request([*before, {"role": "user", "content": prompt}], sample)


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How a teacher is to answer; part of what identifies an answer.

    Args:
        max_tokens: most tokens in an answer.
        temperature: 0 takes the most likely token; None leaves it to the endpoint.
        top_p: nucleus; None leaves it to the endpoint.
        seed: sent along for servers that honour it.
        stop: texts at which an answer ends.
        top_logprobs: how many log-probabilities of alternatives to ask for at each token; 0 asks for none.
        extra: further fields of the request's body, for servers that have some of their own.
    """

    max_tokens: int = 512
    temperature: float | None = 0.0
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0
    extra: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Answer:
    """An answer, or the reason why there is none (``error``).

    ``logprobs``: for each token ``{"token", "logprob", "top": [{"token", "logprob"}, ...]}``, natural logarithms.
    ``reasoning``: what a reasoning model thought before, where the server hands it out. ``estimated``: the server
    counted no tokens, so the counts are estimates. Tokens of replies that were thrown away are in the counts.
    """

    text: str | None = None
    finish_reason: str | None = None
    reasoning: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    estimated: bool = False
    logprobs: list[dict[str, Any]] | None = None
    error: str | None = None

    def record(self) -> dict[str, Any]:
        """The answer as plain JSON values."""
        return asdict(self)


def request_keys(model: str, sampling: Sampling, schema: Any, requests: Iterable[Request]) -> dict[str, Request]:
    """``key -> request``: equal keys mean equal content, so nothing is asked twice; repeated requests fall together.

    The address of the endpoint is left out: a server that moves has the same answers.
    """
    about = {
        name: value for name, value in asdict(sampling).items() if value not in (None, (), 0) or name == "max_tokens"
    }
    if sampling.temperature == 0:
        about["temperature"] = 0
    return {
        digest(model, about, schema, [dict(message) for message in request.messages], request.sample): request
        for request in requests
    }


class AnswerStore:
    """Answers by key in a file of JSON lines, each on disk (fsync) before the next is asked for.

    It outlives changes of configuration: an answer that has been paid for is not asked for again. Failures are noted
    for what they cost, and are asked again.
    """

    def __init__(self, path: Path) -> None:
        self._file = MetricsFile(path)
        self._read = list(self._file.read())
        self._mended = not path.exists()
        answers = [(line["key"], Answer(**line["answer"])) for line in self._read]
        self.answers = {key: answer for key, answer in answers if answer.error is None}
        self.prompt_tokens = sum(answer.prompt_tokens for _, answer in answers)
        self.completion_tokens = sum(answer.completion_tokens for _, answer in answers)

    def add(self, key: str, answer: Answer) -> None:
        """Write one answer; it is on disk when this returns."""
        if not self._mended:  # a killed process may have left half a line
            self._file.rewrite(self._read)
        self._mended, self._read = True, []
        self._file.path.parent.mkdir(parents=True, exist_ok=True)
        self._file.append({"key": key, "answer": answer.record()}, sync=True)
        self.prompt_tokens += answer.prompt_tokens
        self.completion_tokens += answer.completion_tokens
        if answer.error is None:
            self.answers[key] = answer


def read_answers(artifact: Artifact) -> dict[str, Answer]:
    """The answers in the artifact of a `Generate` stage, by key."""
    import pyarrow.parquet as pq

    rows = pq.read_table(artifact.data_file()).to_pylist()
    return {row.pop("key"): Answer(**row) for row in rows}
