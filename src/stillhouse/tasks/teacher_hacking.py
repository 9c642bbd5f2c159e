"""The protocol of teacher hacking: a true model, a teacher that learns from it, a student that learns from the teacher.

The teacher is good, not right; two distances are watched while it teaches, to the teacher (proxy) and to the oracle
(golden).
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from torch import nn

from stillhouse.audits.hacking import Course, departure, figures_of, hacking_table, read_course
from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Batch, Observed
from stillhouse.core.stage import Audit, Context, Stage
from stillhouse.core.train import Train
from stillhouse.data.responses import Coder
from stillhouse.data.windows import WindowSplit
from stillhouse.metrics.sequence_distance import Distance, sequence_js, sequence_kl
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.models.tokenizers import check_same_tokenizer
from stillhouse.rl.policies import PolicySource, Share, packed, prompts_of
from stillhouse.tasks.language import DEMO, LanguageSystem, LanguageTask
from stillhouse.tasks.oracle_language import OracleLanguage, oracle_network
from stillhouse.tasks.pictures import curves_picture
from stillhouse.tasks.policies import Policies, PolicySystem, ShareField, refuse_unread
from stillhouse.teachers.cache import model_fingerprint

UNREAD = (
    "text",
    "teacher_topk",
    "teacher_texts",
    "lm_weight",
    "lm_data",
    "replay",
    "own_responses",
    "baseline",
    "keep",
)

DISTANCES = [
    Column("proxy", "proxy", ".4f", "lower", "KL(teacher || model) of whole responses, nats"),
    Column("golden", "golden", ".4f", "lower", "KL(oracle || model) of whole responses, nats"),
    Column("proxy_js", "proxy JS", ".4f", "lower", "Jensen-Shannon divergence to the teacher, nats a response"),
    Column("golden_js", "golden JS", ".4f", "lower", "Jensen-Shannon divergence to the oracle, nats a response"),
]


@dataclass(kw_only=True)
class HackingSystem(PolicySystem):
    """Fields of the protocol."""

    oracle: Annotated[str, "directory or hub id of the model that stands for the truth"] = DEMO
    oracle_texts: Annotated[int, "training prompts the oracle answers; the rest are the student's", Ge(1)] = 100_000
    teacher_epochs: Annotated[float, "passes of the teacher over the oracle's text; 0: it is ready", Ge(0)] = 3.0
    begin_steps: Annotated[int, "steps of the student on the oracle's text before the teacher comes", Ge(0)] = 1_000
    prompts: Annotated[int | None, "prompts the student learns from; all that are left by default", Ge(1)] = 200_000
    responses: Annotated[int, "responses of the teacher to each of them", Ge(1)] = 1
    fresh: Annotated[bool, "the teacher writes anew whenever a prompt comes by"] = False
    on_policy: ShareField = 0.0
    evaluations: Annotated[int, "how often both distances are measured during training", Ge(2)] = 30
    early: Annotated[float, "share of the evaluations to which the proxy's law is fitted", Gt(0), Lt(1)] = 0.25
    tolerance: Annotated[float, "how far above its law the proxy may be, in logarithms", Gt(0), Le(2)] = 0.1
    steps: Annotated[int | None, "optimizer steps; by default as many as the epochs need", Ge(1)] = 390_625
    batch_size: Annotated[int, "sequences in a micro-batch, all processes together", Ge(1)] = 32
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 3e-4
    lr_schedule: Annotated[Literal["cosine", "linear", "wsd", "constant"], "course of the learning rate"] = "constant"
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0), Lt(1)] = 2.56e-4
    prompt_tokens: Annotated[int, "tokens of plain text that are a prompt; conversations have their own", Ge(1)] = 1024
    new_tokens: Annotated[int, "longest response that is written", Ge(1)] = 128

    def refuse_unread(self) -> None:
        """A `ConfigError` that names the inherited fields which are set though the protocol has no use for them."""
        values = vars(self)
        own = values["own_divergence"]
        refuse_unread(
            self,
            UNREAD,
            "its student learns from the teacher's responses (prompts, responses, fresh) or its own (on_policy) alone",
            also=[f"own_divergence={own} without on_policy"] if own is not None and not values["on_policy"] else [],
        )


def recipe_of(system: LanguageSystem) -> dict[str, Any]:
    """What else decides what a stage of training leaves."""
    names = ("seed", "lr", "lr_schedule", "warmup", "weight_decay", "beta2", "clip", "batch_size", "accumulate", "lora")
    return {name: getattr(system, name) for name in (*names, "lora_alpha")}


def oracle_of(name: str, task: LanguageTask) -> nn.Module:
    """The oracle: a directory or hub id, or that of the embedded language."""
    if name == DEMO:
        if not task.system.is_demo():
            raise ConfigError("oracle=demo knows the embedded language only; give the oracle's directory or hub id")
        return oracle_network(OracleLanguage(), seed=task.system.seed)
    model, tokenizer = load_causal_lm(name, trust_remote_code=task.system.trust_remote_code)
    check_same_tokenizer(task.tokenizer, tokenizer)
    return model.to(task.run.fabric.device).eval()


def with_prompts(task: LanguageTask, first: int, count: int | None, *, times: int = 1) -> LanguageTask:
    """The task with some of its training prompts, each ``times`` in a row."""
    whole = task.windows
    places = range(first, len(whole.train) if count is None else min(len(whole.train), first + count))
    if not places:
        raise ConfigError(
            f"{len(whole.train):,} training sequences, of which the first {first:,} are the oracle's: none is left for "
            "the student; lower oracle_texts or give more data"
        )
    rows = whole.train[[place for place in places for _ in range(times)]]
    mark = f"{whole.fingerprint} {places.start}:{places.stop} x{times}"
    return replace(task, windows=replace(whole, train=WindowSplit(rows), fingerprint=mark))


def fresh_text(policies: Policies, student: Observed, *, fresh: bool, on_policy: float) -> Any:
    """Batches for the student: the teacher's text, fixed or written anew at every visit, and the student's own."""
    system, source = policies.system, policies.texts
    steps = (system.steps or policies.task.steps_of(system.epochs)) * system.accumulate
    common: dict[str, Any] = {"pad": policies.coder.pad, "prompt": system.prompt_tokens, "steps": steps}
    if fresh and on_policy < 1:
        teacher = policies.sampler(policies.task.teacher.to(policies.task.run.fabric.device))
        source = PolicySource(source, teacher, Share(1.0), seed=system.seed, **common)  # type: ignore[assignment]
    if on_policy:
        writer = policies.student_writer(student)
        return PolicySource(source, writer, Share(on_policy), seed=system.seed + 1, **common)
    return source


@dataclass
class Protocol:
    """The three models and what is measured of a student.

    ``drawn``: responses of oracle and teacher to held-out prompts, the same for all measurements.
    """

    policies: Policies
    oracle: nn.Module
    prompts: int
    drawn: dict[str, list[Batch]] = field(default_factory=dict)

    @staticmethod
    def of(system: PolicySystem, task: LanguageTask, oracle: str) -> Protocol:
        """The protocol before anything has been learnt."""
        policies = Policies(system, task, Coder(task.tokenizer), task.batches())
        return Protocol(policies, oracle_of(oracle, task), system.own_prompts)

    @property
    def task(self) -> LanguageTask:
        return self.policies.task

    def begin(self, texts: int, teacher_epochs: float, begin_steps: int) -> Generator[Stage, Artifact, None]:
        """Oracle text; the teacher that learns from it; the student's beginning. The teacher is then the task's."""
        task, policies = self.task, self.policies
        told = replace(policies, task=with_prompts(replace(task, teacher=self.oracle), 0, texts))
        stage = told.teacher_texts()
        stage.name = "oracle-text"
        text = yield stage
        if teacher_epochs:
            steps = told.task.steps_of(teacher_epochs)
            large = replace(task, new_student=lambda: deepcopy(task.teacher).float().requires_grad_(True))
            taught = large.train("teacher", task.cross_entropy, steps=steps, source=lambda _: told.batches_of(text))
            taught.evaluate = partial(self.golden_only, taught)
            taught.best = None
            begun = model_fingerprint(task.teacher)
            taught.cache = {"begun": begun, "text": text.fingerprint, "steps": steps, **recipe_of(task.system)}
            task.teacher = task.load((yield taught))
        if begin_steps:
            first = task.train("begin", task.cross_entropy, steps=begin_steps, source=lambda _: told.batches_of(text))
            first.evaluate = partial(self.golden_only, first)
            first.best = None
            task.begin_as((yield first))

    def student_text(self, after: int, prompts: int | None, responses: int) -> Generator[Stage, Artifact, Policies]:
        """Whose text the student learns from: the teacher writes ``responses`` to each of so many prompts."""
        policies = replace(self.policies, task=with_prompts(self.task, after, prompts, times=responses))
        policies.texts = policies.batches_of((yield policies.teacher_texts()))
        return policies

    def watch(self, stage: Train, evaluations: int) -> Train:
        """Let a stage of the student measure both distances so many times."""
        stage.evaluate = partial(self.distances, _model_of(stage))
        stage.eval_every = max(1, stage.steps // evaluations)
        stage.best = None
        return stage

    # -- measurements -----------------------------------------------------------------------------------------------

    def written_by(self, model: nn.Module) -> list[Batch]:
        """Responses of a model to the held-out prompts, at temperature 1 whatever else is sampled at."""
        task = self.task
        count = min(self.prompts, len(task.windows.validation))
        prompts = prompts_of(task.windows.validation[list(range(count))], self.policies.system.prompt_tokens)
        seed = 7_919 + task.system.seed
        written = replace(self.policies.sampler(model, temperature=1.0), top_p=1.0).write(prompts, seed=seed)
        return list(map(task.run.fabric.to_device, packed(prompts, written, pad=self.policies.coder.pad, size=64)))

    def truth(self, name: str) -> tuple[nn.Module, list[Batch]]:
        """ "oracle" or "teacher", and what it wrote."""
        model = self.oracle if name == "oracle" else self.task.teacher
        model = model.to(self.task.run.fabric.device).eval()
        if name not in self.drawn:
            self.drawn[name] = self.written_by(model)
        return model, self.drawn[name]

    def kl(self, name: str, model: nn.Module) -> Distance:
        first, drawn = self.truth(name)
        return sequence_kl(first, model, drawn, vocab_size=self.task.vocab_size)

    def golden_only(self, stage: Train) -> dict[str, float]:
        return {"golden": self.kl("oracle", _model_of(stage)).mean}

    def distances(self, model: nn.Module) -> dict[str, float]:
        """The figures watched during training."""
        proxy = self.kl("teacher", model)
        return {"proxy": proxy.mean, "golden": self.kl("oracle", model).mean, "proxy_per_token": proxy.per_token}

    def measured(self, model: nn.Module) -> dict[str, float]:
        """The figures of the final table: both KLs, and both Jensen-Shannon divergences."""
        found = self.distances(model)
        own = self.written_by(model)
        for label, name in (("proxy_js", "teacher"), ("golden_js", "oracle")):
            first, drawn = self.truth(name)
            found[label] = sequence_js(first, model, drawn, own, vocab_size=self.task.vocab_size).mean
        return found


def _model_of(stage: Train) -> nn.Module:
    assert not callable(stage.players) and not isinstance(stage.players, Sequence)
    return stage.players.trained[0].module


# -- the audit --------------------------------------------------------------------------------------------------------


def hacking_report(
    courses: Sequence[Course], *, window: float = 0.25, tolerance: float = 0.1
) -> tuple[Table, dict[str, Any]]:
    """The table of `hacking_table`, with pictures: the proxy and its law, and golden over proxy where it is known."""
    table = hacking_table(courses, window=window, tolerance=tolerance)
    files: dict[str, Any] = {"curves.json": {course.stage: dict(course.figures) for course in courses}}
    laws: dict[str, Any] = {}
    for course in courses:
        if course.proxy is None:
            continue
        curve = [(x, y) for x, y in course.figures[course.proxy] if x > 0 and y > 0]
        laws[f"{course.stage}: {course.proxy}"] = curve
        found = departure(curve, window=window, tolerance=tolerance)
        if found is not None:
            laws[f"{course.stage}: law of the first {found.window}"] = [(x, found.law.at(x)) for x, _ in curve]
    if any(laws.values()):
        files["proxy-and-its-law.svg"] = curves_picture(
            {name: curve for name, curve in laws.items() if curve}, x="step", y="proxy", log_x=True, log_y=True
        )
    golden = {
        course.stage: [(x, y) for (_, x), (_, y) in zip(course.figures["proxy"], course.figures["golden"], strict=True)]
        for course in courses
        if "proxy" in course.figures and "golden" in course.figures
    }
    if golden:
        files["golden-over-proxy.svg"] = curves_picture(
            golden, x="proxy: distance to the teacher (training goes to the left)", y="golden: distance to the oracle"
        )
    return table, files


def hacking_audit(name: str, stages: Mapping[str, Artifact], **options: float) -> Audit:
    """The audit of finished training stages as a stage of a run."""

    def audit(context: Context) -> tuple[Table, dict[str, Any]]:
        found = [read_course(label, artifact.path.parent / "metrics.jsonl") for label, artifact in stages.items()]
        table, files = hacking_report([course for course in found if course is not None], **options)
        context.results = figures_of(table)
        return table, files

    return Audit(name, audit)
