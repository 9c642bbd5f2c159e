"""The reasoning task: problems with verifiable answers, a policy that answers them, embedded or the user's own.

On the embedded task the problems are generated (chains of arithmetic, knights and knaves), and a tiny policy is
pre-trained once on worked examples, good and bad ones as a system asks for, and kept in the cache.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from annotated_types import Ge, Gt, Lt
from torch import nn

from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.schedule import Schedule, linear
from stillhouse.core.stage import Context, Evaluate, Stage
from stillhouse.core.system import System
from stillhouse.core.train import Train
from stillhouse.data.reasoning import (
    ArithmeticChain,
    KnightsAndKnaves,
    Problem,
    Puzzle,
    draw_problems,
    read_problems,
    split_problems,
)
from stillhouse.data.responses import Coder, Row, filled
from stillhouse.data.sources import Drawn
from stillhouse.data.verifiers import Verifier, judged, verifier_named
from stillhouse.metrics.reasoning import pass_at_k
from stillhouse.models.causal_lm import load_causal_lm, new_causal_lm, parameter_count
from stillhouse.models.loading import load_tokenizer, local_folder
from stillhouse.models.tokenizers import train_bpe
from stillhouse.objectives.language import head_of
from stillhouse.objectives.responses import response_logprobs
from stillhouse.rl.sampling import LiveSampler, Response, resting
from stillhouse.tasks.embedded_lm import next_token_training, save_pretrained, small_llama

DEMO = "demo"
HELD_OUT = 200  # problems of the embedded task; the same for every seed


@dataclass(kw_only=True)
class ReasoningSystem(System):
    """Fields of every system that teaches a causal language model to reason."""

    model: Annotated[str, "the model to train: directory or hub id of a causal LM; 'demo': a tiny one"] = DEMO
    data: Annotated[str, ".jsonl or .parquet file of problems with prompt and answer (and trace), or 'demo'"] = DEMO
    puzzle: Annotated[Literal["chain", "knights"], "the embedded task's problems"] = "chain"
    problems: Annotated[int | None, "problems to train on; all by default (embedded: 150)", Ge(2)] = None
    validation: Annotated[float, "share of the problems held out", Gt(0), Lt(1)] = 0.1
    prompt_field: Annotated[str, "column of the prompts"] = "prompt"
    answer_field: Annotated[str, "column of the answers"] = "answer"
    verifier: Annotated[
        str, "exact, numeric, FILE.py:FUNCTION, or several joined by +; auto: exact (embedded: an exact solver)"
    ] = "auto"
    marker: Annotated[str, r"what the final answer follows in a response (\boxed{} is found too)"] = "#"
    pretrain: Annotated[int, "steps in which the embedded model is made", Ge(1)] = 300
    chat: Annotated[bool | None, "write prompts with the chat template; by default where there is one"] = None
    max_new_tokens: Annotated[int, "longest response", Ge(1)] = 8192
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 1e-6
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0)] = 0.0
    weight_decay: Annotated[float, "decoupled weight decay", Ge(0)] = 0.01
    clip: Annotated[float | None, "largest gradient norm", Gt(0)] = 1.0
    eval_problems: Annotated[int, "held-out problems of the evaluation", Ge(1)] = 200
    eval_samples: Annotated[int, "responses to each of them", Ge(1)] = 16
    gradient_checkpointing: Annotated[bool, "trade time for memory in the model that is trained"] = False
    trust_remote_code: Annotated[bool, "run code that comes with a model"] = False

    demo: ClassVar[dict[str, Any]] = {"max_new_tokens": 80, "eval_problems": 100}

    def is_demo(self) -> bool:
        return self.__dict__["model"] == DEMO and self.__dict__["data"] == DEMO

    def new_puzzle(self) -> Puzzle:
        """The embedded problems."""
        return ArithmeticChain() if self.puzzle == "chain" else KnightsAndKnaves()


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """What an embedded model is pre-trained on, and how; part of its fingerprint in the cache.

    Shares of the examples: ``short`` (easier problems), ``hinted`` (the solution shown before the problem); the rest
    are plain problems, of whose traces a share ``flawed`` makes the systematic mistake.
    """

    steps: int
    flawed: float = 0.0
    short: float = 0.0
    hinted: float = 0.0
    hint: str = ""
    hidden_size: int = 64
    layers: int = 2
    heads: int = 4
    batch_size: int = 64
    lr: float = 3e-3
    seed: int = 0

    def example(self, puzzle: Puzzle, rng: random.Random, without: set[str]) -> tuple[str, str]:
        """A (prompt, response) pair that is none of the held-out problems."""
        kind = rng.random()
        if kind < self.short:
            easy = _easier(puzzle).draw(rng)
            return easy["prompt"], easy["trace"]
        problem = puzzle.draw(rng)
        while problem["prompt"] in without:
            problem = puzzle.draw(rng)
        if kind < self.short + self.hinted:
            return filled(self.hint, prompt=problem["prompt"], solution=problem["trace"]), problem["trace"]
        return problem["prompt"], problem["flawed" if rng.random() < self.flawed else "trace"]

    def examples(self, puzzle: Puzzle, rng: random.Random, without: set[str]) -> list[tuple[str, str]]:
        """A batch of them."""
        return [self.example(puzzle, rng, without) for _ in range(self.batch_size)]

    def spoken(self) -> Corpus:
        """The corpus whose examples the tokenizer is made from: a model that shares another's takes that one's."""
        return self

    def training(
        self,
        name: str,
        make: Callable[[], Any],
        puzzle: Puzzle,
        coder: Coder,
        *,
        without: set[str],
        cache: Mapping[str, Any],
    ) -> Train:
        """The cached stage in which the model of ``make`` learns from examples, drawn anew for every batch."""

        def draw(generator: torch.Generator) -> dict[str, torch.Tensor]:
            rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
            return coder.batch([coder.row(*one) for one in self.examples(puzzle, rng, without)])

        return next_token_training(
            name,
            make,
            Drawn(draw, seed=self.seed),
            coder.tokenizer,
            lr=self.lr,
            steps=self.steps,
            betas=(0.9, 0.99),
            weight_decay=0.1,
            warmup=0.05,
            floor=0.1,
            cache={**asdict(self), "puzzle": repr(puzzle), **cache},
        )


def _easier(puzzle: Puzzle) -> Puzzle:
    if isinstance(puzzle, ArithmeticChain):
        return replace(puzzle, operands=max(2, puzzle.operands - 2))
    assert isinstance(puzzle, KnightsAndKnaves)
    return replace(puzzle, people=max(2, puzzle.people - 1))


@dataclass
class ReasoningTask:
    """What a reasoning system works with, once its fields have been turned into objects."""

    system: ReasoningSystem
    run: Run
    coder: Coder
    base: str  # directory or hub id of the policy before training
    train_problems: list[Problem]
    test_problems: list[Problem]
    verifier: Verifier
    puzzle: Puzzle | None = None
    held_out: list[Problem] = field(default_factory=list)  # of the embedded task, more than are evaluated

    @staticmethod
    def prepare(system: ReasoningSystem, run: Run, corpus: Corpus) -> Generator[Stage, Artifact, ReasoningTask]:
        """Build the task; with ``model=demo`` this yields the stage that pre-trains the policy on ``corpus``."""
        puzzle: Puzzle | None = None
        if system.data == DEMO:
            puzzle = system.new_puzzle()
            test = draw_problems(puzzle, HELD_OUT, seed="held out")
            train = draw_problems(puzzle, system.problems or 150, seed=("train", system.seed), without=test)
        else:
            given = read_problems(system.data, prompt=system.prompt_field, answer=system.answer_field)
            train, test = split_problems(given, share=system.validation)
            train = train[: system.problems]
        base = system.model
        if base == DEMO:
            if puzzle is None:
                raise ConfigError("model=demo knows the problems of data=demo only; for your own data pass a model")
            base = str((yield pretrain("base", puzzle, test, corpus)).path)
        verifier: Verifier
        if system.verifier == "auto":
            verifier = puzzle if puzzle is not None else verifier_named("exact", marker=system.marker)
        else:
            verifier = verifier_named(system.verifier, marker=system.marker)
        _, tokenizer = load_causal_lm(base, trust_remote_code=system.trust_remote_code)
        coder = Coder(tokenizer, chat=system.chat)
        return ReasoningTask(system, run, coder, base, train, test[: system.eval_problems], verifier, puzzle, test)

    # -- models -----------------------------------------------------------------------------------------------------

    def speaking_as(self, where: str | Artifact) -> Self:
        """The same task for the model in ``where``: with its tokenizer, its end of text and its chat template."""
        return replace(self, coder=coder_of(where if isinstance(where, str) else str(where.path), self.system))

    def load(self, where: str | Artifact) -> Any:
        """A model to train or to measure, in float32."""
        name = where if isinstance(where, str) else str(where.path)
        model, _ = load_causal_lm(name, dtype=torch.float32, trust_remote_code=self.system.trust_remote_code)
        return model.to(self.run.fabric.device)

    def sampler(self, model: nn.Module, *, temperature: float = 1.0, sharded: Sequence[nn.Module] = ()) -> LiveSampler:
        """Samples from ``model`` as it is when asked."""
        return LiveSampler(
            model,
            self.coder,
            self.system.max_new_tokens,
            temperature=temperature,
            autocast=self.run.fabric.autocast,
            sharded=sharded,
        )

    def scorer(self, student: Observed, *, temperature: float = 1.0) -> Callable[[dict[str, Any]], torch.Tensor]:
        """Log-probabilities of a batch's response tokens under the student as it is when asked."""
        head = head_of(student)

        def score(batch: dict[str, Any]) -> torch.Tensor:
            with resting(student.module), self.run.fabric.autocast():
                return response_logprobs(head, self.run.fabric.to_device(batch), temperature=temperature)

        return score

    # -- stages -----------------------------------------------------------------------------------------------------

    def train(
        self,
        name: str,
        student: Observed,
        objective: Objective,
        *,
        source: Any,
        steps: int,
        lr: float | None = None,
        schedule: Schedule | None = None,
        **options: Any,
    ) -> Train:
        """A stage that trains ``student``; ``options`` are those of the player (``ema``) and of `Train`."""
        system = self.system
        if system.gradient_checkpointing:
            student.module.gradient_checkpointing_enable(  # type: ignore[operator]
                gradient_checkpointing_kwargs={"use_reentrant": False}
            )
        player = Player(
            name,
            student,
            objective,
            optimizer=adamw(lr or system.lr, weight_decay=system.weight_decay),
            lr=schedule or linear(1.0, 1.0, warmup=system.warmup),
            clip=system.clip,
            ema=options.pop("ema", None),
        )
        evaluate = partial(self._curve, student.module)
        save = partial(save_pretrained, tokenizer=self.coder.tokenizer)
        return Train(name, player, source=source, steps=steps, evaluate=evaluate, save=save, **options)

    def rows(self, pairs: Sequence[tuple[str, str]]) -> list[Row]:
        """(prompt, response) texts as tokens."""
        return [self.coder.row(prompt, response) for prompt, response in pairs]

    # -- measurements -----------------------------------------------------------------------------------------------

    def answers(
        self, model: nn.Module, *, samples: int, problems: Sequence[Problem] | None = None, prompt: str = "prompt"
    ) -> list[list[bool]]:
        """Whether each of ``samples`` answers to each held-out problem is right; the same draws for every model."""
        chosen = self.test_problems if problems is None else problems
        written: list[list[Response]] = self.sampler(model).sample([p[prompt] for p in chosen], n=samples, seed=20_260)
        return [
            [judged(self.verifier, response.text, problem).correct for response in responses]
            for problem, responses in zip(chosen, written, strict=True)
        ]

    def accuracy(self, model: nn.Module, *, samples: int, problems: Sequence[Problem] | None = None) -> float:
        """Mean share of right answers, sampled at temperature 1 (pass@1)."""
        right = self.answers(model, samples=samples, problems=problems)
        return sum(map(sum, right)) / sum(map(len, right))

    def hinted_accuracy(self, template: str, model: nn.Module) -> dict[str, float]:
        """``hinted``: the accuracy when prompts show a known trace by ``template``; nothing where no trace is known."""
        known = [
            {**problem, "hinted": filled(template, prompt=problem["prompt"], solution=problem["trace"])}
            for problem in self.test_problems
            if problem.get("trace")
        ]
        if not known:
            return {}
        right = self.answers(model, samples=self.system.eval_samples, problems=known, prompt="hinted")
        return {"hinted": sum(map(sum, right)) / sum(map(len, right))}

    def _curve(self, model: nn.Module) -> dict[str, float]:
        return {"accuracy": self.accuracy(model, samples=4, problems=self.test_problems[:50])}

    def evaluation(
        self,
        models: Mapping[str, str | Artifact],
        *,
        more: Callable[[nn.Module], dict[str, float]] | None = None,
        columns: Sequence[Column] = (),
    ) -> Evaluate:
        """The final table, every model read by its own tokenizer; ``more`` adds figures, shown in ``columns``."""
        return Evaluate("evaluation", partial(self._evaluate, dict(models), more, columns))

    def _evaluate(
        self,
        models: Mapping[str, str | Artifact],
        more: Callable[[nn.Module], dict[str, float]] | None,
        columns: Sequence[Column],
        context: Context,
    ) -> tuple[Table, dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        shown: list[dict[str, Any]] = []
        n = self.system.eval_samples
        for name, where in models.items():
            model, own = self.load(where).eval(), self.speaking_as(where)
            right = own.answers(model, samples=n)
            row: dict[str, Any] = {
                "name": name,
                "parameters": parameter_count(model),
                "accuracy": sum(map(sum, right)) / (n * len(right)),
                "pass_at_k": sum(pass_at_k(sum(one), n, n) for one in right) / len(right),
                **(more(model) if more else {}),
            }
            rows.append(row)
            context.results |= {f"{name}/{key}": value for key, value in row.items() if key != "name"}
            for place, problem in enumerate(self.test_problems[:3]):
                if len(shown) <= place:
                    shown.append({"prompt": problem["prompt"], "outputs": {"answer": problem["answer"]}})
                shown[place]["outputs"][name] = own.sampler(model).sample([problem["prompt"]], n=1, seed=1)[0][0].text
        note = f"{len(self.test_problems)} held-out problems, {n} answers to each at temperature 1."
        return Table("Held-out problems", [*COLUMNS, *columns], rows, [note]), {"samples.json": shown}


COLUMNS = [
    Column("parameters", "parameters", ",d"),
    Column("accuracy", "accuracy", ".1%", "higher", "share of sampled answers that are right (pass@1)"),
    Column("pass_at_k", "pass@k", ".1%", "higher", "share of problems of which at least one answer is right"),
]


def coder_of(name: str, system: ReasoningSystem) -> Coder:
    """The tokenizer of a model in a directory or on the hub, with its end of text and its chat template."""
    trust = system.trust_remote_code
    tokenizer = load_tokenizer(name, local_folder(name), revision="main", trust_remote_code=trust)
    return Coder(tokenizer, chat=system.chat)


def pretrain(name: str, puzzle: Puzzle, held_out: Sequence[Problem], corpus: Corpus) -> Train:
    """The cached stage that makes an embedded model from nothing."""
    rng = random.Random(0)
    without = {problem["prompt"] for problem in held_out}
    spoken = corpus.spoken()
    tokenizer = train_bpe(
        (text for _ in range(500) for text in spoken.example(puzzle, rng, without)), vocab_size=320, min_frequency=20
    )
    config = small_llama(
        tokenizer, width=corpus.hidden_size, layers=corpus.layers, heads=corpus.heads, positions=512, tied=True
    )
    config.initializer_range = corpus.hidden_size**-0.5  # from the usual 0.02 so narrow a model learns nothing for long
    cache = {"held_out": sorted(without), "config": {**config.to_dict(), "transformers_version": None}}
    make = partial(new_causal_lm, config, seed=corpus.seed)
    return corpus.training(name, make, puzzle, Coder(tokenizer), without=without, cache=cache)
