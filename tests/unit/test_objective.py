"""Objectives: the algebra of terms, weights that move, what is logged, gradient shares."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stillhouse import CrossEntropy, FeatureMSE, KLDivergence, LogitMatch, Observed, Term, TokenMatch, linear
from stillhouse.base.errors import ConfigError
from stillhouse.core.objective import TermValue, gradient_shares, total
from stillhouse.core.observed import Turn
from stillhouse.core.schedule import AdaptiveSchedule, Constant, Progress
from stillhouse.losses.divergences import ForwardKL, ReverseKL
from stillhouse.objectives import LanguageHead, TokenCrossEntropy


class Value(Term):
    """A number that the batch holds, times the model's only weight."""

    def __init__(self, model: Observed, key: str, **options: Any) -> None:
        super().__init__(weight=model.parameter("weight"), **options)
        self.key = key

    def compute(self, *, weight: Tensor, batch: Any, **_: Any) -> Tensor:
        return batch[self.key] * weight.sum()


class Scalar(nn.Module):
    """A model with one weight, 1."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, a: Tensor, b: Tensor | None = None, c: Tensor | None = None) -> Tensor:
        return a


def values(objective, batch, progress: Progress | float = 0.0) -> list[TermValue]:
    return objective.evaluate(Turn(objective.signals()), batch, Progress.of(progress))


@pytest.fixture
def model() -> Observed:
    return Observed(Scalar())


BATCH = {"a": torch.tensor(3.0), "b": torch.tensor(5.0), "c": torch.tensor(7.0)}


# -- algebra --------------------------------------------------------------------------------------------------------


def test_sums_and_weights(model):
    a, b, c = (Value(model, key, name=key) for key in "abc")
    assert float((a + b)(BATCH).detach()) == 8
    assert float((0.5 * a + b * 2.0)(BATCH)) == 11.5
    assert float((0.5 * (a + 2.0 * (b + c)))(BATCH)) == 13.5
    assert [(v.name, float(v.value), v.weight) for v in values(0.5 * (a + 2.0 * (b + c)), BATCH)] == [
        ("a", 3.0, 0.5),
        ("b", 5.0, 1.0),
        ("c", 7.0, 1.0),
    ]


def test_weights_may_be_whole_numbers(model):
    a, b = Value(model, "a"), Value(model, "b")
    assert float((2 * a + b * 3)(BATCH)) == 21
    assert float((0 * a + 1 * b)(BATCH)) == 5


@pytest.mark.parametrize("wrong", ["2", None, [1], torch.ones(2)])
def test_other_weights_are_refused(model, wrong):
    with pytest.raises(TypeError):
        wrong * Value(model, "a")
    with pytest.raises(TypeError):
        Value(model, "a") + wrong


def test_the_scalar_is_the_weighted_sum_of_what_is_logged(model):
    a, b, c = (Value(model, key) for key in "abc")
    objective = linear(0.0, 0.9) * (a + 0.5 * b) + c * Constant(3.0) + (2.0 * linear(1.0, 0.0)) * a
    for fraction in (0.0, 0.3, 1.0):
        found = values(objective, BATCH, fraction)
        assert float(total(found)) == pytest.approx(sum(float(v.value) * v.weight for v in found))
        assert float(objective(BATCH, fraction)) == float(total(found))
        t = 0.9 * fraction
        assert float(objective(BATCH, fraction)) == pytest.approx(t * 3 + t * 0.5 * 5 + 3 * 7 + 2 * (1 - fraction) * 3)


def test_the_sum_may_be_built_in_any_order(model):
    a, b, c = (Value(model, key, name=key) for key in "abc")
    for objective in ((a + b) + c, a + (b + c)):
        assert [value.name for value in values(objective, BATCH)] == ["a", "b", "c"]
        assert len(next(iter(objective.children()))) == 3  # flat: one list of three terms


def test_repeated_names_are_numbered(model):
    a = Value(model, "a")
    for objective, count in ((a + a, 2), (a + a + a, 3), (2.0 * (a + a) + (a + a), 4), ((a + a) + 2.0 * (a + a), 4)):
        names = [value.name for value in values(objective, BATCH)]
        assert names[0] == "Value"
        assert len(set(names)) == len(names) == count
    assert [v.name for v in values(a + a + a, BATCH)] == ["Value", "Value_2", "Value_3"]


def test_numbered_names_do_not_meet_given_ones(model):
    terms = [Value(model, key, name=name) for key, name in zip("abc", ["x", "x", "x_2"], strict=True)]
    assert len({value.name for value in values(terms[0] + terms[1] + terms[2], BATCH)}) == 3


def test_naming(model):
    assert [v.name for v in values(Value(model, "a").named("first"), BATCH)] == ["first"]
    assert [v.name for v in values((0.1 * Value(model, "a")).named("first"), BATCH)] == ["first"]
    assert [v.name for v in values(0.1 * Value(model, "a").named("first"), BATCH)] == ["first"]


def test_models_are_known_once():
    model, other = Observed(Scalar()), Observed(nn.Linear(2, 2))
    view = model.view("fed", feed={"inputs": other.output()})
    objective = Value(model, "a") + FeatureMSE(view.output(), view.output())
    assert set(objective.observed()) == {model, other}
    assert len(objective.observed()) == 2


def test_a_term_may_give_several_values(model):
    class Two(Term):
        def compute(self, *, weight: Tensor, **_: Any) -> list[TermValue]:
            return [TermValue("left", 2 * weight, 0.5), TermValue("right", 3 * weight)]

    found = values(2.0 * Two(weight=model.parameter("weight")), BATCH)
    assert [(v.name, float(v.value), v.weight) for v in found] == [("left", 2.0, 1.0), ("right", 3.0, 2.0)]
    assert float(total(found)) == 8.0


# -- schedules ------------------------------------------------------------------------------------------------------


def test_scheduled_weights_and_temperatures():
    torch.manual_seed(0)
    student, teacher = Observed(nn.Linear(3, 4)), Observed(nn.Linear(3, 4), frozen=True)
    x = torch.randn(5, 3)
    objective = linear(1.0, 0.0) * KLDivergence(student.output(), teacher.output(), temperature=linear(4.0, 1.0))
    for fraction in (0.0, 0.5, 1.0):
        (value,) = values(objective, {"inputs": x}, fraction)
        temperature = 4.0 - 3.0 * fraction
        log_q, p = (F.log_softmax(m.module(x) / temperature, -1) for m in (student, teacher))
        expected = temperature**2 * F.kl_div(log_q, p, log_target=True, reduction="batchmean")
        torch.testing.assert_close(value.value, expected)
        assert value.weight == 1.0 - fraction
        assert value.extras == {"temperature": temperature}


def test_unknown_scheduled_fields_are_refused():
    model = Observed(nn.Linear(3, 4))
    with pytest.raises(ConfigError, match=r"ReverseKL has no field 'temprature'; did you mean 'temperature'\?"):
        LogitMatch(model.output(), model.output(), ReverseKL(), temprature=linear(1.0, 2.0))


def test_extras_are_logged_with_the_term(model):
    class Chatty(Value):
        def compute(self, **inputs: Any) -> Tensor:
            loss = super().compute(**inputs)
            self.log("twice", 2 * loss)
            self.log("fixed", 3)
            return loss

    (value,) = values(Chatty(model, "a"), BATCH)
    assert not value.extras["twice"].requires_grad
    assert {name: float(extra) for name, extra in value.extras.items()} == {"twice": 6.0, "fixed": 3.0}


class Follows(AdaptiveSchedule):
    """The loss it saw last; keeps everything it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.tensor(1.0, dtype=torch.float64))
        self.told: list[tuple[int, float]] = []

    def value(self, progress: Progress) -> float:
        return float(self.last)

    def observe(self, loss: float, progress: Progress) -> None:
        self.told.append((progress.step, loss))
        self.last.fill_(loss)


def test_adaptive_weight_is_told_the_mean_of_a_step_once(model):
    schedule = Follows()
    objective = schedule * Value(model, "a") + Value(model, "b")
    turn = Turn(objective.signals())
    weights = []
    for step in range(3):
        for micro in range(4):  # gradient accumulation
            batch = {"a": torch.tensor(10.0 * step + micro), "b": torch.tensor(0.0)}
            weights.append(objective.evaluate(turn, batch, Progress(step, 3))[0].weight)
    assert weights == [1.0] * 4 + [1.5] * 4 + [11.5] * 4
    assert schedule.told == [(0, 1.5), (1, 11.5)]
    assert schedule(Progress(3, 3)) == 21.5
    assert schedule(Progress(3, 3)) == 21.5
    assert schedule.told == [(0, 1.5), (1, 11.5), (2, 21.5)]


def test_adaptive_state_is_saved_in_the_middle_of_a_step(model):
    def build() -> tuple[Any, Follows]:
        schedule = Follows()
        return schedule * Value(model, "a"), schedule

    objective, _ = build()
    for value in (3.0, 4.0):
        objective({"a": torch.tensor(value)}, Progress(0, 5))
    other, told = build()
    other.load_state_dict(objective.state_dict())
    other({"a": torch.tensor(8.0)}, Progress(0, 5))
    assert told(Progress(1, 5)) == 5.0  # the mean of 3, 4 and 8
    assert any(key.endswith("pending") for key in objective.state_dict())


def test_adaptive_schedules_of_divergences_are_saved_and_told():
    torch.manual_seed(0)
    schedule = Follows()
    student, teacher = Observed(nn.Linear(3, 4)), Observed(nn.Linear(3, 4), frozen=True)
    objective = 0.5 * LogitMatch(student.output(), teacher.output(), ForwardKL(), temperature=schedule)
    x = torch.randn(5, 3)
    (first,) = values(objective, {"inputs": x}, Progress(0, 3))
    assert first.extras == {"temperature": 1.0}
    (second,) = values(objective, {"inputs": x}, Progress(1, 3))
    assert schedule.told == [(0, first.value.item())]  # the loss before its weight
    assert second.extras == {"temperature": first.value.item()}
    assert "last" in {key.rpartition(".")[2] for key in objective.state_dict()}


def test_adaptive_schedules_look_away_in_evaluation_mode(model):
    schedule = Follows()
    objective = schedule * Value(model, "a")
    objective(BATCH, Progress(0, 3))
    objective.eval()
    objective({"a": torch.tensor(99.0)}, Progress(0, 3))
    objective.train()
    assert schedule(Progress(1, 3)) == 3.0


# -- terms ----------------------------------------------------------------------------------------------------------


def test_cross_entropy_leaves_out_ignored_places_and_smooths():
    torch.manual_seed(0)
    model = Observed(nn.Linear(3, 4))
    x, labels = torch.randn(2, 5, 3), torch.randint(0, 4, (2, 5))
    labels[0, :3] = -100
    log_q = model.module(x).log_softmax(-1)
    kept = [(b, t) for b in range(2) for t in range(5) if labels[b, t] >= 0]
    for smoothing in (0.0, 0.3):
        target = torch.full((2, 5, 4), smoothing / 4)
        for b, t in kept:
            target[b, t, labels[b, t]] += 1 - smoothing
        expected = -sum((target[b, t] * log_q[b, t]).sum() for b, t in kept) / len(kept)
        found = CrossEntropy(model.output(), label_smoothing=smoothing)({"inputs": x, "labels": labels})
        torch.testing.assert_close(found, expected)
    with pytest.raises(KeyError, match=r"the batch has no 'label'; it has: inputs, labels"):
        CrossEntropy(model.output(), target="label")({"inputs": x, "labels": labels})


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_cross_entropy_of_no_label_is_nothing_and_of_some_is_pytorchs_to_the_bit(smoothing):
    torch.manual_seed(0)
    model = Observed(nn.Linear(3, 4))
    x, labels = torch.randn(2, 5, 3), torch.full((2, 5), -100)
    term = CrossEntropy(model.output(), label_smoothing=smoothing)
    loss = term({"inputs": x, "labels": labels})
    loss.backward()
    assert loss.item() == 0.0
    # every parameter has a gradient, which is what DDP asks for
    assert all(p.grad is not None and torch.equal(p.grad, torch.zeros_like(p)) for p in model.module.parameters())
    labels[1, 2:] = 1
    found, plain = (torch.autograd.grad(one, list(model.module.parameters())) for one in (
        term({"inputs": x, "labels": labels}),
        nn.functional.cross_entropy(model.module(x).flatten(0, 1), labels.flatten(), label_smoothing=smoothing),
    ))  # fmt: skip
    assert all(map(torch.equal, found, plain))


def test_logit_match_weighs_rows_and_cuts_vocabularies():
    torch.manual_seed(0)
    student, teacher = Observed(nn.Linear(3, 6)), Observed(nn.Linear(3, 4), frozen=True)
    x, mask = torch.randn(2, 5, 3), torch.tensor([[1, 1, 0, 0, 1], [0, 0, 0, 1, 1]])
    log_q, log_p = student.module(x)[..., :4].log_softmax(-1), teacher.module(x).log_softmax(-1)
    rows = (log_q.exp() * (log_q - log_p)).sum(-1)
    for weight, expected in ((None, rows.mean()), ("mask", rows[mask.bool()].mean()), (len, rows.mean())):
        chosen = (lambda batch: 2.0 * torch.ones(2, 5)) if weight is len else weight
        term = LogitMatch(student.output(), teacher.output(), ReverseKL(), weight=chosen)
        torch.testing.assert_close(term({"inputs": x, "mask": mask}), expected)


def test_no_term_sends_gradients_into_a_teacher():
    """Even if the teacher is not frozen: it may be another player."""
    torch.manual_seed(0)
    student, teacher = Observed(nn.Linear(3, 4)), Observed(nn.Linear(3, 4))
    objective = (
        KLDivergence(student.output(), teacher.output())
        + LogitMatch(student.output(), teacher.output(), ReverseKL())
        + FeatureMSE(student.output(), teacher.output())
    )
    objective(torch.randn(5, 3)).backward()
    assert student.module.weight.grad is not None
    assert teacher.module.weight.grad is None


def test_feature_mse_and_its_projection():
    torch.manual_seed(0)
    student, teacher = Observed(nn.Linear(3, 4)), Observed(nn.Linear(3, 6), frozen=True)
    x = torch.randn(2, 5, 3)
    with pytest.raises(ValueError, match=r"\(2, 5, 4\) and teacher features \(2, 5, 6\) differ; pass project="):
        FeatureMSE(student.output(), teacher.output())(x)
    term = FeatureMSE(student.output(), teacher.output(), project="linear")
    loss = term(x)
    (matrix,) = term.parameters()
    assert matrix.shape == (6, 4)
    torch.testing.assert_close(loss, (student.module(x) @ matrix.T - teacher.module(x)).square().mean())
    loss.backward()
    assert matrix.grad is not None


# -- token terms ----------------------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """A language model of two matrices."""

    def __init__(self, vocabulary: int = 7, width: int = 3) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(self.embed(input_ids))


def head(model: Observed) -> LanguageHead:
    return LanguageHead(model.tap("head", of="input"), model.parameter("head.weight"))


def test_a_cross_entropy_that_sets_in_later_has_a_value_from_the_start():
    """The list of terms must not change during a run: they are logged in columns."""
    torch.manual_seed(0)
    student, teacher = Observed(Tokens()), Observed(Tokens(), frozen=True)
    for weight in (linear(0.0, 1.0), linear(1.0, 0.0)):
        term = TokenMatch(head(student), head(teacher), ForwardKL(), cross_entropy=weight)
        names = [[v.name for v in values(term, {"input_ids": torch.arange(6)[None]}, f)] for f in (0.0, 0.5, 1.0)]
        assert names == [["ForwardKL", "CrossEntropy"]] * 3


def test_weights_outside_a_token_term_reach_both_of_its_losses():
    torch.manual_seed(0)
    student, teacher = Observed(Tokens()), Observed(Tokens(), frozen=True)
    batch = {"input_ids": torch.randint(0, 7, (2, 6))}

    def match(*weights: float) -> TokenMatch:
        return TokenMatch(
            head(student), head(teacher), ForwardKL(), divergence_weight=weights[0], cross_entropy=weights[1]
        )

    found = values(0.5 * (4.0 * match(0.3, 0.7)) + 3.0 * TokenCrossEntropy(head(student)), batch)
    divergence, label = (float(match(*weights)(batch)) for weights in ((1.0, 0.0), (0.0, 1.0)))
    assert [(v.name, v.weight) for v in found] == [("ForwardKL", 0.6), ("CrossEntropy", 1.4), ("CrossEntropy_2", 3.0)]
    assert float(found[0].value) == pytest.approx(divergence)
    assert float(found[1].value) == float(found[2].value) == pytest.approx(label)
    assert float(total(found)) == pytest.approx(0.6 * divergence + 4.4 * label)


# -- gradient shares ------------------------------------------------------------------------------------------------


def test_gradient_shares_by_hand():
    torch.manual_seed(0)
    model = nn.Linear(3, 4)
    teacher, observed = Observed(nn.Linear(3, 4), frozen=True), Observed(model)
    x, labels = torch.randn(5, 3), torch.arange(5) % 4
    objective = CrossEntropy(observed.output()) + 0.5 * KLDivergence(observed.output(), teacher.output())
    parameters = list(model.parameters())
    found = values(objective, {"inputs": x, "labels": labels})
    shares = gradient_shares(found, parameters)

    apart = [copy.deepcopy(model) for _ in range(2)]
    F.cross_entropy(apart[0](x), labels).backward()
    log_q, log_p = apart[1](x).log_softmax(-1), teacher.module(x).log_softmax(-1)
    (0.5 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()).backward()
    norms = [torch.cat([p.grad.flatten() for p in one.parameters()]).norm().item() for one in apart]
    assert shares == pytest.approx(
        {"CrossEntropy": norms[0] / sum(norms), "KLDivergence": norms[1] / sum(norms)}, rel=1e-5
    )
    assert sum(shares.values()) == pytest.approx(1.0)
    total(found).backward()  # the graph is still there
    expected = [one.grad + other.grad for one, other in zip(*(m.parameters() for m in apart), strict=True)]
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)


def test_gradient_shares_of_terms_without_gradient():
    model, frozen = Observed(Scalar()), Observed(Scalar(), frozen=True)
    weight = model.module.weight
    objective = Value(model, "a", name="live") + Value(frozen, "b", name="still")
    assert gradient_shares(values(objective, BATCH), [weight]) == {"live": 1.0, "still": 0.0}
    assert gradient_shares(values(Value(frozen, "b") + 0.0 * Value(model, "a"), BATCH), [weight]) == {
        "Value": 0.0,
        "Value_2": 0.0,
    }
    stranger = nn.Parameter(torch.ones(2))
    assert gradient_shares(values(Value(model, "a"), BATCH), [weight, stranger]) == {"Value": 1.0}


# -- the page that explains it --------------------------------------------------------------------------------------


class Layers(nn.Module):
    """Four layers by the names of the example."""

    def __init__(self, width: int) -> None:
        super().__init__()
        for index in range(1, 5):
            setattr(self, f"layer{index}", nn.Linear(6 if index == 1 else width, width))
        self.head = nn.Linear(width, 5)

    def forward(self, inputs: Tensor) -> dict[str, Tensor]:
        for index in range(1, 5):
            inputs = getattr(self, f"layer{index}")(inputs).tanh()
        return {"logits": self.head(inputs)}


def test_the_example_of_the_design_page():
    """As it is written there, on plain modules."""
    torch.manual_seed(0)
    model, small = Layers(12), Layers(8)
    teacher = Observed(model, frozen=True)
    student = Observed(small)
    objective = (
        1.0 * CrossEntropy(student.output("logits"), target="labels")
        + linear(0.0, 0.9) * KLDivergence(student.output("logits"), teacher.output("logits"), temperature=4.0)
        + 0.1 * FeatureMSE(student.tap("layer2"), teacher.tap("layer4"), project="linear")
    )
    x, labels = torch.randn(9, 6), torch.arange(9) % 5
    loss = objective({"inputs": x, "labels": labels}, 0.5)

    logits, target = small(x)["logits"], model(x)["logits"]
    kl = F.kl_div((logits / 4).log_softmax(-1), (target / 4).log_softmax(-1), log_target=True, reduction="batchmean")
    (projection,) = [p for name, p in objective.named_parameters() if "projection" in name]
    hidden = small.layer2(small.layer1(x).tanh())
    goal = model.layer4(model.layer3(model.layer2(model.layer1(x).tanh()).tanh()).tanh())
    mse = (hidden @ projection.T - goal).square().mean()
    torch.testing.assert_close(loss, F.cross_entropy(logits, labels) + 0.45 * 16 * kl + 0.1 * mse)
    loss.backward()
    assert all(p.grad is not None for p in [*small.parameters(), projection])
    assert all(p.grad is None for p in model.parameters())
