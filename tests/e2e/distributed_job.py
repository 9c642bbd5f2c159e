"""A job for `test_distributed`: trains small models under a strategy and writes the weights it ends with.

Usage: distributed_job.py FOLDER STAGE STRATEGY DEVICES
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stillhouse import (
    EMA,
    Batches,
    CrossEntropy,
    FeatureMSE,
    KLDivergence,
    Observed,
    Player,
    Run,
    Term,
    Train,
    adamw,
    cosine,
    sgd,
)
from stillhouse.base.files import save_tree
from stillhouse.base.sharded import full
from stillhouse.core.engine import Engine
from stillhouse.core.train import Players


class Net(nn.Module):
    """Blocks in a ``ModuleList``, as transformers have them: each is one FSDP2 unit."""

    def __init__(self, width: int, depth: int, inputs: int = 6, outputs: int = 5) -> None:
        super().__init__()
        self.stem = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth))
        self.head = nn.Linear(width, outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.stem(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.head(hidden)


class Mean(Term):
    """The mean of a function of signals: enough to write adversarial players with."""

    def __init__(self, function: Any, **signals: Any) -> None:
        super().__init__(**signals)
        self.function = function

    def compute(self, *, batch: Any, progress: Any, **values: Any) -> Tensor:
        return self.function(batch=batch, **values).mean()


def one_player() -> tuple[Players, Any, list[nn.Module]]:
    """KD with a feature term: the projection is the objective's own parameter."""
    torch.manual_seed(0)
    teacher, student = Observed(Net(16, 3), frozen=True), Observed(Net(8, 2))
    objective = KLDivergence(student.output("logits"), teacher.output("logits"), temperature=2.0) + 0.1 * FeatureMSE(
        student.tap("blocks.0"), teacher.tap("blocks.1"), project="linear"
    )
    data = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    player = Player("student", student, objective, optimizer=adamw(1e-2), lr=cosine(1, 0), clip=1.0)
    return player, Batches(data, 8, gather=True), [student.module]


def plain() -> tuple[Players, Any, list[nn.Module]]:
    """KD without a projection: what DeepSpeed can train."""
    torch.manual_seed(0)
    teacher, student = Observed(Net(16, 3), frozen=True), Observed(Net(8, 2))
    objective = KLDivergence(student.output("logits"), teacher.output("logits"), temperature=2.0)
    data = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    player = Player("student", student, objective, optimizer=adamw(1e-2), lr=cosine(1, 0), clip=1.0)
    return player, Batches(data, 8, gather=True), [student.module]


def three_players() -> tuple[Players, Any, list[nn.Module]]:
    """Generator, critic and discriminator at different cadences; the generator's gradient flows through the others."""
    torch.manual_seed(0)
    generator, critic, judge = (Observed(Net(8, 2, 6, 6)), Observed(Net(8, 1, 6, 6)), Observed(Net(8, 1, 6, 1)))
    generator.name, critic.name, judge.name = "generator", "critic", "judge"

    fakes = generator.output()

    def through(model: Observed) -> Any:
        return model.view("fake", feed={"inputs": fakes}).output()

    fixed_fakes = fakes.detach()

    def fixed(model: Observed) -> Any:
        return model.view("fixed fake", feed={"inputs": fixed_fakes}).output()

    softplus = nn.functional.softplus
    fool = Mean(lambda judged, **_: softplus(-judged), judged=through(judge), name="fool")
    follow = Mean(lambda score, **_: score.square(), score=through(critic), name="follow")
    anchor = Mean(lambda out, batch: (out - 1).square(), out=generator.output(), name="anchor")
    track = Mean(lambda score, batch: (score - batch["inputs"]).square(), score=fixed(critic), name="track")
    tell = Mean(
        lambda real, fake, **_: softplus(-real) + softplus(fake), real=judge.output(), fake=fixed(judge), name="tell"
    )
    players = [
        Player("critic", critic, track, optimizer=adamw(1e-2), repeats=2),
        Player("judge", judge, tell, optimizer=sgd(0.05), clip=1.0),
        Player(
            "generator",
            generator,
            fool + 0.1 * follow + anchor,
            optimizer=adamw(1e-2),
            every=3,
            ema=EMA(generator.module, 0.9),
        ),
    ]
    data = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    return players, Batches(data, 8, gather=True), [generator.module, critic.module, judge.module]


def language() -> tuple[Players, Any, list[nn.Module]]:
    """KD of a causal LM from hidden states: forwards end before the output heads, whose matrices are read as taps."""
    from transformers import LlamaConfig

    from stillhouse.losses.divergences import JensenShannon
    from stillhouse.models.causal_lm import new_causal_lm
    from stillhouse.objectives import TokenMatch, head_of

    def model(width: int, seed: int) -> nn.Module:
        config = LlamaConfig(
            vocab_size=64, hidden_size=width, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
        )
        return new_causal_lm(config, seed=seed)

    teacher = Observed(model(32, 1), frozen=True, options={"use_cache": False})
    student = Observed(model(16, 0), options={"use_cache": False})
    objective = TokenMatch(head_of(student), head_of(teacher), JensenShannon(beta=0.3), cross_entropy=0.5)
    ids = torch.randint(0, 64, (32, 12), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row} for row in ids]
    return Player("student", student, objective, optimizer=adamw(1e-2), clip=1.0), Batches(data, 8), [student.module]


def few_labels() -> tuple[Players, Any, list[nn.Module]]:
    """Labels on every fourth row only, a row a process: most have none. One process does two rows, one by one."""
    torch.manual_seed(0)
    student = Observed(Net(8, 2))
    objective = CrossEntropy(student.output("logits"))
    inputs = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
    data = [{"inputs": row, "labels": torch.tensor(-100 if i % 4 else i % 5)} for i, row in enumerate(inputs)]
    size = int(os.environ.get("WORLD_SIZE", "1"))
    return Player("student", student, objective, optimizer=sgd(0.1)), Batches(data, size), [student.module]


JOBS = {"one": one_player, "plain": plain, "three": three_players, "language": language, "few labels": few_labels}


def deepspeed_on_cpu() -> None:
    """Fabric lets DeepSpeed run on CUDA only; DeepSpeed itself runs on a CPU too, so here its check is passed."""
    from lightning_fabric.accelerators import CPUAccelerator
    from lightning_fabric.strategies import deepspeed as strategy

    os.environ |= {"DS_ACCELERATOR": "cpu", "DS_IGNORE_CUDA_DETECTION": "1"}
    importlib.import_module("deepspeed")
    backend: Any = sys.modules["deepspeed.comm.torch"]  # the attribute of this name is torch itself
    backend.build_shm_op = lambda: None  # would compile C++ for a faster gloo
    strategy.CUDAAccelerator = CPUAccelerator
    strategy._validate_device_index_selection = lambda devices: None
    strategy.DeepSpeedStrategy.root_device = property(lambda self: torch.device("cpu", 0))


def main(folder: str, job: str, strategy: str, devices: str, steps: str = "12") -> None:
    torch.set_num_threads(1)
    players, source, modules = JOBS[job]()
    if strategy == "deepspeed":
        deepspeed_on_cpu()
    engine = Engine(accelerator="cpu", devices=int(devices), strategy=strategy)
    run = Run(folder, engine=engine, quiet=True)

    def probe() -> dict[str, float]:
        crash = Path(folder) / "crash"
        if crash.exists():
            run.fabric.barrier()
            crash.unlink(missing_ok=True)
            raise RuntimeError("as the test asked")
        return {"probe": float(sum(full(p.detach()).sum() for p in modules[0].parameters()))}

    def stages() -> Any:
        yield Train(
            job,
            players,
            source=source,
            steps=int(steps),
            accumulate=2 if job in ("one", "plain") or (job == "few labels" and devices == "1") else 1,
            checkpoint_every=5,
            log_every=4,
            evaluate=probe,
            eval_every=6,
        )

    run.execute(stages())
    state = [full(module.state_dict()) for module in modules]
    if run.main:
        save_tree(Path(folder) / "end", state)


if __name__ == "__main__":
    main(*sys.argv[1:])
