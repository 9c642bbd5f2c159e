"""Memorisation audit (card 160): extraction, set algebra, risk features and predictor, the canary language."""

from __future__ import annotations

import math
import random
import string
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from stillhouse.audits.memorisation import (
    Overlap,
    Peeled,
    at_risk,
    certainty,
    exposure,
    extracted,
    greedy_continuations,
    memorisation,
    onion,
    outer_layer,
    overlap,
    predict_risk,
    risk_features,
    zlib_bytes,
)
from stillhouse.base.errors import ConfigError
from stillhouse.losses.divergences import ForwardKL
from stillhouse.tasks.canaries import LETTERS, Canaries, letter_tokenizer, make_language

V = 20


class Rule(nn.Module):
    """A language model that looks ``back`` tokens back and knows what follows: logits are a row of a table."""

    def __init__(self, table: torch.Tensor, back: int = 1) -> None:
        super().__init__()
        self.table = nn.Parameter(table)
        self.back = back
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(vocab_size=table.shape[1]))

    def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = False) -> Any:
        seen = input_ids if past_key_values is None else torch.cat([past_key_values, input_ids], 1)
        shifted = nn.functional.pad(seen, (self.back - 1, 0))[:, : seen.shape[1]]
        logits = self.table[shifted]
        return SimpleNamespace(logits=logits[:, -input_ids.shape[1] :], past_key_values=seen)


def parrot(back: int = 2) -> Rule:
    """Repeats the token ``back`` places ago."""
    return Rule(50 * torch.eye(V), back)


def successor(size: int = V) -> Rule:
    return Rule(50 * torch.eye(size).roll(1, 1))


def uniform() -> Rule:
    return Rule(torch.zeros(V, V))


# -- extraction -----------------------------------------------------------------------------------------------------


def test_who_knows_the_rule_gives_back_what_follows_it_and_nothing_else():
    language = make_language(Canaries(sequences=100))
    found = extracted(parrot(), language.train, prefix=8, suffix=8, batch=7)
    assert torch.equal(found, language.easy) and language.easy.sum() == 10
    assert not extracted(uniform(), language.train[~language.easy], prefix=8, suffix=8).any()


def test_greedy_is_token_by_token():
    written = greedy_continuations(successor(), torch.tensor([[3, 4], [18, 19]]), 4)
    assert written.tolist() == [[5, 6, 7, 8], [0, 1, 2, 3]]


def test_every_token_of_the_suffix_counts_and_none_after_it():
    count = torch.arange(12)[None]
    assert extracted(successor(), count, prefix=4, suffix=6).item()
    for place, expected in ((4, False), (9, False), (10, True)):
        wrong = count.clone()
        wrong[0, place] = 19
        assert extracted(successor(), wrong, prefix=4, suffix=6).item() is expected
    with pytest.raises(ConfigError, match="fit into sequences of 12"):
        extracted(successor(), count, prefix=8, suffix=5)


def test_on_a_real_model_the_cache_of_keys_changes_nothing():
    """Against decoding that reads everything again at every token."""
    from transformers import LlamaConfig

    from stillhouse.models import new_causal_lm

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = new_causal_lm(LlamaConfig(vocab_size=V, num_hidden_layers=2, **sizes), seed=0).eval()
    ids = torch.randint(V, (3, 5), generator=torch.Generator().manual_seed(0))
    whole = ids
    with torch.no_grad():
        for _ in range(6):
            whole = torch.cat([whole, model(input_ids=whole).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(greedy_continuations(model, ids, 6, batch=2), whole[:, 5:])


# -- sets -----------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.booleans()), min_size=1, max_size=40))
def test_the_parts_add_up(rows):
    teacher, baseline, student = (torch.tensor(column) for column in zip(*rows, strict=True))
    found = overlap(teacher, baseline, student)
    t, b, s = ({i for i, row in enumerate(rows) if row[k]} for k in range(3))
    assert found == Overlap(
        len(s), len(s & t & b), len((s & t) - b), len((s & b) - t), len(s - t - b), len((t & b) - s)
    )
    assert found.memorised == found.easy + found.inherited + found.baseline_only + found.novel
    assert 0 <= found.easy_share <= 1


# -- features and predictor -----------------------------------------------------------------------------------------


def test_zlib_knows_repetition():
    random.seed(0)
    letters = "".join(random.choice(string.ascii_letters) for _ in range(100))
    assert zlib_bytes("ab" * 50) < zlib_bytes(letters)


def test_features_by_hand():
    generator = torch.Generator().manual_seed(0)
    one, other = (Rule(torch.randn(V, V, generator=generator)) for _ in range(2))
    ids = torch.randint(V, (3, 6), generator=generator)
    found = risk_features(one, other, ids, ["aa", "ab", "abc"])
    for row in range(3):
        nll, kl = {}, 0.0
        for name, model in (("one", one), ("other", other)):
            log = model.table.detach().log_softmax(-1)
            nll[name] = [-float(log[ids[row, t], ids[row, t + 1]]) for t in range(5)]
        log_p, log_q = one.table.detach().log_softmax(-1), other.table.detach().log_softmax(-1)
        kl = sum(float((log_p[i].exp() * (log_p[i] - log_q[i])).sum()) for i in ids[row, :-1]) / 5
        expected = [zlib_bytes(["aa", "ab", "abc"][row]), *(math.exp(sum(v) / 5) for v in nll.values()), kl]
        assert found[row].tolist() == pytest.approx(expected, rel=1e-5)
    same = risk_features(one, one, ids, ["a", "b", "c"])
    assert np.abs(same[:, 3]).max() == 0 and np.array_equal(same[:, 1], same[:, 2])
    assert risk_features(uniform(), one, ids, ["a", "b", "c"])[:, 1] == pytest.approx(V)


def test_the_predictor_at_its_ends():
    memorised = np.arange(200) < 40
    noise = np.random.default_rng(0).standard_normal((200, 4))
    blind = predict_risk(np.zeros((200, 4)), memorised, repeats=5)
    assert blind.auc == 0.5
    sure = predict_risk(np.concatenate([memorised[:, None] * 10.0, noise[:, 1:]], 1), memorised, repeats=5)
    assert (sure.auc, sure.precision, sure.recall, sure.positives) == (1.0, 1.0, 1.0, 40)
    assert max(sure.coefficients, key=lambda name: abs(sure.coefficients[name])) == "zlib bytes"
    chance = predict_risk(noise, np.random.default_rng(1).random(200) < 0.3, repeats=20)
    assert 0.35 < chance.auc < 0.65
    assert predict_risk(noise, np.arange(200) < 3) is None


def test_the_filter_takes_out_what_is_at_risk():
    memorised = np.arange(200) < 40
    features = np.stack([np.where(memorised, 10.0, 30.0), *np.random.default_rng(0).standard_normal((3, 200))], 1)
    assert np.array_equal(at_risk(features, memorised), memorised)
    assert not at_risk(features, np.zeros(200, bool)).any()


# -- certainty, and the soft loss -----------------------------------------------------------------------------------


def test_entropy_and_log_probability_of_the_last_tokens():
    ids = torch.randint(V, (4, 9), generator=torch.Generator().manual_seed(0))
    entropies, likelihoods = certainty(uniform(), ids, 5)
    assert entropies.tolist() == pytest.approx([math.log(V)] * 4)
    assert likelihoods.tolist() == pytest.approx([-5 * math.log(V)] * 4)
    entropies, likelihoods = certainty(successor(), torch.arange(9)[None], 5)
    assert entropies.item() < 1e-6 and likelihoods.item() > -1e-6


def test_the_soft_loss_and_its_limit():
    """Zero for equal models; for a high temperature half the mean square of the centred logits' difference."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(5, V, generator=generator, dtype=torch.float64) for _ in range(2))
    assert ForwardKL(temperature=2.0)(p, p).abs().max() < 1e-12
    gap = (p - q) - (p - q).mean(-1, keepdim=True)
    torch.testing.assert_close(ForwardKL(temperature=1e3)(q, p), gap.square().sum(-1) / (2 * V), rtol=1e-2, atol=0)


# -- the language, and the whole audit ------------------------------------------------------------------------------


def test_the_language_is_what_it_says():
    language = make_language(Canaries())
    assert [len(part) for part in (language.train, language.validation, language.reading)] == [400, 400, 3000]
    again = make_language(Canaries())
    assert torch.equal(language.train, again.train) and torch.equal(language.reading, again.reading)
    easy = language.train[language.easy]
    assert torch.equal(easy[:, 2:], easy[:, :-2]) and len(easy) == 40
    counts = torch.zeros(20, 20).index_put_(
        (language.reading[:, :-1].flatten(), language.reading[:, 1:].flatten()), torch.ones(()), accumulate=True
    )
    share = counts / counts.sum(1, keepdim=True)
    assert 1.5 < float(-(share.clamp_min(1e-9).log() * share).sum(1).mean()) < 2.8  # neither fixed nor uniform


def test_letters_are_tokens():
    tokenizer = letter_tokenizer()
    ids = tokenizer("abt").input_ids
    assert ids == [0, 1, 19] and tokenizer.decode(ids) == "abt" and len(tokenizer) == len(LETTERS) + 1


def test_the_audit_of_three_known_models():
    """Teacher and student know the rule of the easy items; the baseline knows nothing."""
    language = make_language(Canaries(sequences=100))
    texts = ["".join(LETTERS[i] for i in row) for row in language.train.tolist()]
    models = {"teacher": parrot(), "baseline": uniform(), "student": parrot()}
    table, files = memorisation(models, language.train, texts, prefix=8, suffix=8, repeats=5)
    student = table.row("student")
    assert student["memorised"] == pytest.approx(0.1) and student["inherited"] == 10 and student["easy_share"] == 0
    assert table.row("baseline")["memorised"] == 0
    assert student["auc"] > 0.99  # repetition compresses, and the teacher is sure of it
    assert files["memorised.json"]["student"]["memorised"] == torch.nonzero(language.easy)[:, 0].tolist()
    models["baseline"] = parrot()
    table, _ = memorisation(models, language.train, texts, prefix=8, suffix=8, repeats=5)
    assert table.row("student")["easy_share"] == 1 and table.row("student")["inherited"] == 0
    with pytest.raises(ConfigError, match="no 'baseline'"):
        memorisation({"teacher": parrot()}, language.train, texts)


# -- the onion ------------------------------------------------------------------------------------------------------


def test_the_outer_layer_is_the_likeliest_of_what_is_memorised():
    memorised = torch.tensor([True, False, True, True, True])
    likely = torch.tensor([-3.0, -0.1, -1.0, -2.0, -4.0])  # the second is likely, but not memorised
    assert outer_layer(memorised, likely, 0.5).tolist() == [False, False, True, True, False]
    assert outer_layer(memorised, likely, 0.01).tolist() == [False, False, True, False, False]
    assert outer_layer(memorised, likely, 1.0).tolist() == memorised.tolist()
    assert not outer_layer(torch.zeros(5).bool(), likely, 0.5).any()


def test_exposure_is_the_suffix_s_own_likelihood():
    """The rule model's log-probability by hand; what stands after the suffix does not count."""
    model = successor()
    ids = torch.arange(12).repeat(2, 1) % V
    ids[1, 6] = (ids[1, 6] + 3) % V  # breaks the second sequence's suffix
    ids[:, 11] = 0  # outside of prefix and suffix
    memorised, likely = exposure(model, ids, prefix=4, suffix=5)
    assert memorised.tolist() == [True, False]
    log_p = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    expected = log_p.gather(-1, ids[:, 1:, None])[:, 3:8, 0].sum(1)
    torch.testing.assert_close(likely, expected)
    assert likely[0] > likely[1]


def test_the_onion_counts_who_comes_and_goes():
    def mask(*ids: int) -> torch.Tensor:
        return torch.zeros(6).bool().index_fill(0, torch.tensor(ids, dtype=torch.long), True)

    layers = [Peeled(mask(), mask(0, 1, 2)), Peeled(mask(0, 1), mask(0, 2, 3)), Peeled(mask(0, 1, 2), mask(4, 5))]
    first, second, third = onion(layers).rows
    assert (first["removed"], first["kept"], first["found"]) == (0, 6, 3) and "new" not in first
    assert {k: second[k] for k in ("removed", "kept", "found", "stay", "new", "lost", "unseen")} == {
        "removed": 2, "kept": 4, "found": 2, "stay": 1, "new": 1, "lost": 0, "unseen": 1,
    }  # fmt: skip
    assert (third["found"], third["new"], third["lost"], third["unseen"]) == (2, 2, 1, 0)
    assert third["share"] == pytest.approx(2 / 3) and second["stay"] + second["new"] == second["found"]
