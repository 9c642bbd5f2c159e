"""Whether a language model keeps packed sequences apart."""

from __future__ import annotations

from typing import Any

import torch

from stillhouse.base.errors import ConfigError


@torch.no_grad()
def check_packing(model: Any) -> None:
    """Make sure that sequences in one row, told apart by position ids that begin again, do not see each other.

    Raises:
        ConfigError: they do, as in models with a recurrent state.
    """
    device = next(model.parameters()).device
    one, two = torch.arange(1, 5, device=device)[None], torch.arange(4, 7, device=device)[None]
    position = torch.cat([torch.arange(4), torch.arange(3)]).to(device)[None]
    was_training = model.training
    model.eval()
    try:
        alone = model(input_ids=two, use_cache=False).logits[0].float()
        packed = model(input_ids=torch.cat([one, two], 1), position_ids=position, use_cache=False).logits[0, 4:].float()
    finally:
        model.train(was_training)
    if (alone - packed).abs().max() > 0.05 * alone.abs().max():
        raise ConfigError(
            f"packing=true, but in {type(model).__name__} a sequence sees the one before it in the same window; "
            "set packing=false"
        )
