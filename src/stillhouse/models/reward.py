"""Reward models to be: a causal language model with one number for a head."""

from __future__ import annotations

from typing import Any

import torch

from stillhouse.models.errors import clear_errors


def new_reward_model(name: str, *, pad: int, trust_remote_code: bool = False) -> Any:
    """The sequence classifier with one output that begins as the causal LM in ``name`` (directory or hub id).

    Its head begins at 0, so that all rewards are the same at first, whatever the seed. In float32.

    Args:
        pad: id that rows are filled up with; the score is read from the last token before it.
    """
    from transformers import AutoModelForSequenceClassification

    with clear_errors(name):
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=1,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    model.config.pad_token_id = pad
    with torch.no_grad():
        for missing in report["missing_keys"]:
            model.get_parameter(missing).zero_()
    return model
