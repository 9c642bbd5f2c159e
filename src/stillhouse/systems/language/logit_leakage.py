"""Logit leakage: what an interface's logits give away of the model behind it, and the clone that grows from it."""

from __future__ import annotations

import base64
from collections.abc import Generator
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import pyarrow.parquet as pq
import torch
from annotated_types import Ge, Gt
from safetensors.torch import load_file, save_file

from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Audit, Context, Evaluate, Generate, Stage, Transform
from stillhouse.core.system import Claim, Meta
from stillhouse.losses.divergences import ForwardKL
from stillhouse.metrics.representations import linear_cka, procrustes_match
from stillhouse.models.head_recovery import with_frozen_head
from stillhouse.objectives.cached import CachedTokenMatch
from stillhouse.objectives.language import TokenMatch, head_of
from stillhouse.tasks.language import LanguageSystem, LanguageTask
from stillhouse.tasks.leakage import defences, random_prompts, read_leak, recover, true_cosines
from stillhouse.teachers.logit_api import LogitAPI, QueryBudget


@dataclass(kw_only=True)
class LogitLeakage(LanguageSystem):
    """Clone what you can't steal: black-box LLM replication via logit leakage (Gharami et al., 2025, arXiv 2509.00973).

    Answers of an interface span the column space of its output matrix: an SVD finds its width and the matrix up to an
    invertible map. A shallower student wears it, frozen, and learns its blocks from tau^2 KL + ``labels`` CE. For
    models one may test: the defence audit says how much less an interface leaks when it shows less.
    """

    meta = Meta(
        card=24,
        title="Clone via logit leakage",
        domain="language",
        family="black-box extraction, logit KD",
        citation="Gharami, Aluvihare, Moni and Peköz (2025), Clone What You Can't Steal: Black-Box LLM Replication via "
        "Logit Leakage and Distillation, IEEE TPS-ISA 2025, arXiv 2509.00973",
        feedback="logits",
        teacher_access="black-box",
        algorithm="divergence",
        stages=5,
        role="smaller models",
    )
    demo: ClassVar = {
        **LanguageSystem.demo,
        "queries": 450,
        "student": "layers=3",
        "temperature": 1.0,
        "audit_top_k": 64,
    }
    smoke: ClassVar = {"queries": 60, "prompt_tokens": 6, "student": "layers=1", "audit_top_k": 8}

    student: Annotated[str, "how deep the clone is: layers=4, layers=6; its width is what the answers show"] = (
        "layers=4"
    )
    queries: Annotated[int, "random prompts; more than the model is wide, better twice as many", Ge(4)] = 10_000
    prompt_tokens: Annotated[int, "tokens of a random prompt", Ge(1)] = 16
    shows: Annotated[Literal["logits", "log-probs"], "what the interface answers with"] = "logits"
    top_k: Annotated[int | None, "entries an answer shows; the bias brings the others into view; none: all", Ge(2)] = (
        None
    )
    decimals: Annotated[int | None, "decimals the interface rounds to", Ge(0)] = None
    bias: Annotated[float, "logit bias that brings tokens into view", Gt(0)] = 100.0
    budget: Annotated[int | None, "most calls to the interface", Ge(1)] = None
    width: Annotated[int | None, "the model's width, where it is known; else found", Ge(1)] = None
    sketch: Annotated[
        int | None, "buckets that tokens are summed in before the SVD; by itself if V is large", Ge(2)
    ] = None
    head: Annotated[
        Literal["recovered", "random", "trained"],
        "the clone's output matrix: recovered, random, recovered and trained on",
    ] = "recovered"
    temperature: Annotated[float, "softens both distributions", Gt(0)] = 2.0
    labels: Annotated[float, "weight of the text's own tokens", Ge(0)] = 0.1
    audit: Annotated[bool, "also tabulate what limits of the interface hold back"] = True
    audit_top_k: Annotated[int, "entries shown in the audit's limited interfaces", Ge(2)] = 20

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from LanguageTask.prepare(self, run)
        api = LogitAPI(
            task.teacher.to(run.fabric.device),
            task.vocab_size,
            shows=self.shows,
            top_k=self.top_k,
            decimals=self.decimals,
            budget=QueryBudget(self.budget),
        )
        prompts = random_prompts(self.queries, self.prompt_tokens, task.vocab_size, seed=self.seed)
        ask = partial(self._ask, api)
        answers = yield Generate("queries", {str(number): prompt for number, prompt in enumerate(prompts)}, ask)
        head = yield Transform("recovery", partial(self._recover, task, answers))
        matrix = load_file(head.path / "head.safetensors")["head"]
        if self.head == "random":
            generator = torch.Generator().manual_seed(self.seed)
            matrix = torch.randn(matrix.shape, generator=generator) * matrix.square().mean().sqrt()
        frozen, spec, config = self.head != "trained", self.student, task.teacher.config
        task.new_student = lambda: with_frozen_head(spec, config, matrix, frozen=frozen, seed=self.seed)
        kept = yield from read_leak(task, self.top_k)
        stage = task.train("student", partial(self._objective, task, kept))
        if kept is not None:
            stage.source = kept.numbered(stage.source)
        models = {"student": (yield stage)}
        if self.baseline:
            models["baseline"] = yield task.baseline()
        yield task.evaluation(models)
        yield Evaluate("geometry", partial(self._geometry, task, models))
        if self.audit:
            yield Audit("defences", partial(defences, task, top_k=self.audit_top_k, prompts=prompts))

    def _ask(self, api: LogitAPI, prompt: list[int]) -> dict[str, Any] | None:
        if not api.budget.allows(api.calls_for_all()):
            return None
        values = api.everything(prompt, bias=self.bias).numpy().astype("<f8")
        return {"calls": api.calls_for_all(), "values": base64.b64encode(values.tobytes()).decode()}

    def _recover(self, task: LanguageTask, answers: Artifact, context: Context) -> None:
        file = answers.data_file()
        found = recover(file, task.vocab_size, rank=self.width, sketch=self.sketch, seed=self.seed)
        cosines = true_cosines(task.teacher, found.weight, task.vocab_size)
        context.results = {
            "width": found.rank,
            "gap": found.gap,
            "cosine": float(cosines.mean()),
            "calls": float(sum(pq.read_table(file, columns=["calls"])["calls"].to_pylist())),
        }

        def save(_: Any, folder: Any) -> None:
            save_file({"head": found.weight.float(), "singular": found.singular}, folder / "head.safetensors")

        context.save(None, saver=save, files={"recovery.json": context.results})

    def _objective(self, task: LanguageTask, kept: Any, student: Observed) -> Objective:
        loss = ForwardKL(temperature=self.temperature)
        options: dict[str, Any] = {"cross_entropy": self.labels, "vocab_size": task.vocab_size}
        if kept is not None:
            return CachedTokenMatch(head_of(student), kept.teacher, loss, **options)
        return TokenMatch(head_of(student), head_of(task.observed_teacher()), loss, **options)

    def _geometry(self, task: LanguageTask, artifacts: dict[str, Artifact], context: Context) -> Table:
        victim = head_of(task.observed_teacher()).hidden
        states = {name: head_of(Observed(task.load(a), frozen=True)).hidden for name, a in artifacts.items()}
        batches = list(task.batches_of(task.windows.validation, self.eval_windows))
        theirs = torch.cat([victim(batch).flatten(0, 1) for batch in batches])
        rows: list[dict[str, Any]] = []
        for name, signal in states.items():
            ours = torch.cat([signal(batch).flatten(0, 1) for batch in batches])
            rows.append({"name": name, "match": procrustes_match(theirs, ours), "cka": linear_cka(theirs, ours)})
        context.results = {f"{row['name']}/{key}": float(row[key]) for row in rows for key in ("match", "cka")}
        columns = [Column("match", "Procrustes match", ".1%", "higher"), Column("cka", "linear CKA", ".3f", "higher")]
        return Table("Hidden states before the head, against the victim's", columns, rows)

    def claims(self) -> list[Claim]:
        common = {"student": "layers=1", "window": 64, "epochs": 0.5, "baseline": False}
        cloned = {**common, "audit": False}
        central = Claim(
            statement="a student whose frozen output matrix was recovered from logits agrees with the model behind the "
            "interface more often than one with a random frozen matrix",
            metric="share of held-out tokens with the same most likely next token",
            method="recovered",
            baseline="random",
            variants={
                "recovered": ("logit-leakage", cloned),
                "random": ("logit-leakage", {**cloned, "head": "random"}),
            },
            measure=lambda artifacts: artifacts["evaluation"].metrics["student/agreement"],
            higher_is_better=True,
            seeds=3,
            budget="equal queries, steps, batches and initial blocks",
        )
        text = {"recovered": central.variants["recovered"], "text": ("sft", common)}
        alone = (
            "the clone agrees with the model behind the interface more often than its like trained on the text alone"
        )
        return [central, replace(central, statement=alone, baseline="text", variants=text, scope="consequence")]
