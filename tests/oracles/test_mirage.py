"""Mirage: computation trees, frequent sets, and that a network sees the same of a tree as of the graph."""

from __future__ import annotations

import itertools
import json
import random

import networkx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.data.condensation.itemsets import frequent_itemsets, maximal_itemsets, support_of
from stillhouse.data.condensation.trees import TreeTable, coverage
from stillhouse.data.graphs import (
    EMBEDDED_TEST,
    Graph,
    collate_graphs,
    from_parquet,
    graph_from_pairs,
    load_graphs,
    molecules,
    to_dataset,
)
from stillhouse.metrics.ranking import macro_roc_auc, roc_auc
from stillhouse.models.gnn import GNN
from stillhouse.systems.graph.mirage import Mirage
from stillhouse.tasks.graphs import EMBEDDED_VALIDATION, GraphTask
from stillhouse.workflow import run_system


def random_graph(seed: int, *, nodes: int = 9, kinds: int = 3) -> Graph:
    draw = random.Random(seed)
    pairs = [pair for pair in itertools.combinations(range(nodes), 2) if draw.random() < 0.3]
    graph = graph_from_pairs([draw.randrange(kinds) for _ in range(nodes)], pairs)
    labels = {pair: draw.randrange(2) for pair in pairs}
    kinds_of = [labels[min(a, b), max(a, b)] for a, b in graph.edges.T.tolist()]
    return Graph(graph.nodes, graph.edges, torch.tensor(kinds_of, dtype=torch.int64), 0)


def strings(graph: Graph, hops: int) -> list[str]:
    table = TreeTable(hops)
    return [table.text(tree) for tree in table.trees_of(graph)]


# -- trees ----------------------------------------------------------------------------------------------------------


def test_trees_of_a_path():
    path = graph_from_pairs([7, 7, 7], [(0, 1), (1, 2)])
    assert strings(path, 1) == ["7(0:7)", "7(0:7,0:7)", "7(0:7)"]
    assert strings(path, 2)[0] == "7(0:7(0:7,0:7))"  # the child's neighbours include the node it was reached from


def test_an_edge_label_tells_trees_apart():
    path = graph_from_pairs([7, 7, 7], [(0, 1), (1, 2)])
    marked = Graph(path.nodes, path.edges, torch.tensor([0, 0, 1, 1]), 0)
    assert strings(marked, 1) == ["7(0:7)", "7(0:7,1:7)", "7(1:7)"]


def test_regular_graphs_have_one_tree_of_known_size():
    """1 + k + ... + k^L nodes; and the first failure of colour refinement: a ring of six is two rings of three."""
    ring = [(i, (i + 1) % 6) for i in range(6)]
    triangles = [(0, 1), (1, 2), (2, 0), (3, 4), (4, 5), (5, 3)]
    table = TreeTable(3)
    one, other = (set(table.trees_of(graph_from_pairs([1] * 6, pairs))) for pairs in (ring, triangles))
    assert one == other and len(one) == 1
    assert table.size(one.pop()) == 1 + 2 + 4 + 8
    complete = graph_from_pairs([0] * 5, itertools.combinations(range(5), 2))
    (tree,) = set(table.trees_of(complete))
    assert table.size(tree) == 1 + 4 + 16 + 64 == len(table.unfold([tree], 0))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.randoms(use_true_random=False))
def test_strings_do_not_depend_on_the_order_of_nodes_and_edges(seed, draw):
    graph = random_graph(seed)
    order = list(range(len(graph)))
    draw.shuffle(order)
    place = torch.empty(len(graph), dtype=torch.int64)
    place[torch.tensor(order)] = torch.arange(len(graph))
    edges = torch.randperm(graph.edges.shape[1])
    moved = Graph(graph.nodes[order], place[graph.edges][:, edges], graph.edge_labels[edges], 0)
    assert [strings(graph, 2)[node] for node in order] == strings(moved, 2)


@pytest.mark.parametrize("hops", [1, 2, 3])
def test_numbers_agree_with_isomorphism_of_unfolded_trees(hops):
    table = TreeTable(hops)
    graph = random_graph(3, nodes=7, kinds=2)
    trees = table.trees_of(graph)
    shapes = []
    for tree in trees:
        unfolded = table.unfold([tree], 0)
        shape = networkx.DiGraph()
        shape.add_nodes_from((i, {"label": int(x)}) for i, x in enumerate(unfolded.nodes))
        kinds = unfolded.edge_labels.tolist()
        shape.add_edges_from((a, b, {"label": k}) for (a, b), k in zip(unfolded.edges.T.tolist(), kinds, strict=True))
        assert networkx.is_tree(shape) and unfolded.roots.sum() == 1
        shapes.append(shape)
    same = networkx.algorithms.isomorphism.categorical_node_match("label", None)
    alike = networkx.algorithms.isomorphism.categorical_edge_match("label", None)
    for i, j in itertools.combinations(range(len(trees)), 2):
        isomorphic = networkx.is_isomorphic(shapes[i], shapes[j], node_match=same, edge_match=alike)
        assert isomorphic == (trees[i] == trees[j])


@pytest.mark.parametrize("architecture", ["gcn", "gat", "gin"])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_root_of_a_tree_gets_the_embedding_of_its_node(architecture, seed):
    torch.manual_seed(seed)
    model = GNN(architecture, node_labels=3, edge_labels=2, classes=2, layers=3, width=8).double().eval()
    graph = random_graph(seed)
    table = TreeTable(3, leaf_degrees=architecture == "gcn")
    trees = table.trees_of(graph)
    whole = model.embeddings(graph.nodes, graph.edges, graph.edge_labels, graph.degrees)
    for node, tree in enumerate(trees):
        cut = table.unfold([tree], 0)
        embedded = model.embeddings(cut.nodes, cut.edges, cut.edge_labels, cut.degrees)
        torch.testing.assert_close(embedded[cut.roots][0], whole[node], rtol=1e-9, atol=1e-9)


def test_a_gcn_needs_the_degrees_of_the_graph():
    """With those of the tree (a leaf has one neighbour there) the root's embedding is another."""
    torch.manual_seed(0)
    model = GNN("gcn", node_labels=3, edge_labels=2, classes=2, layers=2, width=8).double().eval()
    graph = random_graph(1)
    table = TreeTable(2, leaf_degrees=True)
    tree = table.unfold([table.trees_of(graph)[0]], 0)
    whole = model.embeddings(graph.nodes, graph.edges, graph.edge_labels, graph.degrees)[0]
    without = model.embeddings(
        tree.nodes, tree.edges, tree.edge_labels, torch.bincount(tree.edges[1], minlength=len(tree))
    )
    assert (without[0] - whole).abs().max() > 1e-3


def test_only_roots_are_pooled():
    torch.manual_seed(0)
    model = GNN("gin", node_labels=4, edge_labels=1, classes=2, layers=2, width=8).double().eval()
    graph = molecules(1, seed=3)[0]
    table = TreeTable(2)
    condensed = table.unfold(table.trees_of(graph), 0)  # every node's tree: the whole graph, seen by the network
    batches = [collate_graphs([one]) for one in (graph, condensed)]
    logits = [model(**{k: v for k, v in batch.items() if k != "labels"}) for batch in batches]
    torch.testing.assert_close(*logits, rtol=1e-9, atol=1e-9)


def test_coverage():
    assert coverage([8, 1, 1], 0.8) == pytest.approx(1 / 3)
    assert coverage([1] * 10, 0.8) == pytest.approx(0.8)


# -- frequent sets --------------------------------------------------------------------------------------------------


def test_the_textbook_example():
    rows = [{"a", "b"}, {"a", "c"}, {"a", "b", "c"}]
    found = frequent_itemsets(rows, 2)
    expected = {"a": 3, "b": 2, "c": 2, "ab": 2, "ac": 2}
    assert {"".join(sorted(items)): count for items, count in found.items()} == expected
    assert {"".join(sorted(items)) for items in maximal_itemsets(rows, 2)} == {"ab", "ac"}


ROWS = st.lists(st.sets(st.integers(0, 6), max_size=6), min_size=1, max_size=14)


@settings(max_examples=80, deadline=None)
@given(ROWS, st.integers(1, 5))
def test_mining_agrees_with_counting_every_subset(rows, support):
    everything = {
        frozenset(items): support_of(items, rows)
        for size in range(1, 8)
        for items in itertools.combinations(range(7), size)
    }
    frequent = {items: count for items, count in everything.items() if count >= support}
    assert frequent_itemsets(rows, support) == frequent
    maximal = {items: n for items, n in frequent.items() if not any(items < other for other in frequent)}
    assert maximal_itemsets(rows, support) == maximal


@given(ROWS, st.sets(st.integers(0, 6)), st.integers(0, 6))
def test_support_never_grows_with_the_set(rows, items, more):
    assert support_of(items | {more}, rows) <= support_of(items, rows)


def test_too_many_sets_are_an_error_and_maximal_ones_are_few():
    rows = [range(40)] * 3
    with pytest.raises(ConfigError, match="keep maximal sets"):
        frequent_itemsets(rows, 2, most=1000)
    assert maximal_itemsets(rows, 2) == {frozenset(range(40)): 3}


# -- the system -----------------------------------------------------------------------------------------------------


def test_classes_of_the_embedded_graphs_have_the_same_atoms():
    counts = [torch.zeros(4), torch.zeros(4)]
    for graph in molecules(4000, seed=5).graphs:
        counts[graph.label] += torch.bincount(graph.nodes, minlength=4)
    torch.testing.assert_close(*[c / c.sum() for c in counts], rtol=0, atol=0.01)


def test_the_condensed_set_is_mined_from_the_data_alone(tmp_path):
    """Another network leaves it as it is, to the byte; every graph is a frequent set of its class's trees."""
    small = {"compare": ("mirage",), "steps": 1, "width": 8, "trackers": []}
    runs = [
        run_system("mirage", {**small, "architectures": (kind,)}, output=tmp_path / kind, quiet=True)
        for kind in ("gcn", "gin")
    ]
    files = [run.artifacts["condensed"].data_file().read_bytes() for run in runs]
    assert files[0] == files[1]

    data = molecules(400, seed=1)
    condensed = from_parquet(runs[0].artifacts["condensed"].data_file(), data)
    table = TreeTable(2)
    rows = [{table.text(tree) for tree in table.trees_of(graph)} for graph in data.graphs]
    assert {graph.label for graph in condensed.graphs} == {0, 1}
    for graph in condensed.graphs:
        roots = _roots_as_strings(graph)
        own = [row for row, original in zip(rows, data.graphs, strict=True) if original.label == graph.label]
        assert support_of(roots, own) == graph.frequency >= 50  # a quarter of the class's 200
    assert condensed.bytes() < data.bytes() / 10
    assert runs[0].artifacts["condensed"].metrics["trees_for_80_percent"] < 0.3


def _roots_as_strings(graph: Graph) -> list[str]:
    below: dict[int, list[int]] = {}
    for child, parent in graph.edges.T.tolist():
        below.setdefault(parent, []).append(child)

    def text(node: int) -> str:
        inner = ",".join(sorted("0:" + text(child) for child in below.get(node, [])))
        return f"{int(graph.nodes[node])}" + (f"({inner})" if inner else "")

    return [text(int(node)) for node in graph.roots.nonzero().flatten()]


def test_supports_are_shares_or_counts():
    data = molecules(40, seed=0)
    assert Mirage(support=(0.25,))._supports(data) == [5, 5]
    assert Mirage(support=(7, 0.5))._supports(data) == [7, 10]
    with pytest.raises(ConfigError, match="3 values for 2 classes"):
        Mirage(support=(1, 2, 3))._supports(data)


def test_a_support_that_nothing_reaches_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="lower support"):
        run_system("mirage", {"support": (1000.0,), "trackers": []}, output=tmp_path, quiet=True)


def test_roc_auc_counts_pairs():
    scores, positive = torch.tensor([0.1, 0.4, 0.4, 0.8]), torch.tensor([0, 0, 1, 1])
    assert roc_auc(scores, positive) == pytest.approx((1 + 0.5 + 2) / 4)
    assert roc_auc(scores, torch.ones(4)) != roc_auc(scores, torch.ones(4))  # nan: there is no negative
    three = torch.eye(3)[[0, 1, 2, 2]]
    assert macro_roc_auc(three, torch.tensor([0, 1, 2, 2])) == 1.0


# -- the user's graphs ----------------------------------------------------------------------------------------------


def record(**changes: object) -> dict[str, object]:
    plain = {"edge_index": [[0, 1, 1, 2], [1, 0, 2, 1]], "node_feat": [[6, 0], [7, 0], [6, 0]], "y": [1]}
    return {**plain, "edge_attr": [[1], [1], [2], [2]], **changes}


def written(path, records) -> str:
    path.write_text("\n".join(json.dumps(one) for one in records))
    return str(path)


def test_records_become_graphs_and_come_back(tmp_path):
    source = written(tmp_path / "graphs.jsonl", [record(), record(y=[0], node_feat=[[6, 0]] * 3)])
    (data,) = load_graphs(source)
    assert (data.node_labels, data.edge_labels, data.classes) == (2, 2, 2)
    assert [graph.label for graph in data.graphs] == [1, 0]
    assert data[0].nodes.tolist() == [0, 1, 0] and data[0].degrees.tolist() == [1, 2, 1]
    to_dataset(data).to_parquet(tmp_path / "back.parquet")
    for again in (from_parquet(tmp_path / "back.parquet", data), load_graphs(str(tmp_path / "back.parquet"))[0]):
        for one, other in zip(data.graphs, again.graphs, strict=True):
            assert torch.equal(one.nodes, other.nodes) and torch.equal(one.edges, other.edges)
            assert torch.equal(one.roots, other.roots) and one.label == other.label


def test_real_features_are_binned_when_asked(tmp_path):
    values = [[0.1], [0.2], [0.9]]
    source = written(tmp_path / "graphs.jsonl", [record(node_feat=values)])
    with pytest.raises(DataError, match=r"train 0: node_feat holds 0\.1.*bins="):
        load_graphs(source)
    (data,) = load_graphs(source, bins=2)
    assert data[0].nodes.tolist() == [0, 1, 1] and data.node_labels == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"y": None}, "no 'y'"),
        ({"edge_index": None}, "no 'edge_index'"),
        ({"edge_index": [[0], [9]]}, "an edge to node 9, but there are 3 nodes"),
        ({"edge_attr": [[1]]}, "1 edge labels for 4 edges"),
        ({"node_feat": []}, "a graph without nodes"),
        ({"y": [0, 1]}, "one class a graph"),
    ],
)
def test_bad_records_are_named(tmp_path, changes, message):
    source = written(tmp_path / "graphs.jsonl", [record(), record(**changes)])
    with pytest.raises(DataError, match=f"train 1: .*{message}"):
        load_graphs(source)


def test_a_file_that_is_not_there(tmp_path):
    written(tmp_path / "graphs.jsonl", [record()])
    with pytest.raises(DataError, match=r"no such file.*graphs\.jsonl"):
        load_graphs(str(tmp_path / "graph.jsonl"))


@pytest.fixture(scope="module")
def of_several(tmp_path_factory):
    """Four networks of a kind, of which the best two by validation count; and each of the four by itself."""
    folder = tmp_path_factory.mktemp("several")
    fields = {"noise": 0.12, "support": (0.12,), "compare": ("mirage",), "architectures": ("gin",), "trackers": []}
    fields |= {"steps": 12, "width": 8}
    chosen = run_system("mirage", {**fields, "repeats": 4, "top": 2}, output=folder / "chosen", quiet=True)
    every = run_system("mirage", {**fields, "repeats": 4, "top": 4}, output=folder / "every", quiet=True)
    single = run_system("mirage", fields, output=folder / "single", quiet=True)
    return chosen, every, single


def test_the_best_of_several_networks_by_validation(of_several):
    """Chosen by validation graphs, measured on test graphs: what an own loop over the saved networks gives."""
    chosen, every, single = of_several
    stages = ["gin-mirage", "gin-mirage-2", "gin-mirage-3", "gin-mirage-4"]
    assert [name for name in chosen.artifacts if name.startswith("gin")] == stages
    test, validation = molecules(EMBEDDED_TEST, noise=0.12), molecules(EMBEDDED_VALIDATION, noise=0.12, seed=10**6)

    def auc(artifact, data):
        shape = {"node_labels": data.node_labels, "edge_labels": data.edge_labels, "classes": data.classes}
        net = artifact.load_into(GNN("gin", **shape, layers=2, width=8, dropout=0.0)).eval()
        batch = collate_graphs(data.graphs)
        labels = batch.pop("labels")
        with torch.no_grad():
            return macro_roc_auc(net(**batch).softmax(-1), labels)

    worth = {name: auc(chosen.artifacts[name], validation) for name in stages}
    found = {name: auc(chosen.artifacts[name], test) for name in stages}
    best = sorted(stages, key=lambda name: -worth[name])[:2]
    assert len(set(found.values())) > 2  # networks differ
    figures = chosen.artifacts["evaluation"].metrics
    own = torch.tensor([found[name] for name in best], dtype=torch.float64)
    assert figures["mirage/gin/auc"] == pytest.approx(own.mean().item(), abs=1e-6)
    assert figures["mirage/gin/auc_std"] == pytest.approx(own.std().item(), abs=1e-6)
    everything = every.artifacts["evaluation"].metrics
    assert everything["mirage/gin/auc"] == pytest.approx(sum(found.values()) / 4, abs=1e-6)
    assert single.artifacts["evaluation"].metrics["mirage/gin/auc"] == pytest.approx(found["gin-mirage"], abs=1e-6)
    assert "mirage/gin/auc_std" not in single.artifacts["evaluation"].metrics


def test_validation_graphs_are_neither_trained_nor_tested_on(tmp_path):
    rows = [
        {"edge_index": graph.edges.tolist(), "node_feat": [[int(label)] for label in graph.nodes], "y": graph.label}
        for graph in molecules(60, seed=2).graphs
    ]
    source = written(tmp_path / "mine.jsonl", rows)

    def parts(**more):
        task = GraphTask.prepare(Mirage.make(data=source, **more), None)
        return task.train_data, task.validation_data, task.test_data

    train, validation, test = parts(repeats=10, top=5)
    assert (len(train), len(validation), len(test)) == (43, 5, 12)
    kept = [{id(graph.nodes) for graph in data.graphs} for data in (train, validation, test)]
    assert not (kept[0] & kept[1] or kept[0] & kept[2] or kept[1] & kept[2])
    whole, none, same = parts(repeats=1, top=1)
    assert (len(whole), none) == (48, None)
    assert [graph.edges.tolist() for graph in same.graphs] == [graph.edges.tolist() for graph in test.graphs]
    with pytest.raises(ConfigError, match="lower top"):
        parts(repeats=2, top=5)


def test_the_users_own_graphs_run_to_the_end(tmp_path):
    """Written as a user would, with named classes and two supports; the numbers of labels come from the file."""
    source = tmp_path / "mine.jsonl"
    rows = [
        {
            "edge_index": graph.edges.tolist(),
            "node_feat": [[6 + int(label), 1] for label in graph.nodes],
            "y": ["left", "right"][graph.label],
        }
        for graph in molecules(60, seed=2).graphs
    ]
    source.write_text("\n".join(json.dumps(row) for row in rows))
    fields = {"data": str(source), "support": "6,0.2", "layers": 2, "sets": "maximal", "architectures": "gin"}
    fields |= {"compare": "mirage,full", "steps": 60, "width": 16, "dropout": 0.0, "trackers": []}
    fields |= {"repeats": 1, "top": 1}
    done = run_system("mirage", fields, output=tmp_path / "run", quiet=True)
    figures = done.artifacts["evaluation"].metrics
    assert figures["mirage/smaller"] > 2 and figures["full/smaller"] == 1 and 0 <= figures["mirage/accuracy"] <= 1
    assert "<svg" in (done.artifacts["condensed"].path / "trees.svg").read_text()
