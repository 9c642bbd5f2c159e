"""Masked autoencoders (ViTMAE) of ``transformers``: load them, make smaller ones, say how many patches they see."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from stillhouse.base.errors import ModelError, one_line, suggest
from stillhouse.models.errors import clear_errors, quiet

if TYPE_CHECKING:
    from transformers import ViTForImageClassification, ViTMAEConfig, ViTMAEForPreTraining

Rounding = Literal["nearest", "truncate"]
SIZES = {"layers": "num_hidden_layers", "heads": "num_attention_heads"}


def load_masked_autoencoder(name: str) -> ViTMAEForPreTraining:
    """Load a ViTMAE with its decoder from a directory or the hub, from safetensors only, in float32.

    Raises:
        ModelError: one line that says what is wrong, where, and what to do.
    """
    from transformers import ViTMAEForPreTraining

    path = Path(name).expanduser()
    with clear_errors(name):
        model, report = ViTMAEForPreTraining.from_pretrained(
            path if path.is_dir() else name, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(
            f"{name}: not a whole masked autoencoder: {len(missing)} tensors are missing (first: {missing[0]}); give a "
            "directory of ViTMAEForPreTraining"
        )
    return model.eval()


def new_masked_autoencoder(config: ViTMAEConfig, *, seed: int) -> ViTMAEForPreTraining:
    """A ViTMAE with random weights, fixed by ``seed``; no global random state moves."""
    from transformers import ViTMAEForPreTraining

    with torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(seed)
        model = ViTMAEForPreTraining(copy.deepcopy(config)).eval()
        _as_published(model)
    return model


@torch.no_grad()
def _as_published(model: Any) -> None:
    """Fixed sine-cosine positions and Xavier-uniform matrices, as MAE begins with.

    ``transformers`` 5 leaves the position tables of a new model at zero: such a model cannot learn where a patch is.
    """
    side = math.isqrt(patches(model.config))
    tables = (model.vit.embeddings.position_embeddings, model.decoder.decoder_pos_embed)
    for table in tables:
        table[0, 1:] = sine_cosine(side, table.shape[-1])
    for layer in model.modules():
        if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d):
            torch.nn.init.xavier_uniform_(layer.weight.view(layer.weight.shape[0], -1))
    for token in (model.vit.embeddings.cls_token, model.decoder.mask_token):
        torch.nn.init.normal_(token, std=0.02)


def sine_cosine(side: int, width: int) -> torch.Tensor:
    """Fixed positions of a square of patches, row by row, (side * side, width): a quarter each of sin and cos of the
    column, then of the row, at frequencies 10000^(-i / (width / 4)); the order that MAE's released weights have.
    """
    frequencies = 10_000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angles = [place.flatten()[:, None] * frequencies for place in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], 1).float()


def masked_autoencoder_from_spec(spec: str, config: ViTMAEConfig) -> ViTMAEConfig:
    """The config that a line such as ``hidden_size=768,layers=12,heads=12`` makes of ``config``.

    Any whole number of the config can be set; where ``intermediate_size`` is not, it keeps its proportion to the width.
    The decoder stays as it is. Raises `ModelError` naming the part of the line that is wrong.
    """
    raw = config.to_dict()
    known = {name for name, value in raw.items() if isinstance(value, int) and not isinstance(value, bool)}
    sizes: dict[str, int] = {}
    for part in spec.replace(" ", "").split(","):
        name, _, value = part.partition("=")
        name = SIZES.get(name, name)
        if name not in known or not value.isdigit() or int(value) < 1:
            raise ModelError(f"student {spec!r}: {part!r}: write NAME=NUMBER{suggest(name, {*known, *SIZES} - {''})}")
        sizes[name] = int(value)
    if "hidden_size" in sizes:
        wide = raw["intermediate_size"] * sizes["hidden_size"] // raw["hidden_size"]
        sizes.setdefault("intermediate_size", max(1, wide))
    made = type(config).from_dict(raw | sizes)
    if made.hidden_size % made.num_attention_heads or made.hidden_size % 4:
        raise ModelError(
            f"student {spec!r}: hidden_size={made.hidden_size} must be a multiple of 4 and of "
            f"{made.num_attention_heads} heads"
        )
    try:
        with quiet(), torch.device("meta"):
            from transformers import ViTMAEModel

            ViTMAEModel(made)
    except Exception as error:
        raise ModelError(f"student {spec!r}: cannot be built ({one_line(error)}); change its sizes") from error
    return made


def patches(config: ViTMAEConfig) -> int:
    """Patches of an image."""
    return int((config.image_size // config.patch_size) ** 2)


def visible_patches(count: int, mask_ratio: float, rounding: Rounding = "nearest") -> int:
    """How many of ``count`` patches stay visible; at least one.

    ``nearest`` rounds count * (1 - mask_ratio) to the nearest whole number (halves up), as the numbers of patches that
    papers report do: 95 % and 98 % of 196 leave 10 and 4. ``truncate`` drops the fraction, as the released code of MAE
    and ``transformers`` do: 9 and 3.
    """
    share = count * (1 - mask_ratio) + (0.5 if rounding == "nearest" else 0.0)
    return max(1, math.floor(share + 1e-9))


def set_visible(model: Any, count: int) -> None:
    """Let a ViTMAE keep ``count`` patches of an image: exactly, whatever its own rounding."""
    whole = patches(model.config)
    # transformers keeps int(whole * (1 - ratio)): the middle between two steps is safe from rounding errors.
    ratio = 1 - (count + 0.5) / whole if count < whole else 0.0
    for module in model.modules():
        if hasattr(module, "config"):
            module.config.mask_ratio = ratio


def classifier_of(model: ViTMAEForPreTraining, classes: tuple[str, ...], *, seed: int) -> ViTForImageClassification:
    """A ViT classifier that begins with the encoder of a masked autoencoder; its head is new, fixed by ``seed``."""
    from transformers import ViTConfig, ViTForImageClassification

    raw = ViTConfig().to_dict()
    raw |= {name: value for name, value in model.config.to_dict().items() if name in raw and name != "model_type"}
    raw |= {"id2label": dict(enumerate(classes)), "label2id": {name: i for i, name in enumerate(classes)}}
    raw |= {"architectures": None}
    raw.pop("num_labels", None)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.default_generator.manual_seed(seed)
        made = ViTForImageClassification(ViTConfig.from_dict(raw))
    made.vit.load_state_dict(model.vit.state_dict())
    return made.eval()
