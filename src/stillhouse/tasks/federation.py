"""Federations: clients with private images and models of their own, and what travels between them and a server.

A `Federation` holds the clients of a `VisionTask`. Its ``weights`` are all they know, so that a stage that trains some
of them leaves them as one artifact, and the next round goes on from there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact, Saver
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed, Turn
from stillhouse.core.player import Player
from stillhouse.core.schedule import Progress, constant
from stillhouse.core.stage import Context, Evaluate, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.images import Images, dirichlet_shares, partition
from stillhouse.data.rows import TensorRows
from stillhouse.data.sources import Batches
from stillhouse.models.exit_heads import Continuation, ExitHead, block_shapes, blocks_of
from stillhouse.objectives.logits import CrossEntropy
from stillhouse.objectives.stored import StoredMatch
from stillhouse.tasks.vision import VisionTask

FEWEST = 8  # images of a client; batch norm cannot learn from one
Order = Literal["deep-to-shallow", "shallow-to-deep", "none"]


def cut_at(round: int, *, blocks: int, every: int, least: int, order: Order = "deep-to-shallow") -> int:
    """How many blocks are shared in a round, counted from 0: one fewer every so many rounds, but never below ``least``.

    ``shallow-to-deep`` goes the other way, from ``least`` up to all; ``none`` shares all of them always.
    """
    if order == "none":
        return blocks
    passed = round // every
    return max(least, blocks - passed) if order == "deep-to-shallow" else min(blocks, least + passed)


@dataclass(frozen=True, eq=False)
class Client:
    """One client: its images, its model, and a head after each of the model's blocks."""

    number: int
    images: Images
    selection: Images
    test: Images
    model: nn.Module
    heads: nn.ModuleList

    def features(self, student: Observed, cut: int, *, detached: bool = False) -> Any:
        """What the first ``cut`` blocks make of an image, as a signal."""
        signal = student.tap(blocks_of(self.model)[cut - 1])
        return signal.detach() if detached else signal

    def opinion(self, student: Observed, cut: int, *, detached: bool = False) -> tuple[Observed, Any]:
        """The head after block ``cut`` and its logits; detached, no gradient reaches the blocks."""
        head = Observed(self.heads[cut - 1], name="head")
        features = self.features(student, cut, detached=detached)
        return head, head.view("features", feed={"inputs": features}).output()


ClientObjective = Callable[[Client, Observed], tuple[Objective, Sequence[Observed]]]
"""What a client minimises, and the heads it trains beside its model."""


class Federation:
    """The clients of a task.

    Args:
        clients: how many.
        alpha: of the Dirichlet distribution that divides each class among them; small values are unequal.
        permuted: every second client calls each class by the name of the next one: clients that contradict each other.
    """

    def __init__(self, task: VisionTask, *, clients: int, alpha: float, permuted: bool = False) -> None:
        self.task = task
        seed, classes = task.system.seed, len(task.classes)
        if clients * FEWEST > len(task.images):
            raise ConfigError(f"clients={clients}: {len(task.images)} training images are too few for so many")
        shares, parts = _divided(task.images.labels, classes, clients, alpha, seed)
        others = [partition(images.labels, shares, seed=seed) for images in (task.selection, task.test)]
        shapes = block_shapes(task.new_student(), task.images.shape)
        self.shapes = shapes
        self.clients: list[Client] = []
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            heads = [ExitHead(shape, classes) for shape in shapes]  # all begin with the same weights
        for number in range(clients):
            images, selection, test = (
                _renamed(whole.select(part), permuted and number % 2 == 1)
                for whole, part in (
                    (task.images, parts[number]),
                    (task.selection, others[0][number]),
                    (task.test, others[1][number]),
                )
            )
            own = nn.ModuleList([ExitHead(shape, classes) for shape in shapes])
            own.load_state_dict(nn.ModuleList(heads).state_dict())
            self.clients.append(Client(number, images, selection, test, task.new_student(), own))
        self.weights = nn.ModuleList([nn.ModuleList([client.model, client.heads]) for client in self.clients])
        self.weights.requires_grad_(True).to(task.run.fabric.device)

    def load(self, artifact: Artifact) -> None:
        """Let every client go on from what a stage left."""
        artifact.load_into(self.weights)

    def taking_part(self, round: int, ratio: float) -> list[Client]:
        """The clients of a round: this share of them, drawn by the seed and the round."""
        count = max(1, round_half_up(ratio * len(self.clients)))
        generator = torch.Generator().manual_seed(self.task.system.seed * 1_000_003 + round)
        chosen = torch.randperm(len(self.clients), generator=generator)[:count].sort().values.tolist()
        return [self.clients[number] for number in chosen]

    def train(
        self,
        name: str,
        clients: Sequence[Client],
        objective: ClientObjective,
        *,
        epochs: float,
        now: Progress,
        save: Saver | None = None,
    ) -> Train:
        """A stage in which these clients learn, each from its own images; all make the same number of steps.

        ``now`` is the round: the learning rate keeps through it, and the order of the images depends on it.
        """
        task, system = self.task, self.task.system
        rate = constant(system.learning_rate()(now))

        def players() -> list[Player]:
            made = []
            for client in clients:
                student = Observed(client.model, name=f"client-{client.number}")
                minimised, heads = objective(client, student)
                made.append(
                    Player(
                        student.name,
                        [student, *heads],
                        minimised,
                        optimizer=system.optimizer_factory(),
                        lr=rate,
                        clip=system.clip,
                        source=task.source(
                            client.images, seed=(system.seed * 1_009 + client.number) * 1_009 + now.step
                        ),
                    )
                )
            return made

        steps = max(1, round_half_up(sum(task.steps_of(epochs, one.images) for one in clients) / len(clients)))
        return Train(
            name,
            players,
            steps=steps,
            accumulate=system.accumulate,
            evaluate=self.figures,
            eval_every=steps,
            result=self.weights,
            save=save,
            shares_every=0,
        )

    @torch.no_grad()
    def figures(self) -> dict[str, float]:
        """Mean accuracy of the clients, each on the selection images that are divided as its own are."""
        asked = [client for client in self.clients if len(client.selection)]
        right = []
        for client in asked:
            training = client.model.training
            client.model.eval()
            right.append(self.task.figures(client.model, client.selection).accuracy)
            client.model.train(training)
        return {"accuracy": sum(right) / len(right)}

    # -- what travels -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def upload(
        self,
        clients: Sequence[Client],
        cut: int,
        *,
        temperature: float,
        clip: float | None = None,
        noise: float = 0.0,
        folds: int = 1,
    ) -> TensorRows:
        """What the clients tell the server: of every image its representation, its label, its soft label.

        Columns: ``client``, ``row`` (of the client's images), ``fold``, ``labels``, ``inputs`` (the representation)
        and ``soft`` (softmax of the client's head over ``temperature``). ``clip`` bounds the norm of a representation,
        ``noise`` is the standard deviation of what is added to it: an image can be guessed from its representation.
        """
        columns: dict[str, list[Tensor]] = {}
        for client in clients:
            client.model.eval()
            client.heads.eval()
            student = Observed(client.model)
            features = client.features(student, cut, detached=True)
            for batch in self.task.batches(client.images):
                inputs = Turn([features]).read(features, batch)
                if clip is not None:
                    norm = inputs.flatten(1).norm(dim=1).clamp_min(1e-12)
                    inputs = inputs * (clip / norm).clamp_max(1.0).view(-1, *[1] * (inputs.ndim - 1))
                inputs = inputs + noise * torch.randn(inputs.shape).to(inputs.device) if noise else inputs
                row = batch["index"]
                found = {
                    "client": torch.full_like(row, client.number),
                    "row": row,
                    "fold": row % folds,
                    "labels": batch["labels"],
                    "inputs": inputs,
                    "soft": (client.heads[cut - 1](inputs) / temperature).softmax(-1),
                }
                for name, column in found.items():
                    columns.setdefault(name, []).append(column.cpu())
        told = TensorRows({name: torch.cat(pieces) for name, pieces in columns.items()})
        return TensorRows({**told.columns, "index": torch.arange(len(told))})

    def class_means(self, clients: Sequence[Client], cut: int) -> TensorRows:
        """What clients can tell without showing an image: the mean of its representations for each class.

        Columns: ``client``, ``labels`` (the class), ``count`` (its images), ``mean`` (C, over the places too); classes
        that a client has no image of are left out.
        """
        told = self.upload(clients, cut, temperature=1.0).columns
        spatial = tuple(range(2, told["inputs"].ndim))
        pooled = told["inputs"].mean(spatial) if spatial else told["inputs"]
        rows: dict[str, list[Tensor]] = {"client": [], "labels": [], "count": [], "mean": []}
        for client in told["client"].unique():
            for label in told["labels"].unique():
                mine = (told["client"] == client) & (told["labels"] == label)
                if mine.any():
                    row = {"client": client, "labels": label, "count": mine.sum(), "mean": pooled[mine].mean(0)}
                    for name, value in row.items():
                        rows[name].append(value)
        return TensorRows({name: torch.stack(column) for name, column in rows.items()})

    def average(self, clients: Sequence[Client], _: Any = None) -> nn.Module:
        """Give every client the mean of these clients' weights, by their numbers of images (FedAvg)."""
        counts = torch.tensor([float(len(client.images)) for client in clients])
        states = [client.model.state_dict() for client in clients]
        mean = {}
        for key, first in states[0].items():
            stacked = torch.stack([state[key].double() for state in states])
            weights = (counts / counts.sum()).double().view(-1, *[1] * (stacked.ndim - 1)).to(stacked.device)
            mean[key] = (weights * stacked).sum(0).to(first.dtype)
        for client in self.clients:
            client.model.load_state_dict(mean)
        return self.weights

    # -- results ----------------------------------------------------------------------------------------------------

    def save(self, _: Any, folder: Path) -> None:
        """The first client's model, and the others' in folders of their own."""
        for client in self.clients:
            self.task.save(client.model, folder / f"client-{client.number}" if client.number else folder)

    def evaluation(self, final: Artifact, rounds: Sequence[Mapping[str, float]]) -> Evaluate:
        """Every client's model on test images that are divided among clients as its own are."""

        def evaluate(context: Context) -> tuple[Table, dict[str, Any]]:
            rows: list[dict[str, Any]] = []
            for client in self.clients:
                folder = final.path / f"client-{client.number}" if client.number else final.path
                row: dict[str, Any] = {"name": f"client {client.number}", "images": len(client.images)}
                row["tested"] = len(client.test)
                if len(client.test):
                    found = self.task.figures(self.task.load(folder), client.test)
                    row |= {"accuracy": found.accuracy, "nll": found.nll, "ece": found.ece}
                rows.append(row)
            context.results = summary([row["accuracy"] for row in rows if "accuracy" in row], rounds)
            note = (
                f"Mean accuracy {context.results['accuracy']:.1%}, standard deviation over clients "
                f"{context.results['spread']:.1%}, worst tenth {context.results['worst']:.1%}."
            )
            return Table("Personal models", COLUMNS, rows, [note]), {"rounds.json": list(rounds)}

        return Evaluate("evaluation", evaluate)


class Server:
    """What the server of a federation knows: heads that make classes of representations after any block.

    A head goes through the blocks that the clients keep to themselves, of its own make, and ends in an `ExitHead`: when
    the cut moves up by a block, that block is put in front of what was learnt so far.

    Args:
        folds: so many heads; each learns from all but its own fold of what was sent, and labels that fold. With one,
            the head labels what it has learnt from.
    """

    def __init__(self, federation: Federation, *, folds: int = 1) -> None:
        self.task = federation.task
        shape, classes = federation.shapes[-1], len(self.task.classes)
        heads = []
        for fold in range(folds):
            fresh = self.task.new_student(fold + 1)
            blocks = [fresh.get_submodule(path) for path in blocks_of(fresh)[1:]]
            with torch.random.fork_rng(devices=[]):
                torch.default_generator.manual_seed(self.task.system.seed + fold)
                heads.append(Continuation(blocks, ExitHead(shape, classes)))
        self.weights = nn.ModuleList(heads).requires_grad_(True).to(self.task.run.fabric.device)

    def load(self, artifact: Artifact) -> None:
        """Go on from what a stage left."""
        artifact.load_into(self.weights)

    def train(
        self, name: str, told: TensorRows, cut: int, *, epochs: float, mu: float, temperature: float, now: Progress
    ) -> Train:
        """A stage in which the heads learn from what the clients told: labels, and ``mu`` times soft labels."""
        system, folds = self.task.system, len(self.weights)
        rate = constant(system.learning_rate()(now))

        def players() -> list[Player]:
            made = []
            for fold, weights in enumerate(self.weights):
                head = Observed(weights, name=f"server-{fold}", options={"start": cut - 1})
                soft = StoredMatch(head.output(), told.columns["soft"], temperature=temperature)
                heard = told if folds == 1 else told.select(told.columns["fold"] != fold)
                source = Batches(heard, system.batch_size, seed=system.seed * 1_009 + now.step, gather=True)
                objective = CrossEntropy(head.output()) + mu * soft
                optimizer = system.optimizer_factory()
                made.append(
                    Player(head.name, head, objective, optimizer=optimizer, lr=rate, clip=system.clip, source=source)
                )
            return made

        steps = max(1, round_half_up(epochs * len(told) / min(len(told), system.batch_size)))
        return Train(name, players, steps=steps, result=self.weights, shares_every=0)

    def exchange(
        self, now: Progress, upload: Callable[[], TensorRows], cut: int, *, epochs: float, mu: float, temperature: float
    ) -> Generator[Stage, Artifact, tuple[TensorRows, int]]:
        """The server's part of a round: the clients tell, the heads learn, soft labels go back, and the bytes sent."""
        t = now.step
        told = TensorRows.read((yield Transform(f"upload-{t}", lambda _: upload())).data_file())
        self.load((yield self.train(f"server-{t}", told, cut, epochs=epochs, mu=mu, temperature=temperature, now=now)))
        answer = yield Transform(f"labels-{t}", lambda _: self.labels(told, cut, temperature=temperature))
        numbers = told.columns["inputs"][0].numel() + 1 + told.columns["soft"].shape[1]
        return TensorRows.read(answer.data_file()), len(told) * numbers * 4

    @torch.no_grad()
    def labels(self, told: TensorRows, cut: int, *, temperature: float) -> TensorRows:
        """What goes back: the soft label of every representation that was sent, by ``client`` and ``row``."""
        columns = told.columns
        device = self.task.run.fabric.device
        soft = torch.empty_like(columns["soft"])
        for fold, head in enumerate(self.weights.eval()):
            mine = columns["fold"] == fold
            logits = head(columns["inputs"][mine].to(device), start=cut - 1)
            soft[mine] = (logits / temperature).softmax(-1).cpu()
        return TensorRows({"client": columns["client"], "row": columns["row"], "soft": soft})


def prototypes(told: TensorRows, classes: int) -> Tensor:
    """What all clients' images of each class are like, (V, C), from what they told (`Federation.class_means`).

    The mean of the clients' means, by their numbers of images; 0 for a class that nobody has.
    """
    count_N, mean_NC, labels_N = (told.columns[name] for name in ("count", "mean", "labels"))
    sums_VC = mean_NC.new_zeros(classes, mean_NC.shape[1]).index_add(0, labels_N, count_N[:, None] * mean_NC)
    count_V = count_N.new_zeros(classes).index_add(0, labels_N, count_N)
    return sums_VC / count_V.clamp_min(1)[:, None]


COLUMNS = [
    Column("images", "images", ",d", help="private training images"),
    Column("tested", "tested on", ",d", help="test images with the client's own mixture of classes"),
    Column("accuracy", "accuracy", ".1%", "higher"),
    Column("nll", "NLL", ".3f", "lower", "mean negative log-likelihood of the right class, nats"),
    Column("ece", "ECE", ".3f", "lower", "expected calibration error of the most likely class, 15 bins"),
]


def summary(accuracies: Sequence[float], rounds: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean, spread and worst tenth over clients; mean accuracy over rounds (``area``) and bytes told to the server."""
    worst = sorted(accuracies)[: max(1, math.ceil(len(accuracies) / 10))]
    values = torch.tensor(accuracies, dtype=torch.float64)
    told = [one["bytes"] for one in rounds]
    return {
        "accuracy": values.mean().item(),
        "spread": values.std(correction=0).item(),
        "worst": sum(worst) / len(worst),
        "area": sum(one["accuracy"] for one in rounds) / max(1, len(rounds)),
        "bytes": float(sum(told)),
    }


def round_half_up(value: float) -> int:
    return math.floor(value + 0.5)


def _renamed(images: Images, permuted: bool) -> Images:
    return replace(images, labels=(images.labels + 1) % len(images.classes)) if permuted else images


def _divided(labels: Tensor, classes: int, clients: int, alpha: float, seed: int) -> tuple[Tensor, list[Tensor]]:
    """Shares in which every client has something to learn from: drawn again until they do."""
    for attempt in range(1000):
        shares = dirichlet_shares(classes, clients, alpha=alpha, seed=seed + 1_000 * attempt)
        parts = partition(labels, shares, seed=seed)
        if min(map(len, parts)) >= FEWEST:
            return shares, parts
    raise ConfigError(f"alpha={alpha}: a thousand draws left some client with fewer than {FEWEST} images; raise it")
