"""The agent memory task: conversations to remember, a teacher that writes memories, and recall questions."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from annotated_types import Ge

from stillhouse.base.errors import ConfigError, suggest
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Evaluate, Generate, Stage, Transform
from stillhouse.core.system import System
from stillhouse.data.conversations import Exchange, Query, Recall, embedded_recall, load_recall, words_of
from stillhouse.data.memory import Memory, RuleDistiller, inverse_document_frequencies, memory_prompt
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
from stillhouse.models.causal_lm import load_causal_lm
from stillhouse.models.text_encoder import TextEncoder
from stillhouse.retrieval.dense import Embedder, HNSWIndex, VectorIndex, WordVectors
from stillhouse.retrieval.fusion import cross_layer, fused, top
from stillhouse.retrieval.grading import Grade, grade_prompt, pooled
from stillhouse.retrieval.lexical import BM25
from stillhouse.tasks.black_box import Examiner
from stillhouse.teachers.answers import Request, Sampling
from stillhouse.teachers.endpoint import EndpointTeacher
from stillhouse.teachers.in_process import LocalTeacher
from stillhouse.teachers.schema import Schema

DEMO = "demo"
RULE = "rule"
WORDS = "words"


@dataclass(kw_only=True)
class AgentSystem(System):
    """Fields of every system on the memory of agents."""

    data: Annotated[str, "file of transcripts (.jsonl, one conversation a line), or 'demo'"] = DEMO
    queries: Annotated[str | None, "file of recall questions with their answers' places; none: nothing to measure"] = (
        None
    )
    teacher: Annotated[
        str, "directory or hub id of a causal LM, the model's name at the endpoint, or 'rule': no model"
    ] = RULE
    endpoint: Annotated[str | None, "address of an OpenAI-compatible endpoint, where the teacher is"] = None
    api_key_env: Annotated[str, "environment variable that holds the endpoint's key"] = "OPENAI_API_KEY"
    concurrency: Annotated[int, "requests on their way at one time, or in one batch of a local teacher", Ge(1)] = 8
    embedder: Annotated[
        str, "directory or hub id of a text encoder (sentence-transformers, transformers), or 'words': no model"
    ] = "sentence-transformers/all-MiniLM-L6-v2"
    most_plies: Annotated[int, "longer exchanges are cut", Ge(1)] = 20
    least_characters: Annotated[int, "shorter exchanges are dropped (the released code: 50)", Ge(0)] = 100
    most_characters: Annotated[int, "the teacher reads so much of each message", Ge(1)] = 4000
    max_tokens: Annotated[int, "longest answer of a teacher", Ge(1)] = 512
    exchanges: Annotated[int, "in the demo", Ge(10)] = 800
    index: Annotated[
        Literal["exact", "hnsw", "both"], "search among vectors: exact, by an HNSW graph, or by each (mode 'hnsw')"
    ] = "exact"
    hnsw_connectivity: Annotated[int, "neighbours of each vector in the graph", Ge(2)] = 16
    hnsw_build: Annotated[int, "candidates held while the graph is built", Ge(1)] = 128
    hnsw_width: Annotated[int, "candidates held while the graph is searched", Ge(1)] = 64
    graders: Annotated[
        tuple[str, ...],
        "models that grade the results of all searches, instead of the questions' known answers: names at the "
        "grader_endpoint, or directories or hub ids (the paper: five)",
    ] = ()
    grades_each: Annotated[int, "grades that each grader gives a result; the consensus of all counts", Ge(1)] = 1
    grader_endpoint: Annotated[str | None, "address of the graders; by default the teacher's"] = None
    grader_temperature: Annotated[float, "of the graders' answers", Ge(0)] = 0.0

    demo: ClassVar[dict[str, Any]] = {"embedder": WORDS}
    smoke: ClassVar[dict[str, Any]] = {"exchanges": 24}

    def is_demo(self) -> bool:
        return self.__dict__["data"] == DEMO


@dataclass
class AgentTask:
    """What a system on agents' memory works with."""

    system: AgentSystem
    run: Run
    recall: Recall

    @staticmethod
    def prepare(system: AgentSystem, run: Run) -> AgentTask:
        """Read or make the conversations."""
        if system.data == DEMO:
            if system.queries is not None:
                raise ConfigError("queries= belongs to your own data=; the demo has its own questions")
            asked = min(200, system.exchanges // 2)
            return AgentTask(system, run, embedded_recall(exchanges=system.exchanges, queries=asked, seed=system.seed))
        recall = load_recall(
            system.data, system.queries, most_plies=system.most_plies, least_characters=system.least_characters
        )
        return AgentTask(system, run, recall)

    @cached_property
    def by_key(self) -> dict[str, Exchange]:
        return {exchange.key: exchange for exchange in self.recall.exchanges}

    @cached_property
    def embed(self) -> Embedder:
        """Texts to vectors."""
        if self.system.embedder == WORDS:
            return WordVectors(words_of, self.recall.vectors)
        return TextEncoder(self.system.embedder)

    def distil(self, name: str) -> Generate:
        """The stage in which the teacher writes a memory of every exchange; one that does not fit is dropped."""
        system = self.system
        if system.teacher == RULE:
            if system.endpoint is not None:
                raise ConfigError("endpoint needs teacher=MODEL, the model's name there")
            rule = RuleDistiller(self.recall.exchanges)
            return Generate(name, self.by_key, lambda exchange: _record(rule(exchange)))
        requests = {
            key: Request.of(memory_prompt(exchange, most_characters=system.most_characters))
            for key, exchange in self.by_key.items()
        }
        sampling = Sampling(max_tokens=system.max_tokens)
        answers: Callable[[Mapping[str, Request]], Iterator[tuple[str, dict[str, Any]]]]
        own = system.__dict__  # how it is asked changes no answer: nothing is done again for it
        if system.endpoint is not None:
            answers = EndpointTeacher(
                system.endpoint,
                system.teacher,
                sampling=sampling,
                schema=Memory,
                api_key_env=own["api_key_env"],
                concurrency=own["concurrency"],
                say=self.run.say,
            ).answers
        else:
            model, tokenizer = load_causal_lm(system.teacher)
            teacher = LocalTeacher(system.teacher, model, tokenizer, sampling=sampling, batch_size=system.concurrency)
            answers = partial(teacher.answers, everything=requests)
        return Generate(name, requests, partial(_memories, answers), together=True)

    def rank(self, texts: Mapping[str, Sequence[str]], *, depth: int, percentile: float) -> dict[str, list[list[str]]]:
        """Every way of searching: ``name -> for each question, keys of exchanges, best first``.

        Args:
            texts: the layers, ``{"verbatim": [...], "distilled": [...]}``, in the order of ``recall.exchanges``; an
                empty text is found by nothing.
            depth: how many results each index hands on.
        """
        keys, queries = list(self.by_key), [query.text for query in self.recall.queries]
        asked = self.embed(queries)
        found: dict[str, list[dict[str, float]]] = {}
        for layer, own in texts.items():
            lexical = BM25([words_of(text) for text in own])
            words = [top(lexical.scores(words_of(query)), keys, depth) for query in queries]
            found[f"{layer}/bm25"] = words
            for name, nearest in self._vector_searches(own, depth).items():
                vectors = [nearest(vector) for vector in asked]
                found[f"{layer}/{name}"] = vectors
                found[f"{layer}/{HYBRID[name]}"] = [
                    fused(a, b, percentile=percentile) for a, b in zip(words, vectors, strict=True)
                ]
        for one, other in crossed(self.system.index):
            pairs = zip(found[f"distilled/{one}"], found[f"verbatim/{other}"], strict=True)
            found[f"cross/{one}+{other}"] = [cross_layer(a, b, percentile=percentile) for a, b in pairs]
        return {name: [list(scores) for scores in lists] for name, lists in found.items()}

    def _vector_searches(self, texts: Sequence[str], depth: int) -> dict[str, Callable[[np.ndarray], dict[str, float]]]:
        """The searches among vectors of ``texts`` that ``index`` asks for, by mode."""
        keys, vectors = list(self.by_key), self.embed(texts)
        there = np.array([bool(text) for text in texts])
        index = self.system.index
        searches: dict[str, Callable[[np.ndarray], dict[str, float]]] = {}
        if index != "hnsw":
            dense = VectorIndex(vectors)
            searches["vector"] = lambda vector: top(dense.scores(vector) * there, keys, depth)
        if index != "exact":
            graph = HNSWIndex(
                vectors[there],
                connectivity=self.system.hnsw_connectivity,
                build_width=self.system.hnsw_build,
                width=max(self.system.hnsw_width, depth),  # no fewer candidates than results
            )
            present = [key for key, here in zip(keys, there, strict=True) if here]

            def nearest(vector: np.ndarray) -> dict[str, float]:
                return {
                    present[place]: float(score) for place, score in zip(*graph.nearest(vector, depth), strict=True)
                }

            searches["hnsw" if index == "both" else "vector"] = nearest
        return searches

    def measured(
        self, texts: Mapping[str, Sequence[str]], *, depth: int, percentile: float, report: str
    ) -> Generator[Stage, Artifact, None]:
        """Recall questions in all modes of search, and what the distilled text is worth by itself.

        With graders, the first ten results of all modes are graded first, and the grades are what counts.

        Args:
            texts: the layers, as `rank` takes them.
            report: the mode whose figures stand among the run's without its name before them.
        """
        modes = modes_of(self.system.index)
        if report not in modes:
            raise ConfigError(f"there is no search {report!r}{suggest(report, modes)}")
        if not (self.system.graders and self.recall.queries):
            rank = partial(self.rank, texts, depth=depth, percentile=percentile)
            yield Evaluate("evaluation", partial(self._evaluate, texts, rank, report, {}))
            return
        found = yield Transform("results", lambda _: self.rank(texts, depth=depth, percentile=percentile))
        ranked: dict[str, list[list[str]]] = found.json()
        pool = pooled(ranked)
        grades: dict[tuple[int, str], list[int]] = {}
        for number, name in enumerate(self.system.graders, start=1):
            for asked, given in (yield from self._graded(f"grades-{number}", name, pool)).items():
                grades.setdefault(asked, []).extend(given)
        graded, facts = self._consensus(pool, grades)
        task = replace(self, recall=graded)
        yield Evaluate("evaluation", partial(task._evaluate, texts, lambda: ranked, report, facts))

    def _graded(
        self, stage: str, model: str, pool: Sequence[Sequence[str]]
    ) -> Generator[Stage, Artifact, dict[tuple[int, str], list[int]]]:
        """The stage in which one model grades the results of each question; those that it gave no grade are missing."""
        system, own = self.system, self.system.__dict__
        examiner = Examiner(
            run=self.run,
            model=model,
            endpoint=own["grader_endpoint"] or own["endpoint"],
            form=Grade,
            sampling=Sampling(max_tokens=256, temperature=system.grader_temperature),
            store="grades.jsonl",
            api_key_env=own["api_key_env"],
            concurrency=own["concurrency"],
        )
        asked: list[tuple[tuple[int, str], Request]] = [
            ((query, key), Request.of(grade_prompt(self.recall.queries[query].text, self.by_key[key].text), sample=n))
            for query, keys in enumerate(pool)
            for key in keys
            for n in range(system.grades_each)
        ]
        requests = [request for _, request in asked]
        written = examiner.read((yield examiner.stage(stage, requests)))
        found: dict[tuple[int, str], list[int]] = {}
        for (place, _), key in zip(asked, examiner.keys(requests), strict=True):
            if key in written:
                found.setdefault(place, []).append(written[key]["grade"])
        return found

    def _consensus(
        self, pool: Sequence[Sequence[str]], grades: Mapping[tuple[int, str], Sequence[int]]
    ) -> tuple[Recall, dict[str, float]]:
        """The questions with the graders' answers, and how far the graders agree with each other and with the old."""
        places = [(query, key) for query, keys in enumerate(pool) for key in keys]
        if not grades:
            raise ConfigError(
                f"graders={','.join(self.system.graders)} gave no grade that fits the form for any of "
                f"{len(places)} results; try stronger models"
            )
        agreed = {place: consensus(grades[place]) for place in places if place in grades}
        queries = tuple(
            Query(query.text, {key: agreed[number, key] for key in pool[number] if agreed.get((number, key))})
            for number, query in enumerate(self.recall.queries)
        )
        facts = {"graded": float(len(agreed)), "ungraded": float(len(places) - len(agreed))}
        several = [grades[place] for place in agreed if len(grades[place]) > 1]
        if several:
            facts["graders_agree"] = float(np.mean([len(set(given)) == 1 for given in several]))
        known = [(n, key) for n, key in agreed if self.recall.queries[n].relevant]
        if known:
            hits = [(agreed[n, key] > 0) == (key in self.recall.queries[n].relevant) for n, key in known]
            facts["graders_right"] = float(np.mean(hits))
        return replace(self.recall, queries=queries), facts

    def _evaluate(
        self,
        texts: Mapping[str, Sequence[str]],
        rank: Callable[[], dict[str, list[list[str]]]],
        report: str,
        facts: Mapping[str, float],
        context: Context,
    ) -> tuple[Table, dict[str, Any]]:
        pairs = [(words_of(a), words_of(b)) for a, b in zip(texts["verbatim"], texts["distilled"], strict=True) if b]
        size = compression([len(a) for a, _ in pairs], [len(b) for _, b in pairs])
        idf = inverse_document_frequencies([words_of(text) for text in texts["verbatim"]])
        survival = float(np.mean([vocabulary_survival(a, b, idf) for a, b in pairs]))
        context.results |= {
            "tokens_verbatim": size.before,
            "tokens_distilled": size.after,
            "compression_of_means": size.ratio_of_means,
            "compression_mean": size.mean_ratio,
            "compression_median": size.median_ratio,
            "vocabulary_survival": survival,
        }
        notes = [
            f"{len(self.recall.queries)} questions about {len(self.recall.exchanges)} exchanges; "
            f"{size.before:.0f} words became {size.after:.0f}: {size.ratio_of_means:.1f}x between the means, "
            f"{size.median_ratio:.1f}x for the median exchange; {survival:.0%} of the 15 rarest words survive.",
        ]
        if not self.recall.queries:
            return Table("Memory", COLUMNS, [], [*notes, "No questions were given: queries=FILE measures recall."]), {}
        ranked = rank()
        comparisons = sum(name.startswith("distilled/") for name in ranked)
        if facts:
            context.results |= facts
            notes.append(
                f"{facts['graded']:.0f} results were graded by {', '.join(self.system.graders)}; "
                f"{facts['ungraded']:.0f} got no grade and count as of no use."
            )
        figures = {
            name: [self._figures(*pair) for pair in zip(lists, self.recall.queries, strict=True)]
            for name, lists in ranked.items()
        }
        rows = []
        for name, own in figures.items():
            row: dict[str, Any] = {"name": name} | {key: float(np.mean([one[key] for one in own])) for key in own[0]}
            layer, mode = name.split("/")
            if layer == "distilled":
                against = [one["mrr"] for one in figures[f"verbatim/{mode}"]]
                paired = compare_paired([one["mrr"] for one in own], against, comparisons=comparisons)
                row |= {"ratio": row["mrr"] / max(float(np.mean(against)), 1e-12), "p": paired.p, "d": paired.d}
            rows.append(row)
            own_figures = {key: value for key, value in row.items() if key != "name"}
            context.results |= {f"{name}/{key}": value for key, value in own_figures.items()}
            context.results |= own_figures if name == report else {}
        notes.append(f"Differences count as significant below p = 0.05 / {comparisons} (Bonferroni).")
        answers = {name: [lists[i][:10] for i in range(min(5, len(lists)))] for name, lists in ranked.items()}
        shown = [query.text for query in self.recall.queries[:5]]
        return Table("Recall questions", COLUMNS, rows, notes), {"samples.json": {"queries": shown, "results": answers}}

    @staticmethod
    def _figures(ranked: Sequence[str], query: Any) -> dict[str, float]:
        grades = [query.relevant.get(key, 0) for key in ranked[:10]]
        return {
            "mrr": reciprocal_rank(grades),
            "p1": precision_at(grades, 1),
            "p10": precision_at(grades, 10),
            "recall10": recall_at(grades, 10, sum(grade > 0 for grade in query.relevant.values())),
            "ndcg10": ndcg_at(grades, 10, list(query.relevant.values())),
        }


CROSS = (("vector", "bm25"), ("vector", "vector"), ("bm25", "bm25"), ("bm25", "vector"), ("hybrid", "hybrid"))
"""Mechanism on the distilled layer, mechanism on the verbatim layer."""

HYBRID = {"vector": "hybrid", "hnsw": "hybrid-hnsw"}
"""What a search by vectors is called when merged with one by words."""


def crossed(index: str) -> tuple[tuple[str, str], ...]:
    """The pairs of `CROSS`, and those with the graph where it stands beside exact search."""
    return (*CROSS, ("hnsw", "bm25"), ("hnsw", "hnsw")) if index == "both" else CROSS


def modes_of(index: str) -> tuple[str, ...]:
    """All ways of searching: LAYER/MECHANISM."""
    pure = ("bm25", "vector", "hybrid", *(("hnsw", "hybrid-hnsw") if index == "both" else ()))
    return (
        *(f"{layer}/{mode}" for layer in ("verbatim", "distilled") for mode in pure),
        *(f"cross/{one}+{other}" for one, other in crossed(index)),
    )


COLUMNS = [
    Column("mrr", "MRR@10", ".3f", "higher", "mean of 1 / rank of the first relevant result"),
    Column("p1", "P@1", ".1%", "higher"),
    Column("p10", "P@10", ".1%", "higher"),
    Column("recall10", "recall@10", ".1%", "higher"),
    Column("ndcg10", "NDCG@10", ".3f", "higher"),
    Column("ratio", "of verbatim", ".0%", "higher", "MRR against the same search of the verbatim text"),
    Column("p", "p", ".1e", None, "paired t-test of reciprocal ranks against verbatim"),
    Column("d", "Cohen's d", ".2f", None, "of the paired differences"),
]


def _record(memory: Memory) -> dict[str, Any]:
    """A memory as a flat record."""
    return {
        "core": memory.exchange_core,
        "context": memory.specific_context,
        "rooms": [room.model_dump_json() for room in memory.room_assignments],
    }


def _memories(
    answers: Callable[[Mapping[str, Request]], Iterator[tuple[str, dict[str, Any]]]], requests: Mapping[str, Request]
) -> Iterator[tuple[str, dict[str, Any] | None]]:
    schema = Schema(Memory)
    for key, answer in answers(requests):
        text, problem = schema.read(answer["text"] or "")
        yield key, None if problem else _record(Memory.model_validate_json(text))
