"""One family: a divergence between student and teacher, on text that the data, the teacher or the student wrote.

L = E_x E_{y ~ pi_mix} sum_t D(p_T(.|x, y_<t), p_theta(.|x, y_<t)), pi_mix = share * student + (1 - share) * text, as
the survey of on-policy distillation (card 151) puts it. A member says which divergence, which text, which share; it is
a configuration of `PolicySystem`, and overrides ``objective`` or ``chooser`` where it goes beyond.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
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
from stillhouse.data.responses import Coder, pack_rows, response_tokens
from stillhouse.data.sources import Batches
from stillhouse.data.text import load_text
from stillhouse.data.windows import conversation_windows
from stillhouse.losses.divergences import (
    AlphaBeta,
    ForwardKL,
    JensenShannon,
    ReverseKL,
    RowDivergence,
    SkewedForwardKL,
    SkewedReverseKL,
    ToDi,
    TotalVariation,
)
from stillhouse.metrics.diversity import diversity
from stillhouse.metrics.language import compare_causal_lms
from stillhouse.objectives.cached import CachedTokenMatch
from stillhouse.objectives.language import TokenCrossEntropy, TokenMatch, head_of
from stillhouse.objectives.responses import response_logprobs
from stillhouse.rl.policies import Chooser, PolicySource, ReusedText, Share, packed, prompts_of
from stillhouse.rl.sampling import LiveSampler, ServerSampler, Writer, resting
from stillhouse.tasks.language import LanguageSystem, LanguageTask, endpoint_of, windows_of
from stillhouse.tasks.language_cache import teacher_from_cache
from stillhouse.teachers.answers import Request, Sampling
from stillhouse.teachers.cache import Numbered, model_fingerprint
from stillhouse.teachers.endpoint import EndpointTeacher
from stillhouse.teachers.scorer import EndpointScorer, Scored, given_teacher

Divergence = Literal[
    "forward-kl", "reverse-kl", "jsd", "tvd", "skew-forward", "skew-reverse", "alpha-beta", "todi", "labels"
]
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

DIVERSITY = [
    Column("different", "different", ".1%", "higher", "share of different responses among those to one prompt"),
    Column("distinct_1", "distinct-1", ".1%", "higher", "share of different tokens in the responses to one prompt"),
    Column("distinct_2", "distinct-2", ".1%", "higher", "share of different pairs of tokens in them"),
    Column("self_bleu", "self-BLEU", ".3f", "lower", "how much of a response is in the others to the same prompt"),
    Column("own_entropy", "entropy", ".3f", "higher", "of a response given its prompt, nats a token"),
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
    accept: Annotated[
        int | None,
        "speculative KD: a token of the student's that is not among the teacher's so many likeliest the teacher draws "
        "anew (25 in the paper)",
        Ge(1),
    ] = None
    replay: ReplayField = 0
    lm_weight: LanguageLossField = 0.0
    lm_data: Annotated[str | None, "other text for lm_weight: file, folder or hub data set; by default the data's"] = (
        None
    )
    beams: BeamsField = 1
    teacher_topk: Annotated[
        int | None,
        "learn from the teacher's likeliest tokens: asked once and kept on disk, for a teacher of one's own and the "
        "data's text; of a teacher behind an endpoint it is how many are asked for (20 by default)",
        Ge(1),
    ] = None
    teacher_texts: Annotated[
        int | None, "responses the teacher writes with text=teacher; by default one a window", Ge(1)
    ] = None
    server: Annotated[
        str | None, "OpenAI-compatible server that writes for the student (vLLM): URL#MODEL; its weights may be stale"
    ] = None
    own_prompts: Annotated[int, "held-out prompts that models go on from, for the final table", Ge(1)] = 64
    own_responses: Annotated[
        int, "responses to each of them, to see how they differ (diversity probe); 0: not looked at", Ge(0)
    ] = 0

    demo: ClassVar[dict[str, Any]] = {**LanguageSystem.demo, "prompt_tokens": 32, "new_tokens": 96, "baseline": False}
    smoke: ClassVar[dict[str, Any]] = {"prompt_tokens": 6, "new_tokens": 8, "own_prompts": 4}

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from self.prepared(run)
        policies = yield from Policies.prepare(self, task)

        def objective(student: Observed) -> Objective:
            return self.with_text(self.objective(policies, student), task, student)

        stage = task.train("student", objective, source=partial(self.source, policies))
        models = {"student": (yield stage)}
        if self.baseline:
            models["baseline"] = yield task.baseline()
        yield task.evaluation(
            models,
            more=lambda model: {**policies.own_text(model), **self.measured(task, model)},
            columns=self.columns(),
        )

    def prepared(self, run: Run) -> Generator[Stage, Artifact, LanguageTask]:
        """The teacher, the student and the text."""
        return (yield from LanguageTask.prepare(self, run))

    def measured(self, task: LanguageTask, model: Any) -> dict[str, float]:
        """What else a member measures of a model."""
        return {}

    def columns(self) -> list[Column]:
        """Columns of what is measured besides a language model's own."""
        return [*OWN_TEXT, *(DIVERSITY if self.own_responses else [])]

    def source(self, policies: Policies, student: Observed) -> Any:
        """Batches for the student."""
        return policies.source(student)

    def objective(self, policies: Policies, student: Observed) -> Objective:
        """What the student minimises on a batch, whoever wrote it."""
        if self.divergence == "labels":
            return TokenCrossEntropy(head_of(student), vocab_size=policies.task.vocab_size)
        match = self.matcher(policies, student)
        if self.own_divergence is None or self.chooser() == Share(0.0):  # no row is the student's own
            return match(self.divergence, None)
        return match(self.divergence, "given") + match(self.own_divergence, "own")

    def matcher(self, policies: Policies, student: Observed) -> Callable[[Divergence, str | None], Objective]:
        """Makes the term of a divergence on the rows of an entry of the batch, or on all."""
        kept, head = policies.kept, head_of(student)
        live = head_of(policies.task.observed_teacher()) if kept is None else None

        def match(name: Divergence, rows: str | None) -> Objective:
            divergence = self.row_divergence(name)
            common: dict[str, Any] = {"rows": rows, "vocab_size": policies.task.vocab_size}
            if kept is not None:
                return CachedTokenMatch(head, kept, divergence, whole=policies.whole, **common)
            assert live is not None
            return TokenMatch(head, live, divergence, **common)

        return match

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
                case "todi":
                    return ToDi(temperature=T)
                case _:
                    return ForwardKL(temperature=T)
        except ValueError as error:
            raise ConfigError(f"divergence={name}: {error}") from error


def refuse_unread(system: PolicySystem, names: Sequence[str], why: str, *, also: Sequence[str] = ()) -> None:
    """A `ConfigError` that names the inherited fields which are set though a system has no use for them."""
    # Not through the fields: what is refused must not decide whether a stage is done again.
    values, usual = vars(system), {one.name: one.default for one in fields(system)}
    given = [*(f"{name}={values[name]}" for name in names if values[name] != usual[name]), *also]
    if given:
        raise ConfigError(f"{system.name()} does not use {', '.join(given)}: {why}; leave them out")


@dataclass
class Policies:
    """Who writes what in a run of the family."""

    system: PolicySystem
    task: LanguageTask
    coder: Coder
    texts: Batches  # what the student's own text is mixed with
    kept: Observed | None = None  # stands for a teacher that is not run beside the student
    whole: bool = False  # its logits are kept whole
    scorer: EndpointScorer | None = None

    @staticmethod
    def prepare(system: PolicySystem, task: LanguageTask) -> Generator[Stage, Artifact, Policies]:
        """With text=teacher this yields the stage in which the teacher writes."""
        coder = Coder(task.tokenizer)
        if system.packing and system.chooser() != Share(0.0):
            raise ConfigError("packing=true: a window of several conversations has no one prompt to go on from")
        policies = Policies(system, task, coder, task.batches())
        behind = endpoint_of(system.teacher)
        if system.text == "teacher":
            policies.texts = policies.batches_of((yield policies.teacher_texts()))
        if behind is not None and system.divergence != "labels":
            policies.scorer = EndpointScorer(*behind, k=min(system.teacher_topk or 20, task.vocab_size))
            policies.kept = given_teacher()
        elif behind is None and system.teacher_topk is not None:
            if system.text != "data" or system.chooser() != Share(0.0):
                raise ConfigError(
                    "teacher_topk keeps what the teacher says of the data's text, and that is not all here"
                )
            policies.kept = yield from teacher_from_cache(task, k=system.teacher_topk)
            policies.whole = system.teacher_topk >= task.vocab_size
            policies.texts.data = Numbered(policies.texts.data)
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
            how = {"teacher_share": self.system.teacher_share, "accept": self.system.accept}
            if not any(how.values()):
                return self.sampler(student.module, sharded=[student.tapped])
            if all(how.values()):
                raise ConfigError(
                    "teacher_share and accept are two ways for the teacher to write along; set one of them"
                )
            teacher = self.task.observed_teacher().module
            return self.sampler(student.module, sharded=[student.tapped], teacher=teacher, **how)
        if self.system.teacher_share or self.system.accept:
            raise ConfigError(
                "teacher_share and accept need both models in one process: they do not go with server=..."
            )
        server = endpoint_of(self.system.server)
        if server is None:
            raise ConfigError(
                f"server={self.system.server!r}: write URL#MODEL, such as http://localhost:8000/v1#student"
            )
        return self._server(*server)

    def _server(self, url: str, model: str) -> ServerSampler:
        system = self.system
        return ServerSampler(
            url, model, self.coder, system.new_tokens, temperature=system.sampling_temperature, top_p=system.top_p
        )

    def source(self, student: Observed) -> Any:
        """Batches for ``student``."""
        source = self._source(student)
        return source if self.scorer is None else Scored(source, self.scorer)

    def _source(self, student: Observed) -> Any:
        chooser = self.system.chooser()
        return self.texts if chooser == Share(0.0) else self.mixed(student, chooser, self.beside())

    def mixed(self, student: Observed, chooser: Chooser, beside: Batches | None = None) -> PolicySource:
        """Batches of which ``chooser`` says whose text they are; each with one of ``beside`` as its ``text``."""
        system = self.system
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
            beside=beside,
            seed=system.seed,
        )

    def in_rounds(self, student: Observed, *, rollouts: int, times: int) -> ReusedText:
        """Batches of the student's own text, written ``rollouts`` responses at a time and used ``times`` over.

        They say how likely a token was to the student when it was written (``old_logp``), and how much likelier to the
        teacher (``gain``), each (N); a teacher behind an endpoint says its likeliest tokens there as well
        (``teacher_tokens``, ``teacher_log_p`` (N, K), ``teacher_log_rest`` (N)).
        """
        device, scorer = self.task.run.fabric, self.scorer
        head = head_of(student)
        live = head_of(self.task.observed_teacher()) if scorer is None else None

        def note(batch: dict[str, Any]) -> dict[str, torch.Tensor]:
            there = device.to_device(batch)
            with resting(student.module), device.autocast():
                logp_N = response_logprobs(head, there).float().cpu()
                if live is not None:
                    return {"old_logp": logp_N, "gain": response_logprobs(live, there).float().cpu() - logp_N}
            assert scorer is not None
            at_BT, *_ = response_tokens(batch)
            said = {name: value[at_BT] for name, value in scorer.score_batch(batch).items()}
            gain_N = said.pop("given") - logp_N
            return {"old_logp": logp_N, "gain": gain_N, **{f"teacher_{name}": value for name, value in said.items()}}

        return ReusedText(
            self.mixed(student, Share(1.0)),
            note,
            batches=max(1, rollouts // self.system.batch_size),
            times=times,
            beside=self.beside(),
            seed=self.system.seed,
        )

    def beside(self) -> Batches | None:
        """The text of the cross-entropy beside the student's own, where that has a weight."""
        system = self.system
        if not system.lm_weight or system.lm_data is None:
            return self.task.batches() if system.lm_weight else None
        data = load_text(system.lm_data, on_bad_record=system.on_bad_record)
        windows = windows_of(system, data, self.task.tokenizer)
        return Batches(windows.train, system.batch_size, seed=system.seed, gather=True)

    # -- the teacher's text -----------------------------------------------------------------------------------------

    def teacher_texts(self) -> Generate:
        """The stage in which the teacher goes on from the training text's prompts, or answers its conversations."""
        behind = endpoint_of(self.system.teacher)
        if behind is not None and self.task.windows.kind != "text":
            return self._answers(*behind)
        system, train = self.system, self.task.windows.train
        count = min(len(train), system.teacher_texts or len(train))
        prompts = prompts_of(train[list(range(count))], system.prompt_tokens)
        kept: dict[str, Any] | None = None
        if behind is None:
            teacher: Writer = self.sampler(self.task.teacher.to(self.task.run.fabric.device), beams=system.beams)
            how = [system.prompt_tokens, system.new_tokens, system.sampling_temperature, system.top_p, system.beams]
            kept = {
                "teacher": model_fingerprint(self.task.teacher),
                "windows": self.task.windows.fingerprint,
                "how": [count, *how, system.seed],
            }
        else:
            teacher = self._server(*behind)

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

        requests = {str(number): prompt for number, prompt in enumerate(prompts)}
        return Generate("teacher-text", requests, write, together=True, cache=kept)

    def _answers(self, url: str, model: str) -> Generate:
        """A chat model answers where the training conversations have their first response."""
        system, windows = self.system, self.task.windows
        asked = {}
        for number in windows.documents[: system.teacher_texts]:
            turns = opening(self.task.data.documents[number])
            asked[str(number)] = (turns, Request(turns))
        sampling = Sampling(
            max_tokens=system.new_tokens, temperature=system.sampling_temperature, top_p=system.top_p, seed=system.seed
        )
        store = self.task.run.folder / "answers.jsonl"
        teacher = EndpointTeacher(url, model, sampling=sampling, store=store, say=self.task.run.say)

        def write(left: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any] | None]]:
            keys = {key: request for key, (_, request) in left.items()}
            for key, record in teacher.answers(keys):
                answer = {"role": "assistant", "content": record["text"]}
                yield key, {"turns": json.dumps([*left[key][0], answer])} if record["text"] else None

        return Generate("teacher-text", asked, write, together=True)

    def batches_of(self, written: Artifact) -> Batches:
        """What a teacher wrote, as batches."""
        import pyarrow.parquet as pq

        options: dict[str, Any] = {"batch_size": self.system.batch_size, "seed": self.system.seed}
        records = pq.read_table(written.data_file()).to_pylist()
        if "turns" in records[0]:
            turns = [json.loads(record["turns"]) for record in records]
            windows = conversation_windows(
                turns, self.task.tokenizer, window=self.system.window, name="what the teacher wrote"
            )
            return Batches(windows, gather=True, **options)
        rows = [(record["prompt"], record["response"]) for record in records]
        return Batches(rows, collate=lambda picked: pack_rows(picked, self.coder.pad), **options)

    # -- the models' own text ---------------------------------------------------------------------------------------

    @torch.no_grad()
    def own_text(self, model: nn.Module) -> dict[str, float]:
        """How far a model is from the teacher on what it writes itself, after held-out prompts.

        The sum of ``own_kl`` over a response is an unbiased estimate of the sequences' KL(model || teacher).
        """
        device, held_out = self.task.run.fabric.device, self.task.windows.validation
        count = min(self.system.own_prompts, len(held_out))
        prompts = prompts_of(held_out[list(range(count))], self.system.prompt_tokens)
        sampler = self.sampler(model, temperature=1.0)
        written = sampler.write(prompts, seed=self.system.seed)
        parts = packed(prompts, written, pad=self.coder.pad, size=8)
        batches = list(map(self.task.run.fabric.to_device, parts))
        grams = [one.ids[start : start + 4] for one in written for start in range(len(one.ids) - 3)]
        figures = {"distinct": len(set(grams)) / max(1, len(grams))}
        if self.system.own_responses:
            figures |= self._diversity(sampler, prompts)
            figures["own_entropy"] = compare_causal_lms({"m": model}, batches, vocab_size=self.task.vocab_size)[
                "m"
            ].loss
        if self.task.teacher is None:
            return figures
        models = {"teacher": self.task.teacher.to(device), "model": model}
        found = compare_causal_lms(models, batches, vocab_size=self.task.vocab_size, reference="teacher")
        return {"own_kl": found["model"].reverse_kl, "own_nll": found["teacher"].loss, **figures}

    def _diversity(self, sampler: LiveSampler, prompts: list[list[int]]) -> dict[str, float]:
        """How the responses to one prompt differ; see `stillhouse.metrics.diversity`."""
        times = self.system.own_responses
        again = [prompt for prompt in prompts for _ in range(times)]
        ids = [one.ids for one in sampler.write(again, seed=self.system.seed + 1)]
        found = diversity([ids[start : start + times] for start in range(0, len(ids), times)])
        distinct = {f"distinct_{n}": found.distinct[n] for n in (1, 2)}
        return {"different": found.different, "self_bleu": found.self_bleu, **distinct}


def opening(document: Mapping[str, Any]) -> list[dict[str, str]]:
    """The turns of a conversation before its first response."""
    if "prompt" in document:
        return [{"role": "user", "content": document["prompt"]}]
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in document["messages"]]
    first = next(number for number, turn in enumerate(turns) if turn["role"] == "assistant" and number)
    return turns[:first]
