"""Demonstrations into vectors: a small language model that reads them, and a large one that reads its vectors.

Shapes: B batch, D tokens of demonstrations, T tokens of the text after them, L vectors, E and W widths of the small and
the large model, V vocabulary, Y tokens that a decoder writes.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.models.encoder_decoders import is_text_encoder, load_text_encoder

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
        lm: a causal language model, whose head is not used, or the encoder of a T5.
        vectors: L.
        width: W.
        chunks: the demonstrations are cut into so many equal runs of tokens that are read apart, and the vectors of
            all of them stand side by side (fusion in the decoder, Izacard and Grave, 2021, arXiv 2007.01282).
        scale: the vectors are so many times the mapped states; see `fit_scale`.
        seed: of the tokens whose embeddings the learned ones start from, and of the linear map.
    """

    def __init__(
        self, lm: Any, *, vectors: int, width: int, chunks: int = 1, scale: float = 1.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.lm = lm
        self.vectors, self.chunks, self.width, self.scale = vectors, chunks, width, scale
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
        return torch.cat([self._read(ids, mask) for ids, mask in pieces(demo_ids, demo_mask, self.chunks)], 1)

    @torch.no_grad()
    def fit_scale(self, demo_ids: Tensor, demo_mask: Tensor, embedded_NW: Tensor) -> None:
        """Make the vectors as large, in root mean square, as the larger model's embeddings of some tokens.

        Last hidden states are normed and often ten times as large as embeddings; vectors of that size drown what the
        first layers of the larger model add to them.
        """
        self.scale *= float(_rms(embedded_NW) / _rms(self(demo_ids, demo_mask)))

    def _read(self, ids_BD: Tensor, mask_BD: Tensor) -> Tensor:
        prompt_BLE = self.prompt.expand(len(ids_BD), -1, -1)
        embedded = torch.cat([self.lm.get_input_embeddings()(ids_BD), prompt_BLE], 1)
        mask = torch.cat([mask_BD, mask_BD.new_ones(len(ids_BD), self.vectors)], 1)
        body, more = self.lm.base_model, {"position_ids": positions(mask), "use_cache": False}
        if "position_ids" not in inspect.signature(body.forward).parameters:
            more = {}  # a T5 counts distances, not places
        read = body(inputs_embeds=embedded, attention_mask=mask, **more)
        return self.scale * self.adapter(read.last_hidden_state[:, -self.vectors :])

    def save(self, folder: Path, tokenizer: Any) -> None:
        """Write the language model as ``transformers`` does, and the rest beside it."""
        from safetensors.torch import save_file

        self.lm.save_pretrained(folder / "lm")
        tokenizer.save_pretrained(folder / "lm")
        rest = {name: t.contiguous() for name, t in self.state_dict().items() if not name.startswith("lm.")}
        save_file(rest, folder / "distiller.safetensors")
        settings = {"vectors": self.vectors, "chunks": self.chunks, "width": self.width, "scale": self.scale}
        (folder / SETTINGS).write_text(json.dumps(settings), encoding="utf-8")

    @staticmethod
    def load(folder: Path) -> DemonstrationDistiller:
        """What `save` wrote, in evaluation mode."""
        from safetensors.torch import load_file

        alone = is_text_encoder(folder / "lm")
        lm, _ = load_text_encoder(str(folder / "lm")) if alone else _causal(str(folder / "lm"))
        settings = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))
        distiller = DemonstrationDistiller(lm, **settings)
        distiller.load_state_dict(load_file(folder / "distiller.safetensors"), strict=False)
        return distiller.eval()


def _rms(values: Tensor) -> Tensor:
    return values.pow(2).mean().sqrt()


def pieces(ids_BD: Tensor, mask_BD: Tensor, count: int) -> list[tuple[Tensor, Tensor]]:
    """The tokens of each row in ``count`` runs as equal as can be, each filled up at the left, with its mask.

    Where a row is cut depends on its own tokens alone, which stand at the right of the row.
    """
    length_B = mask_BD.sum(1)
    edges = torch.arange(count + 1, device=ids_BD.device) * length_B[:, None] // count
    found = []
    for begin_B, end_B in zip(edges.T[:-1], edges.T[1:], strict=True):
        widest = int((end_B - begin_B).max())
        back_BD = torch.arange(widest, 0, -1, device=ids_BD.device)  # tokens from here to the run's end
        place = (ids_BD.shape[1] - length_B + end_B)[:, None] - back_BD
        found.append((ids_BD.gather(1, place.clamp(min=0)), (back_BD <= (end_B - begin_B)[:, None]).to(mask_BD.dtype)))
    return found


def _causal(name: str) -> tuple[Any, Any]:
    return load_causal_lm(name, dtype=torch.float32)


class WithDemonstrations(nn.Module):
    """A language model that reads demonstrations and then a text: logits (B, T, V) on the text."""

    needs = ("demo_ids", "demo_mask", "input_ids", "attention_mask")

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

    needs = ("input_ids", "attention_mask")

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


class EncodesDemonstrations(nn.Module):
    """An encoder that reads demonstrations and a question, a decoder that answers: logits (B, Y, V) on the answer."""

    needs = ("demo_ids", "demo_mask", "input_ids", "attention_mask", "decoder_input_ids")

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(
        self,
        demo_ids: Tensor,
        demo_mask: Tensor,
        input_ids: Tensor,
        attention_mask: Tensor,
        decoder_input_ids: Tensor,
    ) -> Tensor:
        mask, order = _to_the_left(torch.cat([demo_mask, attention_mask], 1))
        ids = torch.cat([demo_ids, input_ids], 1).gather(1, order)
        return self.lm(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_input_ids, use_cache=False).logits


class EncodesVectors(nn.Module):
    """An encoder that reads vectors (B, L, W) and a question, a decoder that answers: logits (B, Y, V)."""

    needs = ("input_ids", "attention_mask", "decoder_input_ids")

    def __init__(self, lm: Any) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, vectors: Tensor, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        embedded = self.lm.get_input_embeddings()(input_ids)
        mask = torch.cat([attention_mask.new_ones(vectors.shape[:2]), attention_mask], 1)
        return self.lm(
            inputs_embeds=torch.cat([vectors.to(embedded.dtype), embedded], 1),
            attention_mask=mask,
            decoder_input_ids=decoder_input_ids,
            use_cache=False,
        ).logits


def _to_the_left(mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """The mask with its ones first, and where each place comes from: an encoder may count from its first place."""
    order = (1 - mask_BT).argsort(dim=1, stable=True)
    return mask_BT.gather(1, order), order


def readers_of(lm: Any) -> tuple[Any, Any]:
    """How a model, decoder alone or encoder and decoder, reads demonstrations, and how it reads vectors."""
    if lm.config.is_encoder_decoder:
        return EncodesDemonstrations(lm), EncodesVectors(lm)
    return WithDemonstrations(lm), WithVectors(lm)
