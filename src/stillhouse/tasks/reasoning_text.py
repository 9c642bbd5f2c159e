"""Questions with labels, and perhaps reasons: embedded or the user's own; students that read and write text.

The embedded questions are pairs of number words in six languages, ``sieben trois``, whose difference is asked for. A
few hundred labels say little about what dozens of foreign words mean; the reason, ``7 and 3``, says it outright.
The teacher knows the languages; the student begins knowing nothing.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Ge, Gt, Le, Lt
from torch import Tensor

from stillhouse.base.errors import ConfigError, DataError, near, one_line, suggest
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.stage import Context, Evaluate, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.rationales import ANSWER_PHRASE, Example, Noise, cot_prompt, parse_cot, spoilt
from stillhouse.data.sources import Batches
from stillhouse.models.text_to_text import TextToText, load_text_to_text
from stillhouse.tasks.black_box import BlackBoxSystem
from stillhouse.tasks.language import save_pretrained
from stillhouse.teachers.answers import Answer, Request, read_answers

DEMO = "demo"
BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
NUMBERS = (  # zero to nine
    "zero one two three four five six seven eight nine",
    "null eins zwei drei vier fünf sechs sieben acht neun",
    "zéro un deux trois quatre cinq six sept huit neuf",
    "cero uno dos tres cuatro cinco seis siete ocho nueve",
    "zero uno due tre quattro cinque sei sette otto nove",
    "zero um dois três quatro cinco seis sete oito nove",
)
MEANING = {word: number for language in NUMBERS for number, word in enumerate(language.split())}


@dataclass(frozen=True)
class Questions:
    """Examples to train on, to choose the best checkpoint by, and to measure on."""

    train: list[Example]
    validation: list[Example]
    test: list[Example]
    exemplars: list[Example]


@dataclass(kw_only=True)
class QuestionSystem(BlackBoxSystem):
    """Fields of systems whose teacher answers questions with reasons."""

    data: Annotated[str, ".jsonl, .json, .csv or .parquet file, or hub data set; 'demo': misprinted numbers"] = DEMO
    split: Annotated[str, "split of a hub data set"] = "train"
    input_field: Annotated[str, "column of the inputs"] = "input"
    label_field: Annotated[str, "column of the labels"] = "label"
    exemplars: Annotated[str | None, "file of inputs, labels and rationales to show the teacher; about ten"] = None
    instruction: Annotated[str, "what the teacher is told before the exemplars"] = (
        f"Explain in one or two sentences, then end with: {ANSWER_PHRASE} ..."
    )
    test: Annotated[str | None, "data to measure on; by default what is held out"] = None
    validation: Annotated[float, "share of the examples held out to choose the best weights by", Gt(0), Lt(1)] = 0.1
    label_source: Annotated[Literal["gold", "teacher"], "whose labels the student learns"] = "gold"
    student: Annotated[str, "directory or hub id of an encoder-decoder or a causal LM; 'demo': a tiny T5"] = (
        "google/t5-v1_1-base"
    )
    steps: Annotated[int, "optimizer steps", Ge(1)] = 10_000
    batch_size: Annotated[int, "examples in a step", Ge(1)] = 64
    lr: Annotated[float, "learning rate of AdamW", Gt(0)] = 5e-5
    weight_decay: Annotated[float, "decoupled weight decay", Ge(0)] = 0.0
    max_source: Annotated[int, "tokens of an input that are read", Ge(1)] = 1024
    max_rationale: Annotated[int, "tokens of a rationale", Ge(1)] = 256
    max_label: Annotated[int, "tokens of a label", Ge(1)] = 64
    keep: Annotated[Literal["best", "last"], "weights kept: the best on what is held out, or the last"] = "best"
    examples: Annotated[int | None, "examples to train on; all by default (embedded: 400)", Ge(1)] = None
    curve: Annotated[
        tuple[Annotated[int, Ge(1)], ...], "fewer examples that a student each is trained on too: the data curve"
    ] = ()
    noise: Annotated[
        Literal["none", "noisy", "shuffled", "wrong"],
        "what is done to the rationales: words of others, rationales of others, or of others with another label",
    ] = "none"
    noise_share: Annotated[float, "share of the words, or rationales, to which it is done", Ge(0), Le(1)] = 0.3
    noise_cost: Annotated[bool, "train a student on the rationales as they were too: what does the noise cost?"] = False

    def is_demo(self) -> bool:
        own = self.__dict__
        return own["teacher"] == DEMO and own["data"] == DEMO and own["endpoint"] is None

    def questions(self) -> Questions:
        """The embedded questions, or the user's. What is held out is the test too, if there is no data for that."""
        if self.data == DEMO:
            return demo_questions(train=self.examples or 400)
        if self.teacher == DEMO:
            raise ConfigError("teacher=demo only reads data=demo; for your own data give your own teacher")
        fields = {"input_field": self.input_field, "label_field": self.label_field}
        examples = load_examples(self.data, split=self.split, **fields)
        order = random.Random(0).sample(range(len(examples)), len(examples))
        held = max(1, round(self.validation * len(examples)))
        if held >= len(examples):
            raise DataError(f"{self.data}: {len(examples)} record(s) are too few to hold some out; give more")
        validated = [examples[place] for place in order[:held]]
        tested = load_examples(self.test, split="test", **fields) if self.test else validated
        shown = load_examples(self.exemplars, **fields) if self.exemplars else []
        for name, part in ((self.data, validated), (self.test, tested), (self.exemplars, shown)):
            if any(example.label is None for example in part):
                raise DataError(f"{name}: no {self.label_field!r} in records that need one; give them labels")
        return Questions([examples[place] for place in order[held:]][: self.examples], validated, tested, shown)

    def prompts(self, questions: Questions) -> list[Request]:
        """What the teacher is asked: a few-shot chain-of-thought prompt for each training example."""
        return [
            Request.of(cot_prompt(questions.exemplars, example.input, instruction=self.instruction))
            for example in questions.train
        ]

    def rationales(
        self, questions: Questions, keys: Sequence[str], answers: Artifact, *, name: str = "rationales"
    ) -> Transform:
        """The stage that takes rationale and label from each answer; answers without a label are dropped.

        The stage ``rationales`` spoils the rationales as ``noise`` says; under another name they stay as they were.
        """
        noise: Noise | None = self.noise if name == "rationales" and self.noise != "none" else None
        return Transform(name, partial(self._extract, questions, keys, answers, noise))

    def _extract(
        self, questions: Questions, keys: Sequence[str], answers: Artifact, noise: Noise | None, context: Context
    ) -> Any:
        import datasets

        found = read_answers(answers)
        rows, figures = extract_traces(questions.train, [found[key] for key in keys], label_source=self.label_source)
        if noise is not None:
            rows, changed = spoilt_traces(rows, noise, share=self.noise_share, seed=self.seed)
            figures["spoilt"] = changed
        context.results = figures
        context.run.say(
            f"{figures['traces']:.0f} traces; {figures['failed']:.0f} requests failed, {figures['unparsable']:.0f} "
            f"answers have no '{ANSWER_PHRASE}'"
        )
        return datasets.Dataset.from_list(rows)

    def students(
        self,
        questions: Questions,
        keys: Sequence[str],
        answers: Artifact,
        traces: Artifact,
        tasks: Callable[[TextToText], Tasks],
        objective: Callable[[Observed], Objective],
    ) -> Generator[Stage, Artifact, dict[str, Artifact]]:
        """The stages that train the student, those of the data curve, and the one that learns from clean rationales."""

        def train(name: str, traces: Artifact, first: int | None = None) -> Train:
            student = new_student(self.student, seed=self.seed, trust_remote_code=self.trust_remote_code)
            work = tasks(student)
            return Train(
                name,
                work.player(objective, lr=self.lr, weight_decay=self.weight_decay),
                source=work.batches(traces, self.batch_size, seed=self.seed, first=first),
                steps=self.steps,
                evaluate=lambda: {"accuracy": work.accuracy(questions.validation)},
                best="-accuracy" if self.keep == "best" else None,
                save=work.save,
            )

        trained = {"student": (yield train("student", traces))}
        there = int(traces.metrics["traces"])
        if self.curve and max(self.curve) > there:
            raise ConfigError(f"curve={max(self.curve)}, but there are {there} examples to learn from; take fewer")
        for count in self.curve:
            trained[f"student-{count}"] = yield train(f"student-{count}", traces, count)
        if self.noise_cost and self.noise != "none":
            clean = yield self.rationales(questions, keys, answers, name="clean-rationales")
            trained["clean"] = yield train("clean", clean)
        return trained

    def evaluation(
        self,
        questions: Questions,
        traces: Artifact,
        trained: Mapping[str, Artifact],
        tasks: Callable[[TextToText], Tasks],
    ) -> Evaluate:
        """Labels on the test examples; no rationale is written for them if one of the ``tasks`` is to predict."""

        def evaluate(context: Context) -> Table:
            rows = {}
            for name, artifact in trained.items():
                student = load_text_to_text(str(artifact.path), trust_remote_code=self.trust_remote_code)
                student.model.to(context.run.fabric.device)
                rows[name] = tasks(student).measured(questions.test)
                context.results |= {f"{name}/{figure}": value for figure, value in rows[name].items()}
            note = f"{len(questions.test):,} questions; {traces.metrics['traces']:.0f} traces to learn from."
            if "clean" in rows:
                cost = rows["clean"]["accuracy"] - rows["student"]["accuracy"]
                context.results["noise_cost"] = cost
                note += f" {self.noise.capitalize()} rationales cost {cost:.1%} of accuracy."
            return label_table(traces.metrics.get("teacher_accuracy"), rows, [note])

        return Evaluate("evaluation", evaluate)


# -- the user's -----------------------------------------------------------------------------------------------------


def load_examples(
    source: str, *, split: str = "train", input_field: str = "input", label_field: str = "label"
) -> list[Example]:
    """Examples from a ``.jsonl``, ``.json``, ``.csv`` or ``.parquet`` file, or a hub data set.

    The columns ``input_field`` and ``label_field`` are read (labels may be missing as a column), and ``rationale`` if
    there is one.

    Raises:
        DataError: one line that says what is wrong, where, and what to do.
    """
    import datasets

    path = Path(source).expanduser()
    try:
        if path.suffix in BUILDERS:
            if not path.is_file():
                raise DataError(f"{source}: no such file{near(path) or '; check the path'}")
            rows = datasets.load_dataset(BUILDERS[path.suffix], data_files=str(path), split="train")
        else:
            rows = datasets.load_dataset(source, split=split)
    except DataError:
        raise
    except Exception as error:
        kinds = ", ".join(BUILDERS)
        reason = one_line(error.__cause__ or error)
        raise DataError(f"{source}: cannot be read ({reason}); give a file ({kinds}) or a hub data set") from error
    if input_field not in rows.column_names:
        raise DataError(f"{source}: no column {input_field!r}{suggest(input_field, rows.column_names)}")
    examples = []
    for number, row in enumerate(rows, 1):
        question, label = row[input_field], row.get(label_field)
        if not isinstance(question, str) or not question.strip():
            raise DataError(f"{source} record {number}: {input_field!r} is {question!r}, must be a text; put it right")
        answer = None if label is None else str(label)
        examples.append(Example(question, answer, row.get("rationale") or ""))
    if not examples:
        raise DataError(f"{source}: no records in it; give a file with at least one")
    return examples


# -- the embedded ---------------------------------------------------------------------------------------------------


def demo_questions(*, train: int = 400, validation: int = 200, test: int = 2000, seed: int = 0) -> Questions:
    """Pairs of number words, each number as likely as the others and each of its words too.

    Fewer examples to train on are the first of 400, more are these and others; the rest is always the same.
    """
    generator = random.Random(seed)
    words = [[word for word, meaning in MEANING.items() if meaning == number] for number in range(10)]

    def pair() -> Example:
        first, second = generator.randrange(10), generator.randrange(10)
        asked = f"{generator.choice(words[first])} {generator.choice(words[second])}"
        return Example(asked, str(abs(first - second)), f"{first} and {second}")

    shown, learnt, validated, tested = ([pair() for _ in range(count)] for count in (10, 400, validation, test))
    learnt += [pair() for _ in range(train - 400)]
    return Questions(learnt[:train], validated, tested, shown)


def demo_rule(request: Request) -> str:
    """The embedded teacher: looks up both words of a prompt's last question, and subtracts."""
    question = request.messages[-1]["content"].rpartition("Q: ")[2].partition("\n")[0]
    first, second = (MEANING[word] for word in question.split())
    return f"{first} and {second} {ANSWER_PHRASE} {abs(first - second)}."


def demo_student(seed: int) -> TextToText:
    """A new T5 of some hundred thousand weights; a number word is one token."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    from stillhouse.models.tokenizers import train_bpe

    digits = [f"{first} and {second} {ANSWER_PHRASE} {second}." for first in range(10) for second in range(10)]
    texts = [*(f"{task}: {word}" for task in TASKS for word in MEANING), *digits]
    tokenizer = train_bpe(texts, vocab_size=4096, special_tokens=("<|endoftext|>", "<|padding|>"))
    tokenizer.pad_token = "<|padding|>"
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return TextToText(T5ForConditionalGeneration(config), tokenizer)


def new_student(name: str, *, seed: int, trust_remote_code: bool) -> TextToText:
    """The student called ``name``, to train."""
    return demo_student(seed) if name == DEMO else load_text_to_text(name, trust_remote_code=trust_remote_code)


# -- traces, and what they are worth --------------------------------------------------------------------------------

TASKS = ("predict", "explain", "cot")
"""What a student may be asked to write: the label, the reason, or the reason and then the label."""


def extract_traces(
    examples: Sequence[Example], answers: Sequence[Answer], *, label_source: Literal["gold", "teacher"]
) -> tuple[list[dict[str, str | None]], dict[str, float]]:
    """What the teacher's answers give to learn from: rows of ``input`` and a target for each of `TASKS`, and counts.

    Answers that failed, or have no label in them, are dropped. ``teacher_accuracy`` is that of the others' labels.
    """
    rows: list[dict[str, str | None]] = []
    for example, answer in zip(examples, answers, strict=True):
        parsed = parse_cot(answer.text) if answer.text is not None else None
        if parsed is None:
            continue
        rationale, found = parsed
        label = example.label if label_source == "gold" else found
        if label is None:
            raise DataError(f"no label for {example.input[:60]!r}; give it one, or set label_source=teacher")
        cot = f"{rationale} {ANSWER_PHRASE} {label}.".strip()
        targets = {"predict": label, "explain": rationale, "cot": cot}
        rows.append({"input": example.input, **targets, "gold": example.label, "teacher": found})
    failed = sum(answer.text is None for answer in answers)
    if not rows:
        first = next((answer.error or answer.text for answer in answers), None)
        raise DataError(
            f"none of {len(examples)} answers of the teacher can be used ({failed} failed; first: {first!r:.120}); "
            f"answers must end with '{ANSWER_PHRASE} ...': show the teacher exemplars"
        )
    figures: dict[str, float] = {"traces": len(rows), "failed": failed, "unparsable": len(answers) - failed - len(rows)}
    known = [row for row in rows if row["gold"] is not None]
    if known:
        golds = [Example("", row["gold"]) for row in known]
        figures["teacher_accuracy"] = accuracy([row["teacher"] for row in known], golds)
    return rows, figures


def curve_mean(figures: Mapping[str, float]) -> float:
    """The students' mean accuracy along a data curve, of an evaluation's figures."""
    found = [value for name, value in figures.items() if name.startswith("student") and name.endswith("/accuracy")]
    return sum(found) / len(found)


def spoilt_traces(
    rows: Sequence[Mapping[str, str | None]], noise: Noise, *, share: float, seed: int
) -> tuple[list[dict[str, str | None]], int]:
    """Rows of `extract_traces` with rationales as `spoilt` makes them and labels as they were; how many changed."""
    before = [row["explain"] or "" for row in rows]
    after = spoilt(before, [str(row["predict"]) for row in rows], noise, share=share, seed=seed)
    made = [
        {**row, "explain": text, "cot": f"{text} {ANSWER_PHRASE} {row['predict']}.".strip()}
        for row, text in zip(rows, after, strict=True)
    ]
    return made, sum(old != new for old, new in zip(before, after, strict=True))


def accuracy(found: Sequence[str | None], examples: Sequence[Example]) -> float:
    """Share of the labels found; case and blanks at the ends do not count."""

    def plain(text: str | None) -> str | None:
        return None if text is None else " ".join(text.split()).casefold()

    hits = [plain(label) == plain(example.label) for label, example in zip(found, examples, strict=True)]
    return sum(hits) / max(1, len(hits))


@dataclass(frozen=True)
class Tasks:
    """A student's tasks, each with its prefix (``predict: ...``), and how long texts may be, in tokens.

    Args:
        max_target: task -> most tokens of its target.
    """

    student: TextToText
    max_source: int
    max_target: Mapping[str, int]

    @staticmethod
    def of(student: TextToText, names: Sequence[str], *, max_source: int, max_label: int, max_rationale: int) -> Tasks:
        """The tasks called ``names``, of `TASKS`."""
        phrase = len(student.tokenizer(f" {ANSWER_PHRASE} .")["input_ids"])
        most = {"predict": max_label, "explain": max_rationale, "cot": max_rationale + phrase + max_label}
        return Tasks(student, max_source, {name: most[name] for name in names})

    def batch(self, rows: Sequence[Mapping[str, str]]) -> dict[str, dict[str, Tensor]]:
        """``{task: what the student is fed}`` for rows of ``input`` and a target for each task."""
        return {
            task: self.student.batch(
                [f"{task}: {row['input']}" for row in rows],
                [row[task] for row in rows],
                max_source=self.max_source,
                max_target=most,
            )
            for task, most in self.max_target.items()
        }

    def player(self, objective: Callable[[Observed], Objective], *, lr: float, weight_decay: float) -> Player:
        """The student as it learns, by AdamW: ``objective`` gets the observed student."""
        student = Observed(self.student.model, name="student", options={"use_cache": False})
        return Player("student", student, objective(student), optimizer=adamw(lr, weight_decay=weight_decay))

    def batches(self, traces: Artifact, batch_size: int, *, seed: int, first: int | None = None) -> Batches:
        """What the student is fed in training, from the (``first``) traces that were extracted."""
        import pyarrow.parquet as pq

        rows = pq.read_table(traces.data_file()).to_pylist()[:first]
        return Batches(rows, min(batch_size, len(rows)) if first else batch_size, seed=seed, collate=self.batch)

    def save(self, model: Any, folder: Path) -> None:
        """Write the student as it has become, with its tokenizer."""
        save_pretrained(model, folder, tokenizer=self.student.tokenizer)

    def labels(self, examples: Sequence[Example], *, batch_size: int = 256) -> tuple[list[str | None], float]:
        """The labels that the student finds, and the tokens it writes for one on average.

        A student that can predict does just that; one that cannot gives its reason first.
        """
        task = "predict" if "predict" in self.max_target else "cot"
        written: list[tuple[str, int]] = []
        for start in range(0, len(examples), batch_size):
            sources = [f"{task}: {example.input}" for example in examples[start : start + batch_size]]
            limits = {"max_source": self.max_source, "max_target": self.max_target[task]}
            written += self.student.write(sources, **limits)
        parsed = [(None, text) if task == "predict" else parse_cot(text) for text, _ in written]
        tokens = sum(count for _, count in written) / max(1, len(written))
        return [found and found[1] for found in parsed], tokens

    def accuracy(self, examples: Sequence[Example]) -> float:
        """Share of the labels that the student finds."""
        return accuracy(self.labels(examples)[0], examples)

    def measured(self, examples: Sequence[Example]) -> dict[str, float]:
        """Accuracy on ``examples``, tokens written for a label, and parameters."""
        found, tokens = self.labels(examples)
        size = sum(parameter.numel() for parameter in self.student.model.parameters())
        return {"parameters": size, "accuracy": accuracy(found, examples), "tokens": tokens}


def label_table(
    teacher_accuracy: float | None, students: Mapping[str, Mapping[str, float]], notes: Sequence[str]
) -> Table:
    """The teacher's labels beside the students'."""
    rows: list[dict[str, Any]] = [
        {"name": "teacher, on the training examples", "accuracy": teacher_accuracy},
        *({"name": name, **figures} for name, figures in students.items()),
    ]
    columns = [
        Column("parameters", "parameters", ",d"),
        Column("accuracy", "accuracy", ".1%", "higher"),
        Column("tokens", "tokens/answer", ".1f", "lower", "written for one label, its end included"),
    ]
    return Table("Labels", columns, rows, list(notes))
