"""USKD (card 97): a smoothed target of its own, Zipf's law for the others, and a weak head inside."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, ResNetConfig, ViTConfig

from stillhouse import Observed
from stillhouse.base.errors import ModelError
from stillhouse.core.objective import total
from stillhouse.core.observed import Turn
from stillhouse.core.schedule import Progress
from stillhouse.losses.self_targets import nontarget_zipf, rank_scores, smoothed_target, zipf_labels
from stillhouse.losses.target_split import only_label
from stillhouse.models.image_classifier import new_image_classifier
from stillhouse.objectives.language import head_of
from stillhouse.objectives.self_targets import SelfTargets, TokenSelfTargets, image_feature, token_feature


def drawn(seed: int, *shape: int) -> Tensor:
    return 2 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# -- the labels -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scores", "expected"),
    [((9.0, 5.0, 1.0), (0.0, 0.6, 0.4)), ((5.0, 9.0, 1.0), (0.0, 0.75, 0.25)), ((1.0, 5.0, 9.0), (0.0, 1 / 3, 2 / 3))],
)
def test_the_card_s_zipf_labels(scores, expected):
    """The target takes a rank, then drops out: with y = 0, ranks (1, 2, 3) give (0.6, 0.4), (2, 1, 3) (3/4, 1/4)."""
    found = zipf_labels(torch.tensor([scores]), torch.tensor([[True, False, False]]))
    torch.testing.assert_close(found, torch.tensor([expected]))


@given(seed=st.integers(0, 200), classes=st.integers(2, 9))
@settings(max_examples=30, deadline=None)
def test_zipf_labels_against_a_loop(seed, classes):
    score = drawn(seed, 4, classes)
    y = torch.randint(classes, (4,), generator=torch.Generator().manual_seed(seed))
    found = zipf_labels(score, only_label(y, score))
    for row in range(4):
        order = sorted(range(classes), key=lambda i: -float(score[row, i]))
        shares = [0.0 if i == int(y[row]) else 1 / (order.index(i) + 1) for i in range(classes)]
        assert found[row].tolist() == pytest.approx([one / sum(shares) for one in shares])


@given(seed=st.integers(0, 200), rows=st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_the_mean_target_is_one(seed, rows):
    q_y = torch.rand(rows, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    p = smoothed_target(q_y)
    assert p.mean().item() == pytest.approx(1.0)
    assert p.min() >= 0 and not p.requires_grad
    if rows > 1:  # the more certain it is of a sample, the more it counts; differences of small ones are damped
        assert torch.equal(p.argsort(), q_y.argsort())
        torch.testing.assert_close(p[0] - p[1], (q_y[0] - q_y[1]) * (q_y[0] + q_y[1]))


def test_mixtures_and_masks_take_part_as_they_should():
    q_y = torch.tensor([0.2, 0.5, 0.9])
    p = smoothed_target(q_y, value_N=torch.tensor([0.7, 0.0, 1.0]))
    mean = (0.04 + 0.25 + 0.81) / 3
    torch.testing.assert_close(p, torch.tensor([0.04 + 0.7 - mean, 0.0, 0.81 + 1 - mean]))
    masked = smoothed_target(q_y, weight_N=torch.tensor([1, 0, 1]))
    assert masked[[0, 2]].mean().item() == pytest.approx(1.0)


def test_both_heads_are_put_on_one_scale():
    """A head that is certain of the label says little of the others; its shares among them count as much."""
    w, q = torch.tensor([[0.98, 0.015, 0.005]]), torch.tensor([[0.2, 0.2, 0.6]])
    target = torch.tensor([[True, False, False]])
    found = rank_scores(w, q, target)
    torch.testing.assert_close(found[0, 1:], torch.tensor([0.75 + 0.25, 0.25 + 0.75]), atol=1e-4, rtol=0)


def test_the_others_take_no_gradient_from_their_ranking():
    z, w = drawn(1, 3, 5).requires_grad_(), drawn(2, 3, 5).requires_grad_()
    y = torch.tensor([0, 4, 2])
    mask = only_label(y, z)
    loss = nontarget_zipf(z, w, mask)
    g_z, g_w = torch.autograd.grad(loss.sum(), (z, w), allow_unused=True)
    labels = zipf_labels(rank_scores(w.softmax(-1), z.softmax(-1), mask), mask)
    q_hat = z.detach().masked_fill(mask, -torch.inf).softmax(-1)
    torch.testing.assert_close(g_z, q_hat - labels)
    assert g_w is None and g_z[mask].abs().max() == 0
    assert not torch.equal(loss, nontarget_zipf(z, -w, mask))  # the weak head does have a say


# -- classifiers ----------------------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two layers: the first one's output is the inner feature."""

    def __init__(self, classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(3, 4), nn.Linear(4, classes)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(inputs)))


def by_hand(model: Two, weak: nn.Linear, x: Tensor, y: Tensor, a: float, b: float, mu: float) -> Tensor:
    inner = model.one(x)
    z, w = model.two(torch.tanh(inner)), weak(inner)
    mask, q = only_label(y, z), z.softmax(-1)
    q_y = q[mask]
    p = (q_y**2 + 1 - (q_y**2).mean()).detach()
    scores = w.softmax(-1) / (1 - w.softmax(-1)[mask][:, None] + 1e-6) + q / (1 - q_y[:, None] + 1e-6)
    shares = 1.0 / (scores.argsort(descending=True).argsort() + 1)
    shares[mask] = 0
    shares = (shares / shares.sum(-1, keepdim=True)).detach()
    others = -(shares * z.masked_fill(mask, -torch.inf).log_softmax(-1).masked_fill(mask, 0)).sum(-1).mean()
    smooth = 0.9 * F.one_hot(y, z.shape[-1]) + 0.1 / z.shape[-1]
    return a * -(p * q_y.log()).mean() + b * others + mu * -(smooth * w.log_softmax(-1)).sum(-1).mean()


def test_the_whole_loss_and_its_gradients():
    model = Two(6)
    observed = Observed(model)
    term = SelfTargets(observed.output(), observed.tap("one"), classes=6, a=0.7, b=0.3, mu=0.2)
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(1))
    y = torch.randint(6, (8,), generator=torch.Generator().manual_seed(2))
    batch = {"inputs": x, "labels": y}
    term(batch)  # the head gets its width
    parameters = [*model.parameters(), *term.weak.parameters()]
    found = torch.autograd.grad(term(batch), parameters)
    expected = by_hand(model, term.weak, x, y, 0.7, 0.3, 0.2)
    torch.testing.assert_close(term(batch), expected)
    torch.testing.assert_close(found, torch.autograd.grad(expected, parameters))
    # The same with the labels as distributions: a second target of share 0 is none.
    soft = SelfTargets(observed.output(), observed.tap("one"), classes=6, a=0.7, b=0.3, mu=0.2, target="soft")
    soft.weak = term.weak
    torch.testing.assert_close(soft({"inputs": x, "soft": F.one_hot(y, 6).float()}), expected)


def test_a_mixture_has_two_targets():
    model = Two(4)
    observed = Observed(model)
    term = SelfTargets(observed.output(), observed.tap("one"), classes=4, a=1.0, b=1.0, mu=0.0, target="soft")
    x, soft = torch.randn(2, 3), torch.tensor([[0.6, 0.4, 0.0, 0.0], [0.0, 0.0, 0.3, 0.7]])
    turn, batch = Turn(term.signals()), {"inputs": x, "soft": soft}
    target, others, _ = term.evaluate(turn, batch, Progress(0, 1))
    q = model(x).softmax(-1).detach()
    first, second = torch.stack([q[0, 0], q[1, 3]]), torch.stack([q[0, 1], q[1, 2]])
    p1 = first**2 + torch.tensor([0.6, 0.7]) - (first**2).mean()
    p2 = second**2 + torch.tensor([0.4, 0.3]) - (second**2).mean()
    torch.testing.assert_close(target.value.detach(), -(p1 * first.log() + p2 * second.log()).mean())
    (grad,) = torch.autograd.grad(others.value, model.two.bias)
    left = model(x).detach().masked_fill(soft > 0, -torch.inf).softmax(-1)
    assert (left[soft > 0] == 0).all() and grad.abs().sum() > 0
    assert others.value.item() >= -(2 / 3 * torch.log(left.max(-1).values)).mean().item() - 1e-6


@pytest.mark.parametrize("kind", ["resnet", "vit"])
def test_the_inner_feature_of_a_classifier(kind):
    """Of a network of stages the last but one, averaged; of a transformer the class token of the last layer but one."""
    if kind == "resnet":
        config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 6, 8], depths=[1, 1, 1], num_channels=1)
    else:
        config = ViTConfig(
            hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, image_size=8, patch_size=4,
            num_channels=1,
        )  # fmt: skip
    model = new_image_classifier(config, seed=0).eval()
    pixels = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    found = image_feature(Observed(model))({"pixel_values": pixels})
    states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    expected = states[-2].mean((2, 3)) if kind == "resnet" else states[-2][:, 0]
    assert found.shape == (2, 6 if kind == "resnet" else 8)
    torch.testing.assert_close(found, expected)


# -- language models ------------------------------------------------------------------------------------------------


def llama(layers: int = 4) -> LlamaForCausalLM:
    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": layers, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=30, num_key_value_heads=2, **sizes))
    with torch.no_grad():
        model.lm_head.weight.mul_(30)
    return model


def test_tokens_in_fused_passes_equal_the_plain_form():
    model = llama()
    observed = Observed(model)
    a, b, mu, V = 0.8, 0.4, 0.3, 30
    term = TokenSelfTargets(head_of(observed), token_feature(observed), width=8, vocab_size=V, a=a, b=b, mu=mu)
    with torch.no_grad():
        term.weak.weight.mul_(20)
    ids = torch.randint(V, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[2, 5:] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    parameters = [model.lm_head.weight, model.model.layers[0].mlp.down_proj.weight, term.weak.weight]
    values = term.evaluate(Turn(term.signals()), batch, Progress(0, 1))
    found = torch.autograd.grad(total(values), parameters)

    out = model(**batch, output_hidden_states=True)
    w = (mask[:, 1:] > 0).flatten()
    y = ids[:, 1:].flatten()[w]
    z = out.logits[:, :-1].flatten(0, 1)[w]
    inner = F.layer_norm(out.hidden_states[2][:, :-1], (8,)).flatten(0, 1)[w]
    weak = inner @ term.weak.weight.T
    target, q_y = only_label(y, z), z.softmax(-1)[only_label(y, z)]
    p = (q_y**2 + 1 - (q_y**2).mean()).detach()
    parts = {
        "USKD.others": nontarget_zipf(z, weak, target).mean(),
        "CrossEntropy": F.cross_entropy(z, y),
        "USKD.target": -(p * q_y.log()).mean(),
    }
    expected = parts["CrossEntropy"] + a * parts["USKD.target"] + b * parts["USKD.others"]
    expected = expected + mu * F.cross_entropy(weak, y, label_smoothing=0.1)
    torch.testing.assert_close(found, torch.autograd.grad(expected, parameters), rtol=1e-3, atol=1e-6)
    for value in values[:3]:
        torch.testing.assert_close(value.value, parts[value.name].detach())


def test_layers_that_are_not_there_are_refused():
    observed = Observed(llama(2))
    assert token_feature(observed).address.path == "model.layers.0"
    with pytest.raises(ModelError, match="no layer 2 below the last; give one between 1 and 1"):
        token_feature(observed, 2)
