"""Routing of rollouts, and the second prompt under which a self-teacher reads the distilled ones again."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from stillhouse.data.responses import Coder, filled
from stillhouse.rl.advantages import Routing, has_guide, route
from stillhouse.rl.rollouts import Rollout, Rollouts, collate_rollouts

CORRECT = 0.5  # a reward from which a response counts as correct


@dataclass
class Hints:
    """Decides for each rollout of a round which losses it goes to, and writes the self-teacher's prompt.

    Set ``prepare=hints`` and ``collate=hints.collate`` of a `RolloutSource`.

    Args:
        template: the self-teacher's prompt, with ``{prompt}`` and ``{solution}``: a correct response of the same group.
        feedback_template: the same with ``{feedback}``, where the verifier said something and no sibling is correct.
        routing, mix: see `stillhouse.rl.advantages.route`.
        corrupt: share of the problems whose solution is replaced by another problem's: a study of unreliable hints.
    """

    coder: Coder
    template: str
    feedback_template: str = "{feedback}\n\n{prompt}"
    routing: Routing = "srpo"
    mix: float = 0.9
    corrupt: float = 0.0

    def __call__(self, rollouts: Rollouts) -> None:
        groups = 1 + max(one.group for one in rollouts)
        correct_PG = torch.tensor([one.reward >= CORRECT for one in rollouts]).view(groups, -1)
        said_PG = torch.tensor([bool(one.feedback) for one in rollouts]).view(groups, -1)
        z_group_PG, z_distil_PG = route(correct_PG, has_guide(correct_PG) | said_PG, self.routing, mix=self.mix)
        for one, z_group, z_distil in zip(
            rollouts, z_group_PG.flatten().tolist(), z_distil_PG.flatten().tolist(), strict=True
        ):
            one.extra = {"z_group": z_group, "z_distil": z_distil, "hint": "", "corrupted": 0.0}
            if z_distil:
                one.extra["hint"], one.extra["corrupted"] = self._hint(one, rollouts)

    def _hint(self, one: Rollout, rollouts: Rollouts) -> tuple[str, float]:
        prompt = one.problem["prompt"]
        solution = next((rollouts[s].text for s in one.siblings if rollouts[s].reward >= CORRECT), None)
        if solution is None:
            return filled(self.feedback_template, prompt=prompt, feedback=one.feedback), 0.0
        elsewhere = [other.text for other in rollouts if other.group != one.group]
        rng = random.Random(f"{prompt} {one.group}")  # the same choice for all rollouts of a problem
        corrupted = bool(elsewhere) and rng.random() < self.corrupt
        shown = rng.choice(elsewhere) if corrupted else solution
        return filled(self.template, prompt=prompt, solution=shown), float(corrupted)

    def collate(self, rollouts: Rollouts) -> dict[str, Any]:
        """The batch of `collate_rollouts`, with ``z_group``, ``z_distil``, ``corrupted`` (B) and ``hinted``.

        ``hinted`` holds the responses with z^S > 0 after their second prompt; where there are none, one row without a
        response, so that the self-teacher's forward has something to read.
        """
        batch = collate_rollouts(rollouts, self.coder)
        for name in ("z_group", "z_distil", "corrupted"):
            batch[name] = torch.tensor([one.extra[name] for one in rollouts])
        rows = [(self.coder.prompt(one.extra["hint"]), one.ids.tolist()) for one in rollouts if one.extra["z_distil"]]
        batch["hinted"] = self.coder.batch(rows or [([self.coder.end], [])])
        return batch
