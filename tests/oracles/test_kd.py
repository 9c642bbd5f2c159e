"""Knowledge distillation (Hinton et al., 2015) against its limits, and token terms against full logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Cohere2Config,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PretrainedConfig,
    PreTrainedModel,
)

from stillhouse import KLDivergence, Observed, TokenCrossEntropy, TokenMatch
from stillhouse.losses.divergences import ForwardKL, ReverseKL
from stillhouse.models import new_causal_lm
from stillhouse.objectives import LanguageHead, head_of
from stillhouse.systems import get_system
from stillhouse.tasks.language import LanguageTask

V = 23


class Table(nn.Module):
    """A language model whose logits after a token are a row of a table."""

    def __init__(self, logits_VV: Tensor) -> None:
        super().__init__()
        self.embed = nn.Embedding.from_pretrained(logits_VV.clone(), freeze=False)
        self.head = nn.Linear(*logits_VV.shape, bias=False)
        self.head.weight = nn.Parameter(torch.eye(len(logits_VV), dtype=logits_VV.dtype))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def head(model: Observed) -> LanguageHead:
    return LanguageHead(model.tap("head", of="input"), model.parameter("head.weight"))


def table_gradient(z_s: Tensor, z_p: Tensor, **divergence: Any) -> Tensor:
    """Gradient of the token loss on the student's table, one row for each of the first V - 1 tokens."""
    student = Table(z_s)
    term = TokenMatch(head(Observed(student)), head(Observed(Table(z_p), frozen=True)), ForwardKL(**divergence))
    (term({"input_ids": torch.arange(len(z_s))[None]}) * (len(z_s) - 1)).backward()
    return student.embed.weight.grad[:-1]


# -- temperature ----------------------------------------------------------------------------------------------------


def test_at_high_temperature_it_is_logit_matching():
    """Section 2.1 of the paper: T^2 KL has gradient (z_s - z_p) / V for zero-mean logits, up to O(1 / T)."""
    generator = torch.Generator().manual_seed(0)
    z_s, z_p = (torch.randn(7, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    z_s, z_p = (z - z.mean(-1, keepdim=True) for z in (z_s, z_p))
    expected = ((z_s - z_p) / 7)[:-1]
    left = [(table_gradient(z_s, z_p, temperature=t) - expected).norm().item() for t in (1e3, 1e4)]
    assert left[1] < 1e-3 * expected.norm().item()
    assert left[0] / left[1] == pytest.approx(10.0, rel=0.05)
    unscaled = table_gradient(z_s, z_p, temperature=1e4, scale_by_t2=False)
    assert unscaled.norm() < 1e-7 * expected.norm()  # without T^2 the gradient vanishes


def test_at_one_the_gradient_is_the_difference_of_probabilities():
    generator = torch.Generator().manual_seed(1)
    z_s, z_p = (torch.randn(7, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(table_gradient(z_s, z_p), (z_s.softmax(-1) - z_p.softmax(-1))[:-1])
    soft = 3.0 * ((z_s / 3).softmax(-1) - (z_p / 3).softmax(-1))[:-1]
    torch.testing.assert_close(table_gradient(z_s, z_p, temperature=3.0), soft)


def test_the_classifier_s_term_is_the_same():
    torch.manual_seed(0)
    z_s, z_p = torch.randn(5, 7, dtype=torch.float64, requires_grad=True), torch.randn(5, 7, dtype=torch.float64)

    class Fixed(nn.Module):
        def __init__(self, logits: Tensor) -> None:
            super().__init__()
            self.logits = nn.Parameter(logits.detach().clone())

        def forward(self, inputs: Tensor) -> Tensor:
            return self.logits

    student = Fixed(z_s)
    term = KLDivergence(Observed(student).output(), Observed(Fixed(z_p), frozen=True).output(), temperature=4.0)
    loss = term(torch.zeros(5, 1))
    reference = 16 * F.kl_div((z_s / 4).log_softmax(-1), (z_p / 4).softmax(-1), reduction="batchmean")
    torch.testing.assert_close(loss, reference)
    loss.backward()
    reference.backward()
    torch.testing.assert_close(student.logits.grad, z_s.grad)


# -- from hidden states ---------------------------------------------------------------------------------------------

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
CONFIGS: dict[str, tuple[type[PretrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {**SIZES, "num_key_value_heads": 2}),
    "tied": (LlamaConfig, {**SIZES, "num_key_value_heads": 2, "tie_word_embeddings": True}),
    "gpt2": (GPT2Config, {"n_embd": 16, "n_layer": 1, "n_head": 2}),
    "bias": (PhiConfig, SIZES),
    "softcap": (Gemma2Config, {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 3.0}),
    "scale": (Cohere2Config, {**SIZES, "num_key_value_heads": 2, "logit_scale": 0.25, "tie_word_embeddings": True}),
}


def language_model(kind: str, seed: int, **more: Any) -> PreTrainedModel:
    cls, sizes = CONFIGS[kind]
    config = cls(**{"vocab_size": V, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **sizes, **more})
    model = new_causal_lm(config, seed=seed).eval()
    with torch.no_grad():  # distributions worth matching
        head = model.get_output_embeddings()
        head.weight.mul_(20)
        if head.bias is not None:
            head.bias.normal_()
    return model


def batch_of(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    batch = {"input_ids": torch.randint(1, V, (3, 9), generator=generator)}
    if kind != "plain":
        batch["attention_mask"] = torch.ones(3, 9, dtype=torch.long)
        batch["attention_mask"][1, 5:] = 0
    if kind == "loss_mask":
        batch["loss_mask"] = batch["attention_mask"].clone()
        batch["loss_mask"][:, :4] = 0
    return batch


def naive(
    student: nn.Module, teacher: nn.Module, batch: dict[str, Tensor], divergence: Any, alpha: float, size: int = V
) -> Tensor:
    """From the models' own full logits: position t against token t + 1, masked by the mask of token t + 1."""
    fed = {key: value for key, value in batch.items() if key != "loss_mask"}
    z_s = student(**fed).logits[:, :-1, :size]
    with torch.no_grad():
        z_p = teacher(**fed).logits[:, :-1, :size]
    mask = batch.get("loss_mask", batch.get("attention_mask", torch.ones_like(batch["input_ids"])))[:, 1:].bool()
    labels = batch["input_ids"][:, 1:]
    rows = [divergence(z_s[b, t], z_p[b, t]) for b in range(3) for t in range(8) if mask[b, t]]
    label = F.cross_entropy(z_s[mask], labels[mask])
    return alpha * torch.stack(rows).mean() + (1 - alpha) * label


def kl(temperature: float) -> Any:
    def of(z_s: Tensor, z_p: Tensor) -> Tensor:
        log_q, log_p = (z_s / temperature).log_softmax(-1), (z_p / temperature).log_softmax(-1)
        return temperature**2 * (log_p.exp() * (log_p - log_q)).sum()

    return of


def gradients(loss: Tensor, model: nn.Module) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def close(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("mask", ["plain", "attention_mask", "loss_mask"])
@pytest.mark.parametrize("kind", CONFIGS)
def test_token_terms_equal_full_logits(kind, mask):
    """For heads that are tied, biased, capped and scaled; values, and the gradient of every weight."""
    student, teacher = language_model(kind, 0), language_model(kind, 1)
    batch = batch_of(mask)
    expected = naive(student, teacher, batch, kl(2.0), 0.7)
    term = TokenMatch(
        head_of(Observed(student)),
        head_of(Observed(teacher, frozen=True)),
        ForwardKL(temperature=2.0),
        divergence_weight=0.7,
        cross_entropy=0.3,
        chunk_tokens=5,  # several chunks
    )
    wanted = gradients(expected, student)
    loss = term(batch)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=1e-5)
    close(gradients(loss, student), wanted, rtol=1e-3, atol=1e-5)
    assert all(p.grad is None for p in teacher.parameters())
    assert max(gradient.abs().max().item() for gradient in wanted.values()) > 1e-3


def test_models_of_other_widths_and_padded_vocabularies():
    student, teacher = language_model("llama", 0), language_model("llama", 1, vocab_size=V + 9, hidden_size=24)
    batch = batch_of("plain")
    for size in (None, V - 2):
        if size:
            batch["input_ids"] = batch["input_ids"].clamp(max=size - 1)
        heads = head_of(Observed(student)), head_of(Observed(teacher, frozen=True))
        term = TokenMatch(*heads, ForwardKL(), divergence_weight=0.5, cross_entropy=0.5, vocab_size=size)
        expected = naive(student, teacher, batch, kl(1.0), 0.5, size or V)
        torch.testing.assert_close(term(batch), expected, rtol=1e-5, atol=1e-5)


def match(student: nn.Module, teacher: nn.Module, divergence: Any = None, **weights: float) -> TokenMatch:
    heads = head_of(Observed(student)), head_of(Observed(teacher, frozen=True))
    return TokenMatch(*heads, divergence or ForwardKL(), **weights)


@pytest.mark.parametrize("mask", ["plain", "loss_mask"])
def test_alpha_zero_is_supervised_fine_tuning_exactly(mask):
    student, teacher = language_model("llama", 0), language_model("llama", 1)
    batch = batch_of(mask)
    ours = gradients(match(student, teacher, divergence_weight=0.0, cross_entropy=1.0)(batch), student)
    plain = gradients(TokenCrossEntropy(head_of(Observed(student)))(batch), student)
    assert ours.keys() == plain.keys()
    assert all(torch.equal(ours[name], plain[name]) for name in ours)
    fed = {key: value for key, value in batch.items() if key != "loss_mask"}
    kept = batch.get("loss_mask", torch.ones(3, 9))[:, 1:].bool()
    loss = F.cross_entropy(student(**fed).logits[:, :-1][kept], batch["input_ids"][:, 1:][kept])
    close(plain, gradients(loss, student), rtol=1e-3, atol=1e-6)


def test_alpha_one_is_the_divergence_alone():
    student, teacher = language_model("llama", 0), language_model("llama", 1)
    batch = batch_of("plain")
    ours = gradients(match(student, teacher, divergence_weight=1.0, cross_entropy=0.0)(batch), student)
    other = {**batch, "labels": torch.zeros(3, 9)}  # labels of the batch play no part
    again = gradients(match(student, teacher)(other), student)
    assert all(torch.equal(ours[name], again[name]) for name in ours)
    close(ours, gradients(naive(student, teacher, batch, kl(1.0), 1.0), student), rtol=1e-3, atol=1e-6)


def test_the_two_losses_add_up():
    """Gradients are linear in alpha: those of alpha = 0.25 from those of 0 and 1."""
    student, teacher = language_model("llama", 0), language_model("llama", 1)
    batch = batch_of("attention_mask")
    ends = [
        gradients(match(student, teacher, divergence_weight=a, cross_entropy=1 - a)(batch), student)
        for a in (0.0, 1.0, 0.25)
    ]
    mixed = {name: 0.75 * ends[0][name] + 0.25 * ends[1][name] for name in ends[0]}
    close(ends[2], mixed, rtol=1e-4, atol=1e-6)


def test_a_student_that_is_its_teacher_learns_nothing():
    student = language_model("llama", 0)
    teacher = copy.deepcopy(student)
    found = gradients(match(student, teacher, ForwardKL(temperature=3.0))(batch_of("plain")), student)
    assert max(gradient.abs().max().item() for gradient in found.values()) < 1e-6
    reverse = match(student, teacher, ReverseKL())(batch_of("plain"))
    assert reverse.item() == pytest.approx(0.0, abs=1e-6)


def test_a_batch_in_which_nothing_counts():
    student, teacher = language_model("llama", 0), language_model("llama", 1)
    batch = {**batch_of("plain"), "loss_mask": torch.zeros(3, 9)}
    loss = match(student, teacher, cross_entropy=0.5)(batch)
    assert loss.item() == 0.0
    assert all(not gradient.any() for gradient in gradients(loss, student).values())


# -- the system -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "temperature"), [(0.9, 2.0), (0.0, 2.0), (1.0, 5.0)])
def test_the_system_trains_with_this(monkeypatch, alpha, temperature):
    student, teacher = language_model("llama", 0), language_model("llama", 1)

    class Stub:
        vocab_size = V

        def observed_teacher(self) -> Observed:
            return Observed(teacher, frozen=True)

        def train(self, name: str, objective: Any) -> Any:
            return objective(Observed(student))

    def prepare(*_: Any) -> Any:
        return Stub()
        yield

    monkeypatch.setattr(LanguageTask, "prepare", staticmethod(prepare))
    system = get_system("kd").make(teacher="x", data="y", alpha=alpha, temperature=temperature)
    objective = next(system.stages(None))  # type: ignore[arg-type]
    batch = batch_of("loss_mask")
    ours = gradients(objective(batch), student)  # type: ignore[operator]
    close(ours, gradients(naive(student, teacher, batch, kl(temperature), alpha), student), rtol=1e-3, atol=1e-5)
