"""A model of bytes that still sees subwords: to each byte's embedding comes that of the longest one that ends there.

`expanded` puts the table of a model's former vocabulary beside the embeddings of its new one (input expansion of
Minixhofer, Vulic and Ponti, 2025, arXiv 2503.20083). The table stays as it is. ``save_pretrained`` writes all of it,
under a model type of its own (``expanded-llama`` for a Llama), so that nothing takes it for the model without;
`load_expanded` reads it back. After `register_expanded` in the same process ``AutoModelForCausalLM`` does so too.

``generate`` works as usual. Whoever feeds a cache by hand gives the ids before the new ones as ``before``.

Shapes: B sequences, T ids, D hidden width.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from stillhouse.base.errors import ModelError
from stillhouse.models.own_types import base_type_in, causal_classes, load_saved, made_known

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

PREFIX = "expanded-"
LONGEST = 16  # ids of a spelling; longer ones are left out, as in the paper's code
Spellings = Mapping[tuple[int, ...], int]
"""How old tokens are written in new ids: ``(116, 104, 101) -> 1820``."""


class Expansion(nn.Module):
    """Finds the longest known spelling that ends at each id, and gives the row of its table.

    Spellings are kept as a tree that is read backwards from where they end. Node n + 1 is what edge n leads to; the
    sorted key of an edge is (node it leaves) * ``vocab_size`` + id.

    Args:
        edges, rows, longest: sizes: of the tree, of the table (row 0 is nothing), and of the longest spelling.
        width, vocab_size: hidden width, and number of new ids.
    """

    keys: Tensor
    row: Tensor
    table: Tensor

    def __init__(self, *, edges: int, rows: int, longest: int, width: int, vocab_size: int) -> None:
        super().__init__()
        self.longest, self.vocab_size = longest, vocab_size
        self.before: Tensor | None = None  # ids that a cache has read already, while a forward is on its way
        self.register_buffer("keys", torch.zeros(edges, dtype=torch.long))
        self.register_buffer("row", torch.zeros(edges + 1, dtype=torch.long))
        self.register_buffer("table", torch.zeros(rows, width))

    def find(self, ids_BT: Tensor) -> Tensor:
        """The row of the longest spelling that ends at each id, 0 where there is none: (B, T) -> (B, T)."""
        T, back = ids_BT.shape[1], self.longest - 1
        padded = nn.functional.pad(ids_BT, (back, 0), value=-1)
        node, found = torch.zeros_like(ids_BT), torch.zeros_like(ids_BT)
        alive = torch.ones_like(ids_BT, dtype=torch.bool)
        for step in range(self.longest):
            token = padded[:, back - step : back - step + T]
            key = node * self.vocab_size + token
            place = torch.searchsorted(self.keys, key.contiguous()).clamp(max=len(self.keys) - 1)
            alive = alive & (token >= 0) & (self.keys[place] == key)
            node = torch.where(alive, place + 1, 0)
            row = self.row[node]
            found = torch.where(alive & (row > 0), row, found)
        return found

    def forward(self, ids_BT: Tensor) -> Tensor:
        """What is added to the embeddings: (B, T) -> (B, T, D)."""
        before = ids_BT[:, :0] if self.before is None else self.before
        found = self.find(torch.cat([before, ids_BT], 1))[:, before.shape[1] :]
        return self.table[found]


def _add(embeddings: Any, ids: tuple[Tensor, ...], output: Tensor) -> Tensor:
    """The hook of the embeddings: what the expansion has to say is added."""
    return output + embeddings.expansion(ids[0]).to(output.dtype)


@torch.no_grad()
def expanded(model: PreTrainedModel, old: nn.Module, spellings: Spellings) -> PreTrainedModel:
    """A copy of ``model`` whose embeddings are expanded by those of its former vocabulary.

    Args:
        model: with its new vocabulary (`stillhouse.models.tokenizer_transfer.transplant`).
        old: the former embeddings, a module that takes ids.
        spellings: former tokens in the model's ids; those of more than `LONGEST` ids are left out.

    Raises:
        ModelError: a model that is expanded already, or no spelling at all.
    """
    kind = model.config.model_type
    if kind.startswith(PREFIX):
        raise ModelError("this model's embeddings are expanded already; use the model it came from")
    known = {spelling: number for spelling, number in spellings.items() if 0 < len(spelling) <= LONGEST}
    if not known:
        raise ModelError("no token of the former vocabulary can be written in the new one; leave expand=false")
    tokens = sorted(set(known.values()))
    row_of = {number: row for row, number in enumerate(tokens, start=1)}
    vocab_size = model.get_input_embeddings().num_embeddings
    keys, rows = _tree({spelling: row_of[number] for spelling, number in known.items()}, vocab_size)
    config_class, model_class = expanded_classes(kind)
    raw = {key: value for key, value in model.config.to_dict().items() if key not in ("model_type", "architectures")}
    sizes = {"edges": len(keys), "rows": len(tokens) + 1, "longest": max(map(len, known))}
    made = model_class(config_class.from_dict({**raw, "expansion": sizes})).to(model.dtype)
    made.load_state_dict(model.state_dict(), strict=False)
    expansion: Any = made.get_input_embeddings().expansion
    expansion.keys.copy_(torch.tensor(keys))
    expansion.row.copy_(torch.tensor(rows))
    device = next(old.parameters()).device
    expansion.table[1:].copy_(old(torch.tensor(tokens, device=device)))
    made.generation_config = copy.deepcopy(model.generation_config)
    return made.eval()


def _tree(rows: Mapping[tuple[int, ...], int], vocab_size: int) -> tuple[list[int], list[int]]:
    """The sorted keys of the tree's edges, and the row of every node."""
    level: dict[int, dict[tuple[int, ...], int]] = {0: {spelling[::-1]: row for spelling, row in rows.items()}}
    keys: list[int] = []
    found = [0]
    while level:
        below: dict[int, dict[tuple[int, ...], int]] = {}
        for node, spelled in level.items():
            children: dict[int, dict[tuple[int, ...], int]] = {}
            for (first, *rest), row in spelled.items():
                children.setdefault(first, {})[tuple(rest)] = row
            for token in sorted(children):
                keys.append(node * vocab_size + token)
                found.append(children[token].pop((), 0))
                if children[token]:
                    below[len(keys)] = children[token]
        level = below
    return keys, found


def load_expanded(folder: str | Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The expanded model that ``save_pretrained`` wrote into ``folder``, in eval mode.

    Raises:
        ModelError: no expanded model there, or weights that do not fit its config.
    """
    _, model_class = register_expanded(folder)
    return load_saved(model_class, folder, dtype=dtype)


def is_expanded(folder: str | Path) -> bool:
    """Whether a directory holds a model with expanded embeddings."""
    return base_type_in(folder, PREFIX) is not None


def register_expanded(folder: str | Path) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """Make ``AutoModelForCausalLM`` load the expanded model in ``folder``, in this process; returns its classes."""
    base_type = base_type_in(folder, PREFIX)
    if base_type is None:
        raise ModelError(f"{folder}: no model with expanded embeddings in it; make one with expanded, save_pretrained")
    return expanded_classes(base_type)


@functools.cache
def expanded_classes(base_type: str) -> tuple[type[PretrainedConfig], type[PreTrainedModel]]:
    """The config and model class of an expanded ``base_type`` (``"llama"``), known to the Auto classes from now on."""
    base_config: Any
    base_model: Any
    base_config, base_model = causal_classes(base_type)

    class Config(base_config):
        model_type = PREFIX + base_type

    class Model(base_model):
        config_class = Config

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            embeddings = self.get_input_embeddings()
            sizes = {"width": embeddings.weight.shape[1], "vocab_size": embeddings.num_embeddings}
            embeddings.expansion = Expansion(**config.expansion, **sizes).to(embeddings.weight.dtype)
            embeddings.register_forward_hook(_add)

        @functools.wraps(base_model.forward)  # its arguments are looked up by name
        def forward(self, *args: Any, before: Tensor | None = None, **kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            if before is None and cache is not None and cache.get_seq_length():
                raise ModelError("the cache has read ids that are not given: pass those before the new ones as before")
            expansion = self.get_input_embeddings().expansion
            expansion.before = before
            try:
                return super().forward(*args, **kwargs)
            finally:
                expansion.before = None

        @functools.wraps(base_model.prepare_inputs_for_generation)
        def prepare_inputs_for_generation(self, input_ids: Tensor, *args: Any, **kwargs: Any) -> dict[str, Any]:
            inputs = super().prepare_inputs_for_generation(input_ids, *args, **kwargs)
            new = inputs.get("input_ids")
            if new is not None and new.shape[1] < input_ids.shape[1]:
                inputs["before"] = input_ids[:, : -new.shape[1]][:, -LONGEST:]
            return inputs

    return made_known(Config, Model, prefix="Expanded")


def check_spelled(pieces: Sequence[bytes | None]) -> None:
    """Refuse a vocabulary whose tokens are not single bytes: where one ends inside a subword, nothing is to be seen.

    Raises:
        ModelError: it has longer tokens.
    """
    longer = next((piece for piece in pieces if piece is not None and len(piece) > 1), None)
    if longer is not None:
        raise ModelError(f"expand=true is for tokenizers of bytes, and this one has {longer!r}; use tokenizer=bytes")
