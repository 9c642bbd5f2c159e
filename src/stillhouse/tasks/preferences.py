"""The preference task: pairs of a better and a worse response, and a policy that is aligned with them.

Pairs are the user's own, or the policy writes two responses to each problem and a score ranks them. On the embedded
task the problems are the reasoning task's, and the score is known: it counts right running results too.

Shapes: C tokens of one chunk, N response tokens of a batch, D hidden width.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Lt
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed, Turn
from stillhouse.core.run import Run
from stillhouse.core.schedule import cosine
from stillhouse.core.stage import Context, Evaluate, Generate, Stage
from stillhouse.core.train import Train
from stillhouse.data.preferences import Preference, Scored, chain_score, ranked, read_preferences
from stillhouse.data.reasoning import ArithmeticChain, Problem, Puzzle, split_problems
from stillhouse.data.responses import Coder, Row, pack_rows, response_tokens
from stillhouse.data.sources import Batches
from stillhouse.data.verifiers import judged
from stillhouse.losses.divergences import ReverseKL
from stillhouse.losses.preference import sums_by_row
from stillhouse.losses.token_logprobs import in_chunks
from stillhouse.models.causal_lm import load_causal_lm, parameter_count
from stillhouse.objectives.language import head_of
from stillhouse.objectives.responses import opened, preferring, response_logprobs
from stillhouse.rl.policies import PolicySource, Share
from stillhouse.rl.sampling import Response, resting
from stillhouse.tasks.reasoning import DEMO, Corpus, ReasoningSystem, ReasoningTask

TOGETHER = 128  # prompts that the policy answers at one time


@dataclass(kw_only=True)
class PreferenceSystem(ReasoningSystem):
    """Fields of every system that aligns a causal language model with preferences."""

    pairs: Annotated[
        Literal["given", "sampled"],
        "given: the data's own; sampled: the model writes two responses to each problem, and the verifier ranks them",
    ] = "given"
    chosen_field: Annotated[str, "column of the better responses"] = "chosen"
    rejected_field: Annotated[str, "column of the worse responses"] = "rejected"
    flip: Annotated[float, "share of sampled pairs that are turned round: noise", Ge(0), Lt(1)] = 0.0
    max_prompt: Annotated[int, "tokens of a prompt; pairs with longer ones are left out", Ge(1)] = 1024
    max_new_tokens: Annotated[int, "longest response; pairs with longer ones are left out", Ge(1)] = 1024
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0)] = 0.1
    final_lr: Annotated[float, "share of the peak learning rate that is left at the end of the cosine", Ge(0)] = 0.1
    batch_size: Annotated[int, "pairs, prompts or responses in a batch", Ge(1)] = 128
    dpo_lr: Annotated[float | None, "learning rate of the DPO stages; by default lr", Gt(0)] = None
    dpo_steps: Annotated[int | None, "steps of the DPO stages; by default one pass over the pairs", Ge(1)] = None

    demo: ClassVar[dict[str, Any]] = {
        **ReasoningSystem.demo,
        "pairs": "sampled",
        "flip": 0.1,
        "problems": 1500,
        "pretrain": 500,
        "max_new_tokens": 24,
        "batch_size": 32,
        "lr": 1e-4,
        "dpo_steps": 20,
        "eval_problems": 150,
        "eval_samples": 4,
    }
    smoke: ClassVar[dict[str, Any]] = {
        "problems": 40,
        "pretrain": 40,
        "batch_size": 8,
        "dpo_steps": 4,
        "eval_problems": 8,
        "eval_samples": 2,
    }


@dataclass(frozen=True, kw_only=True)
class NoisyCorpus(Corpus):
    """Worked chains in which every running result is any number with probability ``noise``; the last is the answer."""

    noise: float = 0.3

    def example(self, puzzle: Puzzle, rng: random.Random, without: set[str]) -> tuple[str, str]:
        prompt, trace = super().example(puzzle, rng, without)
        if not isinstance(puzzle, ArithmeticChain):
            return prompt, trace
        said = trace.partition("#")[0].split(",")
        noisy = [str(rng.randrange(puzzle.modulus or 10)) if rng.random() < self.noise else one for one in said]
        return prompt, ",".join(noisy) + f"#{noisy[-1]}"


@dataclass
class PreferenceTask(ReasoningTask):
    """The reasoning task with pairs to train on (``training``), and pairs that are kept back (``kept``)."""

    training: list[Preference] = field(default_factory=list)
    kept: list[Preference] = field(default_factory=list)
    score: Callable[[str, Problem], float] | None = None  # what responses are worth, where that is known

    @staticmethod
    def with_pairs(system: PreferenceSystem, run: Run, corpus: Corpus) -> Generator[Stage, Artifact, PreferenceTask]:
        """Build the task; where pairs are sampled, this yields the stage in which the policy writes them."""
        if system.pairs == "sampled":
            task = PreferenceTask(**vars((yield from ReasoningTask.prepare(system, run, corpus))))
            task.score = partial(response_score, task)
            found = yield from task._sampled(system)
        else:
            if DEMO in (system.model, system.data):
                raise ConfigError("pairs=given needs a model and a data file with pairs; or set pairs=sampled")
            found = read_preferences(
                system.data, prompt=system.prompt_field, chosen=system.chosen_field, rejected=system.rejected_field
            )[: system.problems]
            _, tokenizer = load_causal_lm(system.model, trust_remote_code=system.trust_remote_code)
            coder = Coder(tokenizer, chat=system.chat)
            task = PreferenceTask(system, run, coder, system.model, [], [], unknown_score)
        task._split(system, found)
        return task

    def _sampled(self, system: PreferenceSystem) -> Generator[Stage, Artifact, list[Preference]]:
        import pyarrow.parquet as pq

        def write(left: Mapping[str, Problem]) -> Iterator[tuple[str, dict[str, Any]]]:
            asked = [problem["prompt"] for problem in self.train_problems]
            for key, said in self.answers_of(self.base, asked, left, n=2, seed=system.seed * 1_000_003):
                scores = [response_score(self, one.text, left[key]) for one in said]
                cut = [not one.finished for one in said]
                yield key, {"texts": [one.text for one in said], "scores": scores, "cut": cut}

        requests = {str(number): problem for number, problem in enumerate(self.train_problems)}
        made = yield Generate("pairs", requests, write, together=True)
        rows = pq.read_table(made.data_file()).to_pylist()
        prompts = [requests[row["key"]]["prompt"] for row in rows]
        scored = [list(map(Scored, row["texts"], row["scores"], row["cut"])) for row in rows]
        pairs = ranked(prompts, scored, flip=system.flip, seed=("flip", system.seed))
        if len(pairs) < 2:
            raise DataError(
                f"the model's two responses differ in score for {len(pairs)} of {len(rows)} problems; give more or "
                "other problems, or pairs of your own"
            )
        return pairs

    def answers_of(
        self, where: str | Artifact, prompts: Sequence[str], left: Collection[str], *, n: int, seed: int
    ) -> Iterator[tuple[str, list[Response]]]:
        """``n`` responses of a model to each prompt whose number is ``left``, by that number."""
        sampler = self.sampler(self.load(where))
        for start in range(0, len(prompts), TOGETHER):  # the same groups after a kill
            group = prompts[start : start + TOGETHER]
            keys = [str(start + place) for place in range(len(group))]
            if not any(key in left for key in keys):
                continue
            written = sampler.sample(group, n=n, seed=seed + start)
            yield from ((key, said) for key, said in zip(keys, written, strict=True) if key in left)

    def _split(self, system: PreferenceSystem, pairs: list[Preference]) -> None:
        """A share of the pairs is kept back; which one depends on the prompt alone."""
        fitting = [pair for pair in pairs if self._fits(system, pair)]
        if len(fitting) < 2:
            raise DataError(
                f"{len(fitting)} of {len(pairs)} pairs are short enough; raise max_prompt or max_new_tokens"
            )
        records = [{"prompt": pair.prompt, "answer": pair.chosen, "pair": pair} for pair in fitting]
        training, kept = split_problems(records, share=system.validation)
        self.training, self.kept = ([record["pair"] for record in part] for part in (training, kept))
        if not self.test_problems:
            self.test_problems = kept[: system.eval_problems]

    def _fits(self, system: PreferenceSystem, pair: Preference) -> bool:
        rows = self._rows(pair, swapped=False)
        longest = max(len(response) for _, response in rows)
        return longest <= system.max_new_tokens + 1 and len(rows[0][0]) <= system.max_prompt

    # -- stages -----------------------------------------------------------------------------------------------------

    def dpo(self, name: str, system: PreferenceSystem, *, beta: float, swapped: bool = False) -> Train:
        """DPO on the pairs, or on the pairs turned round, from the base model, which is the reference too."""
        student, reference = self.policy(name), self.frozen("reference", self.base)
        rows = [self._rows(pair, swapped=swapped) for pair in self.training]
        source = Batches(rows, system.batch_size, seed=system.seed, collate=self.coder.pairs)
        objective = preferring(head_of(student), head_of(reference), beta=beta, name="dpo")
        steps = system.dpo_steps or max(1, len(source))
        return self.align(name, system, student, objective, source=source, steps=steps, lr=system.dpo_lr)

    def _rows(self, pair: Preference, *, swapped: bool) -> tuple[Row, Row]:
        better, worse = (
            self._row(pair.prompt, text, cut=cut)
            for text, cut in zip((pair.chosen, pair.rejected), pair.cut, strict=True)
        )
        return (worse, better) if swapped else (better, worse)

    def _row(self, prompt: str, text: str, *, cut: bool) -> Row:
        """A response that was cut has no end: the model wrote none, and is not to learn where to stop from it."""
        ids, response = self.coder.row(prompt, text)
        return ids, response[:-1] if cut else response

    def align(
        self,
        name: str,
        system: PreferenceSystem,
        student: Observed,
        objective: Objective,
        *,
        source: Any,
        steps: int,
        lr: float | None = None,
    ) -> Train:
        """A stage that trains a policy; the learning rate rises, and falls along half a cosine."""
        schedule = cosine(1.0, system.final_lr, warmup=system.warmup)
        often = max(1, steps // 3)
        return self.train(
            name, student, objective, source=source, steps=steps, lr=lr, schedule=schedule, eval_every=often
        )

    def responses(self, system: PreferenceSystem, student: Observed, *, own: bool, steps: int) -> PolicySource:
        """Chosen responses, or (``own``) what the student writes now to the same prompts."""
        rows = [self._rows(pair, swapped=False)[0] for pair in self.training]
        batches = Batches(rows, system.batch_size, seed=system.seed, collate=self.coder.batch)
        writer = self.sampler(student.module, sharded=[student.tapped])
        share = Share(1.0 if own else 0.0)
        return PolicySource(batches, writer, share, pad=self.coder.pad, prompt=1, steps=steps, seed=system.seed)

    def policy(self, name: str, where: str | Artifact | None = None) -> Observed:
        """A model to train, by default the base model."""
        return Observed(self.load(where or self.base), name=name, options={"use_cache": False})

    def frozen(self, name: str, where: str | Artifact) -> Observed:
        return Observed(self.load(where), frozen=True, name=name, options={"use_cache": False})

    # -- measurements -----------------------------------------------------------------------------------------------

    def _curve(self, model: nn.Module) -> dict[str, float]:
        prompts = [problem["prompt"] for problem in self.test_problems[:50]]
        return self._figures(self.test_problems[:50], self.sampler(model).sample(prompts, n=2, seed=20_260))

    def _figures(self, problems: list[Problem], written: list[list[Response]]) -> dict[str, float]:
        said = [(problem, one) for problem, responses in zip(problems, written, strict=True) for one in responses]
        figures = {
            "tokens": sum(len(one.ids) for _, one in said) / len(said),
            "finished": sum(one.finished for _, one in said) / len(said),
        }
        if self.score is None:
            return figures
        return {"score": sum(self.score(one.text, problem) for problem, one in said) / len(said), **figures}

    def ordered(self, plus: Artifact, minus: str | Artifact) -> float:
        """Share of kept pairs that the reward log pi_plus(y) / pi_minus(y) puts in the true order."""
        models = [self.load(where).eval() for where in (plus, minus)]
        right = 0
        for start in range(0, len(self.kept), 32):
            pairs = self.kept[start : start + 32]
            rows = [self._rows(pair, swapped=pair.mistaken) for pair in pairs]
            batch = self.run.fabric.to_device(self.coder.batch([w for w, _ in rows] + [x for _, x in rows]))
            row_N = response_tokens(batch)[2]
            sums = []
            for model in models:
                with resting(model), self.run.fabric.autocast():
                    logp_N = response_logprobs(head_of(Observed(model, options={"use_cache": False})), batch)
                sums.append(sums_by_row(logp_N, row_N, 2 * len(pairs)))
            better_P, worse_P = (sums[0] - sums[1]).chunk(2)
            right += int((better_P > worse_P).sum())
        return right / len(self.kept)

    def evaluation_of(
        self, models: Mapping[str, str | Artifact], *, rewards: Mapping[str, tuple[Artifact, str | Artifact]]
    ) -> Evaluate:
        """The final table. ``rewards``: pairs of models whose log-ratio is a reward, by name; how often is it right?"""
        return Evaluate("evaluation", partial(self._table, dict(models), dict(rewards)))

    def _table(
        self,
        models: Mapping[str, str | Artifact],
        rewards: Mapping[str, tuple[Artifact, str | Artifact]],
        context: Context,
    ) -> tuple[Table, dict[str, Any]]:
        n = self.system.eval_samples
        rows: list[dict[str, Any]] = []
        shown: list[dict[str, Any]] = []
        base = self.load(self.base).eval()
        for name, where in models.items():
            model = self.load(where).eval()
            prompts = [problem["prompt"] for problem in self.test_problems]
            written = self.sampler(model).sample(prompts, n=n, seed=20_260)
            figures = {
                "parameters": parameter_count(model),
                **self._figures(self.test_problems, written),
                "kl": self._kl_to(base, model, prompts, written),
            }
            rows.append({"name": name, **figures})
            context.results |= {f"{name}/{key}": value for key, value in figures.items()}
            for place, (prompt, said) in enumerate(zip(prompts[:3], written, strict=False)):
                if len(shown) <= place:
                    shown.append({"prompt": prompt, "outputs": {}})
                shown[place]["outputs"][name] = said[0].text
        for name, (plus, minus) in rewards.items():
            context.results[f"{name}/reward_accuracy"] = self.ordered(plus, minus)
        notes = [f"{len(self.test_problems)} held-out prompts, {n} responses to each at temperature 1."] + [
            f"The reward of {name} orders {context.results[f'{name}/reward_accuracy']:.1%} of {len(self.kept)} pairs "
            "right that were kept back."
            for name in rewards
        ]
        columns = [column for column in COLUMNS if column.key in rows[0]]
        return Table("Held-out prompts", columns, rows, notes), {"samples.json": shown}

    def _kl_to(self, base: nn.Module, model: nn.Module, prompts: list[str], written: list[list[Response]]) -> float:
        """KL(model || base), summed over the tokens of a response that the model wrote; mean over responses, nats."""
        rows: list[Row] = [
            (self.coder.prompt(prompt), one.ids) for prompt, said in zip(prompts, written, strict=True) for one in said
        ]
        heads = [head_of(Observed(one, options={"use_cache": False})) for one in (model, base)]
        signals = [head.signals("model") for head in heads]
        total = 0.0
        for start in range(0, len(rows), 64):
            batch = self.run.fabric.to_device(pack_rows(rows[start : start + 64], self.coder.pad))
            at_BT = response_tokens(batch)[0]
            with resting(model), resting(base), self.run.fabric.autocast():
                found = []
                for head, names in zip(heads, signals, strict=True):
                    turn = Turn(names.values())
                    hidden_BTD, layer = opened(head, "model", {k: turn.read(s, batch) for k, s in names.items()})
                    found.append((hidden_BTD[at_BT], layer))
                (mine_ND, mine), (theirs_ND, theirs) = found

                def divergence(mine_CD: Tensor, theirs_CD: Tensor, one: Any = mine, other: Any = theirs) -> Tensor:
                    return ReverseKL()(one.logits(mine_CD), other.logits(theirs_CD))

                total += float(in_chunks(divergence, mine_ND, theirs_ND, vocab_size=len(mine.weight)).sum())
        return total / len(rows)


COLUMNS = [
    Column("parameters", "parameters", ",d"),
    Column("score", "score", ".2f", "higher", "mean score of sampled responses"),
    Column("tokens", "tokens", ".1f", "", "mean length of sampled responses"),
    Column("finished", "finished", ".1%", "higher", "share of responses that end by themselves"),
    Column("kl", "KL to base", ".2f", "", "KL(model || base) of a response, nats"),
]


def response_score(task: ReasoningTask, text: str, problem: Problem) -> float:
    if isinstance(task.puzzle, ArithmeticChain) and task.verifier is task.puzzle:
        return chain_score(task.puzzle, text, problem)
    return judged(task.verifier, text, problem).reward


def unknown_score(text: str, record: Mapping[str, Any]) -> float:
    raise ConfigError("pairs=given: nothing says how right a response is")
