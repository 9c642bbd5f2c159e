"""Refining a corpus before anybody is trained on it: passages scored once by two models, the best kept as text.

The corpus is the training text of a language task, cut into passages of one length. The embedded one is the
documentation inside Python, which is what is measured on, among duplicates and noise: see `with_junk`.
Suffixes: N passages, T tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Evaluate, Generate, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.difference_sampling import count_of, difference_score, gumbel_top_fraction, top_fraction
from stillhouse.data.encoding import tokenizer_fingerprint
from stillhouse.data.passages import Corpus, passage_texts, shuffled, text_windows, with_junk
from stillhouse.data.pruning_scores import random_score
from stillhouse.data.sources import Batches
from stillhouse.data.text import TextData
from stillhouse.data.windows import Counts, Windows, WindowSplit
from stillhouse.losses.divergences import ForwardKL
from stillhouse.metrics.sequence_loss import mean_loss, sequence_nats
from stillhouse.models.causal_lm import new_causal_lm, student_from_spec
from stillhouse.models.tokenizers import check_same_tokenizer, real_vocab_size
from stillhouse.objectives.language import TokenMatch, head_of
from stillhouse.tasks.language import (
    DEMO,
    LanguageSystem,
    LanguageTask,
    TaughtText,
    endpoint_of,
    is_spec,
    load_student,
)
from stillhouse.tasks.selection_pictures import score_picture
from stillhouse.teachers.cache import model_fingerprint
from stillhouse.teachers.likelihood import EndpointLikelihood

if TYPE_CHECKING:
    import datasets

Select = Literal["difference", "gumbel", "teacher-loss", "random"]
TOGETHER = 32  # passages that are scored at one time
SHOWN = 3  # passages of each sort in the report


@dataclass
class Refining:
    """A corpus, the two models that score it, and the text to measure on.

    ``scoring`` is the language task of the teacher and the reference, which is its student.
    """

    system: LanguageSystem
    run: Run
    scoring: LanguageTask
    corpus: Corpus
    reference: nn.Module | None = None

    @staticmethod
    def prepare(
        system: LanguageSystem, run: Run, *, reference: str, reference_share: float, reference_epochs: float
    ) -> Generator[Stage, Artifact, Refining]:
        """The corpus without the part on which the reference is trained; yields the stage that does so.

        A reference that is a directory or hub id is taken as it is, and all of the corpus can be kept.
        """
        if system.pretrain:
            raise ConfigError(f"pretrain={system.pretrain:g}: {system.name()} pre-trains its student; use epochs")
        made = is_spec(reference)
        if made and endpoint_of(system.teacher):
            raise ConfigError(
                f"reference={reference}: the architecture of a teacher behind an endpoint is not known; give the "
                "directory or hub id of a small model with its tokenizer"
            )
        scoring = (yield from TaughtText.prepare(system, run, student=reference)).task(student=reference)
        if scoring.windows.kind != "text":
            raise ConfigError(f"data={system.data}: passages are cut from plain text, and these are conversations")
        clean_NT = scoring.windows.train[:]["input_ids"]
        corpus = Corpus(clean_NT)
        if system.data == DEMO:
            corpus = with_junk(clean_NT, scoring.data.documents["text"], scoring.tokenizer)
        corpus = shuffled(corpus)
        task = Refining(system, run, scoring, corpus)
        if made:
            given = count_of(reference_share, len(corpus.ids))
            task.corpus = corpus.take(range(given, len(corpus.ids)))
            trained = yield task.pretraining(
                "reference", scoring, corpus.ids[:given], epochs=reference_epochs, steps=None
            )
            task.reference = scoring.load(trained)
        else:
            task.reference = scoring.new_student().to(run.fabric.device).eval()
        return task

    # -- scores -------------------------------------------------------------------------------------------------------

    def scores(
        self, select: Select, alpha: float, temperature: float
    ) -> Generator[Stage, Artifact, tuple[Artifact, Corpus]]:
        """Score all passages and say which are kept: the artifact with a line a passage, and those kept."""
        losses: dict[str, Tensor] = {}
        if select != "random":
            losses["teacher"] = _losses((yield self._scored("teacher")))
        if select in ("difference", "gumbel"):
            losses["reference"] = _losses((yield self._scored("reference")))
        scored = yield Transform("scores", partial(self._chosen, losses, select, alpha, temperature))
        import pyarrow.parquet as pq

        kept = torch.tensor(pq.read_table(scored.data_file())["kept"].to_pylist())
        return scored, self.corpus.take(kept.nonzero().flatten())

    def _scored(self, who: Literal["teacher", "reference"]) -> Generate:
        """The stage that asks one model, once, for the loss of every passage; made by one run, it serves all."""
        ids_NT = self.corpus.ids
        behind = endpoint_of(self.system.teacher) if who == "teacher" else None
        model: Any = self.reference if who == "reference" else self.scoring.teacher
        ask = self._behind(*behind) if behind else partial(self._here, model)
        asked = behind or model_fingerprint(model)

        def write(left: Mapping[str, int]) -> Iterator[tuple[str, dict[str, list[float]]]]:
            for key, start in left.items():
                yield key, {"nats": ask(ids_NT[start : start + TOGETHER].long()).tolist()}

        requests = {str(start): start for start in range(0, len(ids_NT), TOGETHER)}
        content = hashlib.sha256(ids_NT.long().contiguous().numpy().tobytes()).hexdigest()
        cache = {"model": asked, "passages": content, "vocab_size": self.scoring.vocab_size}
        return Generate(f"{who}-losses", requests, write, together=True, cache=cache)

    def _here(self, model: nn.Module, ids_NT: Tensor) -> Tensor:
        """Mean losses of some passages, nats a token."""
        model.to(self.run.fabric.device).eval()
        batch = self.run.fabric.to_device({"input_ids": ids_NT})
        nats_N, tokens_N = sequence_nats(model, [batch], vocab_size=self.scoring.vocab_size)
        return nats_N / tokens_N

    def _behind(self, url: str, model: str) -> Callable[[Tensor], Tensor]:
        likelihood = EndpointLikelihood(url, model, k=1)
        return lambda ids_NT: -likelihood.token_log_p(ids_NT).mean(-1)

    def _chosen(
        self, losses: Mapping[str, Tensor], select: Select, alpha: float, temperature: float, context: Context
    ) -> datasets.Dataset:
        import datasets

        count = len(self.corpus.ids)
        if select == "random":
            score_N = random_score(count, seed=self.system.seed)
        elif select == "teacher-loss":
            score_N = -losses["teacher"]
        else:
            score_N = difference_score(losses["teacher"], losses["reference"])
        if select == "gumbel":
            kept = gumbel_top_fraction(score_N, alpha, temperature=temperature, seed=self.system.seed)
        else:
            kept = top_fraction(score_N, alpha)
        chosen = torch.zeros(count, dtype=torch.bool)
        chosen[kept] = True
        columns: dict[str, list[Any]] = {"passage": list(range(count)), "score": score_N.tolist()}
        columns |= {f"{name}_loss": one.tolist() for name, one in losses.items()} | {"kept": chosen.tolist()}
        if self.corpus.kinds is not None:
            columns["kind"] = self.corpus.kinds
        return datasets.Dataset.from_dict(columns)

    def refined(self, scored: Artifact, kept: Corpus) -> Generator[Stage, Artifact, None]:
        """Leave the kept passages as text (`data.parquet`, any tool and tokenizer reads it), and say what was kept."""
        import datasets

        def texts(context: Context) -> datasets.Dataset:
            found, passages = passage_texts(kept.ids, self.scoring.tokenizer)
            context.results = {"passages": len(kept.ids), "characters": sum(map(len, found))}
            return datasets.Dataset.from_dict({"text": found, "passage": passages})

        yield Transform("refined", texts)
        yield Evaluate("selection", partial(self._selection, scored))

    def _selection(self, scored: Artifact, context: Context) -> tuple[Table, dict[str, Any]]:
        import pyarrow.parquet as pq

        rows: list[dict[str, Any]] = pq.read_table(scored.data_file()).to_pylist()
        kinds = sorted({row["kind"] for row in rows}) if "kind" in rows[0] else []
        figures = [name for name in ("teacher_loss", "reference_loss", "score") if name in rows[0]]
        lines: list[dict[str, Any]] = []
        for name, part in (
            ("corpus", rows),
            ("kept", [row for row in rows if row["kept"]]),
            ("dropped", [row for row in rows if not row["kept"]]),
        ):
            line: dict[str, Any] = {"name": name, "passages": len(part)}
            line |= {one: _mean([row[one] for row in part]) for one in figures}
            line |= {kind: _mean([row["kind"] == kind for row in part]) for kind in kinds}
            lines.append(line)
            context.results |= {f"{name}/{key}": value for key, value in line.items() if key != "name"}
        labels = {
            "teacher_loss": "teacher's loss",
            "reference_loss": "reference's loss",
            "score": "score",
        }
        columns = [Column("passages", "passages", ",d")]
        columns += [Column(one, labels[one], ".3f", None, "mean, nats a token") for one in figures]
        columns += [Column(kind, kind, ".1%", None, "share of the passages") for kind in kinds]
        groups: dict[str, list[float]] = {}
        for row in rows:
            group = row["kind"] if kinds else "kept" if row["kept"] else "dropped"
            groups.setdefault(group, []).append(row["score"])
        least = min(row["score"] for row in rows if row["kept"])
        best_dropped = max((row["score"] for row in rows if not row["kept"]), default=-math.inf)
        what = "the reference's loss - the teacher's, nats a token"
        if "reference_loss" not in rows[0]:
            what = "- the teacher's loss, nats a token" if "teacher_loss" in rows[0] else "drawn at random"
        picture = score_picture(groups, least if least >= best_dropped else None, x=f"score: {what}")
        samples = json_samples(rows, self.corpus, self.scoring.tokenizer)
        return Table("What was kept", columns, lines), {"scores.svg": picture, "samples.json": samples}

    # -- the student --------------------------------------------------------------------------------------------------

    def student_task(self, passages: Corpus) -> LanguageTask:
        """The task of the student on some passages: the same tokens, or their text anew if its tokenizer is another."""
        system = self.system
        windows = replace(self.scoring.windows, train=WindowSplit({"input_ids": passages.ids}))
        task = replace(self.scoring, windows=windows)
        spec = system.student
        if is_spec(spec):
            model: Any = self.scoring.teacher if self.scoring.teacher is not None else self.reference
            config = student_from_spec(spec, model.config)
            return replace(task, new_student=partial(new_causal_lm, config, seed=system.seed))
        task.new_student = lambda: load_student(spec, system)[0]
        _, own = load_student(spec, system)
        try:
            check_same_tokenizer(task.tokenizer, own)
        except ModelError:
            return self._foreign(task, own)
        return task

    def _foreign(self, task: LanguageTask, tokenizer: Any) -> LanguageTask:
        """The same text in the tokens of a student of another family; the teacher stands beside it no longer."""
        import datasets

        name, window = task.windows.name, task.windows.window
        texts, splits, sizes = [], [], []
        for split in (task.windows.train, task.windows.selection, task.windows.validation):
            texts.append(passage_texts(split[:]["input_ids"], task.tokenizer)[0])
            made, size = text_windows(texts[-1], tokenizer, window, name=name)
            splits.append(made)
            sizes.append(size)
        counts = Counts(splits[0][:]["input_ids"].numel(), splits[2][:]["input_ids"][:, 1:].numel(), sizes[2])
        fingerprint = f"{task.windows.fingerprint} {tokenizer_fingerprint(tokenizer)}"
        train, selection, validation = splits
        windows = Windows(train, selection, validation, window, "text", name, fingerprint, counts)
        data = TextData(datasets.Dataset.from_dict({"text": texts[0]}), "text", name, fingerprint)
        vocab_size = real_vocab_size(tokenizer)
        return replace(task, teacher=None, tokenizer=tokenizer, data=data, windows=windows, vocab_size=vocab_size)

    def pretraining(
        self,
        name: str,
        task: LanguageTask,
        passages_NT: Tensor | None = None,
        *,
        epochs: float,
        steps: int | None,
        kd_ratio: float = 0.0,
    ) -> Train:
        """A stage that trains a new student on passages in their order: cross-entropy, or vanilla KD beside it."""
        if passages_NT is not None:
            task = replace(task, windows=replace(task.windows, train=WindowSplit({"input_ids": passages_NT})))
        if kd_ratio and task.tokenizer is not self.scoring.tokenizer:
            raise ConfigError(f"kd_ratio={kd_ratio:g}: the student has another tokenizer than its teacher; use 0")

        def objective(student: Observed) -> Objective:
            if not kd_ratio:
                return task.cross_entropy(student)
            weights: dict[str, Any] = {"divergence_weight": kd_ratio, "cross_entropy": 1 - kd_ratio}
            teacher = head_of(task.observed_teacher())
            return TokenMatch(head_of(student), teacher, ForwardKL(), vocab_size=task.vocab_size, **weights)

        def in_order(_student: Observed) -> Batches:
            return Batches(task.windows.train, self.system.batch_size, shuffle=False, gather=True)

        return task.train(name, objective, steps=steps or task.steps_of(epochs), source=in_order)

    def evaluation(self, task: LanguageTask, models: dict[str, Artifact]) -> Evaluate:
        """The task's table, with the losses on passages of kinds that may have been dropped."""
        probes = (self.corpus.probes or {}) if task.tokenizer is self.scoring.tokenizer else {}

        def more(model: nn.Module) -> dict[str, float]:
            return {
                f"{kind}_loss": mean_loss(model, task.batches_of(split), vocab_size=task.vocab_size)
                for kind, split in probes.items()
            }

        columns = [Column(f"{kind}_loss", f"loss, {kind}", ".3f", "lower", "nats a token") for kind in probes]
        return task.evaluation(models, more=more, columns=columns)


def json_samples(rows: list[dict[str, Any]], corpus: Corpus, tokenizer: Any) -> list[dict[str, Any]]:
    """Beginnings of passages for the report: the best, the last ones kept, the first ones dropped, the worst."""
    order = sorted(rows, key=lambda row: (not row["kept"], -row["score"]))
    kept = sum(row["kept"] for row in rows)
    groups = {
        "largest scores": order[:SHOWN],
        "just kept": order[max(0, kept - SHOWN) : kept],
        "just dropped": order[kept : kept + SHOWN],
        "smallest scores": order[kept:][-SHOWN:],
    }
    made = []
    for label, group in groups.items():
        outputs = {}
        for row in group:
            ids = corpus.ids[row["passage"]].tolist()[:60]
            kind = f", {row['kind']}" if "kind" in row else ""
            outputs[f"passage {row['passage']}: {row['score']:+.3f}{kind}"] = tokenizer.decode(ids)
        made.append({"prompt": label, "outputs": outputs})
    return made


def _losses(artifact: Artifact) -> Tensor:
    import pyarrow.parquet as pq

    parts = pq.read_table(artifact.data_file())["nats"].to_pylist()
    return torch.tensor([nats for part in parts for nats in part], dtype=torch.float64)


def _mean(values: list[Any]) -> float:
    return sum(values) / len(values) if values else 0.0
