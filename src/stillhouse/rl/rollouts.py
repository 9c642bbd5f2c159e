"""Rollouts: a source of batches that a policy writes itself, judged by a verifier.

Shapes: P prompts, G responses to each, B rows of a batch, T tokens, N response tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stillhouse.data.responses import Coder, response_tokens
from stillhouse.data.sources import Batches, Wrapped
from stillhouse.data.verifiers import Record, Verifier, judged
from stillhouse.rl.advantages import Advantage, advantages
from stillhouse.rl.sampling import Sampler


@dataclass
class Rollout:
    """One response to one problem, and what became of it."""

    problem: Record
    ids: Tensor
    text: str
    finished: bool
    reward: float
    feedback: str
    advantage: float = 0.0
    group: int = 0
    siblings: tuple[int, ...] = ()  # places of the others of its group in the list of rollouts
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)  # what `prepare` adds
    old_logp: Tensor | None = None  # (response tokens), where the policy may have moved since


Rollouts = list[Rollout]
Collate = Callable[[Rollouts], dict[str, Any]]


class RolloutSource(Wrapped):
    """A resumable stream of batches written by a live policy.

    Every round takes the next ``prompts`` problems, lets ``sampler`` write ``group`` responses to each, judges them,
    and yields the rollouts: all in one batch, or in ``minibatches`` of it (fewer where they do not come out even),
    ``epochs`` times over. ``batch["round"]`` counts the rounds. A batch is drawn between two steps, so the sampler sees
    the weights as they are then.

    What is random depends on the seed and the number of the round only, and batches that are still to come from a round
    are part of the state: a resumed run goes on with the very same rollouts.

    Args:
        sampler: writes the responses.
        coder: the policy's tokenizer.
        problems: records with ``prompt``.
        verifier: judges (text, record).
        prompts: problems in a round, all processes together.
        group: responses to each.
        epochs, minibatches: how often a round's rollouts are yielded, and in how many batches.
        advantage: see `stillhouse.rl.advantages.advantages`.
        score: log-probabilities of a batch's response tokens under the policy now: (N). Needed where rollouts are
            used after the policy has moved, that is with several epochs or minibatches, or a stale sampler.
        prepare: adds to a round's rollouts, before they are split: routes, hints.
        collate: makes the batch; `collate` of this module by default.
    """

    def __init__(
        self,
        sampler: Sampler,
        coder: Coder,
        problems: Sequence[Record],
        verifier: Verifier,
        *,
        prompts: int = 32,
        group: int = 8,
        epochs: int = 1,
        minibatches: int = 1,
        advantage: Advantage = "group",
        score: Callable[[dict[str, Any]], Tensor] | None = None,
        prepare: Callable[[Rollouts], None] | None = None,
        collate: Collate | None = None,
        seed: int = 0,
    ) -> None:
        if (epochs > 1 or minibatches > 1) and score is None:
            raise ValueError("several epochs or minibatches need score=, for the probabilities the tokens had")
        super().__init__(Batches(problems, prompts, seed=seed, collate=list))
        self.sampler = sampler
        self.coder = coder
        self.verifier = verifier
        self.group = group
        self.epochs = epochs
        self.minibatches = minibatches
        self.advantage: Advantage = advantage
        self.score = score
        self.prepare = prepare
        self.collate = collate or (lambda rollouts: collate_rollouts(rollouts, coder))
        self.seed = seed
        self._round = 0
        self._rollouts: Rollouts = []
        self._queue: list[list[int]] = []

    def __next__(self) -> dict[str, Any]:
        if not self._queue:
            self._collect()
        batch = self.collate([self._rollouts[place] for place in self._queue.pop(0)])
        return {**batch, "round": torch.tensor(self._round)}

    def _collect(self) -> None:
        """One round."""
        rank, world = self.shard
        seed = ((self.seed * 1_000_003 + self._round) * world + rank) % 2**63
        self._round += 1
        problems = next(self.source)
        written = self.sampler.sample([problem["prompt"] for problem in problems], n=self.group, seed=seed)
        self._rollouts = []
        for group, (problem, responses) in enumerate(zip(problems, written, strict=True)):
            places = range(len(self._rollouts), len(self._rollouts) + len(responses))
            for place, response in zip(places, responses, strict=True):
                said = judged(self.verifier, response.text, problem)
                self._rollouts.append(
                    Rollout(
                        problem=problem,
                        ids=torch.tensor(response.ids),
                        text=response.text,
                        finished=response.finished,
                        reward=said.reward,
                        feedback=said.feedback,
                        group=group,
                        siblings=tuple(other for other in places if other != place),
                    )
                )
        rewards_PG = torch.tensor([rollout.reward for rollout in self._rollouts]).view(len(problems), -1)
        for rollout, value in zip(
            self._rollouts, advantages(rewards_PG, self.advantage).flatten().tolist(), strict=True
        ):
            rollout.advantage = value
        if self.prepare is not None:
            self.prepare(self._rollouts)
        generator = torch.Generator().manual_seed(seed)
        self._queue = []
        for _ in range(self.epochs):
            order = torch.arange(len(self._rollouts))
            if self.minibatches > 1:
                order = order[torch.randperm(len(order), generator=generator)]
            self._queue += [part.tolist() for part in order.chunk(self.minibatches)]
        if self.score is not None:
            self._note_probabilities()

    def _note_probabilities(self) -> None:
        assert self.score is not None
        places = torch.arange(len(self._rollouts)).chunk(self.minibatches)
        for part in places:
            rollouts = [self._rollouts[place] for place in part.tolist()]
            logp_N = self.score(self.collate(rollouts)).detach().cpu()
            for rollout, logp in zip(rollouts, logp_N.split([len(one.ids) for one in rollouts]), strict=True):
                rollout.old_logp = logp.clone()

    def state_dict(self) -> dict[str, Any]:
        left = [dataclasses.asdict(rollout) for rollout in self._rollouts] if self._queue else []
        return {"round": self._round, "problems": self.source.state_dict(), "queue": self._queue, "rollouts": left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._round = state["round"]
        self.source.load_state_dict(state["problems"])
        self._queue = [list(part) for part in state["queue"]]
        self._rollouts = [Rollout(**{**one, "siblings": tuple(one["siblings"])}) for one in state["rollouts"]]


def collate_rollouts(rollouts: Rollouts, coder: Coder) -> dict[str, Any]:
    """``input_ids``, ``attention_mask``, ``loss_mask`` (B, T); ``advantages``, ``rewards``, ``finished`` (B), and
    ``old_logp`` (N) if the rollouts have it."""
    batch: dict[str, Any] = coder.batch([(coder.prompt(one.problem["prompt"]), one.ids.tolist()) for one in rollouts])
    batch["advantages"] = torch.tensor([one.advantage for one in rollouts])
    batch["rewards"] = torch.tensor([one.reward for one in rollouts])
    batch["finished"] = torch.tensor([float(one.finished) for one in rollouts])
    known = [one.old_logp for one in rollouts if one.old_logp is not None]
    if len(known) == len(rollouts):
        batch["old_logp"] = torch.cat(known)
        assert len(batch["old_logp"]) == len(response_tokens(batch)[1])
    return batch
