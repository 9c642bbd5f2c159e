"""Language tasks that ask how private each token is, keep the private ones from a student, and count what it gave away.

Shapes: N sequences, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor, nn

from stillhouse.audits.exposure import Canary, exposure_audit, next_token_logprobs, read_canaries
from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Audit, Context, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.private_tokens import Beside, Spans, frequency_scores, rule_spans, span_scores
from stillhouse.data.sources import Batches
from stillhouse.losses.tempered import Noise
from stillhouse.metrics.privacy_budget import spent_epsilon
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.models.token_classifier import entity_finder
from stillhouse.models.tokenizers import check_same_tokenizer
from stillhouse.objectives.private import PRIVACY, Draw, PrivateCrossEntropy
from stillhouse.tasks.language import LanguageSystem, LanguageTask
from stillhouse.tasks.secrets import SecretTask, secret_task
from stillhouse.teachers.cache import Numbered

Scorer = Literal["rules", "ner", "ratio", "frequency", "none"]
DEMO = "demo"
SENSITIVITY = 2.0  # by how much two distributions can differ, summed over the outcomes


@dataclass(frozen=True, kw_only=True)
class Detector:
    """How the privacy of tokens is told.

    Args:
        scorer: by ``rules``; by the names that the classifier ``ner`` finds; by the log-``ratio`` of the teacher to a
            model that has not read the text; by the ``frequency`` of what stands before; ``none``: nothing is private.
        ner: directory or hub id of a token classifier; beside the rules, it flags what they miss.
        patterns, around: of the rules: a further regular expression, and tokens flagged on both sides.
        slope, offset: of the ratio: s = sigmoid(slope (log-ratio - offset)).
        ngram, count: of the frequency: s = exp(-count of the n-gram before / count).
        recall: share of tokens whose score is kept, to see what a worse detector costs; others get 0.
    """

    scorer: Scorer
    ner: str | None = None
    patterns: str | None = None
    around: int = 0
    slope: float = 2.0
    offset: float = 2.0
    ngram: int = 3
    count: float = 5.0
    recall: float = 1.0

    def scores(self, found: SecretTask, seed: int) -> Tensor:
        """s of every token of the training windows: (N, T)."""
        task = found.task
        ids_NT = task.windows.train[:]["input_ids"]
        match self.scorer:
            case "rules" | "ner":
                score_NT = span_scores(ids_NT, task.tokenizer, self._spans(task), around=self.around)
            case "frequency":
                score_NT = frequency_scores(ids_NT, n=self.ngram, c=self.count)
            case "ratio":
                score_NT = self._ratio(found)
            case "none":
                return torch.zeros(ids_NT.shape)
        if self.recall == 1:
            return score_NT
        even_NT = torch.rand(ids_NT.shape, generator=torch.Generator().manual_seed(seed))
        return score_NT.where(even_NT < self.recall, 0)

    def _spans(self, task: LanguageTask) -> list[Spans]:
        """What finds private places in a text."""
        found = [rule_spans(self.patterns)] if self.scorer == "rules" else []
        if self.ner is not None:
            remote = task.system.trust_remote_code
            found.append(entity_finder(self.ner, device=task.run.fabric.device, trust_remote_code=remote))
        return found

    def _ratio(self, found: SecretTask) -> Tensor:
        task = found.task
        teacher, other = task.observed_teacher().module, found.reference
        device = task.run.fabric.device
        parts = [
            next_token_logprobs(teacher.to(device).eval(), batch) - next_token_logprobs(other.to(device).eval(), batch)
            for batch in task.batches_of(task.windows.train)
        ]
        ratio_NT = torch.cat(parts).cpu().float()
        return torch.nn.functional.pad(torch.sigmoid(self.slope * (ratio_NT - self.offset)), (1, 0))


@dataclass(kw_only=True)
class PrivacySystem(LanguageSystem):
    """Fields of systems that tell private tokens from others and look for secrets in what they trained."""

    scorer: Annotated[Scorer, "what tells private tokens"] = "rules"
    ner: Annotated[
        str | None, "directory or hub id of a token classifier that finds names, for scorer=ner or beside the rules"
    ] = None
    patterns: Annotated[str | None, "rules: one more regular expression of what is private"] = None
    around: Annotated[int, "rules, ner: tokens on both sides that are flagged too", Ge(0)] = 0
    reference: Annotated[str, "ratio: directory or hub id of a model that has not read the text"] = "demo"
    ratio_slope: Annotated[float, "ratio: k in s = sigmoid(k (log-ratio - b))", Gt(0)] = 2.0
    ratio_offset: Annotated[float, "ratio: b, nats"] = 2.0
    ngram: Annotated[int, "frequency: tokens before that are counted", Ge(1)] = 3
    rare: Annotated[float, "frequency: c in s = exp(-count / c)", Gt(0)] = 5.0
    recall: Annotated[float, "share of tokens whose score is kept: what a worse detector costs", Ge(0), Le(1)] = 1.0
    teacher_epochs: Annotated[float, "passes of the teacher over the text first; 0: it is ready", Ge(0)] = 0.0
    canaries: Annotated[str | None, "JSON lines of prefix and secret: what to look for in the models"] = None
    noise: Annotated[Noise, "on soft targets"] = "laplace"
    noise_scale: Annotated[float, "b of the Laplace noise, or the Gaussian's deviation", Ge(0)] = 0.05
    epsilon: Annotated[float | None, "privacy budget of a token; the scale is then 2 / epsilon", Gt(0)] = None
    noise_on: Annotated[Literal["all", "private"], "tokens with noise; private: its scale times s"] = "all"
    noise_support: Annotated[int | None, "likeliest outcomes that get noise; none: all", Ge(1)] = 20
    noise_draw: Annotated[Draw, "one draw a context of tokens, a place in the text, or anew each step"] = "context"
    noise_context: Annotated[int, "tokens of a context", Ge(1)] = 4
    candidates: Annotated[int, "most candidates a secret is ranked among exactly", Ge(10)] = 10_000
    private_baseline: Annotated[bool, "also train a student by DP-SGD on the text; for small models"] = False
    dp_clip: Annotated[float, "DP-SGD: largest gradient norm of a sequence", Gt(0)] = 1.0
    dp_noise: Annotated[float, "DP-SGD: noise multiplier", Ge(0)] = 1.0
    dp_delta: Annotated[
        float | None, "DP-SGD: also say which epsilon it has spent at this delta (needs opacus)", Gt(0), Lt(1)
    ] = None

    def detector(self) -> Detector:
        """What tells private tokens."""
        if self.scorer == "ner" and self.ner is None:
            raise ConfigError("scorer=ner needs a token classifier: give its directory or hub id as ner")
        return Detector(
            scorer=self.scorer,
            ner=self.ner,
            patterns=self.patterns,
            around=self.around,
            slope=self.ratio_slope,
            offset=self.ratio_offset,
            ngram=self.ngram,
            count=self.rare,
            recall=self.recall,
        )

    def noise_options(self) -> dict[str, Any]:
        """The noise on soft targets, as `SwingTokens` takes it."""
        return {
            "noise": self.noise,
            "scale": self.noise_scale if self.epsilon is None else SENSITIVITY / self.epsilon,
            "by": self.noise_on,
            "support": self.noise_support,
            "draw": self.noise_draw,
            "context": self.noise_context,
            "seed": self.seed,
        }

    def private_student(self, task: LanguageTask) -> Train:
        """The same student trained by DP-SGD on the text; with ``dp_delta`` its figures have the epsilon it spent."""
        options: dict[str, Any] = {"clip": self.dp_clip, "multiplier": self.dp_noise, "seed": self.seed}
        stage = task.train("private", partial(PrivateCrossEntropy, vocab_size=task.vocab_size, **options))
        if self.dp_delta is not None:
            rate, noisy = self.batch_size / len(task.windows.train), stage.steps * self.accumulate
            spent = spent_epsilon(multiplier=self.dp_noise, rate=rate, steps=noisy, delta=self.dp_delta)
            evaluate = stage.evaluate
            stage.evaluate = lambda: {**(evaluate() if evaluate else {}), "epsilon": spent}
        return stage


def privacy_task(system: PrivacySystem, run: Run) -> Generator[Stage, Artifact, SecretTask]:
    """The system's task with its canaries, and the model that has not read the text where one is asked for."""
    reference = system.reference if system.scorer == "ratio" else None
    if system.is_demo():
        return (yield from secret_task(system, run, reference=reference is not None))
    known = tuple(read_canaries(system.canaries)) if system.canaries else ()
    if reference == DEMO:
        raise ConfigError(
            "scorer=ratio needs a model that has not read the text: give its directory or hub id as reference"
        )
    task = yield from LanguageTask.prepare(system, run)
    outside = None
    if reference is not None:
        outside, own = load_causal_lm(reference, trust_remote_code=system.trust_remote_code)
        check_same_tokenizer(task.tokenizer, own)
    return SecretTask(task, known, outside)


def private_tokens(found: SecretTask, detector: Detector) -> Generator[Stage, Artifact, Callable[[Observed], Batches]]:
    """The stage that scores the training text; returns the source of its batches, with scores and sample ids."""
    import datasets
    import pyarrow.parquet as pq

    task = found.task

    def score(context: Context) -> Any:
        score_NT = detector.scores(found, context.seed)
        context.results = {"private": float(score_NT.mean()), "flagged": float((score_NT > 0.5).float().mean())}
        return datasets.Dataset.from_dict({PRIVACY: score_NT.tolist()})

    scored = yield Transform("privacy", score)
    score_NT = torch.tensor(pq.read_table(scored.data_file())[PRIVACY].to_pylist())

    def source(_: Observed) -> Batches:
        batches = task.batches()
        batches.data = Numbered(Beside(batches.data, **{PRIVACY: score_NT}))
        return batches

    return source


def given_away(found: SecretTask, artifacts: Mapping[str, Artifact], evaluation: Artifact, *, most: int) -> Audit:
    """The audit of the teacher and of what stages left, with the perplexities that ``evaluation`` found."""
    task = found.task

    def load() -> dict[str, nn.Module]:
        teacher = task.observed_teacher().module.to(task.run.fabric.device)
        return {"teacher": teacher, **{name: task.load(artifact) for name, artifact in artifacts.items()}}

    names = ("teacher", *artifacts)
    perplexity = {name: evaluation.metrics[f"{name}/perplexity"] for name in names}
    canaries: tuple[Canary, ...] = found.canaries
    return exposure_audit("exposure", load, task.tokenizer, canaries, most=most, perplexity=perplexity)
