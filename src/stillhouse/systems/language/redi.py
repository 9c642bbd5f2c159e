"""REDI: learning from a teacher's wrong traces too."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from annotated_types import Ge, Gt, Le
from torch import Tensor

from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.system import Claim, Meta
from stillhouse.losses.preference import dpo_loss, redi_loss, simpo_loss
from stillhouse.objectives.responses import Pairs
from stillhouse.tasks.experiments import Experiment
from stillhouse.tasks.reasoning import Corpus, ReasoningTask
from stillhouse.tasks.traces import TracePairs, TraceSystem, fell


@dataclass(kw_only=True)
class REDI(TraceSystem):
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
        skill="thinking patterns",
        role="smaller models",
    )
    demo: ClassVar[dict[str, Any]] = {
        **TraceSystem.demo,
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
        # Of what the embedded models learn, half omits an operand.
        corpus = Corpus(steps=self.pretrain, flawed=0.5, short=0.3)
        task = yield from ReasoningTask.prepare(self, run, corpus)
        traces = yield from self.traces(task, demo=replace(corpus, steps=2 * self.pretrain))
        pairs = TracePairs.read(task, traces, max_prompt=self.max_prompt, max_response=self.max_response)
        sft = yield pairs.fine_tune("sft", epochs=self.sft_epochs, batch_size=self.sft_batch, lr=self.sft_lr)
        dpo = self.objective == "dpo"
        student = yield pairs.refine(
            "student", sft, self.objective, self._loss, reference=dpo, epochs=self.epochs, batch_size=self.batch_size
        )
        evaluated = yield pairs.evaluation({"base": task.base, "sft": sft, "student": student})
        if fell(evaluated, before="sft", after="student"):
            run.say("student: right traces became unlikely with the wrong ones, and accuracy fell: lower alpha or lr")

    def _loss(self, p: Pairs) -> Tensor:
        if self.objective == "dpo":
            assert p.ref_w is not None and p.ref_l is not None
            return dpo_loss(p.logp_w, p.logp_l, p.ref_w, p.ref_l, beta=self.beta)
        lengths = (p.logp_w, p.length_w, p.logp_l, p.length_l)
        if self.objective == "simpo":
            return simpo_loss(*lengths, beta=self.beta, gamma=self.margin)
        return redi_loss(*lengths, alpha=self.alpha, gamma_n=self.gamma_n)

    def claims(self) -> list[Claim]:
        budget = "equal teacher traces, fine-tuned models, steps, batches and learning rates"
        low = Experiment("redi", {"redi": {"alpha": 0.8}, "right traces alone": {"alpha": 0.0}}, budget)
        # Where the loss has taken both kinds of traces down, the asymmetry shows; small rates hide it.
        at_high = {"redi": {"lr": 3e-4, "alpha": 0.8}, "symmetric": {"lr": 3e-4, "alpha": 1.0}}
        high = Experiment("redi", at_high, budget)
        share, accuracy = "share of sampled answers to held-out problems that are right", "student/accuracy"
        better = (
            "learning from wrong traces too, at alpha 0.8, gives a model that is right more often than going on with "
            "right traces alone"
        )
        steadier = "at a high learning rate the asymmetric loss (alpha 0.8) keeps more accuracy than the symmetric one"
        return [
            low.claim(better, share, accuracy, "redi", "right traces alone"),
            high.claim(steadier, share, accuracy, "redi", "symmetric", scope="consequence"),
        ]
