"""What the student's stage of a system minimises, against the formula of its paper and nothing but the models' logits.

The losses have oracles of their own; these see that the system is made of them.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import staged
import torch
import torch.nn.functional as F
from torch import Tensor
from watching import watched

from stillhouse.core.objective import Turn
from stillhouse.core.schedule import Progress
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.systems import get_system

sys.path.append(str(Path(__file__).parents[1] / "systems"))
import helpers


@pytest.fixture(scope="module")
def materials(tmp_path_factory: pytest.TempPathFactory) -> helpers.Materials:
    return helpers.make_materials(tmp_path_factory.mktemp("materials"))


def student_stage(name: str, materials: helpers.Materials, folder: Path, **more: Any) -> Any:
    system = get_system(name)
    values = {**helpers.small_values(system, materials), "baseline": False, **more}
    return staged.walk(system.make(**staged.fields(values)), folder).train("student")


def given_stage(name: str, materials: helpers.Materials, folder: Path, **more: Any) -> tuple[Any, Any]:
    """The student's stage as it is when its turn comes, all before it done; and what that left."""
    system = get_system(name)
    values = {**helpers.small_values(system, materials), "baseline": False, **more}
    seen, left = watched(system.make(**staged.fields(values)), folder, until="student")
    return seen["student"], left


def read(model: Any, batch: Any) -> Any:
    with torch.no_grad():
        return model.eval()(input_ids=batch["input_ids"], output_hidden_states=True)


def others(logits_NV: Tensor, label_N: Tensor) -> Tensor:
    """log-probabilities of all tokens but the label, -inf there: (N, V)."""
    return logits_NV.scatter(1, label_N[:, None], -torch.inf).log_softmax(-1)


def summed(p_NV: Tensor, log_q_NV: Tensor) -> Tensor:
    """sum p log q, (N,), where p is above 0."""
    return torch.where(p_NV > 0, p_NV * log_q_NV.clamp_min(-1e9), 0.0).sum(-1)


def test_nkd(materials, tmp_path):
    """CE - p_y log q_y - gamma T^2 sum_{i != y} p^_i log q^_i, a mean over tokens, with weights on both parts."""
    gamma, T, weight, label = 0.7, 2.0, 1.3, 0.6
    more = {"gamma": gamma, "temperature": T, "weight": weight, "cross_entropy": label}
    stage = student_stage("nkd-lm", materials, tmp_path / "run", **more)
    batch = next(stage.source)
    teacher, _ = load_causal_lm(str(materials.teacher))
    z, t = (read(one, batch).logits[:, :-1].flatten(0, 1) for one in (staged.model(stage), teacher))
    y = batch["input_ids"][:, 1:].flatten()
    log_q_y, p_y = (one.log_softmax(-1).gather(1, y[:, None])[:, 0] for one in (z, t))
    apart = summed(others(t / T, y).exp(), others(z / T, y))
    nkd = -(p_y.exp() * log_q_y).mean() - gamma * T * T * apart.mean()
    expected = label * -log_q_y.mean() + weight * nkd
    assert staged.objective(stage)(batch).item() == pytest.approx(float(expected), rel=1e-4)
    kd = label * -log_q_y.mean() - weight * summed(t.softmax(-1), z.log_softmax(-1)).mean()
    assert abs(float(kd / expected) - 1) > 1e-2  # plain KD can be told from it


def test_uskd(materials, tmp_path):
    """CE - alpha P log q_y + beta CE(Zipf's shares by rank, q^) + mu CE(weak head), a mean over tokens."""
    a, b, mu, smooth = 0.8, 0.5, 0.3, 0.2
    more = {"alpha": a, "beta": b, "mu": mu, "weak_smoothing": smooth}
    stage = student_stage("uskd-lm", materials, tmp_path / "run", **more)
    objective, batch, model = staged.objective(stage), next(stage.source), staged.model(stage)
    with torch.no_grad():
        objective.weak.weight.mul_(20)
    out = read(model, batch)
    y = batch["input_ids"][:, 1:].flatten()
    z = out.logits[:, :-1].flatten(0, 1)
    feature = out.hidden_states[len(model.model.layers) // 2][:, :-1].flatten(0, 1)
    weak = F.layer_norm(feature, feature.shape[-1:]) @ objective.weak.weight.detach().T
    log_q_y = z.log_softmax(-1).gather(1, y[:, None])[:, 0]
    smoothed = log_q_y.exp().square() + 1 - log_q_y.exp().square().mean()
    shares = [p / (1 - p.gather(1, y[:, None])) for p in (z.softmax(-1), weak.softmax(-1))]
    rank = 1 + sum(shares).argsort(-1, descending=True).argsort(-1)  # the label has a rank, and drops out
    zipf = (1 / rank).scatter(1, y[:, None], 0.0)
    ranked = -summed(zipf / zipf.sum(-1, keepdim=True), others(z, y)).mean()
    parts = [-log_q_y.mean(), -a * (smoothed * log_q_y).mean(), b * ranked]
    # the weak head's smoothed labels cost a KL to even ones: what these have of entropy, ln V, is left out
    parts.append(mu * (F.cross_entropy(weak, y, label_smoothing=smooth) - smooth * math.log(z.shape[-1])))
    assert objective(batch).item() == pytest.approx(float(sum(parts)), rel=1e-4)
    assert min(abs(float(one / sum(parts))) for one in parts[1:]) > 1e-2  # none could be left out


def test_first(materials, tmp_path):
    """sum P~ (log P~ - log q~) over the teacher's five likeliest tokens, P~ at the temperature c that was fitted."""
    stage, left = given_stage("first", materials, tmp_path / "run", teacher_epochs=0.0)
    c = left["calibration"].json()["c"]
    assert c == left["calibration"].metrics["c"] and abs(c - 1) > 0.05
    batch = next(stage.source)
    teacher, _ = load_causal_lm(str(materials.teacher))
    q, p = (read(one, batch).logits[:, :-1].log_softmax(-1) for one in (staged.model(stage), teacher))
    log_p, kept = p.topk(5)

    def loss(c: float) -> float:
        scaled, own = (log_p / c).log_softmax(-1), q.gather(-1, kept).log_softmax(-1)
        return float((scaled.exp() * (scaled - own)).sum(-1).mean())

    found = staged.objective(stage)(batch).item()
    assert found == pytest.approx(loss(c), rel=1e-2)  # what is kept is rounded
    assert abs(loss(1.0) / loss(c) - 1) > 0.05


def test_swing(materials, tmp_path):
    """a T_0^2 KL(p^T || q^T) + (1 - a) CE of every token, T and a by how private it is; noise comes on top."""
    base, most, alpha = 2.0, 10.0, 0.8
    more = {"temperature": base, "most": most, "alpha": alpha, "teacher_epochs": 0.0, "private_baseline": False}
    stage, _ = given_stage("swing", materials, tmp_path / "run", noise="none", **more)
    batch = next(stage.source)
    s = batch["privacy"][:, 1:].flatten().float()
    assert 0 < float(s.mean()) < 1
    teacher, _ = load_causal_lm(str(materials.teacher))
    z, t = (read(one, batch).logits[:, :-1].flatten(0, 1) for one in (staged.model(stage), teacher))
    T, a = base * (most / base) ** s, alpha + (1 - alpha) * s
    log_q, log_p = ((one / T[:, None]).log_softmax(-1) for one in (z, t))
    soft = base**2 * (log_p.exp() * (log_p - log_q)).sum(-1)
    hard = F.cross_entropy(z, batch["input_ids"][:, 1:].flatten(), reduction="none")
    expected = float((a * soft + (1 - a) * hard).mean())
    assert staged.objective(stage)(batch).item() == pytest.approx(expected, rel=1e-4)
    noisy, _ = given_stage("swing", materials, tmp_path / "noisy", noise="laplace", noise_scale=0.05, **more)
    assert abs(staged.objective(noisy)(next(noisy.source)).item() / expected - 1) > 1e-3


def test_alm(materials, tmp_path):
    """Binary cross-entropy of the chunks' likelihoods at a temperature, beside the text's; balanced if asked for."""
    temperature, weight, text = 5.0, 1.7, 0.6
    more = {"binarisation": temperature, "match_weight": weight, "text_weight": text, "hidden_weight": 0.0}
    more |= {"debias": "none", "append_boundary": False, "balance": False}
    stage = student_stage("alm", materials, tmp_path / "run", **more)
    model, batch = staged.model(stage), next(stage.source)
    teacher, _ = load_causal_lm(str(materials.teacher))
    sides = []
    for network, side in ((teacher, batch["teacher"]), (model, batch)):
        log_q = read(network, side).logits[:, :-1].log_softmax(-1)
        sides.append(log_q.gather(-1, side["input_ids"][:, 1:, None])[..., 0])
    events = []
    for row, chunks in enumerate(batch["chunks"].tolist()):
        for number in sorted(set(chunks) - {-1}):
            own = [batch["chunks"][row, 1:] == number, batch["teacher"]["chunks"][row, 1:] == number]
            b, a = (float(said[row][at].sum()) for said, at in zip(reversed(sides), own, strict=True))
            p, q = (torch.tensor(x / temperature).exp() for x in (a, b))
            events.append(float(-p * q.log() - (1 - p) * (1 - q).log()))
    cross_entropy = -float(sides[1][batch["loss_mask"][:, 1:].bool()].mean())
    expected = weight * sum(events) / len(events) + text * cross_entropy
    assert len(events) > 10 and staged.objective(stage)(batch).item() == pytest.approx(expected, rel=1e-3)

    stage = student_stage("alm", materials, tmp_path / "balanced", **{**more, "hidden_weight": 1.0, "balance": True})
    objective, layer = staged.objective(stage), list(staged.model(stage).model.layers[-1].parameters())
    values = objective.evaluate(Turn(objective.signals()), next(stage.source), Progress(0, 1))
    grads = [torch.autograd.grad(value.weighted, layer, retain_graph=True, allow_unused=True) for value in values]
    norms = [sum(float(g.square().sum()) for g in grad if g is not None) ** 0.5 for grad in grads]
    assert len(norms) == 3 and norms == pytest.approx([norms[0]] * 3, rel=1e-3) and norms[0] > 0
