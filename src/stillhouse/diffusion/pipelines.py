"""Denoisers as ``diffusers`` directories: read from any pipeline with a U-Net and a scheduler, written as one.

What is written loads with ``DiffusionPipeline.from_pretrained``, as a `ConsistencyModelPipeline`: the one in
``diffusers`` that samples with any scheduler, in any number of steps, with or without classes. A network that came out
of a pipeline with more in it (text encoders, an autoencoder) is written in that pipeline.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stillhouse.base.errors import ModelError, near, one_line
from stillhouse.diffusion.conditions import Classes, Conditions, Prompts
from stillhouse.diffusion.denoiser import Denoiser, Home
from stillhouse.diffusion.parameterisations import EDM, Epsilon, FlowVelocity, Parameterisation, Sample, V
from stillhouse.diffusion.processes import DiscreteVP, Karras, Process, RectifiedFlow
from stillhouse.diffusion.spaces import Latents

PREDICTIONS: dict[str, Parameterisation] = {"epsilon": Epsilon(), "sample": Sample(), "v_prediction": V()}


def load_denoiser(name: str, *, like: Denoiser | None = None) -> Denoiser:
    """A denoiser from a ``diffusers`` directory or hub id: a pipeline with ``unet`` and ``scheduler``.

    Args:
        like: one whose conditions, space and home it gets: it was a copy of that one.

    Raises:
        ModelError: one line that says what is wrong, where, and what to do.
    """
    from diffusers import DiffusionPipeline

    path = Path(name).expanduser()
    if path.is_dir() and not (path / "model_index.json").is_file():
        raise ModelError(
            f"{name}: no model_index.json in it, so no diffusers pipeline; give a directory that a pipeline's "
            "save_pretrained wrote, with its network and its scheduler"
        )
    try:
        with _quiet():
            pipeline = DiffusionPipeline.from_pretrained(str(path) if path.is_dir() else name, use_safetensors=True)
    except Exception as error:
        raise ModelError(
            f"{name}: cannot be loaded as a diffusers pipeline ({one_line(error)}){near(path) or '; check its files'}"
        ) from error
    place = next((one for one in ("unet", "transformer") if getattr(pipeline, one, None) is not None), None)
    if place is None or getattr(pipeline, "scheduler", None) is None:
        raise ModelError(
            f"{name}: its {type(pipeline).__name__} has no unet and scheduler; use a pipeline that has both"
        )
    net = getattr(pipeline, place)
    vae = getattr(pipeline, "vae", None)
    process, parameterisation = read_scheduler(pipeline.scheduler, name=name)
    if like is not None:
        return Denoiser(net.float(), process, parameterisation, **like.surroundings()).eval()
    conditions = _conditions(pipeline, net, name)
    own = vae is not None or isinstance(conditions, Prompts)
    return Denoiser(
        net.float(),
        process,
        parameterisation,
        conditions=conditions,
        space=None if vae is None else Latents(vae),
        home=Home(pipeline, place) if own else None,
    ).eval()


def _conditions(pipeline: Any, net: Any, name: str) -> Conditions:
    """What the network of a pipeline is conditioned on."""
    config = net.config
    if config.get("cross_attention_dim") is None:
        rows = config.get("num_embeds_ada_norm") if type(net).__name__.startswith("DiT") else None
        return Classes(config.get("num_class_embeds") or (0 if rows is None else rows + 1))
    extra = config.get("addition_embed_type")
    known = type(net).__name__ in ("UNet2DConditionModel", "PixArtTransformer2DModel") and extra in (None, "text_time")
    if not known or not hasattr(pipeline, "encode_prompt") or getattr(pipeline, "tokenizer", None) is None:
        raise ModelError(
            f"{name}: its {type(pipeline).__name__} is conditioned in a way that is not understood; use one without a "
            "condition, with classes, or with text as in Stable Diffusion, Stable Diffusion XL or PixArt"
        )
    return Prompts(pipeline, net)


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars and no warnings of diffusers: what matters in them becomes an error here."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()


def read_scheduler(scheduler: Any, *, name: str = "scheduler") -> tuple[Process, Parameterisation]:
    """The noise process and the prediction that a ``diffusers`` scheduler is made for.

    Raises:
        ModelError: the scheduler is of a kind that has none of them.
    """
    config, kind = scheduler.config, type(scheduler).__name__
    if kind.startswith("FlowMatch"):
        return RectifiedFlow(shift=config.get("shift") or 1.0, noise_scale=config.num_train_timesteps), FlowVelocity()
    if kind.startswith("EDM") or kind.startswith("CMStochastic"):
        scale = 1000.0 if kind.startswith("CMStochastic") else 1.0
        levels = {key: config[key] for key in ("sigma_min", "sigma_max", "rho") if key in config}
        return Karras(**levels, noise_scale=scale), EDM(sigma_data=config.sigma_data)
    prediction = config.get("prediction_type", "epsilon")
    if not hasattr(scheduler, "alphas_cumprod") or prediction not in PREDICTIONS:
        raise ModelError(
            f"{name}: its scheduler {kind} (prediction_type={prediction!r}) is not understood; save the pipeline with "
            "a DDPMScheduler, an EDMEulerScheduler or a FlowMatchEulerDiscreteScheduler of the same settings"
        )
    return DiscreteVP(scheduler.alphas_cumprod), PREDICTIONS[prediction]


def write_scheduler(denoiser: Denoiser, *, times: Sequence[float] | None = None) -> Any:
    """A ``diffusers`` scheduler for a denoiser; with ``times``, for a few-step generator that was trained on them.

    A few-step generator needs a scheduler that adds fresh noise between steps: `LCMScheduler` for a discrete process,
    `CMStochasticIterativeScheduler` for the networks of consistency models. For others ``diffusers`` has none, and the
    usual one is written: right for one step, without fresh noise for more. A flow's pipeline loads with ``diffusers``,
    but is sampled here (`stillhouse.diffusion.samplers`): its scheduler lacks what that pipeline asks of one.
    """
    from diffusers import (
        CMStochasticIterativeScheduler,
        DDPMScheduler,
        EDMEulerScheduler,
        FlowMatchEulerDiscreteScheduler,
        LCMScheduler,
    )

    process, predicts = denoiser.process, denoiser.parameterisation
    if isinstance(process, RectifiedFlow):
        return FlowMatchEulerDiscreteScheduler(num_train_timesteps=round(process.noise_scale), shift=process.shift)
    if isinstance(process, Karras):
        assert isinstance(predicts, EDM)
        levels = {"sigma_min": process.sigma_min, "sigma_max": process.sigma_max, "rho": process.rho}
        if process.noise_scale == 1.0:
            return EDMEulerScheduler(**levels, sigma_data=predicts.sigma_data)
        return CMStochasticIterativeScheduler(
            **levels, sigma_data=predicts.sigma_data, num_train_timesteps=len(times or range(39)) + 1
        )
    assert isinstance(process, DiscreteVP)
    common: dict[str, Any] = {
        "num_train_timesteps": process.steps,
        "trained_betas": process.betas.tolist(),
        "prediction_type": next(name for name, known in PREDICTIONS.items() if known == predicts),
        "clip_sample": False,
    }
    if times is None:
        return DDPMScheduler(**common)
    return LCMScheduler(**common, original_inference_steps=len(times))


def save_pipeline(denoiser: Denoiser, folder: Path, *, times: Sequence[float] | None = None) -> None:
    """Write a denoiser (with ``times``: a few-step generator) as a pipeline; ``few_step.json`` holds the times."""
    from diffusers import ConsistencyModelPipeline

    scheduler = write_scheduler(denoiser, times=times)
    with _quiet():
        if denoiser.home is None:
            pipeline = ConsistencyModelPipeline(unet=denoiser.net, scheduler=scheduler)
        else:
            pipeline = copy.copy(denoiser.home.pipeline)
            pipeline.register_modules(**{denoiser.home.place: denoiser.net, "scheduler": scheduler})
        pipeline.save_pretrained(folder)
    if times is not None:
        (folder / "few_step.json").write_text(json.dumps({"times": list(times)}), encoding="utf-8")
