"""A teacher's traces: written, verified, and paired, a right one with a wrong one of the same problem."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from annotated_types import Ge
from torch import Tensor

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.base.table import Column
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.schedule import linear
from stillhouse.core.stage import Evaluate, Generate, Stage
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
from stillhouse.tasks.reasoning import DEMO, Corpus, ReasoningSystem, ReasoningTask, pretrain

Pair = tuple[Row, Row]


@dataclass(kw_only=True)
class TraceSystem(ReasoningSystem):
    """Fields of every system that learns from traces which a teacher writes."""

    teacher: Annotated[
        str, "directory or hub id of the model that writes traces, SERVER_URL#MODEL, or 'data': the column 'traces'"
    ] = "data"
    attempts: Annotated[int, "traces sampled from the teacher for each problem, at most", Ge(1)] = 8
    teacher_temperature: Annotated[float, "at which the teacher writes", Ge(0)] = 0.6

    def traces(self, task: ReasoningTask, *, demo: Corpus) -> Generator[Stage, Artifact, Artifact]:
        """`write_traces` by these fields."""
        how: dict[str, Any] = {"attempts": self.attempts, "temperature": self.teacher_temperature}
        return write_traces(task, self.teacher, demo=demo, **how)


def write_traces(
    task: ReasoningTask, teacher: str, *, attempts: int, temperature: float, demo: Corpus
) -> Generator[Stage, Artifact, Artifact]:
    """The stage in which a teacher writes ``attempts`` traces a problem, of which the first right and wrong ones stay.

    ``teacher``: a directory or hub id; ``URL#MODEL`` of an OpenAI-compatible server; ``data`` for the data's own column
    ``traces`` (a list of texts a problem); ``demo`` for a model pre-trained on the corpus ``demo``. A trace that did
    not end by itself counts as neither. The records have ``prompt``, ``answer``, ``right``, ``wrong`` and ``accuracy``.
    """
    sampler: Sampler | None = None
    if teacher == DEMO:
        if task.puzzle is None:
            raise ConfigError("teacher=demo knows the problems of data=demo only; for your own data pass a teacher")
        artifact = yield pretrain("teacher", task.puzzle, task.held_out, demo)
        teacher = str(artifact.path)
    if teacher.startswith(("http://", "https://")):
        url, _, name = teacher.partition("#")
        sampler = ServerSampler(url, name, task.coder, task.system.max_new_tokens, temperature=temperature)
    elif teacher != "data":
        model, tokenizer = load_causal_lm(teacher, trust_remote_code=task.system.trust_remote_code)
        coder = Coder(tokenizer, chat=task.system.chat)
        model.to(task.run.fabric.device)
        sampler = LiveSampler(
            model, coder, task.system.max_new_tokens, temperature=temperature, autocast=task.run.fabric.autocast
        )

    def write(request: tuple[int, Problem]) -> dict[str, Any]:
        number, problem = request
        if sampler is None:
            written = [Response((), text, True) for text in _given(problem)]
        else:
            (written,) = sampler.sample([problem["prompt"]], n=attempts, seed=task.system.seed * 1_000_003 + number)
        said = [(one.text, judged(task.verifier, one.text, problem).correct) for one in written if one.finished]
        right, wrong = (next((text for text, correct in said if correct is wanted), None) for wanted in (True, False))
        return {
            "prompt": problem["prompt"],
            "answer": problem["answer"],
            "right": right,
            "wrong": wrong,
            "accuracy": sum(correct for _, correct in said) / max(1, len(said)),
        }

    requests = {str(number): (number, problem) for number, problem in enumerate(task.train_problems)}
    return (yield Generate("traces", requests, write))


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

    def collate(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """A batch for `PairLoss`: the right ones, then the wrong ones."""
        return self.task.coder.batch([right for right, _ in pairs] + [wrong for _, wrong in pairs])

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
        source = Batches(self.pairs, batch_size, seed=self.task.system.seed, collate=self.collate)
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
            batch: Mapping[str, Any] = self.task.run.fabric.to_device(self.collate(self.pairs[start : start + 8]))
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
