"""Another tokenizer for a language model: new embeddings made of old ones, and a tokenizer of bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stillhouse.base.errors import ModelError, near, one_line
from stillhouse.models.tokenizers import real_vocab_size, train_bpe

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


def bpe_like(tokenizer: Any, texts: Iterable[str], *, vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on ``texts``, with the special tokens and the chat template of ``tokenizer``.

    Raises:
        ModelError: a vocabulary too small for the bytes and the special tokens.
    """
    special = [tokenizer.eos_token, *(token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token)]
    made = train_bpe(texts, vocab_size=vocab_size, special_tokens=special)
    for role in ROLES:
        token = getattr(tokenizer, role, None)
        if token is not None:
            setattr(made, role, token)
    made.chat_template = tokenizer.chat_template
    return made


def byte_tokenizer(tokenizer: Any) -> PreTrainedTokenizerFast:
    """The 256 bytes and the special tokens of ``tokenizer``, with its chat template: nothing is ever merged."""
    return bpe_like(tokenizer, [], vocab_size=256 + len(set(tokenizer.all_special_tokens)))


def with_vocabulary(config: PretrainedConfig, tokenizer: Any) -> PretrainedConfig:
    """A copy of a model's config for another tokenizer: its size and its special tokens."""
    config = copy.deepcopy(config)
    inner = config.get_text_config(decoder=True)
    inner.vocab_size = real_vocab_size(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(inner, name, getattr(tokenizer, name))
    return config


@torch.no_grad()
def transplant(
    model: PreTrainedModel, parts: Sequence[Sequence[int]], tokenizer: Any, *, untie: bool = False, seed: int = 0
) -> PreTrainedModel:
    """A copy of ``model`` with the vocabulary of ``tokenizer``; everything but embeddings and head is kept.

    A new token's embedding (and its row of the head) is the mean of the old ones it is made of; where it is made of
    none, it is drawn from a normal distribution with the mean and deviation of the old ones (fast vocabulary
    transfer; Gee et al., 2022, arXiv 2402.09977).

    Args:
        parts: for every new id, the old ids.
        untie: give the head a matrix of its own where it shares that of the embeddings.

    Raises:
        ModelError: a model whose embeddings cannot be replaced.
    """
    made = copy.deepcopy(model)
    old, head = made.get_input_embeddings(), made.get_output_embeddings()
    if not isinstance(old, nn.Embedding) or not isinstance(head, nn.Linear):
        raise ModelError(f"{type(model).__name__}: no plain embeddings and head to replace; use another student")
    tied = head.weight is old.weight
    generator = torch.Generator().manual_seed(seed)
    embedded = _mixed(old.weight, parts, generator)
    decided = embedded.clone() if tied else _mixed(head.weight, parts, generator)
    bias = None if head.bias is None else _mixed(head.bias[:, None], parts, generator)[:, 0]
    made.resize_token_embeddings(len(parts), mean_resizing=False)
    if tied and untie:
        made.config.get_text_config(decoder=True).tie_word_embeddings = False
        made.config.tie_word_embeddings = False
        fresh = nn.Linear(embedded.shape[1], len(parts), bias=head.bias is not None)
        made.set_output_embeddings(fresh.to(embedded.device, embedded.dtype))
    made.get_input_embeddings().weight.copy_(embedded)
    made.get_output_embeddings().weight.copy_(decided)
    if bias is not None:
        made.get_output_embeddings().bias.copy_(bias)
    config = with_vocabulary(made.config, tokenizer)
    made.config = config
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(made.generation_config, name, getattr(tokenizer, name))
    return made


@torch.no_grad()
def put_embeddings(model: PreTrainedModel, file: Path) -> None:
    """Give a model the embeddings in a safetensors file, such as a hypernetwork predicted for its tokenizer.

    ``input`` (V, D) are those of the tokens; ``output`` (V, D) the rows of the head, where it has a matrix of its own,
    which stays as it is if there are none.

    Raises:
        ModelError: a file that cannot be read, has no ``input``, or does not fit.
    """
    try:
        given = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"embeddings={file}: {one_line(error)}; give a safetensors file{near(file)}") from error
    embedded, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    places = {"input": embedded} | ({} if head is embedded else {"output": head})
    if "input" not in given or given.keys() - places.keys():
        raise ModelError(
            f"embeddings={file} holds {', '.join(sorted(given)) or 'nothing'}; this model takes input"
            + (" and output" if "output" in places else " alone: its head shares them, see untie")
        )
    for name, rows_VD in given.items():
        if rows_VD.shape != places[name].shape:
            raise ModelError(
                f"embeddings={file}: {name} has shape {tuple(rows_VD.shape)}; with this tokenizer it must be "
                f"{tuple(places[name].shape)}"
            )
        places[name].copy_(rows_VD)


def _mixed(weight_VD: Tensor, parts: Sequence[Sequence[int]], generator: torch.Generator) -> Tensor:
    """The rows of a new vocabulary from those of an old one, (len(parts), D)."""
    rows = weight_VD.detach()
    mean, deviation = rows.float().mean(0), rows.float().std(0)
    made = []
    for olds in parts:
        known = [old for old in olds if old < len(rows)]
        drawn = torch.randn(rows.shape[1:], generator=generator)  # for all, so that none depends on which others match
        made.append(rows[known].float().mean(0) if known else mean + deviation * drawn.to(rows.device))
    return torch.stack(made).to(rows.dtype)
