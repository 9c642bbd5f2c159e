"""KD on pruned data (card 100): which samples are kept, how the teacher's weight follows the share, and the theory."""

from __future__ import annotations

import copy
import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import ResNetConfig
from watching import watched

from stillhouse import Observed
from stillhouse.base.errors import ConfigError, DataError
from stillhouse.core.schedule import Progress
from stillhouse.data.images import digits
from stillhouse.data.pruning_scores import (
    alpha_of_fraction,
    el2n_score,
    forgetting_score,
    herding_score,
    kept_positions,
    moderate_score,
    prototype_score,
    random_score,
    two_views,
)
from stillhouse.data.rows import TensorRows
from stillhouse.losses.contrastive import nt_xent
from stillhouse.metrics.sample_scores import features_of, gradient_norms, last_linear
from stillhouse.models.image_classifier import new_image_classifier, with_classes
from stillhouse.models.ridge import distilled_bias, distilled_ridge, ridge, shrinkage
from stillhouse.objectives.selection import ForgettingCount
from stillhouse.systems import get_system
from stillhouse.tasks.vision_pruning import best_of, teacher_of_all


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- scores ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [2, 10])
def test_el2n_at_its_ends(classes):
    y = torch.tensor([0, 1])
    assert el2n_score(torch.zeros(2, classes), y).tolist() == pytest.approx([math.sqrt(1 - 1 / classes)] * 2)
    sure = 100.0 * F.one_hot(y, classes)
    assert el2n_score(sure, y).max() < 1e-12
    assert el2n_score(sure, y.flip(0)).tolist() == pytest.approx([math.sqrt(2)] * 2)


def test_forgetting_is_what_was_right_and_is_wrong():
    looks = [[1, 0, 1, 0], [0, 0, 1, 1], [1, 0, 1, 0], [0, 0, 1, 1]]  # a row a look
    assert forgetting_score(torch.tensor(looks)).tolist() == [2, 4, 0, 1]  # never right: more than any flips


class Table(nn.Module):
    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.logits[inputs]


@given(seed=st.integers(0, 50))
@settings(max_examples=20, deadline=None)
def test_forgetting_is_counted_during_training_as_afterwards(seed):
    """Batches in any order; evaluation does not count; the counts are saved with the objective."""
    generator = torch.Generator().manual_seed(seed)
    samples, rounds, y = 6, 5, torch.randint(3, (6,), generator=generator)
    model = Table(torch.zeros(samples, 3))
    term = ForgettingCount(Observed(model).output(), samples)
    history = []
    for _ in range(rounds):
        with torch.no_grad():
            model.logits.copy_(torch.randn(samples, 3, generator=generator))
        history.append(model.logits.argmax(-1) == y)
        for part in torch.randperm(samples, generator=generator).split(4):
            batch = {"inputs": part, "labels": y[part], "index": part}
            expected = F.cross_entropy(model.logits[part], y[part])
            torch.testing.assert_close(term(batch), expected)
            term.eval()
            term({**batch, "labels": (y[part] + 1) % 3})
            term.train()
        resumed = ForgettingCount(Observed(model).output(), samples)
        resumed.load_state_dict(term.state_dict())
        term = resumed
    seen = torch.stack(history)
    expected_score = forgetting_score(seen)
    known = seen.any(0)
    torch.testing.assert_close(term.score()[known], expected_score[known])
    assert (term.score()[~known] > (expected_score[known].max() if known.any() else 0)).all()


def test_herding_is_the_greedy_choice():
    features, y = drawn(1, 7, 3), torch.tensor([0, 1, 0, 1, 0, 1, 0])
    unit = features / features.norm(dim=-1, keepdim=True)
    score = herding_score(features, y)
    for label in (0, 1):
        own = torch.nonzero(y == label).flatten().tolist()
        mean, taken = unit[own].mean(0), []
        for _ in range(len(own)):
            left = [i for i in own if i not in taken]
            taken.append(min(left, key=lambda i: float((unit[[*taken, i]].mean(0) - mean).norm())))
        assert sorted(own, key=lambda i: -float(score[i])) == taken


def test_moderate_is_the_middle_of_each_class():
    x = torch.tensor([0.0, 1.0, 2.0, 10.0, -13.0, 5.0, 5.0, 5.0])[:, None]
    y = torch.tensor([0, 0, 0, 0, 0, 1, 1, 1])
    score = moderate_score(x, y)  # distances to the mean 0 of class 0: 0, 1, 2, 10, 13
    assert score[:5].tolist() == pytest.approx([-2, -1, 0, -8, -11])
    assert score[5:].tolist() == pytest.approx([0, 0, 0])


def test_prototypes_take_no_labels_and_find_what_is_far_from_all():
    angles = torch.tensor([0.0, 0.02, -0.02, 0.3, 2.0, 2.02, 1.98])
    features = torch.stack([angles.cos(), angles.sin()], -1) * torch.arange(1.0, 8.0)[:, None]  # lengths count nothing
    score = prototype_score(features, clusters=2)
    assert int(score.argmax()) == 3 and score.min() >= -1e-12


def test_gradient_norms_of_a_linear_model_in_closed_form():
    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3).double()

        def forward(self, pixel_values: Tensor) -> Any:
            return SimpleNamespace(logits=self.layer(pixel_values.flatten(1)))

    torch.manual_seed(0)
    model, x, y = Linear(), drawn(1, 5, 1, 2, 2), torch.tensor([0, 1, 2, 0, 1])
    found = gradient_norms(model, [{"pixel_values": x, "labels": y}], chunk_size=2)
    logits = model(x).logits.detach()
    expected = el2n_score(logits, y) * (x.flatten(1).square().sum(-1) + 1).sqrt()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def resnet() -> Any:
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6], depths=[1, 1], num_channels=1, layer_type="basic")
    return new_image_classifier(with_classes(config, tuple("abc")), seed=0).eval()


def test_gradient_norms_and_features_of_a_classifier():
    model, x, y = resnet(), torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])
    model.classifier[1].bias.requires_grad_(False)  # what is not trained does not count
    before = copy.deepcopy(model.state_dict())
    found = gradient_norms(model, [{"pixel_values": x[:3], "labels": y[:3]}, {"pixel_values": x[3:], "labels": y[3:]}])
    weights = [p for p in model.parameters() if p.requires_grad]
    for row in range(4):
        loss = F.cross_entropy(model(pixel_values=x[row : row + 1]).logits, y[row : row + 1])
        norm = torch.stack([g.square().sum() for g in torch.autograd.grad(loss, weights)]).sum().sqrt()
        assert found[row].item() == pytest.approx(float(norm), rel=1e-4)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert last_linear(model) == "classifier.1"
    features = features_of(model, [{"pixel_values": x}])
    torch.testing.assert_close(
        features, model(pixel_values=x, output_hidden_states=True).hidden_states[-1].mean((2, 3))
    )


def test_contrastive_features():
    """Views that are alike and apart from others cost least; against the definition for two pairs."""
    a, b = drawn(1, 2, 3), drawn(2, 2, 3)
    rows = F.normalize(torch.cat([a, b]).float(), dim=-1)
    expected = 0.0
    for i, j in ((0, 2), (1, 3), (2, 0), (3, 1)):
        others = [math.exp(float(rows[i] @ rows[k]) / 0.5) for k in range(4) if k != i]
        expected -= math.log(math.exp(float(rows[i] @ rows[j]) / 0.5) / sum(others)) / 4
    assert nt_xent(a, b).item() == pytest.approx(expected, rel=1e-5)
    generator, images = torch.Generator().manual_seed(0), digits("train")[[0, 1]]
    both = two_views(lambda batch, g: {**batch, "pixel_values": torch.rand(2, generator=g)})(images, generator)
    assert not torch.equal(both["pixel_values"], both["second"]["pixel_values"])


# -- the choice -----------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 100), count=st.integers(5, 40), fraction=st.floats(0.15, 1), balanced=st.booleans())
@settings(max_examples=60, deadline=None)
def test_so_many_are_kept_the_best_first(seed, count, fraction, balanced):
    generator = torch.Generator().manual_seed(seed)
    score, y = torch.rand(count, generator=generator), torch.randint(3, (count,), generator=generator)
    kept = kept_positions(score, y, fraction, balanced=balanced)
    assert len(kept) == len(set(kept.tolist())) == round(fraction * count)
    assert torch.equal(kept, kept.sort().values)
    left = torch.tensor([i for i in range(count) if i not in set(kept.tolist())], dtype=torch.long)
    for label in y.unique() if balanced else [None]:
        ours = kept if label is None else kept[y[kept] == label]
        others = left if label is None else left[y[left] == label]
        if len(ours) and len(others):
            assert score[ours].min() >= score[others].max()
    if balanced:
        sizes = [(int((y[kept] == label).sum()), int((y[left] == label).sum())) for label in y.unique()]
        unspent = [own for own, rest in sizes if rest]
        assert max(unspent, default=0) - min(unspent, default=0) <= 1
        assert all(own <= min(unspent, default=own) + 1 for own, rest in sizes if not rest)


def test_random_choices_are_nested_and_follow_the_seed():
    y = digits("train").labels
    small, large = (kept_positions(random_score(1000, seed=1), y, f, balanced=True) for f in (0.1, 0.3))
    assert len(small) == 100 and set(small.tolist()) < set(large.tolist())
    assert y[small].bincount().tolist() == [10] * 10
    other = kept_positions(random_score(1000, seed=2), y, 0.1, balanced=True)
    assert len(set(small.tolist()) & set(other.tolist())) < 40
    whole = kept_positions(random_score(1000, seed=1), y, 1.0, balanced=True)
    assert torch.equal(whole, torch.arange(1000))
    with pytest.raises(DataError, match=r"fraction=0\.0001 of 1000 samples is none"):
        kept_positions(random_score(1000, seed=1), y, 0.0001, balanced=False)


# -- the teacher's weight -------------------------------------------------------------------------------------------


def test_the_less_data_the_more_of_the_teacher():
    fractions = [0.0, 0.1, 0.5, 0.9, 1.0]
    alphas = [alpha_of_fraction(f) for f in fractions]
    assert alphas[0] == 1.0 and alphas[-1] == pytest.approx(0.3) and alphas == sorted(alphas, reverse=True)
    assert alphas[1] > 0.9
    made: Any = get_system("pruned-data-kd").make(alpha_by="validation", alpha_grid="0,1")
    assert made.alphas(0.1) == [0, 1]
    assert get_system("pruned-data-kd").make(alpha=0.4).alphas(0.1) == [0.4]  # type: ignore[attr-defined]
    assert get_system("pruned-data-kd").make(alpha_min=0.5).alphas(0.5) == [0.75]  # type: ignore[attr-defined]


class OneStage:
    """Stands for the task: gives the objective of the stage that would train the student."""

    class system:  # noqa: N801
        epochs = 1.0

    def __init__(self, z: Tensor, t: Tensor) -> None:
        self.z, self.t = z, t

    def observed_teacher(self) -> Observed:
        return Observed(_Logits(self.t), frozen=True)

    def steps(self) -> int:
        return 1

    def steps_of(self, epochs: float, images: Any) -> int:
        return round(epochs * len(images))

    def train(self, name: str, objective: Any, *, images: Any, steps: int) -> Any:
        self.given = images, steps
        self.student = _Logits(self.z)
        return objective(Observed(self.student))


class _Logits(Table):
    def forward(self, inputs: Tensor) -> Any:  # type: ignore[override]
        return {"logits": super().forward(inputs)}


def loss_of(alpha: float, y: Tensor) -> Tensor:
    z, t = drawn(1, 6, 4), drawn(2, 6, 4)
    images = ["the only", "images"]
    for cost, steps in (("epochs", 4), ("steps", 1)):
        system: Any = get_system("pruned-data-kd").make(cost=cost, epochs=2.0, temperature=3.0)
        task = OneStage(z, t)
        objective = system.train(task, images, "student", alpha)
        assert task.given == (images, steps)
    return objective({"inputs": torch.arange(6), "labels": y}, Progress(0, 1)).detach()


def test_the_loss_and_its_ends():
    y, permuted = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 0, 1, 1, 2, 0])
    z, t = drawn(1, 6, 4), drawn(2, 6, 4)
    p, log_q = (t / 3).softmax(-1), (z / 3).log_softmax(-1)
    kl = 9 * (p * (p.log() - log_q)).sum(-1).mean()
    ce = F.cross_entropy(z, y)
    assert float(loss_of(0.0, y)) == pytest.approx(float(ce), rel=1e-5)
    assert float(loss_of(0.3, y)) == pytest.approx(float(0.7 * ce + 0.3 * kl), rel=1e-5)
    assert float(loss_of(1.0, y)) == pytest.approx(float(kl), rel=1e-5)
    assert float(loss_of(1.0, permuted)) == float(loss_of(1.0, y))  # labels take no part
    assert float(loss_of(0.9, permuted)) != pytest.approx(float(loss_of(0.9, y)))


# -- what each stage is given ---------------------------------------------------------------------------------------


def test_students_see_their_share_of_the_images_and_a_teacher_of_all_of_them(tmp_path):
    """The images chosen by the scores, passes over those, one beginning for all, the weight of the share."""
    starts: dict[str, dict[str, Tensor]] = {}
    weights: dict[str, list[float]] = {}
    teachers: dict[str, list[dict[str, Tensor]]] = {}

    def look(stage: Any, left: dict[str, Any]) -> None:
        if not hasattr(stage, "players"):
            return
        (player,) = stage.players
        student = player.trained[0]
        starts[stage.name] = copy.deepcopy(student.module.state_dict())
        parts = getattr(player.objective, "terms", [player.objective])
        weights[stage.name] = [float(getattr(part, "weight", 1.0)) for part in parts]
        others = [one.module for one in player.objective.observed() if one is not student]
        teachers[stage.name] = [copy.deepcopy(one.state_dict()) for one in others]

    system: Any = get_system("pruned-data-kd").make(
        student="hidden_sizes=4-8,embedding_size=4", train_size=128, batch_size=16, epochs=2.0, cost="epochs",
        selector="forgetting", fraction=0.25, sweep=[0.5],
    )  # fmt: skip
    seen, left = watched(system, tmp_path / "run", look, until="evaluation")
    everything = seen["teacher"].source.data
    assert len(everything) == 128 and seen["teacher"].steps == 16 and seen["probe"].source.data is everything
    scores = TensorRows.read(left["scores"].data_file()).columns["score"]
    assert scores.unique().numel() > 1
    for mark, fraction in {"": 0.25, "-0.5": 0.5}.items():
        chosen = kept_positions(scores, everything.labels, fraction, balanced=True)
        expected = everything[chosen]
        for name in (f"student{mark}", f"baseline{mark}"):
            images = seen[name].source.data
            assert len(images) == round(128 * fraction) and seen[name].steps == round(16 * fraction)
            found = images[torch.arange(len(images))]
            assert all(torch.equal(found[key], expected[key]) for key in ("pixel_values", "labels"))
            assert all(torch.equal(value, starts["student"][key]) for key, value in starts[name].items())
        alpha = alpha_of_fraction(fraction)
        assert weights[f"student{mark}"] == pytest.approx([1 - alpha, alpha]) and weights[f"baseline{mark}"] == [1.0]
        (teacher,) = teachers[f"student{mark}"]
        saved = load_file(left["teacher"].path / "model.safetensors")
        assert all(torch.equal(teacher[key], value) for key, value in saved.items())
        assert not teachers[f"baseline{mark}"]
    assert any(not torch.equal(value, starts["student"][key]) for key, value in starts["teacher"].items())


# -- the theory -----------------------------------------------------------------------------------------------------


def test_ridge_is_the_minimum():
    X, y = drawn(1, 4, 9), drawn(2, 9)
    theta = ridge(X, y, ridge_lambda=0.7).requires_grad_()
    (grad,) = torch.autograd.grad(((X.T @ theta - y) ** 2).sum() + 0.7 * (theta**2).sum(), theta)
    assert grad.abs().max() < 1e-10


@pytest.mark.parametrize("alpha", [0.0, 0.4, 1.0])
def test_the_bias_of_a_distilled_student(alpha):
    """The mean over the noise is what noiseless targets give, and that is the closed form."""
    X, theta = drawn(1, 5, 40), drawn(2, 5)
    X_f, X_t = X[:, :8], X[:, :30]
    y_f, y_t = X_f.T @ theta, X_t.T @ theta
    teacher = ridge(X_t, y_t, ridge_lambda=2.0)
    student = distilled_ridge(X_f, y_f, teacher, alpha=alpha, ridge_lambda=2.0)
    P_f, P_t = (shrinkage(x, ridge_lambda=2.0) for x in (X_f, X_t))
    torch.testing.assert_close(student - theta, distilled_bias(P_f, P_t, theta, alpha=alpha))


def test_the_card_s_factors():
    """X X^T = s I: with rho_f = 0.5 and alpha = 1 the factor is 0.55 (rho_t = 0.9), or 0.75 (a teacher as pruned)."""
    theta = drawn(3, 4)

    def P(rho: float) -> Tensor:
        s = rho / (1 - rho)  # with lambda = 1
        return shrinkage(math.sqrt(s) * torch.eye(4, dtype=torch.float64), ridge_lambda=1.0)

    for rho_t, factor in ((0.9, 0.55), (0.5, 0.75)):
        torch.testing.assert_close(distilled_bias(P(0.5), P(rho_t), theta, alpha=1.0), -factor * theta)
    sizes = [float(distilled_bias(P(0.3), P(rho), theta, alpha=0.6).norm()) for rho in (0.3, 0.5, 0.7, 0.9, 0.99)]
    assert all(later < now for now, later in itertools.pairwise(sizes))  # the more the teacher saw, the better
    alone = float(distilled_bias(P(0.3), P(0.99), theta, alpha=0.0).norm())
    assert alone <= sizes[-1]  # what is gained over no teacher is not bias


def test_what_is_gained_is_variance():
    """Noise of unit variance goes through a linear map: its covariance in closed form, and by many draws."""
    X, lam = drawn(5, 5, 60), 0.5
    X_f = X[:, :8]
    A_f = torch.linalg.solve(X_f @ X_f.T + lam * torch.eye(5, dtype=torch.float64), X_f)
    A_t = torch.linalg.solve(X @ X.T + lam * torch.eye(5, dtype=torch.float64), X)
    own = torch.eye(60, dtype=torch.float64)[:8]

    def variance(alpha: float) -> float:
        return float((A_f @ ((1 - alpha) * own + alpha * X_f.T @ A_t)).square().sum())

    values = [variance(alpha) for alpha in (0.0, 0.5, 1.0)]
    assert values[0] > values[1] > values[2] and values[2] < 0.5 * values[0]
    noise = drawn(6, 60, 4000)
    found = torch.stack([
        distilled_ridge(X_f, e[:8], ridge(X, e, ridge_lambda=lam), alpha=0.5, ridge_lambda=lam) for e in noise.T[:2000]
    ])  # fmt: skip
    assert float(found.square().sum(-1).mean()) == pytest.approx(values[1], rel=0.1)


# -- who teaches ----------------------------------------------------------------------------------------------------


class Built:
    """Stands for the task: says which model would be trained as the teacher."""

    classes, cross_entropy, teacher = tuple("abc"), None, "as it is"

    def new_student(self, number: int = 0) -> Any:
        return resnet() if number == 1 else "not another initialisation"

    def new_teacher(self) -> Any:
        model = resnet()
        model.named = "teacher"
        return model

    def train(self, name: str, objective: Any, *, model: Any) -> Any:
        return model

    def load(self, trained: Any) -> Any:
        return trained

    def save(self, model: Any, folder: Any) -> None: ...


def who(**values: Any) -> Any:
    """What is trained and what teaches."""
    system: Any = get_system("pruned-data-kd").make(**values)
    stages = teacher_of_all(system, Built())  # type: ignore[arg-type]
    try:
        model = next(stages)
    except StopIteration as end:
        return end.value
    with pytest.raises(StopIteration) as end:
        stages.send(model)
    assert end.value.value is model
    return model


def test_who_teaches():
    def named(model: Any) -> bool:
        return getattr(model, "named", "") == "teacher"

    assert not named(who())  # the student's own architecture, from other weights
    assert named(who(teacher_model="teacher"))
    assert not named(who(teacher_model="fraction", fraction=0.1)) and named(who(teacher_model="fraction", fraction=0.8))
    small: Any = who(teacher_model="hidden_sizes=2-3,embedding_size=2")
    assert small.config.hidden_sizes == [2, 3] and len(small.config.id2label) == 3
    assert who(teacher_model="teacher", teacher="some/model", data="x") == "as it is"  # it knows the data already


def test_the_most_accurate_of_several_weights_is_kept(tmp_path):
    accuracies = {0.0: 0.5, 0.5: 0.9, 1.0: 0.9}
    metrics = {a: {"accuracy": one, "val_loss": 2.0 if a == 1.0 else 1.0} for a, one in accuracies.items()}
    stages = best_of(Built(), "student", [1.0, 0.0, 0.5], lambda name, alpha: (name, alpha))  # type: ignore
    stage: Any = next(stages)
    while isinstance(stage, tuple):
        assert stage[0] == f"student-alpha-{stage[1]:g}"
        stage = stages.send(SimpleNamespace(metrics=metrics[stage[1]], alpha=stage[1]))  # type: ignore[arg-type]
    assert stage.name == "student" and stage.function(None).alpha == 0.5
    alone = best_of(Built(), "student", [0.4], lambda name, alpha: (name, alpha))  # type: ignore
    assert next(alone) == ("student", 0.4)


@pytest.mark.parametrize(
    ("field", "value"), [("alpha_grid", "0.5,1.5"), ("alpha_grid", ""), ("sweep", "0"), ("fraction", 0), ("alpha", 2)]
)
def test_impossible_values_are_refused(field, value):
    with pytest.raises(ConfigError, match=f"pruned-data-kd: {field}="):
        get_system("pruned-data-kd").make(**{field: value})
