"""SlimSAM (card 104) against its paper: the disturbed score, the two alignments, what is cut and what stays."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import SamModel

from stillhouse import Observed
from stillhouse.core.observed import Turn, as_batch
from stillhouse.core.schedule import Progress
from stillhouse.models import pruning, sam
from stillhouse.objectives.feature_sets import DisturbedMSE, FeatureSetMSE
from stillhouse.objectives.plateau import ReduceOnPlateau
from stillhouse.runs import Finished
from stillhouse.systems.vision.slimsam import SlimSAM
from stillhouse.tasks.segmentation import DemoTeacher
from stillhouse.workflow import run_system

RECIPE = DemoTeacher(image_size=16, hidden_size=16, layers=3, heads=2, window=2, global_layers=(1,), embedding=16)


def new(seed: int = 0) -> SamModel:
    """With attention as plain matrix products: fused kernels round differently with and without gradient."""
    config = RECIPE.config()
    config._attn_implementation = "eager"
    return sam.new_sam(config, seed=seed)


def system(**values: Any) -> Any:
    return SlimSAM.make(**values)


def batch(count: int = 2) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(7))}


def disturbed(model: SamModel, teacher: SamModel, std: float) -> DisturbedMSE:
    student, target = Observed(model.vision_encoder, mode="eval"), Observed(teacher.vision_encoder, frozen=True)
    return DisturbedMSE(sam.image_embedding(student), sam.image_embedding(target), std=std)


def gradients(std: float, *, seed: int = 0) -> dict[str, Tensor]:
    model, teacher = new(), new()
    torch.manual_seed(seed)
    return pruning.summed_gradients(model.vision_encoder, disturbed(model, teacher, std), [batch()])


# -- the score --------------------------------------------------------------------------------------------------------


def test_without_noise_every_score_is_zero_and_with_it_none():
    encoder = new().vision_encoder
    groups = [sam.embedding_group(encoder), *sam.head_dim_groups(encoder), *sam.mlp_groups(encoder)]
    still = pruning.taylor_scores(encoder, groups, gradients(0.0))
    moved = pruning.taylor_scores(encoder, groups, gradients(0.01))
    assert all(not score.any() for score in still.values())
    assert all((score > 0).all() for score in moved.values())


def test_a_linear_encoder_s_gradient_is_the_noise_times_the_input():
    """E = W x: dL/dW = -2 mean(n x^T) / outputs where the models are equal; row i scores sum_j |W_ij mean(n_i x_j)|."""
    torch.manual_seed(0)
    model, teacher = nn.Linear(4, 6, bias=False), nn.Linear(4, 6, bias=False)
    teacher.load_state_dict(model.state_dict())
    x = torch.randn(5, 4)
    loss = DisturbedMSE(Observed(model).output(), Observed(teacher, frozen=True).output(), std=0.3)
    torch.manual_seed(1)
    found = pruning.summed_gradients(model, loss, [x])["weight"]
    torch.manual_seed(1)
    noise = 0.3 * torch.randn(5, 6)
    products = (noise[:, :, None] * x[:, None, :]).mean(0)
    torch.testing.assert_close(found, -2 * products / 6)
    group = pruning.Group("rows", 6, (pruning.Member("weight", 0, scored=True),))
    score = pruning.taylor_scores(model, [group], {"weight": found})["rows"]
    torch.testing.assert_close(score, (model.weight.detach() * 2 * products / 6).abs().sum(1))


def test_before_the_cut_the_score_is_proportional_to_the_noise():
    one, ten = gradients(0.01), gradients(0.1)
    for name, gradient in one.items():
        torch.testing.assert_close(10 * gradient, ten[name], rtol=1e-3, atol=1e-6)


def test_away_from_the_teacher_noise_only_shifts_the_target():
    """The gradient is that of the plain error plus that of the noise: linear in the target."""
    model, teacher = new(0), new(1)
    plain = pruning.summed_gradients(model.vision_encoder, disturbed(model, teacher, 0.0), [batch()])
    torch.manual_seed(0)
    noisy = pruning.summed_gradients(model.vision_encoder, disturbed(model, teacher, 0.01), [batch()])
    torch.manual_seed(0)
    noise = pruning.summed_gradients(model.vision_encoder, disturbed(model, copy.deepcopy(model), 0.01), [batch()])
    name = "neck.conv2.weight"
    torch.testing.assert_close(noisy[name], plain[name] + noise[name], rtol=1e-4, atol=1e-7)


# -- the alignments ---------------------------------------------------------------------------------------------------


def at_epoch(epoch: float, epochs: int = 20, per_epoch: int = 7) -> Progress:
    return Progress(round(epoch * per_epoch), epochs * per_epoch)


def test_the_dynamic_weight():
    weight, rest = system(epochs=20).dynamic_weights()
    for epoch in range(20):
        expected = (10 - epoch) / 11 if epoch < 11 else 0.0
        assert weight(at_epoch(epoch)) == pytest.approx(expected)
        assert rest(at_epoch(epoch)) == pytest.approx(1 - expected)
        assert weight(at_epoch(epoch + 6 / 7)) == pytest.approx(expected)  # constant within an epoch
    assert weight(at_epoch(0)) == 10 / 11 and weight(at_epoch(10)) == 0


class Recorded:
    """What passes through a SAM vision encoder, caught by hooks of its own."""

    def __init__(self, model: SamModel, inputs: dict[str, Tensor]) -> None:
        encoder = model.vision_encoder
        self.qkv: list[Tensor] = []
        self.hidden: list[Tensor] = []
        self.stream: list[Tensor] = []
        hooks = [encoder.layers[0].register_forward_pre_hook(lambda _m, args: self.stream.append(args[0]))]
        for layer in encoder.layers:
            hooks.append(layer.attn.qkv.register_forward_hook(lambda _m, _a, out: self.qkv.append(out)))
            hooks.append(layer.mlp.act.register_forward_hook(lambda _m, _a, out: self.hidden.append(out)))
            hooks.append(layer.layer_norm2.register_forward_pre_hook(lambda _m, args: self.stream.append(args[0])))
            hooks.append(layer.register_forward_hook(lambda _m, _a, out: self.stream.append(out)))
        with torch.no_grad():
            self.embedding = encoder(**inputs).last_hidden_state
        for hook in hooks:
            hook.remove()


def mse(ours: list[Tensor], theirs: list[Tensor]) -> float:
    flat = [torch.cat([t.flatten() for t in side]).double() for side in (ours, theirs)]
    return float((flat[0] - flat[1]).square().mean())


def slimmed(teacher: SamModel) -> SamModel:
    """A step-1 model: half the residual channels."""
    model = copy.deepcopy(teacher).requires_grad_(True)
    pruning.prune(model.vision_encoder, sam.embedding_group(model.vision_encoder), torch.arange(0, 16, 2))
    return model


def first(student: SamModel, teacher: SamModel) -> Any:
    return system(epochs=20).bottleneck_aligning(
        Observed(student.vision_encoder), teacher=Observed(teacher.vision_encoder, frozen=True)
    )


def test_bottleneck_aligning_against_its_formula():
    teacher = new()
    student = slimmed(teacher)
    s, t = (Recorded(model, batch()) for model in (student, teacher))
    assert s.stream[0].shape[-1] == 8 and s.qkv[0].shape == t.qkv[0].shape and s.hidden[0].shape == t.hidden[0].shape
    windowed, whole = [0, 2], [1]
    features = sum(mse([s.qkv[i] for i in blocks], [t.qkv[i] for i in blocks]) for blocks in (windowed, whole)) + mse(
        s.hidden, t.hidden
    )
    end = mse([s.embedding], [t.embedding])
    objective = first(student, teacher)
    for epoch in (0, 9.9):
        assert objective(batch(), at_epoch(epoch)).item() == pytest.approx(0.5 * end + 0.5 * features, rel=1e-5)
    for epoch in (10, 19):
        assert objective(batch(), at_epoch(epoch)).item() == pytest.approx(end, rel=1e-5)


def test_global_attention_is_compared_with_the_teacher_s():
    """In the released code that term compares the student with itself, and is zero."""
    teacher = new()
    student = copy.deepcopy(teacher).requires_grad_(True)
    with torch.no_grad():
        student.vision_encoder.layers[1].attn.qkv.bias += 0.1
    objective = first(student, teacher)
    values = {}
    for value in objective.evaluate(Turn(objective.signals()), as_batch(batch()), at_epoch(0)):
        values[value.name] = value.value
    assert values["global qkv"].item() == pytest.approx(0.01, rel=1e-4)
    (gradient,) = torch.autograd.grad(values["global qkv"], [student.vision_encoder.layers[1].attn.qkv.bias])
    torch.testing.assert_close(gradient, torch.full_like(gradient, 2 * 0.1 / 48), rtol=1e-3, atol=1e-6)


def test_embedding_aligning_against_its_formula():
    teacher = new()
    intermediate = slimmed(teacher)
    student = copy.deepcopy(intermediate)
    encoder = student.vision_encoder
    torch.manual_seed(0)
    for groups in (sam.head_dim_groups(encoder), sam.mlp_groups(encoder)):
        pruning.prune_groups(encoder, groups, pruning.random_scores(groups), 0.5, across=True)
    s, t, p = (Recorded(model, batch()) for model in (student, teacher, intermediate))
    assert len(s.stream) == 7 and s.qkv[0].shape != p.qkv[0].shape
    objective = system(epochs=20).embedding_aligning(
        Observed(encoder),
        teacher=Observed(teacher.vision_encoder, frozen=True),
        intermediate=Observed(intermediate.vision_encoder, frozen=True),
    )
    to_teacher = mse([s.embedding], [t.embedding])
    to_intermediate = mse(s.stream, p.stream) + mse([s.embedding], [p.embedding])
    for epoch, a in ((0, 10 / 11), (4, 6 / 11), (10, 0), (15, 0)):
        expected = (1 - a) * to_teacher + a * to_intermediate
        assert objective(batch(), at_epoch(epoch)).item() == pytest.approx(expected, rel=1e-5)
    objective(batch(), at_epoch(3)).backward()
    assert all(p.grad is None for model in (teacher, intermediate) for p in model.parameters())
    assert all(p.grad is not None for p in encoder.parameters())


def test_a_set_of_features_is_one_long_tensor():
    generator = torch.Generator().manual_seed(0)
    wide, narrow = nn.Linear(3, 40), nn.Linear(3, 2)
    others = [copy.deepcopy(wide), copy.deepcopy(narrow)]
    with torch.no_grad():
        others[0].bias += 1.0
    x = torch.randn(4, 3, generator=generator)
    pairs = [
        [Observed(model).output() for model in (wide, narrow)],
        [Observed(model, frozen=True).output() for model in others],
    ]
    assert FeatureSetMSE(*pairs)(x).item() == pytest.approx(40 / 42)  # not (1 + 0) / 2
    with pytest.raises(ValueError, match="do not pair up"):
        FeatureSetMSE(pairs[0], pairs[1][:1])
    with pytest.raises(ValueError, match="differ"):
        FeatureSetMSE(pairs[0], pairs[1][::-1])(x)


def test_the_learning_rate_falls_as_torch_s_does():
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, "max", factor=0.5, patience=3)
    ours = ReduceOnPlateau(factor=0.5, patience=3)
    generator = torch.Generator().manual_seed(0)
    for number in range(60):
        figure = float(torch.rand((), generator=generator)) * (1 + number / 60)
        theirs.step(figure)
        ours.watch(figure)
        assert ours(Progress(number, 60)) == optimizer.param_groups[0]["lr"]
    assert ours(Progress(0, 60)) < 0.1
    again = ReduceOnPlateau(factor=0.5, patience=3)
    again.load_state_dict(ours.state_dict())
    assert again(Progress(0, 60)) == ours(Progress(0, 60))


# -- the whole --------------------------------------------------------------------------------------------------------


SMALL = {"steps": 4, "images": 16, "validation_images": 4, "test_images": 4, "teacher_steps": 2, "trackers": []}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Any:
    @functools.cache
    def made(**values: Any) -> Finished:
        return run_system("slimsam", SMALL | values, output=tmp_path_factory.mktemp("run") / "run", quiet=True)

    return made


def loaded(done: Finished, stage: str) -> SamModel:
    return sam.load_sam(str(done.artifacts[stage].path))


def test_each_step_cuts_one_structure_and_leaves_the_other(run):
    done = run()
    assert list(done.artifacts) == [
        "teacher",
        "prune-embedding",
        "intermediate",
        "prune-bottleneck",
        "student",
        "evaluation",
    ]
    teacher, middle, student = (loaded(done, name).vision_encoder for name in ("teacher", "intermediate", "student"))
    for old, one, two in zip(teacher.layers, middle.layers, student.layers, strict=True):
        assert (old.attn.qkv.in_features, one.attn.qkv.in_features, two.attn.qkv.in_features) == (64, 32, 32)
        assert old.attn.qkv.out_features == one.attn.qkv.out_features == 192
        assert old.mlp.lin1.out_features == one.mlp.lin1.out_features == 256
        assert old.attn.num_attention_heads == one.attn.num_attention_heads == two.attn.num_attention_heads
        assert two.attn.scale == sam.head_dim(two.attn) ** -0.5
        assert two.mlp.lin1.out_features % 4 == 0
    dims = [sam.head_dim(layer.attn) for layer in student.layers]
    assert sum(dims) == 4 * 16 // 2  # half, wherever they are
    assert student.neck.conv1.weight.shape == (64, 32, 1, 1) and student.neck.conv2.weight.shape == (64, 64, 3, 3)
    assert student.pos_embed.shape[-1] == 32


def test_decoder_and_prompt_encoder_stay_the_teacher_s(run):
    teacher, student = (loaded(run(), name) for name in ("teacher", "student"))
    for name, value in teacher.state_dict().items():
        if not name.startswith("vision_encoder."):
            assert torch.equal(value, student.state_dict()[name]), name
    cut, trained = (loaded(run(), name).vision_encoder for name in ("prune-bottleneck", "student"))
    assert any(not torch.equal(a, b) for a, b in zip(cut.parameters(), trained.parameters(), strict=True))


def test_positions_are_reset(run):
    teacher, cut = (loaded(run(), name).vision_encoder for name in ("teacher", "prune-embedding"))
    tables = [
        [table for layer in one.layers for table in (layer.attn.rel_pos_h, layer.attn.rel_pos_w)]
        for one in (teacher, cut)
    ]
    assert all(table.any() for table in tables[0]) and not any(table.any() for table in tables[1])


OTHER = {"positions": "slice", "bottleneck_ranking": "local", "importance": "magnitude", "alternate": False}


def test_positions_are_sliced(run):
    teacher, cut = (loaded(run(**OTHER), name).vision_encoder for name in ("teacher", "prune-embedding-bottleneck"))
    for old, new_ in zip(teacher.layers, cut.layers, strict=True):
        columns = {tuple(column.tolist()) for column in old.attn.rel_pos_h.T}
        assert new_.attn.rel_pos_h.shape[1] == 8
        assert {tuple(column.tolist()) for column in new_.attn.rel_pos_h.T} < columns


def test_locally_cut_the_result_is_a_plain_sam(run):
    done = run(**OTHER)
    student = SamModel.from_pretrained(done.artifacts["student"].path)
    assert student.config.vision_config.hidden_size == 32 and student.config.vision_config.mlp_dim == 128
    d, h, layers, grid, out = 32, 128, 4, 8, 64
    block = 4 * d + (3 * d * d + 3 * d) + (d * d + d) + (d * h + h) + (h * d + d)  # norms, qkv, projection, MLP
    tables = sum(2 * (2 * side - 1) * (d // 4) for side in (4, 8, 4, 8))  # windows of 4 and the whole grid in turn
    whole = layers * block + tables + (48 * d + d) + grid * grid * d + d * out + 9 * out * out + 4 * out
    assert sum(p.numel() for p in student.vision_encoder.parameters()) == whole


def test_at_once_takes_as_many_steps(run):
    done = run(**OTHER)
    assert list(done.artifacts) == ["teacher", "prune-embedding-bottleneck", "student", "evaluation"]
    assert done.artifacts["student"].metrics["steps"] == 2 * SMALL["steps"]


def test_new_weights_in_the_same_shape():
    model = new()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(0)
    sam.renew(model.vision_encoder)
    for name, value in model.state_dict().items():
        same = torch.equal(value, before[name])
        neutral = "layer_norm" in name or name.endswith((".bias", "rel_pos_h", "rel_pos_w", "pos_embed"))
        assert same == (neutral or not name.startswith("vision_encoder.")), name


def test_the_criteria_choose_differently():
    encoder = new().vision_encoder
    group = sam.embedding_group(encoder)
    torch.manual_seed(0)
    found = [
        pruning.taylor_scores(encoder, [group], gradients(0.01)),
        pruning.magnitude_scores(encoder, [group]),
        pruning.random_scores([group]),
    ]
    kept = [tuple(pruning.keep_each([group], one, 0.5)["embedding"].tolist()) for one in found]
    assert len(set(kept)) == 3


def test_what_a_cut_costs_is_measured_before_training(run):
    """So that criteria are compared by what they leave: training moves the student's error, and not that of the cut."""
    cut = {"alternate": False, "importance": "magnitude"}
    short, long = (run(**cut, steps=steps).artifacts["evaluation"].metrics for steps in (1, 4))
    assert short["pruned/embedding_mse"] == long["pruned/embedding_mse"] > 0
    assert short["student/embedding_mse"] != short["pruned/embedding_mse"]
    other = run(**{**cut, "importance": "random"}, steps=1).artifacts["evaluation"].metrics
    assert other["pruned/embedding_mse"] != short["pruned/embedding_mse"]
    assert other["student/parameters"] == pytest.approx(short["student/parameters"], rel=0.05)


def test_the_table_and_its_picture(run):
    done = run()
    table = done.artifacts["evaluation"].table()
    assert [row["name"] for row in table.rows] == ["teacher", "pruned", "student"]
    assert table.row("teacher")["agreement"] == 1.0 and table.row("teacher")["embedding_mse"] == 0.0
    assert table.row("student")["parameters"] < 0.4 * table.row("teacher")["parameters"]
    svg = (done.artifacts["evaluation"].path / "samples.svg").read_text()
    assert svg.lstrip().startswith("<?xml") and "student" in svg and svg.count("<image") == 3 * 4
