"""One family: a divergence between student and teacher, on text that the data, the teacher or the student wrote.

L = E_x E_{y ~ pi_mix} sum_t D(p_T(.|x, y_<t), p_theta(.|x, y_<t)), pi_mix = share * student + (1 - share) * text, as
the survey of on-policy distillation (card 151) puts it. A member says which divergence, which text, which share; it is
a configuration of `PolicySystem`, and overrides ``objective`` or ``chooser`` where it goes beyond.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le, Lt
from torch import nn

from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Column
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Generate, Stage
from stillhouse.data.responses import Coder, Row, pack_rows
from stillhouse.data.sources import Batches
from stillhouse.losses.divergences import (
    AlphaBeta,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    RowDivergence,
    SkewedForwardKL,
    SkewedReverseKL,
    TotalVariation,
)
from stillhouse.metrics.language import compare_causal_lms
from stillhouse.objectives.language import TokenCrossEntropy, TokenMatch, head_of
from stillhouse.rl.policies import Chooser, PolicySource, Share, prompts_of
from stillhouse.rl.sampling import LiveSampler, ServerSampler, Writer
from stillhouse.tasks.language import LanguageSystem, LanguageTask
from stillhouse.teachers.cache import model_fingerprint

Divergence = Literal["forward-kl", "reverse-kl", "jsd", "tvd", "skew-forward", "skew-reverse", "alpha-beta", "labels"]
DivergenceField = Annotated[Divergence, "between teacher and student, token by token; labels: the text's tokens alone"]
OwnDivergenceField = Annotated[Divergence | None, "the same on text the student wrote; by default no other"]
SkewField = Annotated[float, "share of the first side in a skewed KL's mixture; alpha-beta: the exponent of p"]
TextField = Annotated[Literal["data", "teacher"], "whose text the student's own is mixed with"]
ShareField = Annotated[float, "share of batches that the student writes itself", Ge(0), Le(1)]
TeacherShareField = Annotated[float, "share of the teacher in every token the student writes", Ge(0), Lt(1)]
ReplayField = Annotated[int, "responses kept to be used again; 0: the student always writes anew", Ge(0)]
LanguageLossField = Annotated[float, "weight of the cross-entropy on the data's text beside the student's own", Ge(0)]
BeamsField = Annotated[int, "width of the teacher's beam search; 1 samples", Ge(1)]

WRITTEN_TOGETHER = 32  # responses of a teacher

OWN_TEXT = [
    Column(
        "own_kl", "own-text KL", ".3f", "lower", "mean KL(model || teacher) per token of the model's own text, nats"
    ),
    Column(
        "own_nll", "teacher's loss", ".3f", "lower", "the teacher's mean loss on the model's own text, nats a token"
    ),
    Column("distinct", "distinct 4-grams", ".1%", "higher", "share of different 4-grams in the model's own text"),
]


@dataclass(kw_only=True)
class PolicySystem(LanguageSystem):
    """Fields of the members of the family; by themselves they are forward KL on the data's text."""

    divergence: DivergenceField = "forward-kl"
    beta: Annotated[float, "jsd: share of the teacher in the mixture; alpha-beta: the exponent of q"] = 0.5
    skew: SkewField = 0.1
    own_divergence: OwnDivergenceField = None
    temperature: Annotated[float, "softens both distributions", Gt(0)] = 1.0
    text: TextField = "data"
    on_policy: ShareField = 0.0
    prompt_tokens: Annotated[int, "tokens of plain text that are a prompt; conversations have their own", Ge(1)] = 64
    new_tokens: Annotated[int, "longest response that is written", Ge(1)] = 448
    sampling_temperature: Annotated[float, "of what is written; 0 takes the likeliest token", Ge(0)] = 1.0
    top_p: Annotated[float, "nucleus of what is written", Gt(0), Le(1)] = 1.0
    teacher_share: TeacherShareField = 0.0
    replay: ReplayField = 0
    lm_weight: LanguageLossField = 0.0
    beams: BeamsField = 1
    teacher_texts: Annotated[
        int | None, "responses the teacher writes with text=teacher; by default one a window", Ge(1)
    ] = None
    server: Annotated[
        str | None, "OpenAI-compatible server that writes for the student (vLLM): URL#MODEL; its weights may be stale"
    ] = None
    own_prompts: Annotated[int, "held-out prompts that models go on from, for the final table", Ge(1)] = 64

    demo: ClassVar[dict[str, Any]] = {**LanguageSystem.demo, "prompt_tokens": 32, "new_tokens": 96, "baseline": False}
    smoke: ClassVar[dict[str, Any]] = {"prompt_tokens": 6, "new_tokens": 8, "own_prompts": 4}

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from LanguageTask.prepare(self, run)
        policies = yield from Policies.prepare(self, task)

        def objective(student: Observed) -> Objective:
            return self.with_text(self.objective(task, student), task, student)

        stage = task.train("student", objective, source=policies.source)
        models = {"student": (yield stage)}
        if self.baseline:
            models["baseline"] = yield task.baseline()
        yield task.evaluation(models, more=policies.own_text, columns=OWN_TEXT)

    def objective(self, task: LanguageTask, student: Observed) -> Objective:
        """What the student minimises on a batch, whoever wrote it."""
        if self.divergence == "labels":
            return TokenCrossEntropy(head_of(student), vocab_size=task.vocab_size)
        teacher = head_of(task.observed_teacher())

        def match(name: Divergence, rows: str | None) -> TokenMatch:
            divergence = self.row_divergence(name)
            return TokenMatch(head_of(student), teacher, divergence, rows=rows, vocab_size=task.vocab_size)

        if self.own_divergence is None:
            return match(self.divergence, None)
        return match(self.divergence, "given") + match(self.own_divergence, "own")

    def with_text(self, objective: Objective, task: LanguageTask, student: Observed) -> Objective:
        """``objective`` and the cross-entropy on the data's text beside it, where that has a weight."""
        if not self.lm_weight or self.chooser() == Share(0.0):
            return objective
        head = head_of(student.view("text"))
        return objective + self.lm_weight * TokenCrossEntropy(head, vocab_size=task.vocab_size, entry="text")

    def chooser(self) -> Chooser:
        """Decides whose text a batch is."""
        return Share(self.on_policy)

    def row_divergence(self, name: Divergence) -> RowDivergence:
        """The divergence of a name, with the fields' parameters."""
        T = self.temperature
        try:
            match name:
                case "reverse-kl":
                    return ReverseKL(temperature=T)
                case "jsd":
                    return JensenShannon(beta=self.beta, temperature=T)
                case "tvd":
                    return TotalVariation(temperature=T)
                case "skew-forward":
                    return SkewedForwardKL(alpha=self.skew, temperature=T)
                case "skew-reverse":
                    return SkewedReverseKL(alpha=self.skew, temperature=T)
                case "alpha-beta":
                    return AlphaBeta(alpha=self.skew, beta=self.beta, temperature=T)
                case _:
                    return ForwardKL(temperature=T)
        except ValueError as error:
            raise ConfigError(f"divergence={name}: {error}") from error


@dataclass
class Policies:
    """Who writes what in a run of the family."""

    system: PolicySystem
    task: LanguageTask
    coder: Coder
    texts: Batches  # what the student's own text is mixed with

    @staticmethod
    def prepare(system: PolicySystem, task: LanguageTask) -> Generator[Stage, Artifact, Policies]:
        """With text=teacher this yields the stage in which the teacher writes."""
        coder = Coder(task.tokenizer)
        if system.packing and system.chooser() != Share(0.0):
            raise ConfigError("packing=true: a window of several conversations has no one prompt to go on from")
        policies = Policies(system, task, coder, task.batches())
        if system.text == "teacher":
            policies.texts = policies.batches_of((yield policies.teacher_texts()))
        return policies

    def sampler(self, model: nn.Module, *, temperature: float | None = None, **options: Any) -> LiveSampler:
        """Writes with ``model`` as it is when asked."""
        return LiveSampler(
            model,
            self.coder,
            self.system.new_tokens,
            temperature=self.system.sampling_temperature if temperature is None else temperature,
            top_p=self.system.top_p,
            autocast=self.task.run.fabric.autocast,
            **options,
        )

    def student_writer(self, student: Observed) -> Writer:
        """The student in this process, or the server that stands for it."""
        if self.system.server is None:
            teacher = self.task.teacher if self.system.teacher_share else None
            return self.sampler(
                student.module, sharded=[student.tapped], teacher=teacher, teacher_share=self.system.teacher_share
            )
        if self.system.teacher_share:
            raise ConfigError("teacher_share needs both models in one process, so it does not go with server=...")
        url, mark, name = self.system.server.partition("#")
        if not mark:
            raise ConfigError(
                f"server={self.system.server!r}: write URL#MODEL, such as http://localhost:8000/v1#student"
            )
        return ServerSampler(
            url, name, self.coder, self.system.new_tokens, self.system.sampling_temperature, self.system.top_p
        )

    def source(self, student: Observed) -> Any:
        """Batches for ``student``."""
        system, chooser = self.system, self.system.chooser()
        if isinstance(chooser, Share) and not chooser.share:
            return self.texts
        steps = (system.steps or self.task.steps_of(system.epochs)) * system.accumulate

        def held_out() -> float:
            return self.task.selection_figures(student.module)["selection_loss"]

        return PolicySource(
            self.texts,
            self.student_writer(student),
            chooser,
            pad=self.coder.pad,
            prompt=system.prompt_tokens,
            steps=steps,
            capacity=system.replay,
            watch=held_out if system.replay else None,
            watch_every=max(1, steps // 10),
            beside=self.task.batches() if system.lm_weight else None,
            seed=system.seed,
        )

    # -- the teacher's text -----------------------------------------------------------------------------------------

    def teacher_texts(self) -> Generate:
        """The stage in which the teacher goes on from the training text's prompts, a batch at a time."""
        system, train = self.system, self.task.windows.train
        count = min(len(train), system.teacher_texts or len(train))
        prompts = prompts_of(train[list(range(count))], system.prompt_tokens)
        teacher = self.sampler(self.task.teacher.to(self.task.run.fabric.device), beams=system.beams)

        def write(left: Mapping[str, list[int]]) -> Iterator[tuple[str, dict[str, Any]]]:
            for start in range(0, count, WRITTEN_TOGETHER):
                group = range(start, min(count, start + WRITTEN_TOGETHER))
                if not any(str(number) in left for number in group):
                    continue
                # The whole group, whatever is left of it: what is drawn for one depends on the others.
                written = teacher.write([prompts[number] for number in group], seed=system.seed * 1_000_003 + start)
                for number, response in zip(group, written, strict=True):
                    if str(number) in left:
                        record = {"prompt": prompts[number], "response": list(response.ids), "text": response.text}
                        yield str(number), record

        kept = {
            "teacher": model_fingerprint(self.task.teacher),
            "windows": self.task.windows.fingerprint,
            "how": [
                count,
                system.prompt_tokens,
                system.new_tokens,
                system.sampling_temperature,
                system.top_p,
                system.beams,
                system.seed,
            ],
        }
        requests = {str(number): prompt for number, prompt in enumerate(prompts)}
        return Generate("teacher-text", requests, write, together=True, cache=kept)

    def batches_of(self, written: Artifact) -> Batches:
        """What a teacher wrote, as batches."""
        import pyarrow.parquet as pq

        records = pq.read_table(written.data_file(), columns=["prompt", "response"]).to_pylist()
        rows = [(record["prompt"], record["response"]) for record in records]
        return Batches(
            rows,
            self.system.batch_size,
            seed=self.system.seed,
            collate=lambda picked: pack_rows(picked, self.coder.pad),
        )

    # -- the models' own text ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def own_text(self, model: nn.Module) -> dict[str, float]:
        """How far a model is from the teacher on what it writes itself, after held-out prompts.

        The sum of ``own_kl`` over a response is an unbiased estimate of the sequences' KL(model || teacher).
        """
        device, held_out = self.task.run.fabric.device, self.task.windows.validation
        count = min(self.system.own_prompts, len(held_out))
        prompts = prompts_of(held_out[list(range(count))], self.system.prompt_tokens)
        written = self.sampler(model, temperature=1.0).write(prompts, seed=self.system.seed)
        rows: list[Row] = [(prompt, one.ids) for prompt, one in zip(prompts, written, strict=True)]
        parts = (pack_rows(rows[start : start + 8], self.coder.pad) for start in range(0, count, 8))
        batches = map(self.task.run.fabric.to_device, parts)
        models = {"teacher": self.task.teacher.to(device), "model": model}
        found = compare_causal_lms(models, batches, vocab_size=self.task.vocab_size, reference="teacher")
        grams = [one.ids[start : start + 4] for one in written for start in range(len(one.ids) - 3)]
        return {
            "own_kl": found["model"].reverse_kl,
            "own_nll": found["teacher"].loss,
            "distinct": len(set(grams)) / max(1, len(grams)),
        }
