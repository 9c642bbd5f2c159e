"""Small language models of the embedded tasks: their shape, and the stage in which they learn to read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from stillhouse.core.observed import Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.schedule import cosine
from stillhouse.core.source import Source
from stillhouse.core.train import Train
from stillhouse.data.sources import Batches
from stillhouse.models.causal_lm import new_causal_lm
from stillhouse.models.lora import has_lora, save_merged_lm
from stillhouse.objectives.language import TokenCrossEntropy, head_of


def save_pretrained(model: Any, folder: Path, *, tokenizer: Any) -> None:
    """Write a model and its tokenizer the way ``transformers`` loads them; adapters are merged, and beside it."""
    if has_lora(model):
        save_merged_lm(model, folder)
    else:
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def small_llama(
    tokenizer: Any,
    *,
    width: int,
    layers: int,
    heads: int = 4,
    feed_forward: int | None = None,
    positions: int = 1024,
    tied: bool = False,
) -> Any:
    """The config of a Llama for the tokens of ``tokenizer``; ``feed_forward`` is twice the width by default."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=feed_forward or 2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=positions,
        bos_token_id=tokenizer.bos_token_id or tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        tie_word_embeddings=tied,
    )


def small_bert(tokenizer: Any, *, width: int, layers: int, heads: int, positions: int) -> Any:
    """The config of a BERT without dropout for the tokens of ``tokenizer``, four times as wide inside."""
    from transformers import BertConfig

    return BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )


def reader(
    name: str,
    config: Any,
    windows: Any,
    tokenizer: Any,
    *,
    batch_size: int,
    lr: float,
    epochs: float = 1.0,
    steps: int | None = None,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    warmup: float = 0.0,
    floor: float = 0.0,
    seed: int,
    cache: Mapping[str, Any],
) -> Train:
    """The stage in which a new model of ``config`` learns to predict ``windows``, made once and kept.

    Args:
        windows: rows of tokens, as `WindowSplit`.
        epochs, steps: how long; steps come first.
        floor: share of the learning rate that is left at the end of the cosine.
        cache: what the result depends on; the name is in it anyway.
    """
    batches = Batches(windows, batch_size, seed=seed, gather=True)
    return next_token_training(
        name,
        partial(new_causal_lm, config, seed=seed),
        batches,
        tokenizer,
        lr=lr,
        steps=steps or round(epochs * len(batches)),
        betas=betas,
        weight_decay=weight_decay,
        warmup=warmup,
        floor=floor,
        cache=cache,
    )


def next_token_training(
    name: str,
    make: Callable[[], Any],
    source: Source,
    tokenizer: Any,
    *,
    lr: float,
    steps: int,
    betas: tuple[float, float] = (0.9, 0.999),
    weight_decay: float = 0.0,
    warmup: float = 0.0,
    floor: float = 0.0,
    cache: Mapping[str, Any],
) -> Train:
    """The stage in which the model of ``make`` learns to predict the tokens of ``source``; the rest as in `reader`."""

    def player() -> Player:
        model = Observed(make(), name=name, options={"use_cache": False})
        optimizer = adamw(lr, betas=betas, weight_decay=weight_decay)
        course = cosine(1.0, floor, warmup=warmup)
        return Player(name, model, TokenCrossEntropy(head_of(model)), optimizer=optimizer, lr=course, clip=1.0)

    save = partial(save_pretrained, tokenizer=tokenizer)
    return Train(name, player, source=source, steps=steps, save=save, cache=cache)


@dataclass(frozen=True)
class SmallReader:
    """A small Llama of a language of its own, and how it learns to read it."""

    width: int
    layers: int
    epochs: float
    lr: float = 3e-3
    batch_size: int = 50

    def config(self, tokenizer: Any) -> Any:
        return small_llama(tokenizer, width=self.width, layers=self.layers, positions=64)

    def reads(self, name: str, windows: Any, tokenizer: Any, *, seed: int, cache: Mapping[str, Any]) -> Train:
        """See `reader`; size and course are added to ``cache``."""
        return reader(
            name,
            self.config(tokenizer),
            windows,
            tokenizer,
            batch_size=self.batch_size,
            lr=self.lr,
            epochs=self.epochs,
            floor=0.1,
            seed=seed,
            cache={**cache, **asdict(self)},
        )
