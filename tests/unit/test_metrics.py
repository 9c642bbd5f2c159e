"""Figures of language models against the naive computation, and calibration against a loop."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from stillhouse.metrics import LanguageFigures, Reliability, compare_causal_lms, tokens_per_second
from stillhouse.metrics import language as language_metrics

VOCABULARY = 29


def brute_ece(confidence: list[float], correct: list[bool], bins: int) -> float:
    total = 0.0
    for index in range(bins):
        inside = [
            (c, hit)
            for c, hit in zip(confidence, correct, strict=True)
            if index / bins <= c < (index + 1) / bins or (index == bins - 1 and c == 1.0)
        ]
        if inside:
            mean = sum(c for c, _ in inside) / len(inside)
            accuracy = sum(hit for _, hit in inside) / len(inside)
            total += len(inside) / len(confidence) * abs(mean - accuracy)
    return total


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    gemma = Gemma2Config(vocab_size=32, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, **sizes)
    found = {
        "llama": LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_key_value_heads=2, **sizes)),
        "gpt2": GPT2LMHeadModel(
            GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
        ),
        "gemma": Gemma2ForCausalLM(gemma),  # a capped head, and a padded vocabulary
    }
    for model in found.values():
        model.eval()
        with torch.no_grad():  # far from uniform
            model.get_output_embeddings().weight.mul_(30)
    found["near"] = copy.deepcopy(found["llama"])
    with torch.no_grad():
        weight = found["near"].get_output_embeddings().weight
        weight.add_(0.5 * torch.randn_like(weight))
    return found


def data(kind: str) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    batches = []
    for rows in (3, 2):
        ids = torch.randint(0, VOCABULARY, (rows, 9), generator=generator)
        batch = {"input_ids": ids}
        if kind != "plain":
            batch["attention_mask"] = torch.ones_like(ids)
            batch["attention_mask"][0, 6:] = 0
        if kind == "loss_mask":
            batch["loss_mask"] = (torch.rand(rows, 9, generator=generator) < 0.5).long() * batch["attention_mask"]
        batches.append(batch)
    return batches


@torch.no_grad()
def naive(model: nn.Module, reference: nn.Module, batches: list[dict[str, Tensor]]) -> dict[str, float]:
    """Token by token, from the models' own logits."""
    sums = dict.fromkeys(["nats", "kl", "hits", "agreements", "tokens"], 0.0)
    confidence, correct = [], []
    for batch in batches:
        fed = {key: value for key, value in batch.items() if key != "loss_mask"}
        own, other = (m(**fed).logits[..., :VOCABULARY].double().log_softmax(-1) for m in (model, reference))
        mask = batch.get("loss_mask", batch.get("attention_mask", torch.ones_like(batch["input_ids"])))
        rows, length = batch["input_ids"].shape
        for row in range(rows):
            for place in range(length - 1):
                if not mask[row, place + 1]:
                    continue
                label = int(batch["input_ids"][row, place + 1])
                q, p = own[row, place], other[row, place]
                sums["tokens"] += 1
                sums["nats"] -= float(q[label])
                sums["kl"] += float((p.exp() * (p - q)).sum())
                sums["hits"] += float(q.argmax() == label)
                sums["agreements"] += float(q.argmax() == p.argmax())
                confidence.append(float(q.exp().max()))
                correct.append(bool(q.argmax() == label))
    return {**sums, "ece": brute_ece(confidence, correct, 15)}


@pytest.mark.parametrize("kind", ["plain", "attention_mask", "loss_mask"])
@pytest.mark.parametrize("chunk", [None, 3])
def test_figures_against_the_naive_computation(models, kind, chunk, monkeypatch):
    if chunk:
        monkeypatch.setattr(language_metrics, "CHUNK_LOGITS", chunk * VOCABULARY)
    batches = data(kind)
    found = compare_causal_lms(models, batches, vocab_size=VOCABULARY, reference="llama")
    for name, figures in found.items():
        expected = naive(models[name], models["llama"], batches)
        n = expected["tokens"]
        assert figures.tokens == n < sum(batch["input_ids"][:, 1:].numel() for batch in batches) + (kind == "plain")
        assert figures.loss == pytest.approx(expected["nats"] / n, rel=1e-5)
        assert figures.perplexity == pytest.approx(math.exp(expected["nats"] / n), rel=1e-4)
        assert figures.kl == pytest.approx(expected["kl"] / n, rel=1e-4, abs=1e-6)
        assert figures.accuracy == pytest.approx(expected["hits"] / n)
        assert figures.agreement == pytest.approx(expected["agreements"] / n)
        assert figures.reliability.ece == pytest.approx(expected["ece"], abs=1e-6)
    assert found["llama"].kl == pytest.approx(0.0, abs=1e-7) and found["llama"].agreement == 1.0
    assert 0 < found["near"].agreement < 1 and found["near"].kl > 0.01  # the comparison had something to compare


def test_models_are_left_as_they_were(models):
    before = {name: [(m.training, len(m._forward_hooks)) for m in model.modules()] for name, model in models.items()}
    grads = {name: [p.requires_grad for p in model.parameters()] for name, model in models.items()}
    compare_causal_lms(models, data("plain"), vocab_size=VOCABULARY)
    for name, model in models.items():
        assert [(m.training, len(m._forward_hooks)) for m in model.modules()] == before[name]
        assert [p.requires_grad for p in model.parameters()] == grads[name]
        assert all(p.grad is None for p in model.parameters())


def test_without_a_reference_nothing_is_compared(models):
    figures = compare_causal_lms({"llama": models["llama"]}, data("plain"), vocab_size=VOCABULARY)["llama"]
    assert figures.tokens and figures.agreements == 0 and figures.kl_nats == 0


def test_no_batches():
    figures = LanguageFigures()
    assert (figures.loss, figures.perplexity, figures.agreement, figures.kl, figures.reliability.ece) == (0, 1, 0, 0, 0)


def test_a_batch_in_which_nothing_counts(models):
    batch = {**data("plain")[0], "loss_mask": torch.zeros(3, 9)}
    batch["attention_mask"] = torch.ones(3, 9)
    assert compare_causal_lms(models, [batch], vocab_size=VOCABULARY, reference="gpt2")["llama"].tokens == 0


def test_bits_per_byte():
    """A model that knows nothing about 256 equally likely bytes needs 8 bits for each."""
    assert LanguageFigures(nats=10 * math.log(256), tokens=10).bits_per_byte(1.0) == pytest.approx(8.0)
    assert LanguageFigures(nats=10 * math.log(256), tokens=10).bits_per_byte(4.0) == pytest.approx(2.0)
    assert LanguageFigures(nats=1e9, tokens=1).perplexity < math.inf


@given(
    pairs=st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=60),
    bins=st.integers(1, 20),
    cut=st.integers(0, 60),
)
@settings(deadline=None)
def test_calibration_error_against_a_loop(pairs, bins, cut):
    edges = [abs(c * bins - round(c * bins)) for c, _ in pairs]
    pairs = [pair for pair, edge in zip(pairs, edges, strict=True) if edge > 1e-9 or pair[0] in (0.0, 1.0)] or [
        (0.4, True)
    ]
    reliability = Reliability(bins)
    for part in (pairs[:cut], pairs[cut:]):
        confidence, correct = (
            torch.tensor([c for c, _ in part], dtype=torch.float64),
            torch.tensor([h for _, h in part]),
        )
        reliability.add(confidence, correct.bool())
    confidences, hits = [c for c, _ in pairs], [h for _, h in pairs]
    assert reliability.ece == pytest.approx(brute_ece(confidences, hits, bins), abs=1e-9)
    found = reliability.to_json()
    assert sum(one["count"] for one in found["bins"]) == len(pairs)
    assert sum(one["accuracy"] * one["count"] for one in found["bins"]) == pytest.approx(sum(hits))
    assert found["ece"] == reliability.ece


def test_calibration_extremes():
    sure = Reliability(10)
    sure.add(torch.ones(4), torch.tensor([True, True, True, True]))
    assert sure.ece == 0.0
    wrong = Reliability(10)
    wrong.add(torch.ones(4), torch.zeros(4, dtype=torch.bool))
    assert wrong.ece == 1.0
    coin = Reliability(10)
    coin.add(torch.full((4,), 0.55), torch.tensor([True, False, True, False]))
    assert coin.ece == pytest.approx(0.05)


def test_speed(models):
    seen = []
    hook = models["llama"].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    speed = tokens_per_second(models["llama"], data("plain")[0], seconds=0.01)
    hook.remove()
    assert seen[0] == (3, 9) and math.isfinite(speed) and speed > 0
    assert speed >= 27 * len(seen) / 10  # not slower than the whole took
