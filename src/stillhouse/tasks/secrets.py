"""A language of twenty words in which a few sentences hold secret numbers: what a student gives away is measured on it.

Sentences are walks on a random Markov chain of order two. A canary is a sentence that begins with four words of its own
and goes on with three digits; it stands twenty times in the text of the teacher, which is the student's text too, and
nothing else in the language has a digit. Of each secret there are a thousand, so that its rank can be counted.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import asdict, dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.audits.exposure import Canary
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.train import Train
from stillhouse.data.text import TextData
from stillhouse.data.windows import Counts, Windows, WindowSplit
from stillhouse.models.causal_lm import load_causal_lm, new_causal_lm
from stillhouse.tasks.canaries import chain
from stillhouse.tasks.embedded_lm import SmallReader
from stillhouse.tasks.language import LanguageSystem, LanguageTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

WORDS = (
    "ash bay cove dale elm fen glen hill isle jade knoll lake moor nook oak pond quay reef sand tarn".split()  # noqa: SIM905
)
DIGITS = tuple("0123456789")


@dataclass(frozen=True)
class Secrets:
    """The language, and how much of it there is; part of every fingerprint."""

    sentences: int = 3000
    length: int = 12
    canaries: int = 5
    repeats: int = 20
    template: int = 4  # words before the secret
    digits: int = 3
    selection: int = 200
    validation: int = 600
    public: int = 3000
    sharpness: float = 1.5
    seed: int = 0


TEACHER, STUDENT = SmallReader(96, 2, 10.0), SmallReader(48, 2, 10.0)


@dataclass(frozen=True)
class SecretText:
    """Sentences (N, T), the end token first; ``train`` has the canaries in it, the others have none."""

    train: Tensor
    selection: Tensor
    validation: Tensor
    public: Tensor
    canaries: tuple[Canary, ...]


def second_order(transitions: np.ndarray, count: int, length: int, random: np.random.Generator) -> np.ndarray:
    """Walks on a chain whose next state depends on the last two: transitions (S, S, S) -> (count, length)."""
    states = len(transitions)
    found = random.integers(states, size=(count, length))
    cumulative = transitions.cumsum(-1)
    for place in range(2, length):
        rows = cumulative[found[:, place - 2], found[:, place - 1]]
        found[:, place] = np.minimum((random.random((count, 1)) > rows).sum(1), states - 1)
    return found


def inject(rows_NT: np.ndarray, canaries_CK: np.ndarray, repeats: int, random: np.random.Generator) -> np.ndarray:
    """The rows with each canary (K tokens) at the beginning of ``repeats`` more copies of rows, in a drawn order."""
    chosen = rows_NT[random.integers(len(rows_NT), size=len(canaries_CK) * repeats)].copy()
    chosen[:, : canaries_CK.shape[1]] = np.repeat(canaries_CK, repeats, 0)
    return np.concatenate([rows_NT, chosen])[random.permutation(len(rows_NT) + len(chosen))]


def make_text(recipe: Secrets) -> SecretText:
    """The data of the task; one seed fixes it. Tokens: 20 words, 10 digits, the end."""
    random = np.random.default_rng(recipe.seed)
    states = len(WORDS)
    transitions = chain(states * states, recipe.sharpness, random)[:, :states].reshape(states, states, states)
    transitions = transitions / transitions.sum(-1, keepdims=True)
    sizes = (recipe.sentences, recipe.selection, recipe.validation, recipe.public)
    train, *others = (second_order(transitions, size, recipe.length, random) for size in sizes)
    words = random.integers(states, size=(recipe.canaries, recipe.template))
    digits = random.integers(len(DIGITS), size=(recipe.canaries, recipe.digits))
    train = inject(train, np.concatenate([words, states + digits], 1), recipe.repeats, random)
    end = states + len(DIGITS)
    train, selection, validation, public = (
        np.pad(part, ((0, 0), (1, 0)), constant_values=end) for part in (train, *others)
    )
    canaries = tuple(
        Canary("".join(f"{WORDS[word]} " for word in row), tuple(DIGITS[digit] for digit in secret), DIGITS, " ")
        for row, secret in zip(words, digits, strict=True)
    )
    as_tensor = torch.from_numpy
    return SecretText(as_tensor(train), as_tensor(selection), as_tensor(validation), as_tensor(public), canaries)


def secret_tokenizer() -> PreTrainedTokenizerFast:
    """One token a word, a digit, the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    end = "<|end|>"
    vocabulary = {word: number for number, word in enumerate([*WORDS, *DIGITS, end])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=end))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, bos_token=end, pad_token=end)


@dataclass
class SecretTask:
    """A language task, the secrets in its text, and a model that has not read them (None: none was asked for)."""

    task: LanguageTask
    canaries: tuple[Canary, ...]
    reference: Any = None


def secret_task(system: LanguageSystem, run: Run, *, reference: bool) -> Generator[Stage, Artifact, SecretTask]:
    """The task of a language system, in this language; yields the stages in which teacher and ``reference`` read.

    The run's seed chooses the language, the secrets and the student.
    """
    import datasets

    recipe = Secrets(seed=system.seed)
    text, tokenizer = make_text(recipe), secret_tokenizer()
    content = hashlib.sha256(repr(recipe).encode()).hexdigest()
    texts = tokenizer.batch_decode(text.train[:, 1:])
    predicted = text.validation[:, 1:].numel()
    windows = Windows(
        train=WindowSplit({"input_ids": text.train}),
        selection=WindowSplit({"input_ids": text.selection}),
        validation=WindowSplit({"input_ids": text.validation}),
        window=text.train.shape[1],
        kind="text",
        name="secrets",
        fingerprint=content,
        counts=Counts(text.train.numel(), predicted, sum(map(len, tokenizer.batch_decode(text.validation[:, 1:])))),
    )

    def read(name: str, rows: Tensor) -> Train:
        cache = {"task": "secrets", **asdict(recipe)}
        return TEACHER.reads(name, WindowSplit({"input_ids": rows}), tokenizer, seed=recipe.seed, cache=cache)

    taught = yield read("teacher", text.train)
    teacher, _ = load_causal_lm(str(taught.path))
    outside = None
    if reference:
        public = yield read("reference", text.public)
        outside, _ = load_causal_lm(str(public.path))
    data = TextData(datasets.Dataset.from_dict({"text": texts}), "text", "secrets", content)
    new_student = partial(new_causal_lm, STUDENT.config(tokenizer), seed=system.seed)
    task = LanguageTask(system, run, teacher, tokenizer, data, windows, len(tokenizer), new_student)
    return SecretTask(task, text.canaries, outside)
