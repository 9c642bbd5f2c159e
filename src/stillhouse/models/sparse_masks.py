"""Sparse fine-tuning: what a model learnt as a few changed numbers, which can be put on, taken off and added up.

Lottery-ticket sparse fine-tuning (LT-SFT, Ansell et al., 2022, arXiv 2110.07560): fine-tune everything, keep the places
that moved most, go back, fine-tune those alone. The differences of a language and of a task are added to one model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stillhouse.base.errors import ConfigError, ModelError

FILE = "sparse-difference.safetensors"
NORM = ("LayerNorm", "layer_norm", "layernorm")

Masks = dict[str, Tensor]
"""Places that may change, by the parameter's name: bool, of the parameter's shape."""


class SparseDifference:
    """Differences by the parameter's name: ``places`` (k,) in the flattened parameter, and ``values`` (k,)."""

    def __init__(self, entries: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        self.entries = dict(entries)

    def __len__(self) -> int:
        return sum(len(places) for places, _ in self.entries.values())

    @staticmethod
    def between(
        before: Mapping[str, Tensor], after: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> SparseDifference:
        """After minus before, at the places of the masks."""
        entries = {}
        for name, mask in masks.items():
            places = mask.flatten().nonzero().flatten()
            if len(places):
                values = after[name].detach().flatten()[places] - before[name].detach().flatten()[places]
                entries[name] = (places, values.cpu())
        return SparseDifference(entries)

    def save(self, folder: Path) -> None:
        """Write it beside a model."""
        tensors: dict[str, Tensor] = {}
        for name, (places, values) in self.entries.items():
            tensors |= {f"{name}/places": places.contiguous(), f"{name}/values": values.contiguous()}
        save_file(tensors, folder / FILE)

    @staticmethod
    def load(folder: Path) -> SparseDifference:
        """Read what `save` wrote.

        Raises:
            ModelError: there is none.
        """
        if not (folder / FILE).exists():
            raise ModelError(f"{folder}: no {FILE} in it; give the folder of a sparse fine-tuning stage")
        tensors = load_file(folder / FILE)
        names = sorted({key.rpartition("/")[0] for key in tensors})
        return SparseDifference({name: (tensors[f"{name}/places"], tensors[f"{name}/values"]) for name in names})

    @torch.no_grad()
    def add_to(self, model: nn.Module) -> None:
        """Add the differences to a model's parameters, for good.

        Raises:
            ModelError: the model lacks a parameter, or has it in another size.
        """
        for parameter, places, values in self._meet(model):
            parameter.view(-1)[places] += values

    def _meet(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        own = dict(model.named_parameters(remove_duplicate=False))
        for name, (places, values) in self.entries.items():
            if name not in own or int(places.max()) >= own[name].numel():
                raise ModelError(f"a sparse difference changes {name}, which this {type(model).__name__} lacks")
            parameter = own[name]
            yield parameter, places.to(parameter.device), values.to(parameter.device, parameter.dtype)


@contextmanager
def applied(model: nn.Module, *differences: SparseDifference) -> Iterator[None]:
    """The model with some differences added; afterwards it is what it was, bit for bit."""
    kept: list[tuple[Tensor, Tensor, Tensor]] = []
    try:
        for difference in differences:
            for parameter, places, values in difference._meet(model):
                flat = parameter.data.view(-1)
                kept.append((flat, places, flat[places]))
                flat[places] += values
        yield
    finally:
        for flat, places, before in reversed(kept):
            flat[places] = before


def encoder_parameters(model: nn.Module, *, freeze_norms: bool = False) -> list[str]:
    """Names of the parameters of the encoder in a model: all but those of heads, which are always dense."""
    prefix = getattr(model, "base_model_prefix", "")
    names = [name for name, _ in model.named_parameters() if name.startswith(f"{prefix}.") and ".pooler." not in name]
    if not names:
        raise ModelError(
            f"{type(model).__name__}: no encoder {prefix!r} in it; give a model of transformers with a head"
        )
    return [name for name in names if not (freeze_norms and any(norm in name for norm in NORM))]


def largest_changes(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], names: Iterable[str], *, density: float
) -> Masks:
    """Masks of the ``round(density * n)`` places that moved most, one threshold for all parameters together."""
    if not 0 < density <= 1:
        raise ConfigError(f"density={density}: must be above 0 and at most 1")
    chosen = list(names)
    moved = torch.cat([(after[name].detach() - before[name].detach()).abs().flatten().cpu() for name in chosen])
    picked = torch.zeros(len(moved), dtype=torch.bool)
    picked[moved.argsort(descending=True, stable=True)[: round(density * len(moved))]] = True
    pieces = picked.split([before[name].numel() for name in chosen])
    return {name: piece.view(before[name].shape) for name, piece in zip(chosen, pieces, strict=True)}


def train_only(
    model: nn.Module, masks: Mapping[str, Tensor], *, frozen: Callable[[str], bool]
) -> list[RemovableHandle]:
    """Let gradients through at the masks' places only; parameters that ``frozen`` names get none at all.

    An optimizer without weight decay then leaves all other places bit for bit what they were.
    """
    handles = []
    for name, parameter in model.named_parameters():
        if name in masks:
            if not masks[name].any():
                parameter.requires_grad_(False)
                continue
            mask = masks[name].to(parameter.device, parameter.dtype)
            handles.append(parameter.register_hook(lambda gradient, mask=mask: gradient * mask.to(gradient.device)))
        elif frozen(name):
            parameter.requires_grad_(False)
    return handles
