"""FTD: steps towards flat minima, trajectories that are recorded and followed, and how errors grow along them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector

from stillhouse.base.errors import ConfigError, DataError, ModelError
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player, sgd
from stillhouse.core.run import Run
from stillhouse.core.schedule import Progress
from stillhouse.core.train import Train
from stillhouse.data.condensation import dsa
from stillhouse.data.condensation.synthetic import SyntheticImages, from_parquet, images_per_class, to_dataset
from stillhouse.data.condensation.zca import ZCA
from stillhouse.data.images import Images, digits
from stillhouse.data.sources import Batches
from stillhouse.losses.sharpness import adaptive_perturbation, gsam_direction, inner
from stillhouse.models.convnet import MLP, ConvNet
from stillhouse.objectives.trajectory import (
    FlatCrossEntropy,
    Recorded,
    TrajectoryMatching,
    accumulated_error,
    amplification,
    shown_from,
    trajectory_matching_loss,
    unflatten,
    unroll,
)
from stillhouse.tasks.condensation import images_and_rate
from stillhouse.workflow import run_system


def tensors(*shapes: tuple[int, ...], seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def problem(seed: int = 0, count: int = 12) -> tuple[MLP, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    model = MLP((1, 2, 3), 3, widths=[5]).double()
    return model, torch.randn(count, 1, 2, 3, dtype=torch.float64), torch.randint(3, (count,))


# -- GSAM -----------------------------------------------------------------------------------------------------------


def test_the_perturbation_of_a_parabola():
    """f = h w^2 / 2, w = 1, h = 2, rho = 0.1: g = 2, e = rho w^2 g / (|w| |g|) = 0.1, g_p = 2.2, and g_v = 0."""
    w, h = torch.tensor([1.0]), 2.0
    (e,) = adaptive_perturbation([w], [h * w], rho=0.1)
    assert e.item() == pytest.approx(0.1)
    perturbed = h * (w + e)
    assert perturbed.item() == pytest.approx(2.2)
    (d,) = gsam_direction([h * w], [perturbed], alpha=0.4)
    assert d.item() == pytest.approx(2.2)


def test_the_perturbation_has_size_rho_in_units_of_the_weights():
    weights, gradients = tensors((3, 4), (5,), seed=0), tensors((3, 4), (5,), seed=1)
    step = adaptive_perturbation(weights, gradients, rho=0.3)
    relative = [e / w.abs() for e, w in zip(step, weights, strict=True)]
    assert inner(relative, relative).sqrt().item() == pytest.approx(0.3)
    best = inner(step, gradients)  # no other step of that size raises the loss more, to first order
    for seed in range(2, 8):
        other = [w.abs() * x for w, x in zip(weights, tensors((3, 4), (5,), seed=seed), strict=True)]
        size = sum((o / w).square().sum() for o, w in zip(other, weights, strict=True)).sqrt()
        assert inner(other, gradients) * 0.3 / size < best


def test_what_is_taken_off_stands_upright():
    g, p = tensors((3, 4), (5,), seed=0), tensors((3, 4), (5,), seed=1)
    direction = gsam_direction(g, p, alpha=1.0)
    upright = [there - d for there, d in zip(p, direction, strict=True)]
    along = [x - v for x, v in zip(g, upright, strict=True)]
    assert inner(upright, p).abs() < 1e-9
    share = inner(g, p) / inner(p, p)
    for x, y in zip(along, p, strict=True):
        torch.testing.assert_close(x, share * y)
    for d, there in zip(gsam_direction(g, p, alpha=0.0), p, strict=True):
        torch.testing.assert_close(d, there)


@pytest.mark.parametrize(("rho", "alpha"), [(0.1, 0.4), (0.1, 0.0), (1e-9, 0.0)])
def test_the_objective_has_the_direction_as_its_gradient(rho, alpha):
    """Two passes by hand; with rho near 0 and alpha = 0 it is the plain gradient."""
    model, images, labels = problem()
    objective = FlatCrossEntropy(Observed(model), rho=rho, alpha=alpha)
    loss = objective({"pixel_values": images, "labels": labels})
    loss.backward()
    found = [weight.grad for weight in model.parameters()]

    weights = list(model.parameters())
    plain = F.cross_entropy(model(images), labels)
    assert loss.item() == pytest.approx(plain.item())
    here = torch.autograd.grad(plain, weights)
    scaled = math.sqrt(sum((w.abs() * g).square().sum().item() for w, g in zip(weights, here, strict=True)))
    with torch.no_grad():
        for w, g in zip(weights, here, strict=True):
            w.add_(rho * w.square() * g / scaled)
    there = torch.autograd.grad(F.cross_entropy(model(images), labels), weights)
    cosine = inner(here, there) / (inner(here, here) * inner(there, there)).sqrt()
    norm = inner(there, there).sqrt()
    for own, g, p in zip(found, here, there, strict=True):
        upright = g - cosine * inner(here, here).sqrt() * p / norm
        torch.testing.assert_close(own, p - alpha * upright)
    if rho < 1e-6:
        for own, g in zip(found, here, strict=True):
            torch.testing.assert_close(own, g, rtol=1e-6, atol=1e-8)


def test_a_plain_step_when_rho_is_zero():
    model, images, labels = problem()
    FlatCrossEntropy(Observed(model), rho=0.0)({"pixel_values": images, "labels": labels}).backward()
    expected = torch.autograd.grad(F.cross_entropy(model(images), labels), list(model.parameters()))
    for weight, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(weight.grad, gradient)


# -- trajectories ---------------------------------------------------------------------------------------------------


def test_an_expert_is_recorded_before_and_after_every_epoch(tmp_path):
    """Against the same training by hand."""
    data = digits("train", size=96)
    torch.manual_seed(0)
    model = MLP(data.shape, 10, widths=[4])
    twin = MLP(data.shape, 10, widths=[4])
    twin.load_state_dict(model.state_dict())
    observed = Observed(model)
    recorded = Recorded(FlatCrossEntropy(observed, rho=0.0), model, every=3, count=2)
    source = Batches(data, 32, seed=4, gather=True)
    player = Player("expert", observed, recorded, optimizer=sgd(0.1, momentum=0.0))
    Run(tmp_path, quiet=True).execute([Train("expert", player, source=source, steps=6)])

    points, batches = [parameters_to_vector(twin.parameters())], Batches(data, 32, seed=4, gather=True)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(6):
        batch = next(batches)
        optimizer.zero_grad()
        F.cross_entropy(twin(batch["pixel_values"]), batch["labels"]).backward()
        optimizer.step()
        if step % 3 == 2:
            points.append(parameters_to_vector(twin.parameters()))
    torch.testing.assert_close(recorded.finished(model), torch.stack(points).detach(), rtol=1e-5, atol=1e-6)
    assert "model" not in " ".join(recorded.state_dict()) and list(recorded.parameters()) == []


def test_looking_at_the_objective_does_not_record():
    model, images, labels = problem()
    recorded = Recorded(FlatCrossEntropy(Observed(model), rho=0.0), model.float(), every=1, count=1)
    batch = {"pixel_values": images.float(), "labels": labels}
    recorded.eval()
    recorded(batch, Progress(0, 1))
    assert not recorded.points.any()
    recorded.train()
    recorded(batch, Progress(0, 1))
    torch.testing.assert_close(recorded.points[0], parameters_to_vector(model.parameters()).detach())


def test_unrolling_is_sgd():
    model, images, labels = problem()
    start = parameters_to_vector(model.parameters()).detach()
    reached = unroll(model, start, shown_from(images, labels), 0.3, steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(4):
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    torch.testing.assert_close(reached, parameters_to_vector(model.parameters()).detach())


def matching(pixels: torch.Tensor, labels: torch.Tensor, model: nn.Module, *, rate: float, steps: int) -> tuple:
    synthetic = SyntheticImages(pixels, labels, step_size=rate).double()
    observed = Observed(synthetic, call=lambda module, _: module())
    return synthetic, TrajectoryMatching(observed, model, steps=steps)


def test_the_loss_at_its_ends():
    """1 where the step size is 0; 0 where the images are the expert's own, in as many steps at its own rate."""
    model, images, labels = problem()
    start = parameters_to_vector(model.parameters()).detach()
    target = unroll(model, start, shown_from(images, labels), 0.2, steps=5)
    batch = {"start": start, "target": target, "seed": torch.tensor(0)}
    _, still = matching(images, labels, model, rate=0.0, steps=5)
    assert still(batch).item() == pytest.approx(1.0)
    _, same = matching(images, labels, model, rate=0.2, steps=5)
    assert same(batch).item() < 1e-10


def test_the_loss_does_not_depend_on_the_size_of_weights():
    a, b, c = tensors((9,), (9,), (9,), seed=0)
    one = trajectory_matching_loss(a, b, c)
    assert trajectory_matching_loss(7 * a, 7 * b, 7 * c).item() == pytest.approx(one.item())


def test_gradients_reach_the_images_and_the_step_size_through_all_steps():
    """Against finite differences."""
    model, images, labels = problem(count=4)
    start = parameters_to_vector(model.parameters()).detach()
    (target,) = tensors((len(start),), seed=3)
    batch = {"start": start, "target": target, "seed": torch.tensor(0)}
    synthetic, objective = matching(images, labels, model, rate=0.3, steps=3)
    objective(batch).backward()
    for parameter, place in (
        (synthetic.step_size, ()),
        (synthetic.pixels, (1, 0, 1, 2)),
        (synthetic.pixels, (3, 0, 0, 0)),
    ):
        values = []
        for change in (1e-6, -2e-6):
            with torch.no_grad():
                parameter[place] += change
            values.append(objective(batch).item())
        with torch.no_grad():
            parameter[place] += 1e-6
        assert parameter.grad[place].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)
    assert not [p for p in model.parameters() if p.requires_grad]
    assert {id(p) for p in objective.parameters()} <= {id(p) for p in synthetic.parameters()}


class Line(nn.Module):
    """One output for two classes: cross-entropy on it is a logistic loss with a gradient in closed form."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(6, dtype=torch.float64))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        z = pixel_values.flatten(1) @ self.weight
        return torch.stack([torch.zeros_like(z), z], 1)


def test_the_gradient_of_the_step_size_in_closed_form():
    """One step: dL/da = -2 (theta_1 - theta*) . g / ||theta - theta*||^2, with g = X'(sigmoid(X theta) - y) / n."""
    _, images, labels = problem()
    labels = labels.clamp(max=1)
    theta, target = tensors((6,), (6,), seed=5)
    synthetic, objective = matching(images, labels, Line(), rate=0.4, steps=1)
    objective({"start": theta, "target": target, "seed": torch.tensor(0)}).backward()
    x = images.flatten(1)
    g = x.T @ ((x @ theta).sigmoid() - labels.double()) / len(x)
    expected = -2 * (theta - synthetic.step_size.item() * g - target) @ g / (theta - target).square().sum()
    assert synthetic.step_size.grad.item() == pytest.approx(expected.item())


def test_a_deviation_grows_as_the_curvature_says(monkeypatch):
    """Of a parabola with curvature h, N steps multiply a deviation by (1 - a h)^N: 0.9^10 = 0.348678."""
    monkeypatch.setattr(F, "cross_entropy", lambda logits, labels: logits.square().sum() / 2)

    class Parabola(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(4))

        def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
            return self.weight * pixel_values.new_ones(())

    shown = shown_from(torch.zeros(1, 1, 1, 1), torch.zeros(1, dtype=torch.int64))
    start = torch.tensor([1.0, -2.0, 3.0, 0.5])
    grown = amplification(Parabola(), start, shown, 0.1, steps=10, size=0.05, draws=3, seed=0)
    assert grown == pytest.approx(0.9**10, rel=1e-4) and pytest.approx(0.348678, rel=1e-5) == 0.9**10


def test_errors_add_up_along_the_way():
    """No error on the expert's own images at its own rate; with others, the student goes on from where it came to."""
    model, images, labels = problem()
    shown = shown_from(images, labels)
    points = [parameters_to_vector(model.parameters()).detach()]
    for _ in range(4):
        points.append(unroll(model, points[-1], shown, 0.2, steps=3))
    trajectory = torch.stack(points)
    assert accumulated_error(model, trajectory, shown, 0.2, steps=6, epochs=2, last=4) < 1e-10
    found = accumulated_error(model, trajectory, shown, 0.1, steps=6, epochs=2, last=4)
    end = unroll(model, points[0], shown, 0.1, steps=12)
    expected = (end - points[4]).norm() / (points[0] - points[4]).norm()
    assert found == pytest.approx(expected.item())


# -- augmentation and whitening -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["color", "crop", "cutout", "flip", "scale", "rotate"])
def test_a_batch_is_changed_alike_and_differentiably(kind):
    image = torch.rand(1, 3, 8, 8, dtype=torch.float64)
    seen = set()
    for seed in range(6):
        batch = image.repeat(3, 1, 1, 1).requires_grad_()
        changed = dsa.augment(batch, [kind], torch.Generator().manual_seed(seed))
        assert torch.equal(changed[0], changed[1]) and torch.equal(changed[0], changed[2])
        again = dsa.augment(batch, [kind], torch.Generator().manual_seed(seed))
        assert torch.equal(changed, again)
        changed.sum().backward()
        assert batch.grad is not None and batch.grad.abs().sum() > 0
        seen.add(changed.detach().sum().item() if kind != "flip" else changed[0, 0, 0, 0].item())
    assert len(seen) > 1  # another seed, another change
    assert dsa.augment(image, [], torch.Generator()) is image


def test_whitened_images_are_uncorrelated():
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(5000, 6, generator=generator) @ torch.randn(6, 6, generator=generator) + 3
    images = mixed.reshape(5000, 1, 2, 3).double()
    zca = ZCA.fit(images, eps=0.0)
    white = zca(images).flatten(1)
    torch.testing.assert_close(white.T @ white / 5000, torch.eye(6, dtype=torch.float64), rtol=0, atol=1e-8)
    torch.testing.assert_close(zca.whiten_DD, zca.whiten_DD.T)  # what makes it ZCA and not PCA


# -- data and networks ----------------------------------------------------------------------------------------------


def test_networks_have_no_statistics_and_the_right_shapes():
    for model in (ConvNet((3, 32, 32), 10), ConvNet((1, 8, 8), 10, width=8), MLP((1, 8, 8), 10)):
        shape = (2, 3, 32, 32) if sum(p.numel() for p in model.parameters()) > 100_000 else (2, 1, 8, 8)
        assert model(torch.randn(shape)).shape == (2, 10) and not list(model.buffers())
    assert sum(p.numel() for p in ConvNet((3, 32, 32), 10).parameters()) == 320_010  # as in the released code


def test_the_condensed_set_is_read_back_as_it_was_written(tmp_path):
    pixels, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 1, 2])
    to_dataset(pixels, labels, ("a", "b", "c")).to_parquet(tmp_path / "data.parquet")
    back = from_parquet(tmp_path / "data.parquet", ("a", "b", "c"))
    assert torch.equal(back.pixels, pixels) and torch.equal(back.labels, labels)


def test_images_per_class():
    data = digits("train")
    chosen = images_per_class(data, 3, seed=0)
    assert data.labels[chosen].tolist() == [label for label in range(10) for _ in range(3)]
    assert len(set(chosen.tolist())) == 30
    few = Images(data.pixels[:4], torch.tensor([0, 0, 0, 1]), ("a", "b"))
    with pytest.raises(ValueError, match="class b has 1 images, of which 2 are wanted"):
        images_per_class(few, 2, seed=0)


def test_images_and_step_size_have_learning_rates_of_their_own():
    synthetic = SyntheticImages(torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]), step_size=0.1)
    groups = [{"params": list(synthetic.parameters())}]
    built = images_and_rate("sgd", 100.0, momentum=0.5, rate_lr=1e-5)(groups)
    assert [(group["lr"], [p.ndim for p in group["params"]]) for group in built.param_groups] == [
        (100.0, [4]),
        (1e-5, [0]),
    ]


def test_the_system_learns_images_that_a_student_follows(tmp_path):
    """A short run: the loss falls below 1, where a student that stands still would be, and images have moved."""
    fields = {
        "experts": 1,
        "epochs": 3,
        "max_start": 1,
        "steps": 40,
        "networks": 1,
        "network_steps": 60,
        "trackers": [],
    }
    done = run_system("ftd", {**fields, "augmentation": ("crop",)}, output=tmp_path / "run", quiet=True)
    images = from_parquet(done.artifacts["condensed"].data_file(), tuple(map(str, range(10))))
    real = digits("train")
    begun = real.select(images_per_class(real, 1, seed=0))
    assert torch.equal(images.labels, begun.labels) and (images.pixels - begun.pixels).abs().mean() > 0.01
    course = [
        line for line in (done.folder / "stages/02-images/metrics.jsonl").read_text().splitlines() if "train" in line
    ]
    import json

    losses = [json.loads(line)["loss"] for line in course if json.loads(line)["kind"] == "train"]
    assert losses[-1] < losses[0] and losses[-1] < 0.9
    figures = done.artifacts["evaluation"].metrics
    assert {"condensed/accuracy", "random/accuracy", "condensed/accumulated_error"} <= figures.keys()


def test_bad_fields_are_named(tmp_path):
    with pytest.raises(ConfigError, match="go beyond epochs=3"):
        run_system("ftd", {"epochs": 3, "trackers": []}, output=tmp_path / "a", quiet=True)
    with pytest.raises(ConfigError, match="expected convnet, mlp or new:DIRECTORY"):
        run_system("ftd", {"network": "resnet", "trackers": []}, output=tmp_path / "b", quiet=True)
    with pytest.raises(ConfigError, match="cannot be halved so often"):
        run_system("ftd", {"network": "convnet", "depth": 5, "trackers": []}, output=tmp_path / "c", quiet=True)
    with pytest.raises(DataError, match="lower per_class"):
        run_system(
            "ftd",
            {"per_class": 500, "experts": 1, "epochs": 2, "max_start": 0, "trackers": []},
            output=tmp_path / "d",
            quiet=True,
        )


def test_unflattening_gives_the_parameters_back():
    model, images, _ = problem()
    flat = parameters_to_vector(model.parameters())
    torch.testing.assert_close(functional_call(model, unflatten(model, flat), (images,)), model(images))


def test_the_users_own_images_run_to_the_end(tmp_path):
    """A folder of class folders, whitened, on a ConvNet, with every augmentation and batches of learnt images."""
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    for label in ("dark", "light"):
        (tmp_path / "mine" / label).mkdir(parents=True)
        for number in range(12):
            pixels = torch.rand(10, 10, 3, generator=draw) * 120 + (130 if label == "light" else 0)
            Image.fromarray(pixels.to(torch.uint8).numpy()).save(tmp_path / "mine" / label / f"{number}.png")
    fields = {"data": str(tmp_path / "mine"), "image_size": 8, "width": 8, "depth": 2, "per_class": 2}
    fields |= {"experts": 1, "epochs": 3, "max_start": 1, "expert_batch": 8, "student_steps": 2, "student_batch": 3}
    fields |= {"steps": 4, "lr": 1.0, "networks": 1, "network_steps": 4, "trackers": []}
    done = run_system("ftd", fields, output=tmp_path / "run", quiet=True)
    images = from_parquet(done.artifacts["condensed"].data_file(), ("dark", "light"))
    assert images.pixels.shape == (4, 3, 8, 8) and images.labels.tolist() == [0, 0, 1, 1]
    assert done.artifacts["condensed"].json("step_size.json") > 0
    assert "<svg" in (done.artifacts["condensed"].path / "images.svg").read_text()


def test_networks_with_running_statistics_are_refused(tmp_path):
    from transformers import ResNetConfig

    config = ResNetConfig(num_channels=1, embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic")
    config.save_pretrained(tmp_path / "net")
    fields = {"network": f"new:{tmp_path / 'net'}", "trackers": []}
    with pytest.raises(ModelError, match="batch normalisation"):
        run_system("ftd", fields, output=tmp_path / "run", quiet=True)
