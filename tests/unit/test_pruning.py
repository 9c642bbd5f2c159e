"""Structured pruning: what leaves together, what a channel is worth, and that the rest works on unchanged."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import nn
from transformers import SamModel, ViTMAEConfig, ViTMAEModel

from stillhouse.base.errors import ModelError
from stillhouse.models import pruning, sam
from stillhouse.models.pruning import Group, along, consumed, produced
from stillhouse.tasks.segmentation import DemoTeacher

HEADS = 2


@pytest.fixture
def model() -> SamModel:
    recipe = DemoTeacher(
        image_size=16, hidden_size=16, layers=2, heads=HEADS, window=2, global_layers=(1,), embedding=16
    )
    made = sam.new_sam(recipe.config(), seed=0)
    with torch.no_grad():  # tables that matter
        for layer in made.vision_encoder.layers:
            layer.attn.rel_pos_h.normal_()
            layer.attn.rel_pos_w.normal_()
        made.vision_encoder.pos_embed.normal_()
    return made


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def embed(model: SamModel, images: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.vision_encoder(images).last_hidden_state


def chain(widths: list[int]) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [part for a, b in itertools.pairwise(widths) for part in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers)


def hidden(model: nn.Module, index: int) -> Group:
    first, second = f"{2 * index}", f"{2 * index + 2}"
    width = model.get_submodule(first).out_features
    return Group(f"hidden {index}", width, (*produced(model, first), *consumed(second)))


# -- cutting ----------------------------------------------------------------------------------------------------------


def test_a_pruned_chain_has_the_parameters_of_its_widths():
    model = chain([5, 12, 8, 3])
    for group, left in ((hidden(model, 0), 7), (hidden(model, 1), 2)):
        pruning.prune(model, group, torch.arange(left))
    assert sum(p.numel() for p in model.parameters()) == (5 * 7 + 7) + (7 * 2 + 2) + (2 * 3 + 3)
    assert [(model[i].in_features, model[i].out_features) for i in (0, 2, 4)] == [(5, 7), (7, 2), (2, 3)]
    assert model(torch.randn(4, 5)).shape == (4, 3)


def test_it_is_slicing():
    model = chain([5, 12, 3])
    before = copy.deepcopy(model)
    keep = torch.tensor([0, 3, 4, 11])
    pruning.prune(model, hidden(model, 0), keep)
    assert torch.equal(model[0].weight, before[0].weight[keep]) and torch.equal(model[0].bias, before[0].bias[keep])
    assert torch.equal(model[2].weight, before[2].weight[:, keep]) and torch.equal(model[2].bias, before[2].bias)


def test_mlp_channels_that_do_nothing_leave_no_trace(model, images):
    encoder = model.vision_encoder
    gone = torch.tensor([1, 5, 6, 40])
    with torch.no_grad():
        for layer in encoder.layers:
            layer.mlp.lin2.weight[:, gone] = 0
    before = embed(model, images)
    for group in sam.mlp_groups(encoder):
        keep = torch.tensor([i for i in range(group.channels) if i not in gone])
        pruning.prune(encoder, group, keep)
    assert encoder.layers[0].mlp.lin1.out_features == 60
    torch.testing.assert_close(embed(model, images), before, atol=1e-6, rtol=1e-6)


def test_head_channels_that_do_nothing_leave_no_trace_but_for_the_scale(model, images):
    """What is cut from every head is dead in query, key, value and tables; queries make up for the new scale."""
    encoder, dim = model.vision_encoder, 8
    gone, keep = torch.tensor([0, 5]), torch.tensor([1, 2, 3, 4, 6, 7])
    with torch.no_grad():
        for layer in encoder.layers:
            rows = (torch.arange(3 * HEADS)[:, None] * dim + gone).flatten()
            layer.attn.qkv.weight[rows] = 0
            layer.attn.qkv.bias[rows] = 0
    for table in (True, False):
        pruned = copy.deepcopy(model)
        if not table:
            sam.reset_positions(pruned.vision_encoder)
        before = embed(pruned, images)
        for group in sam.head_dim_groups(pruned.vision_encoder):
            pruning.prune(pruned.vision_encoder, group, keep)
        with torch.no_grad():
            for layer in pruned.vision_encoder.layers:
                assert layer.attn.scale == 6**-0.5 and layer.attn.num_attention_heads == HEADS
                third = layer.attn.qkv.out_features // 3
                assert third == 6 * HEADS and layer.attn.rel_pos_h.shape[1] == 6
                # The logits are scale * (q . k) + q . tables: larger queries need smaller tables.
                layer.attn.qkv.weight[:third] *= math.sqrt(6 / dim)
                layer.attn.qkv.bias[:third] *= math.sqrt(6 / dim)
                layer.attn.rel_pos_h /= math.sqrt(6 / dim)
                layer.attn.rel_pos_w /= math.sqrt(6 / dim)
        torch.testing.assert_close(embed(pruned, images), before, atol=1e-5, rtol=1e-5)


def test_residual_channels_leave_every_layer_that_touches_them(model, images):
    """A channel that is the same copy of another's mean: norms change, so compare with slicing by hand."""
    encoder = model.vision_encoder
    reference = copy.deepcopy(encoder)
    keep = torch.tensor([0, 2, 3, 7, 8, 11, 12, 15])
    pruning.prune(encoder, sam.embedding_group(encoder), keep)
    x = nn.functional.conv2d(
        images, reference.patch_embed.projection.weight[keep], reference.patch_embed.projection.bias[keep], stride=4
    )
    x = x.permute(0, 2, 3, 1) + reference.pos_embed[..., keep]
    for old, new in zip(reference.layers, encoder.layers, strict=True):
        assert torch.equal(new.attn.qkv.weight, old.attn.qkv.weight[:, keep])
        assert torch.equal(new.attn.proj.weight, old.attn.proj.weight[keep])
        assert torch.equal(new.layer_norm2.bias, old.layer_norm2.bias[keep])
        y = nn.functional.layer_norm(x, (8,), old.layer_norm1.weight[keep], old.layer_norm1.bias[keep], 1e-6)
        size = new.window_size
        windows, padding = (new.window_partition(y, size)) if size else (y, None)
        y = new.attn(hidden_states=windows)[0]
        x = x + (new.window_unpartition(y, size, padding, (4, 4)) if size else y)
        y = nn.functional.layer_norm(x, (8,), old.layer_norm2.weight[keep], old.layer_norm2.bias[keep], 1e-6)
        y = nn.functional.gelu(y @ old.mlp.lin1.weight[:, keep].T + old.mlp.lin1.bias)
        x = x + y @ old.mlp.lin2.weight[keep].T + old.mlp.lin2.bias[keep]
    expected = (x @ reference.neck.conv1.weight[:, keep, 0, 0].T).permute(0, 3, 1, 2)
    torch.testing.assert_close(encoder.neck.conv1(x.permute(0, 3, 1, 2)), expected, atol=1e-5, rtol=1e-5)
    found = []
    handle = encoder.neck.register_forward_pre_hook(lambda _module, args: found.append(args[0]))
    encoder(images)
    handle.remove()
    torch.testing.assert_close(found[0], x, atol=1e-5, rtol=1e-5)


def test_vit_attention_takes_a_new_head_dimension():
    config = ViTMAEConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=8, patch_size=4
    )
    model = ViTMAEModel(config).eval()
    path = "layers.0.attention"
    members = [member for name in "qkv" for member in produced(model, f"{path}.{name}_proj", repeat=2)]
    members += consumed(f"{path}.o_proj", repeat=2)
    pruning.prune(model, Group("heads", 8, tuple(members), attention=path), torch.tensor([0, 3, 6]))
    attention = model.get_submodule(path)
    assert (attention.head_dim, attention.scaling, attention.q_proj.out_features) == (3, 3**-0.5, 6)
    assert torch.isfinite(model(torch.randn(2, 3, 8, 8)).last_hidden_state).all()


def test_what_is_cut_can_be_trained(model, images):
    encoder = model.vision_encoder
    pruning.prune_groups(encoder, [sam.embedding_group(encoder)], {"embedding": torch.rand(16)}, 0.5)
    encoder(images).last_hidden_state.square().mean().backward()
    assert all(p.grad is not None for p in encoder.parameters())


def test_a_group_that_does_not_fit_is_named():
    model = chain([5, 12, 3])
    with pytest.raises(ModelError, match=r"group 'g': dimension 0 of 0.weight \(12, 5\) is not 2 x 5 channels"):
        pruning.prune(model, Group("g", 5, tuple(produced(model, "0", repeat=2))), torch.arange(2))


def test_along_takes_norms_and_bare_tables(model):
    found = along(model.vision_encoder, "layers.0.layer_norm1") + along(model.vision_encoder, "pos_embed")
    assert [(one.parameter, one.dim, one.scored) for one in found] == [
        ("layers.0.layer_norm1.weight", 0, False),
        ("layers.0.layer_norm1.bias", 0, False),
        ("pos_embed", 3, False),
    ]


# -- worth ------------------------------------------------------------------------------------------------------------


def test_scores_against_loops(model):
    encoder = model.vision_encoder
    group = sam.head_dim_groups(encoder)[1]
    generator = torch.Generator().manual_seed(0)
    gradients = {name: torch.randn(p.shape, generator=generator) for name, p in encoder.named_parameters()}
    taylor = pruning.taylor_scores(encoder, [group], gradients)[group.name]
    size = pruning.magnitude_scores(encoder, [group])[group.name]
    qkv, proj = (getattr(encoder.layers[1].attn, name).weight.detach() for name in ("qkv", "proj"))
    g_qkv, g_proj = gradients["layers.1.attn.qkv.weight"], gradients["layers.1.attn.proj.weight"]
    for c in range(8):
        rows = [(part * HEADS + head) * 8 + c for part in range(3) for head in range(HEADS)]
        columns = [head * 8 + c for head in range(HEADS)]
        out = sum(float((qkv[r] * g_qkv[r]).abs().sum()) for r in rows)
        into = sum(float((proj[:, k] * g_proj[:, k]).abs().sum()) for k in columns)
        assert taylor[c].item() == pytest.approx((out + into) / 2, rel=1e-5)
        squares = (
            sum(float(qkv[r].square().sum()) for r in rows),
            sum(float(proj[:, k].square().sum()) for k in columns),
        )
        assert size[c].item() == pytest.approx(sum(squares) / 2, rel=1e-5)


def test_summed_gradients_are_the_sum_over_batches_and_touch_nothing():
    model = chain([4, 6, 2])
    before = copy.deepcopy(model.state_dict())
    batches = [torch.randn(3, 4) for _ in range(4)]
    found = pruning.summed_gradients(model, lambda x: model(x).square().mean(), batches)
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    sum(model(x).square().mean() for x in batches).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad)


def test_normalisers():
    score = torch.tensor([1.0, 2.0, 3.0, 6.0])
    assert pruning.by_mean(score).tolist() == pytest.approx([1 / 3, 2 / 3, 1.0, 2.0])
    normal = pruning.gaussian(score)
    assert normal.mean().item() == pytest.approx(0, abs=1e-6) and normal.std().item() == pytest.approx(1)
    torch.testing.assert_close(pruning.gaussian(1000 * score + 7), normal)
    assert pruning.by_mean(torch.zeros(3)).tolist() == [0, 0, 0]


def test_random_scores_follow_the_generator():
    groups = [Group("a", 5, ()), Group("b", 3, ())]
    one, two = (pruning.random_scores(groups, generator=torch.Generator().manual_seed(4)) for _ in range(2))
    other = pruning.random_scores(groups, generator=torch.Generator().manual_seed(5))
    assert torch.equal(one["b"], two["b"]) and not torch.equal(one["b"], other["b"]) and one["a"].shape == (5,)


# -- choosing ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("channels", "ratio", "multiple", "left"),
    [  # SAM-B: the widths of the released SlimSAM-77 and SlimSAM-50
        (768, 0.77, 12, 168),
        (3072, 0.77, 12, 696),
        (64, 0.77, 1, 14),
        (768, 0.5, 12, 384),
        (10, 0.99, 4, 4),
        (100, 0.77, 1, 23),
        (16, 0.25, 1, 12),
    ],
)
def test_how_many_are_kept(channels, ratio, multiple, left):
    assert pruning.kept(channels, ratio, multiple) == left


def test_each_group_keeps_its_best():
    found = {"a": torch.tensor([5.0, 1.0, 4.0, 2.0]), "b": torch.tensor([0.1, 0.4, 0.2, 0.3])}
    keep = pruning.keep_each([Group("a", 4, ()), Group("b", 4, ())], found, 0.5)
    assert {name: index.tolist() for name, index in keep.items()} == {"a": [0, 2], "b": [1, 3]}


def test_in_one_ranking_groups_lose_different_shares():
    found = {"a": torch.tensor([5.0, 1.0, 4.0, 2.0]), "b": torch.tensor([0.1, 0.4, 0.2, 0.3])}
    keep = pruning.keep_across([Group("a", 4, ()), Group("b", 4, ())], found, 0.375)
    assert {name: index.tolist() for name, index in keep.items()} == {"a": [0, 1, 2, 3], "b": [1]}
    keep = pruning.keep_across([Group("a", 4, ()), Group("b", 4, (), multiple=2)], found, 0.375)
    assert keep["b"].tolist() == [1, 3]  # back up to a multiple
    keep = pruning.keep_across([Group("a", 4, ()), Group("b", 4, ())], found, 0.75)
    assert {name: index.tolist() for name, index in keep.items()} == {"a": [0, 2], "b": [1]}  # never nothing
    assert len(pruning.keep_across([Group("z", 8, ())], {"z": torch.zeros(8)}, 0.5)["z"]) == 4  # ties are cut too


def test_gaussian_scores_make_groups_comparable():
    model = nn.ModuleDict({"a": chain([4, 8, 2]), "b": chain([4, 8, 2])})
    groups = [Group(name, 8, (*produced(model, f"{name}.0"), *consumed(f"{name}.2"))) for name in ("a", "b")]
    score = torch.rand(8, generator=torch.Generator().manual_seed(0))
    left = pruning.prune_groups(model, groups, {"a": score, "b": 1e6 * score}, 0.5, across=True)
    assert left == {"a": 4, "b": 4}  # by their raw scores all of a would go


# -- saving -----------------------------------------------------------------------------------------------------------


def cut(model: SamModel, *, across: bool) -> None:
    encoder = model.vision_encoder
    torch.manual_seed(3)
    for groups in ([sam.embedding_group(encoder)], sam.head_dim_groups(encoder), sam.mlp_groups(encoder)):
        pruning.prune_groups(encoder, groups, pruning.random_scores(groups), 0.5, across=across and len(groups) > 1)
    sam.fit_config(model)


def test_an_evenly_cut_sam_is_a_sam_model(model, images, tmp_path):
    cut(model, across=False)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(embed(SamModel.from_pretrained(tmp_path).eval(), images), embed(model, images))
    torch.testing.assert_close(embed(sam.load_sam(str(tmp_path)), images), embed(model, images))


def test_an_unevenly_cut_sam_is_loaded_by_its_weights(model, images, tmp_path):
    cut(model, across=True)
    widths = {layer.mlp.lin1.out_features for layer in model.vision_encoder.layers}
    widths |= {-layer.attn.qkv.out_features for layer in model.vision_encoder.layers}
    assert len(widths) > 2
    model.save_pretrained(tmp_path)
    loaded = sam.load_sam(str(tmp_path))
    torch.testing.assert_close(embed(loaded, images), embed(model, images))
    points = torch.full((3, 1, 1, 2), 5.0)
    with torch.no_grad():
        ours, theirs = (m(pixel_values=images, input_points=points).pred_masks for m in (model, loaded))
    torch.testing.assert_close(ours, theirs)


def test_only_the_encoder_may_differ_from_the_config(model, tmp_path):
    pruning.set_parameter(model, "mask_decoder.iou_token.weight", torch.zeros(1, 12))
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="iou_token"):
        sam.load_sam(str(tmp_path))


def test_something_else_is_refused(tmp_path):
    ViTMAEModel(
        ViTMAEConfig(
            hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4
        )
    ).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=str(tmp_path)):
        sam.load_sam(str(tmp_path))
    with pytest.raises(ModelError, match="no such directory"):
        sam.load_sam(str(tmp_path / "nothing"))
