"""Structured distillation memory: an agent's history, compressed once and searched in two layers."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Annotated, Any, ClassVar

import pyarrow.parquet as pq
from annotated_types import Ge, Gt, Le

from stillhouse.base.errors import DataError
from stillhouse.core.artifact import Artifact
from stillhouse.core.run import Run
from stillhouse.core.stage import Context, Stage, Transform
from stillhouse.core.system import Claim, Meta
from stillhouse.data.memory import Room, files_touched, room_index
from stillhouse.tasks.agents import AgentSystem, AgentTask
from stillhouse.tasks.experiments import Experiment


@dataclass(kw_only=True)
class AgentMemory(AgentSystem):
    """Structured distillation for personalized agent memory (Lewis, 2026, arXiv 2603.13017).

    A small language model reads each exchange once and writes what was done, one exact detail, and the rooms it
    belongs to; paths are found by rule. The short text is searched, by words and by vectors, alone or together with
    the verbatim text, which stays where it was. The artifact is the memory: a row per exchange with its pointer and
    vector, and ``rooms.json``, the memories of each room in order of time.
    """

    meta = Meta(
        card=149,
        title="Structured agent memory",
        domain="agents",
        family="text-to-structure distillation with retrieval audit",
        citation="Lewis (2026), Structured Distillation for Personalized Agent Memory: 11x Token Reduction with "
        "Retrieval Preservation, arXiv 2603.13017",
        feedback="traces",
        teacher_access="black-box",
        granularity="sequence",
        policy="none",
        elicitation="curation",
        algorithm="retrieval",
        knowledge="data",
        scheme="offline",
        modality="text",
        stages=3,
        skill=("dialogue", "information retrieval"),
    )
    demo: ClassVar = {**AgentSystem.demo, "percentile": 100.0}
    product: ClassVar[str] = "memory"

    depth: Annotated[int, "results that each index hands on to be merged", Ge(10)] = 100
    percentile: Annotated[
        float, "scores are divided by this percentile of their list before merging", Gt(0), Le(100)
    ] = 95.0

    search: Annotated[str, "the way of searching whose figures stand for the run: LAYER/MECHANISM"] = (
        "cross/vector+bm25"
    )

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = AgentTask.prepare(self, run)
        written = yield task.distil("distilled")
        memory = yield Transform("memory", partial(self.store, task, written))
        rows = {row["key"]: row for row in pq.read_table(memory.data_file(), columns=["key", "text"]).to_pylist()}
        texts = {
            "verbatim": [exchange.text for exchange in task.recall.exchanges],
            "distilled": [rows[key]["text"] if key in rows else "" for key in task.by_key],
        }
        yield from task.measured(texts, depth=self.depth, percentile=self.percentile, report=self.search)

    def store(self, task: AgentTask, written: Artifact, context: Context) -> tuple[Any, dict[str, Any]]:
        """The searchable memory, in the order of the conversations."""
        import datasets

        records = pq.read_table(written.data_file()).to_pylist()
        if not records:
            raise DataError(f"teacher={self.teacher!r} wrote no memory that fits the form; try a stronger one")
        rooms = {r["key"]: [Room.model_validate_json(room) for room in r["rooms"]] for r in records}
        texts = [f"{record['core']}\n{record['context']}".strip() for record in records]
        rows = []
        for record, text, vector in zip(records, texts, task.embed(texts), strict=True):
            exchange = task.by_key[record["key"]]
            rows.append(
                {
                    "key": exchange.key,
                    "conversation": exchange.conversation,
                    "ply_start": exchange.start,
                    "ply_end": exchange.end,
                    "project": exchange.project,
                    "time": exchange.time,
                    "core": record["core"],
                    "context": record["context"],
                    "files": files_touched(exchange.text),
                    "rooms": [room.id(exchange.project) for room in rooms[exchange.key]],
                    "text": text,
                    "vector": vector.tolist(),
                }
            )
        index = room_index((task.by_key[key], own) for key, own in rooms.items())
        context.results |= {"memories": len(rows), "rooms": len(index)}
        return datasets.Dataset.from_list(rows), {"rooms.json": [asdict(room) for room in index.values()]}

    def claims(self) -> list[Claim]:
        arms = {
            "vectors": {"search": "distilled/vector"},
            "words": {"search": "distilled/bm25"},
            "long vectors": {"search": "verbatim/vector"},
            "both layers": {"search": "cross/vector+bm25"},
        }
        claim = Experiment("agent-memory", arms, "the same memories, conversations and questions").claim
        found = "MRR of the ten best results for recall questions"
        kept = f"{found}, as a ratio to the same search of the verbatim text"
        as_much = "vectors find as much in texts of a tenth as in the whole"
        cheaper = "compression to a tenth costs vectors less than words"
        crossed = "the short texts' vectors with the long texts' words find more than the short texts' words"
        return [
            claim(as_much, found, "mrr", "vectors", "long vectors"),
            claim(cheaper, kept, "ratio", "vectors", "words", scope="consequence"),
            claim(crossed, found, "mrr", "both layers", "words", scope="consequence"),
        ]
