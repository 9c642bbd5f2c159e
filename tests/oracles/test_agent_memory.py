"""Structured agent memory: what is kept, how it is found again, and the figures that compare."""

from __future__ import annotations

import ast
import inspect
import json
import math
import statistics
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy import stats

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.data.conversations import (
    Conversation,
    Exchange,
    Query,
    embedded_recall,
    exchanges_of,
    load_recall,
    words_of,
)
from stillhouse.data.memory import (
    Memory,
    Pointer,
    Room,
    RuleDistiller,
    drill_down,
    files_touched,
    memory_prompt,
    room_index,
    snake_case,
)
from stillhouse.metrics.retrieval import (
    compare_paired,
    compression,
    consensus,
    ndcg_at,
    precision_at,
    recall_at,
    reciprocal_rank,
    vocabulary_survival,
)
from stillhouse.retrieval.dense import HNSWIndex, VectorIndex, WordVectors
from stillhouse.retrieval.fusion import cross_layer, fused, percentile_normalised, top
from stillhouse.retrieval.grading import Grade, grade_prompt, pooled
from stillhouse.retrieval.lexical import BM25
from stillhouse.systems.agents.agent_memory import AgentMemory
from stillhouse.tasks import agents
from stillhouse.tasks.agents import AgentTask
from stillhouse.workflow import run_system

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("faults", "systems")]
import helpers
from _endpoint import Endpoint, serving

# -- figures --------------------------------------------------------------------------------------------------------


def test_reciprocal_ranks():
    ranked = [[1, 0, 0], [0, 2, 1], [0, 0, 0], [0, 0, 0, 1]]
    assert statistics.mean(map(reciprocal_rank, ranked)) == 0.4375


def test_precision_recall_and_gain():
    grades = [3, 0, 1]
    assert precision_at(grades, 1) == 1 and precision_at(grades, 10) == 0.2
    assert recall_at(grades, 10, 4) == 0.5
    best = 7 / math.log2(2) + 1 / math.log2(3)
    assert ndcg_at(grades, 10, [1, 3]) == pytest.approx((7 + 1 / math.log2(4)) / best)
    assert ndcg_at([3, 1], 10, [1, 3]) == 1.0


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8))
def test_gain_is_greatest_in_the_order_of_grades(grades):
    if any(grades):
        assert ndcg_at(sorted(grades, reverse=True), 10, grades) == pytest.approx(1.0)
        assert ndcg_at(grades, 10, grades) <= 1.0 + 1e-12


def test_graders_agree_by_majority_or_median():
    assert consensus([3, 3, 3, 0, 1]) == 3
    assert consensus([0, 1, 2, 3, 3]) == 2
    assert consensus([0, 3]) == 0


def test_paired_comparison():
    rng = np.random.default_rng(0)
    baseline = rng.random(50)
    method = baseline + 0.1 + 0.2 * rng.standard_normal(50)
    found = compare_paired(method, baseline, comparisons=40)
    assert found.threshold == pytest.approx(0.00125)
    assert found.p == pytest.approx(stats.ttest_rel(method, baseline).pvalue)
    assert found.d == pytest.approx(stats.ttest_rel(method, baseline).statistic / math.sqrt(50))
    assert compare_paired(baseline, baseline).p == 1.0 and not compare_paired(baseline, baseline).significant
    between = [c for c in range(1, 200) if compare_paired(method, baseline, comparisons=c).significant]
    assert between == list(range(1, len(between) + 1)) and 0 < len(between) < 199  # more comparisons, less significant


def test_compression_has_several_readings():
    """371 / 38 is 9.8, not 11: a mean of ratios is another figure than the ratio of means."""
    assert pytest.approx(9.76, abs=0.01) == 371 / 38
    found = compression([100, 1000], [20, 50])
    assert (found.ratio_of_means, found.mean_ratio, found.median_ratio) == (pytest.approx(1100 / 70), 12.5, 12.5)


def test_vocabulary_survival_looks_at_rare_words():
    idf = {"common": 0.1, "rare": 3.0, "rarer": 4.0}
    assert vocabulary_survival(["common", "rare", "rarer"], ["rarer", "common"], idf, count=2) == 0.5


# -- search ---------------------------------------------------------------------------------------------------------


def test_bm25_by_hand():
    """One term, length average: the factor f (k1 + 1) / (f + k1) is 1 at f = 1 and 5 / 3.5 at f = 2."""
    index = BM25([["x", "a"], ["x", "x"], ["b", "c"]])
    once, twice, none = index.scores(["x"])
    idf = math.log(1 + (3 - 2 + 0.5) / (2 + 0.5))
    assert once * (1.5 + 1) / idf == pytest.approx(1.0)
    assert twice / once == pytest.approx(5 / 3.5)
    assert none == 0 and not index.scores(["unheard"]).any()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcde"), min_size=1, max_size=8), min_size=2, max_size=6))
def test_bm25_is_the_formula(documents):
    query, k1, b = ["a", "c", "c"], 1.5, 0.75
    mean = statistics.mean(map(len, documents))
    expected = []
    for words in documents:
        score = 0.0
        for word in query:
            held, f = sum(word in other for other in documents), words.count(word)
            idf = math.log(1 + (len(documents) - held + 0.5) / (held + 0.5))
            score += idf * f / (f + k1 * (1 - b + b * len(words) / mean)) if held else 0.0
        expected.append(score)
    np.testing.assert_allclose(BM25(documents).scores(query), expected, rtol=1e-6, atol=1e-9)


def test_vector_scores_are_of_distances():
    vectors = np.eye(3, dtype=np.float32)
    scores = VectorIndex(vectors).scores(vectors[0])
    np.testing.assert_allclose(scores, [1, 1 / (1 + math.sqrt(2)), 1 / (1 + math.sqrt(2))])


def test_word_vectors_do_not_depend_on_what_was_asked_before():
    one, other = WordVectors(words_of), WordVectors(words_of)
    other(["something else"])
    np.testing.assert_array_equal(one(["The cat, the dog."]), other(["dog the THE cat"]))
    assert np.linalg.norm(one(["cat"])) == pytest.approx(1) and not one([""]).any()


def test_the_best_score_of_two_layers_is_one():
    """(0.5 w + 0.5 w) 1.2 = 1: w = 0.8333."""
    both = cross_layer({"a": 2.0, "b": 1.0}, {"a": 9.0, "c": 9.0})
    assert both["a"] == pytest.approx(1.0)
    assert both["c"] == pytest.approx(0.5 / 1.2) and both["b"] == pytest.approx(0.25 / 1.2)
    assert list(both) == ["a", "c", "b"]


def test_being_in_both_lists_is_worth_a_fifth():
    assert fused({"a": 1.0}, {"a": 1.0})["a"] == pytest.approx(1.2)
    assert fused({"a": 1.0}, {"b": 1.0}) == {"a": 0.5, "b": 0.5}


def test_a_percentile_makes_the_best_results_equal():
    scores = {str(n): float(n) for n in range(1, 101)}
    clipped = percentile_normalised(scores, percentile=95)
    assert [key for key, value in clipped.items() if value == 1.0] == ["96", "97", "98", "99", "100"]
    whole = percentile_normalised(scores, percentile=100)
    assert [key for key, value in whole.items() if value == 1.0] == ["100"]
    few = percentile_normalised({"a": 4.0, "b": 2.0}, percentile=50)
    assert few == {"a": 1.0, "b": 0.5}  # of a short list the largest


def test_top_leaves_out_what_does_not_match():
    assert top(np.array([0.0, 2.0, 1.0, 2.0]), ["a", "b", "c", "d"], 3) == {"b": 2.0, "d": 2.0, "c": 1.0}


# -- memories -------------------------------------------------------------------------------------------------------


def talk(*roles: str) -> Conversation:
    return Conversation("c", tuple((role, f"{role} says {number} " + "x" * 100) for number, role in enumerate(roles)))


def spans(conversation: Conversation, **options: int) -> list[tuple[int, int]]:
    return [(exchange.start, exchange.end) for exchange in exchanges_of(conversation, **options)]


def test_exchanges_begin_where_the_user_speaks_again():
    assert spans(talk("user", "assistant", "tool", "assistant", "user", "assistant")) == [(0, 3), (4, 5)]
    assert spans(talk("user", "user", "assistant")) == [(0, 2)]
    assert spans(talk("assistant", "user", "assistant")) == [(0, 0), (1, 2)]
    assert spans(talk("user", *["assistant"] * 45)) == [(0, 19), (20, 39), (40, 45)]
    assert spans(Conversation("c", (("user", "x" * 99),))) == []


@given(st.lists(st.sampled_from(["user", "assistant", "tool"]), min_size=1, max_size=50))
def test_exchanges_cover_every_ply_once(roles):
    plies = [ply for start, end in spans(talk(*roles)) for ply in range(start, end + 1)]
    assert plies == list(range(len(roles)))


def test_drilling_down_gives_exactly_the_plies():
    conversation = talk("user", "assistant", "user", "tool", "assistant", "user")
    other = Conversation("d", conversation.messages[::-1])
    (_, second, _) = exchanges_of(conversation)
    found = drill_down(Pointer(second.conversation, second.start, second.end), [other, conversation])
    assert found == list(conversation.messages[2:5])
    assert "\n".join(text for _, text in found) == second.text
    with pytest.raises(KeyError):
        drill_down(Pointer("e", 0, 1), [conversation])


def test_a_room_is_its_type_key_and_project():
    room = Room(type="concept", key="retry_policy", label="Retries", relevance=0.4)
    renamed = room.model_copy(update={"label": "How we retry", "relevance": 0.9})
    assert room.id("p") == renamed.id("p") and len(room.id("p")) == 16 and int(room.id("p"), 16) >= 0
    others = [
        room.id("q"),
        room.model_copy(update={"type": "file"}).id("p"),
        room.model_copy(update={"key": "x"}).id("p"),
    ]
    assert len({room.id("p"), *others}) == 4


def test_rooms_are_walked_in_order_of_time():
    late, early = (
        Exchange("c", start, start + 1, (("user", "x"),), project="p", time=time)
        for start, time in ((0, 9.0), (4, 1.0))
    )
    room = Room(type="concept", key="a", label="low", relevance=0.1)
    (entry,) = room_index(
        [(late, [room]), (early, [room.model_copy(update={"label": "high", "relevance": 1.0})])]
    ).values()
    assert entry.members == (early.key, late.key) and entry.label == "high"


def test_paths_by_rule():
    text = r"see src/b.py and `./lib/a.ts`; also lib\a.ts, https://x.org/y, version 1.2 and src/b.py again (notes.md)."
    assert files_touched(text) == ["lib/a.ts", "src/b.py", "notes.md"]


@pytest.mark.parametrize(
    "changes",
    [
        {"exchange_core": ""},
        {"room_assignments": []},
        {"room_assignments": [{"type": "place", "key": "a", "label": "", "relevance": 0.5}]},
        {"room_assignments": [{"type": "file", "key": "Not Snake", "label": "", "relevance": 0.5}]},
        {"room_assignments": [{"type": "file", "key": "a", "label": "", "relevance": 1.5}]},
        {"room_assignments": [{"type": "file", "key": "a", "label": "", "relevance": 0.5}] * 4},
    ],
)
def test_the_form_is_enforced(changes):
    good = {
        "exchange_core": "did it",
        "specific_context": "7 ms",
        "room_assignments": [{"type": "file", "key": "a_b", "label": "", "relevance": 0.5}],
    }
    assert Memory.model_validate(good).text == "did it\n7 ms"
    with pytest.raises(ValidationError):
        Memory.model_validate({**good, **changes})


def test_the_prompt_cuts_each_message():
    exchange = Exchange("c", 0, 1, (("user", "a" * 9000), ("assistant", "b" * 10)))
    prompt = memory_prompt(exchange)
    assert "a" * 4000 in prompt and "a" * 4001 not in prompt and "b" * 10 in prompt


@given(st.text(max_size=60))
def test_any_name_becomes_a_key(name):
    assert Room(type="concept", key=snake_case(name), label="", relevance=0).key


def test_the_rule_keeps_what_is_particular():
    common = "We talked about the usual things here and there."
    exchanges = [
        Exchange("c", n, n, (("user", f"{common} The {word} broke in `{word}.py` today. {common} {common}"),))
        for n, word in enumerate(["parser", "cache", "router"])
    ]
    for exchange, word in zip(exchanges, ["parser", "cache", "router"], strict=True):
        memory = RuleDistiller(exchanges, sentences=1)(exchange)
        assert (
            memory.exchange_core == f"The {word} broke in `{word}.py` today."
            and memory.specific_context == f"{word}.py"
        )
        assert {room.type for room in memory.room_assignments} == {"concept", "file"}


def test_python_itself_is_found_by_the_first_sentences_of_its_documentation():
    """A text that was not made for the purpose: the distilled layer is the first sentence and one name."""
    documents, distilled, names = [], [], []
    for module in (inspect, ast, json, statistics):
        for name, value in vars(module).items():
            text = inspect.getdoc(value) if inspect.isroutine(value) else None
            if text and len(text) > 200 and getattr(value, "__module__", None) == module.__name__:
                documents.append(f"{name} {text}")
                distilled.append(f"{text.split('.')[0]} {name}")
                names.append(name)
    assert len(names) > 30
    embed = WordVectors(words_of, size=256)
    lexical = BM25([words_of(text) for text in distilled])
    dense = VectorIndex(embed(distilled))
    ranks = []
    for position, text in enumerate(documents):
        query = " ".join(words_of(text)[:12])
        merged = fused(
            top(lexical.scores(words_of(query)), names, 20),
            top(dense.scores(embed([query])[0]), names, 20),
            percentile=100,
        )
        ranks.append(reciprocal_rank([float(name == names[position]) for name in merged]))
    assert statistics.mean(ranks) > 0.9
    assert sum(map(len, distilled)) < sum(map(len, documents)) / 3


# -- the system -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return run_system(
        "agent-memory", {"exchanges": 400, "trackers": []}, output=tmp_path_factory.mktemp("memory") / "run", quiet=True
    )


def test_mechanisms_survive_compression_differently(finished):
    figures = finished.artifacts["evaluation"].metrics
    assert figures["distilled/bm25/ratio"] <= 0.85 and figures["distilled/bm25/p"] < 0.05 / 3
    assert figures["distilled/vector/ratio"] > figures["distilled/bm25/ratio"]
    assert figures["cross/vector+bm25/mrr"] > figures["distilled/bm25/mrr"] + 0.1
    assert 8 < figures["compression_of_means"] < 14


def test_the_memory_points_back_at_its_words(finished):
    recall = embedded_recall(exchanges=400)
    rows = pq.read_table(finished.artifacts["memory"].data_file()).to_pylist()
    assert [row["key"] for row in rows] == [exchange.key for exchange in recall.exchanges]
    for row, exchange in list(zip(rows, recall.exchanges, strict=True))[:20]:
        pointer = Pointer(row["conversation"], row["ply_start"], row["ply_end"])
        assert tuple(drill_down(pointer, recall.conversations)) == exchange.messages
        assert all(path in exchange.text for path in row["files"])
        assert row["context"] in exchange.text
    rooms = {room["id"]: room for room in finished.artifacts["memory"].json("rooms.json")}
    assert all(row["key"] in rooms[room]["members"] for row in rows for room in row["rooms"])


def transcripts(folder, conversations) -> str:
    path = folder / "talks.jsonl"
    path.write_text("\n".join(json.dumps(one) for one in conversations))
    return str(path)


def own_talks() -> list[dict[str, object]]:
    filler = "and so on with many more words that say nothing of use to anybody who searches later. " * 2
    return [
        {
            "id": f"t{n}",
            "project": "p",
            "messages": [
                {"role": "user", "content": f"How do we fix the {word}? {filler}"},
                {"role": "assistant", "content": f"Set {word}_limit=7 in conf/{word}.toml. {filler}"},
            ],
        }
        for n, word in enumerate(["parser", "cache", "router"])
    ]


def test_the_users_own_transcripts(tmp_path, monkeypatch):
    """A teacher that answers out of form now and then: what does not fit is dropped, the rest is found."""
    data = transcripts(tmp_path, own_talks())
    questions = tmp_path / "queries.jsonl"
    questions.write_text(json.dumps({"query": "cache limit", "relevant": [{"conversation": "t1", "ply": 1}]}))

    class Scripted:
        def __init__(self, *args, **kwargs):
            assert kwargs["schema"] is Memory and args == ("http://localhost:1/v1", "small")

        def answers(self, requests):
            for key, request in reversed(requests.items()):
                said = request.messages[-1]["content"]
                word = next(word for word in ("parser", "cache", "router") if f"the {word}?" in said)
                room = {"type": "concept", "key": word, "label": word, "relevance": 1.0}
                good = {
                    "exchange_core": f"raised the {word} limit",
                    "specific_context": "7",
                    "room_assignments": [room],
                }
                yield key, {"text": "sorry" if word == "router" else f"```json\n{json.dumps(good)}\n```"}

    monkeypatch.setattr(agents, "EndpointTeacher", Scripted)
    fields = {"data": data, "queries": str(questions), "endpoint": "http://localhost:1/v1", "teacher": "small"}
    done = run_system(
        "agent-memory", {**fields, "embedder": "words", "trackers": []}, output=tmp_path / "run", quiet=True
    )
    rows = pq.read_table(done.artifacts["memory"].data_file()).to_pylist()
    assert [(row["core"], row["files"]) for row in rows] == [
        ("raised the parser limit", ["conf/parser.toml"]),
        ("raised the cache limit", ["conf/cache.toml"]),
    ]
    assert done.artifacts["distilled"].metrics["dropped"] == 1
    assert done.artifacts["evaluation"].metrics["distilled/bm25/mrr"] == 1.0


def test_what_the_teacher_did_not_write_is_found_by_nothing(tmp_path):
    recall = load_recall(transcripts(tmp_path, own_talks()))
    asked = type(recall)(recall.conversations, recall.exchanges, (Query("router", {recall.exchanges[2].key: 3}),))
    task = AgentTask(AgentMemory(embedder="words"), None, asked)  # type: ignore[arg-type]
    texts = {"verbatim": [e.text for e in recall.exchanges], "distilled": ["parser", "cache", ""]}
    ranked = task.rank(texts, depth=10, percentile=100)
    assert recall.exchanges[2].key not in ranked["distilled/vector"][0]
    assert ranked["verbatim/bm25"][0] == [recall.exchanges[2].key]
    assert recall.exchanges[2].key in ranked["cross/vector+bm25"][0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda talk: talk.pop("messages"), "no 'messages'"),
        (lambda talk: talk.update(messages=["hello"]), "a message must be"),
        (lambda talk: talk.update(id="t0"), "a second conversation with the id 't0'"),
        (lambda talk: talk.update(time="noon"), "time is 'noon'"),
    ],
)
def test_bad_transcripts_are_named(tmp_path, change, message):
    talks = own_talks()
    change(talks[1])
    with pytest.raises(DataError, match=f"talks.jsonl, line 2: .*{message}"):
        load_recall(transcripts(tmp_path, talks))


def test_bad_questions_and_searches_are_named(tmp_path):
    data = transcripts(tmp_path, own_talks())
    questions = tmp_path / "queries.jsonl"
    questions.write_text(json.dumps({"query": "?", "relevant": [{"conversation": "t9"}]}))
    with pytest.raises(DataError, match="no exchange holds ply 0 of conversation 't9'"):
        load_recall(data, str(questions))
    fields = {"search": "distilled/vectors", "exchanges": 20, "trackers": []}
    with pytest.raises(ConfigError, match="did you mean 'distilled/vector'"):
        run_system("agent-memory", fields, output=tmp_path / "run", quiet=True)
    with pytest.raises(DataError, match="no exchange of 10000 characters"):
        load_recall(data, least_characters=10000)


# -- approximate search ---------------------------------------------------------------------------------------------


def unit_vectors(count: int, seed: int) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((count, 48))
    return (found / np.linalg.norm(found, axis=1, keepdims=True)).astype(np.float32)


def share_found(graph: HNSWIndex, vectors: np.ndarray, queries: np.ndarray, count: int = 10) -> float:
    """Of the nearest vectors by exact search, those that the graph finds."""
    hits = 0
    for query in queries:
        exact = np.argsort(-VectorIndex(vectors).scores(query), kind="stable")[:count]
        hits += len(set(exact.tolist()) & set(graph.nearest(query, count)[0].tolist()))
    return hits / (count * len(queries))


def test_the_graph_finds_what_exact_search_finds():
    """Nearly all of it; all with a wide search; little with a graph that is hardly one."""
    vectors, queries = unit_vectors(1500, 0), unit_vectors(40, 1)
    assert share_found(HNSWIndex(vectors), vectors, queries) > 0.95
    assert share_found(HNSWIndex(vectors, connectivity=32, build_width=400, width=400), vectors, queries) == 1.0
    assert share_found(HNSWIndex(vectors, connectivity=2, build_width=2, width=2), vectors, queries) < 0.6


def test_the_graph_s_scores_are_the_exact_ones_in_order():
    vectors = unit_vectors(300, 0)
    (query,) = unit_vectors(1, 2)
    places, scores = HNSWIndex(vectors).nearest(query, 20)
    np.testing.assert_allclose(scores, VectorIndex(vectors).scores(query)[places], atol=1e-6)
    assert (np.diff(scores) <= 0).all() and len(set(places.tolist())) == 20
    again = HNSWIndex(vectors).nearest(query, 20)
    np.testing.assert_array_equal(again[0], places)
    assert HNSWIndex(vectors[:3]).nearest(query, 20)[0].tolist() == np.argsort(-(vectors[:3] @ query)).tolist()
    assert len(HNSWIndex(vectors[:0]).nearest(query, 20)[0]) == 0


def test_without_the_library(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "usearch.index", None)
    fields = {"exchanges": 20, "index": "hnsw", "trackers": []}
    with pytest.raises(ConfigError, match=r"^HNSW search needs .* pip install 'stillhouse\[hnsw\]'$"):
        run_system("agent-memory", fields, output=tmp_path / "run", quiet=True)


def test_searching_by_a_graph(finished, tmp_path):
    """So few vectors are all found: ``both`` finds beside exact search the same, ``hnsw`` the same in its place."""
    exact = finished.artifacts["evaluation"].metrics
    fields = {"exchanges": 400, "trackers": [], "search": "cross/hnsw+bm25", "hnsw_width": 400}
    done = run_system("agent-memory", {**fields, "index": "both"}, output=tmp_path / "run", quiet=True)
    both = done.artifacts["evaluation"].metrics
    assert {name: both[name] for name in exact if "/" in name} == {n: v for n, v in exact.items() if "/" in n}
    for layer in ("verbatim", "distilled"):
        assert both[f"{layer}/hnsw/mrr"] == pytest.approx(both[f"{layer}/vector/mrr"], abs=0.02)
        assert both[f"{layer}/hybrid-hnsw/mrr"] == pytest.approx(both[f"{layer}/hybrid/mrr"], abs=0.02)
    assert both["mrr"] == both["cross/hnsw+bm25/mrr"] == pytest.approx(both["cross/vector+bm25/mrr"], abs=0.02)
    assert "0.05 / 5" in done.artifacts["evaluation"].table().notes[-1]
    fields = {**fields, "search": "cross/vector+bm25", "index": "hnsw"}
    alone = run_system("agent-memory", fields, output=tmp_path / "run", quiet=True).artifacts["evaluation"].metrics
    assert alone["distilled/vector/mrr"] == both["distilled/hnsw/mrr"] and "distilled/hnsw/mrr" not in alone


def test_a_memory_that_was_not_written_is_in_no_graph(tmp_path):
    recall = load_recall(transcripts(tmp_path, own_talks()))
    asked = type(recall)(recall.conversations, recall.exchanges, (Query("router", {recall.exchanges[2].key: 3}),))
    task = AgentTask(AgentMemory(embedder="words", index="hnsw"), None, asked)  # type: ignore[arg-type]
    texts = {"verbatim": [e.text for e in recall.exchanges], "distilled": ["", "router", "parser"]}
    keys = [exchange.key for exchange in recall.exchanges]
    assert task.rank(texts, depth=10, percentile=100)["distilled/vector"][0] == [keys[1], keys[2]]


# -- grading by language models -------------------------------------------------------------------------------------


def test_what_is_pooled():
    found = pooled({"a": [["x", "y", "z"], []], "b": [["y", "w"], ["v"]]}, depth=2)
    assert found == [["x", "y", "w"], ["v"]]
    assert pooled({}) == []


def test_the_form_of_a_grade():
    assert Grade(grade=3).grade == 3
    for wrong in (-1, 4, "good", 1.5):
        with pytest.raises(ValidationError):
            Grade(grade=wrong)
    prompt = grade_prompt("what limit?", "x" * 100, most_characters=10)
    assert "Question: what limit?" in prompt and prompt.endswith("\n" + "x" * 10)


def graded_run(tmp_path, url: str, **fields):
    questions = tmp_path / "queries.jsonl"
    lines = [
        {"query": "cache limit", "relevant": [{"conversation": "t1", "ply": 1}]},
        {"query": "router limit", "relevant": []},
    ]
    questions.write_text("\n".join(map(json.dumps, lines)))
    fixed = {"data": transcripts(tmp_path, own_talks()), "queries": str(questions), "embedder": "words", "trackers": []}
    return run_system("agent-memory", {**fixed, "grader_endpoint": url, **fields}, output=tmp_path / "run", quiet=True)


def grader_of(prompt: str, model: str) -> str:
    """Grades by the word in question; the model ``harsh`` always 0, ``broken`` not at all, ``kind`` one more."""
    asked = prompt.partition("Question: ")[2].split()[0]
    found = 3 if f"the {asked}?" in prompt else 0
    return {"harsh": '{"grade": 0}', "broken": "very good!", "kind": f'{{"grade": {min(3, found + 1)}}}'}.get(
        model, f'```json\n{{"grade": {found}}}\n```'
    )


def test_models_grade_what_is_found(tmp_path, monkeypatch):
    """Any OpenAI-compatible server. Each result once per grader; the majority counts; broken graders do not."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    endpoint = Endpoint()
    endpoint.write = lambda prompt: grader_of(prompt, endpoint.bodies[-1]["model"])
    with serving(endpoint):
        how = {"graders": "good,harsh,better,broken", "concurrency": 1}
        done = graded_run(tmp_path, endpoint.url, **how)
        figures = done.artifacts["evaluation"].metrics
        results = done.artifacts["results"].json()
        pairs = sum(map(len, pooled(results)))
        asked = [(body["model"], body["messages"][0]["content"]) for body in endpoint.bodies]
        for model in ("good", "harsh", "better"):
            assert len([1 for name, _ in asked if name == model]) == pairs
        assert {body["response_format"]["json_schema"]["schema"]["required"][0] for body in endpoint.bodies} == {
            "grade"
        }
        assert figures["graded"] == pairs and figures["ungraded"] == 0
        assert figures["graders_right"] == 1.0  # of the question whose answer is known
        assert 0 < figures["graders_agree"] < 1  # two of three say 3 where one says 0
        assert figures["verbatim/bm25/mrr"] == 1.0 and figures["verbatim/bm25/ndcg10"] == 1.0  # of both questions
        assert figures["verbatim/bm25/recall10"] == 1.0
        note = next(note for note in done.artifacts["evaluation"].table().notes if "were graded" in note)
        assert note.startswith(f"{pairs} results were graded by good, harsh, better, broken; 0 got no grade")
        # Another percentile asks for no grade that is there already.
        before = len(endpoint.bodies)
        graded_run(tmp_path, endpoint.url, **how, percentile=50)
        assert all(body["model"] == "broken" for body in endpoint.bodies[before:])


def test_grades_are_a_consensus_of_samples(tmp_path, monkeypatch):
    """One grader that wavers, asked five times: 3, 3, 3, 0, 0 is 3, and asks are counted by sample."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    turns: dict[str, int] = {}

    def write(prompt: str) -> str:
        turns[prompt] = turns.get(prompt, 0) + 1
        return f'{{"grade": {3 if turns[prompt] <= 3 and "the cache?" in prompt else 0}}}'

    with serving(Endpoint(write=write)) as endpoint:
        how = {"graders": "one", "grades_each": 5, "grader_temperature": 0.7, "concurrency": 1}
        figures = graded_run(tmp_path, endpoint.url, **how).artifacts["evaluation"].metrics
        assert set(turns.values()) == {5} and {body["temperature"] for body in endpoint.bodies} == {0.7}
    assert figures["graded"] == len(turns) and figures["graders_agree"] < 1
    assert figures["graders_right"] == 1.0


def test_a_grader_that_cannot_grade_is_said_so(tmp_path):
    """A tiny model in this process babbles."""
    made = helpers.make_materials(tmp_path)
    with pytest.raises(ConfigError, match="gave no grade that fits the form for any of"):
        graded_run(tmp_path, "none", graders=str(made.teacher))


def test_without_graders_the_questions_answers_count(finished):
    assert "graded" not in finished.artifacts["evaluation"].metrics and "results" not in finished.artifacts
