"""What a denoiser is conditioned on. To every method a condition is a number, ``class_labels`` (B,).

`Classes` hands the numbers to the network as they are, `Prompts` looks up the texts they stand for and encodes them. So
batches, guidance and generators are the same for a network of classes, of texts, or of neither.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from stillhouse.base.errors import ConfigError

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")


class Shared:
    """An object that copies of a model share: what in it is never trained, and may be large."""

    def __copy__(self) -> Shared:
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


class Conditions(Protocol):
    """How numbers become what a network is conditioned on."""

    @property
    def count(self) -> int:
        """How many conditions there are; 0: the network takes none."""
        ...

    def null(self, used: int) -> int:
        """The number that stands for no condition, where the data use the numbers below ``used``."""
        ...

    def of(self, names: Sequence[str], prompts: Sequence[str]) -> Conditions:
        """The conditions of data whose classes (or captions) are ``names``, and of ``prompts``, in this order."""
        ...

    def arguments(self, labels_B: Tensor | None, x_BX: Tensor) -> dict[str, Any]:
        """Keyword arguments of the network for a batch."""
        ...


@dataclass(frozen=True)
class Classes:
    """Rows of a class embedding, or none."""

    count: int = 0

    def null(self, used: int) -> int:
        return used

    def of(self, names: Sequence[str], prompts: Sequence[str]) -> Classes:
        if prompts:
            raise ConfigError("prompts: the teacher does not read text; leave prompts out, or use one that does")
        return self

    def arguments(self, labels_B: Tensor | None, x_BX: Tensor) -> dict[str, Any]:
        return {"class_labels": labels_B} if self.count else {}


class Prompts(Shared):
    """Texts, read by the frozen encoders of a ``diffusers`` pipeline; the last one is empty and stands for none.

    Args:
        pipeline: with ``encode_prompt``: Stable Diffusion, Stable Diffusion XL, PixArt.
        net: the pipeline's network, whose configuration says what beside the texts it wants.
        texts: without the empty one.
    """

    def __init__(self, pipeline: Any, net: Any, texts: Sequence[str] = ()) -> None:
        self.pipeline = pipeline
        self.net_config = net.config
        self.texts = (*texts, "")
        # Networks that are compared in one step are asked with the same texts.
        self._recent = functools.lru_cache(maxsize=4)(self._encode)

    @property
    def count(self) -> int:
        return len(self.texts)

    def null(self, used: int) -> int:
        return len(self.texts) - 1

    def of(self, names: Sequence[str], prompts: Sequence[str]) -> Prompts:
        other = Prompts.__new__(Prompts)
        other.__dict__.update(self.__dict__, texts=(*names, *prompts, ""))
        other._recent = functools.lru_cache(maxsize=4)(other._encode)
        return other

    def arguments(self, labels_B: Tensor | None, x_BX: Tensor) -> dict[str, Any]:
        if labels_B is None:
            labels_B = torch.full((len(x_BX),), self.null(0), device=x_BX.device)
        different, place_B = labels_B.unique(return_inverse=True)
        encoded = self._recent(tuple(different.tolist()), x_BX.device)
        found = {name: value.to(x_BX.dtype)[place_B] for name, value in encoded.items()}
        arguments: dict[str, Any] = {"encoder_hidden_states": found.pop("texts")}
        if "pooled" in found:
            height, width = (self.pipeline.vae_scale_factor * size for size in x_BX.shape[2:])
            sizes_B6 = x_BX.new_tensor([height, width, 0, 0, height, width]).expand(len(x_BX), 6)
            arguments["added_cond_kwargs"] = {"text_embeds": found["pooled"], "time_ids": sizes_B6}
        if "mask" in found:
            arguments |= {"encoder_attention_mask": found["mask"], "added_cond_kwargs": _NO_SIZES}
        return arguments

    @torch.no_grad()
    def _encode(self, numbers: tuple[int, ...], device: torch.device) -> dict[str, Tensor]:
        """``texts`` (n, L, E), with ``pooled`` (n, P) or ``mask`` (n, L) where the network takes them."""
        for encoder in (getattr(self.pipeline, name, None) for name in ENCODERS):
            if encoder is not None:
                encoder.to(device)
        asked = [self.texts[number] for number in numbers]
        found = self.pipeline.encode_prompt(
            asked, device=device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        if self.net_config.get("addition_embed_type") == "text_time":
            encoded = {"texts": found[0], "pooled": found[2]}
            if self.pipeline.config.get("force_zeros_for_empty_prompt"):
                empty = torch.tensor([not text for text in asked], device=device)
                encoded = {
                    name: value.masked_fill(empty.reshape(-1, *[1] * (value.ndim - 1)), 0)
                    for name, value in encoded.items()
                }
            return encoded
        return {"texts": found[0], **({"mask": found[1]} if self.net_config.get("caption_channels") else {})}


_NO_SIZES = {"resolution": None, "aspect_ratio": None}  # PixArt's network asks for the entries, not for values
