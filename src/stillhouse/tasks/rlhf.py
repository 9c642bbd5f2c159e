"""Reinforcement from a merged start: relatives of one ancestor, their merge, PPO with a critic, how stable it was.

On the embedded task the relatives are made from one tiny ancestor: a model tuned on direct answers and short traces
that end with a closing mark, and one tuned on long traces. The reward likes right answers, short ones, and the mark.

Shapes: B rows, T tokens, N response tokens of a batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError
from stillhouse.base.monitor import MetricsFile
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.schedule import linear
from stillhouse.core.stage import Context, Evaluate, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.reasoning import ArithmeticChain, Problem, Puzzle, draw_problems
from stillhouse.data.responses import Coder, response_tokens
from stillhouse.data.verifiers import Verifier
from stillhouse.metrics.stability import HORIZON, Stability, by_round
from stillhouse.models.critic import Critic
from stillhouse.models.merging import balanced, merge_directories
from stillhouse.objectives.language import head_of
from stillhouse.objectives.ppo import ClippedPolicy, ValueMatch
from stillhouse.objectives.responses import response_logprobs
from stillhouse.rl.ppo import TokenAdvantages, as_noted
from stillhouse.rl.rewards import Added, RewardModel, ShapedReward, Unclosed
from stillhouse.rl.rollouts import RolloutSource
from stillhouse.rl.sampling import resting
from stillhouse.tasks.embedded_lm import save_pretrained
from stillhouse.tasks.pictures import curves_picture
from stillhouse.tasks.reasoning import DEMO, Corpus, ReasoningSystem, ReasoningTask

Style = Literal["ancestor", "instruct", "reasoning"]
CLOSING, VERIFY = "!", "~"  # marks of the embedded task
CHOOSING = 50  # held-out problems to choose by, at most


@dataclass(kw_only=True)
class RLHFSystem(ReasoningSystem):
    """Fields of every system that reinforces a policy with PPO."""

    algorithm: Annotated[Literal["ppo", "grpo"], "grpo: advantages of a group instead of a critic's"] = "ppo"
    reward_model: Annotated[
        str | None, "sequence classifier with one output, whose score is added to the verifier's: directory or hub id"
    ] = None
    token_cost: Annotated[float, "taken from the reward for every token beyond free_tokens", Ge(0)] = 0.0
    free_tokens: Annotated[int, "tokens of a response that cost nothing", Ge(0)] = 0
    closing: Annotated[str, "what a well-formed response ends with; '' for nothing"] = ""
    closing_bonus: Annotated[float, "reward of ending so", Ge(0)] = 0.0
    prompts: Annotated[int, "prompts in a round of rollouts", Ge(1)] = 4096
    group: Annotated[int, "rollouts of each (grpo)", Ge(2)] = 8
    minibatches: Annotated[int, "optimizer steps' batches in a round of rollouts", Ge(1)] = 8
    rollout_epochs: Annotated[int, "passes over a round of rollouts", Ge(1)] = 1
    steps: Annotated[int, "optimizer steps", Ge(1)] = 1600
    temperature: Annotated[float, "of the rollouts", Gt(0)] = 1.0
    kl: Annotated[float, "penalty on the KL to the initial actor", Ge(0)] = 0.02
    clip_ratio: Annotated[float, "clips the policy's ratio at 1 +- this", Gt(0), Lt(1)] = 0.2
    clip_value: Annotated[float | None, "clips the change of the critic's values", Gt(0)] = 0.2
    gamma: Annotated[float, "discount", Gt(0), Le(1)] = 1.0
    lam: Annotated[float, "lambda of the generalised advantages", Ge(0), Le(1)] = 0.95
    critic_lr: Annotated[float, "learning rate of the critic", Gt(0)] = 1e-6
    horizon: Annotated[int, "rounds that count as the beginning of the run in its diagnostics", Ge(1)] = HORIZON

    demo: ClassVar[dict[str, Any]] = {
        **ReasoningSystem.demo,
        "problems": 200,
        "max_new_tokens": 32,
        "token_cost": 0.15,
        "free_tokens": 12,
        "closing": CLOSING,
        "closing_bonus": 0.3,
        "prompts": 64,
        "group": 4,
        "minibatches": 2,
        "steps": 120,
        "lr": 1e-4,
        "critic_lr": 1e-3,
        "eval_samples": 4,
    }
    smoke: ClassVar[dict[str, Any]] = {
        "problems": 20,
        "pretrain": 40,
        "max_new_tokens": 12,
        "prompts": 8,
        "steps": 22,
        "eval_problems": 8,
        "eval_samples": 2,
    }


@dataclass(frozen=True, kw_only=True)
class StyleCorpus(Corpus):
    """Chains of three or of all operands, worked in one style.

    - ancestor: prompts alone, direct answers and short traces, in equal parts.
    - instruct: direct answers and short traces, with the closing mark.
    - reasoning: every running result twice, and a mark that says it was verified.
    """

    style: Style = "ancestor"

    def example(self, puzzle: Puzzle, rng: random.Random, without: set[str]) -> tuple[str, str]:
        if not isinstance(puzzle, ArithmeticChain):
            return super().example(puzzle, rng, without)
        chain = replace(puzzle, operands=rng.choice((min(3, puzzle.operands), puzzle.operands)))
        problem = chain.draw(rng)
        while problem["prompt"] in without:
            problem = chain.draw(rng)
        prompt, direct, short = problem["prompt"], f"#{problem['answer']}", problem["trace"]
        if self.style == "reasoning":
            return prompt, long_trace(short)
        if self.style == "instruct":
            return prompt, rng.choice((direct, short)) + CLOSING
        return rng.choice([("", prompt), (prompt, direct), (prompt, short)])


def long_trace(trace: str) -> str:
    """``1,3#3`` as ``1,1,3,3~#3``."""
    worked, _, answer = trace.partition("#")
    return ",".join(part for result in worked.split(",") for part in (result, result)) + f"{VERIFY}#{answer}"


@dataclass
class Family:
    """An ancestor and the two models that were made from it, and the task that the merged one goes on with."""

    task: ReasoningTask
    system: RLHFSystem
    instruct: str
    reasoning: str
    verifier: Verifier  # the reward without what length and the closing mark are worth

    @staticmethod
    def prepare(
        system: RLHFSystem, run: Run, *, instruct: str, reasoning: str, tuning: Mapping[Style, int], lr: float
    ) -> Generator[Stage, Artifact, Family]:
        """With ``demo`` models this yields the stages that make them, in ``tuning`` steps with ``lr`` at the peak."""
        names = {"model": system.model, "instruct": instruct, "reasoning": reasoning}
        if len({name == DEMO for name in names.values()}) > 1:
            missing = ", ".join(key for key, name in names.items() if name == DEMO)
            raise ConfigError(f"give all of model, instruct and reasoning, or none; {missing} is 'demo'")
        ancestor = StyleCorpus(steps=system.pretrain)
        task = yield from ReasoningTask.prepare(system, run, ancestor)
        if task.puzzle is not None and isinstance(task.puzzle, ArithmeticChain):
            easy = replace(task.puzzle, operands=min(3, task.puzzle.operands))
            count = len(task.train_problems) // 2
            short = draw_problems(easy, min(count, 100), seed=("short", system.seed))
            task.train_problems = task.train_problems[: len(task.train_problems) - len(short)] + short
        if system.closing:
            task.verifier = Unclosed(task.verifier, system.closing)
        verifier: Verifier = task.verifier
        if system.reward_model is not None:
            device = run.fabric.device
            scorer = RewardModel(system.reward_model, device=device, trust_remote_code=system.trust_remote_code)
            verifier = Added((verifier, scorer))
        family = Family(task, system, instruct, reasoning, verifier)
        if instruct == DEMO:
            corpora = [
                StyleCorpus(steps=tuning[style], style=style, lr=lr, seed=system.seed)
                for style in ("instruct", "reasoning")
            ]
            family.instruct = str((yield family._tuned(corpora[0], ancestor)).path)
            family.reasoning = str((yield family._tuned(corpora[1], ancestor)).path)
        return family

    def _tuned(self, corpus: StyleCorpus, ancestor: StyleCorpus) -> Train:
        """The cached stage that fine-tunes the embedded ancestor on a style."""
        task, puzzle = self.task, self.task.puzzle
        if puzzle is None:
            raise ConfigError("demo models know the problems of data=demo only; for your own data pass your models")
        without = {problem["prompt"] for problem in task.held_out}
        cache = {"ancestor": asdict(ancestor), "without": sorted(without)}
        make = partial(task.load, task.base)
        return corpus.training(corpus.style, make, puzzle, task.coder, without=without, cache=cache)

    def set_aside(self) -> list[Problem]:
        """Held-out problems that choices are made by; from here on they are not reported on.

        Raises:
            ConfigError: a single one is held out.
        """
        held_out = self.task.held_out
        count = min(CHOOSING, len(held_out) // 2)
        if not count:
            raise ConfigError("sweep: one held-out problem cannot be both chosen by and reported on; raise validation")
        reported = held_out[:-count][: self.system.eval_problems]
        self.task = replace(self.task, test_problems=reported)
        return held_out[-count:]

    def merged(self, name: str, *, share: float, alpha: float, **how: Any) -> Transform:
        """The stage that merges instruct and reasoning by ``share``, then with the ancestor by ``alpha``.

        A model of which nothing is taken has no part in it; the tokenizer, the chat template and the generation
        settings are the instructed model's, else the reasoning model's, else the ancestor's.
        """
        coefficients = balanced(share, alpha)
        taken = [pair for pair in zip((self.instruct, self.reasoning), coefficients, strict=True) if pair[1]]
        others, weights = [one for one, _ in taken], [weight for _, weight in taken]
        trust = self.system.trust_remote_code

        def save(_: Any, folder: Path) -> None:
            merge_directories(self.task.base, others, weights, folder, trust_remote_code=trust, **how)

        def note(context: Context) -> None:
            context.results = dict(zip(("instruct", "reasoning"), coefficients, strict=True))
            context.results["ancestor"] = 1 - sum(coefficients)

        return Transform(name, note, save=save)

    def reward(self, coder: Coder) -> ShapedReward:
        """The reward of responses whose tokens are those of ``coder``."""
        return ShapedReward(
            self.verifier,
            lambda text: len(coder.response(text)),
            free=self.system.free_tokens,
            per_token=self.system.token_cost,
            closing=self.system.closing,
            bonus=self.system.closing_bonus,
        )

    def reinforced(self, name: str, start: Artifact, *, steps: int, problems: Sequence[Problem] | None = None) -> Train:
        """The stage that reinforces ``start``, which reads and ends as its own tokenizer says.

        Every step is logged, for `stability`. ``problems``: those of the stage's accuracy; by default some of those
        that are reported on.
        """
        system, task = self.system, self.task.speaking_as(start)
        looked_at = task.test_problems[:50] if problems is None else problems
        actor = Observed(task.load(start), name=name, options={"use_cache": False})
        initial = Observed(task.load(start), frozen=True, name="initial", options={"use_cache": False})
        ppo = system.algorithm == "ppo"
        critic = Observed(Critic(task.load(start)), name="critic") if ppo else None
        heads = {"temperature": system.temperature}
        noted = TokenAdvantages(
            task.coder,
            task.scorer(actor, **heads),
            task.scorer(initial, **heads),
            None if critic is None else self._values(critic.module),
            kl=system.kl,
            gamma=system.gamma,
            lam=system.lam,
        )
        source = RolloutSource(
            task.sampler(actor.module, temperature=system.temperature, sharded=[actor.tapped]),
            task.coder,
            task.train_problems,
            self.reward(task.coder),
            prompts=system.prompts,
            group=1 if ppo else system.group,
            epochs=system.rollout_epochs,
            minibatches=system.minibatches,
            score=as_noted,
            prepare=noted.prepare,
            collate=noted.collate,
            seed=system.seed,
        )
        policy = ClippedPolicy(
            head_of(actor),
            clip_low=system.clip_ratio,
            clip_high=system.clip_ratio,
            normalisation="token" if ppo else "sequence",
            kl=0.0 if ppo else system.kl,
            temperature=system.temperature,
        )
        common: dict[str, Any] = {"clip": system.clip, "lr": linear(1.0, 1.0, warmup=system.warmup)}
        decay = system.weight_decay
        players = [Player(name, actor, policy, optimizer=adamw(system.lr, weight_decay=decay), **common)]
        if critic is not None:
            value = ValueMatch(critic.output(), clip=system.clip_value)
            optimizer = adamw(system.critic_lr, weight_decay=decay)
            players.append(Player("critic", critic, value, optimizer=optimizer, **common))

        def accuracy() -> dict[str, float]:
            return {"accuracy": task.accuracy(actor.module, samples=4, problems=looked_at)}

        return Train(
            name,
            players,
            source=source,
            steps=steps,
            evaluate=accuracy,
            eval_every=steps,
            log_every=1,
            shares_every=0,
            save=partial(save_pretrained, tokenizer=task.coder.tokenizer),
        )

    def _values(self, critic: nn.Module) -> Callable[[dict[str, Any]], Tensor]:
        fabric = self.task.run.fabric

        def value(batch: dict[str, Any]) -> Tensor:
            moved = fabric.to_device(batch)
            critic.to(fabric.device)
            with resting(critic), fabric.autocast():
                value_BT = critic(moved["input_ids"], moved["attention_mask"])
            return value_BT[:, :-1][response_tokens(moved)[0]]

        return value

    # -- measurements -----------------------------------------------------------------------------------------------

    def course(self, stage: Artifact) -> dict[str, list[float]]:
        """Reward, length, KL to the start and staleness of a reinforced stage, round by round."""
        lines = MetricsFile(stage.path.parent / "metrics.jsonl").read()
        values = [line["values"] for line in lines if line["kind"] == "train" and "Policy.reward" in line["values"]]
        rounds = [one["Policy.round"] for one in values]
        names = ("reward", "tokens", "kl", "staleness")
        return {name: by_round([one[f"Policy.{name}"] for one in values], rounds) for name in names}

    def stable(self, stage: Artifact) -> Stability:
        course = self.course(stage)
        return Stability.of(course["reward"], course["tokens"], horizon=self.system.horizon)

    def stability(self, runs: Mapping[str, Artifact]) -> Evaluate:
        """How the reinforced runs went: a table, and their curves as pictures."""
        return Evaluate("stability", partial(self._stability, dict(runs)))

    def _stability(self, runs: Mapping[str, Artifact], context: Context) -> tuple[Table, dict[str, str]]:
        rows, courses = [], {name: self.course(stage) for name, stage in runs.items()}
        for name, course in courses.items():
            found, rounds = self.stable(runs[name]), len(course["reward"])
            last = max(1, rounds // 10)
            figures = {
                "dip": found.dip,
                "recovery": float(rounds if found.recovery is None else found.recovery),
                "collapse": found.collapse,
                "first_reward": course["reward"][0],
                "final_reward": sum(course["reward"][-last:]) / last,
                "final_tokens": sum(course["tokens"][-last:]) / last,
                "kl": course["kl"][-1],
                "staleness": sum(course["staleness"]) / rounds,
            }
            rows.append({"name": name, **figures})
            context.results |= {f"{name}/{key}": value for key, value in figures.items()}
        pictures = {
            f"{what}.svg": curves_picture(
                {name: list(enumerate(course[what])) for name, course in courses.items()}, x="round", y=label
            )
            for what, label in LABELS.items()
        }
        note = f"Dip and collapse are looked for in the first {self.system.horizon} rounds."
        return Table("Stability of the reinforced runs", STABILITY, rows, [note]), pictures

    def trace_loss(self, model: Any) -> dict[str, float]:
        """Mean loss per token on held-out worked traces (embedded: in the reasoning style); nothing without traces."""
        task = self.task.speaking_as(model.name_or_path)  # where it was loaded from
        known = [problem for problem in task.test_problems[:100] if problem.get("trace")]
        if not known:
            return {}
        style = long_trace if isinstance(task.puzzle, ArithmeticChain) else str
        batch = task.run.fabric.to_device(
            task.coder.batch(task.rows([(p["prompt"], style(p["trace"])) for p in known]))
        )
        with resting(model), task.run.fabric.autocast():
            logp_N = response_logprobs(head_of(Observed(model, options={"use_cache": False})), batch)
        return {"trace_loss": -float(logp_N.mean())}

    def evaluation(self, models: Mapping[str, str | Artifact]) -> Evaluate:
        return self.task.evaluation(models, more=self.trace_loss, columns=[TRACE_LOSS])


LABELS = {
    "reward": "mean reward",
    "tokens": "mean tokens of a response",
    "kl": "KL to the initial actor, nats per token",
    "staleness": "KL of sampling to learning policy, nats per token",
}
TRACE_LOSS = Column("trace_loss", "trace loss", ".3f", "lower", "loss on held-out reasoning traces, nats per token")
STABILITY = [
    Column("dip", "dip", ".3f", "lower", "how far the mean reward falls below the first round's"),
    Column("recovery", "recovery", ".0f", "lower", "round at which it is back; all rounds if never"),
    Column("collapse", "collapse ratio", ".2f", "higher", "shortest mean length / first one"),
    Column("first_reward", "first reward", ".3f", "", "mean reward of the first round"),
    Column("final_reward", "final reward", ".3f", "higher", "mean reward of the last tenth of rounds"),
    Column("final_tokens", "final tokens", ".1f", "", "mean length in the last tenth of rounds"),
    Column("kl", "KL", ".4f", "", "to the initial actor at the end, nats per token"),
    Column("staleness", "staleness", ".5f", "lower", "mean KL of the sampling to the learning policy"),
]
