"""A language whose truth is known: a random network is the oracle, and nobody else knows it.

Prompts are four letters of twelve, none of them twice: what is held out has not been trained on. The oracle, a
transformer that was never trained, goes on with up to six more. Its output weights are large, so that it has opinions;
the others are small, so that these can be learnt. Teacher and student are networks that learn from what it says (the
small check of card 019). Suffixes: N sequences, T tokens.
"""

from __future__ import annotations

import hashlib
from collections.abc import Generator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Stage
from stillhouse.data.responses import Coder, pack_rows
from stillhouse.data.text import TextData
from stillhouse.data.windows import Counts, Windows, WindowSplit
from stillhouse.models.causal_lm import new_causal_lm
from stillhouse.models.symbol_tokenizer import symbol_tokenizer
from stillhouse.rl.sampling import LiveSampler
from stillhouse.tasks.embedded_lm import small_llama
from stillhouse.tasks.language import LanguageSystem, LanguageTask

LETTERS = "abcdefghijkl"
END = len(LETTERS)
PROMPT, RESPONSE = 4, 6


@dataclass(frozen=True)
class OracleLanguage:
    """How much text there is, and how large the three models are: (width, layers)."""

    prompts: int = 4000
    selection: int = 128
    validation: int = 512
    oracle: tuple[int, int] = (48, 2)
    spread: float = 0.1
    opinion: float = 3.0
    teacher: tuple[int, int] = (64, 2)
    student: tuple[int, int] = (32, 1)


def network(size: tuple[int, int], *, seed: int, spread: float = 0.02) -> Any:
    """A Llama over the letters and the end, of so much width and depth; ``spread`` of its random weights."""
    config = small_llama(symbol_tokenizer(LETTERS), width=size[0], layers=size[1], positions=128)
    config.initializer_range = spread
    return new_causal_lm(config, seed=seed)


def oracle_network(recipe: OracleLanguage, *, seed: int) -> nn.Module:
    """The truth of one seed."""
    model = network(recipe.oracle, seed=1_000 + seed, spread=recipe.spread).eval()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(recipe.opinion)
    return model


def drawn_prompts(count: int, generator: torch.Generator) -> list[list[int]]:
    """Different prompts in random order."""
    known = END**PROMPT
    if count > known:
        raise ConfigError(f"{count:,} prompts: the embedded language has {known:,} different ones; ask for fewer")
    places_N = torch.randperm(known, generator=generator)[:count]
    return torch.stack([places_N // END**place % END for place in range(PROMPT)], 1).tolist()


def oracle_task(
    system: LanguageSystem, run: Run, recipe: OracleLanguage | None = None
) -> Generator[Stage, Artifact, LanguageTask]:
    """The task of a language system in this language: teacher and student know nothing yet, the text is the oracle's.

    Oracle, text and models depend on the system's seed.
    """
    import datasets

    recipe = recipe or OracleLanguage()
    tokenizer, oracle = symbol_tokenizer(LETTERS), oracle_network(recipe, seed=system.seed)
    generator = torch.Generator().manual_seed(system.seed)
    count = recipe.prompts + recipe.selection + recipe.validation
    prompts = drawn_prompts(count, generator)
    written = LiveSampler(oracle, Coder(tokenizer), RESPONSE).write(prompts, seed=system.seed)
    columns = pack_rows([(prompt, one.ids) for prompt, one in zip(prompts, written, strict=True)], END)
    sizes = (recipe.prompts, recipe.selection, recipe.validation)
    parts = dict(zip(columns, (column.split(sizes) for column in columns.values()), strict=True))
    train, selection, validation = (
        WindowSplit({name: part[place] for name, part in parts.items()}) for place in range(3)
    )
    predicted = int(parts["loss_mask"][2].sum())
    content = hashlib.sha256(repr((recipe, system.seed, prompts)).encode()).hexdigest()
    windows = Windows(
        train,
        selection,
        validation,
        PROMPT + RESPONSE,
        "prompt-completion",
        "the oracle's text",
        content,
        Counts(int(parts["attention_mask"][0].sum()), predicted, predicted),
    )
    documents = datasets.Dataset.from_dict({"prompt": [], "completion": []})
    data = TextData(documents, "prompt-completion", "oracle language", content)
    teacher = network(recipe.teacher, seed=system.seed)
    student = partial(network, recipe.student, seed=system.seed)
    yield from ()
    return LanguageTask(system, run, teacher, tokenizer, data, windows, END + 1, student)
