"""Where the layers of BERT-like encoders are: embeddings, layers, and the queries and keys of their attention.

Attention scores follow from queries and keys alone, q k^T / sqrt(d), so they are read without changing how a model
computes attention. That holds for BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DistilBERT and others of their build, not for
models whose attention adds relative positions (DeBERTa).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from stillhouse.base.errors import ModelError

NAMES = (("query", "key"), ("q_lin", "k_lin"))
RELATIVE = ("relative_key", "relative_key_query")


@dataclass(frozen=True)
class EncoderLayers:
    """Paths of modules in an encoder: ``embeddings``, each of ``layers``, ``queries`` and ``keys`` by layer."""

    embeddings: str
    layers: tuple[str, ...]
    queries: tuple[str, ...]
    keys: tuple[str, ...]
    heads: int

    @staticmethod
    def of(model: nn.Module) -> EncoderLayers:
        """Find them.

        Raises:
            ModelError: the model is not built like BERT.
        """
        kind = type(model).__name__
        modules = dict(model.named_modules())
        config: Any = model.config
        queries: list[str] = []
        keys: list[str] = []
        for query, key in NAMES:
            found = [name for name in modules if re.search(rf"\.layer\.\d+\..*\b{query}$", name)]
            queries += found
            keys += [name.removesuffix(query) + key for name in found]
        layers = [re.sub(r"(\.layer\.\d+)\..*", r"\1", name) for name in queries]
        embeddings = [name for name in modules if name.rpartition(".")[2] == "embeddings"]
        relative = getattr(config, "position_embedding_type", "absolute") in RELATIVE
        if not queries or not embeddings or relative or any(name not in modules for name in keys):
            raise ModelError(f"{kind}: its layers are not built like BERT's; give a BERT, RoBERTa, XLM-R or DistilBERT")
        return EncoderLayers(embeddings[0], tuple(layers), tuple(queries), tuple(keys), int(config.num_attention_heads))


def layer_map(student: int, teacher: int) -> list[int]:
    """Which teacher layer each student layer learns from, counted from 1: m * (L_T / L_S), m = 1 ... L_S.

    Raises:
        ModelError: the teacher's layers are not a multiple of the student's.
    """
    if teacher % student:
        raise ModelError(
            f"{teacher} layers of the teacher are no multiple of the student's {student}; choose a divisor"
        )
    return [m * (teacher // student) for m in range(1, student + 1)]
