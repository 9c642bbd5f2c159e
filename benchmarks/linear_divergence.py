"""Memory and time of ``linear_divergence`` beside TRL's Jensen-Shannon loss and the two-line KL.

    python benchmarks/linear_divergence.py

All start from the same hidden states and output layers and end with gradients of the student's hidden states and
output weight. The others form full logits by a matrix product, the teacher's without gradient. Shapes: N tokens,
V vocabulary, D student width, E teacher width.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import _measure
from stillhouse.losses import ForwardKL, JensenShannon, linear_divergence

# (ours, theirs): the largest ratio of peak memory and of time that design.md section 4 asks for.
TARGETS = {
    ("ours: Jensen-Shannon", "TRL: generalized_jsd_loss"): (0.08, 0.5),
    ("ours: forward KL", "two-line KL"): (0.2, 1.0),
}


@dataclass(frozen=True)
class Size:
    tokens: int = 1024
    vocabulary: int = 50_000
    student_width: int = 256
    teacher_width: int = 512


class Problem:
    """Hidden states and output layers, and every way to the loss and its gradients."""

    def __init__(self, size: Size, device: str) -> None:
        random = torch.Generator().manual_seed(0)

        def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
            return (scale * torch.randn(rows, columns, generator=random)).to(device)

        D, E = size.student_width, size.teacher_width
        self.hidden_ND = normal(size.tokens, D).requires_grad_()
        self.weight_VD = normal(size.vocabulary, D, D**-0.5).requires_grad_()
        self.teacher_hidden_NE = normal(size.tokens, E)
        self.teacher_weight_VE = normal(size.vocabulary, E, E**-0.5)

    def ways(self, device: str) -> dict[str, Callable[[], Tensor]]:
        ways: dict[str, Callable[[], Tensor]] = {
            "ours: Jensen-Shannon": lambda: self.fused(JensenShannon(beta=0.5)),
            "ours: forward KL": lambda: self.fused(ForwardKL()),
            "two-line KL": self.two_line_kl,
        }
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        try:
            from trl.experimental.gkd import GKDTrainer
        except ImportError:
            print("TRL is not installed (pip install trl): its loss is left out")
        else:
            ways["TRL: generalized_jsd_loss"] = lambda: GKDTrainer.generalized_jsd_loss(*self.logits(), beta=0.5)
        if device != "cpu":
            try:
                from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
            except ImportError:
                print("Liger Kernel is not installed (pip install liger-kernel): its loss is left out")
            else:
                liger = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.5)
                labels_N = torch.zeros(len(self.hidden_ND), dtype=torch.long, device=device)
                ways["Liger: chunked JSD"] = lambda: liger(
                    self.hidden_ND,
                    self.weight_VD,
                    self.teacher_hidden_NE,
                    self.teacher_weight_VE,
                    labels_N,
                    None,
                    None,
                )
        return ways

    def fused(self, divergence: ForwardKL | JensenShannon) -> Tensor:
        return linear_divergence(
            self.hidden_ND,
            self.weight_VD,
            self.teacher_hidden_NE,
            self.teacher_weight_VE,
            divergence=divergence,
        ).loss

    def logits(self) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            teacher_logits_NV = self.teacher_hidden_NE @ self.teacher_weight_VE.T
        return self.hidden_ND @ self.weight_VD.T, teacher_logits_NV

    def two_line_kl(self) -> Tensor:
        student_logits_NV, teacher_logits_NV = self.logits()
        return F.kl_div(
            F.log_softmax(student_logits_NV, -1),
            F.log_softmax(teacher_logits_NV, -1),
            log_target=True,
            reduction="batchmean",
        )

    def step(self, way: Callable[[], Tensor]) -> Callable[[], None]:
        def run() -> None:
            self.hidden_ND.grad = self.weight_VD.grad = None
            way().backward()

        return run

    def answer(self, way: Callable[[], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        loss = way()
        grads = torch.autograd.grad(loss, (self.hidden_ND, self.weight_VD))
        return loss.detach(), *grads


def measure(size: Size, device: str, repeats: int, patience: float) -> dict[str, object]:
    """Measure every way on one device; print the table and return the figures."""
    problem = Problem(size, device)
    ways = problem.ways(device)
    steps = {name: problem.step(way) for name, way in ways.items()}
    timing = _measure.time_alternated(steps, repeats=repeats, patience=patience, device=device)
    figures: dict[str, dict[str, object]] = {}
    for name, step in steps.items():
        # A clean .grad first, so that no way profits from freeing another's.
        problem.hidden_ND.grad = problem.weight_VD.grad = None
        figures[name] = {
            "loss": ways[name]().item(),
            "seconds": timing.seconds[name],
            "median_seconds": timing.median(name),
            "peak_allocated_bytes": _measure.peak_allocated(step, device),
        }
        if device == "cpu":
            problem.hidden_ND.grad = problem.weight_VD.grad = None
            figures[name]["peak_resident_bytes"], figures[name]["resident_method"] = _measure.peak_resident(step)
    problem.hidden_ND.grad = problem.weight_VD.grad = None
    _measure.print_table(
        [f"on {device}", "seconds", "allocated MiB", "resident MiB", "loss"],
        [
            [
                name,
                figure["median_seconds"],
                round(figure["peak_allocated_bytes"] / _measure.MIB),
                round(figure["peak_resident_bytes"] / _measure.MIB) if "peak_resident_bytes" in figure else "-",
                figure["loss"],
            ]
            for name, figure in figures.items()
        ],
    )
    ratios = []
    pairs = dict(TARGETS)
    if "Liger: chunked JSD" in ways:
        pairs["ours: Jensen-Shannon", "Liger: chunked JSD"] = (None, None)
    for (ours, theirs), (memory_target, time_target) in pairs.items():
        if theirs not in ways:
            continue
        answers = [problem.answer(ways[name]) for name in (ours, theirs)]
        ratio: dict[str, object] = {"ours": ours, "theirs": theirs}
        for kind in ("allocated", "resident"):
            if f"peak_{kind}_bytes" in figures[ours]:
                mine, other = (figures[name][f"peak_{kind}_bytes"] for name in (ours, theirs))
                ratio[f"{kind}_memory"] = mine / other
        ratio |= {
            "time": timing.ratio(ours, theirs),
            "memory_target": memory_target,
            "time_target": time_target,
            "largest_relative_difference": max(
                ((a - b).abs().max() / b.abs().max()).item() for a, b in zip(*answers, strict=True)
            ),
        }
        if memory_target is not None:
            worst_memory = max(ratio["allocated_memory"], ratio.get("resident_memory", 0.0))
            ratio["met"] = worst_memory <= memory_target and ratio["time"] <= time_target
        ratios.append(ratio)
    print(f"{timing.summary()}\n")
    _measure.print_table(
        ["ratio", "allocated", "resident", "target", "time", "target", "difference", "met"],
        [
            [
                f"{r['ours']} / {r['theirs']}",
                r["allocated_memory"],
                r.get("resident_memory", "-"),
                r["memory_target"] or "-",
                r["time"],
                r["time_target"] or "-",
                f"{r['largest_relative_difference']:.1e}",
                r.get("met", "-"),
            ]
            for r in ratios
        ],
    )
    return {"figures": figures, "others_share_of_machine": timing.others, "ratios": ratios}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument(
        "--patience", type=float, default=60.0, help="seconds to wait, before each round, for a quiet machine"
    )
    parser.add_argument("--output", type=Path, default=_measure.RESULTS / "linear_divergence.json")
    for field, default in asdict(Size()).items():
        parser.add_argument(f"--{field.replace('_', '-')}", type=int, default=default)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    size = Size(**{field: getattr(arguments, field) for field in asdict(Size())})
    payload: dict[str, object] = {
        "benchmark": "linear_divergence",
        "size": asdict(size),
        "dtype": "float32",
        "environment": _measure.environment("trl", "transformers", "liger-kernel"),
        "memory": _measure.__doc__,
    }
    payload["cpu"] = measure(size, "cpu", arguments.repeats, arguments.patience)
    if torch.cuda.is_available():
        print()
        payload["cuda"] = measure(size, "cuda", arguments.repeats, arguments.patience)
    else:
        print("\nno GPU here")
    _measure.write_json(arguments.output, payload)


if __name__ == "__main__":
    main()
