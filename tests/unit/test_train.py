"""The loop against loops written by hand, and what it leaves behind: weights, log lines, modes, hooks."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from stillhouse import (
    EMA,
    Batches,
    CrossEntropy,
    FeatureMSE,
    KLDivergence,
    LogitMatch,
    Observed,
    Player,
    Run,
    Term,
    TokenCrossEntropy,
    Train,
    adamw,
    linear,
    sgd,
)
from stillhouse.base.errors import StillhouseError
from stillhouse.base.files import seed_all
from stillhouse.core.engine import Engine
from stillhouse.losses.divergences import InterpolatedForwardKL
from stillhouse.objectives import MomentumRamp, head_of


class Net(nn.Module):
    def __init__(self, width: int = 6, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        self.body = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width) if norm else nn.Identity()
        self.drop = nn.Dropout(dropout)
        self.head = nn.Linear(width, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.body(inputs)).tanh()))


def net(seed: int = 0, **sizes: Any) -> Net:
    torch.manual_seed(seed)
    return Net(**sizes)


def pairs(count: int, size: int = 8, seed: int = 7) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(count, size, 4, generator=generator)
    labels = torch.randint(0, 3, (count, size), generator=generator)
    return list(zip(inputs, labels, strict=True))


class Mean(Term):
    """The mean of a function of the signals and the batch; sees them as they are, not detached."""

    def __init__(self, function: Callable[..., Tensor], *, name: str | None = None, **signals: Any) -> None:
        super().__init__(name=name, **signals)
        self.function = function

    def compute(self, *, progress: Any, **inputs: Any) -> Tensor:
        return self.function(**inputs).mean()


class Trained:
    """A stage that has run: its log and its artifact."""

    def __init__(self, folder: Path, name: str) -> None:
        (self.folder,) = folder.glob(f"stages/*-{name}")
        self.log = [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]
        self.lines = [line for line in self.log if line["kind"] == "train"]
        self.record = json.loads((self.folder / "stage.json").read_text())

    @property
    def weights(self) -> dict[str, Tensor]:
        return load_file(self.folder / "artifact" / "model.safetensors")


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Trained]:
    count = iter(range(1000))

    def run(players: Any, source: Any = None, *, engine: Engine | None = None, **options: Any) -> Trained:
        folder = tmp_path / f"run-{next(count)}"
        Run(folder, quiet=True, engine=engine).execute([Train("student", players, source=source, **options)])
        return Trained(folder, "student")

    return run


def kd(student: nn.Module, teacher: nn.Module, **options: Any) -> Player:
    s, t = Observed(student), Observed(teacher, frozen=True)
    objective = CrossEntropy(s.output()) + 0.5 * KLDivergence(s.output(), t.output(), temperature=2.0)
    return Player("student", s, objective, **options)


def kd_loss(student: nn.Module, teacher: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
    logits = student(inputs)
    with torch.no_grad():
        log_p = (teacher(inputs) / 2.0).log_softmax(-1)
    rows = (log_p.exp() * (log_p - (logits / 2.0).log_softmax(-1))).sum(-1) * 4.0
    return F.cross_entropy(logits, labels) + 0.5 * (rows.sum() / len(rows))


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)


def close(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# -- one player -----------------------------------------------------------------------------------------------------


def test_the_loop_is_the_loop_by_hand_bit_for_bit(train):
    """Knowledge distillation with AdamW, clipping, a learning-rate schedule and dropout."""
    data, teacher, student = pairs(3), net(1, width=12), net(0, dropout=0.3)
    mine = copy.deepcopy(student)
    player = kd(student, teacher, optimizer=adamw(0.05, weight_decay=0.1), lr=linear(1.0, 0.0, warmup=2), clip=0.5)
    done = train(player, data, steps=10)

    seed_all(0, "student")  # as the stage is seeded
    mine.train()
    matrices, vectors = ([p for p in mine.parameters() if (p.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=0.05)
    clipped = []
    for step in range(10):
        loss = kd_loss(mine, teacher, *data[step % 3])
        optimizer.zero_grad()
        loss.backward()
        clipped.append(float(nn.utils.clip_grad_norm_(mine.parameters(), 0.5)) > 0.5)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 * (step / 10 / 0.2 if step < 2 else 1 - (step / 10 - 0.2) / 0.8)
        optimizer.step()
    assert any(clipped) and not all(clipped)  # both cases happened
    assert same(done.weights, mine.state_dict())
    assert same(done.weights, student.state_dict())
    assert not same(done.weights, net(0, dropout=0.3).state_dict())


def test_accumulation_equals_the_big_batch(train):
    small = pairs(12, size=4)
    big = [tuple(torch.cat(parts) for parts in zip(*small[i : i + 3], strict=True)) for i in range(0, 12, 3)]
    split, whole = net(0), net(0)
    train(kd(split, net(1), optimizer=sgd(0.3), clip=0.5), small, steps=8, accumulate=3)
    train(kd(whole, net(1), optimizer=sgd(0.3), clip=0.5), big, steps=8)
    close(split.state_dict(), whole.state_dict(), rtol=1e-4, atol=1e-6)
    assert not same(split.state_dict(), net(0).state_dict())


def test_batches_of_the_library_and_their_epochs(train):
    """Sources are drawn from once a micro-batch, and terms see which pass over the data it is."""
    seen = []

    def note(out: Tensor, batch: Any) -> Tensor:
        seen.append(batch["inputs"][:, 0].tolist())
        return out

    student = Observed(nn.Linear(1, 1))
    epochs = []

    class Epochs(Mean):
        def compute(self, *, progress: Any, **inputs: Any) -> Tensor:
            epochs.append((progress.step, progress.steps, progress.epoch))
            return super().compute(progress=progress, **inputs)

    source = Batches(torch.arange(6.0)[:, None], 2, gather=True, seed=3)
    train(Player("student", student, Epochs(note, out=student.output())), source, steps=4, accumulate=2)
    again = Batches(torch.arange(6.0)[:, None], 2, gather=True, seed=3)
    assert seen == [next(again)[:, 0].tolist() for _ in range(8)]
    assert [step for step, *_ in epochs] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert {steps for _, steps, _ in epochs} == {4}
    assert [epoch for *_, epoch in epochs[1::2]] == [0, 1, 1, 2]  # after 2, 4, 6 and 8 batches of 3 a pass


def test_only_what_is_trainable_is_trained(train):
    student = net(0)
    before = copy.deepcopy(student.state_dict())
    train(kd(student, net(1), trainable=r"^head\.weight$"), pairs(2), steps=3)
    moved = {name for name, tensor in student.state_dict().items() if not torch.equal(tensor, before[name])}
    assert moved == {"head.weight"}


def test_players_may_be_built_late(train):
    built = []

    def build() -> Player:
        built.append(True)
        return kd(net(0), net(1))

    assert same(train(build, pairs(2), steps=3).weights, train(kd(net(0), net(1)), pairs(2), steps=3).weights)
    assert built == [True]


def test_players_that_cannot_play_are_refused(train):
    with pytest.raises(StillhouseError, match="player 'student' has no source of batches"):
        train(kd(net(0), net(1)), steps=1)
    with pytest.raises(StillhouseError, match="two players have the same name"):
        train([kd(net(0), net(1)), kd(net(2), net(1))], pairs(1), steps=1)


# -- several players ------------------------------------------------------------------------------------------------


def watcher(name: str, seen: list[tuple[str, int, float]], **options: Any) -> Player:
    """A player that notes its turns and what it was given."""
    model = Observed(nn.Linear(1, 1), name=name)

    class Watch(Mean):
        def compute(self, *, progress: Any, batch: Any, **inputs: Any) -> Tensor:
            seen.append((name, progress.step, float(batch["inputs"])))
            return super().compute(progress=progress, batch=batch, **inputs)

    return Player(name, model, Watch(lambda out, batch: out, out=model.output()), **options)


def numbers(start: int = 0) -> Iterator[Tensor]:
    while True:
        yield torch.full((1, 1), float(start))
        start += 1


@pytest.mark.parametrize(("steps", "every"), [(11, 5), (10, 5), (1, 5), (7, 1)])
def test_cadence(train, steps, every):
    """Card 066: the generator is updated floor(N / r) + 1 times in steps 0..N, the critic every time."""
    seen: list[tuple[str, int, float]] = []
    train([watcher("generator", seen, every=every), watcher("critic", seen)], numbers(), steps=steps)
    last = steps - 1
    assert [step for name, step, _ in seen if name == "critic"] == list(range(steps))
    assert len([step for name, step, _ in seen if name == "generator"]) == last // every + 1
    assert [name for name, step, _ in seen if step == 0] == ["generator", "critic"]


def test_players_share_the_batch_of_a_step_and_repeats_draw_fresh_ones(train):
    seen: list[tuple[str, int, float]] = []
    sides = [watcher("a", seen, every=2), watcher("b", seen, repeats=3), watcher("c", seen)]
    train(sides, numbers(), steps=2)
    assert seen == [
        ("a", 0, 0.0), ("b", 0, 0.0), ("b", 0, 1.0), ("b", 0, 2.0), ("c", 0, 0.0),
        ("b", 1, 3.0), ("b", 1, 4.0), ("b", 1, 5.0), ("c", 1, 3.0),
    ]  # fmt: skip


def test_players_with_sources_of_their_own(train):
    seen: list[tuple[str, int, float]] = []
    sides = [
        watcher("a", seen, source=numbers(100), repeats=2),
        watcher("b", seen),
        watcher("c", seen, source=numbers(200)),
    ]
    train(sides, numbers(), steps=2)
    assert seen == [
        ("a", 0, 100.0), ("a", 0, 101.0), ("b", 0, 0.0), ("c", 0, 200.0),
        ("a", 1, 102.0), ("a", 1, 103.0), ("b", 1, 1.0), ("c", 1, 201.0),
    ]  # fmt: skip


def sides(one: nn.Module, two: nn.Module, *, detach: bool, **options: Any) -> list[Player]:
    """Two models that want to agree; each objective reads the other's output."""
    a, b = Observed(one, name="a"), Observed(two, name="b")

    def apart(mine: Tensor, other: Tensor, batch: Any) -> Tensor:
        return (mine - 2 * other).square()

    def other(model: Observed) -> Any:
        return model.output().detach() if detach else model.output()

    return [
        Player("a", a, Mean(apart, mine=a.output(), other=other(b)), optimizer=sgd(0.1), **options),
        Player("b", b, Mean(apart, mine=b.output(), other=other(a)), optimizer=sgd(0.1), **options),
    ]


def descend(model: nn.Module, loss: Tensor, moments: dict[str, Tensor], *, retain: bool = False) -> dict[str, Tensor]:
    """New weights of ``model`` after a step of SGD with momentum 0.9 on ``loss``; no other model is touched."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(loss, parameters, retain_graph=retain)
    for name, gradient in zip(names, gradients, strict=True):
        moments[name] = 0.9 * moments[name] + gradient if name in moments else gradient
    return {name: p.detach() - 0.1 * moments[name] for name, p in zip(names, parameters, strict=True)}


@pytest.mark.parametrize("detach", [True, False])
def test_together_all_see_the_same_forwards(train, detach):
    data, models = pairs(3), [net(0), net(1)]
    one, two = copy.deepcopy(models)
    counts = [[], []]
    for model, calls in zip(models, counts, strict=True):
        model.register_forward_hook(lambda *_, calls=calls: calls.append(None))
    train(sides(*models, detach=detach), data, steps=4, together=True, shares_every=0)
    assert [len(calls) for calls in counts] == [4, 4]

    moments: list[dict[str, Tensor]] = [{}, {}]
    for step in range(4):
        left, right = one(data[step % 3][0]), two(data[step % 3][0])
        new = descend(one, (left - 2 * right).square().mean(), moments[0], retain=True)
        two.load_state_dict(descend(two, (right - 2 * left).square().mean(), moments[1]))
        one.load_state_dict(new)
    close(models[0].state_dict(), one.state_dict(), rtol=1e-5, atol=1e-6)
    close(models[1].state_dict(), two.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("detach", [True, False])
def test_one_after_the_other_sees_new_weights(train, detach):
    data, models = pairs(3), [net(0), net(1)]
    one, two = copy.deepcopy(models)
    train(sides(*models, detach=detach), data, steps=4)
    moments: list[dict[str, Tensor]] = [{}, {}]
    for step in range(4):
        inputs = data[step % 3][0]
        one.load_state_dict(descend(one, (one(inputs) - 2 * two(inputs)).square().mean(), moments[0]))
        two.load_state_dict(descend(two, (two(inputs) - 2 * one(inputs)).square().mean(), moments[1]))
    close(models[0].state_dict(), one.state_dict(), rtol=1e-5, atol=1e-6)
    close(models[1].state_dict(), two.state_dict(), rtol=1e-5, atol=1e-6)


def test_the_order_of_players_matters_unless_they_play_together(train):
    def ends(*, together: bool, turned: bool) -> dict[str, Tensor]:
        models = [net(0), net(1)]
        players = sides(*models, detach=True)
        train(players[::-1] if turned else players, pairs(3), steps=2, together=together)
        return models[0].state_dict()

    assert same(ends(together=True, turned=False), ends(together=True, turned=True))
    assert not same(ends(together=False, turned=False), ends(together=False, turned=True))


def test_together_accumulates_too(train):
    small = pairs(8, size=4)
    big = [tuple(torch.cat(parts) for parts in zip(*small[i : i + 2], strict=True)) for i in range(0, 8, 2)]
    split, whole = [net(0), net(1)], [net(0), net(1)]
    train(sides(*split, detach=False), small, steps=4, together=True, accumulate=2)
    train(sides(*whole, detach=False), big, steps=4, together=True)
    for one, other in zip(split, whole, strict=True):
        close(one.state_dict(), other.state_dict(), rtol=1e-4, atol=1e-6)


def test_an_adversary_gets_the_gradient_and_keeps_its_weights(train):
    """The generator learns through the critic, whose weights take no gradient in that turn and are left alone."""
    generator, critic = net(0), net(1)
    critic.body = nn.Linear(3, 6)
    made, judge = Observed(generator, name="generator"), Observed(critic, name="critic")
    takes_gradient = []

    def fool(score: Tensor, batch: Any) -> Tensor:
        takes_gradient.append([p.requires_grad for model in (generator, critic) for p in model.parameters()])
        return -score

    def flat(out: Tensor, batch: Any) -> Tensor:
        takes_gradient.append([p.requires_grad for model in (generator, critic) for p in model.parameters()])
        return 0 * out

    fake = judge.view("fake", feed={"inputs": made.output()})
    real = judge.view("real", lambda batch: {"inputs": batch["inputs"][:, :3]})
    players = [
        Player("generator", made, Mean(fool, score=fake.output()), optimizer=sgd(0.1)),
        Player("critic", judge, Mean(flat, out=real.output()), optimizer=sgd(0.1)),
    ]
    before, mine, data = copy.deepcopy(critic.state_dict()), net(0), pairs(1)
    train(players, data, steps=1)
    (-critic(mine(data[0][0])).mean()).backward()
    torch.testing.assert_close(generator.head.weight, mine.head.weight - 0.1 * mine.head.weight.grad)
    assert same(critic.state_dict(), before)  # its own objective is flat, and nothing leaked into it
    assert takes_gradient == [[True] * 4 + [False] * 4, [False] * 4 + [True] * 4]
    assert all(p.requires_grad for model in (generator, critic) for p in model.parameters())


def test_what_playing_together_cannot_do_is_refused(train):
    """One set of forwards for all: no sources, no repeats of one's own."""
    for options in ({"source": numbers(100)}, {"repeats": 2}):
        seen: list[tuple[str, int, float]] = []
        players = [watcher("a", seen), watcher("b", seen, **options)]
        with pytest.raises(StillhouseError, match="together"):
            train(players, numbers(), steps=1, together=True)


# -- averages, evaluation, the best ---------------------------------------------------------------------------------


def test_ema_is_the_result(train):
    student = net(0)
    start, history = copy.deepcopy(student.state_dict()), []

    def note() -> dict[str, float]:
        history.append(copy.deepcopy(student.state_dict()))
        return {}

    player = kd(student, net(1), optimizer=sgd(0.3), ema=EMA(student, 0.6))
    done = train(player, pairs(3), steps=5, evaluate=note, eval_every=1)
    assert len(history) == 5
    for name, found in done.weights.items():
        expected = 0.6**5 * start[name] + 0.4 * sum(0.6 ** (4 - i) * weights[name] for i, weights in enumerate(history))
        torch.testing.assert_close(found, expected)
    assert same(student.state_dict(), history[-1])  # the model itself is not averaged


def test_ema_moves_with_its_players_steps_only(train):
    student, other = net(0), net(2)
    ema = EMA(student, 0.5)
    moved = []
    update = ema.update
    ema.update = lambda progress: (moved.append(progress.step), update(progress))  # type: ignore[method-assign]
    sides = [
        Player("slow", s := Observed(student), CrossEntropy(s.output()), every=3, ema=ema),
        Player("fast", o := Observed(other), CrossEntropy(o.output())),
    ]
    train(sides, pairs(3), steps=7, accumulate=2)
    assert moved == [0, 3, 6]


def test_looking_does_not_change_the_run(train):
    """How often one evaluates, logs or measures shares: the same weights, with dropout and batch statistics."""

    def ends(**options: Any) -> dict[str, Tensor]:
        student = net(0, dropout=0.4, norm=True)

        def look() -> dict[str, float]:
            assert not student.training and not torch.is_grad_enabled()
            return {"loss": float(student(torch.randn(5, 4)).mean()), "chance": float(torch.rand(()))}

        return train(kd(student, net(1)), pairs(3), steps=6, evaluate=look, **options).weights

    reference = ends(eval_every=1000, log_every=1000, shares_every=0)
    assert same(ends(eval_every=1, log_every=1000, shares_every=0), reference)
    assert same(ends(eval_every=1000, log_every=1, shares_every=0), reference)
    assert same(ends(eval_every=1000, log_every=1000, shares_every=1), reference)
    assert same(ends(eval_every=2, log_every=3, shares_every=2), reference)


def test_validating_with_the_objective_does_not_steer_it(train):
    """TAID's released code moves t on validation batches too (card 048); here only training does."""

    def ends(eval_every: int) -> tuple[float, dict[str, Tensor]]:
        student, teacher = Observed(net(0)), Observed(net(1), frozen=True)
        ramp = MomentumRamp(0.2, alpha=0.5)
        objective = LogitMatch(student.output(), teacher.output(), InterpolatedForwardKL(t=0.2), t=ramp)

        def look() -> dict[str, float]:
            return {"loss": float(objective((torch.full((4, 4), 3.0), torch.zeros(4)), 0.0))}

        done = train(Player("student", student, objective), pairs(3), steps=6, evaluate=look, eval_every=eval_every)
        return float(ramp.t), done.weights

    (t, weights), (other, others) = ends(1), ends(1000)
    assert t == other
    assert same(weights, others)


def test_evaluation_times(train):
    done = train(kd(net(0), net(1)), pairs(3), steps=7, evaluate=lambda: {"x": 1.0}, eval_every=3)
    assert [line["step"] for line in done.log if line["kind"] == "eval"] == [3, 6, 7]


def scripted(values: list[float], student: nn.Module) -> tuple[Callable[[], dict[str, float]], list[dict[str, Tensor]]]:
    history: list[dict[str, Tensor]] = []

    def evaluate() -> dict[str, float]:
        history.append(copy.deepcopy(student.state_dict()))
        return {"score": values[len(history) - 1], "other": 0.0}

    return evaluate, history


@pytest.mark.parametrize(("best", "place"), [("score", 3), ("-score", 2), (None, 5)])
def test_the_best_weights_are_the_result(train, best, place):
    student = net(0)
    evaluate, history = scripted([3.0, 2.0, 9.0, 1.0, 4.0, 2.0], student)
    done = train(kd(student, net(1)), pairs(3), steps=6, evaluate=evaluate, eval_every=1, best=best)
    assert same(done.weights, history[place])
    assert len(history) == 6
    if best:
        assert done.record["best_step"] == place + 1
        assert done.record["metrics"]["score"] == [3.0, 2.0, 9.0, 1.0, 4.0, 2.0][place]


def test_the_best_of_an_average(train):
    student = net(0)
    ema = EMA(student, 0.5)
    evaluate, history = scripted([1.0, 5.0, 5.0], ema.module)
    done = train(kd(student, net(1), ema=ema), pairs(3), steps=3, evaluate=evaluate, eval_every=1, best="score")
    assert same(done.weights, history[0])


def test_patience(train):
    student = net(0)
    evaluate, history = scripted([3.0, 2.0, 2.0, 2.5, 0.0, 0.0], student)
    done = train(kd(student, net(1)), pairs(3), steps=12, evaluate=evaluate, eval_every=2, best="score", patience=2)
    assert len(history) == 4  # 2.0 was not better than 2.0, and 2.5 was not
    assert same(done.weights, history[1])
    assert done.record["steps"] == 8


def test_best_must_be_measured(train):
    with pytest.raises(StillhouseError, match="best='loss' is not among score, other"):
        train(kd(net(0), net(1)), pairs(1), steps=1, evaluate=lambda: {"score": 1.0, "other": 2.0}, best="loss")


# -- the log --------------------------------------------------------------------------------------------------------


def tagged(key: str, model: Observed, **options: Any) -> Mean:
    """A term whose value is in the batch."""
    return Mean(lambda out, batch: batch[key] + 0 * out, out=model.output(), name=key, **options)


def test_log_lines(train):
    model = Observed(nn.Linear(1, 1))
    objective = tagged("a", model) + linear(0.0, 1.0) * tagged("b", model)
    data = [{"inputs": torch.ones(1, 1), "a": torch.tensor(float(i)), "b": torch.tensor(10.0 * i)} for i in range(7)]
    player = Player("student", model, objective, optimizer=sgd(0.5), lr=linear(1.0, 0.0), clip=1.0)
    lines = train(player, data, steps=7, log_every=3, shares_every=0).lines
    assert [line["step"] for line in lines] == [3, 6, 7]
    for line, window in zip(lines, [(0, 1, 2), (3, 4, 5), (6,)], strict=True):
        n = len(window)
        assert line["player"] == "student"
        assert line["terms"]["a"] == pytest.approx({"value": sum(window) / n, "weight": 1.0})
        b = {"value": 10 * sum(window) / n, "weight": sum(i / 7 for i in window) / n}
        assert {key: line["terms"]["b"][key] for key in b} == pytest.approx(b)
        assert line["lr"] == pytest.approx(0.5 * (1 - window[-1] / 7))
        assert line["grad_norm"] == pytest.approx(0.0, abs=1e-6)


def test_the_logged_loss_is_the_mean_of_what_was_minimised(train):
    """Also where weights move between two lines: a mean of products is not a product of means."""
    model = Observed(nn.Linear(1, 1))
    data = [{"inputs": torch.ones(1, 1), "b": torch.tensor(10.0 * i)} for i in range(6)]
    lines = train(Player("student", model, linear(0.0, 1.0) * tagged("b", model)), data, steps=6, log_every=3).lines
    losses = [i / 6 * 10 * i for i in range(6)]
    assert [line["loss"] for line in lines] == pytest.approx([sum(losses[:3]) / 3, sum(losses[3:]) / 3])


def test_log_of_accumulated_steps(train):
    model = Observed(nn.Linear(1, 1))
    data = [{"inputs": torch.ones(1, 1), "a": torch.tensor(float(i))} for i in range(8)]
    lines = train(Player("student", model, tagged("a", model)), data, steps=4, accumulate=2, log_every=2).lines
    assert [(line["step"], line["terms"]["a"]["value"]) for line in lines] == [(2, 1.5), (4, 5.5)]


def test_every_player_has_lines_with_its_own_figures(train):
    """Gradient norms too, when they play together and step after each other."""
    models = [net(0), net(1)]
    norms = []
    for player, model in zip(sides(*copy.deepcopy(models), detach=True), models, strict=True):
        inputs = pairs(1)[0][0]
        other = models[1 - models.index(model)]
        (model(inputs) - 2 * other(inputs).detach()).square().mean().backward()
        norms.append(float(torch.cat([p.grad.flatten() for p in model.parameters()]).norm()))
        for one in models:
            one.zero_grad()
        assert player.clip is None
    lines = train(sides(*models, detach=True, clip=100.0), pairs(1), steps=1, together=True).lines
    assert [line["player"] for line in lines] == ["a", "b"]
    assert [line.get("grad_norm") for line in lines] == pytest.approx(norms, rel=1e-4)
    assert norms[0] != pytest.approx(norms[1], rel=1e-2)


def test_a_norm_is_logged_for_the_player_that_clips(train):
    models = [net(0), net(1)]
    one, two = sides(*models, detach=True)
    one.clip = 100.0
    lines = train([one, two], pairs(1), steps=1, together=True).lines
    assert ["grad_norm" in line for line in lines] == [True, False]


def test_shares_and_extras_in_the_log(train):
    student, teacher = Observed(net(0)), Observed(net(1), frozen=True)
    objective = CrossEntropy(student.output()) + KLDivergence(
        student.output(), teacher.output(), temperature=linear(4.0, 1.0)
    )
    lines = train(Player("student", student, objective), pairs(3), steps=4, log_every=1, shares_every=2).lines
    shares = [{name: term.get("share") for name, term in line["terms"].items()} for line in lines]
    for index in (0, 2):
        assert sum(shares[index].values()) == pytest.approx(1.0)
        assert all(0 < share < 1 for share in shares[index].values())
    assert all(share is None for index in (1, 3) for share in shares[index].values())
    assert [line["values"]["KLDivergence.temperature"] for line in lines] == pytest.approx(
        [4 - 3 * i / 4 for i in range(4)]
    )


# -- what is left behind --------------------------------------------------------------------------------------------


def traces(module: nn.Module) -> dict[str, Any]:
    return {
        "training": [part.training for part in module.modules()],
        "grad": [p.requires_grad for p in module.parameters()],
        "hooks": [
            len(part._forward_hooks) + len(part._forward_pre_hooks) + len(part._backward_hooks)
            for part in module.modules()
        ],
        "types": [type(part) for part in module.modules()],
        "forward": ["forward" in vars(part) for part in module.modules()],
    }


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("together", [False, True])
def test_models_are_plain_modules_again(train, fails, together):
    models = [net(0), net(1), net(2)]
    for model in models:
        model.eval()
    a, b, teacher = Observed(models[0]), Observed(models[1]), Observed(models[2], frozen=True)
    models[1].head.bias.requires_grad_(False)
    before = [traces(model) for model in models]
    turns = []

    def loss(batch: Any, mine: Tensor, other: Tensor) -> Tensor:
        turns.append(None)
        if fails and len(turns) == 4:
            raise ZeroDivisionError
        return (mine - other).square()

    players = [
        Player("a", a, Mean(loss, mine=a.tap("body"), other=teacher.tap("body"))),
        Player("b", b, Mean(loss, mine=b.output(), other=a.output())),
    ]
    if fails:
        with pytest.raises(ZeroDivisionError):
            train(players, pairs(2), steps=3, together=together)
    else:
        train(players, pairs(2), steps=3, together=together)
    assert [traces(model) for model in models] == before
    assert a.engine is a.tapped and b.engine is b.tapped
    torch.testing.assert_close(a.output()(pairs(1)[0]), models[0](pairs(1)[0][0]))


def test_training_modes_during_the_stage(train):
    modes = []

    def note(batch: Any, **_: Tensor) -> Tensor:
        modes.append((student.module.training, still.module.training, teacher.module.training))
        return _["out"]

    student, still = Observed(net(0).eval()), Observed(net(1), mode="eval")
    teacher = Observed(net(2), frozen=True)
    objective = Mean(note, out=student.output(), calm=still.output(), far=teacher.output())
    train(Player("student", [student, still], objective), pairs(2), steps=2)
    assert modes == [(True, False, False)] * 2


# -- projections, examples, token terms -----------------------------------------------------------------------------


class Layers(nn.Module):
    """Four layers by the names of the design page's example."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for index in range(1, 5):
            setattr(self, f"layer{index}", nn.Linear(4 if index == 1 else width, width))
        self.head = nn.Linear(width, 3)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        for index in range(1, 5):
            inputs = getattr(self, f"layer{index}")(inputs).tanh()
        return {"logits": self.head(inputs)}


def test_the_example_of_the_design_page_trains(train):
    torch.manual_seed(0)
    model, small = Layers(12), Layers(5)
    teacher = Observed(model, frozen=True)
    student = Observed(small)
    objective = (
        1.0 * CrossEntropy(student.output("logits"), target="labels")
        + linear(0.0, 0.9) * KLDivergence(student.output("logits"), teacher.output("logits"), temperature=4.0)
        + 0.1 * FeatureMSE(student.tap("layer2"), teacher.tap("layer4"), project="linear")
    )
    before = copy.deepcopy([model.state_dict(), small.state_dict()])
    batches = [{"inputs": x, "labels": x[:, :3].argmax(-1)} for x, _ in pairs(3)]
    done = train(Player("student", student, objective, optimizer=adamw(3e-2)), batches, steps=40, log_every=1)
    assert same(model.state_dict(), before[0])
    assert all(not torch.equal(tensor, before[1][name]) for name, tensor in small.state_dict().items())
    assert set(done.lines[0]["terms"]) == {"CrossEntropy", "KLDivergence", "FeatureMSE"}
    assert sum(term["share"] for term in done.lines[2]["terms"].values()) == pytest.approx(1.0)
    weights = [line["terms"]["KLDivergence"]["weight"] for line in done.lines]
    assert weights == pytest.approx([0.9 * i / 40 for i in range(40)])
    assert done.lines[-1]["terms"]["CrossEntropy"]["value"] < done.lines[0]["terms"]["CrossEntropy"]["value"] - 0.1
    assert done.lines[-1]["terms"]["FeatureMSE"]["value"] < done.lines[0]["terms"]["FeatureMSE"]["value"]
    (projection,) = objective.parameters()
    assert projection.shape == (12, 5)


def test_measuring_widths_is_no_training(train):
    """The first batch, which tells a projection its width, counts once: for statistics and adaptive schedules."""
    reads = []

    def ends(project: Any) -> tuple[dict[str, Tensor], list[float]]:
        torch.manual_seed(3)
        student, teacher = Observed(net(0, norm=True)), Observed(net(1), frozen=True)
        ramp = MomentumRamp(0.2, alpha=0.5)
        objective = LogitMatch(student.output(), teacher.output(), InterpolatedForwardKL(t=0.2), t=ramp)
        objective = objective + 0.0 * FeatureMSE(student.tap("body"), teacher.tap("body"), project=project)
        source = Batches([(x[i], y[i]) for x, y in pairs(1, size=20) for i in range(20)], 4)
        done = train(Player("student", student, objective, optimizer=sgd(0.1)), source, steps=5, log_every=1)
        reads.append(source.state_dict())
        return done.weights, [line["values"]["InterpolatedForwardKL.t"] for line in done.lines]

    (lazy, t), (eager, other) = ends("linear"), ends(nn.Linear(6, 6, bias=False))
    assert t == other
    assert same(lazy, eager)
    assert reads[0] == reads[1]


def llama(**sizes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**{**shape, "num_attention_heads": 2, "num_key_value_heads": 2, **sizes}))


IDS = [{"input_ids": torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(i))} for i in range(3)]


def language(model: LlamaForCausalLM) -> Player:
    teacher = Observed(llama(hidden_size=24), frozen=True)
    student = Observed(model, options={"use_cache": False})
    hidden = FeatureMSE(student.tap("model.layers.0"), teacher.tap("model.layers.1"), project=nn.Linear(16, 24))
    nn.init.constant_(hidden.projection.weight, 0.1)
    nn.init.zeros_(hidden.projection.bias)
    return Player("student", student, TokenCrossEntropy(head_of(student)) + hidden, optimizer=adamw(1e-2), clip=1.0)


def test_shares_of_token_terms_do_not_change_their_gradients(train):
    looked, plain = (train(language(llama()), IDS, steps=4, shares_every=every) for every in (1, 0))
    assert "share" in looked.lines[-1]["terms"]["CrossEntropy"]
    assert same(looked.weights, plain.weights)


def test_gradient_checkpointing_in_a_stage(train):
    model = llama()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    calls = []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(None))
    saving = train(language(model), IDS, steps=3, shares_every=0)
    assert len(calls) == 6  # once forward, once again for the backward
    close(saving.weights, train(language(llama()), IDS, steps=3, shares_every=0).weights, rtol=1e-5, atol=1e-6)


# -- precision and compilation --------------------------------------------------------------------------------------


def test_mixed_precision(train):
    """Matrices are multiplied in bfloat16, weights and losses are kept in float32; teachers take part."""
    types: dict[str, set[torch.dtype]] = {"student": set(), "teacher": set(), "loss": set()}
    student, teacher = net(0), net(1)
    for name, model in (("student", student), ("teacher", teacher)):
        model.body.register_forward_hook(lambda module, args, out, name=name: types[name].add(out.dtype))
    player = kd(student, teacher, optimizer=sgd(0.1))
    evaluate = player.objective.evaluate

    def note(*arguments: Any) -> Any:
        values = evaluate(*arguments)
        types["loss"] |= {value.value.dtype for value in values}
        return values

    player.objective.evaluate = note  # type: ignore[method-assign]
    half = Engine(accelerator="cpu", precision="bf16-mixed")
    mixed = train(player, pairs(3), steps=5, engine=half, shares_every=0)
    assert types == {"student": {torch.bfloat16}, "teacher": {torch.bfloat16}, "loss": {torch.float32}}
    assert {tensor.dtype for tensor in mixed.weights.values()} == {torch.float32}
    full = train(kd(net(0), net(1), optimizer=sgd(0.1)), pairs(3), steps=5)
    assert not same(mixed.weights, full.weights)
    close(mixed.weights, full.weights, rtol=0.05, atol=0.02)


def test_shares_in_double_precision(train):
    data = [(x.double(), y) for x, y in pairs(2)]
    done = train(kd(net(0), net(1)), data, steps=2, log_every=1, engine=Engine(accelerator="cpu", precision="64-true"))
    for line in done.lines:
        assert sum(term["share"] for term in line["terms"].values()) == pytest.approx(1.0)


def test_mixed_precision_trains_several_terms_without_shares(train):
    """Fabric's wrapper lets only whole losses through a backward, so there are no shares to show."""
    engine = Engine(accelerator="cpu", precision="bf16-mixed")
    done = train(kd(net(0), net(1)), pairs(2), steps=2, log_every=1, engine=engine)
    assert all(math.isfinite(line["loss"]) and len(line["terms"]) > 1 for line in done.lines)
    assert not any("share" in term for line in done.lines for term in line["terms"].values())


def test_true_half_precision(train):
    """Floating-point inputs come in the precision of the models, frozen ones included."""
    student, teacher = net(0), net(1)
    done = train(kd(student, teacher), pairs(2), steps=2, engine=Engine(accelerator="cpu", precision="bf16-true"))
    assert {tensor.dtype for tensor in done.weights.values()} == {torch.bfloat16}
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert math.isfinite(done.lines[-1]["loss"])


def feeding(student: nn.Module, reader: nn.Module) -> Player:
    """The student's output and a tap of it, each also fed to another model: signals of signals."""
    s, r = Observed(student), Observed(reader, mode="eval", name="reader")
    reader.requires_grad_(False)
    fed = r.view("fed", feed={"inputs": s.tap("body")})
    loss = Mean(
        lambda out, seen, batch: out.square().sum(-1) + seen.square().sum(-1), out=s.output(), seen=fed.output()
    )
    return Player("student", s, loss + CrossEntropy(s.output()), optimizer=sgd(0.1))


def distilling(student: nn.Module, teacher: nn.Module) -> Player:
    """Logits and a tap of the same model."""
    player = kd(student, teacher, optimizer=sgd(0.1))
    (observed,) = player.trained
    player.objective = player.objective + FeatureMSE(observed.tap("body"), observed.tap("drop", of="input"))
    return player


@pytest.mark.parametrize("build", [distilling, feeding])
def test_compiled_stages_end_with_the_same_weights(train, build):
    torch.manual_seed(5)
    other = nn.Linear(6, 2) if build is feeding else net(1)
    compiled = train(build(net(0), other), pairs(3), steps=3, compile={"backend": "aot_eager"})
    close(compiled.weights, train(build(net(0), other), pairs(3), steps=3).weights, rtol=1e-5, atol=1e-6)


def test_two_stages_may_compile_the_same_class(train):
    """With other taps each: code that was compiled for one model must not be taken for another's."""
    for path in ("body", "drop", "head"):
        student, teacher = Observed(net(0)), Observed(net(1), frozen=True)
        player = Player("student", student, FeatureMSE(student.tap(path), teacher.tap(path)), optimizer=sgd(0.1))
        done = train(player, pairs(2), steps=2, compile={"backend": "aot_eager"})
        assert done.lines[-1]["loss"] > 0


def test_a_compiled_stage_leaves_nothing_behind(train):
    """The same observed model may take part in another stage, with other taps."""
    model, teacher = Observed(net(0).eval()), Observed(net(1), frozen=True)
    before = traces(model.module)
    first = FeatureMSE(model.tap("body"), teacher.tap("body"))
    train(Player("student", model, first), pairs(2), steps=2, compile={"backend": "aot_eager"})
    assert traces(model.module) == before
    train(Player("student", model, FeatureMSE(model.tap("head"), teacher.tap("head"))), pairs(2), steps=2)
    torch.testing.assert_close(model.tap("drop")(pairs(1)[0]), model.module.body(pairs(1)[0][0]).tanh())
