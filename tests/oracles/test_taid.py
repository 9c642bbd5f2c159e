"""TAID (card 048) against what its paper and its authors' code say: the target, its gradient, the controller of t."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse import Observed, Player, Run, TokenMatch, Train, sgd
from stillhouse.base.errors import ConfigError
from stillhouse.core.schedule import Progress, linear
from stillhouse.losses.divergences import ForwardKL, InterpolatedForwardKL
from stillhouse.objectives import LanguageHead, MomentumRamp
from stillhouse.systems import get_system
from stillhouse.tasks.language import LanguageTask


class Table(nn.Module):
    """A language model whose logits after a token are a row of a table."""

    def __init__(self, logits_VV: Tensor) -> None:
        super().__init__()
        size = logits_VV.shape[1]
        self.embed = nn.Embedding.from_pretrained(logits_VV.clone(), freeze=False)
        self.head = nn.Linear(size, size, bias=False, dtype=logits_VV.dtype)
        self.head.weight = nn.Parameter(torch.eye(size, dtype=logits_VV.dtype))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def head(model: Observed) -> LanguageHead:
    return LanguageHead(model.tap("head", of="input"), model.parameter("head.weight"))


def taid(student: nn.Module, teacher: nn.Module, t: Any, divergence: Any = None) -> TokenMatch:
    s, p = Observed(student), Observed(teacher, frozen=True)
    if divergence is not None:
        return TokenMatch(head(s), head(p), divergence)
    return TokenMatch(head(s), head(p), InterpolatedForwardKL(t=0.0), t=t, name="TAID")


def gradient(z_s_VV: Tensor, z_p_VV: Tensor, t: float | None, ids: list[int], mask: list[int] | None = None) -> Tensor:
    """Gradient on the student's table; ``t`` None: of the forward KL."""
    student = Table(z_s_VV)
    objective = taid(student, Table(z_p_VV), t, ForwardKL() if t is None else None)
    batch = {"input_ids": torch.tensor([ids])}
    if mask is not None:
        batch["loss_mask"] = torch.tensor([mask])
    objective(batch, 0.0).backward()
    return student.embed.weight.grad


def tables(size: int = 5, gap: float | None = None) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(size)
    z_s, direction = (torch.randn(size, size, generator=generator, dtype=torch.float64) for _ in range(2))
    return z_s, (2 * direction if gap is None else z_s + gap * direction)


# -- the target and its gradient ------------------------------------------------------------------------------------


def test_the_card_s_numbers():
    """z_s = (0, 0), z_p = (2, 0), t = 0.5: the gradient on z_s is (-0.2311, 0.2311)."""
    z_s, z_p = torch.tensor([[0.0, 0.0]] * 2), torch.tensor([[2.0, 0.0]] * 2)
    found = gradient(z_s, z_p, 0.5, [0, 1])
    torch.testing.assert_close(found[0], torch.tensor([-0.2311, 0.2311]), rtol=0, atol=5e-5)
    loss = taid(Table(z_s), Table(z_p), 0.5)({"input_ids": torch.tensor([[0, 1]])})
    assert loss.item() == pytest.approx(math.log(2))  # the cross-entropy to a uniform student, whatever the target
    forward_kl = gradient(z_s, z_p, None, [0, 1])
    assert forward_kl[0, 0].item() == pytest.approx(0.5 - 1 / (1 + math.exp(-2)))  # plain KD pulls harder


@pytest.mark.parametrize("t", [0.2, 0.5, 0.9])
def test_against_a_loop_over_tokens_and_vocabulary(t):
    """Masked positions count nothing; the target takes no gradient."""
    z_s, z_p = tables()
    ids, mask = [0, 3, 1, 4, 2, 0], [1, 1, 0, 1, 0, 1]
    expected, total = torch.zeros(5, 5, dtype=torch.float64), 0.0
    kept = [place for place in range(5) if mask[place + 1]]
    for place in kept:
        row = ids[place]
        mixed = [(1 - t) * float(z_s[row, v]) + t * float(z_p[row, v]) for v in range(5)]
        p_t = [math.exp(z) / sum(map(math.exp, mixed)) for z in mixed]
        q = [math.exp(float(z)) / sum(math.exp(float(other)) for other in z_s[row]) for z in z_s[row]]
        total -= sum(p * math.log(x) for p, x in zip(p_t, q, strict=True)) / len(kept)
        for v in range(5):
            expected[row, v] += (q[v] - p_t[v]) / len(kept)
    torch.testing.assert_close(gradient(z_s, z_p, t, ids, mask), expected)
    batch = {"input_ids": torch.tensor([ids]), "loss_mask": torch.tensor([mask])}
    assert taid(Table(z_s), Table(z_p), t)(batch, 0.0).item() == pytest.approx(total)


def test_at_one_it_is_forward_kl():
    z_s, z_p = tables()
    ids = [0, 1, 2, 3, 4]
    torch.testing.assert_close(gradient(z_s, z_p, 1.0, ids), gradient(z_s, z_p, None, ids))
    batch = {"input_ids": torch.tensor([ids])}
    cross_entropy, kl = (taid(Table(z_s), Table(z_p), 1.0, d)(batch).item() for d in (None, ForwardKL()))
    p = z_p[:4].softmax(-1)
    assert cross_entropy - kl == pytest.approx(float(-(p * p.log()).sum(-1).mean()))  # the teacher's entropy


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_at_zero_there_is_nothing_to_learn(dtype):
    z_s, z_p = (z.to(dtype) for z in tables())
    assert gradient(z_s, z_p, 0.0, [0, 1, 2, 3, 4]).abs().max().item() == 0.0
    assert gradient(z_s, z_p, None, [0, 1, 2, 3, 4]).abs().max().item() > 0.01


@pytest.mark.parametrize("t", [0.1, 0.4, 0.8])
def test_small_gap_identity(t):
    """gradient(TAID at t) = t gradient(forward KL) + O(gap^2): halving the gap quarters what is left."""
    ids = [0, 1, 2, 3, 4, 0]
    left = []
    for gap in (1e-2, 5e-3):
        z_s, z_p = tables(gap=gap)
        ours, forward_kl = gradient(z_s, z_p, t, ids), gradient(z_s, z_p, None, ids)
        left.append((ours - t * forward_kl).norm().item())
        assert left[-1] < 0.01 * forward_kl.norm().item()
    assert left[0] / left[1] == pytest.approx(4.0, rel=0.05)


@given(student=st.floats(-20, 20), teacher=st.floats(-20, 20), t=st.floats(0, 1))
def test_constants_on_the_logits_change_nothing(student, teacher, t):
    z_s, z_p = tables()
    ids = [0, 1, 2, 3, 4]
    moved = gradient(z_s + student, z_p + teacher, t, ids)
    torch.testing.assert_close(moved, gradient(z_s, z_p, t, ids), rtol=1e-9, atol=1e-11)


# -- the controller -------------------------------------------------------------------------------------------------


class Scalars:
    """The authors' rule in plain numbers, as the card has it."""

    def __init__(self, start: float, end: float, alpha: float, beta: float, eps: float = 1e-15) -> None:
        self.t, self.mom, self.before = start, 0.0, None
        self.start, self.end, self.alpha, self.beta, self.eps = start, end, alpha, beta, eps

    def update(self, loss: float, n: int, total: int) -> float:
        if self.before is None:
            self.before = loss
            return self.t
        delta = (self.before - loss) / (self.before + self.eps)
        self.mom = self.beta * self.mom + (1 - self.beta) * delta
        sigmoid = 0.5 * (1 + math.tanh(self.mom / 2))
        step = self.alpha * sigmoid * (1 - self.t)
        t_lin = self.start + (self.end - self.start) * n / total
        self.t = min(self.end, max(t_lin, self.t + step))
        self.before = loss
        return self.t


def test_the_controller_by_hand():
    """t = 0.4, alpha = 5e-4, momentum 0: D = 1.5e-4; half-way through, t_lin = 0.7 is larger."""
    ramp = MomentumRamp(0.4, alpha=5e-4)
    ramp.observe(2.0, Progress(0, 100))
    assert ramp.value(Progress(1, 100)) == pytest.approx(0.4, abs=1e-15)  # the first loss has nothing to compare with
    ramp.observe(2.0, Progress(0, 100))
    assert ramp.value(Progress(1, 100)) == pytest.approx(0.4 + 1.5e-4, abs=1e-12)
    ramp.observe(2.0, Progress(50, 100))
    assert ramp.value(Progress(51, 100)) == pytest.approx(0.7, abs=1e-12)


def test_five_steps_by_hand():
    """Falling losses push harder than rising ones."""
    losses = [3.0, 2.5, 2.6, 1.9, 1.9]
    ramp, scalars = MomentumRamp(0.3, 0.9, alpha=0.4, beta=0.5), Scalars(0.3, 0.9, 0.4, 0.5)
    for n, loss in enumerate(losses):
        ramp.observe(loss, Progress(n, 5))
        assert ramp.value(Progress(n + 1, 5)) == pytest.approx(scalars.update(loss, n, 5), abs=1e-15)
    falling, rising = MomentumRamp(0.3, alpha=0.4), MomentumRamp(0.3, alpha=0.4)
    for loss in (4.0, 3.0, 2.0):
        falling.observe(loss, Progress(0, 100))
        rising.observe(6.0 - loss, Progress(0, 100))
    assert falling.value(Progress(0, 100)) > rising.value(Progress(0, 100))


@given(
    losses=st.lists(st.floats(0.01, 20), min_size=2, max_size=40),
    start=st.floats(0, 0.9),
    span=st.floats(0, 1),
    alpha=st.floats(0, 2),
    beta=st.floats(0, 0.999),
)
@settings(max_examples=50, deadline=None)
def test_the_controller_against_the_rule_in_scalars(losses, start, span, alpha, beta):
    end = start + span * (1 - start)
    total = len(losses)
    ramp, scalars = MomentumRamp(start, end, alpha=alpha, beta=beta), Scalars(start, end, alpha, beta)
    before = ramp.value(Progress(0, total))
    assert before == pytest.approx(start, abs=1e-7)
    for n, loss in enumerate(losses):
        ramp.observe(loss, Progress(n, total))
        t = ramp.value(Progress(n + 1, total))
        assert t == pytest.approx(scalars.update(loss, n, total), abs=1e-9)
        assert t >= before - 1e-12  # never falls
        assert t >= start + (end - start) * (n / total if n else 0) - 1e-9  # never below the straight line
        assert t <= end + 1e-9
        before = t
    ramp.observe(losses[-1], Progress(total, total))
    assert ramp.value(Progress(total, total)) == pytest.approx(end, abs=1e-9)


def test_without_adaptation_it_is_the_straight_line():
    ramp = MomentumRamp(0.2, alpha=0.0)
    for n in range(10):
        ramp.observe(5.0 - n, Progress(n, 10))
        assert ramp.value(Progress(n + 1, 10)) == pytest.approx(linear(0.2, 1.0)(Progress(n, 10)))


def test_impossible_ends_are_refused():
    for start, end in ((0.9, 0.5), (-0.1, 1.0), (0.0, 1.1)):
        with pytest.raises(ConfigError, match="0 <= start <= end <= 1"):
            MomentumRamp(start, end)


def test_the_controller_is_saved_whole():
    """(t, momentum, J_prev): a controller that is put back goes on as if it had never stopped."""
    first, resumed = MomentumRamp(0.3, alpha=0.3), MomentumRamp(0.3, alpha=0.3)
    for n, loss in enumerate([3.0, 2.0, 2.5]):
        first(Progress(n, 20))
        first.record(torch.tensor(loss), Progress(n, 20))
    resumed.load_state_dict(first.state_dict())
    for n, loss in enumerate([2.4, 1.0, 0.5], start=3):
        assert first(Progress(n, 20)) == resumed(Progress(n, 20))
        for ramp in (first, resumed):
            ramp.record(torch.tensor(loss), Progress(n, 20))
    assert first(Progress(6, 20)) == resumed(Progress(6, 20)) > 0.3
    assert first.state_dict().keys() >= {"t", "momentum", "previous", "pending"}


# -- in training ----------------------------------------------------------------------------------------------------


def run(
    folder: Path, steps: int, ramp: Any, *, accumulate: int = 1, look: int = 1000, seed: int = 0
) -> list[dict[str, Any]]:
    """Train a table towards another one and return the log, a line a step."""
    z_s, z_p = tables(6)
    objective = taid(Table(z_s.float()), Table(z_p.float()), ramp)
    generator = torch.Generator().manual_seed(seed)
    data = [{"input_ids": torch.randint(0, 6, (2, 7), generator=generator)} for _ in range(4)]

    def evaluate() -> dict[str, float]:
        objective.eval()
        try:
            return {"loss": float(objective({"input_ids": torch.zeros(1, 3, dtype=torch.long)}, 0.3))}
        finally:
            objective.train()

    (signal, *_) = objective.signals()
    player = Player("student", signal.observed, objective, optimizer=sgd(0.5))
    stage = Train(
        "student",
        player,
        source=data,
        steps=steps,
        accumulate=accumulate,
        log_every=1,
        evaluate=evaluate,
        eval_every=look,
    )
    Run(folder, quiet=True).execute([stage])
    lines = (folder / "stages/01-student/metrics.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "train"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_t_in_training_follows_the_rule(tmp_path, accumulate):
    """Every t is what the rule makes of the losses logged so far; one update a step, however many micro-batches.

    The value used in step n comes from the losses of steps 0 to n - 1, as in the authors' code, so the last step of N
    is taken at t >= t_lin((N - 2) / N), two steps' worth below the end; after one more loss it would be t_end.
    """
    steps, start, alpha = 12, 0.25, 0.2
    lines = run(tmp_path, steps, MomentumRamp(start, alpha=alpha), accumulate=accumulate)
    scalars = Scalars(start, 1.0, alpha, 0.99)
    used = [line["values"]["TAID.t"] for line in lines]
    expected = start
    for n, line in enumerate(lines):
        assert used[n] == pytest.approx(expected, abs=1e-7)
        expected = scalars.update(line["terms"]["TAID"]["value"], n, steps)
    assert used[:2] == pytest.approx([start, start])  # the first loss changes nothing
    assert all(later > now for now, later in itertools.pairwise(used[1:]))
    assert all(t >= start + (1 - start) * (n - 1) / steps - 1e-9 for n, t in enumerate(used) if n)
    assert any(t > start + (1 - start) * (n - 1) / steps + 0.01 for n, t in enumerate(used) if n > 1)  # and faster
    assert 1 - 2 * (1 - start) / steps - 1e-9 <= used[-1] <= 1.0


def test_evaluating_does_not_move_t(tmp_path):
    """The released module moves t on every forward, validation included; here training alone does."""
    looked, plain = (run(tmp_path / str(look), 8, MomentumRamp(0.2, alpha=0.3), look=look) for look in (1, 1000))
    assert [line["values"]["TAID.t"] for line in looked] == [line["values"]["TAID.t"] for line in plain]
    assert [line["loss"] for line in looked] == [line["loss"] for line in plain]


def test_the_gradient_starts_small_and_grows(tmp_path):
    """What the interpolation is for. Forward KL does the opposite: it starts with its largest gradient."""
    z_s, z_p = tables(6)
    ids = list(range(6))
    full = gradient(z_s, z_p, None, ids).norm().item()
    norms = [gradient(z_s, z_p, t, ids).norm().item() for t in (0.05, 0.2, 0.5, 1.0)]
    assert norms == sorted(norms) and norms[0] < 0.15 * full
    assert norms[-1] == pytest.approx(full)


# -- the system -----------------------------------------------------------------------------------------------------


def llama(width: int) -> LlamaForCausalLM:
    torch.manual_seed(width)
    sizes = {"hidden_size": width, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, num_key_value_heads=2, **sizes))
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


def objective_of(system: str, monkeypatch: pytest.MonkeyPatch, **values: Any) -> tuple[Any, nn.Module, nn.Module]:
    """What the system would train its student with, the student, and its teacher; nothing is run."""
    student, teacher = llama(8), llama(16)

    class Stub:
        vocab_size = 32

        def observed_teacher(self) -> Observed:
            return Observed(teacher, frozen=True)

        def train(self, name: str, objective: Any) -> Any:
            return objective(Observed(student))

    def prepare(*_: Any) -> Any:
        return Stub()
        yield

    monkeypatch.setattr(LanguageTask, "prepare", staticmethod(prepare))
    stages = get_system(system).make(teacher="x", data="y", **values).stages(None)  # type: ignore[arg-type]
    return next(stages), student, teacher


@pytest.mark.parametrize("adaptive", [True, False])
def test_the_system_trains_with_this(monkeypatch, adaptive):
    objective, student, teacher = objective_of("taid", monkeypatch, t_start=0.3, adaptive=adaptive, alpha=0.5)
    batch = {"input_ids": torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(0))}
    objective(batch, Progress(0, 10)).backward()
    found = student.lm_head.weight.grad.clone()
    student.zero_grad()
    z_s, z_p = student(**batch).logits[:, :-1], teacher(**batch).logits[:, :-1].detach()
    target = (0.7 * z_s.detach() + 0.3 * z_p).softmax(-1)
    (-(target * z_s.log_softmax(-1)).sum(-1).mean()).backward()
    torch.testing.assert_close(found, student.lm_head.weight.grad, rtol=1e-4, atol=1e-6)
    for n in range(1, 5):
        objective(batch, Progress(n, 10))
    (value,) = objective.evaluate(*_turn(objective, batch), Progress(5, 10))
    line = 0.3 + 0.7 * (0.4 if adaptive else 0.5)  # the adaptive one lags a step, and adds to it
    assert value.extras["t"] > line + 0.01 if adaptive else value.extras["t"] == pytest.approx(line)


def test_the_system_refuses_ends_that_cross(monkeypatch):
    with pytest.raises(ConfigError, match=r"start=0\.9, end=0\.5"):
        objective_of("taid", monkeypatch, t_start=0.9, t_end=0.5)


def _turn(objective: Any, batch: Any) -> tuple[Any, Any]:
    from stillhouse.core.observed import Turn

    return Turn(objective.signals()), batch
