"""DMAE (card 118) against its paper: the distance, the shared mask, the teacher that stops, and MAE as its limit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification, ViTMAEForPreTraining

from stillhouse import Observed
from stillhouse.base.errors import ConfigError, ModelError
from stillhouse.losses.directions import feature_distance
from stillhouse.models import masked
from stillhouse.objectives.masked import FeatureAlignment, projector
from stillhouse.runs import Finished
from stillhouse.systems.vision.dmae import DMAE
from stillhouse.tasks.masked_images import DemoTeacher
from stillhouse.workflow import run_system

BIG = DemoTeacher().config()
SMALL = masked.masked_autoencoder_from_spec("hidden_size=16,layers=2,heads=2", BIG)


def pair(visible: int = 4) -> tuple[ViTMAEForPreTraining, ViTMAEForPreTraining]:
    teacher, student = masked.new_masked_autoencoder(BIG, seed=0), masked.new_masked_autoencoder(SMALL, seed=1)
    for model in (teacher, student):
        masked.set_visible(model, visible)
    return teacher, student


def batch(count: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {
        "pixel_values": torch.rand(count, 1, 8, 8, generator=generator),
        "noise": torch.rand(count, 16, generator=generator),
        "labels": torch.zeros(count, dtype=torch.long),
    }


class Task:
    """As much of a task as the objective reads."""

    def __init__(self, teacher: ViTMAEForPreTraining) -> None:
        self.teacher = teacher


def objective(student: ViTMAEForPreTraining, teacher: ViTMAEForPreTraining, **values: Any) -> Any:
    torch.manual_seed(11)  # the projection
    return DMAE.make(**values).objective(Task(teacher), Observed(student))


# -- the distance -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [4, 64])
def test_opposite_and_orthogonal_directions_are_two_over_d_apart(width):
    e1, e2 = torch.eye(width)[0][None, None], torch.eye(width)[1][None, None]
    assert feature_distance(e1, e1).item() == 0
    assert feature_distance(e1, -e1).item() == pytest.approx(2 / width)
    assert feature_distance(e1, e2).item() == pytest.approx(2 / width)
    assert feature_distance(e1, -e1, power=2).item() == pytest.approx(4 / width)
    assert feature_distance(e1, e2, power=2).item() == pytest.approx(2 / width)


def test_lengths_do_not_count_unless_asked():
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(2, 3, 8, generator=generator), torch.randn(2, 3, 8, generator=generator)
    scale = torch.rand(2, 3, 1, generator=generator) + 0.1
    torch.testing.assert_close(feature_distance(scale * s, 7 * t), feature_distance(s, t))
    assert feature_distance(scale * s, t, directions=False) != feature_distance(s, t, directions=False)
    torch.testing.assert_close(feature_distance(s, t, directions=False), (s - t).abs().mean())


@pytest.mark.parametrize("width", [4, 100])
def test_its_largest_value(width):
    """2 / sqrt(D): all channels alike and opposite."""
    ones = torch.ones(1, 1, width)
    assert feature_distance(ones, -ones).item() == pytest.approx(2 / math.sqrt(width))
    generator = torch.Generator().manual_seed(0)
    s, t = torch.randn(50, 1, width, generator=generator), torch.randn(50, 1, width, generator=generator)
    assert all(feature_distance(a[None], b[None]) < 2 / math.sqrt(width) for a, b in zip(s, t, strict=True))


def test_without_a_projector_features_are_compared_as_they_are():
    teacher, other = pair()[0], masked.new_masked_autoencoder(BIG, seed=3)
    masked.set_visible(other, 4)
    taps = [Observed(model, frozen=model is teacher).tap("vit.layers.2") for model in (other, teacher)]
    s, t = (tap(batch()) for tap in taps)
    plain = FeatureAlignment(*taps, projection=None)
    assert plain(batch()).item() == pytest.approx((s - t).abs().mean().item())
    projected = FeatureAlignment(*taps, projection=nn.Identity())
    assert projected(batch()).item() == pytest.approx(feature_distance(s, t).item())
    assert plain(batch()) != projected(batch())


def test_projectors():
    x = torch.randn(2, 5, 16)
    assert projector("none", 16, 64) is None
    for kind, layers in (("linear", 1), ("mlp-1", 2), ("mlp-2", 4)):
        made = projector(kind, 16, 64)
        assert made is not None and made(x).shape == (2, 5, 64)
        assert sum(isinstance(part, nn.Linear) for part in made.modules()) == layers


# -- how many patches -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "ratio", "rounding", "left"),
    [
        (196, 0.75, "nearest", 49),
        (196, 0.75, "truncate", 49),
        (196, 0.95, "nearest", 10),  # the paper's numbers
        (196, 0.98, "nearest", 4),
        (196, 0.95, "truncate", 9),  # the released code's
        (196, 0.98, "truncate", 3),
        (16, 0.94, "nearest", 1),
        (16, 0.94, "truncate", 1),  # 0 by the rule, but something must be seen
        (16, 0.75, "truncate", 4),
        (10, 0.9, "truncate", 1),  # 0.9999... in floats
    ],
)
def test_the_rounding_rule(count, ratio, rounding, left):
    assert masked.visible_patches(count, ratio, rounding) == left


@pytest.mark.parametrize("visible", [1, 2, 4, 7, 15, 16])
def test_a_model_sees_exactly_so_many(visible):
    _, student = pair(visible)
    mask = student.vit(batch()["pixel_values"], noise=batch()["noise"]).mask
    assert (16 - mask.sum(1)).tolist() == [visible] * 3


def test_both_see_the_same_patches():
    teacher, student = pair()
    masks = [model.vit(batch()["pixel_values"], noise=batch()["noise"]).mask for model in (teacher, student)]
    assert torch.equal(*masks)
    smallest = batch()["noise"].argsort(1)[:, :4]
    assert (masks[0].gather(1, smallest) == 0).all()


# -- the objective ----------------------------------------------------------------------------------------------------


VALUES = {"teacher_blocks": [2], "student_blocks": [1]}


def test_the_loss_against_a_forward_by_hand():
    teacher, student = pair()
    found = objective(student, teacher, **VALUES)

    def features(model: ViTMAEForPreTraining, block: int) -> Tensor:
        x, _, _ = model.vit.embeddings(batch()["pixel_values"], noise=batch()["noise"])
        for layer in model.vit.layers[: block + 1]:
            x = layer(x)
        return x

    with torch.no_grad():
        s, t = features(student, 1), features(teacher, 2)
        assert s.shape == (3, 5, 16) and t.shape == (3, 5, 64)  # the class token and four patches
        head = next(part for part in found.modules() if isinstance(part, nn.Linear) and part.out_features == 64)
        s = s @ head.weight.T + head.bias
        s, t = (x / x.norm(dim=-1, keepdim=True) for x in (s, t))
        align = (s - t).abs().mean().item()
        output = student(batch()["pixel_values"], noise=batch()["noise"])
        patches = batch()["pixel_values"].reshape(3, 4, 2, 4, 2).permute(0, 1, 3, 2, 4).reshape(3, 16, 4)
        errors = (output.logits - patches).square().mean(-1)[output.mask.bool()].mean().item()
    assert found(batch()).item() == pytest.approx(errors + align, rel=1e-5)
    twice = objective(student, teacher, **VALUES, align_weight=3.0)
    assert twice(batch()).item() == pytest.approx(errors + 3 * align, rel=1e-5)


def test_without_weight_it_is_a_masked_autoencoder_exactly():
    teacher, student = pair()
    plain = copy.deepcopy(student)
    student(batch()["pixel_values"], noise=batch()["noise"]).loss.backward()
    objective(plain, teacher, **VALUES, align_weight=0.0)(batch()).backward()
    for ours, theirs in zip(plain.parameters(), student.parameters(), strict=True):
        assert (ours.grad is None and theirs.grad is None) or torch.equal(ours.grad, theirs.grad)


def test_the_weight_scales_the_gradient_of_the_alignment_alone():
    gradients = []
    for weight in (0.0, 1.0, 2.0):
        teacher, student = pair()
        objective(student, teacher, **VALUES, align_weight=weight)(batch()).backward()
        gradients.append(student.vit.layers[0].mlp.fc1.weight.grad)
        assert all(p.grad is None for p in teacher.parameters())  # never the teacher
    assert not torch.equal(gradients[0], gradients[1])
    torch.testing.assert_close(gradients[2] - gradients[0], 2 * (gradients[1] - gradients[0]), rtol=1e-3, atol=1e-7)


def test_what_lies_behind_the_aligned_block_does_not_matter():
    teacher, student = pair()
    before = objective(student, teacher, **VALUES)(batch()).item()
    with torch.no_grad():
        for part in (teacher.vit.layers[3], teacher.vit.layernorm, teacher.decoder):
            for parameter in part.parameters():
                parameter.fill_(torch.nan)
    assert objective(student, teacher, **VALUES)(batch()).item() == before


@pytest.mark.parametrize(("visible", "blocks", "last"), [(4, [2], 2), (1, [0, 1], 1)])
def test_the_teacher_stops_at_its_last_aligned_block_and_sees_visible_patches_only(visible, blocks, last):
    teacher, student = pair(visible)
    calls: list[tuple[int, int]] = []
    for number, layer in enumerate(teacher.vit.layers):
        layer.register_forward_hook(lambda _m, _a, out, number=number: calls.append((number, out.shape[1])))
    teacher.decoder.register_forward_hook(lambda *_: calls.append((99, 0)))
    objective(student, teacher, teacher_blocks=blocks, student_blocks=[0, 1][: len(blocks)])(batch())
    assert calls == [(number, visible + 1) for number in range(last + 1)]


def test_several_pairs_are_added():
    teacher, student = pair()
    both = objective(student, teacher, teacher_blocks=[1, 3], student_blocks=[0, 1])
    assert both.name == "Reconstruction + align_1_0 + align_3_1"
    reconstruction = student(batch()["pixel_values"], noise=batch()["noise"]).loss.item()
    parts = [term.inner(batch()).item() for term in list(both.terms)[1:]]
    assert both(batch()).item() == pytest.approx(reconstruction + sum(parts), rel=1e-5)
    heads = [part for part in both.modules() if isinstance(part, nn.Linear) and part.out_features == 64]
    assert len(heads) == 2 and heads[0] is not heads[1]


def test_blocks_that_are_not_there():
    teacher, student = pair()
    with pytest.raises(
        ConfigError, match=r"teacher has blocks 0 to 3; about three quarters of the depth is usual \(2\)"
    ):
        objective(student, teacher, teacher_blocks=[17], student_blocks=[1])
    with pytest.raises(ConfigError, match="student has blocks 0 to 1"):
        objective(student, teacher, teacher_blocks=[2], student_blocks=[2])
    with pytest.raises(ConfigError, match="must pair up"):
        objective(student, teacher, teacher_blocks=[2, 3], student_blocks=[1])


def test_the_paper_s_blocks_are_at_three_quarters_of_the_depth():
    system = DMAE(teacher="vit-mae-large", data="images")
    assert system.teacher_blocks == [24 * 3 // 4 - 1] and system.student_blocks == [12 * 3 // 4 - 1]
    assert system.mask_ratio == 0.75 and system.align_weight == 1.0 and system.projector == "linear"


# -- models -----------------------------------------------------------------------------------------------------------


def test_a_specification_of_the_student():
    assert (SMALL.hidden_size, SMALL.num_hidden_layers, SMALL.num_attention_heads) == (16, 2, 2)
    assert SMALL.intermediate_size == 64 and SMALL.decoder_hidden_size == BIG.decoder_hidden_size
    wrong = (("hiden_size=16", "hidden_size"), ("layers=0", "layers=0"), ("hidden_size=18,heads=4", "multiple"))
    for spec, what in wrong:
        with pytest.raises(ModelError, match=what):
            masked.masked_autoencoder_from_spec(spec, BIG)


def test_a_new_model_knows_where_patches_are():
    """The tables that transformers' own function gives, in the order of MAE's released weights (columns first)."""
    from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding as theirs

    table = theirs(height=4, width=4, embed_dim=16)
    expected = torch.cat([table[:, 8:], table[:, :8]], 1)
    assert torch.equal(masked.sine_cosine(4, 16), expected)
    _, student = pair()
    assert torch.equal(student.vit.embeddings.position_embeddings[0, 1:], expected)
    assert not student.vit.embeddings.position_embeddings[0, 0].any()
    assert torch.equal(student.decoder.decoder_pos_embed[0, 1:], masked.sine_cosine(4, 32))


def test_the_classifier_begins_with_the_encoder():
    _, student = pair()
    classifier = masked.classifier_of(student, ("a", "b"), seed=0)
    masked.set_visible(student, 16)
    with torch.no_grad():
        ours = classifier.vit(batch()["pixel_values"]).last_hidden_state
        theirs = student.vit(batch()["pixel_values"], noise=torch.arange(16.0).expand(3, -1)).last_hidden_state
    torch.testing.assert_close(ours, theirs)
    assert classifier.config.num_labels == 2


# -- the whole --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    values: dict[str, Any] = {"teacher_steps": 2, "steps": 4, "finetune_steps": 2, "mask_ratio": 0.94, "trackers": []}
    values |= {"mixup": 0.8, "cutmix": 1.0, "erasing": 0.25, "crop": True, "flip": True, "probe_labels": 60}
    return run_system("dmae", values, output=tmp_path_factory.mktemp("dmae") / "run", quiet=True)


def test_a_run_leaves_what_transformers_loads(done):
    assert list(done.artifacts) == ["teacher", "student", "finetuned", "evaluation"]
    student = ViTMAEForPreTraining.from_pretrained(done.artifacts["student"].path)
    assert student.config.mask_ratio == 0.94 and student.config.hidden_size == 16
    classifier = ViTForImageClassification.from_pretrained(done.artifacts["finetuned"].path)
    assert classifier.config.num_labels == 10
    logits = classifier(torch.rand(2, 1, 8, 8)).logits
    assert logits.shape == (2, 10) and torch.isfinite(logits).all()


def test_the_table(done):
    table = done.artifacts["evaluation"].table()
    assert [row["name"] for row in table.rows] == ["teacher", "student"]
    assert 0 < table.row("student")["probe"] < 1 and 0 <= table.row("student")["finetuned"] < 1
    assert table.row("student")["parameters"] < table.row("teacher")["parameters"]
