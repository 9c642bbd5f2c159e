"""WSD-S (card 121): forms of the decay, plans and what they cost, the river valley, segments that make one run."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import save_artifact
from stillhouse.core.objective import Term
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player, adamw
from stillhouse.core.run import Run
from stillhouse.core.schedule import Progress, wsd
from stillhouse.core.train import Train
from stillhouse.data.sources import Batches
from stillhouse.metrics.landscape import between, descend, gradient_cosine, greedy_rate, hill_loss, losses_between
from stillhouse.objectives.lr_schedules import Course, Piece, cyclic_cosine, decay_form, low_branch, plan, wsd_s
from stillhouse.tasks.segments import Carried, move_on

INVERSE = decay_form("inverse", floor=0.1)
TARGETS = [1000, 2000, 4000]


def rates(segments):
    """Target -> the rates of all steps that led to its checkpoint, in order."""
    known = {}
    for segment in segments:
        before = [] if segment.start is None else known[segment.start]
        own = [segment.rate(Progress(i, segment.end - segment.begin)) for i in range(segment.end - segment.begin)]
        known[segment.name] = before + own
    return {s.target: known[s.name] for s in segments if s.target is not None}


def planned(method, targets=TARGETS, form=INVERSE, **options):
    return plan(method, targets, form=form, floor=0.1, **options)


# -- forms ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["inverse", "exponential", "linear", "cosine", "1-sqrt"])
def test_every_form_falls_from_one_to_the_floor(name):
    form = decay_form(name, floor=0.1)
    values = [form(i / 50) for i in range(51)]
    assert values[0] == pytest.approx(1) and values[-1] == pytest.approx(0.1)
    assert all(later < earlier for earlier, later in itertools.pairwise(values))


def test_the_inverse_rate_grows_linearly():
    assert INVERSE(0.5) == pytest.approx(1 / 5.5)
    inverse = [1 / INVERSE(i / 10) for i in range(11)]
    assert [b - a for a, b in itertools.pairwise(inverse)] == pytest.approx([0.9] * 10)


def test_the_exponential_form_is_the_half_life_of_minicpm():
    tau, length = 5000, 20_000
    form = decay_form("exponential", floor=0.5 ** (length / tau))
    assert [form(steps / length) for steps in (0, 5000, 10_000)] == pytest.approx([1, 0.5, 0.25])


@pytest.mark.parametrize("name", ["inverse", "exponential"])
def test_a_floor_that_is_never_reached_is_refused(name):
    with pytest.raises(ConfigError, match="floor=0"):
        decay_form(name, floor=0.0)


# -- schedules and plans --------------------------------------------------------------------------------------------


def test_one_target_of_wsd_s_is_wsd():
    steps = 400
    ours = wsd_s([steps], form=decay_form("linear", floor=0.1), decay=0.1, warmup=40)
    cores = wsd(warmup=40, decay=0.1, floor=0.1, shape="linear")
    assert [ours(Progress(s, steps)) for s in range(steps)] == pytest.approx(
        [cores(Progress(s, steps)) for s in range(steps)]
    )


def test_wsd_s_jumps_back_without_a_warm_up():
    course = wsd_s(TARGETS, form=INVERSE, warmup=100)
    assert course.at(50) == 0.5 and course.at(899) == 1 and course.at(900) == 1
    assert course.at(999) < 0.11 and course.at(1000) == 1 and course.at(1799) == 1
    assert course.at(3999) < 0.11 and sum(course.at(s) < 1 for s in range(100, 4000)) == 99 + 199 + 399


def test_a_cyclic_cosine_begins_anew_after_each_target():
    course = cyclic_cosine(TARGETS, floor=0.1)
    assert course.at(1000) == 1 and course.at(500) == pytest.approx(0.55) and course.at(3000) == pytest.approx(0.55)


@pytest.mark.parametrize("method", ["wsd-s", "cyclic-cosine", "constant"])
def test_one_run_costs_its_last_target(method):
    segments = planned(method)
    assert sum(s.end - s.begin for s in segments) == 4000
    assert {k: len(steps) for k, steps in rates(segments).items()} == {0: 1000, 1: 2000, 2: 4000}


def test_branches_of_wsd_are_charged():
    segments = planned("wsd")
    made, ready = 0, {}
    for segment in segments:
        made += segment.end - segment.begin
        if segment.target is not None:
            ready[segment.target] = made
    assert ready == {0: 1000, 1: 2000, 2: 4000}  # the same number of steps as one run when each is ready
    assert next(s for s in segments if s.name == "stable-3").end == 3300  # the card's main branch
    assert {k: len(steps) for k, steps in rates(segments).items()} == {0: 1000, 1: 1900, 2: 3700}


def test_wsd_s_with_one_target_has_the_steps_of_wsd():
    assert rates(planned("wsd-s", [500]))[0] == rates(planned("wsd", [500]))[0] == rates(planned("wsd-runs", [500]))[0]


def test_runs_of_their_own_cost_the_sum():
    for method in ("wsd-runs", "cosine-runs"):
        segments = planned(method)
        assert [(s.begin, s.end, s.start) for s in segments] == [(0, t, None) for t in TARGETS]
    cut = rates(planned("cosine-cut", [1000]))[0]
    assert cut[-1] == pytest.approx(0.55, abs=1e-3) and cut[0] == 1


@pytest.mark.parametrize(("method", "targets"), [("wsd", [100, 105]), ("wsd-s", [100, 104]), ("wsd-s", [100, 100])])
def test_decays_that_leave_no_stable_step_are_refused(method, targets):
    with pytest.raises(ConfigError, match=r"decay less|must rise"):
        planned(method, targets)


# -- the river valley -----------------------------------------------------------------------------------------------


def test_the_hill_loss_is_the_fixed_point_of_the_variance():
    assert hill_loss(0.5) == pytest.approx(1 / 6) and hill_loss(0.05) == pytest.approx(0.0128205, rel=1e-5)
    for rate, gamma, sigma in ((0.5, 1.0, 1.0), (0.2, 2.0, 0.5)):
        variance = 0.0
        for _ in range(3000):
            variance = (1 - rate * gamma) ** 2 * variance + rate**2 * sigma**2
        assert hill_loss(rate, gamma=gamma, sigma=sigma) == pytest.approx(0.5 * gamma * variance)
    simulated = descend([0.5] * 100, slope=0.0, particles=200_000)
    assert simulated.loss == pytest.approx(hill_loss(0.5), rel=0.02)


def test_the_greedy_rate_makes_the_inverse_rate_grow_by_gamma():
    assert greedy_rate(1.0) == pytest.approx((0.5, 0.5))
    gamma, variance, found = 0.3, 2.0, []
    for _ in range(6):
        rate, after = greedy_rate(variance, gamma=gamma, sigma=0.7)
        worse = [(1 - r * gamma) ** 2 * variance + r * r * 0.49 for r in (0.99 * rate, 1.01 * rate)]
        assert after < min(worse)
        found.append(rate)
        variance = after
    assert [1 / b - 1 / a for a, b in itertools.pairwise(found)] == pytest.approx([gamma] * 5)


def valley(rates_of_steps, seed=0, sigma=1.0):
    return descend([0.5 * rate for rate in rates_of_steps], sigma=sigma, seed=seed)


@pytest.mark.parametrize("seed", [0, 1])
def test_wsd_beats_cosine_and_constants_in_the_valley(seed):
    steps = 2000
    constant = valley([1.0] * steps, seed)
    low = valley([0.1] * steps, seed)
    cosine = valley(rates(planned("cosine-runs", [steps]))[0], seed)
    ours = valley(rates(planned("wsd-runs", [steps]))[0], seed)
    assert ours.loss < cosine.loss < min(constant.loss, low.loss)
    found = [(constant.loss, 0.067), (low.loss, 0.003), (cosine.loss, -0.042), (ours.loss, -0.079)]
    assert [value for value, _ in found] == pytest.approx([expected for _, expected in found], abs=0.012)
    assert [r.river for r in (constant, low, cosine, ours)] == pytest.approx([10, 1, 5.5, 9.3], abs=0.06)


def test_what_a_method_makes_of_a_budget_in_the_valley():
    """Card 121 (B): the continued run loses least against runs of their own."""
    found = {m: [valley(r).loss for _, r in sorted(rates(planned(m)).items())] for m in METHODS}
    for k in range(3):
        assert found["wsd-runs"][k] - 0.01 < found["wsd-s"][k] < found["cyclic-cosine"][k] - 0.01
    assert found["wsd-s"] == pytest.approx([-0.033, -0.075, -0.161], abs=0.01)
    assert found["wsd"] == pytest.approx([-0.029, -0.072, -0.158], abs=0.01)
    assert found["cyclic-cosine"] == pytest.approx([-0.015, -0.042, -0.098], abs=0.01)
    assert found["wsd-s"][2] < found["wsd"][2] and found["wsd-s"][1] < found["wsd"][1]


METHODS = ["wsd-s", "wsd", "cyclic-cosine", "wsd-runs"]


def test_a_low_constant_rate_drops_too_but_more_slowly():
    """Its variance up the hill in closed form, step by step, against simulated descent; a decay is ahead by then."""
    segments = planned("wsd", [400], decay=0.05)
    stable, decay = segments
    low = low_branch(segments, 0.1)
    assert (low.start, low.begin, low.end, low.target) == ("stable-1", stable.end, decay.end, None)
    before, beside = (list(map(segment.rate.at, range(segment.begin, segment.end))) for segment in (stable, low))
    assert beside == [0.1] * 20 and before == [1.0] * 380
    begun, settled = (2 * hill_loss(rate) for rate in (0.5, 0.05))
    simulated = {}
    for steps in (1, 5, 20):
        descent = descend([0.5 * rate for rate in [*before, *beside[:steps]]], slope=0.0, particles=100_000)
        expected = 0.5 * (settled + (begun - settled) * (1 - 0.05) ** (2 * steps))
        assert descent.loss == pytest.approx(expected, rel=0.02)
        simulated[steps] = descent.loss
    assert hill_loss(0.5) > simulated[1] > simulated[5] > simulated[20] > 1.5 * hill_loss(0.05)
    falling = list(map(decay.rate.at, range(decay.begin, decay.end)))
    decayed = descend([0.5 * rate for rate in [*before, *falling]], particles=100_000)
    slower = descend([0.5 * rate for rate in [*before, *beside]], particles=100_000)
    assert decayed.loss < slower.loss - 0.005 and decayed.river > slower.river


@pytest.mark.parametrize("method", ["cyclic-cosine", "constant", "wsd-runs", "cosine-runs"])
def test_without_a_stable_segment_there_is_no_low_branch(method):
    assert low_branch(planned(method), 0.1) is None


def test_without_noise_a_decay_brings_no_drop():
    """All loss is then the river's: the more rate in all, the lower."""
    steps = 1000
    ours, constant = valley(rates(planned("wsd-runs", [steps]))[0], sigma=0.0), valley([1.0] * steps, sigma=0.0)
    assert ours.loss == pytest.approx(-0.01 * ours.river) and constant.loss < ours.loss


def test_uncertain_tokens_wait_for_the_decay_and_certain_ones_do_not():
    """Card 121 (C), a table of bigrams: half the tokens have one successor, half have five of equal chance."""
    tokens, successors, steps = 60, 5, 6000
    generator = torch.Generator().manual_seed(0)
    next_TS = torch.stack([torch.randperm(tokens, generator=generator)[:successors] for _ in range(tokens)])
    next_TS[: tokens // 2] = next_TS[: tokens // 2, :1]
    course = wsd_s([steps], form=INVERSE, decay=0.1)
    table_TV = torch.zeros(tokens, tokens)

    def losses():
        logp_TS = table_TV.log_softmax(-1).gather(1, next_TS)
        by_token = -logp_TS.mean(1)
        return float(by_token[: tokens // 2].mean()), float(by_token[tokens // 2 :].mean() - math.log(successors))

    seen = {}
    for step in range(steps):
        if step in (2700, 5400):
            seen[step] = losses()
        token_B = torch.randint(tokens, (16,), generator=generator)
        label_B = next_TS[token_B, torch.randint(successors, (16,), generator=generator)]
        gradient_BV = table_TV[token_B].softmax(-1)
        gradient_BV[torch.arange(16), label_B] -= 1
        table_TV.index_add_(0, token_B, gradient_BV, alpha=-20.0 * course.at(step) / 16)
    (certain_a, uncertain_a), (certain_b, uncertain_b), (certain_c, uncertain_c) = seen[2700], seen[5400], losses()
    assert certain_b < 0.6 * certain_a  # the river: it falls while the rate is high
    assert abs(uncertain_b - uncertain_a) < 0.15 * uncertain_a  # the hills: noise holds them up
    assert uncertain_c < 0.4 * uncertain_b  # until the decay
    assert certain_b - certain_c < 0.1 * (uncertain_b - uncertain_c)


# -- checkpoints ----------------------------------------------------------------------------------------------------


def test_the_line_between_two_models_is_a_line():
    one, other = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        one.weight.copy_(torch.tensor([[0.0, 1.0]]))
        other.weight.copy_(torch.tensor([[2.0, -1.0]]))
    before = one.weight.clone()

    def valley_loss(model):
        x, y = model.weight[0].tolist()
        return y * y - x

    found = losses_between(one, other, valley_loss, points=5)
    assert found == pytest.approx([1, -0.25, -1, -1.25, -1])  # walls on both sides, the river below
    assert torch.equal(one.weight, before)
    half = between(one.state_dict(), other.state_dict(), 0.5)
    torch.testing.assert_close(half["weight"], torch.tensor([[1.0, 0.0]]))


def test_the_cosine_of_gradients_tells_signal_from_noise():
    model = nn.Linear(2, 1, bias=False)
    straight = [lambda: model.weight[0, 0], lambda: 3 * model.weight[0, 0]]
    crossed = [lambda: model.weight[0, 0], lambda: model.weight[0, 1]]
    assert gradient_cosine(model, straight) == pytest.approx(1)
    assert gradient_cosine(model, crossed) == pytest.approx(0)
    assert gradient_cosine(model, [*crossed, lambda: -model.weight[0, 1]]) == pytest.approx(-0.5)


class Squares(Term):
    def __init__(self, output):
        super().__init__(output=output)

    def compute(self, *, output, batch, **_):
        return (output - batch["labels"]).square().mean()


def test_segments_in_a_row_are_one_run(tmp_path):
    """Weights, moments and place in the data carry over: bit for bit the same as never stopping."""
    torch.manual_seed(0)
    data = [{"inputs": torch.randn(3), "labels": torch.randn(2)} for _ in range(20)]
    begin = nn.Linear(3, 2)
    course = Course((Piece(20, 26, INVERSE),), warmup=3)

    def train(name, model, first, last, start=None):
        observed = Observed(model)
        carried = Carried(adamw(1e-2, weight_decay=0.1), start)
        rate = Course(course.pieces, course.warmup, begin=first)
        player = Player("p", observed, Squares(observed.output()), optimizer=carried, lr=rate)
        source = Batches(data, 3, seed=1)
        move_on(source, first)
        save = carried.saving(lambda model, folder: save_artifact(model, folder))
        return Train(name, player, source=source, steps=last - first, save=save)

    whole = copy.deepcopy(begin)
    Run(tmp_path / "whole", quiet=True).execute([train("whole", whole, 0, 34)])
    parts, run = copy.deepcopy(begin), Run(tmp_path / "parts", quiet=True)

    def in_parts():
        start = None
        for number, (first, last) in enumerate([(0, 11), (11, 20), (20, 34)]):
            start = (yield train(f"part-{number}", parts, first, last, start)).path

    run.execute(in_parts())
    assert torch.equal(parts.weight, whole.weight) and torch.equal(parts.bias, whole.bias)
    fresh = copy.deepcopy(begin)
    Run(tmp_path / "fresh", quiet=True).execute([train("a", fresh, 0, 11), train("b", fresh, 11, 34)])
    assert not torch.equal(fresh.weight, whole.weight)  # the moments matter
