"""A narrower encoder, and the directions in which it sees a wider one: what BiStil does to the hidden size.

(Ansell et al., 2023, arXiv 2306.01709.) Suffixes: N states, D width of the teacher, d of the student, V tokens.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from stillhouse.base.errors import ModelError


def top_directions(states_ND: Tensor, width: int) -> Tensor:
    """The first ``width`` right singular vectors of states that are not centred, (D, d), by falling singular value.

    ``states @ directions @ directions.T`` is the nearest matrix of that rank; its squared error is the sum of the
    squares of the other singular values (Eckart and Young). A vector's largest entry is positive.

    Raises:
        ModelError: fewer states than directions.
    """
    if len(states_ND) < width:
        raise ModelError(f"{len(states_ND)} states do not span {width} directions; give more text")
    states = states_ND.double()
    directions = torch.linalg.eigh(states.T @ states).eigenvectors.flip(1)[:, :width]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return (directions * largest.sign()).to(states_ND.dtype)


def projected(weight_VD: Tensor, width: int) -> Tensor:
    """A table of embeddings in its own first ``width`` right singular vectors, U S: (V, d)."""
    return weight_VD @ top_directions(weight_VD, width)


def sampled_states(model: Any, batch: dict[str, Tensor], *, count: int, generator: torch.Generator) -> list[Tensor]:
    """Hidden states (count * B, D) of ``count`` tokens drawn from each sequence, for embeddings and every layer.

    Padding is never drawn.
    """
    lengths = batch["attention_mask"].sum(1).cpu()
    drawn = (torch.rand(count, len(lengths), generator=generator) * lengths).long()
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
    rows = torch.arange(len(lengths)).expand_as(drawn).flatten()
    return [layer[rows.to(layer.device), drawn.flatten().to(layer.device)].float().cpu() for layer in states]


def narrowed(model: Any, factor: int, *, seed: int) -> Any:
    """An encoder of the same depth whose width and feed-forward size are those of ``model`` over ``factor``.

    It has as many heads, each ``factor`` times narrower, so that attention still compares head by head. Embeddings of
    tokens are `projected`; everything else is new, since its dimensions are no longer the old ones.

    Raises:
        ModelError: the width is no multiple of ``factor`` times the heads.
    """
    config = copy.deepcopy(model.config)
    heads = config.num_attention_heads
    if config.hidden_size % (factor * heads) or config.intermediate_size % factor:
        raise ModelError(
            f"hidden_factor={factor}: a width of {config.hidden_size} with {heads} heads, or a feed-forward size of "
            f"{config.intermediate_size}, does not divide by it; choose another"
        )
    config.hidden_size //= factor
    config.intermediate_size //= factor
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        made = type(model)(config)
    with torch.no_grad():
        made.get_input_embeddings().weight.copy_(projected(model.get_input_embeddings().weight, config.hidden_size))
    return made.eval()
