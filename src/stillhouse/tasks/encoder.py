"""The encoder task: a BERT-like teacher, unlabelled text, and masked tokens to fill in; embedded or the user's own.

On the embedded task the text is a small language made by code (`stillhouse.data.toy_languages`), and a tiny BERT is
trained on it once, to fill in masked tokens, and kept in the cache. Its words are few, so that within two minutes it
knows more of a masked word than the word before it tells.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Lt
from torch import nn

from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.base.table import Column
from stillhouse.core.artifact import Artifact
from stillhouse.core.observed import Batch, Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.schedule import Schedule, linear
from stillhouse.core.stage import Stage
from stillhouse.core.system import System
from stillhouse.core.train import Train
from stillhouse.data.encoding import digest
from stillhouse.data.masking import IGNORED, Masked, mask_tokens
from stillhouse.data.sources import Batches, steps_in
from stillhouse.data.text import TextData, load_text
from stillhouse.data.toy_languages import Shape, languages, vocabulary
from stillhouse.data.windows import Windows, WindowSplit, tokenize_windows
from stillhouse.metrics.objectives import mean_values
from stillhouse.models.efficient_attention import reserved_positions
from stillhouse.models.elastic import load_encoder
from stillhouse.models.errors import clear_errors
from stillhouse.models.word_tokenizer import word_tokenizer
from stillhouse.objectives.logits import CrossEntropy
from stillhouse.tasks.embedded_lm import small_bert
from stillhouse.tasks.language import save_pretrained
from stillhouse.tasks.text_classification import demo_sentences

DEMO = "demo"


@dataclass(kw_only=True)
class EncoderSystem(System):
    """Fields of every system that distils BERT-like encoders on unlabelled text."""

    teacher: Annotated[
        str, "directory or hub id of a BERT or RoBERTa; 'demo': a tiny one, trained once on the demo text"
    ] = DEMO
    data: Annotated[str, ".txt, .jsonl, .json or .parquet file, folder, hub data set id, or 'demo'"] = DEMO
    split: Annotated[str | None, "split of a hub data set"] = None
    text_field: Annotated[str | None, "column that holds the text; found by itself by default"] = None
    on_bad_record: Annotated[Literal["error", "skip"], "what to do with a broken record"] = "error"
    validation: Annotated[float, "share of the documents held out for the final figures", Gt(0), Lt(1)] = 0.05
    selection: Annotated[float, "share of the documents to choose by", Gt(0), Lt(1)] = 0.05
    window: Annotated[int, "tokens in a training sequence", Ge(8)] = 128
    mask_rate: Annotated[float, "share of tokens that are masked where tokens are to be filled in", Gt(0), Lt(1)] = 0.15
    batch_size: Annotated[int, "sequences in a micro-batch, all processes together", Ge(1)] = 2048
    accumulate: Annotated[int, "micro-batches in an optimizer step", Ge(1)] = 1
    lr: Annotated[float, "peak learning rate of AdamW", Gt(0)] = 4e-5
    warmup: Annotated[float, "share of the steps over which the learning rate rises", Ge(0), Lt(1)] = 0.0
    weight_decay: Annotated[float, "decoupled weight decay", Ge(0)] = 0.01
    clip: Annotated[float | None, "largest gradient norm", Gt(0)] = 1.0
    eval_windows: Annotated[int, "held-out sequences that figures are taken on", Ge(1)] = 256

    demo_steps: Annotated[int, "steps in which the embedded teacher is trained", Ge(1)] = 1000

    demo: ClassVar[dict[str, Any]] = {"window": 32, "batch_size": 32, "lr": 1e-3, "warmup": 0.05}

    def is_demo(self) -> bool:
        return self.__dict__["teacher"] == DEMO and self.__dict__["data"] == DEMO

    def learning_rate(self) -> Schedule:
        """The course of the learning rate, as a factor: straight down to 0 after the warm-up."""
        return linear(1.0, 0.0, warmup=self.warmup)


@dataclass
class EncoderTask:
    """What an encoder system works with, once its fields have been turned into objects."""

    system: EncoderSystem
    run: Run
    teacher: Any
    tokenizer: Any
    data: TextData
    windows: Windows

    @staticmethod
    def prepare(system: EncoderSystem, run: Run) -> Generator[Stage, Artifact, EncoderTask]:
        """Build the task; on the embedded task this yields the stage that trains the teacher."""
        data = (
            demo_text()
            if system.data == DEMO
            else load_text(
                system.data, split=system.split, text_field=system.text_field, on_bad_record=system.on_bad_record
            )
        )
        if data.kind != "text":
            raise ConfigError(f"{data.name}: {data.kind} records, but encoders are trained on plain text")
        if data.skipped:
            run.say(f"{data.name}: skipped {data.skipped} bad record(s), such as {data.skipped_examples[0]}")
        if system.teacher == DEMO:
            if system.data != DEMO:
                raise ConfigError("teacher=demo is trained on data=demo; for your own data pass your own teacher")
            teacher, tokenizer = yield from _demo_teacher(data, system.demo_steps)
        else:
            teacher, tokenizer = load_masked_lm(system.teacher)
        positions = teacher.config.max_position_embeddings - reserved_positions(teacher)
        if system.window > positions:
            raise ConfigError(f"window={system.window}: the teacher has {positions} positions")
        windows = tokenize_windows(
            data, tokenizer, window=system.window, validation=system.validation, selection=system.selection
        )
        return EncoderTask(system, run, teacher, tokenizer, data, windows)

    @property
    def save(self) -> Any:
        """Writes a model with its tokenizer."""
        return partial(save_pretrained, tokenizer=self.tokenizer)

    def observed_teacher(self) -> Observed:
        """The frozen teacher, a masked language model."""
        return Observed(self.teacher, frozen=True, name="teacher")

    def steps_of(self, epochs: float, *, batch_size: int | None = None) -> int:
        """Optimizer steps in so many passes over the training text."""
        size, accumulate = batch_size or self.system.batch_size, self.system.accumulate
        return steps_in(epochs, len(self.windows.train), batch_size=size, accumulate=accumulate)

    def batches(self, *, batch_size: int | None = None) -> Batches:
        """Training text, as it is."""
        size = batch_size or self.system.batch_size
        return Batches(self.windows.train, size, seed=self.system.seed, gather=True)

    def masked_batches(self, *, batch_size: int | None = None) -> Masked:
        """Training text with tokens masked anew each time."""
        return _masked(self.batches(batch_size=batch_size), self.tokenizer, self.system.mask_rate, self.system.seed)

    def batches_of(self, split: WindowSplit, *, masked: bool = False) -> Iterator[Batch]:
        """Held-out text in batches of one size; if ``masked``, with the same tokens masked every time.

        A batch of which no token is masked is left out.

        Raises:
            ConfigError: in no batch there is one.
        """
        count = min(len(split), self.system.eval_windows)
        size = min(32, count)
        generator = torch.Generator().manual_seed(0)
        options, some = _mask_options(self.tokenizer, self.system.mask_rate), False
        for start in range(0, count - size + 1, size):
            batch = split[list(range(start, start + size))]
            if masked:
                ids, labels = mask_tokens(batch["input_ids"], generator=generator, **options)
                if not (labels != IGNORED).any():
                    continue
                batch = {**batch, "input_ids": ids, "labels": labels}
            some = True
            yield self.run.fabric.to_device(batch)
        if not some:
            raise ConfigError(
                f"no token is masked in {count} held-out sequence(s); raise eval_windows, validation or mask_rate"
            )

    def masked_loss(self, model: nn.Module, split: WindowSplit) -> float:
        """Mean cross-entropy of a masked language model on masked tokens, in nats."""
        term = CrossEntropy(Observed(model).output("logits"))
        return mean_values({"loss": term}, self.batches_of(split, masked=True))["loss"]

    def fill_in(
        self, name: str, model: Any, *, steps: int, lr: float | None = None, batch_size: int | None = None
    ) -> Train:
        """A stage that trains a masked language model on the text, without a teacher."""
        system = self.system
        student = Observed(model, name=name)
        player = Player(
            name,
            student,
            CrossEntropy(student.output("logits"), name="MaskedTokens"),
            optimizer=adamw(lr or system.lr, weight_decay=system.weight_decay),
            lr=system.learning_rate(),
            clip=system.clip,
        )
        return Train(
            name,
            player,
            source=self.masked_batches(batch_size=batch_size),
            steps=steps,
            evaluate=lambda: {"masked_loss": self.masked_loss(model, self.windows.selection)},
            save=self.save,
        )


COLUMNS = [
    Column("parameters", "parameters", ",d", "lower", "embeddings and layers, without pooler and heads"),
    Column("megaflops", "MFLOPs", ",.2f", "lower", "of the layers, for one sequence"),
    Column("relation_loss", "relation loss", ".4f", "lower", "to the teacher's last layer, on held-out text"),
    Column("masked_loss", "masked tokens", ".3f", "lower", "cross-entropy on masked tokens of held-out text, nats"),
]


def load_masked_lm(name: str) -> tuple[Any, Any]:
    """A BERT or RoBERTa with its masked-language-model head, and its tokenizer, ready to end documents and to mask.

    Raises:
        ModelError: another model, or a tokenizer without a mask or with more tokens than the model.
    """
    from transformers import AutoTokenizer

    model = load_encoder(name, masked_lm=True)
    with clear_errors(f"{name} (its tokenizer)"):
        tokenizer = AutoTokenizer.from_pretrained(name)
    if tokenizer.mask_token_id is None:
        raise ModelError(f"{name}: its tokenizer has no mask token; give an encoder with its own tokenizer")
    if len(tokenizer) > model.config.vocab_size:
        raise ModelError(
            f"{name}: its tokenizer has {len(tokenizer)} tokens, the model {model.config.vocab_size}; they do not "
            "belong together"
        )
    if tokenizer.eos_token is None:
        tokenizer.eos_token = tokenizer.sep_token  # BERT ends documents with its separator
    return model, tokenizer


def _mask_options(tokenizer: Any, rate: float) -> dict[str, Any]:
    return {
        "mask_id": tokenizer.mask_token_id,
        "vocab_size": len(tokenizer),
        "special": sorted(set(tokenizer.all_special_ids)),
        "rate": rate,
    }


def _masked(batches: Batches, tokenizer: Any, rate: float, seed: int) -> Masked:
    return Masked(batches, seed=seed, **_mask_options(tokenizer, rate))


def demo_text(sentences: int = 12_000, *, together: int = 25) -> TextData:
    """Unlabelled sentences of the embedded language, ``together`` of them a document."""
    import datasets

    made = demo_sentences(count=sentences)
    texts = [" [SEP] ".join(made[start : start + together]) for start in range(0, sentences, together)]
    content = digest("toy language", asdict(Shape()), sentences, together)
    return TextData(datasets.Dataset.from_dict({"text": texts}), "text", DEMO, content)


@dataclass(frozen=True)
class DemoTeacher:
    """How the embedded teacher is made; part of its fingerprint in the cache."""

    steps: int
    hidden_size: int = 96
    layers: int = 6
    heads: int = 6
    window: int = 32
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.01
    mask_rate: float = 0.3
    seed: int = 0


def _demo_teacher(data: TextData, steps: int) -> Generator[Stage, Artifact, tuple[Any, Any]]:
    from transformers import BertForMaskedLM

    recipe = DemoTeacher(steps=steps)
    tokenizer = word_tokenizer(vocabulary(languages(1)))
    tokenizer.eos_token = tokenizer.sep_token
    windows = tokenize_windows(
        data,
        tokenizer,
        window=recipe.window,
        validation=EncoderSystem.validation,
        selection=EncoderSystem.selection,
    )
    config = small_bert(tokenizer, width=recipe.hidden_size, layers=recipe.layers, heads=recipe.heads, positions=128)
    batches = Batches(windows.train, recipe.batch_size, seed=recipe.seed, gather=True)

    def player() -> Player:
        torch.manual_seed(recipe.seed)
        teacher = Observed(BertForMaskedLM(config), name="teacher")
        optimizer = adamw(recipe.lr, weight_decay=recipe.weight_decay)
        objective = CrossEntropy(teacher.output("logits"), name="MaskedTokens")
        return Player("teacher", teacher, objective, optimizer=optimizer, lr=linear(1.0, 0.0, warmup=0.05), clip=1.0)

    trained = yield Train(
        "teacher",
        player,
        source=_masked(batches, tokenizer, recipe.mask_rate, recipe.seed),
        steps=recipe.steps,
        save=partial(save_pretrained, tokenizer=tokenizer),
        cache={**asdict(recipe), "task": "encoder", "data": data.fingerprint},
    )
    return load_masked_lm(str(trained.path))
