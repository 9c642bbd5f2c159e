"""Policy-gradient losses, their averages, advantages and routes, against closed forms and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillhouse.losses.bucketed import certainty_weights, entropy, topk_bucket_jsd, topk_with_rest
from stillhouse.losses.policy_gradient import average_tokens, clipped_surrogate, kl_to_reference, truncated_ratio
from stillhouse.losses.token_logprobs import Head, token_logprobs
from stillhouse.rl.advantages import advantages, group_relative, has_guide, leave_one_out, route


def tensor(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


# -- the surrogate --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rho", "advantage", "expected", "flows"),
    [
        (1.0, 2.0, -2.0, True),
        (1.5, 1.0, -1.28, False),  # too far already in the good direction
        (0.5, 1.0, -0.5, True),  # the way back is open
        (0.5, -1.0, 0.8, False),
        (1.5, -1.0, 1.5, True),
    ],
)
def test_the_clip_by_hand(rho, advantage, expected, flows):
    logp = tensor(math.log(rho)).requires_grad_()
    loss = clipped_surrogate(logp, tensor(0.0), tensor(advantage), clip_low=0.2, clip_high=0.28)
    assert loss.item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(loss.sum(), logp)
    assert gradient.item() == pytest.approx(-rho * advantage if flows else 0.0)


def test_on_policy_its_gradient_is_reinforce():
    logp, advantage = tensor(-1.0, -2.0, -0.5).requires_grad_(), tensor(1.0, -2.0, 0.3)
    clipped_surrogate(logp, logp.detach(), advantage).sum().backward()
    torch.testing.assert_close(logp.grad, -advantage)


def test_the_truncated_ratio_has_no_gradient():
    logp = tensor(0.0, 1.0).requires_grad_()
    ratio = truncated_ratio(logp, tensor(0.0, -3.0), limit=2.0)
    assert not ratio.requires_grad and ratio.tolist() == [1.0, 2.0]


def test_kl_estimators_against_the_exact_one():
    """Under samples of p: k1 and k3 have the mean KL(p || r); k3 and k2 are never negative; k2's gradient is right."""
    torch.manual_seed(0)
    z_p = torch.randn(6, dtype=torch.float64, requires_grad=True)
    log_r = torch.randn(6, dtype=torch.float64).log_softmax(-1)
    log_p = z_p.log_softmax(-1)
    p = log_p.exp().detach()
    exact = (log_p.exp() * (log_p - log_r)).sum()
    means = {k: (p * kl_to_reference(log_p, log_r, estimator=k)).sum() for k in ("k1", "k2", "k3")}
    assert means["k1"].item() == pytest.approx(exact.item())
    assert means["k3"].item() == pytest.approx(exact.item())
    assert (kl_to_reference(log_p, log_r, estimator="k3") >= 0).all()
    assert (kl_to_reference(log_p, log_r, estimator="k2") >= 0).all()
    (wanted,) = torch.autograd.grad(exact, z_p, retain_graph=True)
    found = {k: torch.autograd.grad(mean, z_p, retain_graph=True)[0] for k, mean in means.items()}
    torch.testing.assert_close(found["k2"], wanted)
    assert not torch.allclose(found["k3"], wanted)
    assert found["k1"].abs().max() < 1e-12  # its gradient under samples is zero in the mean


def test_the_three_averages_by_hand():
    loss, row = tensor(1, 2, 3, 10), torch.tensor([0, 0, 0, 1])
    assert average_tokens(loss, row, 2, how="sequence").item() == (2 + 10) / 2
    assert average_tokens(loss, row, 2, how="token").item() == 16 / 4
    assert average_tokens(loss, row, 2, how="constant", constant=8).item() == 16 / 16
    assert average_tokens(loss, row, 3, how="sequence").item() == 4  # a row without tokens counts as zero
    with pytest.raises(ValueError, match="needs its constant"):
        average_tokens(loss, row, 2, how="constant")


# -- advantages and routes ------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1), min_size=2, max_size=8), st.floats(-3, 3), st.floats(0.5, 4))
@settings(max_examples=60, deadline=None)
def test_invariances(rewards, shift, scale):
    R = torch.tensor([rewards], dtype=torch.float64)
    for how in ("group", "group-mean", "leave-one-out"):
        found = advantages(R, how)
        assert abs(found.sum().item()) < 1e-5
        torch.testing.assert_close(advantages(R + shift, how), found, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(leave_one_out(scale * R), scale * leave_one_out(R))
    G = len(rewards)
    torch.testing.assert_close(leave_one_out(R), group_relative(R, std=False) * G / (G - 1))


def test_group_relative_by_hand():
    found = group_relative(tensor(1, 0, 0, 1)[None], eps=0.0)
    assert found.tolist()[0] == pytest.approx(
        [math.sqrt(3) / 2, -math.sqrt(3) / 2, -math.sqrt(3) / 2, math.sqrt(3) / 2]
    )
    assert group_relative(torch.zeros(2, 4)).abs().max() == 0 and group_relative(torch.ones(2, 4)).abs().max() == 0
    assert group_relative(torch.ones(3, 1)).tolist() == [[0.0]] * 3
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(torch.ones(3, 1))


@pytest.mark.parametrize(
    ("rewards", "distilled"),
    [([1, 0, 0, 1], [0, 1, 1, 0]), ([0, 0, 0, 0], [0, 0, 0, 0]), ([0, 1, 0, 0], [1, 0, 1, 1]), ([1, 1, 1, 1], [0] * 4)],
)
def test_the_routing_table(rewards, distilled):
    correct = torch.tensor([rewards]).bool()
    guided = has_guide(correct)
    z_group, z_distil = route(correct, guided)
    assert z_distil.tolist() == [distilled] and (z_group + z_distil == 1).all()
    if sum(rewards) == 1:
        assert not guided[0, rewards.index(1)]  # the single correct one has no guide, and goes to GRPO all the same
    assert route(correct, guided, "grpo")[1].sum() == 0
    assert torch.equal(route(correct, guided, "sdpo")[1], guided.float())
    both = route(correct, guided, "mix", mix=0.75)
    assert (both[0] == 0.75).all() and torch.equal(both[1], 0.25 * guided.float())


def test_feedback_is_a_guide_where_no_sibling_is():
    nobody = torch.zeros(1, 2).bool()
    assert route(nobody, torch.tensor([[True, False]]))[1].tolist() == [[1.0, 0.0]]


# -- divergences over a few tokens ----------------------------------------------------------------------------------


def full_jsd(p_z: Tensor, q_z: Tensor) -> Tensor:
    p, q = p_z.softmax(-1), q_z.softmax(-1)
    m = (p + q) / 2
    return 0.5 * ((p * (p / m).log()).sum(-1) + (q * (q / m).log()).sum(-1))


def test_bucketed_jsd():
    torch.manual_seed(1)
    p, q = 3 * torch.randn(2, 7, 9, dtype=torch.float64)
    full, before = full_jsd(p, q), torch.zeros(7, dtype=torch.float64)
    for k in range(1, 9):
        found = topk_bucket_jsd(p, q, k=k)
        assert (found <= full + 1e-12).all()  # data processing
        assert (found >= before - 1e-12).all()  # finer is never less
        before = found
    torch.testing.assert_close(topk_bucket_jsd(p, q, k=8), full)
    torch.testing.assert_close(topk_bucket_jsd(p, q, k=100), full)
    assert topk_bucket_jsd(p, p, k=3).abs().max() < 1e-12
    far = torch.full((1, 4), -40.0, dtype=torch.float64)
    one, two = far.clone(), far.clone()
    one[0, 0], two[0, 1] = 40, 40
    assert topk_bucket_jsd(one, two, k=2).item() == pytest.approx(math.log(2))


def test_bucketed_jsd_teaches_the_student_alone():
    torch.manual_seed(2)
    p, q = (torch.randn(3, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    topk_bucket_jsd(p, q, k=3).sum().backward()
    assert q.grad is None
    assert torch.autograd.gradcheck(lambda z: topk_bucket_jsd(z, q.detach(), k=3), (p,))


def test_a_tiny_rest_stays_exact():
    z = tensor(100.0, 0.0, -1.0)[None]
    rest = topk_with_rest(z, torch.tensor([[0]]))[0, 1].item()
    assert rest == pytest.approx(math.log(1 + math.exp(-1)) - 100)  # 1 - p would be 0 here


def test_certainty_weights_by_hand():
    q = tensor(0.97, 0.01, 0.01, 0.01).log()[None]
    uniform = torch.zeros(1, 4, dtype=torch.float64)
    H = entropy(torch.cat([q, uniform]))
    assert H.tolist() == pytest.approx([0.16770, 1.38629], abs=1e-5)
    assert torch.exp(-H).tolist() == pytest.approx([0.84561, 0.25], abs=1e-5)
    assert certainty_weights(H).tolist() == pytest.approx([1.54363, 0.45637], abs=1e-5)
    assert certainty_weights(H, beta=0.0).tolist() == [1.0, 1.0]
    assert certainty_weights(H[:0]).shape == (0,)


# -- log-probabilities in chunks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_chunks_change_nothing(softcap):
    torch.manual_seed(3)
    hidden, weight, bias = (
        torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((11, 4), (7, 4), (7,))
    )
    labels = torch.randint(0, 7, (11,))
    scale = torch.rand(11, dtype=torch.float64)

    def run(chunk: int | None) -> list[Tensor]:
        logp = token_logprobs(hidden, Head(weight, bias, 1.5, softcap), labels, temperature=0.7, chunk_tokens=chunk)
        return [logp, *torch.autograd.grad((scale * logp).sum(), (hidden, weight, bias))]

    z = 1.5 * (hidden @ weight.T + bias)
    z = z if softcap is None else softcap * torch.tanh(z / softcap)
    expected = (z / 0.7).log_softmax(-1)[torch.arange(11), labels]
    torch.testing.assert_close(run(None)[0], expected)
    for whole, parts in zip(run(None), run(3), strict=True):
        torch.testing.assert_close(whole, parts)
