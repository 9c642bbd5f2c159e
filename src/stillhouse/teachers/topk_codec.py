"""A compact code for the likeliest tokens of a teacher's distributions: which they are, and how likely.

Three ideas, none of which needs the teacher again:

- *Levels.* A log-probability l becomes the nearest whole number of u(l) = exp(l / 2) / d + l / `WIDEST`. An error e in
  l costs about p e^2 / 2 nats of KL, so steps grow as 1 / sqrt(p), until they are `WIDEST` nats wide. Half of what a
  token of a full step costs is d^2 / 6, whatever its probability: `error` nats among k tokens fix d.
- *Order.* Tokens of one level are written in the order of their numbers, so nothing is spent on an order that levels
  do not show. What is coded is each one's place among the places that are left (an order statistic).
- *A codebook.* Positions are clustered by the tokens they hold; each cluster has its own token frequencies. It is
  fitted once, on the first shard, and shared by all of them.

Whole numbers are written by range coding (rANS: Duda, 2013, arXiv 1311.2540), many interleaved lanes at a time
(Giesen, 2014, arXiv 1402.3392). Everything the decoder computes before it knows the numbers is integer arithmetic, so
that a file decodes alike on every machine.

Shapes: S samples, T positions of each, N = S T positions, K kept tokens, V vocabulary, C clusters, L lanes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import scipy.sparse

from stillhouse.base.errors import ConfigError, DataError

WIDEST = 0.5  # nats: the widest step, that of tokens too unlikely to matter
LOWEST = -64.0  # log-probabilities below are raised to it
TOKEN_BITS, TABLE_BITS = 30, 16
LANE = 16  # positions that one lane of the coder writes, one after the other
REST_STEP = 2.0**-10  # of the stored logarithm of the rest's mass
SEGMENTS = 256
_LOW = np.uint64(1 << 31)
_WORD = np.uint64(32)

Arrays = Mapping[str, np.ndarray]


class TopK(NamedTuple):
    """The likeliest tokens (..., K), their log-probabilities, likeliest first, and the others' together (...)."""

    tokens: np.ndarray
    log_p: np.ndarray
    log_rest: np.ndarray


# -- levels ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Levels:
    """The companded scale of log-probabilities for ``k`` tokens and ``error`` nats of KL together."""

    k: int
    error: float

    def __post_init__(self) -> None:
        if not 0 < self.error <= 1:
            raise ConfigError(f"error={self.error}: must be above 0 and at most 1 nat of KL")

    @property
    def d(self) -> float:
        return float(np.sqrt(6 * self.error / self.k))

    @property
    def count(self) -> int:
        return int(np.rint(self._scale(np.zeros(()))) - self._least) + 1

    @property
    def _least(self) -> float:
        return float(np.rint(self._scale(np.full((), LOWEST))))

    def _scale(self, log_p: np.ndarray) -> np.ndarray:
        return np.exp(log_p / 2) / self.d + log_p / WIDEST

    def of(self, log_p: np.ndarray) -> np.ndarray:
        """The level of each log-probability: whole numbers from 0, the likelier the higher."""
        return (np.rint(self._scale(np.clip(log_p, LOWEST, 0.0))) - self._least).astype(np.int64)

    @functools.cached_property
    def values(self) -> np.ndarray:
        """The log-probability each level stands for."""
        wanted = np.arange(self.count) + self._least
        low, high = np.full(self.count, LOWEST - WIDEST), np.full(self.count, WIDEST)
        for _ in range(60):  # bisection: u rises everywhere
            middle = (low + high) / 2
            below = self._scale(middle) < wanted
            low, high = np.where(below, middle, low), np.where(below, high, middle)
        return np.minimum((low + high) / 2, 0.0)

    def bound(self, log_p: np.ndarray) -> np.ndarray:
        """The largest error of a log-probability: half a step of its level, and never above half of `WIDEST`."""
        return 0.5 / (np.exp((np.clip(log_p, LOWEST, 0.0) - WIDEST) / 2) / (2 * self.d) + 1 / WIDEST)


# -- frequencies ----------------------------------------------------------------------------------------------------

_OCTAVE = np.array([256, 304, 362, 431], dtype=np.int64)  # 256 * 2^(i / 4)


def _to_bytes(counts: np.ndarray) -> np.ndarray:
    """Counts on a logarithmic scale of quarter octaves; 0 stays 0."""
    return np.where(counts > 0, 1 + np.rint(4 * np.log2(np.maximum(counts, 1))), 0).astype(np.uint8)


def _from_bytes(scaled: np.ndarray) -> np.ndarray:
    """256 times the counts, in whole numbers."""
    place = np.maximum(scaled.astype(np.int64) - 1, 0)
    return np.where(scaled > 0, _OCTAVE[place % 4] << (place // 4), 0)


def _cumulative(weights: np.ndarray, bits: int) -> np.ndarray:
    """Cumulative frequencies (..., A + 1) of 2^bits in all, at least one for every symbol."""
    size = weights.shape[-1]
    sums = np.cumsum(weights.astype(np.int64), axis=-1)
    over = max(0, int(sums.max(initial=1)).bit_length() + bits - 62)
    sums >>= over
    inner = sums * ((1 << bits) - size) // np.maximum(sums[..., -1:], 1) + np.arange(1, size + 1)
    return np.concatenate([np.zeros_like(inner[..., :1]), inner], -1)


@functools.lru_cache(maxsize=8)
def _order_statistics(k: int) -> np.ndarray:
    """Row r - 1: the distribution of the least of r places, at `SEGMENTS` equal steps, in units of 2^-TOKEN_BITS.

    1 - (1 - u)^r, and a share of u itself, so that no place is ever without room.
    """
    one, rows = 1 << TOKEN_BITS, []
    for r in range(1, k + 1):
        whole = SEGMENTS**r
        row = [
            (31 * one * (whole - (SEGMENTS - j) ** r) // whole + one * j // SEGMENTS) // 32 for j in range(SEGMENTS + 1)
        ]
        rows.append(row)
    return np.array(rows, dtype=np.int64)


class _Tokens:
    """Codes a token among those of its cluster, as the least of ``left`` tokens from ``first`` on."""

    def __init__(self, cumulative: np.ndarray, bits: int, k: int) -> None:
        self.bits = bits
        self.size = cumulative.shape[1]
        self.rows = cumulative
        self.flat = (cumulative + (np.arange(len(cumulative), dtype=np.int64)[:, None] << bits)).ravel()
        self.order = _order_statistics(k)
        self.flat_order = (self.order + (np.arange(k, dtype=np.int64)[:, None] << TOKEN_BITS + 1)).ravel()

    def _warp(self, place: np.ndarray, left: np.ndarray) -> np.ndarray:
        shift = TOKEN_BITS - 8
        segment = np.minimum(place >> shift, SEGMENTS - 1)
        low, high = self.order[left - 1, segment], self.order[left - 1, segment + 1]
        return low + ((high - low) * (place - (segment << shift)) >> shift)

    def span(
        self, cluster: np.ndarray, token: np.ndarray, first: np.ndarray, left: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Where the token's share of 2^TOKEN_BITS begins, and how large it is."""
        base = self.rows[cluster, first]
        room = (1 << self.bits) - base
        begin = self._warp(((self.rows[cluster, token] - base) << TOKEN_BITS) // room, left)
        end = self._warp(((self.rows[cluster, token + 1] - base) << TOKEN_BITS) // room, left)
        return begin, end - begin

    def find(self, slot: np.ndarray, cluster: np.ndarray, first: np.ndarray, left: np.ndarray) -> np.ndarray:
        """The token whose share ``slot`` lies in."""
        shift = TOKEN_BITS - 8
        row = left - 1
        segment = np.searchsorted(self.flat_order, slot + (row << TOKEN_BITS + 1), side="right") - 1
        segment = np.minimum(segment - row * (SEGMENTS + 1), SEGMENTS - 1)
        low = self.order[row, segment]
        slope = self.order[row, segment + 1] - low
        inside = np.minimum((((slot - low + 1) << shift) - 1) // slope, (1 << shift) - 1)
        place = (segment << shift) + inside
        base = self.rows[cluster, first]
        value = base + (((place + 1) * ((1 << self.bits) - base) - 1) >> TOKEN_BITS)
        return np.searchsorted(self.flat, value + (cluster << self.bits), side="right") - 1 - cluster * self.size


class _Table:
    """Codes a symbol by the frequencies of its context."""

    def __init__(self, weights: np.ndarray) -> None:
        self.rows = _cumulative(weights, TABLE_BITS)
        self.size = self.rows.shape[1]
        self.flat = (self.rows + (np.arange(len(self.rows), dtype=np.int64)[:, None] << TABLE_BITS + 1)).ravel()

    def span(self, context: np.ndarray, symbol: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        begin = self.rows[context, symbol]
        return begin, self.rows[context, symbol + 1] - begin

    def find(self, slot: np.ndarray, context: np.ndarray) -> np.ndarray:
        found = np.searchsorted(self.flat, slot + (context << TABLE_BITS + 1), side="right") - 1
        return found - context * self.size


def _remaining(levels: np.ndarray) -> np.ndarray:
    """How many tokens of a level are left from each place on, itself included; levels fall along the last axis."""
    left = np.ones(levels.shape, dtype=np.int64)
    for place in range(levels.shape[-1] - 2, -1, -1):
        left[..., place] += left[..., place + 1] * (levels[..., place] == levels[..., place + 1])
    return left


# -- the codec ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TopKCodec:
    """Codes the ``k`` likeliest of ``vocab_size`` tokens; ``error``: the KL it may cost, nats a position.

    Usage: ``codebook = codec.fit(top)`` once, then ``codec.encode(top, codebook)`` for every shard and
    ``codec.decode(arrays, rows, codebook)`` for some samples of one. All arrays are plain numbers: see
    `stillhouse.teachers.cache` for how they lie on disk.
    """

    k: int
    vocab_size: int
    error: float = 1e-4
    clusters: int = 64

    def __post_init__(self) -> None:
        if not 1 <= self.k <= min(self.vocab_size, 4096) or self.vocab_size >= 1 << 22:
            raise ConfigError(f"k={self.k}: must lie between 1 and the vocabulary of {self.vocab_size}, at most 4096")

    @property
    def levels(self) -> Levels:
        return Levels(self.k, self.error)

    def fit(self, top: TopK, *, most: int = 32768, rounds: int = 8) -> Arrays:
        """The codebook: token frequencies by cluster of positions, and frequencies of levels and of their steps."""
        index, level = self._sorted(top)
        index, level = index.reshape(-1, self.k), level.reshape(-1, self.k)
        random = np.random.default_rng(0)
        chosen = random.permutation(len(index))[:most]
        index, level = index[chosen], level[chosen]
        sets = self._sets(index)
        clusters = max(1, min(self.clusters, len(index) // 512))
        counts = np.asarray(sets[:clusters].todense())
        for _ in range(rounds):
            names = self._nearest(sets, counts)
            member = scipy.sparse.csr_matrix(
                (np.ones(len(names), np.float32), (names, np.arange(len(names)))), shape=(clusters, len(names))
            )
            counts = np.asarray((member @ sets).todense())
        higher = level[:, : max(1, self.k - 1)]
        edges = np.unique(np.quantile(higher, np.linspace(0, 1, 17)[1:-1]).astype(np.int64))
        sizes = self.levels.count
        context, step = self._contexts(level, edges), level[:, :-1] - level[:, 1:]
        steps = np.zeros((self._context_count(edges), sizes), np.int64)
        np.add.at(steps, (context.ravel(), step.ravel()), 1)
        packed = {
            "counts": _to_bytes(counts),
            "steps": _to_bytes(steps),
            "first": _to_bytes(np.bincount(level[:, 0], minlength=sizes)[None]),
            "names": _to_bytes(np.bincount(self._nearest(sets, counts), minlength=clusters)[None]),
        }
        return {**{name: _squeezed(array) for name, array in packed.items()}, "edges": edges}

    def encode(self, top: TopK, codebook: Arrays) -> dict[str, np.ndarray]:
        """The arrays of a shard: S samples of T positions each, all tensors (S, T, K) and (S, T)."""
        index, level = self._sorted(top)
        S, T, K = index.shape
        tables = self._tables(codebook)
        name = self._nearest(self._sets(index.reshape(-1, K)), tables.counts).reshape(S, T)
        begin, size = (np.empty((2 * K + 1, S, T), np.uint64) for _ in range(2))
        begin[0], size[0] = tables.names.span(np.zeros_like(name), name)
        begin[1], size[1] = tables.first.span(np.zeros_like(name), level[..., 0])
        context, step = self._contexts(level, codebook["edges"]), level[..., :-1] - level[..., 1:]
        left = _remaining(level)
        first = np.zeros(index.shape, np.int64)
        first[..., 1:] = np.where(step == 0, index[..., :-1] + 1, 0)
        for place in range(K):
            if place:
                begin[1 + place], size[1 + place] = tables.steps.span(context[..., place - 1], step[..., place - 1])
            one = (index[..., place], first[..., place], left[..., place])
            begin[1 + K + place], size[1 + K + place] = tables.tokens.span(name, *one)
        words, lengths, states = _write(begin, size, [TABLE_BITS] * (K + 1) + [TOKEN_BITS] * K)
        rest = np.clip(-top.log_rest / REST_STEP, 0, 65535)
        return {
            "words": words,
            "offsets": np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            "states": states,
            "rest": np.rint(rest).astype(np.uint16),
        }

    def decode(self, arrays: Arrays, codebook: Arrays, *, tables: Tables | None = None) -> TopK:
        """What `encode` was given, to the precision of the levels, tokens by falling level and rising number.

        ``arrays`` are those of some samples of a shard: their rows of "states" and "rest", their words one after the
        other, and "offsets" into these.
        """
        tables = tables or self._tables(codebook)
        reader = _Reader(arrays)
        S, T = arrays["rest"].shape
        index, level = (np.empty((S, T, self.k), np.int64) for _ in range(2))
        for part in reader.parts(T):
            shape = index[:, part].shape[:2]
            zero = np.zeros(shape, np.int64)

            def take(table: _Table, context: np.ndarray) -> np.ndarray:
                found = table.find(reader.slot(TABLE_BITS), context)
                reader.advance(TABLE_BITS, *table.span(context, found))
                return found

            name = take(tables.names, zero)
            levels, tokens = level[:, part], index[:, part]
            levels[..., 0] = take(tables.first, zero)
            for place in range(1, self.k):
                before = levels[..., place - 1]
                context = self._context(before, place, codebook["edges"])
                levels[..., place] = before - take(tables.steps, context)
            left = _remaining(levels)
            for place in range(self.k):
                first = zero
                if place:
                    same = levels[..., place] == levels[..., place - 1]
                    first = np.where(same, tokens[..., place - 1] + 1, 0)
                found = tables.tokens.find(reader.slot(TOKEN_BITS), name, first, left[..., place])
                reader.advance(TOKEN_BITS, *tables.tokens.span(name, found, first, left[..., place]))
                tokens[..., place] = found
        log_rest = -arrays["rest"].astype(np.float64) * REST_STEP
        return self._normalised(index, self.levels.values[level], log_rest)

    def tables(self, codebook: Arrays) -> Tables:
        """What `decode` looks things up in; worth keeping when many parts are decoded."""
        return self._tables(codebook)

    def _normalised(self, index: np.ndarray, log_p: np.ndarray, log_rest: np.ndarray) -> TopK:
        """The kept tokens share what the rest leaves, so that all is one."""
        if self.k == self.vocab_size:
            log_rest = np.full_like(log_rest, -np.inf)
        kept = np.log(-np.expm1(np.minimum(log_rest, -1e-12)))
        total = np.log(np.exp(log_p).sum(-1))
        return TopK(index, (log_p + (kept - total)[..., None]).astype(np.float32), log_rest.astype(np.float32))

    def _sorted(self, top: TopK) -> tuple[np.ndarray, np.ndarray]:
        index, log_p = top.tokens.astype(np.int64), top.log_p.astype(np.float64)
        if np.isnan(log_p).any() or (log_p > 1e-3).any() or np.isnan(top.log_rest).any():
            raise DataError("the teacher gave log-probabilities that are not numbers, or above 0; nothing was stored")
        if index.shape[-1] != self.k or index.min(initial=0) < 0 or index.max(initial=0) >= self.vocab_size:
            raise DataError(f"expected {self.k} tokens below {self.vocab_size} a position")
        level = self.levels.of(log_p)
        order = np.argsort(-level * (1 << 24) + index, axis=-1)
        return np.take_along_axis(index, order, -1), np.take_along_axis(level, order, -1)

    def _sets(self, index_NK: np.ndarray) -> scipy.sparse.csr_matrix:
        N, K = index_NK.shape
        ones, ends = np.ones(N * K, np.float32), np.arange(0, N * K + 1, K)
        return scipy.sparse.csr_matrix((ones, index_NK.ravel(), ends), shape=(N, self.vocab_size))

    def _nearest(self, sets: scipy.sparse.csr_matrix, counts_CV: np.ndarray) -> np.ndarray:
        """The cluster that codes each position shortest."""
        whole_V = counts_CV.sum(0) + 0.5
        smooth_CV = counts_CV + 32 * whole_V / whole_V.sum()
        cost_CV = np.log(smooth_CV / smooth_CV.sum(1, keepdims=True)).astype(np.float32)
        return np.concatenate(
            [np.argmax(sets[start : start + 65536] @ cost_CV.T, 1) for start in range(0, sets.shape[0], 65536)]
        )

    def _context(self, level: np.ndarray, place: int, edges: np.ndarray) -> np.ndarray:
        rank = min(place, 8) if place < 8 else 8 + min(7, int(np.log2(place / 8) * 2))
        return rank * (len(edges) + 1) + np.searchsorted(edges, level, side="right")

    def _contexts(self, level: np.ndarray, edges: np.ndarray) -> np.ndarray:
        """The context of every step between neighbours: rank, and how high the higher one is."""
        found = np.empty((*level.shape[:-1], self.k - 1), np.int64)
        for place in range(1, self.k):
            found[..., place - 1] = self._context(level[..., place - 1], place, edges)
        return found

    def _context_count(self, edges: np.ndarray) -> int:
        return 16 * (len(edges) + 1)

    def _tables(self, codebook: Arrays) -> Tables:
        sizes = self.levels.count
        counts = _from_bytes(_spread(codebook["counts"], self.vocab_size))
        whole = counts.sum(0)
        share = (whole << 16) // max(1, int(whole.sum()))
        bits = min(24, self.vocab_size.bit_length() + 6)
        weights = (counts << 8) + 32 * share + 1
        return Tables(
            counts=counts / 256,
            names=_Table(_from_bytes(_spread(codebook["names"], len(counts)))),
            first=_Table(_from_bytes(_spread(codebook["first"], sizes))),
            steps=_Table(_from_bytes(_spread(codebook["steps"], sizes))),
            tokens=_Tokens(_cumulative(weights, bits), bits, self.k),
        )


class Tables(NamedTuple):
    """A codebook, unpacked."""

    counts: np.ndarray
    names: _Table
    first: _Table
    steps: _Table
    tokens: _Tokens


def _squeezed(array: np.ndarray) -> np.ndarray:
    head = np.array([array.size], "<u8").view(np.uint8)
    return np.concatenate([head, np.frombuffer(pa.Codec("zstd", 12).compress(array.tobytes(), asbytes=True), np.uint8)])


def _spread(squeezed: np.ndarray, width: int) -> np.ndarray:
    size = int(squeezed[:8].copy().view("<u8")[0])
    raw = pa.decompress(squeezed[8:].tobytes(), decompressed_size=size, codec="zstd", asbytes=True)
    return np.frombuffer(raw, np.uint8).reshape(-1, width)


# -- range coding ---------------------------------------------------------------------------------------------------


def _lanes(positions: int) -> int:
    return -(-positions // LANE)


def _rounds(positions: int) -> Iterator[slice]:
    """The positions that all lanes work on at one time; fewer lanes in the last round."""
    lanes = _lanes(positions)
    for start in range(0, positions, lanes):
        yield slice(start, min(start + lanes, positions))


def _write(begin: np.ndarray, size: np.ndarray, bits: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Words of all samples one after the other, how many each has, and the lanes' last states (S, L)."""
    _, S, T = begin.shape
    state = np.full((S, _lanes(T)), _LOW, np.uint64)
    emitted, where = [], []
    for part in reversed(list(_rounds(T))):
        x = state[:, : part.stop - part.start]
        for symbol in range(len(bits) - 1, -1, -1):
            scale, start, room = np.uint64(bits[symbol]), begin[symbol, :, part], size[symbol, :, part]
            full = x >= room << (np.uint64(63) - scale)
            sample, _ = np.nonzero(full)
            emitted.append(x[full].astype(np.uint32))
            where.append(sample)
            x[...] = np.where(full, x >> _WORD, x)
            whole = x // room
            x[...] = (whole << scale) + (x - whole * room) + start
    words, samples = np.concatenate(emitted[::-1]), np.concatenate(where[::-1])
    order = np.argsort(samples, kind="stable")
    return words[order], np.bincount(samples, minlength=S), state


class _Reader:
    """The lanes of several samples, read side by side."""

    def __init__(self, arrays: Arrays) -> None:
        self.words = np.append(arrays["words"], np.uint32(0))
        self.next = arrays["offsets"][:-1].astype(np.int64)
        self.state = arrays["states"].astype(np.uint64)
        self.x = self.state

    def parts(self, positions: int) -> Iterator[slice]:
        for part in _rounds(positions):
            self.x = self.state[:, : part.stop - part.start]
            yield part

    def slot(self, bits: int) -> np.ndarray:
        return (self.x & np.uint64((1 << bits) - 1)).astype(np.int64)

    def advance(self, bits: int, begin: np.ndarray, size: np.ndarray) -> None:
        scale, mask = np.uint64(bits), np.uint64((1 << bits) - 1)
        x = size.astype(np.uint64) * (self.x >> scale) + (self.x & mask) - begin.astype(np.uint64)
        low = x < _LOW
        count = np.cumsum(low, axis=1)
        place = np.minimum(self.next[:, None] + count - 1, len(self.words) - 1)
        self.x[...] = np.where(low, (x << _WORD) | self.words[place].astype(np.uint64), x)
        self.next += count[:, -1]
