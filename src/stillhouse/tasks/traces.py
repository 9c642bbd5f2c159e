"""A teacher's traces: written, verified (by a rule, and a judge if wanted), and paired, right with wrong ones."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge
from pydantic import BaseModel, Field
from torch import Tensor

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.base.table import Column
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.schedule import linear
from stillhouse.core.stage import Context, Evaluate, Generate, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.reasoning import Problem
from stillhouse.data.responses import Coder, Row, response_tokens
from stillhouse.data.sources import Batches
from stillhouse.data.verifiers import judged
from stillhouse.metrics.reasoning import collapsed
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.objectives.language import TokenCrossEntropy, head_of
from stillhouse.objectives.responses import PairLoss, Pairs, response_logprobs
from stillhouse.rl.sampling import LiveSampler, Response, Sampler, ServerSampler, resting
from stillhouse.tasks.black_box import Examiner
from stillhouse.tasks.reasoning import DEMO, Corpus, ReasoningSystem, ReasoningTask, pretrain
from stillhouse.teachers.answers import Request, Sampling
from stillhouse.teachers.client import key_in

DATA = "data"
Pair = tuple[Row, Row]


@dataclass(kw_only=True)
class TraceSystem(ReasoningSystem):
    """Fields of every system that learns from traces which a teacher writes."""

    teacher: Annotated[
        str, "directory or hub id of the model that writes traces, SERVER_URL#MODEL, or 'data': the column 'traces'"
    ] = DATA
    attempts: Annotated[int, "traces sampled from the teacher for each problem, at most", Ge(1)] = 8
    teacher_temperature: Annotated[float, "at which the teacher writes", Ge(0)] = 0.6
    judge: Annotated[
        str | None,
        "model that must find a trace right too, not the verifier alone: its name at judge_endpoint, or directory or "
        "hub id; 'data': the column 'judged' (the paper: a Llama)",
    ] = None
    judge_endpoint: Annotated[str | None, "URL of an OpenAI-compatible endpoint, where the judge is"] = None
    api_key_env: Annotated[
        str, "environment variable that holds the servers' key", Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
    ] = "OPENAI_API_KEY"
    concurrency: Annotated[int, "requests on their way to a server at one time", Ge(1)] = 16

    def traces(self, task: ReasoningTask, *, demo: Corpus) -> Generator[Stage, Artifact, Artifact]:
        """`write_traces` by these fields."""
        how: dict[str, Any] = {"attempts": self.attempts, "temperature": self.teacher_temperature}
        own = self.__dict__  # how servers are asked changes no answer: no stage is redone for it
        line = {"api_key_env": own["api_key_env"], "concurrency": own["concurrency"]}
        if own["judge"] is None and own["judge_endpoint"] is not None:
            raise ConfigError("judge_endpoint needs judge=MODEL, the model's name there")
        if own["judge"] == DATA and self.teacher != DATA:
            raise ConfigError("judge=data reads verdicts on the data's own traces; set teacher=data, or name a judge")

        def judge() -> Examiner | None:
            if self.judge in (None, DATA):  # read here, so that another judge does not have traces written anew
                return None
            return Examiner(
                run=task.run,
                model=str(self.judge),
                endpoint=own["judge_endpoint"],
                form=Verdict,
                sampling=Sampling(max_tokens=256),
                store="verdicts.jsonl",
                trust_remote_code=self.trust_remote_code,
                **line,
            )

        return write_traces(task, self.teacher, demo=demo, judge=judge if own["judge"] else None, line=line, **how)


class Verdict(BaseModel):
    """A judge's verdict on one trace."""

    correct: bool = Field(description="whether the answer that the solution arrives at is the reference answer")


def judge_prompt(prompt: str, answer: str, trace: str) -> str:
    """What a judge is asked about a trace."""
    return (
        "Below are a problem, its reference answer, and a solution that somebody wrote. Does the solution arrive at "
        "the reference answer? Another way of writing the same answer counts as the same; an answer that is missing, "
        'unclear, or given beside others does not. Answer with JSON: {"correct": true} or {"correct": false}.\n\n'
        f"Problem:\n{prompt}\n\nReference answer:\n{answer}\n\nSolution:\n{trace}"
    )


def write_traces(
    task: ReasoningTask,
    teacher: str,
    *,
    attempts: int,
    temperature: float,
    demo: Corpus,
    judge: Callable[[], Examiner | None] | None = None,
    line: Mapping[str, Any] | None = None,
) -> Generator[Stage, Artifact, Artifact]:
    """The stage in which a teacher writes ``attempts`` traces a problem, of which the first right and wrong ones stay.

    ``teacher``: a directory or hub id; ``URL#MODEL`` of an OpenAI-compatible server; ``data`` for the data's own column
    ``traces`` (a list of texts a problem); ``demo`` for a model pre-trained on the corpus ``demo``. A trace that did
    not end by itself counts as neither. The records have ``prompt``, ``answer``, ``right``, ``wrong`` and ``accuracy``.

    With a ``judge`` (it makes the examiner, or None for the column ``judged``, a bool a trace) a trace is right if the
    verifier and the judge say so, and wrong if either does not; one that the judge gave no verdict on counts as
    neither. Only what the verifier finds right is shown to the judge. ``line``: ``api_key_env`` and ``concurrency`` of
    a server.
    """
    sampler: Sampler | None = None
    if teacher == DEMO:
        if task.puzzle is None:
            raise ConfigError("teacher=demo knows the problems of data=demo only; for your own data pass a teacher")
        artifact = yield pretrain("teacher", task.puzzle, task.held_out, demo)
        teacher = str(artifact.path)
    if teacher.startswith(("http://", "https://")):
        url, _, name = teacher.partition("#")
        how = dict(line or {})
        variable = how.pop("api_key_env", "OPENAI_API_KEY")
        server = {"temperature": temperature, "key": key_in(variable) or "", "key_name": variable, **how}
        sampler = ServerSampler(url, name, task.coder, task.system.max_new_tokens, **server)
    elif teacher != DATA:
        model, tokenizer = load_causal_lm(teacher, trust_remote_code=task.system.trust_remote_code)
        coder = Coder(tokenizer, chat=task.system.chat)
        model.to(task.run.fabric.device)
        sampler = LiveSampler(
            model, coder, task.system.max_new_tokens, temperature=temperature, autocast=task.run.fabric.autocast
        )

    def seed(number: int) -> int:
        return task.system.seed * 1_000_003 + number

    def record(problem: Problem, written: Sequence[Response]) -> dict[str, Any]:
        said = Said(problem["prompt"], problem["answer"])
        for text in (one.text for one in written if one.finished):
            said.texts.append(text)
            said.correct.append(judged(task.verifier, text, problem).correct)
            said.judged.append(None)
        return said.sorted() if judge is None else vars(said)

    def write(request: tuple[int, Problem]) -> dict[str, Any]:
        number, problem = request
        if sampler is None:
            return record(problem, [Response((), text, True) for text in _given(problem)])
        return record(problem, sampler.sample([problem["prompt"]], n=attempts, seed=seed(number))[0])

    def write_together(left: Mapping[str, tuple[int, Problem]]) -> Iterator[tuple[str, dict[str, Any]]]:
        assert isinstance(sampler, ServerSampler)
        asked = {key: (problem["prompt"], seed(number)) for key, (number, problem) in left.items()}
        for key, written in sampler.written(asked, n=attempts):
            yield key, record(left[key][1], written)

    requests = {str(number): (number, problem) for number, problem in enumerate(task.train_problems)}
    name, together = "traces" if judge is None else "attempts", isinstance(sampler, ServerSampler)
    stage: Callable[[Any], Any] = write_together if together else write
    made = yield Generate(name, requests, stage, together=together)
    return made if judge is None else (yield from _judge(task, made, judge()))


@dataclass
class Said:
    """The traces of one problem that ended by themselves; what the verifier and the judge say of each."""

    prompt: str
    answer: str
    texts: list[str] = field(default_factory=list)
    correct: list[bool] = field(default_factory=list)
    judged: list[bool | None] = field(default_factory=list)

    def sorted(self, *, dual: bool = False) -> dict[str, Any]:
        """The first right and the first wrong trace; ``dual``: right is what both find right."""
        labels = [both(*pair) for pair in zip(self.correct, self.judged, strict=True)] if dual else self.correct
        said = [(text, label) for text, label in zip(self.texts, labels, strict=True) if label is not None]
        right, wrong = (next((text for text, label in said if label is wanted), None) for wanted in (True, False))
        return {
            "prompt": self.prompt,
            "answer": self.answer,
            "right": right,
            "wrong": wrong,
            "accuracy": sum(label for _, label in said) / max(1, len(said)),
        }


def both(correct: bool, judged: bool | None) -> bool | None:
    """The label of a trace that a verifier and a judge have looked at; None: without a verdict it has none."""
    return judged if correct else False


def _judge(task: ReasoningTask, made: Artifact, judge: Examiner | None) -> Generator[Stage, Artifact, Artifact]:
    """The stages in which traces are judged, and sorted by what the verifier and the judge (None: the data) say."""
    import datasets
    import pyarrow.parquet as pq

    rows = pq.read_table(made.data_file()).to_pylist()
    said = {row.pop("key"): Said(**row) for row in rows}
    if judge is None:
        for key, one in said.items():
            one.judged = [_judged(task.train_problems[int(key)], place) for place in range(len(one.texts))]
    else:
        asked = [
            (one, place, Request.of(judge_prompt(one.prompt, one.answer, text)))
            for one in said.values()
            for place, (text, correct) in enumerate(zip(one.texts, one.correct, strict=True))
            if correct
        ]
        requests = [request for *_, request in asked]
        found = judge.read((yield judge.stage("verdicts", requests)))
        for (one, place, _), key in zip(asked, judge.keys(requests), strict=True):
            one.judged[place] = found[key]["correct"] if key in found else None

    def sort(context: Context) -> Any:
        verdicts = [v for one in said.values() for c, v in zip(one.correct, one.judged, strict=True) if c]
        context.results = {
            "judged": len(verdicts) - verdicts.count(None),
            "overruled": verdicts.count(False),
            "unjudged": verdicts.count(None),
        }
        return datasets.Dataset.from_list([{"key": key, **one.sorted(dual=True)} for key, one in said.items()])

    return (yield Transform("traces", sort))


def _judged(problem: Problem, place: int) -> bool:
    given = problem.get("judged")
    if not isinstance(given, list) or len(given) <= place or not isinstance(given[place], bool):
        raise DataError(
            f"judge=data, but the problem {problem['prompt']!r:.60} has no bool for each of its traces in its column "
            "'judged'; add it, or name a judge"
        )
    return given[place]


def _given(problem: Problem) -> list[str]:
    given = problem.get("traces")
    if not isinstance(given, list) or not all(isinstance(text, str) for text in given):
        raise DataError(
            f"teacher=data, but the problem {problem['prompt']!r:.60} has no list of texts in its column 'traces'; add "
            "it, or name a teacher that writes them"
        )
    return given


@dataclass
class TracePairs:
    """Right traces as rows, and pairs of a right and a wrong one."""

    task: ReasoningTask
    right: list[Row]
    pairs: list[Pair]

    @staticmethod
    def read(task: ReasoningTask, traces: Artifact, *, max_prompt: int, max_response: int) -> TracePairs:
        """From what `write_traces` left; longer pairs are dropped. Raises `DataError` if none is left."""
        import pyarrow.parquet as pq

        records = pq.read_table(traces.data_file()).to_pylist()
        right, pairs = [], []
        for record in records:
            if record["right"] is None:
                continue
            better = task.coder.row(record["prompt"], record["right"])
            right.append(better)
            if record["wrong"] is not None:
                worse = task.coder.row(record["prompt"], record["wrong"])
                if len(better[0]) <= max_prompt and max(len(better[1]), len(worse[1])) <= max_response:
                    pairs.append((better, worse))
        if not pairs:
            wrong = sum(record["wrong"] is not None for record in records)
            raise DataError(
                f"no problem has both a right and a wrong trace ({len(right)} of {len(records)} have a right one, "
                f"{wrong} a wrong one); allow more attempts, other problems, or longer prompts and responses"
            )
        return TracePairs(task, right, pairs)

    def fine_tune(self, name: str, *, epochs: float, batch_size: int, lr: float) -> Train:
        """The stage that trains the base model on the right traces; the learning rate falls to 0."""
        student = self._student(name, self.task.base)
        source = Batches(self.right, batch_size, seed=self.task.system.seed, collate=self.task.coder.batch)
        return self._train(student, TokenCrossEntropy(head_of(student)), source, epochs, lr=lr)

    def refine(
        self,
        name: str,
        start: Artifact,
        term: str,
        loss: Callable[[Pairs], Tensor],
        *,
        reference: bool,
        epochs: float,
        batch_size: int,
    ) -> Train:
        """The stage that trains ``start`` on the pairs; the learning rate falls to 0.

        Args:
            term: what the loss is called where it is logged.
            reference: whether the loss reads what ``start`` itself, frozen, makes of the pairs.
        """
        student = self._student(name, start)
        frozen = Observed(self.task.load(start), frozen=True, name="reference") if reference else None
        objective = PairLoss(head_of(student), loss, reference=head_of(frozen) if frozen else None, name=term)
        source = Batches(self.pairs, batch_size, seed=self.task.system.seed, collate=self.task.coder.pairs)
        return self._train(student, objective, source, epochs)

    def _student(self, name: str, start: str | Artifact) -> Observed:
        return Observed(self.task.load(start), name=name, options={"use_cache": False})

    def _train(
        self, student: Observed, objective: Objective, source: Batches, epochs: float, *, lr: float | None = None
    ) -> Train:
        steps, schedule = max(1, round(epochs * len(source))), linear(1.0, 0.0, warmup=self.task.system.warmup)
        return self.task.train(student.name, student, objective, source=source, steps=steps, lr=lr, schedule=schedule)

    def evaluation(self, models: Mapping[str, str | Artifact]) -> Evaluate:
        """Held-out problems, and how likely each model finds the right and the wrong traces."""
        return self.task.evaluation(models, more=partial(self.logprobs, most=200), columns=COLUMNS)

    def logprobs(self, model: Any, *, most: int) -> dict[str, float]:
        """Mean log-probability per token of the right and the wrong traces (of the first ``most`` pairs)."""
        head, sums = head_of(Observed(model, options={"use_cache": False})), torch.zeros(2, 2)
        for start in range(0, min(most, len(self.pairs)), 8):
            pairs = self.task.coder.pairs(self.pairs[start : start + 8])
            batch: Mapping[str, Any] = self.task.run.fabric.to_device(pairs)
            with resting(model), self.task.run.fabric.autocast():
                logp_N = response_logprobs(head, batch).cpu()
            row_N = response_tokens(batch)[2].cpu()
            wrong_N = (row_N >= len(batch["input_ids"]) // 2).long()
            sums[0].index_add_(0, wrong_N, logp_N)
            sums[1].index_add_(0, wrong_N, torch.ones_like(logp_N))
        chosen, rejected = (sums[0] / sums[1]).tolist()
        return {"chosen_logp": chosen, "rejected_logp": rejected}


def fell(evaluated: Artifact, *, before: str, after: str) -> bool:
    """Whether the training between two evaluated models took right traces down with wrong ones, and accuracy too."""
    figures = ("chosen_logp", "rejected_logp", "accuracy")
    chosen, rejected, accuracy = (
        (evaluated.metrics[f"{before}/{key}"], evaluated.metrics[f"{after}/{key}"]) for key in figures
    )
    return collapsed(chosen, rejected, accuracy)


COLUMNS = [
    Column("chosen_logp", "right traces", ".2f", "", "mean log-probability per token of the right traces"),
    Column("rejected_logp", "wrong traces", ".2f", "", "the same of the wrong traces"),
]
