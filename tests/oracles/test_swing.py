"""Swing distillation (card 123): temperatures, noise and labels by token; who is private; what canaries give away."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.stats import norm
from torch import Tensor
from transformers import LlamaConfig

from stillhouse import Observed
from stillhouse.audits.exposure import (
    Canary,
    exact_exposure,
    expose,
    exposure_audit,
    likelihoods,
    next_token_logprobs,
    rank_of,
    read_canaries,
    skew_normal_exposure,
)
from stillhouse.base.errors import ConfigError, DataError, ModelError
from stillhouse.core.schedule import Progress
from stillhouse.data.private_tokens import Beside, frequency_scores, rule_scores, span_scores
from stillhouse.data.windows import WindowSplit
from stillhouse.losses import ForwardKL, linear_divergence
from stillhouse.losses.linear_divergence import OutputLayer
from stillhouse.losses.tempered import (
    key_of,
    linear_tempered_kd,
    noisy_targets,
    soft_share,
    swing_temperature,
    unit_noise,
)
from stillhouse.metrics.privacy_budget import spent_epsilon
from stillhouse.models import new_causal_lm, train_bpe
from stillhouse.models.token_classifier import entity_finder, whole_words
from stillhouse.objectives.language import TokenCrossEntropy, head_of
from stillhouse.objectives.private import PRIVACY, PrivateCrossEntropy, SwingTokens, draw_keys
from stillhouse.systems import get_system
from stillhouse.tasks import privacy
from stillhouse.tasks.privacy import Detector
from stillhouse.tasks.secrets import DIGITS, WORDS, Secrets, make_text, second_order, secret_tokenizer

V, N, D, E = 7, 9, 4, 5


def drawn(seed: int, *shape: int) -> Tensor:
    return 1.5 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def layer(weight: Tensor) -> OutputLayer:
    return OutputLayer(weight, None, 1.0, None, V)


# -- temperature ----------------------------------------------------------------------------------------------------


def test_the_temperature_swings():
    s = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(swing_temperature(s, base=2.0, most=18.0), torch.tensor([2.0, 6.0, 18.0]))
    straight = swing_temperature(s, base=2.0, most=18.0, shape="linear")
    torch.testing.assert_close(straight, torch.tensor([2.0, 10.0, 18.0]))
    torch.testing.assert_close(soft_share(s, alpha=0.8), torch.tensor([0.8, 0.9, 1.0]))


# -- noise ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "variance", "fourth"), [("laplace", 2.0, 24.0), ("gaussian", 1.0, 3.0)])
def test_noise_has_the_moments_of_its_name(kind, variance, fourth):
    n = unit_noise(key_of(3, torch.arange(2000)), 100, kind=kind)
    assert float(n.mean()) == pytest.approx(0, abs=0.02)
    assert float(n.var()) == pytest.approx(variance, rel=0.03)
    assert float(n.pow(4).mean()) == pytest.approx(fourth, rel=0.12)
    assert abs(float(torch.corrcoef(n.T)[0, 1])) < 0.1 and abs(float(torch.corrcoef(n)[0, 1])) < 0.4


def test_a_key_is_a_draw():
    keys = key_of(0, torch.tensor([4, 5, 4]), torch.tensor([1, 1, 1]))
    n = unit_noise(keys, 50, kind="laplace")
    assert torch.equal(n[0], n[2]) and not torch.equal(n[0], n[1])
    assert torch.equal(n[1:2], unit_noise(keys[1:2], 50, kind="laplace"))  # however rows are cut
    others = {
        int(key_of(seed, *map(torch.tensor, parts))) for seed in range(3) for parts in ((1, 2), (2, 1), (1,), (0, 1))
    }
    assert len(others) == 12


@given(seed=st.integers(0, 60), scale=st.floats(0.0, 3.0), support=st.sampled_from([None, 1, 3, 20]))
@settings(max_examples=40, deadline=None)
def test_noisy_targets_are_distributions(seed, scale, support):
    p = drawn(seed, N, V).softmax(-1)
    n = scale * unit_noise(key_of(seed, torch.arange(N)), V, kind="laplace")
    found = noisy_targets(p, n, support=support)
    assert (found >= 0).all()
    torch.testing.assert_close(found.sum(-1), torch.ones(N, dtype=torch.float64))
    torch.testing.assert_close(noisy_targets(p, 0 * n, support=support), p)
    if support in (1, 3):
        likely = torch.zeros_like(p, dtype=torch.bool).scatter_(-1, p.topk(support).indices, True)
        assert torch.equal(found[~likely], p[~likely])


def test_noisy_targets_by_hand():
    p, n = torch.tensor([[0.5, 0.3, 0.2]]), torch.tensor([[0.1, -0.4, 0.2]])
    torch.testing.assert_close(noisy_targets(p, n), torch.tensor([[0.6, 0.0, 0.4]]))
    torch.testing.assert_close(noisy_targets(p, n, support=2), torch.tensor([[0.8, 0.0, 0.2]]))
    torch.testing.assert_close(noisy_targets(p, torch.full((1, 3), -1.0)), torch.full((1, 3), 1 / 3))


# -- the loss -------------------------------------------------------------------------------------------------------


def sides(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    labels = torch.randint(V, (N,), generator=torch.Generator().manual_seed(seed))
    return (
        drawn(seed, N, D).requires_grad_(),
        drawn(seed + 1, V, D).requires_grad_(),
        drawn(seed + 2, N, E),
        drawn(seed + 3, V, E),
        labels,
    )


def test_where_nothing_is_private_it_is_plain_kd():
    x, w, y, u, labels = sides(0)
    T, alpha = 2.0, 0.9
    mask = torch.tensor([1, 1, 0, 1, 1, 1, 1, 0, 1])
    ones = torch.ones(N, dtype=torch.float64)
    found = linear_tempered_kd(
        x, layer(w), y, layer(u), labels, soft_N=alpha * ones, temperature_N=T * ones, factor=T**2, weight_N=mask
    )
    plain = linear_divergence(
        x,
        w,
        y,
        u,
        divergence=ForwardKL(temperature=T),
        labels_N=labels,
        divergence_weight=alpha,
        cross_entropy_weight=1 - alpha,
        weight_N=mask,
    )
    torch.testing.assert_close(found.loss, plain.loss)
    for one, other in zip(*(torch.autograd.grad(r.loss, (x, w)) for r in (found, plain)), strict=True):
        torch.testing.assert_close(one, other)
    torch.testing.assert_close(found.divergence + found.cross_entropy, found.loss.detach())


@pytest.mark.parametrize("student", ["same", "one"])
@pytest.mark.parametrize("noise", ["none", "laplace", "gaussian"])
def test_the_fused_pass_against_full_logits(student, noise):
    x, w, y, u, labels = sides(10)
    s = torch.linspace(0, 1, N, dtype=torch.float64)
    T, a, key = swing_temperature(s, base=1.5, most=9.0), soft_share(s, alpha=0.6), key_of(2, torch.arange(N))
    own = T if student == "same" else torch.where(T <= 1.5, T, 1.0)
    mask, scale = torch.tensor([1, 0, 1, 1, 1, 1, 1, 1, 1.0], dtype=torch.float64), 0.2 * s
    found = linear_tempered_kd(
        x,
        OutputLayer(w, None, 0.7, 3.0, V),
        y,
        layer(u),
        labels,
        soft_N=a,
        temperature_N=T,
        student_temperature_N=own,
        factor=1.5**2,
        weight_N=mask,
        noise=noise,
        noise_scale_N=scale,
        key_N=key,
        chunk_tokens=2,
    )
    z = 3 * torch.tanh(0.7 * (x @ w.T) / 3)
    p = (y @ u.T / T[:, None]).softmax(-1)
    if noise != "none":
        p = (p + scale[:, None] * unit_noise(key, V, kind=noise)).clamp(min=0)
        p = p / p.sum(-1, keepdim=True)
    kl = (torch.xlogy(p, p) - p * (z / own[:, None]).log_softmax(-1)).sum(-1)
    each = a * 1.5**2 * kl + (1 - a) * F.cross_entropy(z, labels, reduction="none")
    expected = (mask * each).sum() / mask.sum()
    torch.testing.assert_close(found.loss, expected)
    for one, other in zip(*(torch.autograd.grad(r, (x, w)) for r in (found.loss, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_a_certainly_private_token_pulls_to_nothing():
    """T -> infinity, student at 1: the gradient in the logits is q - 1/V, whatever the teacher and the label say."""
    z, y, u, ones = drawn(20, N, V).requires_grad_(), drawn(21, N, E), drawn(22, V, E), torch.ones(N)
    gradients = []
    for labels in (torch.zeros(N, dtype=torch.long), torch.full((N,), V - 1)):
        loss = linear_tempered_kd(
            z,
            layer(torch.eye(V, dtype=torch.float64)),
            y,
            layer(u),
            labels,
            soft_N=soft_share(ones, alpha=0.5),
            temperature_N=1e9 * ones,
            student_temperature_N=ones,
        ).loss
        gradients.append(torch.autograd.grad(loss, z)[0] * N)
    torch.testing.assert_close(gradients[0], z.detach().softmax(-1) - 1 / V, atol=1e-7, rtol=0)
    assert torch.equal(*gradients)


def test_the_private_get_no_louder_for_being_softened():
    """A constant factor leaves a token at T = 20 a tenth of the pull of one at T = 2; T^2 would not."""
    z, t = drawn(30, 1, V).requires_grad_(), drawn(31, 1, V)
    eye = torch.eye(V, dtype=torch.float64)

    def pull(T: float) -> float:
        at = torch.full((1,), T)
        loss = linear_tempered_kd(
            z,
            layer(eye),
            t,
            layer(eye),
            torch.zeros(1, dtype=torch.long),
            soft_N=torch.ones(1),
            temperature_N=at,
            factor=4.0,
        ).loss
        return float(torch.autograd.grad(loss, z)[0].norm())

    assert pull(20.0) < 0.05 * pull(2.0)


# -- as a term ------------------------------------------------------------------------------------------------------


def model(seed: int, width: int = 16, vocab: int = 31) -> Any:
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=vocab - 1,
    )
    made = new_causal_lm(config, seed=seed)
    with torch.no_grad():
        made.get_output_embeddings().weight.mul_(15)
    return made


def batch_of(seed: int = 0, rows: int = 3, length: int = 8) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(31, (rows, length), generator=random)
    privacy = (torch.rand(rows, length, generator=random) < 0.4).float()
    return {"input_ids": ids, PRIVACY: privacy, "sample_id": torch.arange(rows) + 10}


def test_the_term_reads_the_score_of_the_token_that_is_predicted():
    student, teacher, batch = Observed(model(0)), Observed(model(1, 20), frozen=True), batch_of()

    def value(batch: dict[str, Tensor], **options: Any) -> float:
        values = {"base": 2.0, "most": 20.0, "alpha": 0.7, "noise": "none", "vocab_size": 31, **options}
        return float(SwingTokens(head_of(student), head_of(teacher), **values)(batch, Progress(0, 1)).detach())

    with torch.no_grad():
        z, t = (m.module(input_ids=batch["input_ids"]).logits[:, :-1].double() for m in (student, teacher))
    labels, s = batch["input_ids"][:, 1:], batch[PRIVACY][:, 1:].double()
    T = torch.where(s > 0, 20.0, 2.0)[..., None]
    kl = F.kl_div((z / T).log_softmax(-1), (t / T).softmax(-1), reduction="none").sum(-1)
    ce = F.cross_entropy(z.transpose(1, 2), labels, reduction="none")
    a = 0.7 + 0.3 * s
    assert value(batch) == pytest.approx(float((a * 4 * kl + (1 - a) * ce).mean()), rel=1e-4)
    assert value(batch, hide_labels=False) == pytest.approx(float((0.7 * 4 * kl + 0.3 * ce).mean()), rel=1e-4)
    # A label at a private place does not matter to what is predicted there; what is read stays the same.
    last = {**batch, PRIVACY: batch[PRIVACY].clone()}
    last[PRIVACY][:, -1] = 1
    changed = {**last, "input_ids": last["input_ids"].clone()}
    changed["input_ids"][:, -1] = (changed["input_ids"][:, -1] + 1) % 31
    assert value(last) == pytest.approx(value(changed), rel=1e-6)
    assert value(last, hide_labels=False) != pytest.approx(value(changed, hide_labels=False), rel=1e-4)
    quiet = value(batch, noise="laplace", scale=0.3, by="private")
    assert quiet != pytest.approx(value(batch)) and quiet != pytest.approx(value(batch, noise="laplace", scale=0.3))
    none = {**batch, PRIVACY: torch.zeros_like(batch[PRIVACY])}
    assert value(none, noise="laplace", scale=0.3, by="private") == pytest.approx(value(none), rel=1e-6)


def test_what_a_draw_depends_on():
    batch = batch_of(5, rows=2, length=10)
    batch["input_ids"][1, 4:9] = batch["input_ids"][0, 2:7]  # five tokens that stand in both

    def keys(draw: Any, step: int = 0) -> Tensor:
        return draw_keys(batch, Progress(step, 9), draw=draw, context=3, seed=1)

    by_context = keys("context")
    assert by_context.shape == (2, 9)
    assert torch.equal(by_context[0, 4:7], by_context[1, 6:9])  # from the third of them on
    assert by_context[0, 3] != by_context[1, 5]
    assert torch.equal(keys("context", 7), by_context) and torch.equal(keys("place", 7), keys("place"))
    assert len(keys("place").unique()) == 18 and not torch.equal(keys("step", 7), keys("step"))


def test_fresh_noise_is_averaged_away_and_fixed_noise_is_not():
    p = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)

    def mean(keys: Tensor) -> Tensor:
        return noisy_targets(p.expand(len(keys), 3), 0.1 * unit_noise(keys, 3, kind="laplace")).mean(0)

    fresh, fixed = mean(key_of(0, torch.arange(4000))), mean(key_of(0, torch.zeros(4000)))
    assert float((fresh - p).abs().max()) < 0.02 < float((fixed - p).abs().max())


# -- who is private -------------------------------------------------------------------------------------------------


def test_rules_flag_tokens_of_any_tokenizer():
    text = "Yours truly, Mr. Holmes wrote to a.b@cd.org from 221 Baker, as old friends do."
    tokenizer = train_bpe([text + " truly yours from friends"] * 5, vocab_size=280)
    ids = tokenizer(text)["input_ids"]
    found = rule_scores(torch.tensor([ids]), tokenizer)[0].tolist()
    flagged = tokenizer.decode([token for token, s in zip(ids, found, strict=True) if s])
    left = tokenizer.decode([token for token, s in zip(ids, found, strict=True) if not s])
    assert all(part in flagged for part in ("Holmes", "a.b@cd.org", "221"))
    assert "221" not in left and "friends" in left and "truly" in left
    extra = rule_scores(torch.tensor([ids]), tokenizer, extra="Baker")[0]
    assert extra.sum() > sum(found)
    with pytest.raises(ConfigError, match="not a regular expression"):
        rule_scores(torch.tensor([ids]), tokenizer, extra="(")


def test_rules_on_the_embedded_language_find_the_digits_and_what_is_around():
    text, tokenizer = make_text(Secrets(sentences=40, repeats=2)), secret_tokenizer()
    ids = text.train
    is_digit = (ids >= len(WORDS)) & (ids < len(WORDS) + len(DIGITS))
    assert torch.equal(rule_scores(ids, tokenizer), is_digit.float())
    around = rule_scores(ids, tokenizer, around=1)
    expected = is_digit | F.pad(is_digit, (1, 0))[:, :-1] | F.pad(is_digit, (0, 1))[:, 1:]
    assert torch.equal(around, expected.float())


@pytest.fixture(scope="module")
def classifier(tmp_path_factory) -> Any:
    """A tiny random BERT that labels pieces without a look at their neighbours, and its own opinion of a word."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertForTokenClassification, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("ner")
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces_of = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", ".", *letters, *(f"##{letter}" for letter in letters)]
    vocabulary = {piece: number for number, piece in enumerate([*pieces_of, "cat", "dog", "##ird", "ali", "##ce"])}
    backend = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    roles = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **roles)
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    labels = {0: "O", 1: "B-PER", 2: "I-PER"}
    config = BertConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=16,
        id2label=labels,
        label2id={v: k for k, v in labels.items()},
        **sizes,
    )
    net = BertForTokenClassification(config).eval()
    with torch.no_grad():
        net.bert.embeddings.position_embeddings.weight.zero_()
        net.bert.encoder.layer[0].attention.output.dense.weight.zero_()
        net.classifier.weight.mul_(40)
        net.classifier.bias[0] = 1.5
    net.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    def is_entity(word: str) -> bool:
        with torch.no_grad():
            return bool((net(**tokenizer(word, return_tensors="pt")).logits[0, 1:-1].argmax(-1) > 0).any())

    return SimpleNamespace(folder=str(folder), is_entity=is_entity, net=net, tokenizer=tokenizer)


NAMES = "cat dog bird alice bob zoe kim river stone milk quay pond elm x v".split()  # noqa: SIM905


def test_names_that_a_classifier_finds_are_private(classifier):
    """What the classifier says of each word alone, in another tokenizer's tokens and in a text too long for it."""
    text = " ".join(NAMES * 4) + "."
    tokenizer = train_bpe([text] * 4, vocab_size=300)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    found = span_scores(ids, tokenizer, [entity_finder(classifier.folder)])[0]
    private = [word for word in NAMES if classifier.is_entity(word)]
    assert 3 < len(private) < len(NAMES) - 3
    assert any(len(classifier.tokenizer(word)["input_ids"]) > 3 for word in private)  # of several pieces
    assert len(classifier.tokenizer(text)["input_ids"]) > 5 * 16
    said = tokenizer.batch_decode([[token] for token in ids[0].tolist()])
    place, wrong = 0, []
    for token, score in zip(said, found.tolist(), strict=True):
        middle = place + len(token) - 1
        word = text[: middle + 1].rsplit(" ", 1)[-1] + text[middle + 1 :].split(" ", 1)[0]
        if float(classifier.is_entity(word.strip("."))) != score and token.strip(" ."):
            wrong.append((token, word, score))
        place += len(token)
    assert wrong == []


def test_names_beside_the_rules(classifier):
    text = "zoe 42 kim cat"
    tokenizer = train_bpe([text] * 4, vocab_size=300)
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    task = SimpleNamespace(
        windows=SimpleNamespace(train=WindowSplit({"input_ids": ids})),
        tokenizer=tokenizer,
        system=SimpleNamespace(trust_remote_code=False),
        run=SimpleNamespace(fabric=SimpleNamespace(device=torch.device("cpu"))),
    )
    found: Any = SimpleNamespace(task=task)
    rules, names, both = (
        Detector(scorer=scorer, ner=ner).scores(found, 0)
        for scorer, ner in (("rules", None), ("ner", classifier.folder), ("rules", classifier.folder))
    )
    assert torch.equal(both, torch.maximum(rules, names))
    assert rules.sum() > 0 and names.sum() > 0 and not torch.equal(both, names) and not torch.equal(both, rules)


def test_words_are_whole():
    assert whole_words("see Alice's cat", 5, 7) == (4, 9)
    assert whole_words("see Alice", 3, 6) == (3, 9)  # a blank before the word is not widened into the word before it
    assert whole_words("abc", 0, 3) == (0, 3)


def test_what_is_no_classifier_is_refused(classifier, tmp_path):
    classifier.net.bert.save_pretrained(tmp_path / "bert")
    classifier.tokenizer.save_pretrained(tmp_path / "bert")
    with pytest.raises(ModelError, match="missing"):
        entity_finder(str(tmp_path / "bert"))
    with pytest.raises(ModelError, match="no such directory"):
        entity_finder(str(tmp_path / "none"))
    with pytest.raises(ConfigError, match="scorer=ner needs"):
        get_system("swing").make(scorer="ner").detector()


def test_frequency_against_counting():
    ids = torch.tensor([[1, 2, 3, 4], [1, 2, 3, 5], [2, 3, 1, 2]])
    found = frequency_scores(ids, n=2, c=2.0)
    counts = Counter(tuple(row[max(0, t - 2) : t]) for row in ids.tolist() for t in range(4))
    for row, t in itertools.product(range(3), range(4)):
        assert float(found[row, t]) == pytest.approx(math.exp(-counts[tuple(ids[row, max(0, t - 2) : t].tolist())] / 2))
    assert float(found[0, 3]) == pytest.approx(math.exp(-1.5))  # (2, 3) stands before three tokens


def test_the_ratio_is_the_teachers_to_an_outsiders():
    teacher, other, ids = model(0), model(1), batch_of(2)["input_ids"]
    task = SimpleNamespace(
        windows=SimpleNamespace(train=WindowSplit({"input_ids": ids})),
        observed_teacher=lambda: SimpleNamespace(module=teacher),
        run=SimpleNamespace(fabric=SimpleNamespace(device="cpu")),
        batches_of=lambda _: iter([{"input_ids": ids}]),
    )
    found: Any = SimpleNamespace(task=task, reference=other)
    score = Detector(scorer="ratio", slope=3.0, offset=0.5)._ratio(found)
    with torch.no_grad():
        logs = [m(input_ids=ids).logits[:, :-1].log_softmax(-1) for m in (teacher, other)]
    ratio = (logs[0] - logs[1]).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(score[:, 1:], torch.sigmoid(3 * (ratio - 0.5)), atol=1e-4, rtol=1e-4)
    assert (score[:, 0] == 0).all()


def test_a_worse_detector_misses_its_share():
    text = make_text(Secrets(sentences=200, repeats=40))
    task = SimpleNamespace(
        windows=SimpleNamespace(train=WindowSplit({"input_ids": text.train})), tokenizer=secret_tokenizer()
    )
    found: Any = SimpleNamespace(task=task, reference=None)
    all_of_them = Detector(scorer="rules").scores(found, 0)
    some = Detector(scorer="rules", recall=0.8).scores(found, 0)
    assert (some <= all_of_them).all() and float(some.sum() / all_of_them.sum()) == pytest.approx(0.8, abs=0.06)
    assert torch.equal(some, Detector(scorer="rules", recall=0.8).scores(found, 0))
    assert not Detector(scorer="none").scores(found, 0).any()


def test_rows_beside_a_data_set():
    data = Beside([{"a": 1}, {"a": 2}], s=torch.tensor([[0.1], [0.2]]))
    assert len(data) == 2 and data[1]["a"] == 2 and float(data[1]["s"]) == pytest.approx(0.2)


# -- what is given away ---------------------------------------------------------------------------------------------


def ranked(rank: int, size: int = 1000) -> Tensor:
    """Log-probabilities of candidates of which the first has this rank."""
    order = torch.arange(size, 0, -1, dtype=torch.float64)
    return torch.cat([order[rank - 1 : rank], order[: rank - 1], order[rank:]])


def test_exposure_by_rank():
    assert exact_exposure(ranked(1)) == pytest.approx(9.9658, abs=1e-4)
    assert exact_exposure(ranked(1000)) == pytest.approx(0)
    mean = np.mean([exact_exposure(ranked(rank)) for rank in range(1, 1001)])
    assert mean == pytest.approx(1 / math.log(2), abs=0.02)  # 1.44 bits by chance
    assert rank_of(torch.zeros(9)) == 5  # who knows nothing is not exposed for being equal


def test_the_fit_where_candidates_are_too_many():
    random = torch.Generator().manual_seed(0)
    others = -(30 + 2 * torch.randn(5000, generator=random, dtype=torch.float64))
    for away, share in ((0.0, 0.5), (-2.0, 0.02275), (-4.0, 3.17e-5)):
        found = skew_normal_exposure(torch.cat([torch.tensor([-(30 + 2 * away)]).double(), others]))
        assert found == pytest.approx(-math.log2(share), rel=0.1)


def test_candidates_are_all_fillings_or_a_sample():
    canary = Canary("it is ", ("1", "0"), tuple("012"), "-")
    found = list(canary.candidates(9))
    assert found[0] == ("1", "0") and len(set(found)) == 9 == canary.size
    assert canary.text(found[0]) == "it is 1-0"
    some = list(Canary("", ("1",) * 8, tuple("0123456789")).candidates(50))
    assert len(some) == 50 and some.count(("1",) * 8) == 1


def test_likelihoods_and_exposure_against_brute_force():
    tokenizer, teller = secret_tokenizer(), model(3)
    canary = Canary("oak lake moor reef ", ("3", "1"), DIGITS, " ")
    texts = [canary.text(one) for one in canary.candidates(1000)]
    by_hand = []
    with torch.no_grad():
        for text in [*texts[:20], "oak"]:
            ids = torch.tensor([[30, *tokenizer(text)["input_ids"]]])
            log_p = teller(input_ids=ids).logits[:, :-1].log_softmax(-1)
            by_hand.append(float(log_p.gather(-1, ids[:, 1:, None]).sum()))
    found = likelihoods(teller, tokenizer, [*texts[:20], "oak"], batch=21)  # the short one is padded
    assert found.tolist() == pytest.approx(by_hand, abs=1e-3)
    whole = likelihoods(teller, tokenizer, texts)
    exposed = expose(teller, tokenizer, canary)
    assert exposed.exact and exposed.candidates == 100
    assert exposed.rank == 1 + int((whole > whole[0]).sum())
    assert exposed.bits == pytest.approx(math.log2(100) - math.log2(exposed.rank))


def test_a_model_that_knows_the_secret_is_exposed_and_the_audit_says_so():
    tokenizer, knows = secret_tokenizer(), model(4)
    canaries = [Canary("oak lake moor reef ", ("3", "1"), DIGITS, " ")]
    rows = torch.tensor([[30, *tokenizer(canaries[0].text(("3", "1")))["input_ids"]]] * 2)
    term, optimizer = TokenCrossEntropy(head_of(Observed(knows))), torch.optim.Adam(knows.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        term({"input_ids": rows}, 0.0).backward()
        optimizer.step()
    audit = exposure_audit(
        "exposure", lambda: {"knows": knows, "does not": model(5)}, tokenizer, canaries, perplexity={"knows": 3.0}
    )
    context: Any = SimpleNamespace(results={}, seed=0)
    table, files = audit.function(context)
    assert context.results["knows/exposure"] == pytest.approx(math.log2(100))
    assert context.results["does not/exposure"] < context.results["knows/exposure"]
    assert table.rows[0]["first"] == 1 and table.rows[0]["perplexity"] == 3.0 and "perplexity" not in table.rows[1]
    assert files["exposure.json"]["knows"][0]["exact"]


def test_the_logprobs_of_next_tokens():
    teller, ids = model(6), batch_of(3)["input_ids"]
    with torch.no_grad():
        expected = teller(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    torch.testing.assert_close(next_token_logprobs(teller, {"input_ids": ids}), expected, atol=1e-5, rtol=1e-5)


def test_canaries_from_a_file(tmp_path):
    file = tmp_path / "canaries.jsonl"
    records = [{"prefix": "pin ", "secret": "0417"}, {"prefix": "id ", "secret": "AB", "alphabet": "ABC"}]
    file.write_text("\n".join(map(json.dumps, records)) + "\n\n")
    one, two = read_canaries(str(file))
    assert (one.size, two.size, two.text(("C", "A"))) == (10_000, 9, "id CA")
    for bad, said in (
        ("{", "line 1: not JSON"),
        ("{}", "line 1: not a canary"),
        ('{"prefix": "a", "secret": "A1"}', "not made of its alphabet"),
        ("", "no canary"),
    ):
        file.write_text(bad)
        with pytest.raises(DataError, match=said):
            read_canaries(str(file))
    with pytest.raises(DataError, match="no such file"):
        read_canaries(str(tmp_path / "other"))


# -- the embedded language ------------------------------------------------------------------------------------------


def test_the_secrets_are_where_they_belong():
    recipe = Secrets(sentences=300)
    text, tokenizer = make_text(recipe), secret_tokenizer()
    assert text.train.shape == (400, 13) and (text.train[:, 0] == 30).all() and len(set(text.canaries)) == 5
    lines = tokenizer.batch_decode(text.train[:, 1:])
    for canary in text.canaries:
        assert canary.size == 1000
        assert sum(line.startswith(canary.text(canary.secret)) for line in lines) == recipe.repeats
    is_digit = (text.train >= 20) & (text.train < 30)
    assert int(is_digit.any(1).sum()) == 100 and int(is_digit.sum()) == 300
    assert not any(((part >= 20) & (part < 30)).any() for part in (text.selection, text.validation, text.public))
    assert make_text(recipe).canaries == text.canaries != make_text(Secrets(sentences=300, seed=1)).canaries


def test_walks_of_order_two():
    """A chain whose next state is the sum of the last two, modulo 4."""
    table = np.zeros((4, 4, 4))
    for a, b in itertools.product(range(4), repeat=2):
        table[a, b, (a + b) % 4] = 1
    rows = second_order(table, 20, 9, np.random.default_rng(0))
    assert (rows[:, 2:] == (rows[:, :-2] + rows[:, 1:-1]) % 4).all() and len(np.unique(rows[:, :2], axis=0)) > 8


# -- DP-SGD ---------------------------------------------------------------------------------------------------------


def gradients(term: PrivateCrossEntropy, module: Any, batch: dict[str, Tensor], step: int = 0) -> dict[str, Tensor]:
    module.zero_grad()
    term(batch, Progress(step, 10)).backward()
    return {name: weight.grad.clone() for name, weight in module.named_parameters()}


def test_dp_sgd_against_a_loop():
    module, batch = model(7), batch_of(4)
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 5:] = 0
    clip = 2.0
    found = gradients(PrivateCrossEntropy(Observed(module), clip=clip, multiplier=0.0, vocab_size=31), module, batch)
    summed = {name: torch.zeros_like(weight) for name, weight in module.named_parameters()}
    norms = []
    for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
        module.zero_grad()
        ids = row[mask.bool()][None]
        F.cross_entropy(module(input_ids=ids).logits[0, :-1], ids[0, 1:]).backward()
        norms.append(math.sqrt(sum(float(w.grad.square().sum()) for w in module.parameters())))
        for name, weight in module.named_parameters():
            summed[name] += weight.grad * min(1.0, clip / norms[-1])
    assert max(norms) > clip
    for name, total in summed.items():
        torch.testing.assert_close(found[name], total / 3, atol=2e-5, rtol=2e-3)


def test_the_noise_of_dp_sgd_is_as_large_as_it_says():
    module, batch = model(7), batch_of(4)
    quiet, loud = (PrivateCrossEntropy(Observed(module), clip=0.5, multiplier=m, vocab_size=31) for m in (0.0, 4.0))
    without, first, second = (
        gradients(quiet, module, batch),
        gradients(loud, module, batch),
        gradients(loud, module, batch, 1),
    )
    noise = torch.cat([(first[name] - without[name]).flatten() for name in without])
    assert float(noise.std()) == pytest.approx(4.0 * 0.5 / 3, rel=0.05)
    assert any(not torch.equal(first[name], second[name]) for name in first)
    again = gradients(loud, module, batch)
    assert all(torch.equal(first[name], again[name]) for name in first)


def exact_epsilon(multiplier: float, delta: float) -> float:
    """Of one Gaussian mechanism (Balle and Wang, 2018, theorem 8)."""

    def left(epsilon: float) -> float:
        first, second = 1 / (2 * multiplier) - epsilon * multiplier, -1 / (2 * multiplier) - epsilon * multiplier
        return norm.cdf(first) - math.exp(epsilon) * norm.cdf(second) - delta

    return brentq(left, 0, 50)


def test_the_budget_that_dp_sgd_spends():
    """Above the exact value of one step and not far above it; more steps cost more, smaller samples and noise pay."""
    pytest.importorskip("opacus")
    for multiplier in (1.0, 4.0):
        found = spent_epsilon(multiplier=multiplier, rate=1.0, steps=1, delta=1e-5)
        assert 1 < found / exact_epsilon(multiplier, 1e-5) < 1.2
        # Several Gaussian steps are one with less noise.
        nine = spent_epsilon(multiplier=3 * multiplier, rate=1.0, steps=9, delta=1e-5)
        assert nine == pytest.approx(found, rel=1e-6)
    base = spent_epsilon(multiplier=1.0, rate=0.02, steps=300, delta=1e-5)
    assert base < spent_epsilon(multiplier=1.0, rate=0.02, steps=600, delta=1e-5)
    assert base < spent_epsilon(multiplier=1.0, rate=0.04, steps=300, delta=1e-5)
    assert base > spent_epsilon(multiplier=1.5, rate=0.02, steps=300, delta=1e-5)
    assert base < 0.3 * spent_epsilon(multiplier=1.0, rate=1.0, steps=300, delta=1e-5)
    assert spent_epsilon(multiplier=0.0, rate=0.1, steps=1, delta=1e-5) == math.inf


def test_the_private_student_says_what_it_has_spent(monkeypatch):
    swing: Any = get_system("swing").make(dp_delta=1e-5, dp_noise=1.3, batch_size=50, accumulate=2)
    asked = {}
    monkeypatch.setattr(privacy, "spent_epsilon", lambda **values: asked.update(values) or 3.5)
    stage = SimpleNamespace(steps=40, evaluate=lambda: {"perplexity": 2.0})
    task: Any = SimpleNamespace(vocab_size=31, windows=SimpleNamespace(train=range(1000)), train=lambda *_: stage)
    assert swing.private_student(task).evaluate() == {"perplexity": 2.0, "epsilon": 3.5}
    assert asked == {"multiplier": 1.3, "rate": 0.05, "steps": 80, "delta": 1e-5}
    plain: Any = SimpleNamespace(steps=40, evaluate=None)
    task.train = lambda *_: plain
    assert get_system("swing").make().private_student(task).evaluate is None


# -- the system -----------------------------------------------------------------------------------------------------


def test_a_budget_is_a_scale():
    swing: Any = get_system("swing")
    assert swing.make(epsilon=8.0).noise_options()["scale"] == 0.25
    assert swing.make(noise_scale=0.1).noise_options()["scale"] == 0.1
    assert swing.make().noise_options()["support"] is None and swing(teacher="a", data="b").noise_support == 20
