"""Self-play: the data's responses, and a model that learns to tell them from what it wrote itself a while ago.

The opponent is the model as an iteration found it. It answers the data's prompts; the player begins as the opponent and
learns to prefer the data's responses. On the embedded task the data's responses are right worked chains, and the base
model has learnt from noisy ones (`stillhouse.tasks.preferences`), so that it is known how good a response is.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar

from annotated_types import Ge, Gt

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.schedule import linear
from stillhouse.core.stage import Generate, Stage
from stillhouse.core.train import Train
from stillhouse.data.reasoning import split_problems
from stillhouse.data.responses import Coder, Row
from stillhouse.data.sources import Batches, steps_in
from stillhouse.data.text import TextData, load_text
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.objectives.language import TokenCrossEntropy, head_of
from stillhouse.objectives.responses import preferring
from stillhouse.tasks.policies import opening
from stillhouse.tasks.preferences import NoisyCorpus, PreferenceTask, response_score, unknown_score
from stillhouse.tasks.reasoning import DEMO, ReasoningSystem, ReasoningTask

Pair = tuple[Row, Row]
"""The data's response and the opponent's, each with the prompt."""


@dataclass(kw_only=True)
class SelfPlaySystem(ReasoningSystem):
    """Fields of a causal language model that plays against what it was."""

    data: Annotated[
        str,
        "good responses: conversations, prompts with completions, or plain text (file, folder, hub id, 'demo'); with a "
        "verifier: problems, whose trace is the response, or else the answer",
    ] = DEMO
    prompt_tokens: Annotated[int, "tokens of plain text that are a prompt; conversations have their own", Ge(1)] = 64
    max_prompt: Annotated[int, "tokens of a prompt; longer ones are left out", Ge(1)] = 512
    max_new_tokens: Annotated[int, "longest response; longer ones of the data are left out", Ge(1)] = 256
    batch_size: Annotated[int, "pairs in a batch, or responses", Ge(1)] = 64
    epochs: Annotated[float, "passes over the pairs in an iteration", Gt(0)] = 2.0
    steps: Annotated[int | None, "steps of an iteration; by default as many as the epochs need", Ge(1)] = None
    carried: Annotated[int, "iterations before whose pairs are trained on again", Ge(0)] = 1
    lr: Annotated[float, "peak learning rate of AdamW in the first two iterations", Gt(0)] = 5e-7
    late_lr: Annotated[float, "in those after them", Gt(0)] = 1e-7
    beta: Annotated[float, "what the log-ratio to the opponent counts, in the first three iterations", Gt(0)] = 0.1
    late_beta: Annotated[float, "in those after them", Gt(0)] = 5.0
    warmup: Annotated[float, "share of an iteration's steps over which the learning rate rises", Ge(0)] = 0.1
    weight_decay: Annotated[float, "decoupled weight decay", Ge(0)] = 0.0
    sft_steps: Annotated[int, "steps of fine-tuning on the data's responses before the first; 0: it is done", Ge(0)] = 0
    sft_lr: Annotated[float, "peak learning rate of fine-tuning", Gt(0)] = 2e-5

    demo: ClassVar[dict[str, Any]] = {
        **ReasoningSystem.demo,
        "problems": 100,
        "pretrain": 500,
        "max_new_tokens": 24,
        "batch_size": 32,
        "sft_steps": 20,
        "sft_lr": 3e-4,
        "steps": 40,
        "lr": 3e-4,  # as for fine-tuning
        "late_lr": 6e-5,
        "eval_problems": 150,
        "eval_samples": 4,
    }
    smoke: ClassVar[dict[str, Any]] = {
        "problems": 40,
        "pretrain": 40,
        "batch_size": 8,
        "sft_steps": 4,
        "steps": 12,
        "eval_problems": 8,
        "eval_samples": 2,
    }


@dataclass(frozen=True)
class Given:
    """A prompt and the data's response to it; ``cut``: the data go on, so that no end is to be learnt."""

    prompt: str
    response: str
    cut: bool = False


def given_responses(data: TextData, coder: Coder, *, prompt_tokens: int, new_tokens: int) -> list[Given]:
    """Prompts with responses: of a conversation the first response, and the turns before it in one; plain text in
    pieces of ``prompt_tokens`` + ``new_tokens`` tokens.

    Raises:
        DataError: there is none.
    """
    rows, found = data.documents, []
    if data.kind == "prompt-completion":
        found = [Given(row["prompt"], row["completion"]) for row in rows]
    elif data.kind == "messages":
        for row in rows:
            if any(turn["role"] == "assistant" for turn in row["messages"][1:]):
                before = opening(row)
                asked = "\n\n".join(turn["content"] for turn in before)
                found.append(Given(asked, row["messages"][len(before)]["content"]))
    else:
        for row in rows:
            ids = coder.tokenizer(row["text"], add_special_tokens=False)["input_ids"]
            for start in range(0, len(ids) - prompt_tokens, prompt_tokens + new_tokens):
                begin, end = start + prompt_tokens, start + prompt_tokens + new_tokens
                found.append(Given(coder.text(ids[start:begin]), coder.text(ids[begin:end]), cut=True))
    if len(found) < 2:
        raise DataError(f"{data.name}: {len(found)} prompts with responses in it; self-play needs at least two")
    return found


@dataclass
class SelfPlayTask(PreferenceTask):
    """The preference task with the data's responses (``given``); nobody says which of two others is better."""

    given: list[Given] = field(default_factory=list)

    @staticmethod
    def begin(system: SelfPlaySystem, run: Run) -> Generator[Stage, Artifact, SelfPlayTask]:
        """Read the data; with ``model=demo`` this yields the stage that pre-trains the model on noisy chains."""
        if system.data == DEMO or system.verifier != "auto":
            corpus = NoisyCorpus(steps=system.pretrain, batch_size=96)
            task = SelfPlayTask(**vars((yield from ReasoningTask.prepare(system, run, corpus))))
            task.score = partial(response_score, task)
            found = [Given(one["prompt"], one.get("trace") or one["answer"]) for one in task.train_problems]
        else:
            task, found = SelfPlayTask.of_text(system, run)
        task.given = [one for one in found if task.fits(system, one)]
        if len(task.given) < 2:
            raise DataError(
                f"{len(task.given)} of {len(found)} responses are short enough; raise max_prompt or max_new_tokens"
            )
        return task

    @staticmethod
    def of_text(system: SelfPlaySystem, run: Run) -> tuple[SelfPlayTask, list[Given]]:
        """The task on the user's text, of which a share is kept back; which one depends on the prompts alone."""
        if system.model == DEMO:
            raise ConfigError("model=demo knows the problems of data=demo only; for your own data pass a model")
        data = load_text(system.data)
        _, tokenizer = load_causal_lm(system.model, trust_remote_code=system.trust_remote_code)
        coder = Coder(tokenizer, chat=False if data.kind == "text" else system.chat)
        lengths = {"prompt_tokens": system.prompt_tokens, "new_tokens": system.max_new_tokens}
        given = given_responses(data, coder, **lengths)
        records = [{"prompt": one.prompt, "answer": one.response, "given": one} for one in given]
        training, kept = split_problems(records, share=system.validation)
        task = SelfPlayTask(system, run, coder, system.model, [], [], unknown_score)
        task.test_problems = [one for one in kept if task.fits(system, one["given"])][: system.eval_problems]
        return task, [one["given"] for one in training][: system.problems]

    def fits(self, system: SelfPlaySystem, one: Given) -> bool:
        """Whether prompt and response are short enough; a response that the data cut was cut to length."""
        prompt, response = self.row_of(one)
        return len(prompt) <= system.max_prompt and (one.cut or len(response) <= system.max_new_tokens + 1)

    def row_of(self, one: Given) -> Row:
        """The tokens of the data's response, after those of its prompt."""
        return self._row(one.prompt, one.response, cut=one.cut)

    # -- stages -----------------------------------------------------------------------------------------------------

    def fine_tune(self, name: str, system: SelfPlaySystem, where: str | Artifact, *, steps: int) -> Train:
        """Supervised fine-tuning of a model on the data's responses."""
        student = self.policy(name, where)
        rows = [self.row_of(one) for one in self.given]
        source = Batches(rows, system.batch_size, seed=system.seed, collate=self.coder.batch)
        objective = TokenCrossEntropy(head_of(student))
        return self._falling(name, system, student, objective, source, steps=steps, lr=system.sft_lr)

    def write(self, name: str, system: SelfPlaySystem, opponent: str | Artifact, *, iteration: int) -> Generate:
        """The opponent answers the data's prompts, once each, at temperature 1."""
        prompts = [one.prompt for one in self.given]
        seed = (system.seed * 1_000_003 + iteration) * 1_000_003 % 2**62

        def write(left: Mapping[str, str]) -> Iterator[tuple[str, dict[str, Any]]]:
            for key, (said,) in self.answers_of(opponent, prompts, left, n=1, seed=seed):
                yield key, {"ids": list(said.ids), "text": said.text}

        return Generate(name, {str(number): prompt for number, prompt in enumerate(prompts)}, write, together=True)

    def pairs_of(self, written: Artifact) -> list[Pair]:
        """The data's responses beside what the opponent wrote, token for token as it wrote it."""
        import pyarrow.parquet as pq

        own = {row["key"]: row["ids"] for row in pq.read_table(written.data_file()).to_pylist()}
        rows = [self.row_of(one) for one in self.given]
        return [((prompt, said), (prompt, own[str(number)])) for number, (prompt, said) in enumerate(rows)]

    def play(
        self,
        name: str,
        system: SelfPlaySystem,
        opponent: str | Artifact,
        pairs: Sequence[Pair],
        *,
        beta: float,
        lr: float,
        steps: int,
    ) -> Train:
        """One iteration: from the opponent, which is the reference too, towards the data and away from its own text."""
        player, reference = self.policy(name, opponent), self.frozen("opponent", opponent)
        source = Batches(pairs, system.batch_size, seed=system.seed, collate=self.coder.pairs)
        objective = preferring(head_of(player), head_of(reference), beta=beta, name="SPIN")
        return self._falling(name, system, player, objective, source, steps=steps, lr=lr)

    def steps_of(self, system: SelfPlaySystem, iteration: int) -> int:
        """Steps of an iteration: its own pairs and those carried over are read ``epochs`` times."""
        pairs = len(self.given) * (min(iteration, system.carried) + 1)
        return system.steps or steps_in(system.epochs, pairs, batch_size=system.batch_size, accumulate=1)

    def _falling(
        self,
        name: str,
        system: SelfPlaySystem,
        student: Observed,
        objective: Objective,
        source: Batches,
        *,
        steps: int,
        lr: float,
    ) -> Train:
        """A stage whose learning rate rises, and falls to 0 along a line."""
        schedule = linear(1.0, 0.0, warmup=system.warmup)
        often = max(1, steps // 3)
        return self.train(
            name, student, objective, source=source, steps=steps, lr=lr, schedule=schedule, eval_every=often
        )
