"""Text encoders of ``transformers`` and ``sentence-transformers``: texts to vectors."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stillhouse.base.errors import ModelError
from stillhouse.models.efficient_attention import reserved_positions
from stillhouse.models.errors import clear_errors

if TYPE_CHECKING:
    import numpy as np


class TextEncoder:
    """A text is the mean of its tokens' last hidden states, or the first token's, normalised.

    Which of the two, and how many tokens are read, is taken from a directory of ``sentence-transformers`` where there
    is one; else it is the mean.

    Raises:
        ModelError: it cannot be loaded, or is no encoder with padding.
    """

    def __init__(self, name: str, *, batch_size: int = 32, trust_remote_code: bool = False) -> None:
        from transformers import AutoModel, AutoTokenizer

        with clear_errors(name):
            self.tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            self.model: Any = AutoModel.from_pretrained(name, trust_remote_code=trust_remote_code, use_safetensors=True)
        if self.model.config.is_encoder_decoder or self.tokenizer.pad_token_id is None:
            raise ModelError(f"{name}: no text encoder with a padding token; give a BERT-like one with its tokenizer")
        self.model.eval()
        self.batch_size = batch_size
        pooling = Path(name) / "1_Pooling" / "config.json"
        self.first = pooling.exists() and bool(json.loads(pooling.read_text()).get("pooling_mode_cls_token"))
        positions = getattr(self.model.config, "max_position_embeddings", 512) - reserved_positions(self.model)
        self.longest = int(min(self.tokenizer.model_max_length, positions))

    @torch.no_grad()
    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors (N, D) of length one, float32."""
        pieces = []
        for start in range(0, len(texts), self.batch_size):
            batch = self.tokenizer(
                list(texts[start : start + self.batch_size]),
                padding=True,
                truncation=True,
                max_length=self.longest,
                return_tensors="pt",
            )
            hidden = self.model(**batch).last_hidden_state.float()
            mask = batch["attention_mask"][..., None].float()
            pooled = hidden[:, 0] if self.first else (hidden * mask).sum(1) / mask.sum(1).clamp(min=1)
            pieces.append(torch.nn.functional.normalize(pooled, dim=-1))
        return torch.cat(pieces).numpy()
