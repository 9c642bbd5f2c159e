"""Longer contexts for models with rotary positions: another base of their frequencies."""

from __future__ import annotations

import copy
from typing import Any

from stillhouse.base.errors import ModelError
from stillhouse.models.lm_pruning import head_size
from stillhouse.models.scaling import new_causal_lm


def ntk_base(base: float, factor: float, dims: int) -> float:
    """The base for contexts ``factor`` times as long: base * factor^(dims / (dims - 2)).

    NTK-aware scaling (bloc97, 2023; Peng et al., 2024, arXiv 2309.00071, sec. 3.1): the lowest of the frequencies
    base^(-2i / dims) becomes ``factor`` times lower, the highest stays.
    """
    return float(base * factor ** (dims / (dims - 2)))


def rope_base(config: Any) -> tuple[float, int]:
    """The base of a model's rotary frequencies, and how many dimensions of a head they turn.

    Raises:
        ModelError: it has no rotary positions, or scales them already.
    """
    known = getattr(config, "rope_parameters", None)
    if not isinstance(known, dict) or "rope_theta" not in known or known.get("rope_type", "default") != "default":
        raise ModelError(
            f"{config.model_type}: no plain rotary positions whose base could be changed; train a longer context with "
            "another model"
        )
    return float(known["rope_theta"]), int(head_size(config) * known.get("partial_rotary_factor", 1.0))


def with_rope_base(model: Any, base: float, *, positions: int) -> Any:
    """A copy of a model with another base and room for so many positions; weights are as they were."""
    config = copy.deepcopy(model.config)
    rope_base(config)
    config.rope_parameters = {**config.rope_parameters, "rope_theta": base}
    config.max_position_embeddings = max(positions, config.max_position_embeddings)
    weight = model.get_input_embeddings().weight
    made: Any = new_causal_lm(config, seed=0, dtype=weight.dtype).to(weight.device)
    made.load_state_dict(model.state_dict())
    return made.train(model.training)
