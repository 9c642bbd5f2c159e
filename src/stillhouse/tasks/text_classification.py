"""Text classification: encoders on labelled text, and the unlabelled text of the same kind; embedded or the user's own.

`TextClassificationSystem` has the fields that systems on labelled text share; `TextClassificationTask.prepare` turns
them into an encoder, a tokenizer, labelled batches and measurements. On the embedded task the text is a small language
made by code (`stillhouse.data.toy_languages`), and a tiny BERT is trained on unlabelled sentences of it once, to fill
in masked words, and kept in the cache.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import nn

from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Batch, Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.schedule import Schedule, linear
from stillhouse.core.stage import Context, Evaluate, Stage
from stillhouse.core.system import System
from stillhouse.core.train import Train
from stillhouse.data.labelled import Kind, Labelled, load_labelled
from stillhouse.data.masking import Masked
from stillhouse.data.rows import TensorRows
from stillhouse.data.sources import Batches, steps_in
from stillhouse.data.text import load_text
from stillhouse.data.toy_languages import KINDS, Shape, borrowing, languages, sentences, vocabulary
from stillhouse.metrics.text_classification import agreement_scores, classification_scores, regression_scores
from stillhouse.models.scaling import parameter_count
from stillhouse.models.text_classifier import (
    encode_pieces,
    encode_texts,
    load_text_classifier,
    text_tokenizer,
)
from stillhouse.models.word_tokenizer import word_tokenizer
from stillhouse.objectives.logits import CrossEntropy
from stillhouse.objectives.regression import SquaredError
from stillhouse.tasks.embedded_lm import small_bert
from stillhouse.tasks.language import save_pretrained

DEMO = "demo"
EVALUATION_BATCH = 128


@dataclass(kw_only=True)
class TextClassificationSystem(System):
    """Fields of every system that fine-tunes or distils encoders on labelled text."""

    teacher: Annotated[
        str, "directory or hub id of an encoder or text classifier; 'demo': a small one, trained once on the demo text"
    ] = DEMO
    data: Annotated[
        str,
        "labelled text: .jsonl, .csv, .tsv or .parquet file, folder with a file for each split, hub data set id "
        "(nyu-mll/glue:rte), or 'demo'",
    ] = DEMO
    split: Annotated[str, "split of the data set that is trained on"] = "train"
    validation_split: Annotated[str | None, "split for the final figures; found by itself by default"] = None
    first_field: Annotated[str | None, "column of the (first) text; found by itself by default"] = None
    second_field: Annotated[str | None, "column of the second text, 'none' for none; found by itself by default"] = None
    label_field: Annotated[str | None, "column of the labels; found by itself by default"] = None
    labels: Annotated[Kind, "what labels are: classes, or numbers to predict; auto: fractions are numbers"] = "auto"
    validation: Annotated[
        float, "share held out for the final figures, where the data has no split for it", Gt(0), Lt(1)
    ] = 0.1
    selection: Annotated[float, "share of the training examples held out to choose by", Gt(0), Lt(1)] = 0.1
    train_size: Annotated[int | None, "so many training examples only, drawn by the seed", Ge(1)] = None
    length: Annotated[int, "tokens of an example at most", Ge(4)] = 128
    batch_size: Annotated[int, "examples in a micro-batch, all processes together", Ge(1)] = 32
    accumulate: Annotated[int, "micro-batches in an optimizer step", Ge(1)] = 1
    epochs: Annotated[float, "passes over the training examples", Gt(0)] = 3.0
    steps: Annotated[int | None, "optimizer steps; by default as many as the epochs need", Ge(1)] = None
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 2e-5
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0), Lt(1)] = 0.1
    weight_decay: Annotated[float, "decoupled weight decay", Ge(0)] = 0.01
    clip: Annotated[float | None, "largest gradient norm", Gt(0)] = 1.0
    keep: Annotated[
        Literal["last", "best"], "weights kept: the last, or, where labels are learnt, those of least selection loss"
    ] = "last"
    eval_examples: Annotated[int, "selection examples looked at during training", Ge(1)] = 512
    trust_remote_code: Annotated[bool, "run code that comes with a model"] = False
    demo_steps: Annotated[int, "steps in which the embedded encoder is trained", Ge(1)] = 600

    demo: ClassVar[dict[str, Any]] = {
        "length": 16,
        "train_size": 64,
        "epochs": 50.0,
        "lr": 1e-3,
        "eval_examples": 128,
    }
    smoke: ClassVar[dict[str, Any]] = {
        "demo_steps": 10,
        "train_size": 48,
        "steps": 12,
        "batch_size": 8,
        "eval_examples": 16,
    }

    def is_demo(self) -> bool:
        return self.__dict__["teacher"] == DEMO and self.__dict__["data"] == DEMO

    def learning_rate(self) -> Schedule:
        """The course of the learning rate, as a factor: straight down to 0 after the warm-up."""
        return linear(1.0, 0.0, warmup=self.warmup)


class Examples(TensorRows):
    """Padded columns (N, T); a batch is cut to its longest example."""

    def __getitem__(self, positions: Any) -> dict[str, torch.Tensor]:
        batch = super().__getitem__(positions)
        longest = int(batch["attention_mask"].sum(-1).max())
        return {
            name: column[:, :longest].long() if column.ndim == 2 else column for name, column in batch.items()
        }  # padding is on the right


@dataclass
class TextClassificationTask:
    """What a system on labelled text works with, once its fields have been turned into objects.

    ``train`` is what is learnt from, ``selection`` what choices are made by, ``validation`` what the final figures are
    taken on. ``encoder`` is the directory or hub id of the teacher's encoder; ``tokenizer`` is its.
    """

    system: TextClassificationSystem
    run: Run
    encoder: str
    tokenizer: Any
    train: Labelled
    selection: Labelled
    validation: Labelled

    @staticmethod
    def prepare(system: TextClassificationSystem, run: Run) -> Generator[Stage, Artifact, TextClassificationTask]:
        """Build the task; on the embedded task this yields the stage that trains the encoder."""
        if (system.teacher == DEMO) != (system.data == DEMO):
            raise ConfigError(
                "teacher=demo knows data=demo only; give a teacher for your data, or data for your teacher"
            )
        if system.data == DEMO:
            train, validation = demo_labelled()
        else:
            train, found = load_labelled(
                system.data,
                split=system.split,
                validation_split=system.validation_split,
                first_field=system.first_field,
                second_field=system.second_field,
                label_field=system.label_field,
                labels=system.labels,
            )
            train, validation = (train, found) if found is not None else train.held_out(system.validation)
        train, selection = train.held_out(system.selection)
        if system.train_size is not None:
            train = train.few(system.train_size, seed=system.seed)
        encoder = system.teacher
        if encoder == DEMO:
            encoder = str((yield demo_encoder(system.demo_steps)).path)
        tokenizer = text_tokenizer(encoder, trust_remote_code=system.trust_remote_code)
        return TextClassificationTask(system, run, encoder, tokenizer, train, selection, validation)

    @property
    def classes(self) -> tuple[str, ...] | None:
        """Names of the classes; None where a number is predicted."""
        return self.train.classes

    @property
    def save(self) -> Any:
        """Writes a model with its tokenizer."""
        return partial(save_pretrained, tokenizer=self.tokenizer)

    def new_classifier(self, name: str | None = None) -> Any:
        """The encoder (or the model in the directory ``name``) with a head for these classes, new where it has none."""
        system = self.system
        return load_text_classifier(
            name or self.encoder,
            classes=self.classes or (),
            seed=system.seed,
            trust_remote_code=system.trust_remote_code,
        )

    def examples(self, data: Labelled) -> Examples:
        """A labelled data set as rows of tokens."""
        columns = encode_texts(self.tokenizer, data.first, data.second, length=self.system.length)
        return Examples({**columns, "labels": data.labels})

    @cached_property
    def rows(self) -> Examples:
        """The training examples."""
        return self.examples(self.train)

    def pieces(self, texts: list[str]) -> Examples:
        """Unlabelled text as rows of tokens; long documents in several."""
        return Examples(encode_pieces(self.tokenizer, texts, length=self.system.length))

    def source(self, rows: Examples | None = None, *, batch_size: int | None = None) -> Batches:
        """Batches of the training examples, or of other rows."""
        system = self.system
        chosen = self.rows if rows is None else rows
        return Batches(chosen, batch_size or system.batch_size, seed=system.seed, gather=True)

    def masked(self, rows: Examples, *, rate: float = 0.15) -> Masked:
        """Batches of other rows with tokens masked anew each time."""
        return masked_source(self.source(rows), self.tokenizer, rate=rate, seed=self.system.seed)

    def steps_of(self, epochs: float, count: int | None = None) -> int:
        """Optimizer steps in so many passes over the training examples (or over ``count`` rows)."""
        number, system = len(self.train) if count is None else count, self.system
        return steps_in(epochs, number, batch_size=system.batch_size, accumulate=system.accumulate)

    def label_loss(self, model: Observed) -> Objective:
        """Cross-entropy with the labels, or the squared error where numbers are predicted."""
        logits = model.output("logits")
        return CrossEntropy(logits, name="Labels") if self.classes else SquaredError(logits, name="Labels")

    def finetune(
        self,
        name: str,
        model: Any,
        objective: Callable[[Observed], Objective] | None = None,
        *,
        steps: int | None = None,
        lr: float | None = None,
        weight_decay: float | None = None,
        source: Any = None,
        trainable: str | Callable[[str], bool] | None = None,
        cache: Mapping[str, Any] | None = None,
    ) -> Train:
        """A stage that trains a model; by default a classifier on the labels, as the system's fields say."""
        system = self.system
        observed = Observed(model, name=name)
        player = Player(
            name,
            observed,
            (objective or self.label_loss)(observed),
            optimizer=adamw(
                lr or system.lr, weight_decay=system.weight_decay if weight_decay is None else weight_decay
            ),
            lr=system.learning_rate(),
            clip=system.clip,
            trainable=trainable,
        )
        labelled = hasattr(model, "num_labels") and "Classification" in type(model).__name__
        heads = [s for s in player.objective.signals() if s.observed is observed and s.address.kind == "output"]
        return Train(
            name,
            player,
            source=self.source() if source is None else source,
            steps=steps or system.steps or self.steps_of(system.epochs),
            accumulate=system.accumulate,
            evaluate=(lambda: self.selection_figures(model)) if labelled else None,
            # Where nothing reads what the head says, it does not learn, and its loss is no reason to keep a state.
            best="selection_loss" if labelled and heads and system.keep == "best" else None,
            save=self.save,
            cache=cache,
        )

    def load(self, artifact: Artifact) -> Any:
        """The classifier a stage left."""
        model = load_text_classifier(str(artifact.path), trust_remote_code=self.system.trust_remote_code)
        return model.to(self.run.fabric.device)

    def batches_of(self, data: Labelled, most: int | None = None) -> Iterator[Batch]:
        """Held-out examples in batches, in order."""
        count = min(len(data), most or len(data))
        rows = self.examples(data.select(range(count)))
        for start in range(0, count, EVALUATION_BATCH):
            yield self.run.fabric.to_device(rows[list(range(start, min(count, start + EVALUATION_BATCH)))])

    def logits(self, model: Any, data: Labelled, most: int | None = None) -> torch.Tensor:
        """What a classifier says of held-out examples: (N, V), on the CPU."""
        return predict_logits(model, self.batches_of(data, most))

    def scores(self, logits: torch.Tensor, data: Labelled) -> dict[str, float]:
        """The figures of some logits: of classes, or of numbers."""
        labels = data.labels[: len(logits)]
        return classification_scores(logits, labels) if self.classes else regression_scores(logits.flatten(), labels)

    def selection_figures(self, model: Any) -> dict[str, float]:
        """Figures on the examples to choose by: the curve shown during training."""
        scores = self.scores(self.logits(model, self.selection, self.system.eval_examples), self.selection)
        shown = ("accuracy", "mcc") if self.classes else ("pearson", "spearman")
        loss = scores["nll" if self.classes else "mse"]
        return {"selection_loss": loss, **{name: scores[name] for name in shown}}

    def evaluation(
        self,
        models: Mapping[str, Artifact],
        *,
        reference: str | None = None,
        more: Mapping[str, Labelled] | None = None,
    ) -> Evaluate:
        """The final table. ``reference``: who agreement and KL are taken against; ``more``: further data, by name."""
        return Evaluate("evaluation", partial(self._evaluate, models, reference, more or {}))

    def _evaluate(
        self,
        artifacts: Mapping[str, Artifact],
        reference: str | None,
        more: Mapping[str, Labelled],
        context: Context,
    ) -> Table:
        models = {name: self.load(artifact) for name, artifact in artifacts.items()}
        logits = {name: self.logits(model, self.validation) for name, model in models.items()}
        rows: list[dict[str, Any]] = []
        for name, model in models.items():
            row: dict[str, Any] = {"name": name, "parameters": parameter_count(model)}
            row |= self.scores(logits[name], self.validation)
            if reference is not None and self.classes:
                row |= agreement_scores(logits[name], logits[reference])
            for other, data in more.items():
                found = self.scores(self.logits(model, data), data)
                row[other] = found["accuracy" if self.classes else "pearson"]
            rows.append(row)
            context.results |= {f"{name}/{key}": value for key, value in row.items() if key != "name"}
        columns = [column for column in COLUMNS if any(column.key in row for row in rows)]
        columns += [Column(name, name, ".1%" if self.classes else ".3f", "higher") for name in more]
        return Table("Held-out examples", columns, rows, [f"{len(self.validation):,} examples ({self.train.name})."])


COLUMNS = [
    Column("parameters", "parameters", ",d"),
    Column("accuracy", "accuracy", ".1%", "higher"),
    Column("f1", "F1", ".3f", "higher", "of class 1 where there are two, else the mean over classes"),
    Column("mcc", "MCC", ".3f", "higher", "Matthews' correlation"),
    Column("nll", "NLL", ".3f", "lower", "negative log-likelihood of the labels, nats"),
    Column("pearson", "Pearson", ".3f", "higher"),
    Column("spearman", "Spearman", ".3f", "higher"),
    Column("mse", "MSE", ".3f", "lower"),
    Column("agreement", "agreement", ".1%", "higher", "how often the likeliest class is the teacher's"),
    Column("kl", "KL to teacher", ".3f", "lower", "mean KL(teacher || model) per example, nats"),
]


@torch.no_grad()
def predict_logits(model: nn.Module, batches: Iterator[Batch]) -> torch.Tensor:
    """Logits (N, V) of a classifier, on the CPU; its mode is put back."""
    was_training = model.training
    model.eval()
    takes = Observed(model).output("logits")
    found = [takes(batch).float().cpu() for batch in batches]
    model.train(was_training)
    return torch.cat(found)


def masked_source(batches: Batches, tokenizer: Any, *, rate: float, seed: int) -> Masked:
    """Batches with tokens masked anew each time; special tokens never are."""
    if tokenizer.mask_token_id is None:
        raise ConfigError(
            "the tokenizer has no mask token, so no masked tokens can be learnt; give an encoder with one"
        )
    special = sorted(set(tokenizer.all_special_ids))
    return Masked(
        batches,
        mask_id=tokenizer.mask_token_id,
        vocab_size=len(tokenizer),
        special=special,
        rate=rate,
        seed=seed,
    )


# -- general text ---------------------------------------------------------------------------------------------------


def general_text(source: str, *, text_field: str | None = None, split: str | None = None) -> list[str]:
    """Unlabelled documents: the embedded language's sentences for ``demo``, else what `load_text` reads."""
    if source == DEMO:
        return demo_sentences()
    data = load_text(source, text_field=text_field, split=split)
    if data.kind != "text":
        raise ConfigError(
            f"{source}: {data.kind} records, but encoders read plain text; name a column with text_field="
        )
    return list(data.documents["text"])


# -- the embedded task ----------------------------------------------------------------------------------------------


def demo_sentences(language: int = 0, of: int = 1, *, count: int = 6000) -> list[str]:
    """Unlabelled sentences of one of the embedded languages."""
    return sentences(languages(of)[language], count, f"general {language}")[0]


def demo_labelled(language: int = 0, of: int = 1, *, count: int = 4000) -> tuple[Labelled, Labelled]:
    """Labelled sentences of one of the embedded languages, to learn from and to measure on."""
    made = []
    for part, number in (("train", count), ("validation", 1000)):
        texts, kinds = sentences(languages(of)[language], number, f"{part} {language}")
        made.append(Labelled(texts, None, torch.tensor(kinds), KINDS, "demo"))
    return made[0], made[1]


def demo_shifted(count: int = 1000) -> Labelled:
    """Labelled sentences of another sort than those to learn from: few of their nouns have an adjective."""
    texts, kinds = sentences(languages()[0], count, "shifted", adjectives=0.2)
    return Labelled(texts, None, torch.tensor(kinds), KINDS, "demo, shifted")


@dataclass(frozen=True)
class DemoEncoder:
    """How the embedded encoder is made; part of its fingerprint in the cache."""

    steps: int
    languages: int = 1
    hidden_size: int = 48
    layers: int = 4
    heads: int = 4
    length: int = 16
    batch_size: int = 128
    lr: float = 4e-3
    mask_rate: float = 0.3
    seed: int = 0


def demo_encoder(steps: int, **changes: Any) -> Train:
    """The stage that trains the embedded masked language model; ``changes``: fields of `DemoEncoder`."""
    from transformers import BertForMaskedLM

    recipe = DemoEncoder(steps=steps, **changes)
    spoken = languages(recipe.languages)
    tokenizer = word_tokenizer(vocabulary(spoken))
    config = small_bert(tokenizer, width=recipe.hidden_size, layers=recipe.layers, heads=recipe.heads, positions=64)

    def player() -> Player:  # with its own source, so that a cached encoder costs no text
        texts = demo_sentences() if len(spoken) == 1 else borrowing(spoken, 6000 * len(spoken), "general")
        rows = Examples(encode_pieces(tokenizer, texts, length=recipe.length))
        batches = Batches(rows, recipe.batch_size, seed=recipe.seed, gather=True)
        source = masked_source(batches, tokenizer, rate=recipe.mask_rate, seed=recipe.seed)
        torch.manual_seed(recipe.seed)
        encoder = Observed(BertForMaskedLM(config), name="encoder")
        objective = CrossEntropy(encoder.output("logits"), name="MaskedTokens")
        optimizer = adamw(recipe.lr)
        lr = linear(1.0, 0.0, warmup=0.05)
        return Player("encoder", encoder, objective, optimizer=optimizer, lr=lr, clip=1.0, source=source)

    return Train(
        "encoder",
        player,
        steps=recipe.steps,
        save=partial(save_pretrained, tokenizer=tokenizer),
        cache={**asdict(recipe), "task": "toy languages", "shape": asdict(Shape())},
    )
