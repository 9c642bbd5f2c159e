"""NKD (card 97): the label and the renormalised others apart, for classifiers and, in fused passes, for tokens."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse import Observed
from stillhouse.core.schedule import linear
from stillhouse.losses import ForwardKL, linear_divergence
from stillhouse.losses.divergences import reduce, value_and_grad
from stillhouse.losses.target_split import DKD, NKD, nontarget_cross_entropy, nontarget_log_softmax, only_label
from stillhouse.objectives.language import TokenMatch, head_of
from stillhouse.objectives.logits import LogitMatch
from stillhouse.systems import get_system

# The package exports the function under the name of its module.
MODULE = importlib.import_module("stillhouse.losses.linear_divergence")
V = 5


def drawn(seed: int, *shape: int, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def labels_of(seed: int, *shape: int, classes: int = V) -> Tensor:
    return torch.randint(classes, shape, generator=torch.Generator().manual_seed(seed))


def others(values: list[float], y: int, temperature: float) -> list[float]:
    """The softened distribution over all but ``y``, by hand; 0 at ``y``."""
    raised = [0.0 if i == y else math.exp(v / temperature) for i, v in enumerate(values)]
    return [value / sum(raised) for value in raised]


# -- the divergence -------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 100), gamma=st.floats(0, 4), temperature=st.floats(0.5, 4))
@settings(max_examples=30, deadline=None)
def test_row_by_row_against_a_loop(seed, gamma, temperature):
    z, t, y = drawn(seed, 6, V), drawn(seed + 500, 6, V), labels_of(seed, 6)
    found = NKD(gamma=gamma, temperature=temperature).given(y)(z, t)
    for row in range(6):
        label, q_all, p_all = int(y[row]), z[row].softmax(-1).tolist(), t[row].softmax(-1).tolist()
        qh, ph = (others(side[row].tolist(), label, temperature) for side in (z, t))
        rest = -sum(p * math.log(q) for i, (p, q) in enumerate(zip(ph, qh, strict=True)) if i != label)
        expected = -p_all[label] * math.log(q_all[label]) + gamma * temperature**2 * rest
        assert found[row].item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("make", [NKD, DKD])
def test_the_closed_form_is_autograd_s(make):
    divergence = make(temperature=2.5).given(labels_of(1, 6))
    z, t = drawn(1, 6, V).requires_grad_(), drawn(2, 6, V)
    loss = divergence(z, t)
    (expected,) = torch.autograd.grad(loss.sum(), z)
    for overwrite in (False, True):
        value, grad = value_and_grad(divergence, z.detach().clone(), t.clone(), overwrite=overwrite)
        torch.testing.assert_close(value, loss.detach())
        torch.testing.assert_close(grad, expected)


def test_the_others_leave_the_label_s_logit_alone():
    """The gradient of the non-target part: exactly 0 at the label, gamma (q^ - p^) elsewhere at T = 1."""
    z, t, y = drawn(3, 6, V).requires_grad_(), drawn(4, 6, V), labels_of(3, 6)
    mask = only_label(y, z)
    whole, target = NKD(gamma=1.7).given(y), NKD(gamma=0.0).given(y)
    (grad,) = torch.autograd.grad((whole(z, t) - target(z, t)).sum(), z)
    assert grad[mask].abs().max() <= 1e-15
    qh, ph = (nontarget_log_softmax(side, mask).exp() for side in (z.detach(), t))
    torch.testing.assert_close(grad, 1.7 * (qh - ph))


def test_plain_kd_s_others_pull_the_label_down_even_when_they_agree():
    """What the renormalisation is for: where q^ = p^ but q_y > p_y, -sum p_i log q_i has the gradient q_y (1 - p_y)."""
    t, y = drawn(5, 6, V), labels_of(5, 6)
    mask = only_label(y, t)
    z = (t + 3.0 * mask).requires_grad_()  # the same odds among the others
    p = t.softmax(-1)
    (plain,) = torch.autograd.grad(-(p * z.log_softmax(-1)).masked_fill(mask, 0).sum(), z)
    torch.testing.assert_close(plain[mask], (z.detach().softmax(-1) * (1 - p))[mask])
    assert plain[mask].min() > 0.01
    (normalised,) = torch.autograd.grad((NKD().given(y)(z, t) - NKD(gamma=0.0).given(y)(z, t)).sum(), z)
    assert normalised.abs().max() < 1e-12


def test_its_least_value_is_the_entropy_of_the_teacher_s_others():
    t, y = drawn(6, 6, V), labels_of(6, 6)
    ph = nontarget_log_softmax(t, only_label(y, t), temperature=3.0).exp()
    entropy = -torch.special.xlogy(ph, ph).sum(-1)
    shifted = NKD(gamma=2.0, temperature=3.0).given(y)(t + 1.3, t) - NKD(gamma=0.0).given(y)(t + 1.3, t)
    torch.testing.assert_close(shifted, 2.0 * 9.0 * entropy)


def test_kd_taken_apart():
    """-sum p log q = -p_y log q_y - (1 - p_y) log(1 - q_y) + (1 - p_y) CE(p^, q^)."""
    z, t, y = drawn(7, 6, V), drawn(8, 6, V), labels_of(7, 6)
    p, mask = t.softmax(-1), only_label(y, t)
    p_y, q_y = p[mask], z.softmax(-1)[mask]
    ce = NKD(gamma=1.0).given(y)(z, t) + p_y * q_y.log()
    found = -p_y * q_y.log() - (1 - p_y) * (1 - q_y).log() + (1 - p_y) * ce
    torch.testing.assert_close(found, -(p * z.log_softmax(-1)).sum(-1))


def test_decoupled_kd_is_kd_where_the_others_count_by_their_share():
    z, t, y = drawn(9, 1, V), drawn(10, 1, V), labels_of(9, 1)
    share = 1 - float((t / 2.0).softmax(-1)[0, y[0]])
    found = DKD(alpha=1.0, beta=share, temperature=2.0).given(y)(z, t)
    torch.testing.assert_close(found, ForwardKL(temperature=2.0)(z, t))
    torch.testing.assert_close(DKD().given(y)(t, t), torch.zeros(1, dtype=torch.float64))


def test_one_other_class_has_nothing_to_match():
    y = torch.tensor([0])
    value, grad = value_and_grad(NKD(gamma=5.0).given(y), drawn(1, 1, 2), drawn(2, 1, 2))
    q_y, p_y = drawn(1, 1, 2).softmax(-1)[0, 0], drawn(2, 1, 2).softmax(-1)[0, 0]
    assert value.item() == pytest.approx(float(-p_y * q_y.log()))
    assert torch.isfinite(grad).all()


def test_overfitted_alone_the_others_reach_the_teacher_s_for_any_certainty():
    t, y = drawn(11, 4, V), labels_of(11, 4)
    z = drawn(12, 4, V).requires_grad_()
    mask = only_label(y, t)
    before = z.detach()[mask].clone()
    ph = nontarget_log_softmax(t, mask).exp()
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(400):
        optimizer.zero_grad()
        nontarget_cross_entropy(nontarget_log_softmax(z, mask), ph, mask).sum().backward()
        optimizer.step()
    qh = nontarget_log_softmax(z.detach(), mask)
    assert float(torch.special.xlogy(ph, ph).sum() - (ph * qh.masked_fill(mask, 0)).sum()) < 0.01  # KL, four rows
    assert torch.equal(z.detach()[mask], before)


def test_bad_values_are_refused():
    with pytest.raises(ValueError, match="temperature must be a positive number"):
        NKD(temperature=0.0)
    with pytest.raises(ValueError, match=r"NKD needs the rows' labels"):
        NKD()(drawn(0, 2, V), drawn(1, 2, V))


# -- in fused passes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [NKD, DKD])
@pytest.mark.parametrize("chunk", [1, 3, None])
def test_fused_equals_full_logits(make, chunk, monkeypatch):
    """Whatever the chunks and blocks: every row is judged by its own label; ignored ones and weight 0 take no part."""
    monkeypatch.setattr(MODULE, "BLOCK_BYTES_CPU", 4 * V * 2)
    N, D, E = 9, 4, 6
    hidden, weight = drawn(1, N, D).requires_grad_(), drawn(2, V, D).requires_grad_()
    t_hidden, t_weight, y = drawn(3, N, E), drawn(4, V, E), labels_of(5, N)
    y[2], w = -100, torch.tensor([1.0, 0, 1, 2, 1, 1, 0, 1, 0.5], dtype=torch.float64)
    divergence = make(temperature=1.5)
    result = linear_divergence(
        hidden,
        weight,
        t_hidden,
        t_weight,
        divergence=divergence,
        labels_N=y,
        weight_N=w,
        divergence_weight=0.7,
        cross_entropy_weight=0.4,
        chunk_tokens=chunk,
    )
    found = torch.autograd.grad(result.loss, (hidden, weight))
    z, known = hidden @ weight.T, y != -100
    rows = divergence.given(y.where(known, 0))(z, t_hidden @ t_weight.T)
    own = reduce(rows, weight=w * known)
    ce = reduce(F.cross_entropy(z, y, reduction="none"), weight=w * known)
    torch.testing.assert_close(result.divergence, own.detach())
    expected = torch.autograd.grad(0.7 * own + 0.4 * ce, (hidden, weight))
    torch.testing.assert_close(found, expected)


def test_a_fused_pass_without_labels_is_refused():
    with pytest.raises(ValueError, match="NKD asks for labels; pass labels_N"):
        linear_divergence(drawn(1, 3, 2), drawn(2, V, 2), drawn(3, 3, 2), drawn(4, V, 2), divergence=NKD())


# -- in objectives --------------------------------------------------------------------------------------------------


class Table(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits[inputs]


def test_classifiers_get_the_batch_s_labels_or_the_likeliest_of_a_mixture():
    z, t, y = drawn(1, 4, V), drawn(2, 4, V), labels_of(3, 4)
    student, teacher = Observed(Table(z)), Observed(Table(t), frozen=True)
    inputs = torch.arange(4)
    expected = NKD().given(y)(z, t)
    found = LogitMatch(student.output(), teacher.output(), NKD())({"inputs": inputs, "labels": y})
    torch.testing.assert_close(found, expected.mean())
    soft = 0.6 * F.one_hot(y, V).double() + 0.4 * F.one_hot((y + 1) % V, V)
    term = LogitMatch(student.output(), teacher.output(), NKD(), labels="soft_labels")
    torch.testing.assert_close(term({"inputs": inputs, "soft_labels": soft}), expected.mean())
    ignored = LogitMatch(student.output(), teacher.output(), NKD())
    y[1] = -100
    torch.testing.assert_close(ignored({"inputs": inputs, "labels": y}), expected[[0, 2, 3]].mean())
    with pytest.raises(KeyError, match="no 'labels'"):
        ignored({"inputs": inputs})


def test_its_fields_follow_schedules():
    z, t, y = drawn(1, 4, V), drawn(2, 4, V), labels_of(3, 4)
    term = LogitMatch(
        Observed(Table(z)).output(), Observed(Table(t), frozen=True).output(), NKD(), gamma=linear(0.0, 2.0)
    )
    found = term({"inputs": torch.arange(4), "labels": y}, 0.5)
    torch.testing.assert_close(found, NKD(gamma=1.0).given(y)(z, t).mean())


def llama(width: int) -> LlamaForCausalLM:
    torch.manual_seed(width)
    sizes = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


@pytest.mark.parametrize("cross_entropy", [0.0, 1.0])
def test_tokens_are_judged_by_the_next_one(cross_entropy):
    student, teacher = llama(8), llama(16)
    ids = labels_of(0, 2, 9, classes=32)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    term = TokenMatch(
        head_of(Observed(student)), head_of(Observed(teacher, frozen=True)), NKD(), cross_entropy=cross_entropy
    )
    term(batch).backward()
    found = student.lm_head.weight.grad.clone()
    student.zero_grad()
    z, t = (model(**batch).logits[:, :-1] for model in (student, teacher))
    rows = NKD().given(ids[:, 1:])(z, t.detach())
    rows = rows + cross_entropy * F.cross_entropy(z.transpose(1, 2), ids[:, 1:], reduction="none")
    reduce(rows, weight=mask[:, 1:]).backward()
    torch.testing.assert_close(found, student.lm_head.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["nkd", "nkd-lm"])
def test_the_systems_say_what_the_paper_says(name):
    made: Any = get_system(name).make(teacher="x", data="y")
    divergence = made.divergence()
    assert isinstance(divergence, NKD) and (divergence.gamma, divergence.temperature) == (1.5, 1.0)
    assert made.cross_entropy == made.weight == 1.0
    assert isinstance(get_system(name).make(teacher="x", data="y", loss="dkd").divergence(), DKD)  # type: ignore[attr-defined]
