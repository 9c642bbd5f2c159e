"""Logit leakage (card 024): the algebra of recovery, what a limited interface gives away, the student's frozen head."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from stillhouse import Observed, Player, TokenMatch
from stillhouse.base.errors import ConfigError, DataError, RunError
from stillhouse.losses.divergences import ForwardKL
from stillhouse.losses.sparse_divergence import linear_topk_divergence
from stillhouse.metrics.representations import linear_cka, procrustes_match
from stillhouse.models import new_causal_lm
from stillhouse.models.head_recovery import (
    fitting_width,
    logit_rank,
    low_rank_completion,
    principal_cosines,
    recover_head,
    recover_head_in_parts,
    with_frozen_head,
    without_mean,
)
from stillhouse.objectives import head_of
from stillhouse.tasks.leakage import _Answered, random_prompts, true_cosines
from stillhouse.teachers.cache import top_k
from stillhouse.teachers.logit_api import LogitAPI, QueryBudget

V, D = 90, 8


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def victim() -> Any:
    sizes = {"hidden_size": D, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=V, num_hidden_layers=2, max_position_embeddings=32, **sizes)
    model = new_causal_lm(config, seed=0).double()
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model.eval()


PROMPTS = random_prompts(40, 6, V, seed=0)


def answers(api: LogitAPI) -> torch.Tensor:
    return torch.stack([api.everything(prompt) for prompt in PROMPTS])


# -- recovery -------------------------------------------------------------------------------------------------------


def test_rank_and_projector_of_a_product():
    H, W = normal(50, 5), normal(40, 5, seed=1)
    found = recover_head(H @ W.T)
    assert found.rank == 5 and found.gap > 1e10
    Q = torch.linalg.qr(found.weight)[0]
    expected = W @ torch.linalg.inv(W.T @ W) @ W.T
    torch.testing.assert_close(Q @ Q.T, expected, rtol=0, atol=1e-10)
    assert principal_cosines(found.weight, W).min() > 1 - 1e-10
    assert principal_cosines(normal(40, 5, seed=2), W).min() < 0.9  # another matrix is not that close


def test_hidden_states_of_the_recovered_matrix_have_unit_power():
    Y = normal(50, 5) @ normal(40, 5, seed=1).T
    found = recover_head(Y)
    hidden = Y @ torch.linalg.pinv(found.weight).T
    torch.testing.assert_close(hidden.T @ hidden / 50, torch.eye(5, dtype=torch.float64))


def test_an_invertible_map_between_states_and_matrix_leaves_no_trace():
    H, W, G = normal(30, 4), normal(20, 4, seed=1), normal(4, 4, seed=2) + 3 * torch.eye(4, dtype=torch.float64)
    one, other = H @ W.T, (H @ torch.linalg.inv(G).T) @ (W @ G).T
    torch.testing.assert_close(one, other)
    assert recover_head(one).rank == recover_head(other).rank == 4
    assert ForwardKL()(one, other).abs().max() < 1e-12


@settings(deadline=None, max_examples=20)
@given(rank=st.integers(1, 12), noise=st.sampled_from([0.0, 1e-9, 1e-6]), seed=st.integers(0, 20))
def test_the_rank_is_where_the_spectrum_drops(rank, noise, seed):
    Y = normal(40, rank, seed=seed) @ normal(30, rank, seed=seed + 50).T + noise * normal(40, 30, seed=99)
    assert logit_rank(torch.linalg.svdvals(Y)) == rank


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("part", [7, 50])
def test_in_parts_through_a_sketch_it_is_the_same_matrix(known, part):
    """Answers of exact rank: same width, same column space, same scale as the decomposition of the whole."""
    Y = normal(50, 5) @ normal(300, 5, seed=1).T
    whole = recover_head(Y)
    found = recover_head_in_parts(lambda: Y.split(part), 300, sketch=20, rank=5 if known else None)
    assert found.rank == whole.rank == 5 and found.gap > 1e9
    torch.testing.assert_close(found.weight @ found.weight.T, whole.weight @ whole.weight.T, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.singular[:5], whole.singular[:5], rtol=1e-9, atol=1e-9)


def test_a_sketch_of_noisy_answers_finds_nearly_the_space():
    own = normal(300, 5, seed=1)
    Y = normal(60, 5) @ own.T + 1e-3 * normal(60, 300, seed=2)
    found = recover_head_in_parts(lambda: Y.split(16), 300, sketch=24)
    assert found.rank == 5 and principal_cosines(found.weight, own).min() > 0.99999


def test_a_sketch_below_the_rank_is_told():
    Y = normal(50, 8) @ normal(300, 8, seed=1).T
    with pytest.raises(DataError, match="raise queries or sketch"):
        recover_head_in_parts(lambda: [Y], 300, sketch=8, rank=8)
    with pytest.raises(DataError, match="raise queries or sketch"):
        recover_head_in_parts(lambda: [Y[:7]], 300, sketch=40, rank=8)


def test_an_interface_to_known_answers_says_what_the_model_says(victim):
    """The defences ask one table of answers; to the interface it is the model."""
    stored = _Answered(victim, PROMPTS, V)
    for options in ({}, {"top_k": 20, "decimals": 3}):
        for prompt in PROMPTS[:3]:
            one, other = (LogitAPI(model, V, **options).everything(prompt) for model in (victim, stored))
            torch.testing.assert_close(one, other, rtol=0, atol=2e-3 if options else 1e-5)


def test_too_few_answers_say_so():
    with pytest.raises(DataError, match="too few"):
        recover_head(normal(1, 20))
    with pytest.raises(DataError, match="ask more"):
        logit_rank(torch.ones(5, dtype=torch.float64), window=(8, 12))


def test_completion_finds_what_was_hidden_only_from_enough_entries():
    Y = normal(60, 3) @ normal(50, 3, seed=1).T
    seen = torch.rand(60, 50, generator=torch.Generator().manual_seed(2)) < 0.5
    found = low_rank_completion(Y.where(seen, 0), seen, 3, penalty=1e-8, rounds=30)
    assert (found - Y).norm() / Y.norm() < 1e-3
    little = torch.rand(60, 50, generator=torch.Generator().manual_seed(2)) < 0.04
    assert (low_rank_completion(Y.where(little, 0), little, 3) - Y).norm() / Y.norm() > 0.3


# -- the interface --------------------------------------------------------------------------------------------------


def test_full_logits_give_the_whole_matrix(victim):
    api = LogitAPI(victim, V, shows="logits")
    found = recover_head(answers(api))
    assert found.rank == D and found.gap > 1e3
    assert true_cosines(victim, found.weight, V).min() > 0.999
    assert (api.budget.calls, api.budget.tokens) == (40, 240)


@pytest.mark.parametrize("bias", [60.0, 100.0])
def test_the_bias_trick_gives_the_same_differences(victim, bias):
    """With a few entries an answer: z_i - z_ref to rounding, whatever the bias; each group of tokens costs a call."""
    api = LogitAPI(victim, V, top_k=20)
    whole = LogitAPI(victim, V, shows="logits").everything(PROMPTS[0])
    torch.testing.assert_close(api.everything(PROMPTS[0], bias=bias), whole - whole[0], rtol=0, atol=1e-9)
    assert api.budget.calls == api.calls_for_all() == 5  # 89 tokens in groups of 19
    found = recover_head(answers(api))
    assert found.rank == D and true_cosines(victim, found.weight, V).min() > 0.999


def test_one_biased_answer_by_hand(victim):
    api = LogitAPI(victim, V, top_k=4)
    tokens, values = api.ask(PROMPTS[0], bias={7: 50.0, 11: 40.0})
    z = LogitAPI(victim, V, shows="logits").everything(PROMPTS[0])
    l = dict(zip(tokens.tolist(), values.tolist(), strict=True))  # noqa: E741
    reference = tokens[2].item()
    assert set(tokens[:2].tolist()) == {7, 11}
    assert l[7] - l[reference] - 50 == pytest.approx(float(z[7] - z[reference]), abs=1e-9)
    assert l[11] - l[reference] - 40 == pytest.approx(float(z[11] - z[reference]), abs=1e-9)


def test_too_small_a_bias_is_told(victim):
    with pytest.raises(RunError, match="use a larger one"):
        LogitAPI(victim, V, top_k=2).everything(PROMPTS[0], bias=1e-3)


def test_log_probabilities_lose_only_what_a_softmax_cannot_see(victim):
    found = recover_head(answers(LogitAPI(victim, V)))
    assert found.rank == D
    own = victim.get_output_embeddings().weight.detach()
    assert principal_cosines(without_mean(found.weight), without_mean(own)).min() > 0.999


def test_rounding_hides_the_rank_step_by_step(victim):
    """The floor of the spectrum rises with the rounding until the drop is gone."""
    gaps = [recover_head(answers(LogitAPI(victim, V, decimals=d)), rank=D).gap for d in (6, 3, 1, 0)]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] > 1e4 and gaps[-1] < 10


def test_without_bias_a_few_entries_do_not_give_it_away(victim):
    api = LogitAPI(victim, V, top_k=10, allows_bias=False)
    with pytest.raises(ConfigError, match="may bias"):
        api.everything(PROMPTS[0])
    with pytest.raises(ConfigError, match="no logit bias"):
        api.ask(PROMPTS[0], bias={0: 1.0})
    values, seen = (torch.stack(part) for part in zip(*(api.seen(prompt) for prompt in PROMPTS), strict=True))
    assert (seen.sum(1) == 10).all()
    found = recover_head(low_rank_completion(values, seen, D), rank=D)
    assert true_cosines(victim, found.weight, V).mean() < 0.9


def test_the_budget_ends_the_questions(victim):
    api = LogitAPI(victim, V, top_k=20, budget=QueryBudget(12))
    api.everything(PROMPTS[0])
    api.everything(PROMPTS[1])
    assert not api.budget.allows(api.calls_for_all()) and api.budget.allows(2)
    with pytest.raises(RunError, match="budget of 12 queries is spent"):
        api.everything(PROMPTS[2])
    assert api.budget.calls == 10


# -- the student ----------------------------------------------------------------------------------------------------


def test_the_student_wears_the_matrix_rotated_and_frozen(victim):
    head = recover_head(answers(LogitAPI(victim, V, shows="logits"))).weight
    student = with_frozen_head("layers=1", victim.config, head, seed=3)
    own = student.get_output_embeddings().weight
    assert own.shape == (V, D) and not own.requires_grad
    torch.testing.assert_close(own.detach().double() @ own.detach().double().T, head @ head.T, rtol=1e-4, atol=1e-5)
    assert principal_cosines(own.detach(), victim.get_output_embeddings().weight.detach()).min() > 0.999
    observed = Observed(student, name="student")
    teacher = Observed(victim.float(), frozen=True)
    objective = TokenMatch(head_of(observed), head_of(teacher), ForwardKL(temperature=2.0), cross_entropy=0.1)
    player = Player("student", observed, objective)
    assert all(p is not own for p in player.parameters())
    objective({"input_ids": torch.tensor(PROMPTS[:4])}).backward()
    assert own.grad is None and all(p.grad is not None for p in student.parameters() if p.requires_grad)
    victim.double()


def test_a_width_the_architecture_cannot_have_is_rounded_up_with_empty_columns(victim):
    assert [fitting_width(victim.config, rank) for rank in (5, 7, 8, 9)] == [8, 8, 8, 12]
    head = normal(V, 7)
    own = with_frozen_head("layers=1", victim.config, head).get_output_embeddings().weight.detach().double()
    assert torch.linalg.svdvals(own)[-1] < 1e-6
    torch.testing.assert_close(own @ own.T, head @ head.T, rtol=1e-4, atol=1e-4)


def test_the_victim_as_its_own_student_has_nothing_to_learn(victim):
    student, teacher = Observed(victim), Observed(victim, frozen=False)
    objective = TokenMatch(head_of(student), head_of(teacher), ForwardKL(temperature=1.0))
    victim.requires_grad_(True)
    loss = objective({"input_ids": torch.tensor(PROMPTS[:4])})
    loss.backward()
    assert abs(loss.item()) < 1e-12
    assert max(float(p.grad.abs().max()) for p in victim.parameters() if p.grad is not None) < 1e-12
    victim.zero_grad()


def test_top_k_with_a_tail_bucket_by_hand():
    """Teacher (0.5, 0.3, 0.2) with two entries shown: KL over (0.5, 0.3, 0.2 for all others)."""
    p, q = torch.tensor([0.5, 0.3, 0.15, 0.05]).double(), torch.tensor([0.25, 0.25, 0.25, 0.25]).double()
    shown = [torch.from_numpy(array)[None] for array in top_k(p.log(), 2)]
    eye = torch.eye(4, dtype=torch.float64)
    found = linear_topk_divergence(q.log()[None], eye, *shown, divergence=ForwardKL()).loss
    parts = torch.tensor([0.5, 0.3, 0.2]).double()
    against = torch.tensor([0.25, 0.25, 0.5]).double()
    assert found.item() == pytest.approx(float((parts * (parts / against).log()).sum()))


# -- geometry -------------------------------------------------------------------------------------------------------


def test_a_rotation_is_no_difference():
    H = normal(30, 6)
    Q = torch.linalg.qr(normal(6, 6, seed=1))[0]
    assert procrustes_match(H, H @ Q) == pytest.approx(1.0)
    assert linear_cka(H, 3 * H @ Q + 5) == pytest.approx(1.0)
    other = normal(30, 6, seed=7)
    assert procrustes_match(H, other) < 0.8 and linear_cka(H, other) < 0.5


def test_procrustes_is_the_best_rotation():
    A, B = (torch.nn.functional.normalize(normal(20, 3, seed=s), dim=-1) for s in (0, 1))
    U, _, Vh = torch.linalg.svd(B.T @ A)
    best = float(((B @ U @ Vh) * A).sum() / (A.norm() * B.norm()))
    assert procrustes_match(A, B) == pytest.approx(best)
    for seed in range(5):
        Q = torch.linalg.qr(normal(3, 3, seed=seed))[0]
        assert float(((B @ Q) * A).sum() / (A.norm() * B.norm())) <= best + 1e-12


def test_cka_knows_widths_and_unrelated_states():
    H = normal(200, 4)
    assert linear_cka(H, torch.cat([H, H], 1)) == pytest.approx(1.0)
    assert linear_cka(H, normal(200, 9, seed=5)) < 0.1
