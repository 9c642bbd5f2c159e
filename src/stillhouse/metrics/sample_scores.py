"""What models say of single samples: features in front of the last layer, and norms of gradients.

Shapes: N samples, B batch, D width, V classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from stillhouse.base.errors import ModelError
from stillhouse.core.observed import Batch, Observed


def last_linear(model: nn.Module) -> str:
    """The path of the last linear layer of a classifier, whose input are its features.

    Raises:
        ModelError: it has none.
    """
    paths = [path for path, module in model.named_modules() if isinstance(module, nn.Linear)]
    if not paths:
        raise ModelError(f"{type(model).__name__}: has no linear layer to read features in front of")
    return paths[-1]


@torch.no_grad()
def features_of(model: nn.Module, batches: Iterable[Batch]) -> Tensor:
    """What the last linear layer of a classifier reads, (N, D), on the CPU; the model should be in evaluation mode."""
    signal = Observed(model, mode="eval").tap(last_linear(model), of="input").detach()
    return torch.cat([signal(batch).flatten(1).float().cpu() for batch in batches])


def gradient_norms(model: Any, batches: Iterable[Batch], *, chunk_size: int = 32) -> Tensor:
    """GraNd: the norm of each sample's gradient of the cross-entropy in all weights, (N,) (Paul et al., 2021,
    arXiv 2107.07075). The model should be in evaluation mode. ``chunk_size`` samples' gradients are held at one time.
    """
    weights = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    fixed = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    fixed |= dict(model.named_buffers())

    def loss(own: dict[str, Tensor], pixels: Tensor, label: Tensor) -> Tensor:
        logits = functional_call(model, {**own, **fixed}, kwargs={"pixel_values": pixels[None]}).logits
        return F.cross_entropy(logits.float(), label[None])

    def norm(pixels: Tensor, label: Tensor) -> Tensor:
        gradients = grad(loss)(weights, pixels, label)
        return torch.stack([g.float().square().sum() for g in gradients.values()]).sum().sqrt()

    of_batch = vmap(norm, chunk_size=chunk_size)
    return torch.cat([of_batch(batch["pixel_values"], batch["labels"]).double().cpu() for batch in batches])
