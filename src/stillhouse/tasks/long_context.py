"""Long texts for encoders: masked tokens at two lengths, and tagging tasks whose answer is far from its reason.

Entities are tagged word by word in BIO form and scored as whole entities. Three tasks are generated: ``short-ner``
(the type of a name stands right before it), ``long-ner`` (it stands in the first words of the document only) and
``retrieval`` (the first words ask for a key; the word after that key, far below, is to be tagged). A file of the
user's own has a document a line: ``{"tokens": [...], "tags": ["O", "B-PER", ...]}``; or a question, whose answer is
tagged in its context: ``{"question": ..., "context": ..., "answers": [...]}``.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Batch, Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Evaluate, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.json_lines import json_lines
from stillhouse.data.masking import IGNORED, Masked
from stillhouse.data.rows import TensorRows
from stillhouse.data.sources import Batches
from stillhouse.data.windows import Windows, tokenize_windows
from stillhouse.metrics.answers import answer_scores, answer_words
from stillhouse.models.efficient_attention import (
    Attention,
    alternate_layers,
    convert_encoder,
    encoder_cost,
    load_efficient,
    parts_of,
    shallow,
    token_classifier,
)
from stillhouse.models.lsg import Sparse
from stillhouse.objectives.logits import CrossEntropy
from stillhouse.tasks.encoder import EncoderSystem, EncoderTask

TaskName = Literal["short-ner", "long-ner", "retrieval"]
FAR = ("long-ner", "retrieval")
TYPES = ("PER", "LOC", "ORG")


@dataclass(frozen=True)
class Lexicon:
    """The words of generated documents: frequent ones of the text that the teacher knows, shared out.

    ``cues`` and ``headers`` have a word for each of `TYPES`: the former stands before a name, the latter in the head.
    """

    fillers: tuple[str, ...]
    names: tuple[str, ...]
    cues: tuple[str, ...]
    headers: tuple[str, ...]
    find: str
    key: str

    @staticmethod
    def of(texts: Iterable[str], *, most: int = 400) -> Lexicon:
        """The words of ``texts`` by how often they occur; the rarest of the ``most`` frequent become cues and names.

        Raises:
            DataError: fewer than 24 different words.
        """
        counts = Counter(word for text in texts for word in text.split() if word.isalpha())
        words = sorted(counts, key=lambda word: (-counts[word], word))[:most]
        if len(words) < 24:
            raise DataError(f"the text has {len(words)} different words; tasks are generated from at least 24")
        *rest, find, key = words
        rest, cues, headers = rest[:-6], tuple(rest[-6:-3]), tuple(rest[-3:])
        half = len(rest) // 2
        return Lexicon(tuple(rest[:half]), tuple(rest[half:]), cues, headers, find, key)


@dataclass(frozen=True)
class Document:
    """Words with a BIO tag each; the first ``head`` words say what the rest is about, or ask for ``answers``."""

    words: list[str]
    tags: list[str]
    head: int = 1
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaggedSet:
    """A tagging task, in tokens: ``input_ids``, masks and ``labels`` (N, T), a label on the first token of a word.

    ``asked`` are the documents held out where they are questions; with ``by_answer`` the score is their answers' F1.
    """

    labels: list[str]
    train: TensorRows
    test: TensorRows
    far: bool
    asked: Sequence[Document] = ()
    by_answer: bool = False


@dataclass(kw_only=True)
class LongContextSystem(EncoderSystem):
    """Fields of every system that makes encoders read long texts."""

    length: Annotated[int, "tokens of a long text", Ge(16)] = 4096
    trained_positions: Annotated[int | None, "positions the teacher was trained with, if fewer than it has", Ge(1)] = (
        None
    )
    attention_window: Annotated[int, "Longformer: tokens that one sees, both sides together", Ge(2)] = 512
    block_size: Annotated[int, "BigBird and LSG: tokens of a block", Ge(1)] = 64
    random_blocks: Annotated[int, "BigBird: blocks that each one sees by chance", Ge(1)] = 3
    landmarks: Annotated[int, "Nystromformer: means that stand for all queries and keys", Ge(1)] = 64
    sparsity_factor: Annotated[int, "LSG: beyond the neighbouring blocks, one token in so many is seen", Ge(1)] = 2
    sparse_tokens: Annotated[Sparse, "LSG: which ones; none leaves them out"] = "norm"
    global_tokens: Annotated[int, "LSG: learned tokens before the text that see everything and are seen", Ge(0)] = 1
    short_share: Annotated[
        float, "share of the texts that is cut to `window` tokens; the rest is long", Ge(0), Le(1)
    ] = 0.5
    tasks: Annotated[list[TaskName] | None, "generated tagging tasks; all three by default"] = None
    tagged: Annotated[str | None, "tagging task of your own: a .jsonl file of tokens and tags, instead"] = None
    questions: Annotated[
        str | None, "questions of your own: a .jsonl file of question, context and answers, instead"
    ] = None
    documents: Annotated[int, "generated documents to learn from; a quarter as many are tested on", Ge(8)] = 320
    tune_steps: Annotated[int, "steps of fine-tuning on a task", Ge(1)] = 1000
    tune_lr: Annotated[float, "peak learning rate of fine-tuning", Gt(0)] = 3e-5
    tune_batch: Annotated[int, "documents in a step of fine-tuning", Ge(1)] = 32

    demo: ClassVar[dict[str, Any]] = {
        **EncoderSystem.demo,
        "length": 128,
        "trained_positions": 32,
        "batch_size": 8,
        "attention_window": 16,
        "block_size": 8,
        "random_blocks": 1,
        "landmarks": 16,
        "tune_steps": 120,
        "tune_lr": 2e-3,
        "tune_batch": 8,
    }
    smoke: ClassVar[dict[str, Any]] = {
        "demo_steps": 4,
        "batch_size": 2,
        "tasks": ["long-ner"],
        "documents": 8,
        "tune_steps": 2,
        "tune_batch": 2,
    }


# -- generated documents --------------------------------------------------------------------------------------------


def make_document(task: TaskName, words: int, lexicon: Lexicon, generator: random.Random) -> Document:
    """A document of about so many words.

    What is far stands in the second half: nothing between it and the head of the document tells its tag.
    """
    body = [(word, "O") for word in generator.choices(lexicon.fillers, k=words)]
    begin = 0 if task == "short-ner" else words // 2
    spots = range(begin, words - 3, 4)
    places = sorted(generator.sample(spots, k=min(6, len(spots))), reverse=True)
    if task == "retrieval":
        keys = generator.sample(lexicon.names, k=len(places))
        asked = generator.randrange(len(keys))
        for number, (place, name) in enumerate(zip(places, keys, strict=True)):
            tag = "B-ANS" if number == asked else "O"
            body[place : place + 1] = [(lexicon.key, "O"), (name, "O"), (generator.choice(lexicon.names), tag)]
        return _document([(lexicon.find, "O"), (keys[asked], "O")], body)
    kind = generator.randrange(len(TYPES))
    for place in places:
        if task == "short-ner":
            kind = generator.randrange(len(TYPES))
        cue = [(lexicon.cues[kind], "O")] if task == "short-ner" else []
        names = generator.choices(lexicon.names, k=generator.choice((1, 2)))
        tags = [f"B-{TYPES[kind]}", f"I-{TYPES[kind]}"]
        body[place : place + 1] = [*cue, *zip(names, tags, strict=False)]
    return _document([] if task == "short-ner" else [(lexicon.headers[kind], "O")], body)


def _document(head: list[tuple[str, str]], body: list[tuple[str, str]]) -> Document:
    words, tags = zip(*head, *body, strict=True)
    answers = tuple(word for word, tag in body if tag == "B-ANS")
    return Document(list(words), list(tags), head=max(1, len(head)), answers=answers)


def read_tagged(file: str) -> list[Document]:
    """Documents from a .jsonl file: ``tokens``, ``tags`` and, where more than one word is global, ``head``.

    Raises:
        DataError: naming the line that is wrong.
    """
    found, like = [], '{"tokens": [...], "tags": [...]}'
    for place, record in json_lines(file, like=like):
        try:
            words, tags = list(map(str, record["tokens"])), list(map(str, record["tags"]))
            head = int(record.get("head", 1))
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{place}: must be {like}") from error
        strange = next((tag for tag in tags if tag != "O" and tag[:2] not in ("B-", "I-")), None)
        if len(words) != len(tags) or not words or strange:
            problem = f"{strange!r} is no BIO tag" if strange else f"{len(words)} tokens, {len(tags)} tags"
            raise DataError(f"{place}: {problem}; give every token O, B-TYPE or I-TYPE")
        found.append(Document(words, tags, head))
    if len(found) < 8:
        raise DataError(f"{file}: {len(found)} documents; at least 8 are needed to learn from and to test on")
    return found


def read_questions(file: str) -> list[Document]:
    """Questions from a .jsonl file, as documents: the question's words, then its context with the answer tagged.

    Of ``answers`` the first that stands in the context is tagged, where it stands first; all of them count as right.

    Raises:
        DataError: naming the line that is wrong.
    """
    found, like = [], '{"question": ..., "context": ..., "answers": [...]}'
    for place, record in json_lines(file, like=like):
        try:
            head, body = str(record["question"]).split(), str(record["context"]).split()
            given = record["answers"]
            answers = (given,) if isinstance(given, str) else tuple(map(str, given))
        except (KeyError, TypeError) as error:
            raise DataError(f"{place}: must be {like}") from error
        span = next((one for one in (_stands(answer, body) for answer in answers) if one), None)
        if not head or span is None:
            problem = f"no answer of {list(answers)} stands in the context" if head else "the question has no words"
            raise DataError(f"{place}: {problem}; correct it or leave it out")
        tags = ["O"] * len(body)
        tags[span[0] : span[1]] = ["B-ANS", *["I-ANS"] * (span[1] - span[0] - 1)]
        found.append(Document([*head, *body], [*["O"] * len(head), *tags], len(head), answers))
    if len(found) < 8:
        raise DataError(f"{file}: {len(found)} questions; at least 8 are needed to learn from and to test on")
    return found


def _stands(answer: str, words: Sequence[str]) -> tuple[int, int] | None:
    """Where the words of an answer stand: first place and the one after the last; punctuation does not matter."""
    wanted, plain = answer.split(), [" ".join(answer_words(word)) or word.lower() for word in words]
    goal = [" ".join(answer_words(word)) or word.lower() for word in wanted]
    starts = range(len(plain) - len(goal) + 1) if goal else range(0)
    place = next((start for start in starts if plain[start : start + len(goal)] == goal), None)
    return None if place is None else (place, place + len(goal))


def encode_tagged(documents: Sequence[Document], labels: Sequence[str], tokenizer: Any, length: int) -> TensorRows:
    """Documents as tokens, cut or padded to ``length``; words that do not fit are not scored."""
    number = {label: index for index, label in enumerate(labels)}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    columns: dict[str, list[Tensor]] = {}
    for document in documents:
        called = tokenizer(" ".join(document.words), return_offsets_mapping=True, truncation=True, max_length=length)
        ids, spans = called["input_ids"], called["offset_mapping"]
        tags, far = torch.full((length,), IGNORED), torch.zeros(length, dtype=torch.long)
        far[0] = 1
        token = begun = 0
        for place, (word, tag) in enumerate(zip(document.words, document.tags, strict=True)):
            while token < len(ids) and spans[token][1] <= begun:
                token += 1
            if token == len(ids):
                break
            tags[token] = number[tag]
            if place < document.head:
                ends = [index for index in range(token, len(ids)) if spans[index][0] < begun + len(word)]
                far[token : ends[-1] + 1] = 1
            begun += len(word) + 1
        filled = torch.full((length,), pad)
        filled[: len(ids)] = torch.tensor(ids)
        row = {"input_ids": filled, "attention_mask": (torch.arange(length) < len(ids)).long(), "labels": tags}
        for name, column in {**row, "global_attention_mask": far}.items():
            columns.setdefault(name, []).append(column)
    return TensorRows({name: torch.stack(column) for name, column in columns.items()})


# -- scoring --------------------------------------------------------------------------------------------------------

Entity = tuple[int, int, str]


def entities(tags: Sequence[str]) -> set[Entity]:
    """(first, last, type) of every entity of a BIO sequence; an I without a beginning of its type begins one."""
    found: set[Entity] = set()
    start, kind = 0, ""
    for place, tag in enumerate([*tags, "O"]):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            found.add((start, place - 1, kind))
            kind = ""
        if mark == "B" or (mark == "I" and not kind):
            start, kind = place, name
    return found


def entity_f1(gold: Sequence[Sequence[str]], predicted: Sequence[Sequence[str]]) -> float:
    """F1 of entities over all documents: one counts if its first word, last word and type are all right; 1 if none."""
    pairs = [(entities(right), entities(guess)) for right, guess in zip(gold, predicted, strict=True)]
    hits = sum(len(right & guess) for right, guess in pairs)
    both = sum(len(right) + len(guess) for right, guess in pairs)
    return 2 * hits / both if both else 1.0


def retention(student: float, teacher: float) -> float:
    """Share of the teacher's score, above 0, that the student keeps."""
    return student / teacher


def first_answer(words: Sequence[str], tags: Sequence[str]) -> str:
    """The first entity's words, of those words that have a tag; nothing if there is none."""
    begin, end, _ = min(entities(tags), default=(0, -1, ""))
    return " ".join(words[begin : end + 1])


def pareto(costs: Sequence[float], scores: Sequence[float]) -> list[bool]:
    """Which of some models no other beats: at least as good and as cheap, and better in one of the two."""
    points = list(zip(costs, scores, strict=True))
    return [not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points) for cost, score in points]


def task_scores(model: Any, name: str, data: TaggedSet, device: torch.device) -> dict[str, float]:
    """The score of a tagger under the task's name, and where questions are asked exact match and F1 of the answers."""
    gold, predicted = _tags(model, data, device)
    found = {name: entity_f1(gold, predicted)}
    if data.asked:
        answers = [first_answer(one.words, tags) for one, tags in zip(data.asked, predicted, strict=True)]
        exact, f1 = answer_scores(answers, [one.answers for one in data.asked])
        found |= {f"{name}_em": exact, f"{name}_answer_f1": f1}
        if data.by_answer:
            found[name] = f1
    return found


def tagging_f1(model: Any, data: TaggedSet, device: torch.device) -> float:
    """`entity_f1` of a tagger on the documents held out."""
    return entity_f1(*_tags(model, data, device))


@torch.no_grad()
def _tags(
    model: Any, data: TaggedSet, device: torch.device, *, batch_size: int = 16
) -> tuple[list[list[str]], list[list[str]]]:
    """The right tags of the documents held out, and the tagger's, word by word."""
    tagger = Observed(model).output("logits")
    gold: list[list[str]] = []
    predicted: list[list[str]] = []
    model.eval()
    for start in range(0, len(data.test), batch_size):
        rows = data.test[list(range(start, min(len(data.test), start + batch_size)))]
        guess_BT = tagger.detach()({name: column.to(device) for name, column in rows.items()}).argmax(-1).cpu()
        for labels_T, guess_T in zip(rows["labels"], guess_BT, strict=True):
            scored = labels_T != IGNORED
            gold.append([data.labels[index] for index in labels_T[scored].tolist()])
            predicted.append([data.labels[index] for index in guess_T[scored].tolist()])
    return gold, predicted


# -- the task -------------------------------------------------------------------------------------------------------


def mix_lengths(batch: Batch, *, short: int, share: float, pad: int) -> dict[str, Tensor]:
    """A batch whose first ``share`` of rows keeps ``short`` tokens only; the rest of these rows is padding."""
    ids = batch["input_ids"].clone()
    mask = torch.ones_like(ids)
    cut = round(share * len(ids))
    ids[:cut, short:], mask[:cut, short:] = pad, 0
    return {**batch, "input_ids": ids, "attention_mask": mask}


@dataclass
class LongContextTask:
    """What a system on long texts works with."""

    system: LongContextSystem
    run: Run
    text: EncoderTask
    long: Windows
    sets: dict[str, TaggedSet]

    @staticmethod
    def prepare(system: LongContextSystem, run: Run) -> Generator[Stage, Artifact, LongContextTask]:
        """Build the task; on the embedded task this yields the stage that trains the full-attention teacher."""
        if system.window > system.length:
            raise ConfigError(f"window={system.window}: the short texts are longer than length={system.length}")
        text = yield from EncoderTask.prepare(system, run)
        long = tokenize_windows(
            text.data,
            text.tokenizer,
            window=system.length,
            validation=system.validation,
            selection=system.selection,
        )
        return LongContextTask(
            system, run, text, long, _tagged_sets(system, text.tokenizer, text.data.documents["text"])
        )

    def batches(self) -> Masked:
        """Long and short training text with tokens masked anew each time."""
        system, tokenizer = self.system, self.text.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        collate = partial(mix_lengths, short=system.window, share=system.short_share, pad=pad)
        return Masked(
            Batches(self.long.train, system.batch_size, seed=system.seed, gather=True, collate=collate),
            mask_id=tokenizer.mask_token_id,
            vocab_size=len(tokenizer),
            special=sorted({*tokenizer.all_special_ids, pad}),
            rate=system.mask_rate,
            seed=system.seed,
        )

    def converted(self, name: str, attention: Attention) -> Transform:
        """The stage that gives the teacher another attention and ``length`` positions."""
        system = self.system
        lsg = self._lsg() if attention == "lsg" else {}
        make = partial(
            convert_encoder,
            self.text.teacher,
            attention,
            length=system.length,
            trained=system.trained_positions,
            window=system.attention_window,
            block=system.block_size,
            random_blocks=system.random_blocks,
            landmarks=system.landmarks,
            **lsg,
        )
        return Transform(name, lambda _: make(), save=self.text.save)

    def _lsg(self) -> dict[str, Any]:
        """The first global token starts as the token that begins a text, the others as masks."""
        system, tokenizer = self.system, self.text.tokenizer
        first = tokenizer.cls_token_id if tokenizer.cls_token_id is not None else tokenizer.mask_token_id
        ids = [first, *[tokenizer.mask_token_id] * system.global_tokens][: system.global_tokens]
        return {"factor": system.sparsity_factor, "selection": system.sparse_tokens, "global_ids": ids}

    def fill_in(self, name: str, before: Artifact, steps: int) -> Train:
        """A stage that goes on with filling in masked tokens, on the mixture of lengths."""
        model = load_efficient(before.path)
        return self._train(name, model, lambda student: CrossEntropy(student.output("logits"), name="MaskedTokens"),
                           steps=steps)  # fmt: skip

    def distil(
        self,
        name: str,
        teacher: Artifact,
        objective: Callable[[Observed, Observed], Objective],
        *,
        layers: int | None,
        steps: int,
        random_weights: bool = False,
    ) -> Train:
        """A stage that trains a student of fewer layers.

        Args:
            objective: made of the observed student and the frozen teacher.
            layers: of the student, alternate ones of the teacher's; half of them by default.
            random_weights: begin with none of the teacher's weights.
        """
        whole = load_efficient(teacher.path)
        count = whole.config.num_hidden_layers
        chosen = alternate_layers(count, layers or max(1, count // 2))
        student = shallow(whole, chosen, seed=self.system.seed if random_weights else None)
        frozen = Observed(whole, frozen=True, name="teacher")
        return self._train(name, student, lambda observed: objective(observed, frozen), steps=steps)

    def tune(self, name: str, before: Artifact, data: TaggedSet) -> Train:
        """A stage that turns a model into a tagger."""
        system = self.system
        model = token_classifier(load_efficient(before.path), data.labels, seed=system.seed)
        source = Batches(data.train, system.tune_batch, seed=system.seed, gather=True)
        return self._train(
            name,
            model,
            lambda tagger: CrossEntropy(tagger.output("logits"), name="Tags"),
            steps=system.tune_steps,
            source=source,
            lr=system.tune_lr,
        )

    def _train(
        self,
        name: str,
        model: Any,
        objective: Callable[[Observed], Objective],
        *,
        steps: int,
        source: Any = None,
        lr: float | None = None,
    ) -> Train:
        system = self.system
        observed = Observed(model, name=name)
        player = Player(
            name,
            observed,
            objective(observed),
            optimizer=adamw(lr or system.lr, weight_decay=system.weight_decay),
            lr=system.learning_rate(),
            clip=system.clip,
        )
        return Train(name, player, source=source or self.batches(), steps=steps, save=self.text.save)

    def evaluation(
        self, models: Mapping[str, Artifact], tuned: Mapping[str, Mapping[str, Artifact]], pairs: Mapping[str, str]
    ) -> Evaluate:
        """The final table: quality and cost of every model.

        Args:
            models: what is measured, by name.
            tuned: model -> task -> the tagger it became.
            pairs: student -> the teacher whose scores it is to keep.
        """
        return Evaluate("evaluation", partial(self._evaluate, models, tuned, pairs))

    def _evaluate(
        self,
        models: Mapping[str, Artifact],
        tuned: Mapping[str, Mapping[str, Artifact]],
        pairs: Mapping[str, str],
        context: Context,
    ) -> tuple[Table, dict[str, Any]]:
        device, length = self.run.fabric.device, self.system.length
        lengths = sorted({max(self.system.landmarks, length // part) for part in (4, 2)} | {length})
        rows: list[dict[str, Any]] = []
        sweep: dict[str, Any] = {}
        for name, artifact in models.items():
            model = load_efficient(artifact.path).to(device)
            means = getattr(model.config, "num_landmarks", 1)  # a Nystromformer reads whole groups alone
            sweep[name] = {size: encoder_cost(model, size) for size in lengths if not size % means}
            scores: dict[str, float] = {}
            for task, one in tuned.get(name, {}).items():
                scores |= task_scores(load_efficient(one.path, tagger=True).to(device), task, self.sets[task], device)
            rows.append({"name": name, "parameters": parts_of(model), **sweep[name][length], **scores})
        by_name = {row["name"]: row for row in rows}
        whole = [row for row in rows if all(task in row for task in self.sets)]
        means = [sum(row[task] for task in self.sets) / len(self.sets) for row in whole]
        for row, front in zip(whole, pareto([row["flops"] for row in whole], means), strict=True):
            row["pareto"] = float(front)
        for row in rows:
            teacher = by_name.get(pairs.get(row["name"], ""), row)
            for group, far in (("short", False), ("long", True)):
                own = [task for task in self.sets if task in row and self.sets[task].far is far]
                kept = [retention(row[task], teacher[task]) for task in own if teacher.get(task)]
                if own:
                    row[f"{group}_f1"] = sum(row[task] for task in own) / len(own)
                if kept:
                    row[f"{group}_retention"] = sum(kept) / len(kept)
            row["time_share"] = row["milliseconds"] / teacher["milliseconds"]
            row["flops_share"] = row["flops"] / teacher["flops"]
            context.results |= {f"{row['name']}/{key}": value for key, value in row.items() if key != "name"}
        kinds = {
            task: "words of the answer" if data.by_answer else "whole entities" for task, data in self.sets.items()
        }
        columns = [Column(task, f"{task} F1", ".1%", "higher", what) for task, what in kinds.items()]
        for task, data in self.sets.items():
            if data.asked:
                columns.append(Column(f"{task}_em", f"{task} EM", ".1%", "higher", "answers right to the word"))
        columns += COST
        note = (
            f"Costs: one text of {length:,} tokens. Kept: of the teacher's F1, mean over tasks whose reason is near "
            "(short) or far (long). costs.json has the same for shorter texts."
        )
        return Table("Quality and cost", columns, rows, [note]), {"costs.json": sweep}


COST = [
    Column("short_retention", "kept, short", ".1%", "higher", "share of the teacher's F1, tasks without far reasons"),
    Column("long_retention", "kept, long", ".1%", "higher", "share of the teacher's F1, tasks with far reasons"),
    Column("parameters", "parameters", ",d", "lower"),
    Column("flops", "FLOPs", ".3g", "lower", "counted"),
    Column("milliseconds", "ms", ".1f", "lower", "best of three forwards, on this machine"),
    Column("peak_bytes", "peak bytes", ",.0f", "lower", "tensors alive at a time in one forward, counted"),
    Column("pareto", "front", ".0f", "higher", "1: no other model is as good in the mean and needs fewer FLOPs"),
]


def _tagged_sets(system: LongContextSystem, tokenizer: Any, texts: Sequence[str]) -> dict[str, TaggedSet]:
    if system.tagged is not None and system.questions is not None:
        raise ConfigError("tagged and questions: give one of the two")
    if system.tagged is not None or system.questions is not None:
        name = "tagged" if system.tagged is not None else "questions"
        found = read_tagged(system.tagged) if system.tagged is not None else read_questions(str(system.questions))
        order = list(range(len(found)))
        random.Random(0).shuffle(order)  # what is held out does not depend on the seed
        test = max(1, len(found) // 5)
        parts = [found[index] for index in order[test:]], [found[index] for index in order[:test]]
        return {name: _tagged_set(*parts, tokenizer, system.length, far=True, by_answer=name == "questions")}
    lexicon = Lexicon.of(texts)
    sets: dict[str, TaggedSet] = {}
    for task in system.tasks or ("short-ner", "long-ner", "retrieval"):
        words = max(24, round(system.length * (0.7 if task in FAR else 0.25)))
        made = {
            part: [
                make_document(task, words, lexicon, random.Random(f"{task} {part} {index}")) for index in range(count)
            ]
            for part, count in (("train", system.documents), ("test", system.documents // 4))
        }
        sets[task] = _tagged_set(made["train"], made["test"], tokenizer, system.length, far=task in FAR)
    return sets


def _tagged_set(
    train: Sequence[Document],
    test: Sequence[Document],
    tokenizer: Any,
    length: int,
    *,
    far: bool,
    by_answer: bool = False,
) -> TaggedSet:
    kinds = sorted({tag[2:] for document in (*train, *test) for tag in document.tags if tag != "O"})
    labels = ["O", *(f"{mark}-{kind}" for kind in kinds for mark in "BI")]
    return TaggedSet(
        labels,
        encode_tagged(train, labels, tokenizer, length),
        encode_tagged(test, labels, tokenizer, length),
        far=far,
        asked=test if all(one.answers for one in test) else (),
        by_answer=by_answer,
    )
