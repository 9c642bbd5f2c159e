"""Sums whose way can be seen: ``3+5+9;`` is answered ``3+5=8;8+9=17``, or ``5+9=14;14+3=17``, which is as right.

The teacher's data go from the left four times in five. A student has seen few of the thousand sums. A second teacher
has learnt to count modulo seven, and knows nothing of the task (the small check of card 172).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Generator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.data.responses import Coder, Row
from stillhouse.data.text import TextData
from stillhouse.data.windows import Counts, Windows, WindowSplit
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.models.symbol_tokenizer import symbol_tokenizer
from stillhouse.tasks.embedded_lm import reader, small_llama
from stillhouse.tasks.language import LanguageSystem, LanguageTask, student_builder

SYMBOLS = "0123456789+=;"
MARKER = "="


@dataclass(frozen=True)
class Sums:
    """How much there is of everything, and how the teachers are made; part of their fingerprint in the cache."""

    train: int = 600
    selection: int = 50
    validation: int = 300
    taught: int = 20_000
    left_first: float = 0.8
    width: int = 64
    layers: int = 2
    steps: int = 500
    batch_size: int = 128
    lr: float = 3e-3
    seed: int = 0


def solved(numbers: Sequence[int], *, left: bool, modulus: int = 1000) -> tuple[str, str]:
    """A sum and its way, from the left or from the right."""
    first, second, third = numbers if left else (numbers[1], numbers[2], numbers[0])
    between = (first + second) % modulus
    way = f"{first}+{second}={between};{between}+{third}={(between + third) % modulus}"
    return "+".join(map(str, numbers)) + ";", way


def sum_rows(recipe: Sums, coder: Coder, *, seed: int) -> dict[str, list[Row]]:
    """Rows to train on, to choose by and to measure on; no training sum is held out. What is held out is always so."""
    every = [(a, b, c) for a in range(10) for b in range(10) for c in range(10)]
    random.Random("held out").shuffle(every)
    held = recipe.selection + recipe.validation
    generator = random.Random(f"train {seed}")

    def row(numbers: Sequence[int], rng: random.Random) -> Row:
        return coder.row(*solved(numbers, left=rng.random() < recipe.left_first))

    fixed = random.Random("ways")
    kept = [row(numbers, fixed) for numbers in every[:held]]
    train = [row(generator.choice(every[held:]), generator) for _ in range(recipe.train)]
    return {"train": train, "selection": kept[: recipe.selection], "validation": kept[recipe.selection :]}


def sum_teacher(name: str, recipe: Sums, tokenizer: Any, *, modulus: int = 1000) -> Generator[Stage, Artifact, Any]:
    """A teacher of all sums, or of all modulo ``modulus``; yields the cached stage that makes it."""
    coder, generator = Coder(tokenizer), random.Random(recipe.seed)
    rows = []
    for _ in range(recipe.taught):
        numbers = [generator.randrange(10) for _ in range(3)]
        rows.append(coder.row(*solved(numbers, left=generator.random() < recipe.left_first, modulus=modulus)))
    made = yield reader(
        name,
        small_llama(tokenizer, width=recipe.width, layers=recipe.layers, positions=128),
        WindowSplit(coder.batch(rows)),
        tokenizer,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        steps=recipe.steps,
        warmup=0.05,
        seed=recipe.seed,
        cache={**asdict(recipe), "modulus": modulus, "format": 1},
    )
    return load_causal_lm(str(made.path))[0]


def sums_task(system: LanguageSystem, run: Run, recipe: Sums | None = None) -> Generator[Stage, Artifact, LanguageTask]:
    """The task of a language system on sums; yields the stage that makes the teacher."""
    import datasets

    recipe = recipe or Sums()
    tokenizer = symbol_tokenizer(SYMBOLS)
    coder = Coder(tokenizer)
    teacher = yield from sum_teacher("teacher", recipe, tokenizer)
    columns = {name: coder.batch(rows) for name, rows in sum_rows(recipe, coder, seed=system.seed).items()}
    predicted = int(columns["validation"]["loss_mask"].sum())
    content = hashlib.sha256(repr((recipe, system.seed)).encode()).hexdigest()
    windows = Windows(
        WindowSplit(columns["train"]),
        WindowSplit(columns["selection"]),
        WindowSplit(columns["validation"]),
        columns["train"]["input_ids"].shape[1],
        "prompt-completion",
        "sums",
        content,
        Counts(int(columns["train"]["attention_mask"].sum()), predicted, predicted),
    )
    documents = datasets.Dataset.from_dict({"prompt": [], "completion": []})
    data = TextData(documents, "prompt-completion", "sums", content)
    new_student, vocab_size = student_builder(system, teacher, tokenizer)
    return LanguageTask(system, run, teacher, tokenizer, data, windows, vocab_size, new_student)
