"""Calibration error where its value is known: by construction, by a limit, by an inequality."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse.metrics import Reliability, compare_causal_lms


def ece(confidence: Tensor, correct: Tensor, bins: int = 15) -> float:
    reliability = Reliability(bins)
    reliability.add(confidence, correct)
    return reliability.ece


def top(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    confidence, guess = logits.softmax(-1).max(-1)
    return confidence, guess == labels


def sampled(n: int, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits, and labels drawn from the very distribution they describe."""
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(n, classes, generator=generator)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


def test_a_model_that_knows_its_odds_is_calibrated():
    """The error falls to zero with the sample, about as 1 / sqrt(n)."""
    small, large = (ece(*top(*sampled(n))) for n in (1_000, 100_000))
    assert large < 0.01
    assert large < small / 3


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_a_model_that_is_too_sure_or_not_sure_enough(factor):
    """Scaled logits keep every guess and move every confidence: the error is the mean move, if all go one way."""
    logits, labels = sampled(100_000)
    honest, (confidence, correct) = top(logits, labels)[0], top(factor * logits, labels)
    moved = (confidence - honest).mean().item()
    assert (moved > 0) == (factor > 1)
    assert ece(confidence, correct) == pytest.approx(abs(moved), abs=0.01)
    assert ece(confidence, correct) > 0.1


@given(confidence=st.floats(0.01, 0.99), hits=st.integers(0, 40), misses=st.integers(1, 40))
def test_one_confidence(confidence, hits, misses):
    """All predictions equally sure: the gap between that and the share of hits."""
    n = hits + misses
    correct = torch.tensor([True] * hits + [False] * misses)
    assert ece(torch.full((n,), confidence, dtype=torch.float64), correct) == pytest.approx(abs(confidence - hits / n))


pairs = st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50)


def split(pairs: list[tuple[float, bool]]) -> tuple[Tensor, Tensor]:
    return torch.tensor([c for c, _ in pairs], dtype=torch.float64), torch.tensor([hit for _, hit in pairs])


@given(pairs=pairs)
def test_one_bin_compares_means(pairs):
    confidence, correct = split(pairs)
    assert ece(confidence, correct, 1) == pytest.approx(
        abs(confidence.mean().item() - correct.double().mean().item()), abs=1e-12
    )


@given(pairs=pairs, bins=st.integers(1, 8), factor=st.integers(2, 4))
@settings(deadline=None)
def test_finer_bins_find_no_less(pairs, bins, factor):
    """Gaps of opposite sign cancel in a wide bin, never in a narrow one (triangle inequality)."""
    confidence, correct = split([(round(c, 3) + 1e-4, hit) for c, hit in pairs])  # off the edges
    assert ece(confidence, correct, bins) <= ece(confidence, correct, bins * factor) + 1e-12


@given(pairs=pairs, order=st.randoms(use_true_random=False))
def test_order_and_bounds(pairs, order):
    found = ece(*split(pairs))
    order.shuffle(pairs)
    assert ece(*split(pairs)) == pytest.approx(found, abs=1e-12)
    assert 0 <= found <= 1


@torch.no_grad()
def test_of_a_language_model_that_knows_nothing():
    """A head of zeros: every token equally likely, so confidence is 1 / V and a hit is a token 0."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.zero_()
    ids = torch.tensor([[5, 0, 1, 0, 0, 2, 7, 3, 4]])  # three of eight predictions are of token 0
    figures = compare_causal_lms({"model": model}, [{"input_ids": ids}], vocab_size=8)["model"]
    assert figures.reliability.ece == pytest.approx(3 / 8 - 1 / 8)
    assert figures.loss == pytest.approx(math.log(8))
    assert figures.perplexity == pytest.approx(8.0)
    assert figures.reliability.to_json()["bins"] == [
        {"confidence": pytest.approx(1 / 8), "accuracy": 3 / 8, "count": 8}
    ]


@torch.no_grad()
def test_of_a_language_model_on_its_own_text():
    """Text sampled from the model itself: calibrated, and as surprising as its entropy."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=12,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    model = LlamaForCausalLM(config).eval()
    model.lm_head.weight.mul_(40)
    ids = torch.randint(0, 12, (800, 1))
    entropy = 0.0
    for _ in range(15):
        p = model(input_ids=ids).logits[:, -1].softmax(-1)
        entropy += float(-(p * p.clamp_min(1e-12).log()).sum(-1).mean()) / 15
        ids = torch.cat([ids, torch.multinomial(p, 1)], -1)
    figures = compare_causal_lms({"model": model}, [{"input_ids": ids}], vocab_size=12)["model"]
    assert figures.reliability.ece < 0.015
    assert figures.loss == pytest.approx(entropy, rel=0.02)
    assert figures.loss < math.log(12) - 0.3
