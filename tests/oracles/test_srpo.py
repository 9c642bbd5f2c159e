"""SRPO (card 155): its routed loss against loops and limits, its self-teacher, and its variants."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from table_lm import Table, head
from torch import Tensor, nn

from stillhouse import Observed
from stillhouse.core.ema import EMA
from stillhouse.core.observed import Turn
from stillhouse.core.schedule import Progress
from stillhouse.data.responses import pack_rows
from stillhouse.objectives.responses import PolicyGradient, RoutedDistillation
from stillhouse.systems import get_system

V = 7
DOUBLE = torch.float64


def table(seed: int) -> Tensor:
    return torch.randn(V, V, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


def routed(student: Table, teacher: Table, **options: Any) -> RoutedDistillation:
    watcher = Observed(teacher, frozen=True, name="self-teacher")
    return RoutedDistillation(head(Observed(student)), head(watcher.view("hinted")), **options)


RESPONSES = [[3, 4, 0], [5, 0], [2, 2, 6, 0], [1, 0]]


def batch(z_distil: list[float], *, advantages: list[float] | None = None, z_group: list[float] | None = None) -> Any:
    made: dict[str, Any] = pack_rows([([1, 2], response) for response in RESPONSES], 0)
    made["advantages"] = torch.tensor(advantages or [1.0, -1.0, -1.0, 1.0], dtype=DOUBLE)
    made["rewards"] = torch.tensor([1.0, 0.0, 0.0, 1.0])
    made["finished"] = torch.ones(4)
    made["z_distil"] = torch.tensor(z_distil, dtype=DOUBLE)
    made["z_group"] = 1 - made["z_distil"] if z_group is None else torch.tensor(z_group, dtype=DOUBLE)
    rows = [([6, 5, 4, 3], response) for response, z in zip(RESPONSES, z_distil, strict=True) if z]
    made["hinted"] = pack_rows(rows or [([0], [])], 0)
    return made


def jsd(p: Tensor, q: Tensor) -> Tensor:
    m = (p + q) / 2
    return 0.5 * ((p * (p / m).log()).sum() + (q * (q / m).log()).sum())


def test_against_a_loop_over_tokens():
    """Correct ones: -A at rho = 1; failed ones: w JSD to what the teacher says after the hint; one denominator."""
    student, teacher, beta = table(0), table(1), 0.7
    p, q = student.softmax(-1), teacher.softmax(-1)
    group, distances, raw, tokens = 0.0, [], [], 0
    for response, advantage, distil in zip(RESPONSES, [1.0, -1, -1, 1], [0, 1, 1, 0], strict=True):
        student_before, teacher_before = 2, 3  # the ends of the two prompts
        for token in response:
            tokens += 1
            if distil:
                target = q[teacher_before]
                distances.append(jsd(p[student_before], target).item())
                raw.append(math.exp(beta * float((target * target.log()).sum())))
            else:
                group -= advantage
            student_before = teacher_before = token
    mean = sum(raw) / len(raw)
    distil_sum = sum(w / mean * d for w, d in zip(raw, distances, strict=True))
    term = routed(Table(student), Table(teacher), beta=beta, top_k=V)
    values = term.evaluate(Turn(term.signals()), batch([0, 1, 1, 0]), Progress(0, 1))
    assert [value.name for value in values] == ["GroupRelative", "SelfDistillation"]
    assert values[0].value.item() == pytest.approx(group / tokens)
    assert values[1].value.item() == pytest.approx(distil_sum / tokens)
    assert float(values[0].extras["distilled"]) == 0.5
    unweighted = routed(Table(student), Table(teacher), beta=None, top_k=V)
    values = unweighted.evaluate(Turn(unweighted.signals()), batch([0, 1, 1, 0]), Progress(0, 1))
    assert values[1].value.item() == pytest.approx(sum(distances) / tokens)


def gradient(term: Any, made: Any, student: Table) -> Tensor:
    student.embed.weight.grad = None
    term(made, 0.0).backward()
    assert student.embed.weight.grad is not None
    return student.embed.weight.grad.clone()


def test_routing_off_is_grpo():
    """No distilled response: value and gradient are GRPO's, and the empty mean of weights makes no 0/0."""
    student = Table(table(0))
    made = batch([0, 0, 0, 0])
    srpo = routed(student, Table(table(1)))
    grpo = PolicyGradient(head(Observed(student)), clip_low=0.2, clip_high=0.28, normalisation="token")
    assert srpo(made, 0.0).item() == grpo(made, 0.0).item()
    assert torch.equal(gradient(srpo, made, student), gradient(grpo, made, student))


def test_a_group_that_is_all_wrong_teaches_nothing():
    student = Table(table(0))
    term = routed(student, Table(table(1)))
    made = batch([0, 0, 0, 0], advantages=[0.0] * 4)
    assert term(made, 0.0).item() == 0 and gradient(term, made, student).abs().max() == 0


def test_distilled_responses_feel_no_advantage_and_others_no_teacher():
    student = Table(table(0))
    one = gradient(routed(student, Table(table(1))), batch([0, 1, 1, 0]), student)
    other = gradient(routed(student, Table(table(1))), batch([0, 1, 1, 0], advantages=[1.0, 9, 9, 1]), student)
    assert torch.equal(one, other)
    all_distilled = batch([1, 1, 1, 1])
    plain = gradient(routed(student, Table(table(1))), all_distilled, student)
    assert not torch.allclose(plain, gradient(routed(student, Table(table(2))), all_distilled, student))
    none = batch([0, 0, 0, 0])
    assert torch.equal(
        gradient(routed(student, Table(table(1))), none, student),
        gradient(routed(student, Table(table(2))), none, student),
    )


def test_the_teacher_takes_no_gradient_and_agreement_is_rest():
    student = Table(table(0))
    teacher = Table(table(0))
    made = batch([1, 1, 1, 1])
    made["hinted"] = pack_rows([([1, 2], response) for response in RESPONSES], 0)  # the hint says nothing new
    term = routed(student, teacher)
    assert gradient(term, made, student).abs().max() < 1e-12
    assert teacher.embed.weight.grad is None
    assert term(made, 0.0).item() == pytest.approx(0.0, abs=1e-12)


def test_stale_responses_are_weighed_by_their_ratio_up_to_the_limit():
    student, teacher = Table(table(0)), Table(table(1))
    made = batch([1, 1, 1, 1])
    base = routed(student, teacher)(made, 0.0).item()
    log_p = table(0).log_softmax(-1)
    logp = torch.stack([log_p[b, t] for response in RESPONSES for b, t in zip([2, *response], response, strict=False)])
    term = routed(student, teacher, ratio_limit=2.0)
    assert term({**made, "old_logp": logp}, 0.0).item() == pytest.approx(base)
    assert term({**made, "old_logp": logp + math.log(2)}, 0.0).item() == pytest.approx(base / 2)
    assert term({**made, "old_logp": logp - math.log(1.5)}, 0.0).item() == pytest.approx(1.5 * base)
    assert term({**made, "old_logp": logp - 9}, 0.0).item() == pytest.approx(2 * base)
    group = batch([0, 0, 0, 0])
    far = {**group, "old_logp": logp - math.log(1.5)}  # rho 1.5: clipped at 1.28 where the advantage is positive
    lengths, A = [len(r) for r in RESPONSES], [1.0, -1, -1, 1]
    expected = sum(-n * (1.28 if a > 0 else -1.5) for n, a in zip(lengths, A, strict=True)) / sum(lengths)
    assert term(far, 0.0).item() == pytest.approx(expected)


def test_both_losses_for_everybody():
    """The variant mix: lambda GRPO + (1 - lambda) SDPO, over the same tokens."""
    student, teacher = Table(table(0)), Table(table(1))
    term = routed(student, teacher)
    mixed = term(batch([0.1] * 4, z_group=[0.9] * 4), 0.0).item()
    grpo = term(batch([0] * 4), 0.0).item()
    sdpo = term(batch([1] * 4, z_group=[0] * 4), 0.0).item()
    assert mixed == pytest.approx(0.9 * grpo + 0.1 * sdpo)


def test_tokens_that_go_nowhere_are_not_in_the_denominator():
    """SDPO alone: a response without a guide has no loss and does not water down the others."""
    student, teacher = Table(table(0)), Table(table(1))
    made = batch([0, 1, 0, 0], z_group=[0, 0, 0, 0])
    alone: dict[str, Any] = {
        **pack_rows([([1, 2], RESPONSES[1])], 0),
        "hinted": made["hinted"],
        **{key: made[key][1:2] for key in ("advantages", "rewards", "finished", "z_distil", "z_group")},
    }
    term = routed(student, teacher)
    assert term(made, 0.0).item() == pytest.approx(term(alone, 0.0).item())


def test_certain_targets_count_more():
    """Above 1 where the teacher is certain, below 1 where it is not."""
    certain = torch.zeros(V, V, dtype=DOUBLE)
    certain[3, 0], certain[2] = 12.0, 0.0
    teacher = Table(certain)
    student = Table(table(0))
    made = batch([0, 1, 1, 0])
    made["corrupted"] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    made["hinted"] = pack_rows([([3], [0, 0]), ([2], [2, 2, 2, 0])], 0)
    made["input_ids"][1, 2:4] = 0
    term = routed(student, teacher)
    (first, _) = term.evaluate(Turn(term.signals()), made, Progress(0, 1))
    assert float(first.extras["weight_clean"]) > 1 > float(first.extras["weight_corrupted"])
    flat = routed(student, teacher, beta=0.0)
    (first, _) = flat.evaluate(Turn(flat.signals()), made, Progress(0, 1))
    assert float(first.extras["weight_clean"]) == float(first.extras["weight_corrupted"]) == 1.0


def test_the_self_teacher_follows_slowly():
    """After n steps towards resting weights: theta - (1 - rate)^n (theta - theta_bar_0)."""
    model = nn.Linear(3, 2)
    average = EMA(model, decay=0.95)
    begun = average.module.weight.detach().clone()
    with torch.no_grad():
        model.weight.add_(1.0)
    for _ in range(7):
        average.update(Progress(0, 1))
    torch.testing.assert_close(average.module.weight, model.weight - 0.95**7 * (model.weight - begun))


def test_the_paper_s_values():
    made = get_system("srpo").make(model="x", data="y")
    assert (made.prompts, made.group, made.top_k, made.beta, made.ema_rate) == (32, 8, 100, 1.0, 0.05)
    assert (made.clip_low, made.clip_high, made.ratio_limit, made.lr) == (0.2, 0.28, 2.0, 5e-6)
    assert (made.weight_decay, made.warmup_steps, made.clip, made.mix) == (0.01, 10, 1.0, 0.9)
    assert made.max_new_tokens == 8192 and "{solution}" in made.hint and "{prompt}" in made.hint
