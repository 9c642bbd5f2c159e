"""Whose text a student is trained on: the data's, its own as it writes now, or what it wrote a while ago.

With ``pi_mix = share * student + (1 - share) * data`` these are the off-policy, on-policy and mixed-policy cases of the
survey of on-policy distillation (card 151). No gradient flows through what was written.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

from stillhouse.data.responses import Row, pack_rows
from stillhouse.data.sources import Batches, Wrapped
from stillhouse.rl.sampling import Response, Writer

Choice = Literal["data", "write", "replay"]


class Chooser(Protocol):
    """Decides batch by batch whose text comes next."""

    def choose(self, draw: float, done: float, *, full: bool) -> Choice:
        """``draw``: uniform in [0, 1); ``done``: share of the run that is over; ``full``: whether the replay is."""
        ...

    def observe(self, loss: float) -> None:
        """Hear how well the student does on held-out text."""
        ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass
class Share:
    """A batch is the student's own with probability ``share`` (GKD, Agarwal et al., 2024, arXiv 2306.13649, alg. 1)."""

    share: float

    def choose(self, draw: float, done: float, *, full: bool) -> Choice:
        return "write" if draw < self.share else "data"

    def observe(self, loss: float) -> None:
        """Nothing changes."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """There is no state."""


@dataclass
class AdaptiveReplay:
    """The adaptive off-policy approach of DistiLLM (Ko et al., 2024, arXiv 2402.03898, section 3.2).

    A batch is the student's with probability ``share``, which grows by ``step`` whenever the held-out loss has risen
    by ``margin`` since it was last heard. While the replay buffer fills, and with a probability that falls linearly
    over the run, the student writes anew; else what it wrote before is used again.
    """

    share: float = 0.0
    step: float = 0.1
    margin: float = 0.1
    last: float | None = field(default=None, init=False)

    def choose(self, draw: float, done: float, *, full: bool) -> Choice:
        if draw >= self.share:
            return "data"
        return "write" if not full or draw < self.share * (1 - done) else "replay"

    def observe(self, loss: float) -> None:
        if self.last is not None and loss >= self.last + self.margin:
            self.share = min(1.0, self.share + self.step)
        self.last = loss

    def state_dict(self) -> dict[str, Any]:
        return {"share": self.share, "last": self.last}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.share, self.last = state["share"], state["last"]


class PolicySource(Wrapped):
    """A resumable stream of batches, of the data's text or of the student's own.

    Every turn draws a batch of the data. The student's turn keeps its prompts and writes the responses anew; batches
    then have ``input_ids``, ``attention_mask`` and ``loss_mask``, padded at the right. ``own`` and ``given`` (B) say
    whose text a row is: 1 for the student's and the data's. What is random depends on the
    seed and the number of the turn only, and what may be used again is part of the state.

    Args:
        batches: of the data: windows of plain text, or conversations (with ``loss_mask``).
        writer: the student, as it is at the moment.
        chooser: whose turn it is.
        pad: id of the padding.
        prompt: tokens of a window of plain text that are the prompt; of a conversation it is what stands before the
            first response.
        steps: turns of the whole run.
        capacity: rows in the replay buffer; the oldest are dropped.
        watch: held-out loss of the student, for the chooser; asked every ``watch_every`` turns.
        beside: batches of text that every turn's batch has as ``text``.
    """

    def __init__(
        self,
        batches: Batches,
        writer: Writer,
        chooser: Chooser,
        *,
        pad: int,
        prompt: int,
        steps: int,
        capacity: int = 0,
        watch: Callable[[], float] | None = None,
        watch_every: int = 100,
        beside: Batches | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(batches, beside)
        self.writer = writer
        self.chooser = chooser
        self.pad = pad
        self.prompt = prompt
        self.steps = steps
        self.capacity = capacity
        self.watch = watch
        self.watch_every = watch_every
        self.beside = beside
        self.seed = seed
        self._turn = 0
        self._kept: list[Row] = []

    def __next__(self) -> dict[str, Any]:
        batch, own = self._next()
        share_B = torch.full((len(batch["input_ids"]),), float(own))
        return {
            **batch,
            "own": share_B,
            "given": 1 - share_B,
            **({} if self.beside is None else {"text": next(self.beside)}),
        }

    def _next(self) -> tuple[dict[str, Any], bool]:
        """The batch, and whether it is the student's text."""
        if self.watch is not None and self._turn % self.watch_every == 0:
            self.chooser.observe(self.watch())
        batch: dict[str, Any] = next(self.source)
        rank, world = self.shard
        common = random.Random(f"{self.seed} {self._turn}")  # all processes take the same turn
        full = len(self._kept) >= max(1, self.capacity)
        choice = self.chooser.choose(common.random(), self._turn / self.steps, full=full)
        seed = ((self.seed * 1_000_003 + self._turn) * world + rank) % 2**63
        self._turn += 1
        if choice == "data":
            return batch, False
        if choice == "replay":
            own = random.Random(seed)
            return pack_rows([own.choice(self._kept) for _ in range(len(batch["input_ids"]))], self.pad), True
        prompts = prompts_of(batch, self.prompt)
        written = self.writer.write(prompts, seed=seed)
        rows: list[Row] = [(prompt, response.ids) for prompt, response in zip(prompts, written, strict=True)]
        if self.capacity:
            self._kept = [*self._kept, *rows][-self.capacity :]
        return pack_rows(rows, self.pad), True

    def state_dict(self) -> dict[str, Any]:
        kept = [[list(prompt), list(response)] for prompt, response in self._kept]
        return {
            "turn": self._turn,
            "batches": self.source.state_dict(),
            "beside": None if self.beside is None else self.beside.state_dict(),
            "kept": kept,
            "chooser": self.chooser.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._turn = state["turn"]
        self.source.load_state_dict(state["batches"])
        if self.beside is not None:
            self.beside.load_state_dict(state["beside"])
        self._kept = [(list(prompt), list(response)) for prompt, response in state["kept"]]
        self.chooser.load_state_dict(state["chooser"])


class ReusedText(Wrapped):
    """Own text in rounds: the student writes some batches as it stands, and then learns from them several times.

    Each time the rows of a round are dealt out anew. What ``note`` says of every response token when it was written
    goes along: a policy gradient needs the probability it had then. Rounds that are not used up are part of the state.

    Args:
        source: writes a batch at each turn.
        note: values by name for the response tokens of a batch, each (N) or (N, ...).
        batches: in a round.
        times: each row is used.
        beside: batches of text that every batch has as ``text``.
    """

    def __init__(
        self,
        source: PolicySource,
        note: Callable[[dict[str, Any]], Mapping[str, torch.Tensor]],
        *,
        batches: int,
        times: int,
        beside: Batches | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(source, beside)
        self.note = note
        self.batches = batches
        self.times = times
        self.beside = beside
        self.seed = seed
        self._round = 0
        self._rows: list[Row] = []
        self._noted: list[dict[str, torch.Tensor]] = []  # of each row
        self._queue: list[list[int]] = []

    def __next__(self) -> dict[str, Any]:
        if not self._queue:
            self._write()
        places = self._queue.pop(0)
        noted = {name: torch.cat([self._noted[place][name] for place in places]) for name in self._noted[places[0]]}
        own_B = torch.ones(len(places))
        return {
            **pack_rows([self._rows[place] for place in places], self.source.pad),
            **noted,
            "own": own_B,
            "given": 1 - own_B,
            **({} if self.beside is None else {"text": next(self.beside)}),
        }

    def _write(self) -> None:
        """One round."""
        self._rows, self._noted = [], []
        for _ in range(self.batches):
            batch = next(self.source)
            rows = rows_of(batch)
            lengths = [len(response) for _, response in rows]
            parts = {name: values_N.split(lengths) for name, values_N in self.note(batch).items()}
            self._rows += rows
            self._noted += [{name: part[at].clone() for name, part in parts.items()} for at in range(len(rows))]
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self._round) % 2**63)
        self._round += 1
        for _ in range(self.times):
            order = torch.randperm(len(self._rows), generator=generator)
            self._queue += [part.tolist() for part in order.chunk(self.batches)]

    def state_dict(self) -> dict[str, Any]:
        left = zip(self._rows, self._noted, strict=True) if self._queue else ()
        return {
            "round": self._round,
            "source": self.source.state_dict(),
            "beside": None if self.beside is None else self.beside.state_dict(),
            "queue": self._queue,
            "rows": [[list(prompt), list(response), noted] for (prompt, response), noted in left],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._round = state["round"]
        self.source.load_state_dict(state["source"])
        if self.beside is not None:
            self.beside.load_state_dict(state["beside"])
        self._queue = [list(part) for part in state["queue"]]
        self._rows = [(list(prompt), list(response)) for prompt, response, _ in state["rows"]]
        self._noted = [dict(noted) for *_, noted in state["rows"]]


def packed(prompts: Sequence[list[int]], written: Sequence[Response], *, pad: int, size: int) -> list[Any]:
    """What was written after prompts, as batches of ``size`` rows, the last one of fewer; see `pack_rows`."""
    rows = [(prompt, one.ids) for prompt, one in zip(prompts, written, strict=True)]
    return [pack_rows(rows[start : start + size], pad) for start in range(0, len(rows), size)]


def rows_of(batch: Mapping[str, Any]) -> list[Row]:
    """The prompts and responses of a batch that `pack_rows` made."""
    ends, counts = batch["attention_mask"].sum(-1).tolist(), batch["loss_mask"].sum(-1).tolist()
    return [
        (ids[: end - count].tolist(), ids[end - count : end].tolist())
        for ids, end, count in zip(batch["input_ids"], ends, counts, strict=True)
    ]


def prompts_of(batch: Mapping[str, Any], prompt: int) -> list[list[int]]:
    """The prompts of a batch: the first ``prompt`` tokens of plain text; of conversations all before a response."""
    rows: Sequence[torch.Tensor] = batch["input_ids"]
    if "loss_mask" not in batch:
        return [row[:prompt].tolist() for row in rows]
    starts = batch["loss_mask"].argmax(-1).tolist()  # padding is at the right
    return [row[: max(1, start)].tolist() for row, start in zip(rows, starts, strict=True)]
