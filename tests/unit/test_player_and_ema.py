"""Players and moving averages."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from stillhouse import EMA, FeatureMSE, Observed, Player, adamw, linear, sgd
from stillhouse.base.errors import ConfigError
from stillhouse.core.schedule import Progress


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 2)

    def forward(self, inputs):
        return self.head(self.norm(self.body(inputs)))


def player(model: Observed, **options) -> Player:
    return Player("student", model, FeatureMSE(model.output(), model.output()), **options)


def names(player: Player, module: nn.Module) -> list[str]:
    known = {id(parameter): name for name, parameter in module.named_parameters()}
    return [known[id(parameter)] for parameter in player.parameters()]


# -- players --------------------------------------------------------------------------------------------------------


def test_turns():
    sides = {every: player(Observed(Net()), every=every) for every in (1, 2, 5)}
    for every, side in sides.items():
        turns = [step for step in range(21) if side.plays(step)]
        assert turns == list(range(0, 21, every))
        assert len(turns) == 20 // every + 1  # card 066: floor(N / r) + 1 times in steps 0..N


def test_wrong_players_are_refused():
    with pytest.raises(ConfigError, match=r"student.*trains Net, which was observed with frozen=True"):
        player(Observed(Net(), frozen=True))
    for wrong in ({"every": 0}, {"repeats": 0}):
        with pytest.raises(ConfigError, match="every and repeats must be at least 1"):
            player(Observed(Net()), **wrong)
    with pytest.raises(ConfigError, match="no parameter to train"):
        player(Observed(Net()), trainable="nothing is called this")


def test_trainable_by_pattern_and_by_function():
    module = Net()
    assert names(player(Observed(module), trainable=r"^head\."), module) == ["head.weight", "head.bias"]
    assert [name for name, p in module.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    module = Net()
    assert names(player(Observed(module), trainable=lambda name: name.endswith("bias")), module) == [
        "body.bias",
        "norm.bias",
        "head.bias",
    ]


def test_parameters_of_models_and_objective_each_once():
    first, second = Net(), Net()
    second.body = first.body  # shared
    one, two = Observed(first), Observed(second)
    objective = FeatureMSE(one.tap("body"), two.output(), project=nn.Linear(4, 2))
    found = Player("both", [one, two], objective).parameters()
    assert len(found) == len({id(parameter) for parameter in found})
    expected = [*first.parameters(), *second.norm.parameters(), *second.head.parameters(), *objective.parameters()]
    assert {id(parameter) for parameter in found} == {id(parameter) for parameter in expected}


def test_adamw_does_not_decay_vectors():
    module = Net()
    optimizer = adamw(0.1, weight_decay=0.3)([{"params": list(module.parameters())}])
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name: decayed[id(p)] for name, p in module.named_parameters()} == {
        "body.weight": 0.3,
        "body.bias": 0.0,
        "norm.weight": 0.0,
        "norm.bias": 0.0,
        "head.weight": 0.3,
        "head.bias": 0.0,
    }
    assert {group["lr"] for group in optimizer.param_groups} == {0.1}
    assert len(adamw()([{"params": [module.body.weight]}]).param_groups) == 1


def test_sgd():
    optimizer = sgd(0.3, momentum=0.5, nesterov=True)([{"params": list(Net().parameters())}])
    assert isinstance(optimizer, torch.optim.SGD)
    assert {key: optimizer.param_groups[0][key] for key in ("lr", "momentum", "nesterov")} == {
        "lr": 0.3,
        "momentum": 0.5,
        "nesterov": True,
    }


# -- moving averages ------------------------------------------------------------------------------------------------


def test_ema_against_its_closed_form():
    """After n updates: decay^n w_0 + (1 - decay) sum_i decay^(n - i) w_i."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=0.7)
    history = [copy.deepcopy(model.weight.detach())]
    for step in range(6):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        history.append(copy.deepcopy(model.weight.detach()))
        ema.update(Progress(step, 6))
    n = len(history) - 1
    expected = 0.7**n * history[0] + 0.3 * sum(0.7 ** (n - i) * history[i] for i in range(1, n + 1))
    torch.testing.assert_close(ema.module.weight, expected)
    assert not ema.module.weight.requires_grad


def test_ema_with_a_schedule():
    """A decay of t/n after t of n steps is not far from the mean; here it is checked by replay."""
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    ema = EMA(model, decay=linear(0.0, 1.0))
    expected = model.weight.detach().clone()
    for step in range(5):
        with torch.no_grad():
            model.weight.add_(torch.randn(2, 3))
        ema.update(Progress(step, 5))
        expected = step / 5 * expected + (1 - step / 5) * model.weight.detach()
    torch.testing.assert_close(ema.module.weight, expected)


def test_ema_is_a_copy_in_eval_mode_that_takes_over_buffers():
    torch.manual_seed(0)
    model = Net().train()
    ema = EMA(model, decay=0.9)
    assert model.training and all(p.requires_grad for p in model.parameters())
    assert not any(module.training for module in ema.module.modules())
    assert not any(p.requires_grad for p in ema.module.parameters())
    before = ema.module.norm.running_mean.clone()
    model(torch.randn(8, 3))
    assert torch.equal(ema.module.norm.running_mean, before)
    ema.update(Progress(0, 1))
    assert torch.equal(ema.module.norm.running_mean, model.norm.running_mean)
    assert int(ema.module.norm.num_batches_tracked) == 1


def test_ema_in_another_precision():
    """A float32 average of bfloat16 weights moves although the steps are below what bfloat16 can hold."""
    model = nn.Linear(1, 1, bias=False).bfloat16()
    ema = EMA(model, decay=0.999)
    ema.module.float()
    with torch.no_grad():
        ema.module.weight.fill_(1.0)
        model.weight.fill_(2.0)
    ema.update(Progress(0, 1))
    assert float(ema.module.weight) == pytest.approx(1.001)


def test_ema_of_frozen_parts_and_tied_weights():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[0].bias.requires_grad_(False)
    ema = EMA(model, decay=0.5)
    with torch.no_grad():
        model[0].weight.zero_()
    start = ema.module[0].weight.clone()
    ema.update(Progress(0, 1))
    torch.testing.assert_close(ema.module[0].weight, 0.5 * start)  # once, not twice
    assert ema.module[1].weight is ema.module[0].weight
