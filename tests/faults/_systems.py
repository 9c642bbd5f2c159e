"""Small systems that hold all that a resume could get wrong, and the children that run them.

Children come from one warm process (a fork server, see ``conftest.py``), so starting one takes milliseconds.
A `Trap` kills a child at a chosen instant: before or after the n-th call of a function, or before the n-th line of
Stillhouse that it executes. Also a system file as a user has one: ``stillhouse run tests/faults/_systems.py ...``.
"""

from __future__ import annotations

import importlib
import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import psutil
import pyarrow.parquet
import torch
from safetensors.torch import save_file, save_model
from torch import Tensor, nn

import stillhouse
from stillhouse.base.errors import StillhouseError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact, Saver
from stillhouse.core.ema import EMA
from stillhouse.core.engine import Engine
from stillhouse.core.objective import Objective, Term
from stillhouse.core.observed import Observed
from stillhouse.core.player import Player, adamw, sgd
from stillhouse.core.run import Run
from stillhouse.core.schedule import cosine, linear
from stillhouse.core.stage import Evaluate, Generate, Stage, Transform
from stillhouse.core.system import Meta, System
from stillhouse.core.train import Train
from stillhouse.data.sources import Batches, Drawn
from stillhouse.losses.divergences import InterpolatedForwardKL
from stillhouse.objectives.adaptive import MomentumRamp
from stillhouse.objectives.features import FeatureMSE
from stillhouse.objectives.logits import CrossEntropy, KLDivergence, LogitMatch

FEATURES, CLASSES = 6, 4
Stages = Generator[Stage, Artifact, None]


# -- the systems ----------------------------------------------------------------------------------------------------


def net(*widths: int, norm: bool = False, dropout: float = 0.0) -> nn.Sequential:
    """A small network whose first layer is called ``0``."""
    first, *rest = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    extra = [nn.BatchNorm1d(widths[1])] if norm else []
    return nn.Sequential(first, *extra, nn.ReLU(), nn.Dropout(dropout), *rest)


def labelled(count: int = 40) -> list[tuple[Tensor, int]]:
    """The same data for every seed of a run."""
    inputs = torch.randn(count, FEATURES, generator=torch.Generator().manual_seed(3))
    return [(row, int(row[:CLASSES].argmax())) for row in inputs]


class Mean(Term):
    """The mean of a function of signals and the batch."""

    def __init__(self, function: Callable[..., Tensor], **signals: Any) -> None:
        super().__init__(**signals)
        self.function = function

    def compute(self, *, progress: Any, **values: Any) -> Tensor:
        return self.function(**values).mean()


def save_all(*players: Player) -> Saver:
    """Writes the result and, beside it, everything else that training left: the other models, objectives, EMA."""

    def save(model: nn.Module, folder: Path) -> None:
        save_model(model, str(folder / "model.safetensors"))
        state = {"random": torch.get_rng_state(), "python": torch.tensor(random.getstate()[1])}
        for player in players:
            parts: list[nn.Module] = [player.objective, *(m.module for m in player.trained)]
            parts += [player.ema.module] if player.ema else []
            for index, part in enumerate(parts):
                state |= {f"{player.name}.{index}.{name}": t.clone() for name, t in part.state_dict().items()}
        save_file(state, folder / "state.safetensors")

    return save


@dataclass(kw_only=True)
class Small(System):
    meta = Meta(title="Small systems", domain="tests", family="tests")

    plot: Annotated[str, "which of the functions below makes the stages"] = "kd"
    steps: int = 12
    every: Annotated[int, "steps between checkpoints"] = 3
    width: int = 8
    lr: float = 0.02
    alpha: float = 0.5
    pause: Annotated[float, "seconds that a batch takes"] = 0.0
    bad_step: Annotated[int, "when numbers go bad"] = -1
    table: str = "a"

    def stages(self, run: Run) -> Stages:
        yield from PLOTS[self.__dict__["plot"]](self, run)

    def train(self, name: str, players: Sequence[Player], source: Any = None, **options: Any) -> Train:
        """A `Train` stage that logs and saves often."""
        options = {"checkpoint_every": self.every, "log_every": 4, "save": save_all(*players), **options}
        return Train(name, players, source=source, steps=self.steps, **options)

    def batches(self, size: int = 8) -> Batches:
        def collate(rows: Any) -> Any:
            time.sleep(self.pause)
            return torch.utils.data.default_collate(rows)

        return Batches(labelled(), size, collate=collate)


def figures(model: nn.Module, teacher: nn.Module) -> Callable[[], dict[str, float]]:
    """An evaluation that also draws a random number, which must not change the run."""
    probe = torch.randn(16, FEATURES)

    def measure() -> dict[str, float]:
        loss = (model(probe) - teacher(probe)).square().mean()
        return {"loss": float(loss), "noise": float(torch.rand(()))}

    return measure


def kd(self: Small, run: Run) -> Stages:
    """One player: dropout, schedules, accumulation, clipping, a projection with its own weights, the best weights."""
    teacher = Observed(net(FEATURES, 12, CLASSES), frozen=True)
    student = Observed(net(FEATURES, self.width, CLASSES, dropout=0.3))
    objective = (
        KLDivergence(student.output(), teacher.output(), temperature=linear(4.0, 1.0))
        + self.alpha * CrossEntropy(student.output())
        + 0.1 * FeatureMSE(student.tap("0"), teacher.tap("0"), project="linear")
    )
    player = Player("student", student, objective, optimizer=adamw(self.lr), lr=cosine(1.0, 0.0, warmup=0.2), clip=0.5)
    evaluate = figures(student.module, teacher.module)
    yield self.train("student", [player], self.batches(), accumulate=2, evaluate=evaluate, eval_every=4, best="loss")


def players(self: Small, run: Run) -> Stages:
    """Three players with cadences, repeats, sources of their own and an EMA that is the result."""
    maker, critic, judge = (
        Observed(net(3, 8, FEATURES), name="maker"),
        Observed(net(FEATURES, 8, FEATURES, dropout=0.2), name="critic"),
        Observed(net(FEATURES, 8, 1), name="judge"),
    )

    def fool(made: Tensor, batch: Any) -> Tensor:
        return nn.functional.softplus(-judge.module(made)) + critic.module(made).square()

    def tell(real: Tensor, batch: Any) -> Tensor:
        fake = judge.module(maker.module(torch.randn(8, 3)).detach())
        return nn.functional.softplus(-real) + nn.functional.softplus(fake)

    sides = [
        Player(
            "maker",
            maker,
            Mean(fool, made=maker.output()),
            optimizer=adamw(self.lr),
            every=3,
            ema=EMA(maker.module, linear(0.5, 0.9)),
            source=Drawn(lambda generator: torch.randn(8, 3, generator=generator), seed=1),
        ),
        Player(
            "critic",
            critic,
            Mean(lambda score, batch: (score - batch["inputs"]).square(), score=critic.output()),
            optimizer=adamw(self.lr),
            every=2,
            source=Drawn(lambda generator: torch.randn(8, FEATURES, generator=generator), seed=2),
        ),
        Player(
            "judge",
            judge,
            Mean(tell, real=judge.output()),
            optimizer=sgd(self.lr),
            repeats=2,
            clip=1.0,
            ema=EMA(judge.module, 0.8),
        ),
    ]
    yield self.train("maker", sides, self.batches())


def mutual(self: Small, run: Run) -> Stages:
    """Two players that teach each other at the same time, on a shuffled ``DataLoader`` that has no seed."""
    left = Observed(net(FEATURES, 8, CLASSES, dropout=0.2), name="left")
    right = Observed(net(FEATURES, 12, CLASSES, dropout=0.2), name="right")

    def side(me: Observed, other: Observed) -> Player:
        objective = CrossEntropy(me.output()) + linear(0.0, 1.0) * KLDivergence(me.output(), other.output())
        return Player(me.name, me, objective, optimizer=adamw(self.lr))

    loader = torch.utils.data.DataLoader(labelled(), batch_size=8, shuffle=True)
    yield self.train("mutual", [side(left, right), side(right, left)], loader, together=True)


def adaptive(self: Small, run: Run) -> Stages:
    """A temperature of the target that the loss drives, and running statistics of batch normalisation."""
    teacher = Observed(net(FEATURES, 12, CLASSES), frozen=True)
    student = Observed(net(FEATURES, 8, CLASSES, norm=True))
    ramp = MomentumRamp(0.2, 0.9, alpha=0.1, beta=0.5)
    objective = LogitMatch(student.output(), teacher.output(), InterpolatedForwardKL(t=0.2), t=ramp)
    player = Player("student", student, objective, optimizer=adamw(self.lr), ema=EMA(student.module, 0.9))
    yield self.train("student", [player], self.batches())


def patience(self: Small, run: Run) -> Stages:
    """Stops early: the figure that is watched has got worse, in the very step of a checkpoint."""
    student = Observed(net(FEATURES, 8, CLASSES))
    first = student.module[0].weight.detach().clone()
    player = Player("student", student, CrossEntropy(student.output()), optimizer=sgd(self.lr))
    yield self.train(
        "student",
        [player],
        self.batches(),
        evaluate=lambda: {"way": float((student.module[0].weight - first).norm())},
        eval_every=self.every,
        best="way",
        patience=2,
    )


def pipeline(self: Small, run: Run) -> Stages:
    """Train a teacher, let it answer questions, train a student on the answers, compare them."""
    teacher = Observed(net(FEATURES, 12, CLASSES, dropout=0.1))
    player = Player("teacher", teacher, CrossEntropy(teacher.output()), optimizer=adamw(self.lr))
    trained = yield self.train("teacher", [player], self.batches())
    oracle = trained.load_into(net(FEATURES, 12, CLASSES)).eval()

    def answer(question: list[float]) -> dict[str, Any] | None:
        with (run.folder / "asked.txt").open("a") as asked:
            asked.write(json.dumps(question) + "\n")
        with torch.no_grad():
            logits = oracle(torch.tensor([question]))[0]
        return {"question": question, "answer": logits.tolist()} if question[0] > -1.5 else None

    questions = torch.randn(10, FEATURES).tolist()
    data = yield Generate("answers", {f"q{i}": question for i, question in enumerate(questions)}, answer)
    rows = pyarrow.parquet.read_table(data.data_file()).to_pylist()
    examples = [{"inputs": torch.tensor(r["question"]), "answer": torch.tensor(r["answer"])} for r in rows]
    student = Observed(net(FEATURES, 8, CLASSES, dropout=0.1))
    match = Mean(lambda out, batch: (out - batch["answer"]).square(), out=student.output())
    player = Player("student", student, match, optimizer=adamw(self.lr))
    copied = yield self.train("student", [player], Batches(examples, 4))
    copy = copied.load_into(net(FEATURES, 8, CLASSES)).eval()
    probe = torch.randn(32, FEATURES)
    same = float((oracle(probe).argmax(1) == copy(probe).argmax(1)).float().mean())
    yield Evaluate(
        "evaluation", lambda _: Table("Agreement", [Column("same", "same")], [{"name": "student", "same": same}])
    )


def nan(self: Small, run: Run) -> Stages:
    """Two terms; one of them becomes NaN in a step, or only its gradient does."""
    student = Observed(net(FEATURES, 8, CLASSES))
    step = -1

    def wild(out: Tensor, batch: Any) -> Tensor:
        nonlocal step
        step += 1
        if self.alpha < 0:  # sqrt is finite at 0; its slope is not
            return (out * (step != self.bad_step)).abs().sum(1).sqrt()
        return out.square() * (float("nan") if step == self.bad_step else 1.0)

    objective: Objective = CrossEntropy(student.output()).named("tame") + 0.1 * Mean(wild, out=student.output())
    objective.terms[1].inner.name = "wild"
    player = Player("student", student, objective, optimizer=adamw(self.lr))
    yield self.train("student", [player], self.batches())


def three(self: Small, run: Run) -> Stages:
    """Three stages that read different fields: ``width``; ``lr``, and ``alpha`` late in training; ``table``."""
    made = yield Transform("make", lambda _: net(FEATURES, self.width, CLASSES))
    student = Observed(made.load_into(net(FEATURES, self.width, CLASSES)))
    objective = Mean(lambda out, batch: out.square() * self.alpha, out=student.output())
    player = Player("student", student, objective, optimizer=sgd(self.lr))
    yield Train("train", player, source=Batches(labelled(), 8), steps=4, checkpoint_every=1)
    yield Evaluate("table", lambda _: {"table": self.table})


def shared(self: Small, run: Run) -> Stages:
    """A teacher that all runs share, and a student."""
    cache = {"steps": self.steps}

    def teach() -> Player:
        with (run.folder.parent / "taught.txt").open("a") as log:
            log.write(f"{run.folder.name}\n")
        teacher = Observed(net(FEATURES, 8, CLASSES, dropout=0.1))
        return Player("teacher", teacher, CrossEntropy(teacher.output()), optimizer=adamw(self.lr))

    trained = yield Train(
        "teacher", teach, source=self.batches(), steps=self.steps, checkpoint_every=self.every, cache=cache
    )
    teacher = Observed(trained.load_into(net(FEATURES, 8, CLASSES)), frozen=True)
    student = Observed(net(FEATURES, 8, CLASSES))
    player = Player("student", student, KLDivergence(student.output(), teacher.output()))
    yield Train("student", player, source=Batches(labelled(), 8), steps=3)


PLOTS: dict[str, Callable[[Small, Run], Stages]] = {
    plot.__name__: plot for plot in (kd, players, mutual, adaptive, patience, pipeline, nan, three, shared)
}


# -- children -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trap:
    """Strikes a child at the ``at``-th call of ``target`` (``module:name``), or before the ``at``-th ``line``.

    ``at=0`` only counts. A strike is a ``signal`` sent ``times`` times, or a file ``fill`` that fills the disk.
    """

    target: str
    at: int = 0
    when: Literal["before", "after"] = "before"
    signal: int = signal.SIGKILL
    times: int = 1
    fill: str | None = None


@dataclass
class Job:
    """A run of `Small` in ``home/run`` that can be killed and gone on with."""

    home: Path
    plot: str
    values: dict[str, Any] = field(default_factory=dict)
    seed: int = 0
    largest_file: int | None = None
    fresh: bool = False
    command: list[str] | None = None  # of the command line, instead of a `Run`
    cache: Path | None = None
    name: str = "run"
    place: tuple[int, int] = (0, 0)  # which of two processes this is, and their port

    @property
    def folder(self) -> Path:
        return self.home / self.name

    def start(self, trap: Trap | None = None) -> Any:
        """Start a child; it ends with exit code 0, 2 after an error (see `said`), or a negative signal."""
        self.home.mkdir(parents=True, exist_ok=True)
        self._words.write_text("")
        self._count.unlink(missing_ok=True)
        process = multiprocessing.get_context("forkserver").Process(target=_child, args=(self, trap), daemon=True)
        process.start()
        return process

    def go(self, trap: Trap | None = None) -> int:
        """Run a child to its end; its exit code."""
        process = self.start(trap)
        process.join(120)
        assert process.exitcode is not None, "the child hangs"
        return process.exitcode

    def stopped_by(self, trap: Trap) -> Any:
        """A child that has stopped itself in the trap, with SIGSTOP: it lives, holds its locks and does nothing."""
        process = self.start(replace(trap, signal=signal.SIGSTOP))
        while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
            time.sleep(0.002)
            assert process.exitcode is None, self.said
        return process

    @property
    def _words(self) -> Path:
        return self.home / f"{self.folder.name}.{self.place[0]}.stderr"

    @property
    def _count(self) -> Path:
        return self.home / f"{self.folder.name}.count"

    @property
    def said(self) -> str:
        """What the last child wrote to stderr."""
        return self._words.read_text()

    def count(self, target: str) -> int:
        """Run to the end; how often ``target`` came up."""
        assert self.go(Trap(target)) == 0, self.said
        return int(self._count.read_text())

    def outcome(self) -> dict[str, Any]:
        """All that must not depend on where a run was killed: artifacts byte by byte, and every line of figures."""
        found: dict[str, Any] = {}
        for stage in sorted((self.folder / "stages").iterdir()):
            record = json.loads((stage / "stage.json").read_text())
            facts = ("name", "kind", "status", "upstream", "fields", "fingerprint", "metrics", "steps", "best_step")
            found[f"{stage.name}/stage.json"] = {name: record.get(name) for name in facts}
            home = Path(record.get("cache") or stage)
            for file in sorted((home / "artifact").rglob("*")):
                found[f"{stage.name}/{file.name}"] = file.read_bytes()
            figures = lines(home / "metrics.jsonl")
            found[f"{stage.name}/metrics"] = [{k: v for k, v in line.items() if k != "seconds"} for line in figures]
            assert not list(home.rglob(".*.tmp")) and not (home / "checkpoints").exists()
        return found


def lines(file: Path) -> list[dict[str, Any]]:
    """The records of a JSON-lines file, each of which must be whole."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def checkpoints(job: Job) -> list[Path]:
    return sorted(job.folder.glob("stages/*/checkpoints/[0-9]*"))


def _child(job: Job, trap: Trap | None) -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    torch.set_num_threads(1)
    os.environ["STILLHOUSE_CACHE"] = str(job.cache or job.home / "cache")
    words = os.open(job._words, os.O_WRONLY | os.O_APPEND)
    os.dup2(words, 1)
    os.dup2(words, 2)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    if job.largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job.largest_file, job.largest_file))
    count = _set(trap) if trap else list
    code = 0
    try:
        if job.command is not None:
            from stillhouse.cli.main import main

            main(job.command)
        else:
            rank, port = job.place
            if port:
                os.environ |= {"LOCAL_RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
            engine = Engine(accelerator="cpu", devices=2 if port else 1)
            run = Run(job.folder, seed=job.seed, engine=engine, quiet=True, fresh=job.fresh)
            run.execute(Small.make(plot=job.plot, **job.values))
    except StillhouseError as error:
        print(f"stillhouse: {error}", file=sys.stderr)
        code = 2
    sys.settrace(None)
    if trap:
        job._count.write_text(str(len(count())))
    sys.exit(code)


def _set(trap: Trap) -> Callable[[], list[int]]:
    hits: list[int] = []

    def hit(when: str = "before") -> None:
        if when == "before":
            hits.append(len(hits) + 1)
        if len(hits) == trap.at and when == trap.when:
            if trap.fill is not None:
                _fill(Path(trap.fill))
            else:
                for _ in range(trap.times):
                    os.kill(os.getpid(), trap.signal)

    if trap.target == "line":
        home = str(Path(stillhouse.__file__).parent)

        def on_line(frame: Any, event: str, arg: Any) -> Any:
            if event == "line":
                hit()
            return on_line

        sys.settrace(lambda frame, event, arg: on_line if frame.f_code.co_filename.startswith(home) else None)
        return lambda: hits
    module, _, path = trap.target.partition(":")
    owner: Any = importlib.import_module(module)
    *parents, name = path.split(".")
    for parent in parents:
        owner = getattr(owner, parent)
    real = getattr(owner, name)

    def struck(*args: Any, **kwargs: Any) -> Any:
        hit()
        try:
            return real(*args, **kwargs)
        finally:
            hit("after")

    setattr(owner, name, struck)
    return lambda: hits


def _fill(file: Path) -> None:
    """Write until the disk is full."""
    handle = os.open(file, os.O_WRONLY | os.O_CREAT)
    for size in (1 << 16, 1 << 12, 1):
        try:
            while True:
                os.write(handle, b"\0" * size)
        except OSError:
            continue


def random_points(seed: int, most: int, count: int) -> Iterator[int]:
    """``count`` instants between 1 and ``most``, the same every time."""
    generator = random.Random(seed)
    yield from (generator.randint(1, most) for _ in range(count))
