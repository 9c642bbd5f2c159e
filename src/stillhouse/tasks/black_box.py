"""Systems whose teacher writes: behind an endpoint, in this process, or a rule on the embedded task.

`BlackBoxSystem` has the fields that choose the teacher and say how it is asked; `answers` makes the stage. `Examiner`
is a model that fills in a form: a judge, or a grader.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

from annotated_types import Ge, Gt
from pydantic import BaseModel, Field

from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Evaluate, Generate
from stillhouse.core.system import System
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.teachers.answers import Answer, Request, Sampling, request_keys
from stillhouse.teachers.client import Retry
from stillhouse.teachers.endpoint import Budget, EndpointTeacher
from stillhouse.teachers.in_process import LocalTeacher
from stillhouse.teachers.schema import Schema

DEMO = "demo"
STORE = "answers.jsonl"


@dataclass(kw_only=True)
class BlackBoxSystem(System):
    """Fields of every system whose teacher writes text."""

    teacher: Annotated[
        str, "model at the endpoint; without one, directory or hub id of a causal LM; 'demo': a rule that writes"
    ] = DEMO
    endpoint: Annotated[str | None, "URL of an OpenAI-compatible endpoint, such as http://localhost:8000/v1"] = None
    api_key_env: Annotated[
        str, "environment variable that holds the endpoint's key", Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    ] = "OPENAI_API_KEY"
    temperature: Annotated[float, "of the teacher's answers; 0 takes the most likely", Ge(0)] = 0.0
    answer_tokens: Annotated[int, "most tokens in an answer of the teacher", Ge(1)] = 512
    concurrency: Annotated[int, "requests on their way to the endpoint at one time", Ge(1)] = 16
    request_timeout: Annotated[float, "seconds one request may take", Gt(0)] = 600.0
    attempts: Annotated[int, "tries of one request that fails for a reason that may pass", Ge(1)] = 6
    backoff: Annotated[float, "seconds of the first wait between tries; each is twice as long", Ge(0)] = 0.5
    token_budget: Annotated[int | None, "most tokens, prompts and answers, to use at the endpoint", Ge(1)] = None
    cost_budget: Annotated[float | None, "most money to spend at the endpoint; needs the prices", Gt(0)] = None
    price_in: Annotated[float | None, "price of a million prompt tokens", Ge(0)] = None
    price_out: Annotated[float | None, "price of a million answer tokens", Ge(0)] = None
    count_with: Annotated[
        str | None, "directory or hub id of the endpoint model's tokenizer, to count tokens; estimated without"
    ] = None
    dry_run: Annotated[bool, "only say what the teacher's answers would take, and ask nothing"] = False
    trust_remote_code: Annotated[bool, "run code that comes with a model"] = False

    def sampling(self, **options: Any) -> Sampling:
        """How the teacher is to answer."""
        return Sampling(max_tokens=self.answer_tokens, temperature=self.temperature, **options)

    def endpoint_teacher(self, run: Run, sampling: Sampling) -> EndpointTeacher:
        """The teacher behind `endpoint`. Its answers are kept in the run's folder, whatever else is changed."""
        own = self.__dict__  # how it is asked, and for how much, changes no answer: no stage is redone for it
        if own["endpoint"] is None:
            raise ConfigError("there is no endpoint; give endpoint=URL and teacher=MODEL")
        if self.teacher == DEMO:
            raise ConfigError("endpoint needs teacher=MODEL, the model's name there")
        budget = Budget(
            tokens=own["token_budget"],
            cost=own["cost_budget"],
            price_in=own["price_in"],
            price_out=own["price_out"],
        )
        return EndpointTeacher(
            own["endpoint"],
            self.teacher,
            sampling=sampling,
            api_key_env=own["api_key_env"],
            concurrency=own["concurrency"],
            timeout=own["request_timeout"],
            retry=Retry(attempts=own["attempts"], first=own["backoff"]),
            budget=budget,
            store=run.folder / STORE,
            tokenizer=_tokenizer(own["count_with"], own["trust_remote_code"]),
            say=run.say,
        )

    def answers(
        self,
        run: Run,
        name: str,
        requests: Sequence[Request],
        *,
        rule: Callable[[Request], str],
        sampling: Sampling | None = None,
    ) -> tuple[list[str], Generate | Evaluate]:
        """The stage in which the teacher answers, and the key of each request.

        With `dry_run`, the stage only says what it would take; nothing should come after it. ``rule`` answers where the
        teacher is 'demo'.
        """
        sampling = sampling or self.sampling()
        keys = [next(iter(request_keys(self.teacher, sampling, None, [request]))) for request in requests]
        keyed = dict(zip(keys, requests, strict=True))
        if self.__dict__["endpoint"] is not None:
            teacher = self.endpoint_teacher(run, sampling)
            if self.__dict__["dry_run"]:
                return keys, Evaluate("price", lambda _: teacher.price(requests))
            return keys, Generate(name, keyed, teacher.answers, together=True)
        if self.__dict__["dry_run"]:
            raise ConfigError("dry_run prices the requests to an endpoint; there is none")
        if self.teacher == DEMO:
            return keys, Generate(name, keyed, lambda request: Answer(text=rule(request)).record())

        def write(left: Mapping[str, Request]) -> Iterator[tuple[str, dict[str, Any]]]:
            model, tokenizer = load_causal_lm(self.teacher, trust_remote_code=self.trust_remote_code)
            local = LocalTeacher(self.teacher, model.to(run.fabric.device), tokenizer, sampling=sampling)
            yield from local.answers(left, everything=keyed)

        return keys, Generate(name, keyed, write, together=True)


@dataclass(frozen=True, kw_only=True)
class Examiner:
    """A model that answers in a given form.

    Args:
        model: its name at ``endpoint``; without one, directory or hub id of a causal LM, which runs in this process.
        form: what an answer must be; its fields are plain values.
        store: the file that keeps an endpoint's answers, whatever else is changed.
    """

    run: Run
    model: str
    endpoint: str | None
    form: type[BaseModel]
    sampling: Sampling
    store: str
    api_key_env: str = "OPENAI_API_KEY"
    concurrency: int = 16
    trust_remote_code: bool = False

    def keys(self, requests: Sequence[Request]) -> list[str]:
        """The key of each request; equal requests have the same."""
        form = self.form.model_json_schema()
        return [next(iter(request_keys(self.model, self.sampling, form, [request]))) for request in requests]

    def stage(self, name: str, requests: Sequence[Request]) -> Generate:
        """The stage in which it answers; an answer that does not fit the form is dropped."""
        keyed = dict(zip(self.keys(requests), requests, strict=True))
        return Generate(name, keyed, partial(self._write, keyed), together=True)

    @staticmethod
    def read(artifact: Artifact) -> dict[str, dict[str, Any]]:
        """What such a stage left: ``key -> fields``."""
        import pyarrow.parquet as pq

        return {row.pop("key"): row for row in pq.read_table(artifact.data_file()).to_pylist()}

    def _write(
        self, everything: Mapping[str, Request], left: Mapping[str, Request]
    ) -> Iterator[tuple[str, dict[str, Any] | None]]:
        schema = Schema(self.form)
        for key, answer in self._answers(everything, left):
            text, problem = schema.read(answer["text"] or "")
            yield key, None if problem else self.form.model_validate_json(text).model_dump(mode="json")

    def _answers(
        self, everything: Mapping[str, Request], left: Mapping[str, Request]
    ) -> Iterator[tuple[str, dict[str, Any]]]:
        if self.endpoint is not None:
            how: dict[str, Any] = {"api_key_env": self.api_key_env, "concurrency": self.concurrency}
            place = self.run.folder / self.store
            teacher = EndpointTeacher(
                self.endpoint,
                self.model,
                sampling=self.sampling,
                schema=self.form,
                store=place,
                say=self.run.say,
                **how,
            )
            return teacher.answers(left)
        model, tokenizer = load_causal_lm(self.model, trust_remote_code=self.trust_remote_code)
        local = LocalTeacher(self.model, model.to(self.run.fabric.device), tokenizer, sampling=self.sampling)
        return local.answers(left, everything=everything)


def _tokenizer(name: str | None, trust_remote_code: bool) -> Any:
    if name is None:
        return None
    from transformers import AutoTokenizer

    from stillhouse.models.errors import clear_errors

    with clear_errors(name):
        return AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
