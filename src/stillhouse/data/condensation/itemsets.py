"""Frequent item sets of transactions, mined by pattern growth (FP-growth, Han, Pei and Yin, 2000)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from stillhouse.base.errors import ConfigError

Item = TypeVar("Item", bound=Hashable)
MOST_SETS = 200_000


def frequent_itemsets(
    transactions: Iterable[Iterable[Item]], support: int, *, most: int = MOST_SETS
) -> dict[frozenset[Item], int]:
    """Every set of items that at least ``support`` transactions contain, with how many do.

    The order is that of the search: it depends on the transactions only. The empty set is left out.

    Raises:
        ConfigError: there are more than ``most`` such sets (k items that always occur together make 2^k).
    """
    counted: dict[frozenset[int], int] = {}
    rows, names = _ranked(transactions, support)
    for found, count in _grow(rows, support, ()):
        if len(counted) == most:
            raise ConfigError(f"more than {most:,} frequent sets at support {support}; raise it, or keep maximal sets")
        counted[frozenset(found)] = count
    return {frozenset(names[rank] for rank in found): count for found, count in counted.items()}


def maximal_itemsets(transactions: Iterable[Iterable[Item]], support: int) -> dict[frozenset[Item], int]:
    """The frequent sets that no other frequent set contains (FPmax, Grahne and Zhu, 2003): few where all are many."""
    kept: dict[frozenset[int], int] = {}
    rows, names = _ranked(transactions, support)
    _grow_maximal(rows, support, frozenset(), sum(rows.values()), kept)
    return {frozenset(names[rank] for rank in found): count for found, count in kept.items()}


def least_counts(support: Sequence[float], sizes: Sequence[int]) -> list[int]:
    """The least support in each class as a number of its transactions, of which there are ``sizes``.

    ``support`` has one value for each class, or one for all; below 1 it is a share of the class.
    """
    given = [*support] * len(sizes) if len(support) == 1 else support
    if len(given) != len(sizes):
        raise ConfigError(f"support={support}: {len(given)} values for {len(sizes)} classes")
    return [max(1, round(own * size)) if own < 1 else round(own) for own, size in zip(given, sizes, strict=True)]


def support_of(items: Iterable[Item], transactions: Iterable[Iterable[Item]]) -> int:
    """How many transactions contain all the items."""
    wanted = frozenset(items)
    return sum(wanted <= frozenset(row) for row in transactions)


Rows = Counter[tuple[int, ...]]
"""Transactions as rising ranks (0: the most frequent item), equal ones merged: what an FP-tree holds."""


def _ranked(transactions: Iterable[Iterable[Item]], support: int) -> tuple[Rows, list[Item]]:
    """The transactions without rare items, and what item a rank stands for."""
    rows = [frozenset(row) for row in transactions]
    first_seen: dict[Item, int] = {}
    for row in rows:
        for item in sorted(row, key=repr):
            first_seen.setdefault(item, len(first_seen))
    counts = Counter(item for row in rows for item in row)
    names = sorted((i for i, n in counts.items() if n >= support), key=lambda i: (-counts[i], first_seen[i]))
    rank = {item: position for position, item in enumerate(names)}
    return Counter(tuple(sorted(rank[item] for item in row if item in rank)) for row in rows), names


def _counts(rows: Rows, support: int) -> dict[int, int]:
    """How many transactions hold each frequent item, least frequent ranks first."""
    counts: Counter[int] = Counter()
    for row, count in rows.items():
        for item in row:
            counts[item] += count
    return {item: counts[item] for item in sorted(counts, reverse=True) if counts[item] >= support}


def _conditional(rows: Rows, item: int) -> Rows:
    """What stands before ``item`` in the transactions that hold it."""
    found: Rows = Counter()
    for row, count in rows.items():
        if item in row:
            found[row[: row.index(item)]] += count
    return found


def _grow(rows: Rows, support: int, suffix: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], int]]:
    for item, count in _counts(rows, support).items():
        found = (item, *suffix)
        yield found, count
        yield from _grow(_conditional(rows, item), support, found)


def _grow_maximal(
    rows: Rows, support: int, suffix: frozenset[int], count: int, kept: dict[frozenset[int], int]
) -> None:
    """Add the maximal sets that end in ``suffix``; those found earlier end in less frequent items."""
    counts: Mapping[int, int] = _counts(rows, support)
    if any(suffix.union(counts) <= found for found in kept):
        return
    if not counts:
        if suffix:
            kept[suffix] = count
        return
    for item, own in counts.items():
        _grow_maximal(_conditional(rows, item), support, suffix | {item}, own, kept)
