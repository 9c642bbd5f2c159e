"""Graph networks: GCN, GAT and GIN on graphs with discrete labels, with pooling over marked nodes.

Messages flow along directed edges and every layer adds the node itself, so on a computation tree (edges from child to
parent) the root gets the embedding it has in the whole graph. There is no batch normalisation: inner nodes of a tree
have no meaningful statistics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Architecture = Literal["gcn", "gat", "gin"]


class GCNLayer(nn.Module):
    """Symmetric normalisation (Kipf and Welling, 2017, arXiv 1609.02907): sum over u of W h_u / sqrt(d_u d_v).

    Degrees count the self-loop and are those of the original graph, also where a tree holds only part of it.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width, bias=False)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, nodes: Tensor, edges: Tensor, messages: Tensor, degrees: Tensor) -> Tensor:
        scale = (degrees + 1).to(nodes.dtype).rsqrt()[:, None]
        sent = self.linear(nodes[edges[0]] + messages) * scale[edges[0]]
        own = self.linear(nodes) * scale
        return own.index_add(0, edges[1], sent) * scale + self.bias


class GATLayer(nn.Module):
    """Attention over the neighbours and the node itself (Velickovic et al., 2018, arXiv 1710.10903)."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.linear = nn.Linear(width, width, bias=False)
        self.source = nn.Parameter(torch.randn(heads, width // heads) * (heads / width) ** 0.5)
        self.target = nn.Parameter(torch.randn(heads, width // heads) * (heads / width) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, nodes: Tensor, edges: Tensor, messages: Tensor, degrees: Tensor) -> Tensor:
        count = len(nodes)
        loops = torch.arange(count, device=nodes.device)
        targets = torch.cat([edges[1], loops])
        sent = self.linear(torch.cat([nodes[edges[0]] + messages, nodes])).view(len(targets), self.heads, -1)
        received = self.linear(nodes).view(count, self.heads, -1)
        score = F.leaky_relu((sent * self.source).sum(-1) + (received * self.target).sum(-1)[targets], 0.2)
        top = score.new_full((count, self.heads), -torch.inf).scatter_reduce(
            0, targets[:, None].expand_as(score), score.detach(), "amax"
        )
        weight = (score - top[targets]).exp()
        whole = weight.new_zeros(count, self.heads).index_add(0, targets, weight)
        share = (weight / whole[targets])[..., None]
        return torch.zeros_like(received).index_add(0, targets, share * sent).flatten(1) + self.bias


class GINLayer(nn.Module):
    """A perceptron of (1 + eps) h_v + sum of h_u (Xu et al., 2019, arXiv 1810.00826)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.eps = nn.Parameter(torch.zeros(()))
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, nodes: Tensor, edges: Tensor, messages: Tensor, degrees: Tensor) -> Tensor:
        return self.mlp(((1 + self.eps) * nodes).index_add(0, edges[1], nodes[edges[0]] + messages))


LAYERS: dict[str, Callable[[int], nn.Module]] = {"gcn": GCNLayer, "gat": GATLayer, "gin": GINLayer}


class GNN(nn.Module):
    """Embed labels, pass messages, pool the roots, classify.

    Args:
        architecture: ``gcn``, ``gat`` or ``gin``.
        node_labels, edge_labels, classes: how many there are.
        width: of the embeddings; a multiple of four for ``gat``.
        pooling: ``mean`` or ``sum`` over a graph's roots.
    """

    def __init__(
        self,
        architecture: Architecture,
        *,
        node_labels: int,
        edge_labels: int,
        classes: int,
        layers: int = 3,
        width: int = 128,
        dropout: float = 0.6,
        pooling: Literal["mean", "sum"] = "mean",
    ) -> None:
        super().__init__()
        self.pooling = pooling
        self.embed = nn.Embedding(node_labels, width)
        self.embed_edge = nn.Embedding(edge_labels, width) if edge_labels > 1 else None
        self.layers = nn.ModuleList(LAYERS[architecture](width) for _ in range(layers))
        self.dropout = nn.Dropout(dropout)
        self.classify = nn.Linear(width, classes)

    def embeddings(self, nodes: Tensor, edges: Tensor, edge_labels: Tensor, degrees: Tensor) -> Tensor:
        """Every node's embedding (N, width) after the last layer."""
        hidden = self.embed(nodes)
        messages = hidden.new_zeros(()) if self.embed_edge is None else self.embed_edge(edge_labels)
        for position, layer in enumerate(self.layers):
            hidden = layer(hidden, edges, messages, degrees)
            if position < len(self.layers) - 1:
                hidden = self.dropout(hidden.relu())
        return hidden

    def forward(
        self, nodes: Tensor, edges: Tensor, edge_labels: Tensor, degrees: Tensor, roots: Tensor, graph: Tensor
    ) -> Tensor:
        """Logits (B, classes) of a batch of `collate_graphs`."""
        hidden = self.embeddings(nodes, edges, edge_labels, degrees)[roots]
        owner = graph[roots]
        count = int(graph[-1]) + 1
        pooled = hidden.new_zeros(count, hidden.shape[1]).index_add(0, owner, hidden)
        if self.pooling == "mean":
            pooled = pooled / torch.bincount(owner, minlength=count)[:, None]
        return self.classify(self.dropout(pooled.relu()))
