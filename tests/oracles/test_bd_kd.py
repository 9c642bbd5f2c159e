"""BD-KD (card 120): both directions of the KL, weighted by the gap of entropies, and networks that learn together."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stillhouse import Observed, Player, Run, Train, sgd
from stillhouse.base.errors import ConfigError
from stillhouse.losses.balanced import EntropyBalancedKL, entropy_gap
from stillhouse.losses.divergences import ForwardKL, ReverseKL
from stillhouse.objectives.mutual import with_peers
from stillhouse.systems.vision.bd_kd import BDKD

CLASSES, WIDTH = 4, 6


def logits(seed: int, rows: int = 7, scale: float = 1.5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(rows, CLASSES, generator=generator, dtype=torch.float64)


# -- the divergence -------------------------------------------------------------------------------------------------


def test_the_card_s_numbers():
    """p_t = (0.8, 0.2), p_s = (0.6, 0.4): KL_f 0.0915, KL_r 0.1046, H_t 0.5004, H_s 0.6730; the loss is 0.3008."""
    t, s = torch.tensor([[0.8, 0.2]]).log(), torch.tensor([[0.6, 0.4]]).log()
    assert ForwardKL()(s, t).item() == pytest.approx(0.0915, abs=5e-5)
    assert ReverseKL()(s, t).item() == pytest.approx(0.1046, abs=5e-5)
    assert entropy_gap(s, t).item() == pytest.approx(0.6730 - 0.5004, abs=1e-4)
    kl_f, kl_r = 0.8 * math.log(8 / 6) + 0.2 * math.log(2 / 4), 0.6 * math.log(6 / 8) + 0.4 * math.log(4 / 2)
    assert EntropyBalancedKL()(s, t).item() == pytest.approx(kl_f + 2 * kl_r, abs=1e-6)  # less confident: sharpen
    assert EntropyBalancedKL()(t, s).item() == pytest.approx(kl_f + 2 * kl_r, abs=1e-6)  # roles swapped: the same sum
    assert EntropyBalancedKL(nu=3.0)(s, t).item() == pytest.approx(kl_f + 3 * kl_r, abs=1e-6)


@given(seed=st.integers(0, 100), nu=st.floats(0.5, 4), temperature=st.floats(0.5, 4))
@settings(max_examples=30, deadline=None)
def test_row_by_row_against_a_loop(seed, nu, temperature):
    z_s, z_t = logits(seed), logits(seed + 500)
    found = EntropyBalancedKL(nu=nu, temperature=temperature)(z_s, z_t)
    for row in range(len(z_s)):
        p, q = ([math.exp(float(z) / temperature) for z in side[row]] for side in (z_t, z_s))
        p, q = [x / sum(p) for x in p], [x / sum(q) for x in q]
        kl_f = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
        kl_r = sum(b * math.log(b / a) for a, b in zip(p, q, strict=True))
        unsure = sum(-x * math.log(x) for x in q) > sum(-x * math.log(x) for x in p)
        a, b = (1.0, nu) if unsure else (nu, 1.0)
        assert found[row].item() == pytest.approx(temperature**2 * (a * kl_f + b * kl_r), rel=1e-9, abs=1e-12)


def test_both_rules_are_met():
    """Random rows have some of both kinds, so that the loop above says something of each."""
    gaps = entropy_gap(logits(0, 50), logits(500, 50))
    assert 10 < int((gaps > 0).sum()) < 40


@pytest.mark.parametrize("nu", [1.0, 2.0, 3.5])
def test_equal_distributions_leave_nothing_to_learn(nu):
    z_t = logits(1)
    z_s = (z_t + 3.0).requires_grad_()
    loss = EntropyBalancedKL(nu=nu)(z_s, z_t).sum()
    loss.backward()
    assert abs(loss.item()) < 1e-12 and z_s.grad is not None and z_s.grad.abs().max().item() < 1e-12


def test_the_gradient_in_closed_form():
    """Of the forward KL p_s - p_t, of the reverse KL p_s (log(p_s / p_t) - KL_r); the weights take none."""
    z_s, z_t = logits(2).requires_grad_(), logits(3)
    EntropyBalancedKL(nu=2.0)(z_s, z_t).sum().backward()
    q, p = z_s.detach().softmax(-1), z_t.softmax(-1)
    kl_r = (q * (q / p).log()).sum(-1, keepdim=True)
    unsure = (entropy_gap(z_s, z_t) > 0)[:, None]
    a, b = torch.where(unsure, 1.0, 2.0), torch.where(unsure, 2.0, 1.0)
    torch.testing.assert_close(z_s.grad, a * (q - p) + b * q * ((q / p).log() - kl_r))


def test_nu_of_one_is_the_symmetric_kl():
    z_s, z_t = logits(4), logits(5)
    q, p = z_s.softmax(-1), z_t.softmax(-1)
    jeffreys = ((p - q) * (p.log() - q.log())).sum(-1)
    torch.testing.assert_close(EntropyBalancedKL(nu=1.0)(z_s, z_t), jeffreys)
    torch.testing.assert_close(EntropyBalancedKL(nu=1.0)(z_t, z_s), jeffreys)


def test_impossible_values_are_refused():
    for wrong in ({"nu": 0.0}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="positive"):
            EntropyBalancedKL(**wrong)


# -- two networks ---------------------------------------------------------------------------------------------------


def net(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(WIDTH, width), nn.Tanh(), nn.Linear(width, CLASSES))


def data(count: int = 4) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(9)
    return [
        {
            "inputs": torch.randn(8, WIDTH, generator=generator),
            "labels": torch.randint(CLASSES, (8,), generator=generator),
        }
        for _ in range(count)
    ]


def objectives(kind: str) -> tuple[Any, Any]:
    if kind == "dml":
        return ForwardKL(), ForwardKL()
    return EntropyBalancedKL(nu=2.0), ReverseKL()


def trained(folder: Path, kind: str, *, weight: float = 1.0, steps: int = 6) -> tuple[nn.Module, nn.Module]:
    small, large = net(3, 0), net(10, 1)
    student, teacher = Observed(small, name="student"), Observed(large, name="teacher")
    of_student, of_teacher = objectives(kind)
    players = [
        Player(
            "student",
            student,
            with_peers(student.output(), [teacher.output()], of_student, weight=weight),
            optimizer=sgd(0.3),
            clip=0.5,
        ),
        Player(
            "teacher",
            teacher,
            with_peers(teacher.output(), [student.output()], of_teacher, weight=weight),
            optimizer=sgd(0.3),
            clip=0.5,
        ),
    ]
    Run(folder, quiet=True).execute([Train("pair", players, source=data(), steps=steps, together=True)])
    return small, large


def by_hand(kind: str, weight: float = 1.0, steps: int = 6) -> tuple[nn.Module, nn.Module]:
    """One forward of both, both losses from these logits, both steps at the same time."""
    nets = (net(3, 0), net(10, 1))
    optimizers = [torch.optim.SGD(one.parameters(), lr=0.3, momentum=0.9) for one in nets]
    for step in range(steps):
        rows = data()[step % 4]
        z_s, z_t = (one(rows["inputs"]) for one in nets)
        p_s, p_t = z_s.softmax(-1), z_t.softmax(-1)
        s, t = p_s.detach(), p_t.detach()
        if kind == "dml":
            student, teacher = (t * (t / p_s).log()).sum(-1), (s * (s / p_t).log()).sum(-1)
        else:
            unsure = -(s * s.log()).sum(-1) > -(t * t.log()).sum(-1)
            a, b = torch.where(unsure, 1.0, 2.0), torch.where(unsure, 2.0, 1.0)
            student = a * (t * (t / p_s).log()).sum(-1) + b * (p_s * (p_s / t).log()).sum(-1)
            teacher = (p_t * (p_t / s).log()).sum(-1)
        losses = [
            nn.functional.cross_entropy(z, rows["labels"]) + weight * extra.mean()
            for z, extra in ((z_s, student), (z_t, teacher))
        ]
        gradients = [torch.autograd.grad(loss, list(one.parameters())) for loss, one in zip(losses, nets, strict=True)]
        for one, optimizer, found in zip(nets, optimizers, gradients, strict=True):
            for parameter, gradient in zip(one.parameters(), found, strict=True):
                parameter.grad = gradient.clone()
            nn.utils.clip_grad_norm_(one.parameters(), 0.5)
            optimizer.step()
    return nets


def distance(one: nn.Module, other: nn.Module) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["bd-kd", "dml"])
def test_against_a_loop_by_hand(tmp_path, kind):
    for found, expected in zip(trained(tmp_path, kind), by_hand(kind), strict=True):
        assert distance(found, expected) < 2e-6


def test_the_methods_differ(tmp_path):
    for one, other in zip(by_hand("bd-kd"), by_hand("dml"), strict=True):
        assert distance(one, other) > 1e-3


def test_without_weight_each_learns_as_if_it_were_alone(tmp_path):
    """No gradient of one's loss reaches the other: what a network becomes does not depend on who is beside it."""
    for found, expected in zip(trained(tmp_path, "bd-kd", weight=0.0), by_hand("dml", weight=0.0), strict=True):
        assert distance(found, expected) < 1e-6


def test_no_gradient_crosses():
    small, large = net(3, 0), net(10, 1)
    student, teacher = Observed(small), Observed(large)
    batch = data()[0]
    with_peers(student.output(), [teacher.output()], EntropyBalancedKL())(batch).backward()
    assert all(p.grad is None for p in large.parameters()) and all(p.grad is not None for p in small.parameters())
    small.zero_grad()
    with_peers(teacher.output(), [student.output()], ReverseKL())(batch).backward()
    assert all(p.grad is None for p in small.parameters()) and all(p.grad is not None for p in large.parameters())


def test_several_peers_count_as_their_mean():
    own, others = Observed(net(3, 0)), [Observed(net(5, seed)) for seed in (1, 2, 3)]
    batch = data()[0]

    def value(peers: list[Observed]) -> float:
        return with_peers(own.output(), [p.output() for p in peers], EntropyBalancedKL())(batch).item()

    alone = nn.functional.cross_entropy(own.module(batch["inputs"]), batch["labels"]).item()
    single = [value([one]) - alone for one in others]
    assert value(others) - alone == pytest.approx(sum(single) / 3, rel=1e-5)


# -- the system -----------------------------------------------------------------------------------------------------


def tiny(**more: Any) -> BDKD:
    system = BDKD.make(**{**BDKD.smoke, "train_size": 64, "batch_size": 32, "steps": 3, "baseline": False, **more})
    assert isinstance(system, BDKD)
    return system


def test_the_system_keeps_student_and_teacher(tmp_path):
    done = Run(tmp_path, quiet=True).execute(tiny(students=2))
    folder = done["student"].path
    assert {part.name for part in folder.iterdir() if part.is_dir()} == {"teacher", "student-2"}
    table = done["evaluation"].table()
    assert [row["name"] for row in table.rows] == ["student", "student-2", "teacher"]
    assert table.row("teacher")["parameters"] > 10 * table.row("student")["parameters"]
    one, two = (copy.deepcopy(table.row(name)) for name in ("student", "student-2"))
    assert one.pop("nll") != two.pop("nll")  # they do not begin with the same weights


def test_the_divergences_of_the_two_exchanges():
    of_student, of_teacher = tiny(nu=3.0, temperature=2.0).divergences()
    assert of_student == EntropyBalancedKL(nu=3.0, temperature=2.0) and of_teacher == ReverseKL(temperature=2.0)
    assert tiny(exchange="dml").divergences() == (ForwardKL(), ForwardKL())


def test_offline_the_teacher_stays_as_it_is(tmp_path):
    from safetensors.torch import load_file

    done = Run(tmp_path, quiet=True).execute(tiny(online=False, noise=0.0))
    table = done["evaluation"].table()
    assert [row["name"] for row in table.rows] == ["teacher", "student"]
    assert table.row("teacher")["accuracy"] > 0.95
    assert not (done["student"].path / "teacher").exists()
    assert load_file(done["student"].path / "model.safetensors")
    with pytest.raises(ConfigError, match="random weights"):
        Run(tmp_path / "new", quiet=True).execute(tiny(online=False, teacher="new:x"))
