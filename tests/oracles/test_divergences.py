"""Row divergences against closed forms, brute force in numpy/scipy, torch's own losses and finite differences.

Shapes: N rows, V classes. Suffix-free names are numpy.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from stillhouse.losses import (
    AlphaBeta,
    ForwardKL,
    InterpolatedForwardKL,
    JensenShannon,
    ReverseKL,
    SkewedForwardKL,
    SkewedReverseKL,
    ToDi,
    TotalVariation,
    align_vocabulary,
    reduce,
    value_and_grad,
)

Brute = Callable[[np.ndarray, np.ndarray], float]


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(scipy.special.rel_entr(p, q).sum())


def brute_jensen_shannon(beta: float) -> Brute:
    return lambda p, q: beta * kl(p, beta * p + (1 - beta) * q) + (1 - beta) * kl(q, beta * p + (1 - beta) * q)


def brute_alpha_beta(a: float, b: float) -> Brute:
    """Cichocki et al. (2011), the definition and its limits, term by term as printed."""
    if a == 0 and b == 0:
        return lambda p, q: float(0.5 * ((np.log(p) - np.log(q)) ** 2).sum())
    if a == 0:
        return lambda p, q: float((q**b * np.log(q**b / p**b) - q**b + p**b).sum() / b**2)
    if b == 0:
        return lambda p, q: float((p**a * np.log(p**a / q**a) - p**a + q**a).sum() / a**2)
    if a + b == 0:
        return lambda p, q: float((np.log(q**a / p**a) + (q**a / p**a) ** -1 - 1).sum() / a**2)
    return lambda p, q: float(-(p**a * q**b - a / (a + b) * p ** (a + b) - b / (a + b) * q ** (a + b)).sum() / (a * b))


ALPHA_BETA = [
    *((1.0, 0.0), (0.0, 1.0), (0.0, 0.0), (0.5, 0.5), (1.0, 1.0), (0.2, 0.7)),
    *((0.0, 0.4), (0.4, 0.0), (0.5, -0.5), (-0.3, 0.3), (-0.5, 1.2), (1.2, -0.5)),
]
MEMBERS: list[tuple[object, Brute]] = [
    (ForwardKL(), kl),
    (ReverseKL(), lambda p, q: kl(q, p)),
    (JensenShannon(), brute_jensen_shannon(0.5)),
    (JensenShannon(beta=0.1), brute_jensen_shannon(0.1)),
    (JensenShannon(beta=0.9), brute_jensen_shannon(0.9)),
    (SkewedForwardKL(), lambda p, q: kl(p, 0.1 * p + 0.9 * q)),
    (SkewedForwardKL(alpha=0.0), kl),
    (SkewedForwardKL(alpha=0.7), lambda p, q: kl(p, 0.7 * p + 0.3 * q)),
    (SkewedReverseKL(), lambda p, q: kl(q, 0.1 * q + 0.9 * p)),
    (SkewedReverseKL(alpha=0.0), lambda p, q: kl(q, p)),
    (SkewedReverseKL(alpha=0.7), lambda p, q: kl(q, 0.7 * q + 0.3 * p)),
    (TotalVariation(), lambda p, q: float(0.5 * np.abs(p - q).sum())),
    *((AlphaBeta(alpha=a, beta=b), brute_alpha_beta(a, b)) for a, b in ALPHA_BETA),
]
DIVERGENCES = [divergence for divergence, _ in MEMBERS]
# Tame exponents: the others grow without bound where probabilities vanish.
BOUNDED = [d for d in DIVERGENCES if not isinstance(d, AlphaBeta) or (d.alpha >= 0.2 and d.beta >= 0.2)]


def name(divergence: object) -> str:
    return repr(divergence).replace("temperature=1.0, scale_by_t2=True", "").replace("(, ", "(")


def logits(seed: int, *shape: int, scale: float = 2.0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("divergence", "brute"), MEMBERS, ids=[name(d) for d in DIVERGENCES])
def test_values_against_brute_force(divergence, brute):
    student_NV, teacher_NV = logits(0, 5, 7), logits(1, 5, 7)
    for temperature, scale_by_t2 in ((1.0, True), (2.5, True), (2.5, False)):
        softened = dataclasses.replace(divergence, temperature=temperature, scale_by_t2=scale_by_t2)
        q = scipy.special.softmax(student_NV.numpy() / temperature, -1)
        p = scipy.special.softmax(teacher_NV.numpy() / temperature, -1)
        expected = np.array([brute(*row) for row in zip(p, q, strict=True)])
        expected *= temperature**2 if scale_by_t2 else 1.0
        np.testing.assert_allclose(softened(student_NV, teacher_NV).numpy(), expected, rtol=1e-9)
        np.testing.assert_allclose(value_and_grad(softened, student_NV, teacher_NV)[0], expected, rtol=1e-9)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_gradients_against_finite_differences(divergence, temperature):
    divergence = dataclasses.replace(divergence, temperature=temperature)
    student_NV, teacher_NV = logits(2, 3, 5), logits(3, 3, 5)
    _, grad_NV = value_and_grad(divergence, student_NV, teacher_NV)
    step = 1e-5
    for column in range(5):
        shift_V = torch.zeros(5, dtype=torch.float64)
        shift_V[column] = step
        slope_N = (divergence(student_NV + shift_V, teacher_NV) - divergence(student_NV - shift_V, teacher_NV)) / (
            2 * step
        )
        torch.testing.assert_close(grad_NV[:, column], slope_N, rtol=1e-6, atol=1e-8)
    for leaf_NV, other_NV, swap in ((student_NV, teacher_NV, False), (teacher_NV, student_NV, True)):
        leaf_NV = leaf_NV.clone().requires_grad_()
        assert torch.autograd.gradcheck(
            lambda x, o=other_NV, s=swap: divergence(o, x) if s else divergence(x, o), (leaf_NV,)
        )


@pytest.mark.parametrize(
    "divergence", [*DIVERGENCES, ToDi(), ToDi(temperature=2.0), InterpolatedForwardKL(t=0.3)], ids=name
)
def test_closed_form_gradient_is_autograds(divergence):
    for scale in (0.1, 1.0, 10.0):
        student_NV = logits(4, 6, 9, scale=scale).requires_grad_()
        teacher_NV = logits(5, 6, 9, scale=scale)
        loss_N = divergence(student_NV, teacher_NV)
        (grad_NV,) = torch.autograd.grad(loss_N.sum(), student_NV)
        before = student_NV.detach().clone(), teacher_NV.clone()
        closed_N, closed_NV = value_and_grad(divergence, student_NV, teacher_NV)
        torch.testing.assert_close(closed_N, loss_N.detach(), rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(closed_NV, grad_NV, rtol=1e-8, atol=1e-11)
        assert not closed_NV.requires_grad
        assert torch.equal(before[0], student_NV)
        assert torch.equal(before[1], teacher_NV)


def test_two_classes_by_hand():
    """q = sigmoid(x), p = sigmoid(y): every member in one variable."""
    x, y = 0.4, -1.3
    q, p = 1 / (1 + math.exp(-x)), 1 / (1 + math.exp(-y))
    student_V, teacher_V = torch.tensor([[x, 0.0], [y, 0.0]], dtype=torch.float64)

    def kl2(a: float, b: float) -> float:
        return a * math.log(a / b) + (1 - a) * math.log((1 - a) / (1 - b))

    bhattacharyya = math.sqrt(p * q) + math.sqrt((1 - p) * (1 - q))
    for divergence, value, slope in (
        (ForwardKL(), kl2(p, q), q - p),
        (ReverseKL(), kl2(q, p), q * (1 - q) * (x - y)),
        (TotalVariation(), q - p, q * (1 - q)),
        (JensenShannon(), (kl2(p, (p + q) / 2) + kl2(q, (p + q) / 2)) / 2, None),
        (SkewedForwardKL(alpha=0.2), kl2(p, 0.2 * p + 0.8 * q), None),
        (AlphaBeta(alpha=1, beta=1), (p - q) ** 2, 2 * (q - p) * q * (1 - q)),
        (AlphaBeta(alpha=0.5, beta=0.5), 4 * (1 - bhattacharyya), None),
    ):
        loss, grad_V = value_and_grad(divergence, student_V, teacher_V)
        assert loss.item() == pytest.approx(value, rel=1e-12)
        if slope is not None:
            assert grad_V[0].item() == pytest.approx(slope, rel=1e-12)
        assert grad_V.sum().item() == pytest.approx(0, abs=1e-15)


def test_numbers_of_card_151():
    """p = [.7, .2, .1] is the teacher, q = [.3, .4, .3] the student."""
    teacher_V, student_V = torch.tensor([0.7, 0.2, 0.1]).log(), torch.tensor([0.3, 0.4, 0.3]).log()
    for divergence, value in (
        (ForwardKL(), 0.34462),
        (ReverseKL(), 0.35265),
        (JensenShannon(), 0.08429),
        (TotalVariation(), 0.4),
        (SkewedForwardKL(alpha=0.1), 0.27416),
        (SkewedReverseKL(alpha=0.9), 0.00367),
        (SkewedReverseKL(alpha=0.1), 0.27748),
    ):
        assert divergence(student_V, teacher_V).item() == pytest.approx(value, abs=6e-6)


def test_against_torch_and_scipy():
    student_NV, teacher_NV = logits(6, 4, 30), logits(7, 4, 30)
    log_q_NV, log_p_NV = student_NV.log_softmax(-1), teacher_NV.log_softmax(-1)
    forward = F.kl_div(log_q_NV, log_p_NV, log_target=True, reduction="none").sum(-1)
    reverse = F.kl_div(log_p_NV, log_q_NV, log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(ForwardKL()(student_NV, teacher_NV), forward)
    torch.testing.assert_close(ReverseKL()(student_NV, teacher_NV), reverse)
    for k in range(4):
        entropy = scipy.stats.entropy(log_p_NV[k].exp(), log_q_NV[k].exp())
        assert ForwardKL()(student_NV, teacher_NV)[k].item() == pytest.approx(entropy)
        distance = scipy.spatial.distance.jensenshannon(log_p_NV[k].exp(), log_q_NV[k].exp())
        assert JensenShannon()(student_NV, teacher_NV)[k].item() == pytest.approx(distance**2)


# --- limits -------------------------------------------------------------------------------------------------


def test_jensen_shannon_ends():
    student_NV, teacher_NV = logits(8, 4, 6), logits(9, 4, 6)
    beta = 1e-7
    to_forward = JensenShannon(beta=beta)(student_NV, teacher_NV) / beta
    to_reverse = JensenShannon(beta=1 - beta)(student_NV, teacher_NV) / beta
    torch.testing.assert_close(to_forward, ForwardKL()(student_NV, teacher_NV), rtol=1e-4, atol=0)
    torch.testing.assert_close(to_reverse, ReverseKL()(student_NV, teacher_NV), rtol=1e-4, atol=0)


def test_jensen_shannon_is_symmetric_only_in_the_middle():
    student_NV, teacher_NV = logits(8, 4, 6), logits(9, 4, 6)
    middle, side = JensenShannon(beta=0.5), JensenShannon(beta=0.3)
    torch.testing.assert_close(middle(student_NV, teacher_NV), middle(teacher_NV, student_NV))
    assert not torch.allclose(side(student_NV, teacher_NV), side(teacher_NV, student_NV), rtol=1e-3)
    swapped = dataclasses.replace(side, beta=0.7)(teacher_NV, student_NV)
    torch.testing.assert_close(side(student_NV, teacher_NV), swapped)
    assert (middle(20 * student_NV, 20 * teacher_NV) <= math.log(2) + 1e-12).all()


def test_skewed_kl_is_bounded():
    student_NV, teacher_NV = logits(8, 4, 6, scale=300), logits(9, 4, 6, scale=300)
    assert (ForwardKL()(student_NV, teacher_NV) > 10).all()
    for skewed in (SkewedForwardKL(alpha=0.1), SkewedReverseKL(alpha=0.1)):
        assert (skewed(student_NV, teacher_NV) <= -math.log(0.1) + 1e-12).all()
    for skewed in (SkewedForwardKL(alpha=1 - 1e-9), SkewedReverseKL(alpha=1 - 1e-9)):
        assert (skewed(student_NV, teacher_NV) < 1e-6).all()


@pytest.mark.parametrize(
    ("near", "limit"),
    [
        ((1, 1e-6), (1, 0)),
        ((1e-6, 1), (0, 1)),
        ((1e-6, 0.4), (0, 0.4)),
        ((0.4, -1e-6), (0.4, 0)),
        ((0.5, -0.5 + 1e-6), (0.5, -0.5)),
        ((1e-4, -3e-5), (0, 0)),
        ((1e-6, -1e-6 + 1e-9), (1e-6, -1e-6)),
    ],
)
def test_alpha_beta_is_continuous_in_its_limits(near, limit):
    student_NV, teacher_NV = logits(10, 4, 6), logits(11, 4, 6)
    at = [value_and_grad(AlphaBeta(alpha=a, beta=b), student_NV, teacher_NV) for a, b in (near, limit)]
    torch.testing.assert_close(at[0][0], at[1][0], rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(at[0][1], at[1][1], rtol=1e-3, atol=1e-4)


def test_alpha_beta_special_cases_and_duality():
    student_NV, teacher_NV = logits(10, 4, 6), logits(11, 4, 6)
    q_NV, p_NV = student_NV.softmax(-1), teacher_NV.softmax(-1)

    def alpha_beta(a: float, b: float) -> torch.Tensor:
        return AlphaBeta(alpha=a, beta=b)(student_NV, teacher_NV)

    torch.testing.assert_close(alpha_beta(1, 0), ForwardKL()(student_NV, teacher_NV))
    torch.testing.assert_close(alpha_beta(0, 1), ReverseKL()(student_NV, teacher_NV))
    torch.testing.assert_close(alpha_beta(1, 1), 0.5 * (p_NV - q_NV).square().sum(-1))
    torch.testing.assert_close(alpha_beta(0.5, 0.5), 2 * (p_NV.sqrt() - q_NV.sqrt()).square().sum(-1))
    torch.testing.assert_close(alpha_beta(-1, 2), 0.5 * ((q_NV - p_NV).square() / p_NV).sum(-1))
    for a, b in ALPHA_BETA:
        torch.testing.assert_close(alpha_beta(a, b), AlphaBeta(alpha=b, beta=a)(teacher_NV, student_NV))


def test_high_temperature_matches_centred_logits():
    """T^2 KL -> |centred logit difference|^2 / (2 V) as T -> infinity (Hinton et al., 2015, section 2.1)."""
    student_NV, teacher_NV = logits(12, 4, 6), logits(13, 4, 6)
    gap_NV = student_NV - teacher_NV
    expected_N = (gap_NV - gap_NV.mean(-1, keepdim=True)).square().sum(-1) / (2 * 6)
    for divergence in (ForwardKL, ReverseKL):
        loss_N = divergence(temperature=1e4)(student_NV, teacher_NV)
        torch.testing.assert_close(loss_N, expected_N, rtol=1e-3, atol=0)
    unscaled_N = ForwardKL(temperature=100.0, scale_by_t2=False)(student_NV, teacher_NV)
    torch.testing.assert_close(ForwardKL(temperature=100.0)(student_NV, teacher_NV), 1e4 * unscaled_N)


# --- TAID (card 048) ----------------------------------------------------------------------------------------


def test_todi_is_both_kls_in_value_and_neither_in_gradient():
    """(p^2 - q^2) / (p + q) = p - q; the stopped weight makes another gradient of it."""
    student_NV, teacher_NV = logits(30, 6, 9), logits(31, 6, 9)
    loss_N, grad_NV = value_and_grad(ToDi(), student_NV, teacher_NV)
    forward, reverse = (value_and_grad(d, student_NV, teacher_NV) for d in (ForwardKL(), ReverseKL()))
    torch.testing.assert_close(loss_N, forward[0] + reverse[0])
    assert (grad_NV - forward[1] - reverse[1]).abs().max() > 0.1


def test_todi_s_weight_is_a_constant():
    """Jung et al. (2025): entry by entry, with the weight frozen at where the student stands."""
    student_NV, teacher_NV = logits(32, 4, 7).requires_grad_(), logits(33, 4, 7)
    q_NV, p_NV = student_NV.softmax(-1), teacher_NV.softmax(-1)
    weight_NV = (p_NV / (p_NV + q_NV)).detach()
    kept_N = (weight_NV * p_NV * (p_NV / q_NV).log() + (1 - weight_NV) * q_NV * (q_NV / p_NV).log()).sum(-1)
    (expected_NV,) = torch.autograd.grad(kept_N.sum(), student_NV, retain_graph=True)
    loss_N, grad_NV = value_and_grad(ToDi(), student_NV, teacher_NV)
    torch.testing.assert_close(loss_N, kept_N.detach())
    torch.testing.assert_close(grad_NV, expected_NV)
    moving_NV = p_NV / (p_NV + q_NV)
    free_N = (moving_NV * p_NV * (p_NV / q_NV).log() + (1 - moving_NV) * q_NV * (q_NV / p_NV).log()).sum(-1)
    (free_NV,) = torch.autograd.grad(free_N.sum(), student_NV)
    assert (grad_NV - free_NV).abs().max() > 0.02


def test_todi_takes_the_side_that_is_needed():
    """An entry the student hardly has gets forward KL's pull, one the teacher hardly has reverse KL's push."""
    p, q = torch.tensor([0.9, 0.1 - 1e-9, 1e-9]).double(), torch.tensor([1e-9, 0.1, 0.9 - 1e-9]).double()
    pull, push = -p[0], q[2] * (1 + (q[2] / p[2]).log())  # q d loss / d q of forward KL there, and of reverse KL
    even = (p[1] * -0.5 + 0.5 * q[1]).item()  # where they agree: half of each
    terms = torch.stack([pull, torch.tensor(even).double(), push])
    grad_V = value_and_grad(ToDi(), q.log(), p.log())[1]
    torch.testing.assert_close(grad_V, terms - q * terms.sum(), rtol=1e-6, atol=1e-7)


def test_near_the_teacher_todi_pulls_three_quarters_as_strongly_as_both():
    """For log p - log q = g small, a = 1/2 + g/4: q d loss / d q = -3/2 q g, and -q g for each of the two KLs."""
    q = torch.tensor([0.2, 0.5, 0.3]).double()
    p = q + 1e-5 * torch.tensor([1.0, -2.0, 1.0])
    grad_V, forward_V, reverse_V = (
        value_and_grad(divergence, q.log(), p.log())[1] for divergence in (ToDi(), ForwardKL(), ReverseKL())
    )
    torch.testing.assert_close(grad_V, 0.75 * (forward_V + reverse_V), rtol=1e-3, atol=0)


def test_taid_by_hand():
    z_s_V, z_p_V = torch.tensor([0.0, 0.0]), torch.tensor([2.0, 0.0])
    expected_V = torch.tensor([-0.2311, 0.2311])
    loss, grad_V = value_and_grad(InterpolatedForwardKL(t=0.5), z_s_V, z_p_V)
    torch.testing.assert_close(grad_V, expected_V, atol=5e-5, rtol=0)
    assert loss.item() == pytest.approx(math.log(2))  # a cross-entropy: the KL would be 0.1109
    z_s_V.requires_grad_()
    InterpolatedForwardKL(t=0.5)(z_s_V, z_p_V).backward()
    torch.testing.assert_close(z_s_V.grad, expected_V, atol=5e-5, rtol=0)


def test_taid_ends():
    student_NV, teacher_NV = logits(14, 5, 8).requires_grad_(), logits(15, 5, 8)
    p_NV = teacher_NV.softmax(-1)
    entropy_N = -(p_NV * p_NV.log()).sum(-1)
    (forward_NV,) = torch.autograd.grad(ForwardKL()(student_NV, teacher_NV).sum(), student_NV)
    at_one_N = InterpolatedForwardKL(t=1.0)(student_NV, teacher_NV)
    torch.testing.assert_close(at_one_N, ForwardKL()(student_NV, teacher_NV) + entropy_N)
    torch.testing.assert_close(torch.autograd.grad(at_one_N.sum(), student_NV)[0], forward_NV)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_taid_gradient_at_zero_is_exactly_zero(dtype):
    student_NV = logits(14, 50, 333, scale=8).to(dtype).requires_grad_()
    teacher_NV = logits(15, 50, 333, scale=8).to(dtype)
    loss_N = InterpolatedForwardKL(t=0.0)(student_NV, teacher_NV)
    loss_N.sum().backward()
    assert (loss_N > 0).all()
    assert student_NV.grad.count_nonzero() == 0
    assert value_and_grad(InterpolatedForwardKL(t=0.0), student_NV, teacher_NV)[1].count_nonzero() == 0


def test_taid_small_gap():
    """grad TAID(t) = t grad KL + O(gap^2): the error shrinks a hundredfold when the gap shrinks tenfold."""
    student_NV, direction_NV = logits(16, 5, 8), logits(17, 5, 8)
    errors = []
    for gap in (1e-2, 1e-3):
        teacher_NV = student_NV + gap * direction_NV
        taid_NV = value_and_grad(InterpolatedForwardKL(t=0.3), student_NV, teacher_NV)[1]
        kl_NV = value_and_grad(ForwardKL(), student_NV, teacher_NV)[1]
        errors.append((taid_NV - 0.3 * kl_NV).abs().max().item())
    assert 50 < errors[0] / errors[1] < 200


# --- properties ---------------------------------------------------------------------------------------------

rows = st.lists(st.tuples(st.floats(-20, 20, width=32), st.floats(-20, 20, width=32)), min_size=2, max_size=12).map(
    lambda pairs: tuple(torch.tensor(pairs, dtype=torch.float64).T.contiguous())
)


@settings(deadline=None, max_examples=60)
@given(pair=rows, shift=st.floats(-1e3, 1e3))
def test_properties(pair, shift):
    student_V, teacher_V = pair
    for divergence in (*DIVERGENCES, ToDi()):
        loss, grad_V = value_and_grad(divergence, student_V, teacher_V)
        size = max(1.0, loss.item(), grad_V.abs().max().item())
        assert loss >= -1e-9 * size
        assert abs(grad_V.sum().item()) <= 1e-9 * size
        equal, equal_grad_V = value_and_grad(divergence, student_V, student_V.clone())
        assert abs(equal.item()) <= 1e-9
        assert equal_grad_V.abs().max().item() <= 1e-9
        moved = divergence(student_V + shift, teacher_V - shift)
        torch.testing.assert_close(moved, loss, rtol=1e-6, atol=1e-9)
    taid, moved = (InterpolatedForwardKL(t=0.3)(student_V + s, teacher_V - s) for s in (0.0, shift))
    torch.testing.assert_close(moved, taid, rtol=1e-6, atol=1e-9)
    tv = TotalVariation()(student_V, teacher_V).item()
    assert 0 <= tv <= 1 + 1e-12
    for pinsker in (ForwardKL(), ReverseKL()):
        assert tv <= math.sqrt(pinsker(student_V, teacher_V).item() / 2) + 1e-7
    assert JensenShannon()(student_V, teacher_V).item() <= math.log(2) * tv + 1e-9  # Lin (1991), theorem 3


@settings(deadline=None, max_examples=30)
@given(pair=rows, temperature=st.floats(0.2, 20))
def test_temperature_divides_logits(pair, temperature):
    student_V, teacher_V = pair
    for divergence in (ForwardKL(), TotalVariation(), ToDi(), AlphaBeta(alpha=0.3, beta=0.6)):
        softened = dataclasses.replace(divergence, temperature=temperature)
        expected = temperature**2 * divergence(student_V / temperature, teacher_V / temperature)
        torch.testing.assert_close(softened(student_V, teacher_V), expected)


# --- precision and shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("divergence", [*BOUNDED, ToDi(), InterpolatedForwardKL(t=0.5)], ids=name)
def test_huge_logits_stay_finite_and_right(divergence):
    student_NV = torch.tensor([[1e4, -1e4, 0.0], [0.0, 300.0, -300.0], [-500.0, 0.0, 500.0], [9e3, 9e3, 0.0]])
    teacher_NV = torch.tensor([[-1e4, 1e4, 0.0], [0.0, -300.0, 300.0], [-500.0, 1.0, 500.0], [9e3, 0.0, 9e3]])
    student_NV.requires_grad_()
    loss_N = divergence(student_NV, teacher_NV)
    (grad_NV,) = torch.autograd.grad(loss_N.sum(), student_NV)
    closed_N, closed_NV = value_and_grad(divergence, student_NV, teacher_NV)
    exact_N, exact_NV = value_and_grad(divergence, student_NV.double(), teacher_NV.double())
    for value, exact in ((loss_N, exact_N), (closed_N, exact_N), (grad_NV, exact_NV), (closed_NV, exact_NV)):
        assert value.isfinite().all()
        torch.testing.assert_close(value.double(), exact, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("divergence", [*BOUNDED, ToDi(), InterpolatedForwardKL(t=0.5)], ids=name)
def test_half_precision_is_computed_in_float32(divergence):
    for dtype in (torch.bfloat16, torch.float16):
        student_NV, teacher_NV = logits(18, 2, 3, 40).to(dtype), logits(19, 2, 3, 40).to(dtype)
        loss_N = divergence(student_NV.requires_grad_(), teacher_NV)
        assert loss_N.shape == (2, 3)
        assert loss_N.dtype == torch.float32
        assert torch.equal(loss_N, divergence(student_NV.float(), teacher_NV.float()))
        assert value_and_grad(divergence, student_NV, teacher_NV)[1].dtype == torch.float32
    student_NV, teacher_NV = logits(18, 4, 9), logits(19, 4, 9)
    assert divergence(student_NV, teacher_NV).dtype == torch.float64
    assert divergence(student_NV.float(), teacher_NV).dtype == torch.float64


def test_any_callable_is_a_divergence():
    """The autograd fallback, on the symmetrised KL of card 083."""
    student_NV, teacher_NV = logits(20, 4, 9).requires_grad_(), logits(21, 4, 9)
    loss_N, grad_NV = value_and_grad(
        lambda s, t: 0.5 * ForwardKL()(s, t) + 0.5 * ReverseKL()(s, t), student_NV, teacher_NV
    )
    parts = [value_and_grad(d, student_NV, teacher_NV) for d in (ForwardKL(), ReverseKL())]
    torch.testing.assert_close(loss_N, 0.5 * (parts[0][0] + parts[1][0]))
    torch.testing.assert_close(grad_NV, 0.5 * (parts[0][1] + parts[1][1]))
    with torch.no_grad():
        assert torch.equal(value_and_grad(lambda s, t: ForwardKL()(s, t), student_NV, teacher_NV)[0], parts[0][0])
    assert student_NV.grad is None
    assert not loss_N.requires_grad


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ForwardKL(temperature=0.0), "temperature must be a positive number, got 0.0"),
        (lambda: ReverseKL(temperature=math.nan), "temperature"),
        (lambda: JensenShannon(beta=0.0), "ForwardKL"),
        (lambda: JensenShannon(beta=1.0), "ReverseKL"),
        (lambda: SkewedForwardKL(alpha=1.0), "alpha must lie in"),
        (lambda: SkewedReverseKL(alpha=-0.1), "alpha must lie in"),
        (lambda: AlphaBeta(alpha=math.inf, beta=0.0), "must be finite"),
        (lambda: AlphaBeta(alpha=1.0, beta=0.0, temperature=-1.0), "temperature"),
        (lambda: InterpolatedForwardKL(t=1.1), "t must lie between 0 and 1"),
    ],
)
def test_bad_hyper_parameters(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# --- reduce, align_vocabulary -------------------------------------------------------------------------------


def test_reduce():
    loss_N = torch.tensor([1.0, 2.0, 4.0])
    assert reduce(loss_N).item() == pytest.approx(7 / 3)
    assert reduce(loss_N, reduction="sum").item() == 7
    assert torch.equal(reduce(loss_N, reduction="none"), loss_N)
    mask_N = torch.tensor([True, False, True])
    assert reduce(loss_N, weight=mask_N).item() == 2.5
    weight_N = torch.tensor([0.5, 0.0, 2.0])
    assert reduce(loss_N, weight=weight_N).item() == pytest.approx(8.5 / 2.5)
    assert reduce(loss_N, weight=weight_N, reduction="sum").item() == 8.5
    assert reduce(loss_N, weight=weight_N, reduction="none").tolist() == [0.5, 0.0, 8.0]
    assert reduce(loss_N, weight=torch.tensor([2, 0, 2])).item() == 2.5
    with pytest.raises(ValueError, match="'mean', 'sum' or 'none', got 'batchmean'"):
        reduce(loss_N, reduction="batchmean")
    with pytest.raises(ValueError, match=r"weight has shape \(2,\), the losses \(3,\)"):
        reduce(loss_N, weight=torch.ones(2))


def test_reduce_without_any_weight_is_zero():
    loss_N = torch.tensor([1.0, math.inf, math.nan], requires_grad=True)
    total = reduce(loss_N, weight=torch.zeros(3))
    total.backward()
    assert total.item() == 0
    assert loss_N.grad.tolist() == [0, 0, 0]
    assert reduce(loss_N, weight=torch.tensor([1.0, 0.0, 0.0])).item() == 1  # padding may hold anything
    assert reduce(torch.zeros(0)).item() == 0


def test_align_vocabulary():
    student_BTV, teacher_BTV = torch.randn(2, 3, 10), torch.randn(2, 3, 12)
    for size, expected in ((None, 10), (9, 9), (10, 10)):
        cut = align_vocabulary(student_BTV, teacher_BTV, vocab_size=size)
        assert [x.shape[-1] for x in cut] == [expected, expected]
        assert torch.equal(cut[1], teacher_BTV[..., :expected])
        assert cut[0].data_ptr() == student_BTV.data_ptr()
    for size in (0, 11):
        with pytest.raises(ValueError, match="between 1 and 10"):
            align_vocabulary(student_BTV, teacher_BTV, vocab_size=size)
