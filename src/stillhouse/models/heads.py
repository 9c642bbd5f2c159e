"""How a causal language model turns hidden states into logits. Suffixes: ``B`` batch, ``T`` time, ``V`` vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from stillhouse.base.errors import ModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


class OutputHead(NamedTuple):
    """How a model turns what enters its head into logits.

    ``logits_BTV = cap(head(x) * logit_scale)``, with ``cap(z) = softcap * tanh(z / softcap)`` if there is one.
    ``path`` is the dotted path of the head in the model.
    """

    path: str
    softcap: float | None
    logit_scale: float


def output_head(model: PreTrainedModel) -> OutputHead:
    """Find the module that computes the logits, and what happens to them after it.

    Raises:
        ModelError: the model has no such module.
    """
    head = model.get_output_embeddings()
    path = next((name for name, module in model.named_modules(remove_duplicate=False) if module is head), None)
    if head is None or path is None:
        raise ModelError(
            f"{type(model).__name__} has no output head; use a causal language model, which has one (lm_head)"
        )
    config = model.config.get_text_config(decoder=True)
    caps = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
    softcap = next((float(value) for name in caps if (value := getattr(config, name, None))), None)
    return OutputHead(path, softcap, _logit_scale(config))


def _logit_scale(config: PretrainedConfig) -> float:
    """What logits are multiplied by: Cohere multiplies, Granite divides."""
    kind = config.model_type
    if kind.startswith("cohere"):
        return float(config.logit_scale if config.logit_scale is not None else 1.0)
    if kind.startswith("granite") and getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    if kind.startswith("hyperclovax"):
        return float(config.logits_scaling)
    if kind == "falcon_h1":
        return float(config.lm_head_multiplier)
    return 1.0


@torch.no_grad()
def check_output_head(model: PreTrainedModel, head: OutputHead) -> None:
    """Make sure that ``head`` reproduces the model's own logits, on a few tokens.

    Raises:
        ModelError: it does not, so this architecture does something to its logits that is not known here.
    """
    seen: list[torch.Tensor] = []
    hook = model.get_submodule(head.path).register_forward_hook(lambda module, args, output: seen.append(output))
    was_training = model.training
    try:
        ids_BT = torch.arange(4, device=model.get_input_embeddings().weight.device)[None]
        logits_BTV = model.eval()(input_ids=ids_BT).logits.float()
    finally:
        hook.remove()
        model.train(was_training)
    ours_BTV = seen[-1].float() * head.logit_scale if seen else torch.zeros(())
    if head.softcap is not None:
        ours_BTV = head.softcap * torch.tanh(ours_BTV / head.softcap)
    if ours_BTV.shape != logits_BTV.shape or not torch.allclose(ours_BTV, logits_BTV, rtol=2e-2, atol=2e-2):
        raise ModelError(
            f"{type(model).__name__}: its logits are not those of {head.path} with scale {head.logit_scale} and "
            f"softcap {head.softcap}; use a loss that reads the model's logits themselves"
        )
