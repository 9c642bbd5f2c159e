"""REDI: learning from a teacher's wrong traces too."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from torch import Tensor

from stillhouse.base.table import Column
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.schedule import linear
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.data.sources import Batches
from stillhouse.losses.preference import dpo_loss, redi_loss, simpo_loss
from stillhouse.metrics.reasoning import collapsed
from stillhouse.objectives.language import TokenCrossEntropy, head_of
from stillhouse.objectives.responses import PairLoss, Pairs
from stillhouse.tasks.reasoning import Corpus, ReasoningSystem, ReasoningTask
from stillhouse.tasks.traces import TracePairs, write_traces


@dataclass(kw_only=True)
class REDI(ReasoningSystem):
    """Reinforcement distillation from teacher data (Xu et al., 2025, arXiv 2505.24850).

    A teacher's traces are sampled and verified; the model is fine-tuned on right ones, then minimises
    -log pi(y_w)/|y_w| + alpha log pi(y_l)/|y_l| over pairs of a right and a wrong trace of the same problem. There is
    no reference model; the loss has no lower bound, and alpha below 1 is what keeps right traces from going down too.
    """

    meta = Meta(
        card=29,
        title="REDI",
        domain="language",
        family="trace SFT + offline preference",
        citation="Xu et al. (2025), Harnessing Negative Signals: Reinforcement Distillation from Teacher Data for LLM "
        "Reasoning, arXiv 2505.24850",
        feedback=("traces", "outcomes"),
        teacher_access="black-box",
        granularity="sequence",
        policy="off-policy",
        elicitation=("labelling", "curation"),
        algorithm=("supervised fine-tuning", "ranking"),
        knowledge="response",
        scheme="offline",
        modality="text",
        stages=3,
    )
    demo: ClassVar[dict[str, Any]] = {
        **ReasoningSystem.demo,
        "teacher": "demo",
        "sft_lr": 3e-4,
        "sft_batch": 32,
        "sft_epochs": 10.0,
        "lr": 1e-4,
        "epochs": 20.0,
    }
    smoke: ClassVar[dict[str, Any]] = {
        "problems": 40,
        "pretrain": 40,
        "max_new_tokens": 16,
        "attempts": 4,
        "sft_epochs": 10.0,
        "sft_batch": 16,
        "batch_size": 8,
        "epochs": 8.0,
        "eval_problems": 10,
        "eval_samples": 2,
    }

    teacher: Annotated[
        str, "directory or hub id of the model that writes traces, SERVER_URL#MODEL, or 'data': the column 'traces'"
    ] = "data"
    attempts: Annotated[int, "traces sampled from the teacher for each problem, at most", Ge(1)] = 8
    teacher_temperature: Annotated[float, "at which the teacher writes", Ge(0)] = 0.6
    objective: Annotated[Literal["redi", "dpo", "simpo"], "loss of the last stage"] = "redi"
    alpha: Annotated[float, "weight of the wrong traces; 0: right ones alone, 1: symmetric", Ge(0), Le(1)] = 0.8
    gamma_n: Annotated[float, "fades the negative term as wrong traces become unlikely; 0 in the paper", Ge(0)] = 0.0
    beta: Annotated[float, "of DPO (best 0.001) and SimPO (best 2)", Gt(0)] = 2.0
    margin: Annotated[float, "SimPO's gamma", Ge(0)] = 1.0
    sft_epochs: Annotated[float, "passes over the right traces", Gt(0)] = 5.0
    sft_lr: Annotated[float, "peak learning rate of that stage", Gt(0)] = 5e-5
    sft_batch: Annotated[int, "traces in its batches", Ge(1)] = 128
    epochs: Annotated[float, "passes over the pairs", Gt(0)] = 1.0
    batch_size: Annotated[int, "pairs in a batch", Ge(1)] = 32
    max_prompt: Annotated[int, "tokens of a prompt; longer ones make no pair", Ge(1)] = 800
    max_response: Annotated[int, "tokens of a trace; longer ones make no pair", Ge(1)] = 19_000
    max_new_tokens: Annotated[int, "longest response", Ge(1)] = 32_768
    lr: Annotated[float, "peak learning rate of the last stage", Gt(0)] = 1e-6
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0)] = 0.1
    weight_decay: Annotated[float, "decoupled weight decay", Ge(0)] = 1e-4

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        corpus = Corpus(
            steps=self.pretrain, flawed=0.5, short=0.3
        )  # of the embedded models: half of it omits an operand
        task = yield from ReasoningTask.prepare(self, run, corpus)
        traces = yield from write_traces(
            task,
            self.teacher,
            attempts=self.attempts,
            temperature=self.teacher_temperature,
            demo=replace(corpus, steps=2 * self.pretrain),
        )
        pairs = TracePairs.read(task, traces, max_prompt=self.max_prompt, max_response=self.max_response)
        sft = yield self._fine_tune(task, pairs)
        student = yield self._refine(task, pairs, sft)
        evaluated = yield task.evaluation(
            {"base": task.base, "sft": sft, "student": student},
            more=partial(pairs.logprobs, most=200),
            columns=[
                Column("chosen_logp", "right traces", ".2f", "", "mean log-probability per token of the right traces"),
                Column("rejected_logp", "wrong traces", ".2f", "", "the same of the wrong traces"),
            ],
        )
        before, after = (
            [evaluated.metrics[f"{name}/{key}"] for key in ("chosen_logp", "rejected_logp", "accuracy")]
            for name in ("sft", "student")
        )
        if collapsed(*zip(before, after, strict=True)):
            run.say("student: right traces became unlikely with the wrong ones, and accuracy fell: lower alpha or lr")

    def _fine_tune(self, task: ReasoningTask, pairs: TracePairs) -> Stage:
        student = Observed(task.load(task.base), name="sft", options={"use_cache": False})
        source = Batches(pairs.right, self.sft_batch, seed=self.seed, collate=task.coder.batch)
        return task.train(
            "sft",
            student,
            TokenCrossEntropy(head_of(student)),
            source=source,
            steps=max(1, round(self.sft_epochs * len(source))),
            lr=self.sft_lr,
            schedule=linear(1.0, 0.0, warmup=self.warmup),
        )

    def _refine(self, task: ReasoningTask, pairs: TracePairs, sft: Artifact) -> Stage:
        student = Observed(task.load(sft), name="student", options={"use_cache": False})
        reference = Observed(task.load(sft), frozen=True, name="reference") if self.objective == "dpo" else None
        loss = PairLoss(
            head_of(student), self._loss, reference=head_of(reference) if reference else None, name=self.objective
        )
        source = Batches(pairs.pairs, self.batch_size, seed=self.seed, collate=pairs.collate)
        return task.train(
            "student",
            student,
            loss,
            source=source,
            steps=max(1, round(self.epochs * len(source))),
            schedule=linear(1.0, 0.0, warmup=self.warmup),
        )

    def _loss(self, p: Pairs) -> Tensor:
        if self.objective == "dpo":
            assert p.ref_w is not None and p.ref_l is not None
            return dpo_loss(p.logp_w, p.logp_l, p.ref_w, p.ref_l, beta=self.beta)
        lengths = (p.logp_w, p.length_w, p.logp_l, p.length_l)
        if self.objective == "simpo":
            return simpo_loss(*lengths, beta=self.beta, gamma=self.margin)
        return redi_loss(*lengths, alpha=self.alpha, gamma_n=self.gamma_n)

    def claims(self) -> list[Claim]:
        variants = {"redi": ("redi", {"alpha": 0.8}), "right traces alone": ("redi", {"alpha": 0.0})}
        central = Claim(
            statement="learning from wrong traces too, at alpha 0.8, gives a model that is right more often than "
            "going on with right traces alone",
            metric="share of sampled answers to held-out problems that are right",
            method="redi",
            baseline="right traces alone",
            variants=variants,
            measure=lambda artifacts: artifacts["evaluation"].metrics["student/accuracy"],
            higher_is_better=True,
            seeds=3,
            budget="equal teacher traces, fine-tuned models, steps, batches and learning rates",
        )
        # Where the loss has taken both kinds of traces down, the asymmetry shows; small rates hide it.
        high = {"lr": 3e-4}
        stability = replace(
            central,
            statement="at a high learning rate the asymmetric loss (alpha 0.8) keeps more accuracy than the symmetric "
            "one",
            baseline="symmetric",
            variants={"redi": ("redi", {**high, "alpha": 0.8}), "symmetric": ("redi", {**high, "alpha": 1.0})},
            scope="consequence",
        )
        return [central, stability]
