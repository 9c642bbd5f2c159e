"""PS-KD (card 076): targets refined by the model's own past opinion, in a table or asked of a snapshot."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from stillhouse import Batches, CrossEntropy, Observed, Player, Run, Train, sgd
from stillhouse.core.schedule import Progress, linear
from stillhouse.objectives.memory import ByEpoch, PredictionMemory, RememberedTargets, SnapshotTargets
from stillhouse.systems.vision.ps_kd import PSKD

SAMPLES, CLASSES, WIDTH = 12, 4, 6


class Logits(nn.Module):
    """A model whose output is what it is told to be."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits


def remembering(logits: Tensor, past: Tensor | None, alpha: Any, **more: Any) -> tuple[RememberedTargets, Logits]:
    """The term on fixed logits (B, V), with the table filled with ``past`` (B, V)."""
    model = Logits(logits)
    memory = PredictionMemory(*logits.shape)
    if past is not None:
        memory.remember(torch.arange(len(logits)), past)
    return RememberedTargets(Observed(model).output(), memory, alpha=alpha, **more), model


def batch(labels: list[int]) -> dict[str, Tensor]:
    index = torch.arange(len(labels))
    return {"inputs": torch.zeros(len(labels), 1), "labels": torch.tensor(labels), "index": index}


def random_logits(seed: int, scale: float = 1.0) -> Tensor:
    return scale * torch.randn(SAMPLES, CLASSES, generator=torch.Generator().manual_seed(seed))


LABELS = [n % CLASSES for n in range(SAMPLES)]


# -- the target and its gradient ------------------------------------------------------------------------------------


def test_the_card_s_numbers():
    """y = class 0, P = (0.6, 0.4), a = 0.5: q = (0.8, 0.2); p = (0.7, 0.3): loss 0.52613, gradient (-0.1, 0.1)."""
    term, model = remembering(torch.tensor([[0.7, 0.3]]).log(), torch.tensor([[0.6, 0.4]]), 0.5)
    loss = term(batch([0]))
    loss.backward()
    assert loss.item() == pytest.approx(-(0.8 * math.log(0.7) + 0.2 * math.log(0.3)), abs=1e-6)
    torch.testing.assert_close(model.logits.grad, torch.tensor([[-0.1, 0.1]]))


def test_the_weight_grows_by_the_epoch():
    """T = 300, alpha_T = 0.8: a_1 = 0.0026667, a_150 = 0.4, a_300 = 0.8, and it stays there."""
    schedule = ByEpoch(0.8, 300)
    found = [schedule(Progress(0, 1, epoch=t - 1)) for t in (1, 150, 300, 301)]
    assert found == pytest.approx([0.8 / 300, 0.4, 0.8, 0.8], abs=1e-9)
    assert schedule(Progress(5, 10, epoch=3)) == schedule(Progress(9, 10, epoch=3))  # the same all through an epoch


def test_without_weight_and_without_a_past_it_is_cross_entropy():
    logits = random_logits(0)
    plain = nn.functional.cross_entropy(logits, torch.tensor(LABELS))
    forgotten, _ = remembering(logits, None, 0.9)  # the first epoch: P is the label
    weightless, _ = remembering(logits, random_logits(1).softmax(-1), 0.0)
    for term in (forgotten, weightless):
        assert term(batch(LABELS)).item() == pytest.approx(plain.item(), abs=1e-6)
    weighted, _ = remembering(logits, random_logits(1).softmax(-1), 0.5)
    assert abs(weighted(batch(LABELS)).item() - plain.item()) > 0.01


def test_nothing_is_left_to_learn_where_the_past_opinion_is_the_present_one():
    logits = random_logits(0)
    term, model = remembering(logits, logits.softmax(-1), 1.0)
    term(batch(LABELS)).backward()
    assert model.logits.grad.abs().max().item() < 1e-7


@given(seed=st.integers(0, 50), a=st.floats(0, 1), smoothing=st.floats(0, 0.5))
@settings(max_examples=30, deadline=None)
def test_the_gradient_is_p_minus_q(seed, a, smoothing):
    """With q = (1 - a) y + a P, y smoothed first; q is a distribution."""
    logits, past = random_logits(seed), random_logits(seed + 100).softmax(-1)
    term, model = remembering(logits, past, a, label_smoothing=smoothing)
    term(batch(LABELS)).backward()
    q = torch.empty(SAMPLES, CLASSES)
    for n in range(SAMPLES):
        for k in range(CLASSES):
            y = (1 - smoothing) * (k == LABELS[n]) + smoothing / CLASSES
            q[n, k] = (1 - a) * y + a * past[n, k]
    torch.testing.assert_close(q.sum(-1), torch.ones(SAMPLES))
    torch.testing.assert_close(model.logits.grad, (logits.softmax(-1) - q) / SAMPLES, rtol=1e-4, atol=1e-6)


def test_gradients_are_damped_where_the_model_got_worse_the_least():
    """|gradient| / |that of cross-entropy| = 1 - a (1 - P_y) / (1 - p_y) where p_k >= a P_k for the other classes."""
    a = 0.4
    p = torch.tensor([[0.5, 0.3, 0.2], [0.5, 0.3, 0.2]])
    P = torch.tensor([[0.9, 0.06, 0.04], [0.5, 0.3, 0.2]])  # it had known the first sample better
    ratios = []
    for n in range(2):
        norms = []
        for weight in (a, 0.0):
            term, model = remembering(p[n : n + 1].log(), P[n : n + 1], weight)
            term(batch([0])).backward()
            norms.append(model.logits.grad.abs().sum().item())
        ratios.append(norms[0] / norms[1])
    assert ratios == pytest.approx([1 - a * 0.1 / 0.5, 1 - a], abs=1e-6)
    assert ratios[0] > ratios[1]


# -- the table ------------------------------------------------------------------------------------------------------


def test_the_table_holds_the_softmax_of_the_last_meeting():
    memory = PredictionMemory(4, 2)
    unseen = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    assert torch.equal(memory.recall(torch.arange(4), unseen), unseen)
    memory.remember(torch.tensor([2, 0]), torch.tensor([[0.3, 0.7], [0.6, 0.4]]))
    memory.remember(torch.tensor([2]), torch.tensor([[0.2, 0.8]]))
    expected = torch.tensor([[0.6, 0.4], [1.0, 0.0], [0.2, 0.8], [1.0, 0.0]])
    assert torch.equal(memory.recall(torch.arange(4), unseen), expected)
    half = PredictionMemory(4, 2, dtype=torch.float16)
    half.remember(torch.tensor([1]), torch.tensor([[0.123456, 0.876544]]))
    known = half.recall(torch.tensor([1]), unseen[:1])
    assert known.dtype == torch.float32 and half.table.dtype == torch.float16
    assert known[0, 0].item() == pytest.approx(0.123456, abs=1e-4)


def test_looking_does_not_change_the_table():
    term, _ = remembering(random_logits(0), random_logits(1).softmax(-1), 0.5)
    before = copy.deepcopy(term.memory.state_dict())
    term.eval()
    term(batch(LABELS))
    assert all(torch.equal(before[key], value) for key, value in term.memory.state_dict().items())
    term.train()
    term(batch(LABELS))
    torch.testing.assert_close(term.memory.table, random_logits(0).softmax(-1))


# -- in training, against a loop in plain PyTorch -------------------------------------------------------------------


def data() -> list[dict[str, Tensor]]:
    inputs = torch.randn(SAMPLES, WIDTH, generator=torch.Generator().manual_seed(3))
    return [{"inputs": inputs[n], "labels": torch.tensor(LABELS[n]), "index": torch.tensor(n)} for n in range(SAMPLES)]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, 8), nn.Tanh(), nn.Linear(8, CLASSES))


BATCH, EPOCHS = 4, 5
STEPS = EPOCHS * (SAMPLES // BATCH)


def train(folder: Path, kind: str, alpha: float, *, steps: int = STEPS, look: bool = False) -> nn.Module:
    model = net()
    student = Observed(model)
    weight = ByEpoch(alpha, EPOCHS)
    objective: Any = CrossEntropy(student.output())
    if kind == "table":
        objective = RememberedTargets(student.output(), PredictionMemory(SAMPLES, CLASSES), alpha=weight)
    elif kind == "snapshot":
        objective = SnapshotTargets(student, output=None, alpha=weight)
    stage = Train(
        "student",
        Player("student", student, objective, optimizer=sgd(0.5)),
        source=Batches(data(), BATCH, seed=1),
        steps=steps,
        evaluate=(lambda: {"loss": float(objective(batch_of(range(4)), 0.5))}) if look else None,
        eval_every=1,
    )
    Run(folder, quiet=True).execute([stage])
    return model


def batch_of(numbers: Any) -> dict[str, Tensor]:
    return torch.utils.data.default_collate([data()[n] for n in numbers])


def by_hand(kind: str, alpha: float) -> nn.Module:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    source = Batches(data(), BATCH, seed=1)
    past = {n: [float(k == LABELS[n]) for k in range(CLASSES)] for n in range(SAMPLES)}
    snapshot: nn.Module | None = None
    for step in range(STEPS):
        rows = next(source)
        epoch = step // (SAMPLES // BATCH)
        if step % (SAMPLES // BATCH) == 0 and epoch:
            snapshot = copy.deepcopy(model)
        a = alpha * (epoch + 1) / EPOCHS
        logs = model(rows["inputs"]).log_softmax(-1)
        loss = torch.zeros(())
        for row, (n, inputs) in enumerate(zip(rows["index"].tolist(), rows["inputs"], strict=True)):
            P = past[n]
            if kind == "snapshot" and snapshot is not None:
                P = snapshot(inputs).softmax(-1).tolist()
            for k in range(CLASSES):
                loss = loss - ((1 - a) * (k == LABELS[n]) + a * P[k]) * logs[row, k] / BATCH
            if kind == "table":
                past[n] = logs[row].exp().tolist()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def distance(one: nn.Module, other: nn.Module) -> float:
    return max((a - b).abs().max().item() for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["table", "snapshot"])
def test_against_a_loop_by_hand(tmp_path, kind):
    assert distance(train(tmp_path, kind, 0.9), by_hand(kind, 0.9)) < 2e-6
    assert distance(by_hand(kind, 0.9), by_hand("labels", 0.0)) > 1e-3  # and that is not what the labels alone give


def test_the_two_kinds_of_past_differ(tmp_path):
    assert distance(by_hand("table", 0.9), by_hand("snapshot", 0.9)) > 1e-4


@pytest.mark.parametrize("kind", ["table", "snapshot"])
def test_without_weight_and_in_the_first_epoch_training_is_that_of_the_labels(tmp_path, kind):
    plain = train(tmp_path / "plain", "labels", 0.0)
    assert distance(train(tmp_path / "zero", kind, 0.0), plain) < 2e-6
    first = SAMPLES // BATCH
    plain = train(tmp_path / "plain-first", "labels", 0.0, steps=first)
    assert distance(train(tmp_path / "first", kind, 0.9, steps=first), plain) < 2e-6
    plain = train(tmp_path / "plain-longer", "labels", 0.0, steps=first + 1)
    assert distance(train(tmp_path / "longer", kind, 0.9, steps=first + 1), plain) > 1e-4


@pytest.mark.parametrize("kind", ["table", "snapshot"])
def test_evaluating_changes_nothing(tmp_path, kind):
    looked, plain = train(tmp_path / "looked", kind, 0.9, look=True), train(tmp_path / "plain", kind, 0.9)
    assert distance(looked, plain) == 0.0


@pytest.mark.parametrize("kind", ["table", "snapshot"])
def test_the_past_is_saved_with_the_term(kind):
    model = net()

    def term() -> Any:
        student = Observed(model)
        if kind == "table":
            return RememberedTargets(student.output(), PredictionMemory(SAMPLES, CLASSES), alpha=linear(1.0, 1.0))
        return SnapshotTargets(student, output=None, alpha=linear(1.0, 1.0))

    first, resumed = term(), term()
    first(batch_of(range(8)), Progress(0, 10, epoch=1))
    with torch.no_grad():
        model[0].weight.add_(0.3)
    resumed.load_state_dict(first.state_dict())
    rows, now = batch_of(range(SAMPLES)), Progress(1, 10, epoch=1)
    assert torch.equal(first(rows, now), resumed(rows, now))
    fresh = term()
    assert not torch.equal(first(rows, now), fresh(rows, now))
    student_weights = {id(p) for p in model.parameters()}
    assert not student_weights & {id(p) for p in first.parameters()}  # the player's, not the term's
    assert not any(p.requires_grad for p in first.parameters())


# -- the system -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("past", ["table", "snapshot"])
def test_the_system_trains_with_this(tmp_path, past):
    """a_t is logged; it is alpha t / T, T the epochs of the run; without weight the student is the baseline."""
    fields = {**PSKD.smoke, "train_size": 128, "batch_size": 32, "steps": 10, "past": past}
    done = Run(tmp_path / "run", quiet=True).execute(PSKD.make(**fields, alpha=0.6))
    (file,) = (tmp_path / "run").glob("stages/*-student/metrics.jsonl")
    lines = [line for line in map(json.loads, file.read_text().splitlines()) if line["kind"] == "train"]
    assert lines[-1]["values"]["PSKD.alpha"] == pytest.approx(0.6 * math.ceil(10 / 4) / 3)
    weightless = Run(tmp_path / "zero", quiet=True).execute(PSKD.make(**fields, alpha=0.0))

    def weights(artifact: Any) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        return load_file(artifact.path / "model.safetensors")

    baseline, student, same = (weights(a) for a in (done["baseline"], done["student"], weightless["student"]))
    for name, tensor in baseline.items():
        torch.testing.assert_close(same[name], tensor, rtol=1e-3, atol=1e-5)
    assert any((student[name] - tensor).abs().max() > 1e-3 for name, tensor in baseline.items())
