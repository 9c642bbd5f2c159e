"""Elastic BERT and RoBERTa encoders: one set of weights that holds many sub-networks, each a slice of it.

A sub-network takes the first heads of every attention, the first hidden and feed-forward units everywhere, and a
subset of the layers. `ElasticBert.active` switches to one for the time of a ``with`` block, and is made for
``student.view(name, around=...)``; `extract` cuts one out as a model of its own.

The size of one attention head stays the super-network's (as in AutoDistil, Xu et al., 2022, arXiv 2201.12507), so the
width of attention is independent of the hidden width. A plain ``BertModel`` only knows the case where the two agree;
other sub-networks become a *slim* BERT, a subclass with its own model type, which `load_encoder` reads back. RoBERTa's
layers are BERT's, so all of this holds for it too.

Suffixes: B sequences, T tokens, H hidden width.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.models.errors import clear_errors

if TYPE_CHECKING:
    from transformers import BertConfig, BertModel, RobertaModel

SLIM = "stillhouse-slim-"
FAMILIES = {"bert": "Bert", "roberta": "Roberta"}
RELATED = ("query", "key", "value")


@dataclass(frozen=True)
class SubNetwork:
    """One point of the search space: layers, heads, hidden width, and feed-forward width as a multiple of that."""

    layers: int
    heads: int
    hidden: int
    ratio: float

    @property
    def intermediate(self) -> int:
        return int(self.ratio * self.hidden)

    def __str__(self) -> str:
        return f"{self.layers}/{self.heads}/{self.hidden}/{self.ratio:g}"

    @staticmethod
    def parse(text: str) -> SubNetwork:
        """From ``layers/heads/hidden/ratio``, such as ``11/8/352/4``."""
        try:
            layers, heads, hidden, ratio = text.split("/")
            return SubNetwork(int(layers), int(heads), int(hidden), float(ratio))
        except ValueError as error:
            raise ConfigError(f"{text!r}: write layers/heads/hidden/ratio, such as 11/8/352/4") from error


def whole(config: BertConfig) -> SubNetwork:
    """The sub-network that is all of a BERT."""
    ratio = config.intermediate_size / config.hidden_size
    return SubNetwork(config.num_hidden_layers, config.num_attention_heads, config.hidden_size, ratio)


def head_size(config: BertConfig) -> int:
    """Width of one attention head; a slim BERT says it, in a plain one it follows."""
    return getattr(config, "attention_head_size", None) or config.hidden_size // config.num_attention_heads


def chosen_layers(count: int, of: int) -> list[int]:
    """Which layers a sub-network of ``count`` takes: floor(i / d) for i = 0 ... count - 1, with d = count / of."""
    return [index * of // count for index in range(count)]


def parameter_count(sub: SubNetwork, config: BertConfig) -> int:
    """Parameters of a sub-network of a BERT with ``config``, embeddings in, pooler and heads of tasks left out."""
    H, inner, A = sub.hidden, sub.intermediate, sub.heads * head_size(config)
    embeddings = H * (config.vocab_size + config.max_position_embeddings + config.type_vocab_size + 2)
    attention = 4 * H * A + 3 * A + H + 2 * H
    feed_forward = 2 * H * inner + inner + H + 2 * H
    return embeddings + sub.layers * (attention + feed_forward)


def flops(sub: SubNetwork, config: BertConfig, *, length: int) -> int:
    """Multiplications and additions of one sequence of ``length`` tokens in the layers of a sub-network."""
    H, inner, A = sub.hidden, sub.intermediate, sub.heads * head_size(config)
    return 2 * length * sub.layers * (4 * H * A + 2 * length * A + 2 * H * inner)


# Sliced layers: they hold the parameters of the layer they stand for, under the same names


class SlicedLinear(nn.Linear):
    """A linear layer of which the first ``active`` outputs exist, and as many inputs as it is given."""

    active: int | None = None

    def forward(self, input: Tensor) -> Tensor:
        rows = self.active or self.out_features
        bias = None if self.bias is None else self.bias[:rows]
        return F.linear(input, self.weight[:rows, : input.shape[-1]], bias)


class SlicedNorm(nn.LayerNorm):
    """A layer norm over as many channels as it is given."""

    def forward(self, input: Tensor) -> Tensor:
        width = input.shape[-1]
        return F.layer_norm(input, (width,), self.weight[:width], self.bias[:width], self.eps)


class SlicedEmbedding(nn.Embedding):
    """An embedding of which the first ``active`` channels exist."""

    active: int | None = None

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.weight[:, : self.active], self.padding_idx)


def _sliced(module: nn.Module) -> nn.Module | None:
    new: Any
    if isinstance(module, nn.Linear):
        new = SlicedLinear(module.in_features, module.out_features, bias=module.bias is not None, device="meta")
    elif isinstance(module, nn.LayerNorm):
        new = SlicedNorm(module.normalized_shape, eps=module.eps, device="meta")
    elif isinstance(module, nn.Embedding):
        new = SlicedEmbedding(
            module.num_embeddings, module.embedding_dim, padding_idx=module.padding_idx, device="meta"
        )
    else:
        return None
    for name, parameter in module.named_parameters(recurse=False):
        setattr(new, name, parameter)
    return new


def check_elastic(kind: str) -> None:
    """Raise `ModelError` if an encoder of model type ``kind`` cannot be made a super-network."""
    if kind.startswith(SLIM):
        raise ModelError("super-networks are made of a BERT or RoBERTa; this one has been slimmed already")
    if kind not in FAMILIES:
        raise ModelError(f"a {kind} encoder cannot be made a super-network; give a BERT or RoBERTa")


class ElasticBert(nn.Module):
    """A ``BertModel`` or ``RobertaModel`` as a super-network. Called like it, it gives what relations are made of.

    The output is a mapping: ``query``, ``key`` and ``value`` of the last active layer (B, T, width of attention), and
    the last ``hidden`` states (B, T, H). Without `active` it is the whole model.

    Args:
        model: the encoder; its layers are replaced by sliced ones that hold the same parameters.

    Raises:
        ModelError: another encoder, or one that has been slimmed already.
    """

    def __init__(self, model: BertModel | RobertaModel) -> None:
        super().__init__()
        check_elastic(model.config.model_type)
        self.model = model
        self.config = model.config
        for path, module in list(model.named_modules()):
            new = _sliced(module)
            if new is not None:
                model.set_submodule(path, new)

    def check(self, sub: SubNetwork) -> None:
        """Raise `ModelError` if ``sub`` is larger than this model in any way."""
        largest = whole(self.config)
        pairs = {
            "layers": (sub.layers, largest.layers),
            "heads": (sub.heads, largest.heads),
            "hidden": (sub.hidden, largest.hidden),
            "feed-forward units": (sub.intermediate, self.config.intermediate_size),
        }
        for what, (asked, most) in pairs.items():
            if not 1 <= asked <= most:
                raise ModelError(f"sub-network {sub}: {asked} {what}, but the super-network has {most}")

    @contextmanager
    def active(self, sub: SubNetwork) -> Iterator[None]:
        """Be the sub-network ``sub`` for a while."""
        self.check(sub)
        encoder: Any = self.model.encoder
        layers = encoder.layer
        for module, width in self._widths(sub):
            module.active = width
        encoder.layer = nn.ModuleList(layers[index] for index in chosen_layers(sub.layers, len(layers)))
        try:
            yield
        finally:
            encoder.layer = layers
            for module, _ in self._widths(sub):
                module.active = None

    def _widths(self, sub: SubNetwork) -> Iterator[tuple[Any, int]]:
        embeddings: Any = self.model.embeddings
        for embedding in (embeddings.word_embeddings, embeddings.position_embeddings, embeddings.token_type_embeddings):
            yield embedding, sub.hidden
        for layer in self.model.encoder.layer:
            for name in RELATED:
                yield getattr(layer.attention.self, name), sub.heads * head_size(self.config)
            yield layer.attention.output.dense, sub.hidden
            yield layer.intermediate.dense, sub.intermediate
            yield layer.output.dense, sub.hidden

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, token_type_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        last = self.model.encoder.layer[-1].attention.self
        hooks = [
            getattr(last, name).register_forward_hook(
                lambda _module, _args, output, name=name: found.__setitem__(name, output)
            )
            for name in RELATED
        ]
        try:
            output = self.model(input_ids, attention_mask=attention_mask, token_type_ids=token_type_ids)
        finally:
            for hook in hooks:
                hook.remove()
        return {**found, "hidden": output.last_hidden_state}


def extract(elastic: ElasticBert, sub: SubNetwork) -> BertModel | RobertaModel:
    """The sub-network ``sub`` as a model of its own, with copies of its slices; slim only where it must be."""
    elastic.check(sub)
    config = copy.deepcopy(elastic.config)
    config.num_hidden_layers, config.num_attention_heads = sub.layers, sub.heads
    config.hidden_size, config.intermediate_size = sub.hidden, sub.intermediate
    size = head_size(elastic.config)
    if sub.heads * size == sub.hidden:
        model: Any = type(elastic.model)(config, add_pooling_layer=False)
    else:
        config_class, model_class = slim_classes(config.model_type)
        raw = {key: value for key, value in config.to_dict().items() if key not in ("model_type", "architectures")}
        slim = config_class.from_dict({**raw, "attention_head_size": size})
        model = model_class(slim, add_pooling_layer=False)
    source = elastic.model.state_dict()
    taken = chosen_layers(sub.layers, len(elastic.model.encoder.layer))
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            parts = name.split(".")
            if parts[:2] == ["encoder", "layer"]:
                parts[2] = str(taken[int(parts[2])])
            wider = source[".".join(parts)]
            tensor.copy_(wider[tuple(slice(size) for size in tensor.shape)])
    return model.eval()


# Slim BERT and RoBERTa: a width of attention of their own


@functools.cache
def slim_classes(kind: str) -> tuple[Any, Any]:
    """Config and encoder of a slim ``"bert"`` or ``"roberta"``, known to the Auto classes from now on.

    Its masked language model and its classifier of sequences are known to them too.
    """
    import transformers

    base_config: Any = getattr(transformers, f"{FAMILIES[kind]}Config")

    class Config(base_config):
        model_type = SLIM + kind

    Config.__name__ = Config.__qualname__ = f"Slim{FAMILIES[kind]}Config"
    transformers.AutoConfig.register(Config.model_type, Config)
    heads = {
        "Model": transformers.AutoModel,
        "ForMaskedLM": transformers.AutoModelForMaskedLM,
        "ForSequenceClassification": transformers.AutoModelForSequenceClassification,
    }
    made = {head: _slim(getattr(transformers, FAMILIES[kind] + head), Config) for head in heads}
    for head, auto in heads.items():
        auto.register(Config, made[head])
    return Config, made["Model"]


def _slim(base: Any, config_type: Any) -> Any:
    class Model(base):
        config_class = config_type

        def __init__(self, config: Any, **options: Any) -> None:
            with _one_head(config):
                super().__init__(config, **options)
            _set_attention_width(self.base_model, config)

    Model.__name__ = Model.__qualname__ = f"Slim{base.__name__}"
    return Model


@contextmanager
def _one_head(config: Any) -> Iterator[None]:
    """BERT insists that its heads divide its width; one head always does."""
    heads, config.num_attention_heads = config.num_attention_heads, 1
    try:
        yield
    finally:
        config.num_attention_heads = heads


def _set_attention_width(encoder: Any, config: Any) -> None:
    heads, size = config.num_attention_heads, config.attention_head_size
    for layer in encoder.encoder.layer:
        attention = layer.attention.self
        attention.num_attention_heads, attention.attention_head_size = heads, size
        attention.all_head_size, attention.scaling = heads * size, size**-0.5
        for name in RELATED:
            setattr(attention, name, nn.Linear(config.hidden_size, heads * size))
        layer.attention.output.dense = nn.Linear(heads * size, config.hidden_size)


def load_encoder(folder: str | Path, *, masked_lm: bool = False) -> Any:
    """A BERT or RoBERTa, slim or not, from a directory or the hub: the encoder, or the masked language model.

    It is in eval mode. A masked language model of which only the encoder was saved gets a new head.

    Raises:
        ModelError: it cannot be loaded, or is another model.
    """
    from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM

    _know_slim()
    with clear_errors(str(folder)):
        kind = AutoConfig.from_pretrained(str(folder)).model_type
    if kind.removeprefix(SLIM) not in FAMILIES:
        raise ModelError(f"{folder}: a {kind} model; give a BERT or RoBERTa encoder")
    auto: Any = AutoModelForMaskedLM if masked_lm else AutoModel
    options = {} if masked_lm else {"add_pooling_layer": False}
    with clear_errors(str(folder)):
        model = auto.from_pretrained(str(folder), use_safetensors=True, dtype=torch.float32, **options)
    return model.eval()


def load_encoder_classifier(folder: str | Path) -> Any:
    """A classifier on an encoder as `load_encoder` loads it: from a directory, in eval mode."""
    from transformers import AutoModelForSequenceClassification

    _know_slim()
    with clear_errors(str(folder)):
        model = AutoModelForSequenceClassification.from_pretrained(
            str(folder), use_safetensors=True, dtype=torch.float32
        )
    return model.eval()


def _know_slim() -> None:
    for kind in FAMILIES:
        slim_classes(kind)
