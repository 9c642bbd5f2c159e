"""The language task for a teacher and a student whose tokenizers differ.

`CrossTokenizerSystem` has the fields; `CrossTokenizerTask.prepare` makes a student of the user's choice with a
tokenizer of the user's choice, and batches in both tokenizers, aligned (`stillhouse.data.alignment`). Everything else
is the language task's: its training, its curve, its baseline on the text alone.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import nn

from stillhouse.base.errors import ConfigError, DataError, ModelError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed, Signal
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Evaluate, Stage
from stillhouse.core.train import Train
from stillhouse.data.alignment import PairedConversations, PairedWindows, Pairing, Translator, paired_conversations
from stillhouse.data.text import TextData
from stillhouse.data.token_bytes import PairBias, Vocabulary, compositions, spellings, token_counts
from stillhouse.metrics.cross_tokenizer import Ensemble, compare_across_tokenizers
from stillhouse.models.causal_lm import load_causal_lm, new_causal_lm, parameter_count, read_config, student_from_spec
from stillhouse.models.input_expansion import check_spelled, expanded
from stillhouse.models.loading import load_tokenizer, local_folder
from stillhouse.models.tokenizer_transfer import (
    bpe_like,
    byte_tokenizer,
    put_embeddings,
    transplant,
    with_vocabulary,
)
from stillhouse.models.tokenizers import check_same_tokenizer
from stillhouse.objectives.language import head_of
from stillhouse.tasks.language import LanguageSystem, LanguageTask, Measure, TaughtText, endpoint_of

TEACHER, BYTES = "teacher", "bytes"
COUNTED = 512  # training windows from which the frequencies of tokens are taken
LEAST_SHARED = 0.5  # of the text's bytes that chunks must cover
HiddenLayers = Literal["last", "all"]


@dataclass(kw_only=True)
class CrossTokenizerSystem(LanguageSystem):
    """Fields of systems that distil across tokenizers; the optimizer's defaults are those of ALM (2503.20083)."""

    student: Annotated[
        str,
        "directory or hub id, the teacher's architecture made smaller (scale:0.25, layers=4,hidden_size=256), or "
        "'teacher': it begins as the teacher, with another tokenizer",
    ] = TEACHER
    tokenizer: Annotated[
        str | None,
        "the student's: 'bytes', 'bpe:N' (N tokens, trained on the text), or a directory or hub id; by default its "
        "own, or bytes where it has none of its own",
    ] = None
    student_window: Annotated[
        int | None, "most tokens in a student's sequence; by default as many as the teacher's window needs", Ge(8)
    ] = None
    untie: Annotated[
        bool | None, "give a student with a new tokenizer a head of its own; by default only one of bytes"
    ] = None
    embeddings: Annotated[
        str | None,
        "safetensors file with the new tokens' embeddings (input, output), as a hypernetwork predicts them; by default "
        "they are made of the old ones",
    ] = None
    expand: Annotated[
        bool, "bytes: add to each one's embedding that of the longest of the old tokens that ends with it"
    ] = False
    ensemble: Annotated[
        str | None, "directory or hub id of a model with the student's tokenizer: their mean is measured too"
    ] = None

    lr_schedule: Annotated[Literal["cosine", "linear", "wsd", "constant"], "course of the learning rate"] = "linear"
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0), Le(0.999)] = 0.4
    beta2: Annotated[float, "AdamW's second momentum", Gt(0), Le(0.99999)] = 0.95
    lora_alpha: Annotated[float, "adapters count alpha / rank times; the paper: rank and alpha 64", Gt(0)] = 64.0

    demo: ClassVar[dict[str, Any]] = {**LanguageSystem.demo, "tokenizer": "bpe:512"}


@dataclass
class CrossTokenizerTask(LanguageTask):
    """A `LanguageTask` whose ``tokenizer`` and windows are the student's, with the teacher's beside them."""

    system: CrossTokenizerSystem
    teacher_tokenizer: Any = None
    pairing: Any = None  # a `Pairing`

    def __post_init__(self) -> None:
        if hasattr(self.run, "notice") or vars(self.system)["audits"]:
            raise ConfigError(
                f"audits compare models token by token, and those of {self.system.name()} have two tokenizers; leave "
                "audits, and read its table, which compares them by bytes"
            )

    @staticmethod
    def prepare(  # type: ignore[override]
        system: CrossTokenizerSystem,
        run: Run,
        *,
        bias_threshold: float | None = None,
    ) -> Generator[Stage, Artifact, CrossTokenizerTask]:
        """Build the task; on the embedded task this yields the stage that trains the teacher.

        ``bias_threshold``: chunks end only with pairs of tokens of at most this bias (`PairBias`).

        Raises:
            ConfigError: packed conversations, or a teacher without weights.
            ModelError: tokenizers that do not spell the text alike, or cannot be read.
        """
        if system.packing:
            raise ConfigError("packing=true: packed conversations cannot be aligned with another tokenizer's; leave it")
        if endpoint_of(system.teacher):
            raise ConfigError(
                f"{system.name()} needs the teacher's likelihoods of the text; give its directory or hub id as teacher"
            )
        whole = yield from TaughtText.prepare(system, run)
        tokenizer, new_student = _student(system, whole)
        teacher, student = Vocabulary(whole.tokenizer), Vocabulary(tokenizer)
        pairing = Pairing(teacher, student, window=_longest(system, whole))
        if bias_threshold is not None:
            pairing = replace(pairing, unbiased=_unbiased(whole, pairing, bias_threshold))
        task = CrossTokenizerTask(
            system,
            run,
            whole.teacher,
            tokenizer,
            whole.data,
            _paired(system, whole, pairing),
            student.size,
            new_student,
            teacher_tokenizer=whole.tokenizer,
            pairing=pairing,
        )
        _check_shared(task)
        if system.pretrain:
            steps = task.steps_of(system.pretrain)
            task.begin_as((yield task.train("pretrain", task.cross_entropy, steps=steps, adapters=False)))
        return task

    @property
    def vocab_sizes(self) -> tuple[int, int]:
        """Real sizes of the student's and the teacher's vocabulary."""
        return self.pairing.student.size, self.pairing.teacher.size

    @cached_property
    def listened_teacher(self) -> Observed:
        """The frozen teacher; one for all terms, so that it runs once a batch."""
        return self.observed_teacher()

    def widths(self, student: Observed) -> tuple[int, int]:
        """Hidden widths of the student and the teacher."""
        models: list[Any] = [student.module, self.teacher]
        first, second = (model.config.get_text_config(decoder=True).hidden_size for model in models)
        return first, second

    def train(self, name: str, objective: Callable[[Observed], Objective], **options: Any) -> Train:
        """See `LanguageTask.train`; with adapters, embeddings and head are trained in full beside them."""

        def with_embeddings(student: Observed) -> Objective:
            if self.system.lora is not None:
                model: Any = student.module
                for part in (model.get_input_embeddings(), model.get_output_embeddings()):
                    part.requires_grad_(True)
            return objective(student)

        return super().train(name, with_embeddings, **options)

    def hidden_pairs(self, student: Observed, layers: HiddenLayers) -> tuple[list[Signal], list[Signal]]:
        """Student's and teacher's hidden states: what their heads read, or those of every layer and the embeddings.

        Where the student has fewer layers, each listens to the teacher's at the same share of the depth.
        """
        sides: Any = (student, self.listened_teacher.view(TEACHER))
        if layers == "last":
            return [head_of(sides[0]).hidden], [head_of(sides[1]).hidden]
        paths = [decoder_layers(model) for model in (student.module, self.teacher)]
        few, many = (len(found) for found in paths)
        chosen = [paths[1][round((number + 1) * many / few) - 1] for number in range(few)]
        names = [[embeddings_path(student.module), *paths[0]], [embeddings_path(self.teacher), *chosen]]
        first, second = ([side.tap(path) for path in found] for side, found in zip(sides, names, strict=True))
        return first, second

    # -- what is measured -------------------------------------------------------------------------------------------

    def evaluation(
        self, models: dict[str, Artifact], *, more: Measure | None = None, columns: Sequence[Column] = ()
    ) -> Evaluate:
        """The final table: bits per byte of the teacher and of the models, and of the models together.

        ``more`` measures what else a method is about, by model, for ``columns`` of their own.
        """
        return Evaluate("evaluation", partial(self._measure, models, more, columns))

    def _measure(
        self, artifacts: dict[str, Artifact], more: Measure | None, columns: Sequence[Column], context: Context
    ) -> tuple[Table, dict[str, Any]]:
        device = self.run.fabric.device
        models: dict[str, list[nn.Module]] = {name: [self.load(artifact)] for name, artifact in artifacts.items()}
        samples = self._samples({name: members[0] for name, members in models.items()})
        together = [members[0] for members in models.values()]
        if self.system.ensemble is not None:
            partner, own = load_causal_lm(self.system.ensemble, trust_remote_code=self.system.trust_remote_code)
            check_same_tokenizer(self.tokenizer, own)
            models["partner"] = [partner.to(device).eval()]
            together.append(models["partner"][0])
        if len(together) > 1:
            models["ensemble"] = together
        teacher = self.teacher.to(device).eval()
        found = compare_across_tokenizers(
            Ensemble([teacher], self.pairing.teacher.size),
            {name: Ensemble(members, self.pairing.student.size) for name, members in models.items()},
            self.batches_of(self.windows.validation),
            pieces=(self.pairing.teacher.pieces, self.pairing.student.pieces),
        )
        rows = []
        for name, figures in found.items():
            members = [teacher] if name == "teacher" else models[name]
            row: dict[str, Any] = {
                "name": name,
                "parameters": sum(parameter_count(model) for model in members),
                "bits_per_byte": figures.bits_per_byte,
                "gap": figures.gap,
                "agreement": figures.agreement,
                "bytes_per_token": figures.bytes / max(1, figures.tokens),
                **(more(members[0]) if more and len(members) == 1 else {}),
            }
            rows.append(row)
            context.results |= {f"{name}/{key}": value for key, value in row.items() if key != "name"}
        first = next(iter(found.values()))
        note = f"{first.bytes:,} bytes of held-out text ({self.data.name}) in {first.chunks:,} chunks."
        return Table("Held-out text, whatever the tokenizer", [*COLUMNS, *columns], rows, [note]), {
            "samples.json": samples
        }


COLUMNS = [
    Column("parameters", "parameters", ",d"),
    Column("bits_per_byte", "bits/byte", ".3f", "lower", "code length of the text; comparable between tokenizers"),
    Column("gap", "chunk gap", ".3f", "lower", "mean difference to the teacher's log-likelihood of a chunk, nats"),
    Column(
        "agreement",
        "agreement",
        ".1%",
        "higher",
        "how often, where chunks begin, the likeliest next token and the teacher's begin with the same bytes",
    ),
    Column("bytes_per_token", "bytes/token", ".2f", None, "how much text a token stands for"),
]


def decoder_layers(model: Any) -> list[str]:
    """The paths of a causal LM's layers, first layer first.

    Raises:
        ModelError: a model that has no list of them.
    """
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for path, layers in model.named_modules():
        if isinstance(layers, nn.ModuleList) and len(layers) == count:
            return [f"{path}.{number}" for number in range(count)]
    raise ModelError(f"{type(model).__name__} has no list of its {count} layers; use hidden_layers=last, balance=false")


def embeddings_path(model: Any) -> str:
    """The path of a model's input embeddings."""
    wanted = model.get_input_embeddings()
    return next(name for name, module in model.named_modules() if module is wanted)


def texts_of(data: TextData) -> Iterable[str]:
    """What is written in documents of any kind, for tokenizers to be trained on."""
    if data.kind == "text":
        yield from data.documents["text"]
        return
    for record in data.documents:
        turns: Any = record
        if data.kind == "messages":
            yield from (turn["content"] for turn in turns["messages"])
        else:
            yield from (turns["prompt"], turns["completion"])


def is_described(student: str) -> bool:
    """Whether a student is described by what it takes from its teacher's architecture."""
    return student.startswith("scale:") or "=" in student


def _student(system: CrossTokenizerSystem, whole: TaughtText) -> tuple[Any, Callable[[], nn.Module]]:
    """The student's tokenizer, and how to make a new student with it."""
    spec, remote = system.student, system.trust_remote_code
    described = is_described(spec)
    if spec == TEACHER:
        own = whole.tokenizer
    elif not described:
        own = load_tokenizer(spec, local_folder(spec), revision="main", trust_remote_code=remote)
    wanted = system.tokenizer
    if wanted is None:
        wanted = BYTES if described or spec == TEACHER else None
    for name in ("expand", "embeddings"):
        if vars(system)[name] and (described or wanted is None):
            raise ConfigError(f"{name} needs a student whose own embeddings a new tokenizer replaces; leave it out")
    if wanted is None:
        return own, lambda: load_causal_lm(spec, dtype=torch.float32, trust_remote_code=remote)[0]
    tokenizer = _tokenizer(wanted, whole, remote)
    seed = system.seed
    untie = wanted == BYTES if system.untie is None else system.untie
    if described:
        config = with_vocabulary(student_from_spec(spec, whole.teacher.config), tokenizer)
        if untie:
            config.get_text_config(decoder=True).tie_word_embeddings = False
        return tokenizer, partial(new_causal_lm, config, seed=seed)
    old, new = Vocabulary(own), Vocabulary(tokenizer)
    parts, written = compositions(old, new), None
    if system.expand:
        check_spelled(new.pieces)
        written = spellings(old, new)

    def begin() -> nn.Module:
        model: Any
        if spec == TEACHER:
            model = copy.deepcopy(whole.teacher).to("cpu", torch.float32)
        else:
            model, _ = load_causal_lm(spec, dtype=torch.float32, trust_remote_code=remote)
        moved = transplant(model, parts, tokenizer, untie=untie, seed=seed)
        if system.embeddings is not None:
            put_embeddings(moved, Path(system.embeddings))
        if written is not None:
            moved = expanded(moved, model.get_input_embeddings(), written)
        return moved.requires_grad_(True)

    return tokenizer, begin


def _tokenizer(wanted: str, whole: TaughtText, remote: bool) -> Any:
    if wanted == BYTES:
        return byte_tokenizer(whole.tokenizer)
    if wanted.startswith("bpe:"):
        size = wanted.removeprefix("bpe:")
        if not size.isdigit():
            raise ConfigError(f"tokenizer={wanted!r}: write bpe:N with the number of tokens, such as bpe:1024")
        return bpe_like(whole.tokenizer, texts_of(whole.data), vocab_size=int(size))
    return load_tokenizer(wanted, local_folder(wanted), revision="main", trust_remote_code=remote)


def _longest(system: CrossTokenizerSystem, whole: TaughtText) -> int | None:
    """The most tokens that a student's sequence may have."""
    if system.student_window is not None:
        return system.student_window
    if system.student == TEACHER or is_described(system.student):
        config = whole.teacher.config
    else:
        config = read_config(system.student, trust_remote_code=system.trust_remote_code)
    inner: Any = config
    return getattr(inner.get_text_config(decoder=True), "max_position_embeddings", None)


def _unbiased(whole: TaughtText, pairing: Pairing, threshold: float) -> Callable[[int, int], bool]:
    if whole.windows.kind == "text":
        windows = whole.windows.train[list(range(min(COUNTED, len(whole.windows.train))))]["input_ids"].numpy()
        rows = [student.ids for _, student in Translator(pairing.teacher, pairing.student)(list(windows))]
        counts = token_counts(pairing.teacher, windows), token_counts(pairing.student, rows)
    else:
        texts = [text for _, text in zip(range(COUNTED * 4), texts_of(whole.data), strict=False)]
        teacher, student = (
            token_counts(side, [np.array(ids, dtype=np.int64) for ids in side.encode(texts)])
            for side in (pairing.teacher, pairing.student)
        )
        counts = teacher, student
    bias = PairBias(pairing.teacher, pairing.student, counts)
    return lambda teacher, student: bias(teacher, student) <= threshold


def _paired(system: CrossTokenizerSystem, whole: TaughtText, pairing: Pairing) -> Any:
    """The windows of a task in both tokenizers; what is held out is what the language task holds out."""
    windows = whole.windows
    if windows.kind == "text":
        parts: Any = {
            name: PairedWindows(getattr(windows, name), pairing) for name in ("train", "selection", "validation")
        }
        return replace(windows, **parts)
    limits = (system.window, pairing.window or system.window * 8)
    rows = paired_conversations(whole.data.documents, pairing, windows=limits, name=whole.data.name, seed=0)
    held_out, chosen = (max(1, round(share * len(rows))) for share in (system.validation, system.selection))
    if len(rows) <= held_out + chosen:
        raise DataError(
            f"{whole.data.name}: {len(rows)} conversations fit both tokenizers, which cannot give {held_out} for "
            f"validation, {chosen} for selection and one for training; use larger windows or more data"
        )
    split: dict[str, PairedConversations] = {
        "validation": rows.part(0, held_out),
        "selection": rows.part(held_out, held_out + chosen),
        "train": rows.part(held_out + chosen, None),
    }
    made: Any = split
    return replace(windows, **made)


def _check_shared(task: CrossTokenizerTask) -> None:
    """Refuse tokenizers under which most of the text has no common chunks: they do not spell it alike."""
    train = task.windows.train
    batch: Any = train[list(range(min(8, len(train))))]
    theirs = batch[TEACHER]
    conversations = task.windows.kind != "text"
    if conversations:
        total = max(1, len(batch["bytes"]))
        covered = int((batch["bytes"] > 0).sum())
    else:
        ids = theirs["input_ids"][theirs["attention_mask"] == 1].numpy()
        total, covered = int(task.pairing.teacher.lengths[ids].sum()), int(batch["bytes"].sum())
    if covered < LEAST_SHARED * total:
        what = "conversations" if conversations else "bytes"
        raise ModelError(
            f"teacher and student: only {covered:,} of {total:,} {what} of the text lie in chunks that both tokenizers "
            "write alike; use a tokenizer that does not change the text, a longer student_window, or a larger "
            "bias_threshold"
        )
