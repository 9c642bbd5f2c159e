"""Demonstrations into vectors: a small language model that reads them, and a large one that reads its vectors.

Shapes: B batch, D tokens of demonstrations, T tokens of the text after them, L vectors, E and W widths of the small and
the large model, V vocabulary.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.models.causal_lm import load_causal_lm

SETTINGS = "distiller.json"
COMMON = 100  # the first tokens of a vocabulary are special or punctuation


def positions(mask_BT: Tensor) -> Tensor:
    """Where each token stands, counted from the first that is not padding: (B, T)."""
    return (mask_BT.cumsum(1) - 1).clamp(min=0)


class DemonstrationDistiller(nn.Module):
    """A hyper-network: demonstrations to vectors for a larger model (MEND: Li et al., ICLR 2024, arXiv 2403.06914).

    The language model reads the demonstrations and then ``vectors`` learned embeddings; the last hidden states of
    these, brought to the larger model's width by a linear map where the widths differ, are the vectors.

    Args:
        lm: a causal language model; its head is not used.
        vectors: L.
        width: W.
        chunks: the demonstrations are cut into so many equal runs of tokens that are read apart, and the vectors of
            all of them stand side by side (fusion in the decoder, Izacard and Grave, 2021, arXiv 2007.01282).
        seed: of the tokens whose embeddings the learned ones start from, and of the linear map.
    """

    def __init__(self, lm: Any, *, vectors: int, width: int, chunks: int = 1, seed: int = 0) -> None:
        super().__init__()
        self.lm = lm
        self.vectors, self.chunks, self.width = vectors, chunks, width
        table_VE = lm.get_input_embeddings().weight
        generator = torch.Generator().manual_seed(seed)
        first = COMMON if len(table_VE) > 2 * COMMON else 0
        chosen = torch.randint(first, len(table_VE), (vectors,), generator=generator)
        self.prompt = nn.Parameter(table_VE.detach()[chosen].clone())
        self.adapter = nn.Identity() if table_VE.shape[1] == width else nn.Linear(table_VE.shape[1], width)
        if isinstance(self.adapter, nn.Linear):
            with torch.no_grad():
                self.adapter.weight.normal_(0, table_VE.shape[1] ** -0.5, generator=generator)
                self.adapter.bias.zero_()

    def forward(self, demo_ids: Tensor, demo_mask: Tensor) -> Tensor:
        """(B, D) and (B, D) -> (B, chunks L, W)."""
        pieces = zip(demo_ids.chunk(self.chunks, 1), demo_mask.chunk(self.chunks, 1), strict=True)
        return torch.cat([self._read(ids, mask) for ids, mask in pieces], 1)

    def _read(self, ids_BD: Tensor, mask_BD: Tensor) -> Tensor:
        prompt_BLE = self.prompt.expand(len(ids_BD), -1, -1)
        embedded = torch.cat([self.lm.get_input_embeddings()(ids_BD), prompt_BLE], 1)
        mask = torch.cat([mask_BD, mask_BD.new_ones(len(ids_BD), self.vectors)], 1)
        read = self.lm.base_model(
            inputs_embeds=embedded, attention_mask=mask, position_ids=positions(mask), use_cache=False
        )
        return self.adapter(read.last_hidden_state[:, -self.vectors :])

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write the language model as ``transformers`` does, and the rest beside it."""
        from safetensors.torch import save_file

        self.lm.save_pretrained(folder / "lm")
        tokenizer.save_pretrained(folder / "lm")
        rest = {name: t.contiguous() for name, t in self.state_dict().items() if not name.startswith("lm.")}
        save_file(rest, folder / "distiller.safetensors")
        settings = {"vectors": self.vectors, "chunks": self.chunks, "width": self.width}
        (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> DemonstrationDistiller:
        """What `save` wrote, in evaluation mode."""
        from safetensors.torch import load_file

        lm, _ = load_causal_lm(str(folder / "lm"), dtype=torch.float32)
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        distiller = DemonstrationDistiller(lm, **settings)
        distiller.load_state_dict(load_file(folder / "distiller.safetensors"), strict=False)
        return distiller.eval()


class WithDemonstrations(nn.Module):
    """A language model that reads demonstrations and then a text: logits (B, T, V) on the text."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, demo_ids: Tensor, demo_mask: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        mask = torch.cat([demo_mask, attention_mask], 1)
        ids = torch.cat([demo_ids, input_ids], 1)
        read = self.lm(input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False)
        return read.logits[:, demo_ids.shape[1] :]


class WithVectors(nn.Module):
    """A language model that reads vectors (B, L, W) and then a text: logits (B, T, V) on the text."""

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, vectors: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        embedded = self.lm.get_input_embeddings()(input_ids)
        mask = torch.cat([attention_mask.new_ones(vectors.shape[:2]), attention_mask], 1)
        read = self.lm(
            inputs_embeds=torch.cat([vectors.to(embedded.dtype), embedded], 1),
            attention_mask=mask,
            position_ids=positions(mask),
            use_cache=False,
        )
        return read.logits[:, vectors.shape[1] :]
