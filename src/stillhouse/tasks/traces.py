"""A teacher's traces: written, verified, and paired, a right one with a wrong one of the same problem."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.stage import Generate, Stage
from stillhouse.data.reasoning import Problem
from stillhouse.data.responses import Coder, Row, response_tokens
from stillhouse.data.verifiers import judged
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.objectives.language import head_of
from stillhouse.objectives.responses import response_logprobs
from stillhouse.rl.sampling import LiveSampler, Response, Sampler, ServerSampler, resting
from stillhouse.tasks.reasoning import DEMO, Corpus, ReasoningTask, pretrain

Pair = tuple[Row, Row]


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
