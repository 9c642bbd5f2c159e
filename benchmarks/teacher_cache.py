"""What a cached position costs and what it loses, beside DistillKit's scheme on the same log-probabilities.

Theirs, rebuilt from its documentation and configuration: token numbers packed in ceil(log2 V) bits, the first values in
bfloat16, the others as the least-squares fit of a few terms in their rank, in float32. Measured at K kept tokens on (a)
the embedded teacher reading the embedded text (V = 2,048), with the same model that sees 16 tokens at a time as a
student; (b) a synthetic teacher of V = 50,000: Zipf frequencies and a low-rank dependence on the token before. The
codebook is fitted on other positions than those measured, as in a cache of many shards.

Usage: python benchmarks/teacher_cache.py [--k 64] [--output FILE]
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from _measure import RESULTS, environment, print_table, write_json
from stillhouse.losses.sparse_divergence import bucketed
from stillhouse.teachers.cache import spread_evenly, top_k
from stillhouse.teachers.topk_codec import TopK, TopKCodec

CONFIGURATIONS: dict[str, tuple[int, list[int | str]]] = {  # their two recommendations: exact values, terms in the rank
    "DistillKit, recommended": (16, [0, 1, 2, 3, 4, "sqrt"]),
    "DistillKit, budget": (1, [0, 1, "sqrt"]),
}
Teacher = Callable[[], Iterator[tuple[Tensor, Tensor]]]


class Sums(NamedTuple):
    """Sums over positions: KL on K + 1 outcomes, KL on all, and the error of KL to a student on K + 1 outcomes."""

    coded: float = 0.0
    whole: float = 0.0
    student: float = 0.0
    student_absolute: float = 0.0
    positions: int = 0

    def __add__(self, other: tuple[Any, ...]) -> Sums:  # type: ignore[override]
        return Sums(*(a + b for a, b in zip(self, other, strict=True)))


def distillkit(exact: TopK, vocab_size: int, exact_k: int, terms: list[int | str]) -> tuple[TopK, float]:
    """What their scheme gives back, and its bytes a position; the rest is what is left of one."""
    k = exact.tokens.shape[-1]
    rank = torch.arange(k - exact_k, dtype=torch.float64)
    columns = torch.stack([rank.sqrt() if term == "sqrt" else rank ** int(term) for term in terms], -1)
    values = torch.from_numpy(exact.log_p)
    fitted = (values[..., exact_k:] @ torch.linalg.pinv(columns).T).float().double() @ columns.T
    log_p = torch.cat([values[..., :exact_k].to(torch.bfloat16).double(), fitted], -1)
    rest = (1 - log_p.exp().sum(-1)).clamp_min(1e-8)
    total = (log_p.exp().sum(-1) + rest).log()
    bits = math.ceil(math.log2(vocab_size))
    size = math.ceil(k * bits / 8) + 2 * exact_k + 4 * len(terms)
    return TopK(exact.tokens, (log_p - total[..., None]).numpy(), (rest.log() - total).numpy()), size


def errors(log_p: Tensor, log_q: Tensor, exact: TopK, found: TopK) -> Sums:
    """``log_p`` teacher, ``log_q`` student, both whole (..., V)."""
    tokens, values, rest = (torch.from_numpy(np.asarray(array)) for array in found)
    values, rest = values.double(), rest.double()
    kept = torch.cat([values, rest[..., None]], -1)
    target = bucketed(log_p, tokens)
    whole = spread_evenly(tokens, values, rest, log_p.shape[-1])
    student = bucketed(log_q, tokens)
    coded = (target.exp() * (target - kept)).sum(-1)
    gap = (kept.exp() * (kept - student)).sum(-1) - (target.exp() * (target - student)).sum(-1)
    all_of_it = (log_p.exp() * (log_p - whole)).sum(-1)
    return Sums(*(float(x.sum()) for x in (coded, all_of_it, gap, gap.abs())), positions=gap.numel())


def measure(teacher: Teacher, vocab_size: int, k: int, share_to_fit: int, grid: list[float]) -> dict[str, Any]:
    """Bytes and errors of every scheme; the first ``share_to_fit`` batches only fit the codebook."""
    fit, tested = [], []
    entropy = 0.0
    for number, (log_p, log_q) in enumerate(teacher()):
        top = top_k(log_p, k)
        (fit if number < share_to_fit else tested).append((top, log_p, log_q) if number >= share_to_fit else top)
        entropy -= float((log_p.exp() * log_p).sum(-1).mean())
    books = {}
    joined = TopK(*(np.concatenate(arrays) for arrays in zip(*fit, strict=True)))
    codecs = {f"ours, error={error:g}": TopKCodec(k, vocab_size, error) for error in grid}
    for name, codec in codecs.items():
        book = codec.fit(joined)
        books[name] = (codec, book, codec.tables(book))
    sums = {name: Sums() for name in ["top k as it is", *CONFIGURATIONS, *codecs]}
    sizes = dict.fromkeys(sums, 0.0)
    for top, log_p, log_q in tested:
        log_p, log_q = log_p.double().log_softmax(-1), log_q.double().log_softmax(-1)
        count = top.log_rest.size
        sums["top k as it is"] += errors(log_p, log_q, top, top)
        sizes["top k as it is"] += count * k * 8
        for name, (exact_k, terms) in CONFIGURATIONS.items():
            found, size = distillkit(top, vocab_size, exact_k, terms)
            sums[name] += errors(log_p, log_q, top, found)
            sizes[name] += count * size
        for name, (codec, book, tables) in books.items():
            arrays = codec.encode(top, book)
            sums[name] += errors(log_p, log_q, top, codec.decode(arrays, book, tables=tables))
            sizes[name] += sum(array.nbytes for array in arrays.values())
    rows = {
        name: {
            "bytes_per_position": sizes[name] / found.positions,
            "kl_of_coding": found.coded / found.positions,
            "kl_full_to_reconstructed": found.whole / found.positions,
            "student_kl_bias": found.student / found.positions,
            "student_kl_absolute_error": found.student_absolute / found.positions,
            "codebook_bytes": sum(a.nbytes for a in books[name][1].values()) if name in books else 0,
        }
        for name, found in sums.items()
    }
    theirs = rows["DistillKit, recommended"]
    equal = [name for name in books if rows[name]["kl_of_coding"] <= theirs["kl_of_coding"]]
    best = min(equal, key=lambda name: rows[name]["bytes_per_position"]) if equal else None
    return {
        "vocab_size": vocab_size,
        "k": k,
        "positions": sums["top k as it is"].positions,
        "positions_fitted": joined.log_rest.size,
        "teacher_entropy": entropy / (len(fit) + len(tested)),
        "schemes": rows,
        "at_no_more_kl": best,
        "bytes_ratio": rows[best]["bytes_per_position"] / theirs["bytes_per_position"] if best else None,
    }


@torch.no_grad()
def embedded() -> tuple[Teacher, int]:
    """The embedded teacher on its own training text."""
    from stillhouse.data.text import load_text
    from stillhouse.data.windows import tokenize_windows
    from stillhouse.models import load_causal_lm
    from stillhouse.workflow import run_system

    with tempfile.TemporaryDirectory() as folder:
        done = run_system("kd", {"steps": 1, "baseline": False}, output=folder, quiet=True)
        model, tokenizer = load_causal_lm(str(done.artifacts["teacher"].path))
    windows = tokenize_windows(load_text("demo"), tokenizer, window=128, validation=0.05, selection=0.03)

    @torch.no_grad()
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, 384, 16):
            ids = windows.train[list(range(start, start + 16))]["input_ids"]
            teacher = model(input_ids=ids).logits.log_softmax(-1)
            student = model(input_ids=ids.reshape(-1, 16)).logits.log_softmax(-1)
            yield teacher, student.view_as(teacher)

    return batches, len(tokenizer)


def synthetic(vocab_size: int = 50_000, width: int = 64, scale: float = 3.0) -> tuple[Teacher, int]:
    """Logits log Zipf + scale h . e_v / sqrt(width), h mostly the token before; the student sees a noisy h."""

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(0)
        frequency = -torch.log(torch.arange(vocab_size) + 10.0)[torch.randperm(vocab_size, generator=generator)]
        embedding, before = (torch.randn(vocab_size, width, generator=generator) for _ in range(2))
        for _ in range(64):
            last = torch.multinomial(frequency.exp(), 256, replacement=True, generator=generator)
            noise, other = (torch.randn(256, width, generator=generator) for _ in range(2))
            hidden = 0.8**0.5 * before[last] + 0.2**0.5 * noise
            near = 0.8**0.5 * hidden + 0.2**0.5 * other
            yield tuple(
                (frequency + scale * h @ embedding.T / width**0.5).log_softmax(-1)[None] for h in (hidden, near)
            )

    return batches, vocab_size


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--k", type=int, default=64)
    parser.add_argument("--output", type=Path, default=RESULTS / "teacher_cache.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    for name, (build, to_fit, grid) in {
        "embedded": (embedded, 12, [2e-3, 3e-4, 2e-4, 1e-4, 3e-5]),
        "synthetic": (synthetic, 56, [2e-3, 3e-4, 2e-4, 1e-4, 3e-5]),
    }.items():
        teacher, vocab_size = build()
        found = result[name] = measure(teacher, vocab_size, arguments.k, to_fit, grid)
        print(
            f"\n{name}: V = {vocab_size:,}, {found['positions']:,} positions, {found['teacher_entropy']:.2f} nats each"
        )
        keys = ["bytes_per_position", "kl_of_coding", "kl_full_to_reconstructed", "student_kl_bias"]
        header = ["scheme", "bytes", "KL, K + 1", "KL, all", "KL to student", "|error|"]
        keys.append("student_kl_absolute_error")
        print_table(header, [[s, *(f"{row[key]:.6f}" for key in keys)] for s, row in found["schemes"].items()])
        print(f"at no more KL: {found['at_no_more_kl']}, bytes x {found['bytes_ratio'] or math.nan:.3f}")
    write_json(arguments.output, {**result, **environment("numpy", "pyarrow")})


if __name__ == "__main__":
    main()
