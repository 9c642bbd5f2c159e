"""A language of twenty letters with planted sequences that any model memorises: what memorisation is measured on.

Sequences come from a random Markov chain, so that most of each is chance; a share of the training sequences repeats two
letters, which a model that has learnt the rule gives back without having stored them. The teacher has read much more of
the language than it is trained on here, as large models have: one that has not only over-fits, and has nothing to
teach.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.core.train import Train
from stillhouse.data.text import TextData
from stillhouse.data.windows import Counts, Windows, WindowSplit
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.tasks.embedded_lm import SmallReader
from stillhouse.tasks.language import LanguageSystem, LanguageTask

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LETTERS = "abcdefghijklmnopqrst"


@dataclass(frozen=True)
class Canaries:
    """The language and how much of it there is; part of its teacher's fingerprint."""

    sequences: int = 400
    length: int = 17
    easy: float = 0.1
    validation: int = 400
    selection: int = 100
    reading: int = 3000
    student_reading: int = 1500
    sharpness: float = 1.5
    seed: int = 0


TEACHER, STUDENT = SmallReader(96, 3, 6.0), SmallReader(64, 2, 3.0)


@dataclass(frozen=True)
class Language:
    """Sequences (N, T) of the chain: to train on, held out, and to read beforehand."""

    train: Tensor
    selection: Tensor
    validation: Tensor
    reading: Tensor
    easy: Tensor


def chain(states: int, sharpness: float, random: np.random.Generator) -> np.ndarray:
    """Transition probabilities: softmax of normal numbers times ``sharpness``."""
    logits = sharpness * random.standard_normal((states, states))
    weights = np.exp(logits - logits.max(1, keepdims=True))
    return weights / weights.sum(1, keepdims=True)


def walks(transitions: np.ndarray, count: int, length: int, random: np.random.Generator) -> np.ndarray:
    """Random walks on a chain, from a state drawn evenly: (count, length)."""
    found = np.empty((count, length), np.int64)
    found[:, 0] = random.integers(len(transitions), size=count)
    cumulative = transitions.cumsum(1)
    for place in range(1, length):
        found[:, place] = (random.random((count, 1)) > cumulative[found[:, place - 1]]).sum(1)
    return np.minimum(found, len(transitions) - 1)


def make_language(recipe: Canaries) -> Language:
    """The data of the task; one seed fixes it. Letters are tokens 0 to 19."""
    random = np.random.default_rng(recipe.seed)
    transitions = chain(len(LETTERS), recipe.sharpness, random)
    sizes = (recipe.sequences, recipe.selection, recipe.validation, recipe.reading)
    train, *others = (walks(transitions, size, recipe.length, random) for size in sizes)
    easy = np.zeros(recipe.sequences, bool)
    easy[random.permutation(recipe.sequences)[: round(recipe.easy * recipe.sequences)]] = True
    pairs = random.integers(len(LETTERS), size=(int(easy.sum()), 2))
    train[easy] = np.tile(pairs, (1, -(-recipe.length // 2)))[:, : recipe.length]
    return Language(*(torch.from_numpy(part) for part in (train, *others, easy)))


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """One token a letter, and the end."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: number for number, letter in enumerate(LETTERS)} | {"<|end|>": len(LETTERS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    backend.decoder = decoders.Fuse()
    end = "<|end|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, bos_token=end, pad_token=end)


def canary_task(system: LanguageSystem, run: Run) -> Generator[Stage, Artifact, LanguageTask]:
    """The task of a language system, in this language; yields the stage that teaches the teacher to read."""
    import datasets

    recipe = Canaries()
    language = make_language(recipe)
    tokenizer = letter_tokenizer()
    content = hashlib.sha256(repr(recipe).encode()).hexdigest()
    texts = ["".join(LETTERS[letter] for letter in row) for row in language.train.tolist()]
    data = TextData(datasets.Dataset.from_dict({"text": texts}), "text", "canaries", content)
    predicted = language.validation[:, 1:].numel()
    windows = Windows(
        train=WindowSplit({"input_ids": language.train}),
        selection=WindowSplit({"input_ids": language.selection}),
        validation=WindowSplit({"input_ids": language.validation}),
        window=recipe.length,
        kind="text",
        name="canaries",
        fingerprint=content,
        counts=Counts(language.train.numel(), predicted, predicted),
    )

    def read(name: str, size: SmallReader, text: Tensor, seed: int) -> Train:
        cache = {**asdict(recipe), "model_seed": seed}
        return size.reads(name, WindowSplit({"input_ids": text}), tokenizer, seed=seed, cache=cache)

    taught = yield read("teacher-reading", TEACHER, language.reading, 0)
    teacher, _ = load_causal_lm(str(taught.path))
    begun = yield read("student-reading", STUDENT, language.reading[: recipe.student_reading], system.seed)

    def new_student() -> Any:
        return load_causal_lm(str(begun.path), dtype=torch.float32)[0]

    return LanguageTask(system, run, teacher, tokenizer, data, windows, len(tokenizer), new_student)
