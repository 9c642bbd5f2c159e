"""In-context learning: a frozen language model, demonstrations of many tasks, and tasks it has never seen.

`InContextSystem` has the fields; `InContextTask.prepare` turns them into the frozen model, the tasks and measurements.
The model may be a decoder alone, which reads demonstrations and question and goes on with the answer, or an encoder
that reads them and a decoder that writes the answer (T5); its config says which.

On the embedded task a task is a random map from keys to labels, and a small model is trained once, and kept in the
cache, until it has learnt to read such maps from demonstrations.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Generator, Mapping, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Lt
from torch import Tensor

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.schedule import cosine, linear
from stillhouse.core.stage import Context, Evaluate, Stage
from stillhouse.core.system import System
from stillhouse.core.train import Train
from stillhouse.data.in_context import (
    Example,
    IclTask,
    Item,
    all_maps,
    collate,
    collate_answers,
    episode,
    key_map,
    pair_streams,
    read_records,
    shown,
    shuffled,
    tasks_of,
)
from stillhouse.data.sources import Drawn
from stillhouse.data.text import load_text
from stillhouse.models.causal_lm import load_causal_lm, new_causal_lm, parameter_count, student_from_spec
from stillhouse.models.demonstration_distiller import DemonstrationDistiller, readers_of
from stillhouse.models.encoder_decoders import (
    is_encoder_decoder,
    is_text_encoder,
    load_encoder_decoder,
    load_text_encoder,
    new_text_encoder,
)
from stillhouse.models.tokenizers import check_same_tokenizer
from stillhouse.objectives.language import TokenCrossEntropy, head_of

DEMO = "demo"
COPIES = 8  # of every pair of an embedded task
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class KeyMaps:
    """The embedded tasks and the model that reads them; part of its fingerprint in the cache."""

    keys: int = 3  # of six, a model of this size learns to read maps only after some thousand steps
    labels: int = 8
    test: int = 32
    pairs: int = 13
    streams: int = 4000
    width: int = 64
    layers: int = 3
    batch_size: int = 64
    steps: int = 1000
    lr: float = 3e-3
    seed: int = 0

    def maps(self) -> tuple[Tensor, Tensor]:
        """The maps that everything is learnt from, the reader included, and those nothing is learnt from."""
        found = all_maps(self.keys, self.labels, seed=self.seed)
        return found[self.test :], found[: self.test]


@dataclass(kw_only=True)
class InContextSystem(System):
    """Fields of every system on in-context learning."""

    teacher: Annotated[
        str, "directory or hub id of the LM that reads, causal or T5; stays as it is; 'demo': a small one"
    ] = DEMO
    student: Annotated[
        str,
        "the LM or T5 encoder that distils: directory, hub id, the teacher's architecture made smaller (layers=2), "
        "or 'teacher': it begins as a copy of the teacher",
    ] = "layers=2"
    data: Annotated[str, ".jsonl of {task, input, output, candidates}, or 'demo': maps from keys to labels"] = DEMO
    text: Annotated[str | None, "text for the first stage; without, the tasks' own examples"] = None
    test_tasks: Annotated[float, "share of the tasks held out, the last ones of the file", Gt(0), Lt(1)] = 0.2
    separator: Annotated[str, "between input and output"] = "\n"
    end: Annotated[str, "after an output"] = "\n\n"
    demos: Annotated[int, "demonstrations of a task", Ge(0)] = 16
    demo_tokens: Annotated[int, "most tokens of demonstrations; more are cut off at the left", Ge(1)] = 900
    queries: Annotated[int, "questions asked of each held-out task", Ge(1)] = 64
    batch_size: Annotated[int, "episodes in a batch", Ge(1)] = 8
    weight_decay: Annotated[float, "decoupled weight decay", Ge(0)] = 0.0
    clip: Annotated[float | None, "largest gradient norm", Gt(0)] = 1.0
    reader_steps: Annotated[int, "optimizer steps in which the embedded model learns to read maps", Ge(1)] = 1000
    trust_remote_code: Annotated[bool, "run code that comes with a model"] = False

    demo: ClassVar[dict[str, Any]] = {
        "student": "teacher",
        "demos": 12,
        "demo_tokens": 24,
        "queries": 12,
        "batch_size": 32,
    }

    def is_demo(self) -> bool:
        return self.__dict__["teacher"] == DEMO and self.__dict__["data"] == DEMO


@dataclass
class InContextTask:
    """What such a system works with.

    Attributes:
        lm: the model that reads, frozen.
        train, test: tasks to learn from, and tasks that nothing is learnt from.
        streams: text for the first stage (N, W).
    """

    system: InContextSystem
    run: Run
    lm: Any
    tokenizer: Any
    train: list[IclTask]
    test: list[IclTask]
    streams: Tensor

    @staticmethod
    def prepare(system: InContextSystem, run: Run) -> Generator[Stage, Artifact, InContextTask]:
        """Build the task; on the embedded task this yields the stage that trains the model which reads."""
        if (system.teacher == DEMO) != (system.data == DEMO):
            raise ConfigError("teacher=demo knows only data=demo, and no other knows that; give both or neither")
        recipe = KeyMaps(steps=system.reader_steps)
        if system.teacher == DEMO:
            lm, tokenizer = yield from _demo_reader(recipe)
            records = [
                [one for chosen in maps.tolist() for one in key_map(chosen, recipe.labels, copies=COPIES)]
                for maps in recipe.maps()
            ]
        else:
            lm, tokenizer = _load_lm(system.teacher, system.trust_remote_code)
            records = _split(read_records(system.data), system.test_tasks, system.data)

        def encode(text: str) -> list[int]:
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        form = {"separator": system.separator, "end": system.end}
        train, test = (tasks_of(part, encode, **form) for part in records)
        for task in (*train, *test):
            if len(task.examples) <= system.demos:
                raise DataError(
                    f"{system.data}: task {task.name!r} has {len(task.examples)} examples; {system.demos} "
                    "demonstrations and a question need more: lower demos or leave the task out"
                )
        lm.requires_grad_(False)
        if system.teacher == DEMO:
            generator = torch.Generator().manual_seed(recipe.seed + 2)
            streams = pair_streams(recipe.maps()[0], recipe.streams, recipe.pairs, generator=generator)
        else:
            streams = _streams(system, train, encode, longest=_positions(lm.config))
        return InContextTask(system, run, lm, tokenizer, train, test, streams)

    @property
    def writes(self) -> bool:
        """Whether an encoder reads and a decoder writes."""
        return bool(self.lm.config.is_encoder_decoder)

    def new_distiller(self, *, vectors: int, chunks: int) -> DemonstrationDistiller:
        """A distiller whose language model is the student, with random weights or with those it comes with."""
        system, config = self.system, self.lm.config
        text = max(len(one.question) + len(one.answer) for task in (*self.train, *self.test) for one in task.examples)
        if max(system.demo_tokens, vectors * chunks) + text > _positions(config):
            raise ConfigError(
                f"demo_tokens={system.demo_tokens} and vectors={vectors} beside {text} tokens of text are more than "
                f"the {_positions(config)} positions of {system.teacher}; lower them"
            )
        if system.student == "teacher":
            if self.writes:
                lm, _ = _load_lm(system.teacher, system.trust_remote_code, encoder=True)
            else:
                lm = deepcopy(self.lm).requires_grad_(True)
        elif "=" in system.student or system.student.startswith("scale:"):
            if config.is_encoder_decoder:
                lm = new_text_encoder(system.student, config, seed=system.seed)
            else:
                lm = new_causal_lm(student_from_spec(system.student, config), seed=system.seed)
        else:
            lm, own = _load_lm(system.student, system.trust_remote_code, encoder=True)
            check_same_tokenizer(self.tokenizer, own)
        longest, read = _positions(lm.config), -(-system.demo_tokens // chunks)
        if read + vectors > longest:
            raise ConfigError(
                f"{read} tokens of demonstrations and vectors={vectors} are more than the {longest} positions of the "
                f"student; lower demo_tokens or vectors, or raise chunks"
            )
        table = self.lm.get_input_embeddings()
        distiller = DemonstrationDistiller(
            lm, vectors=vectors, width=table.weight.shape[1], chunks=chunks, seed=system.seed
        ).eval()
        some = next(self.episodes())
        asked = table(some["input_ids"])[some["attention_mask"].bool()]
        distiller.fit_scale(some["demo_ids"], some["demo_mask"], asked)
        return distiller

    def batch(self, items: Sequence[Item]) -> Batch:
        """Items as a batch; see `collate` and `collate_answers`."""
        pad = self.tokenizer.pad_token_id or self.tokenizer.eos_token_id or 0
        if self.writes:
            start, end = self.lm.config.decoder_start_token_id, self.tokenizer.eos_token_id
            return collate_answers(items, pad=pad, start=start, end=end, demo_tokens=self.system.demo_tokens)
        return collate(items, pad=pad, demo_tokens=self.system.demo_tokens)

    def episodes(self) -> Drawn:
        """Batches of episodes: a task, demonstrations of it, and another example to answer, all drawn."""

        def draw(generator: torch.Generator) -> Batch:
            chosen = torch.randint(len(self.train), (self.system.batch_size,), generator=generator).tolist()
            return self.batch([episode(self.train[n], self.system.demos, generator) for n in chosen])

        return Drawn(draw, seed=self.system.seed)

    def cut_text(self, ratio: float, *, vectors: int) -> Drawn:
        """Batches of text of which the share ``ratio`` plays the demonstrations, and the rest what follows them."""
        length, longest = self.streams.shape[1], _positions(self.lm.config)
        cut = max(1, min(round(ratio * length), length - 2))
        if vectors + length - cut > longest:
            raise ConfigError(
                f"{vectors} vectors and {length - cut} tokens of text (ratio={ratio:g}) are more than the {longest} "
                f"positions of {self.system.teacher}; lower vectors or demo_tokens, or raise ratio"
            )
        asked = (cut + length) // 2 if self.writes else length  # an encoder reads half of the rest, a decoder writes it

        def draw(generator: torch.Generator) -> Batch:
            rows = torch.randint(len(self.streams), (self.system.batch_size,), generator=generator)
            return self.batch(
                [
                    Item(tuple(row[:cut]), tuple(row[cut:asked]), tuple(row[asked:]))
                    for row in self.streams[rows].tolist()
                ]
            )

        return Drawn(draw, seed=self.system.seed + 1)

    def train_distiller(
        self,
        name: str,
        distiller: DemonstrationDistiller,
        objective: Callable[[Observed], Objective],
        *,
        source: Drawn,
        steps: int,
        lr: float,
    ) -> Train:
        """A stage that trains ``distiller`` and nothing else."""
        system = self.system
        observed = Observed(distiller, name="distiller")
        optimizer = adamw(lr, weight_decay=system.weight_decay)
        player = Player(
            "distiller", observed, objective(observed), optimizer=optimizer, lr=linear(1.0, 0.0), clip=system.clip
        )
        return Train(name, player, source=source, steps=steps, save=self.save)

    def save(self, distiller: Any, folder: Path) -> None:
        """Write a distiller with its tokenizer."""
        distiller.save(folder, self.tokenizer)

    def load(self, artifact: Artifact) -> DemonstrationDistiller:
        """The distiller a stage left."""
        return DemonstrationDistiller.load(artifact.path).to(self.run.fabric.device)

    def evaluation(self, distiller: Artifact) -> Evaluate:
        """The table: the frozen model without demonstrations, with them, and with the vectors, on unseen tasks."""
        return Evaluate("evaluation", partial(self._evaluate, distiller))

    @torch.no_grad()
    def _evaluate(self, artifact: Artifact, context: Context) -> Table:
        self.lm.to(self.run.fabric.device).eval()
        distiller, (reads, vectors) = self.load(artifact), readers_of(self.lm)

        def plain(batch: Batch) -> Tensor:
            return reads(*(batch[name] for name in reads.needs))

        def distilled(batch: Batch) -> Tensor:
            once = distiller(batch["demo_ids"][:1], batch["demo_mask"][:1])  # of one task: made once, read by all
            return vectors(once.expand(len(batch["input_ids"]), -1, -1), *(batch[name] for name in vectors.needs))

        ways: Mapping[str, tuple[Callable[[Batch], Tensor], str]] = {
            "zero-shot": (plain, "none"),
            "in context": (plain, "right"),
            "distilled": (distilled, "right"),
            "in context, answers exchanged": (plain, "exchanged"),
            "distilled, answers exchanged": (distilled, "exchanged"),
        }
        rows = []
        for name, (read, kind) in ways.items():
            right, prefix = zip(
                *(self._asked(task, number, read, kind) for number, task in enumerate(self.test)), strict=True
            )
            tokens = distiller.vectors * distiller.chunks if read is distilled else sum(prefix) / len(prefix)
            rows.append({"name": name, "accuracy": sum(right) / len(right), "prefix": float(tokens)})
        figures = {f"{row['name']}/{key}": row[key] for row in rows for key in ("accuracy", "prefix")}
        gap = figures["in context/accuracy"] - figures["zero-shot/accuracy"]
        closed = (figures["distilled/accuracy"] - figures["zero-shot/accuracy"]) / gap if gap > 0 else 0.0
        context.results = {**figures, "distilled/gap": closed, "parameters": parameter_count(distiller)}
        note = f"{len(self.test)} tasks that nothing was trained on; the distiller closes {closed:.0%} of the gap."
        return Table("Unseen tasks", COLUMNS, rows, [note])

    def _asked(self, task: IclTask, number: int, read: Callable[[Batch], Tensor], kind: str) -> tuple[float, int]:
        """Accuracy on one task with the same demonstrations for all questions, and how many tokens those are."""
        generator = torch.Generator().manual_seed(number)
        order = torch.randperm(len(task.examples), generator=generator).tolist()
        examples = [task.examples[n] for n in order]
        chosen, asked = examples[: self.system.demos], examples[self.system.demos :][: self.system.queries]
        if kind == "exchanged":
            chosen = shuffled(chosen, generator)
        demonstrations = () if kind == "none" else shown(chosen)
        right = [self._right(example, demonstrations, read) for example in asked]
        return sum(right) / len(right), min(len(demonstrations), self.system.demo_tokens)

    def _right(self, example: Example, demonstrations: tuple[int, ...], read: Callable[[Batch], Tensor]) -> bool:
        """Whether the right candidate has the highest mean log-probability; for free text, whether greedy decoding
        would write the answer: every token of it is the likeliest after those before it."""
        answers = example.candidates or (example.answer,)
        batch = self.run.fabric.to_device(self.batch([Item(demonstrations, example.question, one) for one in answers]))
        logits = read(batch) if self.writes else read(batch)[:, :-1]
        if example.candidates:
            best = int(mean_logprobs(logits, batch["targets"]).argmax())
            return answers[best] == example.answer
        scored = batch["targets"] >= 0
        return bool((logits.argmax(-1) == batch["targets"])[scored].all())


COLUMNS = [
    Column("accuracy", "accuracy", ".1%", "higher", "of questions of unseen tasks answered right, mean over tasks"),
    Column("prefix", "prefix", ".1f", "lower", "tokens, or vectors, before the question"),
]


def mean_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean log-probability of the targets of each row: (B, T, V) and (B, T) -> (B,); negative targets are left out."""
    scored = targets >= 0
    found = logits.float().log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0]
    return (found * scored).sum(1) / scored.sum(1)


def _load_lm(name: str, trust_remote_code: bool, *, encoder: bool = False) -> tuple[Any, Any]:
    """A language model and its tokenizer: a decoder, or an encoder and a decoder, of which the first will do."""
    if is_text_encoder(name) or is_encoder_decoder(name, trust_remote_code=trust_remote_code):
        load = load_text_encoder if encoder else load_encoder_decoder
        return load(name, trust_remote_code=trust_remote_code)
    return load_causal_lm(name, dtype=torch.float32, trust_remote_code=trust_remote_code)


def _split(records: list[dict[str, Any]], share: float, name: str) -> list[list[dict[str, Any]]]:
    """Records of the tasks to learn from, and of those held out: the last ones of the file."""
    names = list(dict.fromkeys(record["task"] for record in records))
    if len(names) < 2:
        raise DataError(f"{name}: has one task, {names[0]!r}; give at least two, one to learn from and one to be asked")
    held = set(names[-max(1, min(round(share * len(names)), len(names) - 1)) :])
    return [[record for record in records if (record["task"] in held) == wanted] for wanted in (False, True)]


def _positions(config: Any) -> int:
    """How many tokens a model reads at most; many, where it counts distances."""
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def _streams(
    system: InContextSystem, train: list[IclTask], encode: Callable[[str], list[int]], *, longest: int
) -> Tensor:
    """Runs of tokens of the text, or of the tasks' examples: demonstrations and a quarter more, if that can be read."""
    if system.text is None:
        tokens = [token for task in train for token in shown(task.examples)]
    else:
        tokens = [token for text in load_text(system.text).documents["text"] for token in encode(text + system.end)]
    length = min(round(1.25 * system.demo_tokens), longest, max(4, len(tokens) // 2))
    if len(tokens) < length:
        raise DataError(
            f"{system.text or system.data}: {len(tokens)} tokens are too few for the first stage; give more"
        )
    count = len(tokens) // length
    return torch.tensor(tokens[: count * length]).reshape(count, length)


def _demo_reader(recipe: KeyMaps) -> Generator[Stage, Artifact, tuple[Any, Any]]:
    """Train the embedded model that reads maps in context; kept in the cache."""
    from transformers import LlamaConfig

    tokenizer = _key_tokenizer(recipe)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=recipe.width,
        intermediate_size=2 * recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    learnt, _ = recipe.maps()

    def draw(generator: torch.Generator) -> Batch:
        ids = pair_streams(learnt, recipe.batch_size, recipe.pairs, generator=generator)
        return {"input_ids": ids, "loss_mask": (torch.arange(ids.shape[1]) % 2).expand_as(ids)}

    def player() -> Player:
        reader = Observed(new_causal_lm(config, seed=recipe.seed), name="reader", options={"use_cache": False})
        objective = TokenCrossEntropy(head_of(reader))
        return Player(
            "reader", reader, objective, optimizer=adamw(recipe.lr), lr=cosine(1.0, 0.0, warmup=0.05), clip=1.0
        )

    def save(model: Any, folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    cache = {**asdict(recipe), "config": {**config.to_dict(), "transformers_version": None}}
    source = Drawn(draw, seed=recipe.seed)
    trained = yield Train("reader", player, source=source, steps=recipe.steps, save=save, cache=cache)
    return load_causal_lm(str(trained.path))


def _key_tokenizer(recipe: KeyMaps) -> Any:
    """One token a key and a label, and the end; keys first."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|end|>"
    words = [*(f"k{n}" for n in range(recipe.keys)), *(f"v{n}" for n in range(recipe.labels)), end]
    backend = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token=end))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, pad_token=end)
