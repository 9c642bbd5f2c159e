"""What the loop costs: our `Train` against the same loop written by hand, at about 10 ms a step.

Both train the same student from the same teacher on the same batches, side by side in one process and in turns, and
must end with the same weights. Usage: python benchmarks/overhead.py [--steps N] [--rounds N] [--output FILE]
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from _measure import RESULTS, environment, print_table, write_json
from stillhouse import Batches, Observed, Player, Run, Term, Train, adamw, cosine
from stillhouse.base.files import read_json
from stillhouse.core.observed import Signal
from stillhouse.core.schedule import Progress

WIDTH, INPUTS, CLASSES, BATCH = 512, 256, 100, 176


def net(width: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    layers = [nn.Linear(INPUTS, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), nn.Linear(width, CLASSES)]
    return nn.Sequential(*layers)


def kl_divergence(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """The loss of both loops, so that nothing but the loops differs: KL at temperature 2."""
    with torch.no_grad():
        target = F.log_softmax(teacher / 2, -1)
    return 4 * F.kl_div(F.log_softmax(student / 2, -1), target, log_target=True, reduction="batchmean")


class KL(Term):
    def __init__(self, student: Signal, teacher: Signal) -> None:
        super().__init__(student=student, teacher=teacher.detach())

    def compute(self, *, student: torch.Tensor, teacher: torch.Tensor, **_: Any) -> torch.Tensor:
        return kl_divergence(student, teacher)


def by_hand(data: torch.Tensor, steps: int) -> tuple[float, nn.Module]:
    """A careful person's loop: KL, clipping, cosine learning rate, a loss printed now and then."""
    teacher, student = net(2 * WIDTH, 1).eval().requires_grad_(False), net(WIDTH, 0)
    matrices = [p for p in student.parameters() if p.ndim >= 2]
    vectors = [p for p in student.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.01}, {"params": vectors, "weight_decay": 0.0}], lr=1e-3
    )
    source, schedule = Batches(data, BATCH, gather=True), cosine(1.0, 0.0)
    losses = []
    begun = time.perf_counter()
    for step in range(steps):
        inputs = next(source)
        optimizer.zero_grad()
        with torch.no_grad():
            target = teacher(inputs)
        loss = kl_divergence(student(inputs), target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * schedule(Progress(step, steps))
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 9:
            statistics.mean(losses[-10:])
    return time.perf_counter() - begun, student


def ours(data: torch.Tensor, steps: int) -> tuple[float, nn.Module]:
    """The same as a stage; the time is the stage's own, from the first step to the last."""
    teacher, student = Observed(net(2 * WIDTH, 1), frozen=True), Observed(net(WIDTH, 0))
    objective = KL(student.output(), teacher.output())
    player = Player("student", student, objective, optimizer=adamw(1e-3), lr=cosine(1.0, 0.0), clip=1.0)
    with tempfile.TemporaryDirectory() as folder:
        run = Run(folder, quiet=True)
        stage = Train("student", player, source=Batches(data, BATCH, gather=True), steps=steps)
        run.execute([stage])
        record = read_json(Path(folder) / "stages/01-student/stage.json")
    return record["seconds"], student.module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path, default=RESULTS / "overhead.json")
    arguments = parser.parse_args()
    data = torch.randn(64 * BATCH, INPUTS, generator=torch.Generator().manual_seed(2))
    by_hand(data, 20)
    ours(data, 20)
    times: dict[str, list[float]] = {"hand": [], "ours": []}
    models: dict[str, nn.Module] = {}
    for number in range(arguments.rounds):
        pair = {"hand": by_hand, "ours": ours}
        for name in sorted(pair, reverse=bool(number % 2)):  # neither is always the first
            seconds, models[name] = pair[name](data, arguments.steps)
            times[name].append(seconds)
    theirs, mine = models["hand"], models["ours"]
    gap = max(float((a - b).detach().abs().max()) for a, b in zip(theirs.parameters(), mine.parameters(), strict=True))
    step = {name: 1000 * statistics.median(values) / arguments.steps for name, values in times.items()}
    ratio = statistics.median(o / h for o, h in zip(times["ours"], times["hand"], strict=True))
    print_table(
        ["loop", "ms a step", "ratio"],
        [["by hand", f"{step['hand']:.3f}", "1"], ["Train", f"{step['ours']:.3f}", f"{ratio:.4f}"]],
    )
    print(f"largest difference of the final weights: {gap:.1e}")
    result = {"ms_per_step": step, "ratio": ratio, "rounds": times, "steps": arguments.steps, "weight_difference": gap}
    write_json(arguments.output, {**result, **environment()})


if __name__ == "__main__":
    main()
