"""The chunked output-layer losses against autograd on the naive form, and what they hold in memory.

Shapes: B batch, T positions, N = B T tokens, D student width, E teacher width, V vocabulary.
"""

from __future__ import annotations

import importlib
import itertools
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from stillhouse.losses import (
    AlphaBeta,
    ForwardKL,
    InterpolatedForwardKL,
    JensenShannon,
    ReverseKL,
    RowDivergence,
    SkewedForwardKL,
    SkewedReverseKL,
    ToDi,
    TotalVariation,
    linear_cross_entropy,
    linear_divergence,
    reduce,
)
from stillhouse.losses.linear_divergence import default_tokens

# The package exports the function under the name of its module.
MODULE = importlib.import_module("stillhouse.losses.linear_divergence")


def symmetrised_kl(student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
    """A divergence as a user would write it, without a closed form."""
    forward, reverse = ForwardKL(), ReverseKL(temperature=2.0)
    return 0.5 * (forward(student_logits_NV, teacher_logits_NV) + reverse(student_logits_NV, teacher_logits_NV))


DIVERGENCES: list[RowDivergence] = [
    ForwardKL(),
    ForwardKL(temperature=2.0),
    ReverseKL(temperature=0.7, scale_by_t2=False),
    JensenShannon(beta=0.3),
    SkewedForwardKL(),
    SkewedReverseKL(temperature=3.0),
    TotalVariation(),
    AlphaBeta(alpha=0.2, beta=0.7),
    AlphaBeta(alpha=0.5, beta=-0.5),
    ToDi(temperature=1.5),
    InterpolatedForwardKL(t=0.4),
    symmetrised_kl,
]


def name(divergence: RowDivergence) -> str:
    return getattr(divergence, "__name__", repr(divergence))


@dataclass
class Case:
    """Two output layers on random hidden states, with everything the loss can take."""

    B: int = 2
    T: int = 7
    D: int = 5
    E: int = 4
    V: int = 11
    teacher_size: int = 13
    dtype: torch.dtype = torch.float64
    softcap: float | None = None
    scale: float = 1.0
    bias: bool = False
    labelled: bool = False
    weighted: bool = False
    vocab_size: int | None = None
    divergence_weight: float = 1.0
    cross_entropy_weight: float = 0.0
    reduction: str = "mean"
    seed: int = 0
    random: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.random = torch.Generator().manual_seed(self.seed)
        self.student_hidden = self.normal(self.B, self.T, self.D).requires_grad_()
        self.student_weight = self.normal(self.V, self.D).requires_grad_()
        self.student_bias = self.normal(self.V).requires_grad_() if self.bias else None
        self.teacher_hidden = self.normal(self.B, self.T, self.E)
        self.teacher_weight = self.normal(self.teacher_size, self.E)
        self.teacher_bias = self.normal(self.teacher_size) if self.bias else None
        self.labels = self.row_weight = None
        if self.labelled:
            size = self.vocab_size or min(self.V, self.teacher_size)
            self.labels = torch.randint(0, size, (self.B, self.T), generator=self.random)
            self.labels[0, 1] = self.labels[1, 3] = -100
        if self.weighted:
            kept = torch.rand(self.B, self.T, generator=self.random) > 0.3
            self.row_weight = 2 * torch.rand(self.B, self.T, generator=self.random, dtype=torch.float64) * kept

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.random, dtype=torch.float64).to(self.dtype)

    @property
    def leaves(self) -> list[Tensor]:
        leaves = (self.student_hidden, self.student_weight, self.student_bias)
        return [leaf for leaf in leaves if leaf is not None]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.leaves, self.teacher_hidden, self.teacher_weight]

    def to(self, dtype: torch.dtype) -> Case:
        """The same numbers in another precision."""
        return Case(**{k: v for k, v in vars(self).items() if k in FIELDS} | {"dtype": dtype})

    def fused(self, divergence: RowDivergence, *, chunk_tokens: int | None = 3):
        return linear_divergence(
            self.student_hidden,
            self.student_weight,
            self.teacher_hidden,
            self.teacher_weight,
            divergence=divergence,
            student_bias_V=self.student_bias,
            teacher_bias_V=self.teacher_bias,
            student_softcap=self.softcap,
            teacher_softcap=self.softcap and 2 * self.softcap,
            student_logit_scale=self.scale,
            teacher_logit_scale=2 * self.scale,
            labels_N=self.labels,
            weight_N=self.row_weight,
            divergence_weight=self.divergence_weight,
            cross_entropy_weight=self.cross_entropy_weight,
            vocab_size=self.vocab_size,
            chunk_tokens=chunk_tokens,
            reduction=self.reduction,
        )

    def naive(self, divergence: RowDivergence) -> tuple[Tensor, Tensor, Tensor | None]:
        """The form of the docstring: full logits, reduced at the end."""

        def logits(hidden, weight, bias, scale, softcap):
            z = (hidden @ weight.T if bias is None else F.linear(hidden, weight, bias)) * scale
            z = z if softcap is None else softcap * torch.tanh(z / softcap)
            return z[..., : self.vocab_size or min(self.V, self.teacher_size)]

        z_BTV = logits(self.student_hidden, self.student_weight, self.student_bias, self.scale, self.softcap)
        teacher_z_BTV = logits(
            self.teacher_hidden,
            self.teacher_weight,
            self.teacher_bias,
            2 * self.scale,
            self.softcap and 2 * self.softcap,
        )
        divergence_value = reduce(divergence(z_BTV, teacher_z_BTV), weight=self.row_weight, reduction=self.reduction)
        loss, cross_entropy = self.divergence_weight * divergence_value, None
        if self.labels is not None:
            cross_entropy_BT = F.cross_entropy(z_BTV.mT, self.labels, reduction="none")
            weight_BT = (self.labels != -100) * (1.0 if self.row_weight is None else self.row_weight)
            cross_entropy = reduce(cross_entropy_BT, weight=weight_BT, reduction=self.reduction)
            loss = loss + self.cross_entropy_weight * cross_entropy
        return loss, divergence_value, cross_entropy


FIELDS = set(Case.__dataclass_fields__) - {"random"}


def assert_same(case: Case, divergence: RowDivergence, tolerance: float, **fused: int | None) -> None:
    result = case.fused(divergence, **fused)
    loss, divergence_value, cross_entropy = case.naive(divergence)
    upstream = 3.0
    expected = torch.autograd.grad(upstream * loss, case.leaves)
    got = torch.autograd.grad(upstream * result.loss, case.leaves)
    assert not result.divergence.requires_grad
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(result.loss, loss, **close)
    torch.testing.assert_close(result.divergence, divergence_value, **close)
    assert (result.cross_entropy is None) == (cross_entropy is None)
    if cross_entropy is not None:
        torch.testing.assert_close(result.cross_entropy, cross_entropy, **close)
    for leaf_got, leaf_expected in zip(got, expected, strict=True):
        size = leaf_expected.abs().max().clamp_min(1).item()
        torch.testing.assert_close(leaf_got, leaf_expected, rtol=tolerance, atol=tolerance * size)


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_equals_the_naive_form(divergence, dtype, tolerance):
    """Every divergence x {bias, softcap, cross-entropy, weights, cut vocabulary}."""
    for bias, softcap, labelled, weighted, vocab_size in itertools.product(
        (False, True), (None, 2.0), (False, True), (False, True), (None, 9)
    ):
        case = Case(
            dtype=dtype,
            bias=bias,
            softcap=softcap,
            labelled=labelled,
            weighted=weighted,
            vocab_size=vocab_size,
            cross_entropy_weight=0.6 if labelled else 0.0,
        )
        assert_same(case, divergence, tolerance)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(("divergence_weight", "cross_entropy_weight"), [(0.3, 0.0), (0.0, 0.7), (0.4, 0.6)])
def test_term_weights_and_reductions(reduction, divergence_weight, cross_entropy_weight):
    case = Case(
        labelled=True,
        weighted=True,
        softcap=3.0,
        scale=0.5,
        bias=True,
        divergence_weight=divergence_weight,
        cross_entropy_weight=cross_entropy_weight,
        reduction=reduction,
    )
    assert_same(case, JensenShannon(beta=0.4), 1e-10)


def test_taid_at_zero_moves_nothing():
    case = Case(dtype=torch.float32, V=40, teacher_size=40, softcap=5.0)
    loss = case.fused(InterpolatedForwardKL(t=0.0)).loss
    assert loss.item() > 0
    assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(loss, case.leaves))


def test_both_weights_zero():
    case = Case(labelled=True, divergence_weight=0.0)
    result = case.fused(ForwardKL())
    assert result.loss.item() == 0
    assert result.divergence.item() > 0
    assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(result.loss, case.leaves))


@pytest.mark.parametrize("divergence", DIVERGENCES, ids=name)
def test_gradcheck(divergence):
    case = Case(B=1, T=4, D=3, V=5, teacher_size=5, bias=True, softcap=2.0, cross_entropy_weight=0.0)
    labels_BT = torch.tensor([[1, -100, 0, 4]])

    def loss(hidden, weight, bias):
        return linear_divergence(
            hidden,
            weight,
            case.teacher_hidden,
            case.teacher_weight,
            divergence=divergence,
            student_bias_V=bias,
            student_softcap=2.0,
            labels_N=labels_BT,
            cross_entropy_weight=0.5,
            chunk_tokens=3,
        ).loss

    if isinstance(divergence, InterpolatedForwardKL | ToDi):
        # Its stop-gradient is not what finite differences see.
        with pytest.raises(RuntimeError, match="Jacobian mismatch"):
            torch.autograd.gradcheck(loss, case.leaves)
    else:
        assert torch.autograd.gradcheck(loss, case.leaves)


def test_second_derivatives_are_refused():
    case = Case()
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(case.fused(ForwardKL()).loss, case.student_hidden, create_graph=True)


def test_backward_twice_over_a_retained_graph():
    case = Case()
    loss = case.fused(ForwardKL()).loss
    first = torch.autograd.grad(2.0 * loss, case.leaves, retain_graph=True)
    second = torch.autograd.grad(1.0 * loss, case.leaves)
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a, 2 * b)


@settings(deadline=None, max_examples=40)
@given(
    chunk_tokens=st.integers(1, 20),
    block_tokens=st.integers(1, 20),
    divergence=st.sampled_from(DIVERGENCES),
    labelled=st.booleans(),
    weighted=st.booleans(),
    softcap=st.sampled_from([None, 3.0]),
    seed=st.integers(0, 5),
)
def test_chunk_and_block_sizes_change_nothing(
    chunk_tokens, block_tokens, divergence, labelled, weighted, softcap, seed
):
    case = Case(
        labelled=labelled,
        weighted=weighted,
        softcap=softcap,
        cross_entropy_weight=0.5 * labelled,
        seed=seed,
    )
    results = []
    for chunk, block in ((chunk_tokens, block_tokens), (14, 14)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(MODULE, "default_tokens", lambda *_, block=block: (1, block))
            results.append(case.fused(divergence, chunk_tokens=chunk))
    grads = [torch.autograd.grad(result.loss, case.leaves) for result in results]
    for a, b in zip((*results[0][:2], *grads[0]), (*results[1][:2], *grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


# --- which gradients ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", list(itertools.product((False, True), repeat=3))[1:])
def test_only_the_gradients_that_are_needed(trained):
    case = Case(bias=True)
    expected = torch.autograd.grad(case.naive(ForwardKL())[0], case.leaves)
    for leaf, requires_grad in zip(case.leaves, trained, strict=True):
        leaf.requires_grad_(requires_grad)
    case.fused(ForwardKL()).loss.backward()
    for leaf, grad, requires_grad in zip(case.leaves, expected, trained, strict=True):
        if requires_grad:
            torch.testing.assert_close(leaf.grad, grad)
        else:
            assert leaf.grad is None


def test_the_teacher_gets_no_gradient():
    case = Case()
    for tensor in (case.teacher_hidden, case.teacher_weight):
        tensor.requires_grad_()
    case.fused(ForwardKL()).loss.backward()
    assert case.teacher_hidden.grad is None
    assert case.teacher_weight.grad is None
    for leaf in case.leaves:
        leaf.requires_grad_(False)
    assert not case.fused(ForwardKL()).loss.requires_grad


def test_transposed_and_strided_inputs():
    """A head stored as (D, V), and hidden states that are every second position."""
    case = Case(T=8)
    expected = torch.autograd.grad(case.naive(ForwardKL())[0], case.leaves)
    weight_DV = case.student_weight.detach().T.contiguous().requires_grad_()
    wide = torch.zeros(2, 16, 5, dtype=torch.float64)
    wide[:, ::2] = case.student_hidden.detach()
    wide.requires_grad_()
    linear_divergence(
        wide[:, ::2],
        weight_DV.T,
        case.teacher_hidden,
        case.teacher_weight.T.contiguous().T,
        divergence=ForwardKL(),
        teacher_logit_scale=2.0,
        chunk_tokens=3,
    ).loss.backward()
    torch.testing.assert_close(wide.grad[:, ::2], expected[0])
    torch.testing.assert_close(weight_DV.grad.T, expected[1])
    leaf_VD = weight_DV.detach().T.requires_grad_()  # a leaf of transposed layout keeps it
    hidden = case.student_hidden.detach()
    linear_divergence(
        hidden, leaf_VD, case.teacher_hidden, case.teacher_weight, divergence=ForwardKL(), teacher_logit_scale=2.0
    ).loss.backward()
    torch.testing.assert_close(leaf_VD.grad, expected[1])
    assert leaf_VD.grad.stride() == leaf_VD.stride()


def test_a_tied_embedding_gathers_both_gradients():
    case = Case()
    tokens_BT = torch.randint(0, 11, (2, 7), generator=case.random)
    table_VD = case.student_weight

    def grad(fused: bool) -> Tensor:
        case.student_hidden = F.embedding(tokens_BT, table_VD).tanh()
        loss = case.fused(ForwardKL()).loss if fused else case.naive(ForwardKL())[0]
        return torch.autograd.grad(loss, table_VD)[0]

    torch.testing.assert_close(grad(True), grad(False))


def test_evaluation_makes_no_gradients():
    case = Case(labelled=True, cross_entropy_weight=0.5)
    expected = case.fused(ForwardKL())
    with torch.no_grad(), Allocations() as seen:
        got = case.fused(ForwardKL())
    assert not got.loss.requires_grad
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.detach())
    assert len(seen.products) == 2 * 5  # each model's logits in five chunks, and no more


def test_works_under_activation_checkpointing():
    case = Case()
    expected = torch.autograd.grad(case.naive(ForwardKL())[0], case.leaves)
    for reentrant in (False, True):
        loss = torch.utils.checkpoint.checkpoint(
            lambda *_: case.fused(ForwardKL()).loss, *case.leaves, use_reentrant=reentrant
        )
        loss.backward()
        for leaf, grad in zip(case.leaves, expected, strict=True):
            torch.testing.assert_close(leaf.grad, grad)
            leaf.grad = None


# --- rows that do not count ---------------------------------------------------------------------------------


class CountRows:
    """A divergence that notes how many rows it was shown."""

    def __init__(self) -> None:
        self.rows = 0

    def __call__(self, student_logits_NV: Tensor, teacher_logits_NV: Tensor) -> Tensor:
        self.rows += len(student_logits_NV)
        return ForwardKL()(student_logits_NV, teacher_logits_NV)


def test_rows_without_weight_are_never_computed():
    case = Case()
    case.row_weight = torch.zeros(2, 7, dtype=torch.bool)
    case.row_weight[0, 4:] = case.row_weight[1, 2] = True
    with torch.no_grad():
        case.student_hidden[~case.row_weight] = torch.nan
        case.teacher_hidden[~case.row_weight] = torch.inf
    counted = CountRows()
    loss = case.fused(counted).loss
    assert counted.rows == 4
    grads = torch.autograd.grad(loss, case.leaves)
    assert all(grad.isfinite().all() for grad in (loss, *grads))
    assert grads[0][~case.row_weight].count_nonzero() == 0
    assert (grads[0][case.row_weight] != 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_no_row_counts(reduction):
    case = Case(labelled=True, cross_entropy_weight=1.0, reduction=reduction)
    case.row_weight = torch.zeros(2, 7)
    result = case.fused(ForwardKL())
    assert [value.item() for value in result] == [0, 0, 0]
    assert all(grad.count_nonzero() == 0 for grad in torch.autograd.grad(result.loss, case.leaves))


def test_labels_may_have_weights_of_their_own():
    case = Case(weighted=True)
    labels_BT = torch.arange(14).view(2, 7) % 11
    label_weight_BT = torch.rand(2, 7, generator=case.random, dtype=torch.float64)
    label_weight_BT[1] = 0
    labels_BT[0, 0] = -100
    labels_BT[1, 0] = 10**6  # counts for nothing, so it may be anything
    result = linear_divergence(
        case.student_hidden,
        case.student_weight,
        case.teacher_hidden,
        case.teacher_weight,
        divergence=ReverseKL(),
        teacher_logit_scale=2.0,
        labels_N=labels_BT,
        weight_N=case.row_weight,
        label_weight_N=label_weight_BT,
        cross_entropy_weight=0.8,
        chunk_tokens=4,
    )
    z_BTV = case.student_hidden @ case.student_weight.T
    ce_T = F.cross_entropy(z_BTV[0], labels_BT[0], reduction="none")
    expected = (ce_T * label_weight_BT[0]).sum() / label_weight_BT[0, 1:].sum()
    torch.testing.assert_close(result.cross_entropy, expected.detach())
    total = case.naive(ReverseKL())[0] + 0.8 * expected
    for a, b in zip(
        torch.autograd.grad(result.loss, case.leaves), torch.autograd.grad(total, case.leaves), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_linear_cross_entropy():
    case = Case(bias=True, softcap=2.0, labelled=True, weighted=True, teacher_size=9, divergence_weight=0.0)
    case.cross_entropy_weight = 1.0
    arguments = {"bias_V": case.student_bias, "softcap": 2.0, "weight_N": case.row_weight, "vocab_size": 9}
    loss = linear_cross_entropy(case.student_hidden, case.student_weight, case.labels, chunk_tokens=3, **arguments)
    expected, _, _ = case.naive(ForwardKL())
    torch.testing.assert_close(loss, expected)
    for a, b in zip(torch.autograd.grad(loss, case.leaves), torch.autograd.grad(expected, case.leaves), strict=True):
        torch.testing.assert_close(a, b)
    plain = linear_cross_entropy(case.student_hidden, case.student_weight, case.labels)
    z_BTV = case.student_hidden @ case.student_weight.T
    torch.testing.assert_close(plain, F.cross_entropy(z_BTV.flatten(0, 1), case.labels.flatten()))


# --- half precision -----------------------------------------------------------------------------------------


def relative_error(got: Tensor, exact: Tensor) -> float:
    return ((got.double() - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("divergence", [ForwardKL(), ReverseKL(), JensenShannon(), symmetrised_kl], ids=name)
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "bf16 model"])
def test_bfloat16_is_as_accurate_as_the_naive_form(divergence, autocast):
    """In bf16 both forms round; neither is the other's oracle, the float64 answer is.

    A bf16 product is off by about 2^-9 = 0.2 % per element, and the naive form rounds its logits as ours does.
    Ours then rounds each chunk's share of the weight gradient, where the naive form rounds the whole once, and
    sums the shares in float32. So its error may be at most 1.2 times the naive one, and 1 % in all.
    """
    case = Case(
        B=4, T=32, D=64, E=48, V=301, teacher_size=301, labelled=True, cross_entropy_weight=0.5, dtype=torch.float32
    )
    with torch.no_grad():
        case.student_weight.mul_(0.1)
        case.teacher_weight.mul_(0.1)
        for tensor in case.tensors:
            tensor.copy_(tensor.bfloat16())  # the same inputs for all three
    exact, model = case.to(torch.float64), case if autocast else case.to(torch.bfloat16)
    with torch.no_grad():
        for other in (exact, model):
            for mine, theirs in zip(case.tensors, other.tensors, strict=True):
                theirs.copy_(mine)
    exact_grads = torch.autograd.grad(exact.naive(divergence)[0], exact.leaves)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        fused, naive = model.fused(divergence, chunk_tokens=40).loss, model.naive(divergence)[0]
    assert fused.dtype == torch.float32
    fused_grads, naive_grads = (torch.autograd.grad(loss, model.leaves) for loss in (fused, naive))
    for leaf, got, other, truth in zip(model.leaves, fused_grads, naive_grads, exact_grads, strict=True):
        assert got.dtype == leaf.dtype
        assert relative_error(got, truth) < min(0.01, 1.2 * relative_error(other, truth))
    assert fused.item() == pytest.approx(exact.naive(divergence)[0].item(), rel=5e-3)


def test_autocast_really_multiplies_in_bfloat16():
    case = Case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16), Allocations() as seen:
        case.fused(ForwardKL(), chunk_tokens=14).loss.backward()
    assert seen.products
    assert set(seen.products) == {torch.bfloat16}
    assert case.student_weight.grad.dtype == torch.float32


def test_float16_gradients_survive_a_long_sequence():
    """1 / N times a small hidden state is below float16's resolution; the loss scale must still reach it."""
    N, D, V = 4096, 4, 8
    random = torch.Generator().manual_seed(0)
    hidden_ND = (1e-2 * torch.randn(N, D, generator=random)).half().requires_grad_()
    weight_VD = torch.randn(V, D, generator=random).half().requires_grad_()
    teacher_ND = torch.randn(N, D, generator=random).half()
    loss = linear_divergence(hidden_ND, weight_VD, teacher_ND, weight_VD.detach(), divergence=ForwardKL()).loss
    scale = 2.0**14
    got = torch.autograd.grad(scale * loss, (hidden_ND, weight_VD))
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in (hidden_ND, weight_VD)]
    logits_NV = exact_leaves[0] @ exact_leaves[1].T
    teacher_logits_NV = teacher_ND.double() @ weight_VD.detach().double().T
    exact = torch.autograd.grad(scale * ForwardKL()(logits_NV, teacher_logits_NV).mean(), exact_leaves)
    for a, b in zip(got, exact, strict=True):
        assert relative_error(a, b) < 5e-3


# --- memory -------------------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Notes every tensor an operation returns: the size of the largest, and the dtypes of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.products: list[torch.dtype] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, Tensor):
                self.largest = max(self.largest, tensor.untyped_storage().nbytes())
                if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
                    self.products.append(tensor.dtype)
        return result


@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon(), symmetrised_kl], ids=name)
@pytest.mark.parametrize("labelled", [False, True])
def test_no_tensor_is_larger_than_a_chunk(divergence, labelled):
    case = Case(
        B=2,
        T=200,
        V=1000,
        teacher_size=1000,
        labelled=labelled,
        softcap=20.0,
        cross_entropy_weight=0.5 * labelled,
        dtype=torch.float32,
    )
    chunk_tokens = 20
    with Allocations() as seen:
        case.fused(divergence, chunk_tokens=chunk_tokens).loss.backward()
    assert seen.largest <= 4 * chunk_tokens * case.V
    with Allocations() as seen_naive:
        case.naive(divergence)[0].backward()
    assert seen_naive.largest >= 4 * 400 * case.V  # the measure sees what it should


@pytest.mark.parametrize("divergence", [ForwardKL(), JensenShannon()], ids=name)
def test_peak_memory_does_not_grow_with_the_tokens(divergence, monkeypatch):
    """Bytes live in torch's CPU allocator, from the profiler: eight times the tokens, the same peak."""
    V, D, chunk_tokens, block_tokens = 4000, 8, 64, 4
    monkeypatch.setattr(MODULE, "default_tokens", lambda *_: (1, block_tokens))
    peaks = []
    for N in (128, 1024):
        random = torch.Generator().manual_seed(0)
        hidden_ND = torch.randn(N, D, generator=random).requires_grad_()
        weight_VD = torch.randn(V, D, generator=random).requires_grad_()
        teacher_sizeD = torch.randn(V, D, generator=random)

        def step(hidden_ND=hidden_ND, weight_VD=weight_VD, teacher_sizeD=teacher_sizeD) -> None:
            linear_divergence(
                hidden_ND,
                weight_VD,
                hidden_ND,
                teacher_sizeD,
                divergence=divergence,
                chunk_tokens=chunk_tokens,
            ).loss.backward()

        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
        live = peak = 0
        for event in sorted(
            (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
            key=lambda e: e.start_ns(),
        ):
            live += event.nbytes()
            peak = max(peak, live)
        peaks.append(peak)
    chunk_bytes = 4 * chunk_tokens * V
    weight_bytes = 4 * V * D
    block_bytes = 4 * block_tokens * V
    assert peaks[1] - peaks[0] < 0.2 * chunk_bytes
    assert 2 * chunk_bytes < peaks[1] < 2 * chunk_bytes + 10 * block_bytes + 2 * weight_bytes


def test_default_chunks():
    assert default_tokens(50_000, torch.device("cpu")) == (251, 83)
    assert default_tokens(10**8, torch.device("cpu")) == (1, 1)
    assert min(default_tokens(50_000, torch.device("cuda"))) > 300


# --- errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"chunk_tokens": 0}, "chunk_tokens must be at least 1, got 0"),
        ({"reduction": "none"}, "'mean' or 'sum', got 'none'"),
        ({"cross_entropy_weight": 1.0}, "cross_entropy_weight needs labels_N"),
        ({"labels_N": torch.zeros(3, dtype=torch.long)}, r"labels_N: leading shape \(3,\), .* \(2, 7\)"),
        ({"labels_N": torch.full((2, 7), 11)}, "label 11 is outside the vocabulary of 11"),
        ({"labels_N": torch.full((2, 7), 9), "vocab_size": 9}, "label 9 is outside the vocabulary of 9"),
        ({"labels_N": torch.full((2, 7), -1)}, "label -1 is outside"),
        ({"weight_N": torch.ones(14)}, r"weight_N: leading shape \(14,\)"),
        ({"vocab_size": 12}, "between 1 and 11, got 12"),
        ({"divergence": lambda s, t: ForwardKL()(s, t).mean()}, r"one loss per row; it returned shape \(\)"),
        ({"divergence": torch.nn.Bilinear(2, 2, 1)}, "trainable parameters"),
    ],
)
def test_errors(change, message):
    case = Case()
    arguments = {"divergence": ForwardKL()} | change
    with pytest.raises(ValueError, match=message):
        linear_divergence(
            case.student_hidden, case.student_weight, case.teacher_hidden, case.teacher_weight, **arguments
        )


def test_teacher_of_another_shape():
    case = Case()
    with pytest.raises(ValueError, match="the teacher's hidden states"):
        linear_divergence(
            case.student_hidden,
            case.student_weight,
            case.teacher_hidden[:, :5],
            case.teacher_weight,
            divergence=ForwardKL(),
        )
