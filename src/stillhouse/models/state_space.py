"""A state-space mixer that can stand where an attention module stood: discrete Mamba-2 in plain torch.

Shapes: B sequences, T tokens, D width of the model, H heads, P width of a head's values, N size of a head's state.
A mixer is y = M x, head by head, with the matrix

    M_ij = C_i^T B_j alpha_i alpha_{i-1} ... alpha_{j+1}  for j <= i, plus D on the diagonal, 0 above it,

which is 1-semiseparable times a low-rank matrix (Dao and Gu, 2024, arXiv 2405.21060). Three ways to apply it agree:
the matrix itself (quadratic in T), the recurrence h_t = alpha_t h_{t-1} + B_t x_t^T, y_t = C_t^T h_t + D x_t (linear,
token by token), and a scan in chunks (linear, the matrix within a chunk and the state between chunks).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stillhouse.base.errors import ModelError

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

    from stillhouse.models.state_cache import StateLayer


def log_decay(a: Tensor) -> Tensor:
    """log alpha of alpha = exp(-softplus(a)) = sigmoid(-a)."""
    return F.logsigmoid(-a)


def mixing_matrix(C_BTHN: Tensor, B_BTHN: Tensor, log_alpha_BTH: Tensor, D_H: Tensor | None = None) -> Tensor:
    """The matrices M of all heads, (B, H, T, T); ``log_alpha`` may be more precise than the rest, and should be."""
    length = C_BTHN.shape[1]
    total_BHT = log_alpha_BTH.cumsum(1).transpose(1, 2)
    above_TT = torch.ones(length, length, dtype=torch.bool, device=C_BTHN.device).triu(1)
    # -inf before exp, not 0 after it: above the diagonal the exponents are positive and may overflow.
    decay_BHTT = (total_BHT[..., :, None] - total_BHT[..., None, :]).masked_fill(above_TT, -torch.inf).exp()
    M_BHTT = torch.einsum("bihn,bjhn->bhij", C_BTHN, B_BTHN) * decay_BHTT.to(C_BTHN.dtype)
    if D_H is not None:
        M_BHTT = M_BHTT + D_H[:, None, None] * torch.eye(length, dtype=M_BHTT.dtype, device=M_BHTT.device)
    return M_BHTT


def scan(
    x_BTHP: Tensor,
    B_BTHN: Tensor,
    C_BTHN: Tensor,
    log_alpha_BTH: Tensor,
    *,
    chunk: int = 64,
    state_BHNP: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """y (B, T, H, P) without the skip, and the state after the last token (B, H, N, P).

    ``chunk`` trades memory for steps: 1 is the recurrence, T or more the whole matrix.
    """
    batch, length, heads, _ = x_BTHP.shape
    state = x_BTHP.new_zeros(batch, heads, B_BTHN.shape[-1], x_BTHP.shape[-1]) if state_BHNP is None else state_BHNP
    outputs = []
    for start in range(0, length, chunk):
        part = slice(start, start + chunk)
        x, B, C, log_alpha = x_BTHP[:, part], B_BTHN[:, part], C_BTHN[:, part], log_alpha_BTH[:, part]
        y = torch.einsum("bhij,bjhp->bihp", mixing_matrix(C, B, log_alpha), x)
        since_start = log_alpha.cumsum(1)
        if start or state_BHNP is not None:
            y = y + torch.einsum("bihn,bhnp,bih->bihp", C, state, since_start.exp().to(x.dtype))
        outputs.append(y)
        to_end = (since_start[:, -1:] - since_start).exp().to(x.dtype)
        kept = since_start[:, -1].exp().to(x.dtype)[..., None, None] * state
        state = kept + torch.einsum("bjhn,bjhp,bjh->bhnp", B, x, to_end)
    return torch.cat(outputs, 1), state


class ShortConvolution(nn.Module):
    """A causal convolution along time, a channel at a time, that begins as the identity: its last tap is 1."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, width))
        self.bias = nn.Parameter(torch.zeros(channels))
        with torch.no_grad():
            self.weight[..., -1] = 1.0

    def forward(self, x_BTD: Tensor, before_BTD: Tensor | None = None) -> Tensor:
        """``before``: the inputs that stood before ``x``, one fewer than there are taps; zeros by default."""
        x_BDT = x_BTD.transpose(1, 2)
        if before_BTD is None:
            padded_BDT = F.pad(x_BDT, (self.weight.shape[-1] - 1, 0))
        else:
            padded_BDT = torch.cat([before_BTD.transpose(1, 2), x_BDT], -1)
        return F.conv1d(padded_BDT, self.weight, self.bias, groups=len(self.weight)).transpose(1, 2)


class StateSpaceMixer(nn.Module):
    """The mixer of Phi-Mamba (Bick et al., 2024, arXiv 2408.10189): multi-head, no expansion, gated, no inner norm.

    x, B and C each pass a short causal convolution without activation; alpha_t = sigmoid(-a_t), a scalar per head and
    token; out = W_o (y * silu(z + b_z)). It starts as a plain mixer: convolutions are the identity, the gate is 1.

    Args:
        width: D, of the model.
        heads, head_dim: H and P, those of the attention it replaces.
        state_size: N, per head.
        conv_width: taps of the convolutions.
        bias: biases in the projections of x, B, C and out, where the attention has them.
        chunk: tokens per chunk of `scan`.
        layer: which layer of a cache is this mixer's.

    It is called as ``transformers`` calls an attention module, with keyword arguments, and returns (out, None).
    ``attention_mask`` tells padding (2D, or the diagonal of a 4D mask); padded tokens leave no trace in the state.
    With ``past_key_values`` it goes on from the state kept there: see `stillhouse.models.state_cache`.
    """

    OPENS_GATE = 1.2784645427610738  # silu(OPENS_GATE) = 1
    IN_MATRIX = ("b_proj", "c_proj", "a_proj", "b_conv", "c_conv", "D")
    """The parts that form M."""

    def __init__(
        self,
        width: int,
        *,
        heads: int,
        head_dim: int,
        state_size: int = 64,
        conv_width: int = 4,
        bias: bool = False,
        chunk: int = 64,
        layer: int = 0,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.state_size, self.chunk = heads, head_dim, state_size, chunk
        self.layer = layer
        inner, state = heads * head_dim, heads * state_size
        self.x_proj = nn.Linear(width, inner, bias=bias)
        self.b_proj = nn.Linear(width, state, bias=bias)
        self.c_proj = nn.Linear(width, state, bias=bias)
        self.z_proj = nn.Linear(width, inner, bias=False)
        self.a_proj = nn.Linear(width, heads, bias=False)
        self.x_conv = ShortConvolution(inner, conv_width)
        self.b_conv = ShortConvolution(state, conv_width)
        self.c_conv = ShortConvolution(state, conv_width)
        self.z_bias = nn.Parameter(torch.full((inner,), self.OPENS_GATE))
        self.D = nn.Parameter(torch.ones(heads))
        self.out_proj = nn.Linear(inner, width, bias=bias)
        self._reset(width)

    @torch.no_grad()
    def _reset(self, width: int) -> None:
        """Projections of unit variance; C^T B too; alpha near 1/2; z = 0, so that the gate is exactly 1."""
        for linear in (self.x_proj, self.b_proj, self.c_proj, self.a_proj, self.out_proj):
            linear.weight.normal_(std=linear.in_features**-0.5)
            if linear.bias is not None:
                linear.bias.zero_()
        for linear in (self.b_proj, self.c_proj):
            linear.weight.mul_(self.state_size**-0.25)
        self.z_proj.weight.zero_()

    def _parts(
        self, u_BTD: Tensor, mask_BT: Tensor | None, kept: StateLayer | None = None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, T, H, P), B and C (B, T, H, N), log alpha (B, T, H)."""
        keep = 1.0 if mask_BT is None else mask_BT[..., None].to(u_BTD.dtype)

        def convolved(name: str, projection: nn.Linear, convolution: ShortConvolution) -> Tensor:
            inputs_BTD = projection(u_BTD) * keep
            count = convolution.weight.shape[-1] - 1
            return convolution(inputs_BTD, None if kept is None else kept.before(name, inputs_BTD, count))

        x = convolved("x", self.x_proj, self.x_conv) * keep
        B = convolved("B", self.b_proj, self.b_conv)
        C = convolved("C", self.c_proj, self.c_conv)
        by_head = (*u_BTD.shape[:2], self.heads, -1)
        return x.view(by_head), B.view(by_head), C.view(by_head), log_decay(self.a_proj(u_BTD).float())

    def matrix(self, u_BTD: Tensor, mask_BT: Tensor | None = None) -> Tensor:
        """The mixing matrices M for these inputs, (B, H, T, T)."""
        _, B, C, log_alpha = self._parts(u_BTD, mask_BT)
        return mixing_matrix(C, B, log_alpha, self.D)

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        kept = None if past_key_values is None else _state_in(past_key_values, self.layer)
        tokens = hidden_states.shape[1]
        x, B, C, log_alpha = self._parts(hidden_states, padding(attention_mask, tokens), kept)
        begun = None if kept is None else kept.state
        y, state = scan(x, B, C, log_alpha, chunk=self.chunk, state_BHNP=begun)
        if kept is not None:
            kept.advance(state, tokens)
        y = y + self.D[:, None] * x
        gate = F.silu(self.z_proj(hidden_states) + self.z_bias)
        return self.out_proj(y.flatten(2) * gate), None


def _state_in(cache: Cache, layer: int) -> StateLayer:
    from stillhouse.models.state_cache import state_layer  # brings transformers along

    return state_layer(cache, layer)


def padding(mask: Tensor | None, tokens: int) -> Tensor | None:
    """1 on tokens and 0 on padding, (B, T), from what ``transformers`` hands to attention modules; None: no padding.

    A mask may also speak of earlier tokens, before the last ``tokens``. A token always sees itself, whatever the window
    of its attention, so a 4D mask tells padding on its diagonal.
    """
    if mask is None or mask.ndim == 2:
        return None if mask is None else mask[:, -tokens:]
    diagonal_BT = mask[:, 0].diagonal(mask.shape[-1] - tokens, dim1=-2, dim2=-1)
    return diagonal_BT if mask.dtype == torch.bool else diagonal_BT == 0


@torch.no_grad()
def inherit_attention(
    mixer: StateSpaceMixer,
    *,
    value: nn.Linear,
    output: nn.Linear,
    query: nn.Linear | None = None,
    key: nn.Linear | None = None,
) -> None:
    """Start a mixer from an attention's projections: W_V -> x, W_O -> out and, if given, W_Q -> C, W_K -> B.

    Values and keys shared between heads are repeated. C takes the attention's 1 / sqrt(head size) as well, so that
    C^T B is the score before the softmax (without its rotary positions). The skip D is then 0: attention has none.

    Raises:
        ModelError: shapes that do not go together; Q and K need ``state_size`` equal to the attention's head size.
    """
    pairs = [(mixer.x_proj, value, mixer.head_dim, 1.0), (mixer.out_proj, output, None, 1.0)]
    if query is not None and key is not None:
        scale = (query.out_features // mixer.heads) ** -0.5
        pairs += [(mixer.c_proj, query, mixer.state_size, scale), (mixer.b_proj, key, mixer.state_size, 1.0)]
    for target, source, head, scale in pairs:
        for name in ("weight", "bias"):
            into, given = getattr(target, name), getattr(source, name)
            if into is None or given is None:
                continue
            if head is not None:
                if len(given) % head or len(into) % len(given):
                    raise ModelError(
                        f"an attention projection of {len(given)} rows does not fill {mixer.heads} heads of {head}; "
                        "choose state_size equal to the attention's head size"
                    )
                by_head = given.view(-1, head, *given.shape[1:])
                given = by_head.repeat_interleave(len(into) // len(given), 0).flatten(0, 1)
            into.copy_(given * scale)
    mixer.D.zero_()
