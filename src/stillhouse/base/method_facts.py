"""What is known of a method besides its place in the taxonomy: what it needs, what it holds, what it stops (card 151).

Only what neither the axes nor the fields of a system say is kept here. The year is in the citation, whether a verifier
is needed in ``feedback``; members of the on-policy family have divergence, sampler and share of own text as fields.
`stillhouse.catalogue.facts_of` puts all of them together.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Held = Literal["teacher", "opponent", "self-teacher", "DPO model", "reverse DPO model"]
Drawing = Literal["nothing drawn", "stopped", "likelihood ratio"]

TRAINED, FROZEN = 16, 2  # bytes a parameter: float32 weights, gradients and two moments; bfloat16 weights


@dataclass(frozen=True, kw_only=True)
class MethodFacts:
    """Facts about one method, with its defaults.

    Attributes:
        shared_tokenizer: teacher and student need one tokenizer, as their distributions are compared token by token.
        beside: models that are held beside the one that learns.
        drawing: what becomes of the gradient through text that is drawn while it learns: it is stopped, or there is a
            term for it with the likelihood ratio.
        reward: what is rewarded, in words; nothing where there is no reward.
        divergence: between teacher and student; of systems without a field of that name.
        own_text: share of the text that the one who learns writes itself; of systems that have no field for it.
        sampler: who writes what is learnt from; likewise.
    """

    shared_tokenizer: bool = True
    beside: tuple[Held, ...] = ("teacher",)
    drawing: Drawing = "stopped"
    reward: str = ""
    divergence: tuple[str, ...] = ()
    own_text: float | None = None
    sampler: str = ""

    @property
    def memory(self) -> float:
        """Bytes held while it learns over those of plain fine-tuning, if all models are of one size."""
        return (TRAINED + FROZEN * len(self.beside)) / TRAINED
