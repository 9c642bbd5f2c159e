"""Search spaces of elastic encoders: products of a few values each for layers, heads, width and feed-forward ratio."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from stillhouse.base.errors import ConfigError
from stillhouse.models.elastic import SubNetwork

SPACES = (
    "base: layers=9-12 heads=9-12 hidden=544-640 ratio=2.5-4",
    "small: layers=9-12 heads=7-10 hidden=256-352 ratio=2.5-4",
    "tiny: layers=4-7 heads=7-10 hidden=128-224 ratio=2-3.5",
)
"""Those of AutoDistil (Xu et al., 2022), within a BERT-base."""

AXES = ("layers", "heads", "hidden", "ratio")


@dataclass(frozen=True)
class SubSpace:
    """All sub-networks made of these values; each axis is sorted."""

    name: str
    layers: tuple[int, ...]
    heads: tuple[int, ...]
    hidden: tuple[int, ...]
    ratio: tuple[float, ...]

    @staticmethod
    def parse(text: str, *, choices: int = 4) -> SubSpace:
        """From ``name: layers=4-7 heads=7-10 hidden=128-224 ratio=2-3.5``: ``choices`` values evenly in each range.

        Whole numbers are rounded and kept once, so an axis may have fewer. ``layers=4`` is a single value.

        Raises:
            ConfigError: not of that form, or an empty range.
        """
        name, colon, rest = text.partition(":")
        found = dict(re.findall(r"(\w+)=(\S+)", rest))
        if not colon or not name.strip() or set(found) != set(AXES):
            raise ConfigError(
                f"sub-space {text!r}: write NAME: layers=4-7 heads=7-10 hidden=128-224 ratio=2-3.5, all four axes"
            )
        axes = {axis: _values(text, axis, found[axis], choices) for axis in AXES}
        whole = {axis: tuple(sorted({round(value) for value in axes[axis]})) for axis in AXES[:3]}
        return SubSpace(name.strip(), **whole, ratio=tuple(axes["ratio"]))

    @staticmethod
    def parse_all(texts: Sequence[str], *, choices: int = 4) -> list[SubSpace]:
        """Several of them.

        Raises:
            ConfigError: see `parse`; or none at all, or two of one name.
        """
        spaces = [SubSpace.parse(text, choices=choices) for text in texts]
        if len({space.name for space in spaces}) < len(spaces) or not spaces:
            raise ConfigError("spaces: give at least one sub-space, each with a name of its own")
        return spaces

    def __len__(self) -> int:
        return len(self.layers) * len(self.heads) * len(self.hidden) * len(self.ratio)

    def all(self) -> list[SubNetwork]:
        """Every sub-network of the space."""
        return [SubNetwork(*values) for values in itertools.product(self.layers, self.heads, self.hidden, self.ratio)]

    @property
    def largest(self) -> SubNetwork:
        return SubNetwork(self.layers[-1], self.heads[-1], self.hidden[-1], self.ratio[-1])

    @property
    def smallest(self) -> SubNetwork:
        return SubNetwork(self.layers[0], self.heads[0], self.hidden[0], self.ratio[0])

    def spans(self, sub: SubNetwork) -> bool:
        """Whether ``sub`` lies within the ranges of all axes."""
        pairs = zip((sub.layers, sub.heads, sub.hidden, sub.ratio), (getattr(self, a) for a in AXES), strict=True)
        return all(values[0] <= value <= values[-1] for value, values in pairs)

    def draw(self, count: int, generator: torch.Generator) -> list[SubNetwork]:
        """Sub-networks drawn uniformly, one axis after the other."""

        def one(values: Sequence[float]) -> float:
            return values[int(torch.randint(len(values), (1,), generator=generator))]

        return [SubNetwork(*(one(getattr(self, axis)) for axis in AXES)) for _ in range(count)]  # type: ignore[arg-type]


def _values(text: str, axis: str, given: str, choices: int) -> list[float]:
    try:
        ends = [float(part) for part in given.split("-")]
        low, high = ends if len(ends) == 2 else (ends[0], ends[0])
    except (ValueError, IndexError) as error:
        raise ConfigError(f"sub-space {text!r}: {axis}={given} is no range such as 4-7") from error
    if len(ends) > 2 or not 0 < low <= high:
        raise ConfigError(f"sub-space {text!r}: {axis}={given}: must be a range from a positive number upwards")
    if low == high or choices == 1:
        return [high]
    return [low + (high - low) * index / (choices - 1) for index in range(choices)]
