"""Structured pruning: whole channels leave a network, together with everything that depends on them.

Channels that must leave together form a `Group`: the rows of the layer that makes them, the columns of the layers that
read them, the norms and tables between. Scores say what a channel is worth; `keep_each` and `keep_across` choose;
`prune` cuts. Nothing here is bound to an architecture: `produced`, `consumed` and `along` describe plain layers, and
`repeat` those in which a channel occurs once per head (head-dimension pruning) or per part of a fused projection.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.base.errors import ModelError

Scores = dict[str, Tensor]
"""Group name -> a score per channel."""


@dataclass(frozen=True)
class Member:
    """A dimension of a parameter that holds a group's channels.

    With ``repeat`` the dimension is ``repeat`` runs of all channels: channel c stands at ``c, channels + c, ...``.
    Only ``scored`` members (weights of linear and convolution layers) have a say in what a channel is worth.
    """

    parameter: str
    dim: int
    repeat: int = 1
    scored: bool = False


@dataclass(frozen=True)
class Group:
    """Channels that leave together from all ``members``.

    Args:
        multiple: the number of channels kept is a multiple of it.
        attention: path of the attention module whose head dimension these channels are; its scale follows.
    """

    name: str
    channels: int
    members: tuple[Member, ...]
    multiple: int = 1
    attention: str | None = None

    def check(self, model: nn.Module) -> None:
        """Raise `ModelError` if a member does not hold this group's channels."""
        for member in self.members:
            shape = model.get_parameter(member.parameter).shape
            if shape[member.dim] != member.repeat * self.channels:
                raise ModelError(
                    f"group {self.name!r}: dimension {member.dim} of {member.parameter} {tuple(shape)} is not "
                    f"{member.repeat} x {self.channels} channels"
                )


def produced(model: nn.Module, path: str, *, repeat: int = 1) -> list[Member]:
    """The members of a linear or convolution layer that makes the channels."""
    bias = [Member(f"{path}.bias", 0, repeat)] if getattr(model.get_submodule(path), "bias", None) is not None else []
    return [Member(f"{path}.weight", 0, repeat, scored=True), *bias]


def consumed(path: str, *, repeat: int = 1) -> list[Member]:
    """The member of a linear or convolution layer that reads the channels."""
    return [Member(f"{path}.weight", 1, repeat, scored=True)]


def along(model: nn.Module, path: str) -> list[Member]:
    """The members of a norm (or of a bare parameter, by its last dimension) that the channels pass."""
    if path in dict(model.named_parameters(remove_duplicate=False)):
        return [Member(path, model.get_parameter(path).ndim - 1)]
    norm = model.get_submodule(path)
    return [Member(f"{path}.{name}", 0) for name in ("weight", "bias") if getattr(norm, name, None) is not None]


# -- what a channel is worth ----------------------------------------------------------------------------------------


def scores(model: nn.Module, groups: Sequence[Group], worth: Callable[[str, Tensor], Tensor]) -> Scores:
    """The mean over a group's scored members of the summed worth of the weights that a channel has there.

    ``worth(name, weight)`` gives the worth of every weight, as a tensor of the same shape.
    """
    found = {}
    for group in groups:
        group.check(model)
        sums = []
        for member in (one for one in group.members if one.scored):
            value = worth(member.parameter, model.get_parameter(member.parameter).detach()).movedim(member.dim, 0)
            sums.append(value.reshape(member.repeat, group.channels, -1).sum((0, 2)))
        found[group.name] = torch.stack(sums).mean(0)
    return found


def taylor_scores(model: nn.Module, groups: Sequence[Group], gradients: Mapping[str, Tensor]) -> Scores:
    """First-order Taylor importance |w dL/dw| (Molchanov et al., 2019, arXiv 1906.10771), from `summed_gradients`."""
    return scores(model, groups, lambda name, weight: (weight * gradients[name]).abs())


def magnitude_scores(model: nn.Module, groups: Sequence[Group]) -> Scores:
    """Squared weights (Li et al., 2017, arXiv 1608.08710, with the L2 norm)."""
    return scores(model, groups, lambda _name, weight: weight.square())


def random_scores(groups: Sequence[Group], *, generator: torch.Generator | None = None) -> Scores:
    """Uniform scores: what any criterion must beat."""
    return {group.name: torch.rand(group.channels, generator=generator) for group in groups}


def summed_gradients(
    model: nn.Module, loss: Callable[[Any], Tensor], batches: Iterable[Any], *, device: torch.device | None = None
) -> dict[str, Tensor]:
    """The gradient of ``loss`` on the weights of ``model``, summed over batches; the weights stay as they are."""
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    total = {name: torch.zeros_like(weight, device=device) for name, weight in weights.items()}
    for batch in batches:
        for name, gradient in zip(
            weights, torch.autograd.grad(loss(batch), list(weights.values()), allow_unused=True), strict=True
        ):
            if gradient is not None:
                total[name] += gradient.to(total[name].device)
    return total


def by_mean(score: Tensor) -> Tensor:
    """Scores over their mean: a group's scores keep their proportions."""
    return score / score.mean().clamp(min=torch.finfo(score.dtype).tiny)


def gaussian(score: Tensor) -> Tensor:
    """Scores as deviations from their mean, in standard deviations: groups of different scale become comparable."""
    return (score - score.mean()) / (score.std() + 1e-8)


# -- choosing and cutting -------------------------------------------------------------------------------------------


def kept(channels: int, ratio: float, multiple: int = 1) -> int:
    """Channels left when ``ratio`` of them go: rounded down, then down to a multiple, but not to nothing."""
    left = math.floor(channels * (1 - ratio) + 1e-9)
    return max(multiple, left - left % multiple)


def keep_each(groups: Sequence[Group], found: Scores, ratio: float) -> dict[str, Tensor]:
    """The best channels of every group, the same share in each; indices in ascending order."""
    return {
        group.name: found[group.name].topk(kept(group.channels, ratio, group.multiple)).indices.sort().values
        for group in groups
    }


def keep_across(groups: Sequence[Group], found: Scores, ratio: float) -> dict[str, Tensor]:
    """The best channels of all groups in one ranking: groups lose different shares.

    The worst ``ratio`` of all channels go; then each group takes back its best lost channels, up to the next multiple.
    """
    ranking = torch.cat([found[group.name] for group in groups])
    owner = torch.cat([torch.full((group.channels,), i) for i, group in enumerate(groups)])
    lost = ranking.argsort(stable=True)[: len(ranking) - math.floor(len(ranking) * (1 - ratio) + 1e-9)]
    gone = torch.bincount(owner[lost.cpu()], minlength=len(groups)).tolist()
    chosen = {}
    for group, out in zip(groups, gone, strict=True):
        left = max(1, math.ceil((group.channels - out) / group.multiple)) * group.multiple
        chosen[group.name] = found[group.name].topk(min(left, group.channels)).indices.sort().values
    return chosen


def prune_groups(
    model: nn.Module, groups: Sequence[Group], found: Scores, ratio: float, *, across: bool = False
) -> dict[str, int]:
    """Cut the worst ``ratio`` of the channels of ``groups``; returns how many of each are left.

    ``across``: in one ranking of all groups, by their `gaussian` scores; otherwise the same share of each.
    """
    normalise, choose = (gaussian, keep_across) if across else (by_mean, keep_each)
    keep = choose(groups, {group.name: normalise(found[group.name]) for group in groups}, ratio)
    for group in groups:
        prune(model, group, keep[group.name])
    return {name: len(channels) for name, channels in keep.items()}


@torch.no_grad()
def prune(model: nn.Module, group: Group, keep: Tensor) -> None:
    """Cut all but the channels ``keep`` out of ``model``, in place. Its parameters become new ones."""
    group.check(model)
    for member in group.members:
        old = model.get_parameter(member.parameter)
        places = torch.arange(member.repeat)[:, None] * group.channels + keep.cpu()
        set_parameter(model, member.parameter, old.index_select(member.dim, places.flatten().to(old.device)))
    if group.attention is not None:
        set_head_dim(model.get_submodule(group.attention), len(keep))


def set_parameter(model: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by one of another shape; its layer's sizes follow."""
    path, _, leaf = name.rpartition(".")
    layer = model.get_submodule(path)
    setattr(layer, leaf, nn.Parameter(value.clone(), requires_grad=getattr(layer, leaf).requires_grad))
    if isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = layer.weight.shape
    elif isinstance(layer, nn.Conv2d):
        layer.out_channels, layer.in_channels = layer.weight.shape[0], layer.weight.shape[1] * layer.groups
    elif type(layer).__name__ == "Conv1D":  # of GPT-2
        for name, size in zip(("nx", "nf"), value.shape, strict=True) if leaf == "weight" else ():
            setattr(layer, name, size)
    elif isinstance(layer, nn.LayerNorm):
        layer.normalized_shape = tuple(layer.weight.shape)


def set_head_dim(attention: nn.Module, head_dim: int) -> None:
    """Tell an attention module of ``transformers`` its head dimension: the scale of its logits is head_dim^-0.5."""
    for name, value in (("head_dim", head_dim), ("scale", head_dim**-0.5), ("scaling", head_dim**-0.5)):
        if hasattr(attention, name):
            setattr(attention, name, value)
