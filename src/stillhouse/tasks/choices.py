"""Questions with forty answers and no certain one: what calibration is measured on.

A question is six words, its answer one more token, drawn from probabilities that the words fix. The best possible guess
is right three times in four, and who says so with 75 % is calibrated. Teacher and student have read other answers
beforehand, as large models have, a sixth of them to questions that are asked later; fine-tuned on a few hundred to the
end, they become too sure of themselves.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Generator
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

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


@dataclass(frozen=True)
class Choices:
    """The questions and how many of them there are; part of every fingerprint."""

    slots: int = 6
    values: int = 6  # words that may stand in a slot
    answers: int = 40
    width: int = 16
    bayes: float = 0.75
    reading: int = 8000
    student_reading: int = 4000
    train: int = 600
    selection: int = 200
    validation: int = 3000
    seed: int = 0

    @property
    def end(self) -> int:
        """The token that begins a row; before it are the answers and the words."""
        return self.answers + self.slots * self.values


TEACHER, STUDENT = SmallReader(64, 2, 4.0), SmallReader(32, 1, 4.0)


class World:
    """The true probabilities of answers: softmax of a random net of one hidden layer, of the sum of the words' vectors.

    Its logits are scaled so that the likeliest answer is right as often as ``bayes`` says.
    """

    def __init__(self, recipe: Choices) -> None:
        random = torch.Generator().manual_seed(recipe.seed)
        self.recipe = recipe
        self._words = torch.randn(recipe.slots, recipe.values, recipe.width, generator=random) / recipe.slots**0.5
        self._inner = torch.randn(recipe.width, 64, generator=random) / recipe.width**0.5
        self._outer = torch.randn(64, recipe.answers, generator=random) / 8
        questions = self.questions(4000, torch.Generator().manual_seed(recipe.seed + 1))
        low, high = 0.0, 200.0
        for _ in range(40):
            self.scale = (low + high) / 2
            right = float(self.probabilities(questions).max(-1).values.mean())
            low, high = (self.scale, high) if right < recipe.bayes else (low, self.scale)

    def questions(self, count: int, random: torch.Generator) -> Tensor:
        """Words drawn evenly: (count, slots)."""
        return torch.randint(self.recipe.values, (count, self.recipe.slots), generator=random)

    def probabilities(self, questions_NS: Tensor) -> Tensor:
        """p(answer | question): (N, slots) -> (N, answers)."""
        x_NW = sum(self._words[slot][questions_NS[:, slot]] for slot in range(self.recipe.slots))
        return (self.scale * torch.tanh(x_NW @ self._inner) @ self._outer).softmax(-1)

    def turned(self, share: float, random: torch.Generator) -> World:
        """The same world with other meanings mixed into its words: cos w + sin w', with sin = ``share``."""
        made = copy.copy(self)
        other = torch.randn(self._words.shape, generator=random) / self.recipe.slots**0.5
        made._words = (1 - share**2) ** 0.5 * self._words + share * other
        return made

    def rows(self, count: int, random: torch.Generator) -> Tensor:
        """Questions with drawn answers, as tokens: the end token, the words, the answer: (count, slots + 2)."""
        recipe, questions = self.recipe, self.questions(count, random)
        answers_N1 = torch.multinomial(self.probabilities(questions), 1, generator=random)
        words = recipe.answers + torch.arange(recipe.slots) * recipe.values + questions
        return torch.cat([torch.full_like(answers_N1, recipe.end), words, answers_N1], 1)


DIALECT = "dialect"


def dialect(recipe: Choices, *, share: float = 0.4, count: int = 1000) -> WindowSplit:
    """Held-out questions from elsewhere: the same words, a ``share`` of whose meaning is another, and their answers.

    The vector of every word is turned away from its own, its length kept on average; the net behind it is the same.
    """
    world, random = World(recipe), torch.Generator().manual_seed(recipe.seed + 3)
    return as_windows(world.turned(share, random).rows(count, random))


def as_windows(rows_NT: Tensor) -> WindowSplit:
    """Rows of which the answer alone is to be predicted."""
    mask = torch.zeros_like(rows_NT)
    mask[:, -1] = 1
    return WindowSplit({"input_ids": rows_NT, "attention_mask": torch.ones_like(rows_NT), "loss_mask": mask})


def choice_tokenizer(recipe: Choices) -> PreTrainedTokenizerFast:
    """One token a word, an answer, the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    answers = [f"answer{number}" for number in range(recipe.answers)]
    words = [f"{'abcdefghijkl'[slot]}{value}" for slot in range(recipe.slots) for value in range(recipe.values)]
    vocabulary = {word: number for number, word in enumerate([*answers, *words, "<|end|>"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<|end|>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    end = "<|end|>"
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end, bos_token=end, pad_token=end)


def choice_task(system: LanguageSystem, run: Run) -> Generator[Stage, Artifact, LanguageTask]:
    """The task of a language system, on these questions; yields the stages in which teacher and student read.

    The run's seed chooses the questions to train on and the student; the world, the teacher's reading and the held-out
    questions are the same in every run.
    """
    import datasets

    recipe = Choices()
    world, tokenizer = World(recipe), choice_tokenizer(recipe)
    held = torch.Generator().manual_seed(recipe.seed + 2)
    validation, selection, reading = (
        world.rows(count, held) for count in (recipe.validation, recipe.selection, recipe.reading)
    )
    train = world.rows(recipe.train, torch.Generator().manual_seed(1000 + system.seed))
    content = hashlib.sha256(repr((recipe, system.seed)).encode()).hexdigest()
    pairs = [(tokenizer.decode(row[1:-1]), tokenizer.decode(row[-1:])) for row in train.tolist()]
    documents = datasets.Dataset.from_list([{"prompt": prompt, "completion": answer} for prompt, answer in pairs])
    windows = Windows(
        train=as_windows(train),
        selection=as_windows(selection),
        validation=as_windows(validation),
        window=train.shape[1],
        kind="prompt-completion",
        name="choices",
        fingerprint=content,
        counts=Counts(train.numel(), recipe.validation, recipe.validation),
        documents=tuple(range(recipe.train)),
    )

    def read(name: str, size: SmallReader, rows: Tensor, seed: int) -> Train:
        cache = {"task": "choices", **asdict(recipe), "model_seed": seed}
        return size.reads(name, as_windows(rows), tokenizer, seed=seed, cache=cache)

    taught = yield read("teacher-reading", TEACHER, reading, 0)
    teacher, _ = load_causal_lm(str(taught.path))
    begun = yield read("student-reading", STUDENT, reading[: recipe.student_reading], system.seed)
    data = TextData(documents, "prompt-completion", "choices", content)

    def new_student() -> Any:
        return load_causal_lm(str(begun.path), dtype=torch.float32)[0]

    return LanguageTask(system, run, teacher, tokenizer, data, windows, len(tokenizer), new_student)
