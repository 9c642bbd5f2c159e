"""FedD2S: clients teach a server's head and learn from it; the deepest layers leave the federation one by one."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any, ClassVar, Literal

import torch
from annotated_types import Ge, Gt, Le

from stillhouse.base.errors import ConfigError
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.run import Run
from stillhouse.core.schedule import Progress
from stillhouse.core.stage import Stage, Transform
from stillhouse.core.system import Claim, Meta
from stillhouse.data.rows import TensorRows
from stillhouse.objectives.logits import CrossEntropy
from stillhouse.objectives.stored import StoredMatch
from stillhouse.tasks.federation import Client, ClientObjective, Federation, Order, Server, cut_at
from stillhouse.tasks.vision import VisionSystem, VisionTask


@dataclass(kw_only=True)
class FedD2S(VisionSystem):
    """Personalized data-free federated knowledge distillation (Atapour et al., 2024, arXiv 2402.10846).

    Every round clients send representations of their images after block l, with labels and the soft labels of a head of
    their own; a head at the server learns from all of them, and its soft labels come back. Every ``drop_every`` rounds
    l falls by one: the deeper blocks go on learning in private. ``exchange`` and ``order`` give the baselines. No code
    was released: message formats, heads, schedules and weights are this implementation's reading of the paper.
    """

    meta = Meta(
        card=157,
        title="FedD2S",
        domain="vision",
        family="federated mutual KD on representations",
        citation="Atapour et al. (2024), FedD2S: Personalized Data-Free Federated Knowledge Distillation, "
        "arXiv 2402.10846",
        feedback=("logits", "labels"),
        granularity="sample",
        algorithm="divergence",
        knowledge=("response", "feature"),
        scheme="online",
        modality="image",
        stages="4 a round",
        role="smaller models",
    )
    demo: ClassVar = {
        "shift": 0,
        "flip": False,
        "student": "hidden_sizes=16-32-64,depths=1-1-1,embedding_size=16",
        "train_size": 360,
        "batch_size": 16,
        "local_epochs": 2.0,
        "clients": 6,
        "alpha": 0.4,
        "rounds": 18,
        "drop_every": 6,
        "lr": 0.03,
    }
    smoke: ClassVar = {
        "student": "hidden_sizes=4-8-8,depths=1-1-1,embedding_size=4",
        "train_size": 96,
        "clients": 3,
        "rounds": 3,
        "drop_every": 1,
        "batch_size": 32,
        "local_epochs": 22.0,
    }

    student: Annotated[str, "every client's model, as in other systems"] = "scale:1"
    clients: Annotated[int, "clients", Ge(1)] = 20
    alpha: Annotated[float, "Dirichlet parameter that divides each class among clients; small: unequal", Gt(0)] = 0.3
    rounds: Annotated[int, "rounds of the federation", Ge(1)] = 50
    participation: Annotated[float, "share of the clients in a round", Gt(0), Le(1)] = 1.0
    warmup_epochs: Annotated[float, "passes of each client over its images before the first round", Gt(0)] = 1.0
    local_epochs: Annotated[float, "passes of a client over its images in a round", Gt(0)] = 1.0
    server_epochs: Annotated[float, "passes of the server over what was sent in a round", Gt(0)] = 2.0
    drop_every: Annotated[int, "rounds after which the deepest shared block is dropped", Ge(1)] = 10
    least_shared: Annotated[int, "blocks that stay shared", Ge(1)] = 1
    order: Annotated[Order, "which blocks leave; none: all stay shared"] = "deep-to-shallow"
    exchange: Annotated[
        Literal["knowledge", "weights", "none"], "what travels; weights: FedAvg; none: each client for itself"
    ] = "knowledge"
    fine_tune: Annotated[float, "passes of each client over its images after the last average of weights", Ge(0)] = 0.0
    mu: Annotated[float, "weight of the soft labels, at the server and at the clients", Ge(0)] = 1.0
    temperature: Annotated[float, "softens the labels that travel", Gt(0)] = 1.0
    folds: Annotated[int, "heads at the server; with 2 or more none labels what it was trained on", Ge(1)] = 1
    upload_clip: Annotated[float | None, "largest norm of a representation that is sent", Gt(0)] = None
    upload_noise: Annotated[float, "deviation of the noise added to it, for privacy", Ge(0)] = 0.0
    permuted: Annotated[bool, "every second client names each class by the next one's name"] = False
    lr: Annotated[float, "learning rate", Gt(0)] = 0.01
    nesterov: Annotated[bool, "look ahead with SGD's momentum"] = False
    lr_schedule: Annotated[
        Literal["step", "cosine", "linear", "constant"], "course of the learning rate, from round to round"
    ] = "constant"

    def cut(self, round: int, blocks: int) -> int:
        """Blocks shared in a round."""
        return cut_at(round, blocks=blocks, every=self.drop_every, least=self.least_shared, order=self.order)

    def objective(self, cut: int, then: int, soft: TensorRows | None) -> ClientObjective:
        """Labels for the model and the head at ``cut``, soft labels for that head, a start for the head ``then``."""

        def of(client: Client, student: Observed) -> tuple[Objective, Sequence[Observed]]:
            objective: Objective = CrossEntropy(student.output("logits"), name="labels")
            if self.exchange != "knowledge":
                return objective, []
            head, logits = client.opinion(student, cut)
            objective = objective + CrossEntropy(logits, name="head")
            if soft is not None:
                mine = soft.select(soft.columns["client"] == client.number)
                table = torch.zeros(len(client.images), mine.columns["soft"].shape[1])
                table[mine.columns["row"]] = mine.columns["soft"]
                objective = objective + self.mu * StoredMatch(logits, table, temperature=self.temperature)
            if then == cut:
                return objective, [head]
            following, unheard = client.opinion(student, then, detached=True)
            return objective + CrossEntropy(unheard, name="next head"), [head, following]

        return of

    def stages(self, run: Run) -> Generator[Stage, Artifact, None]:
        task = yield from VisionTask.prepare(self, run, teacher=False)
        federation = Federation(task, clients=self.clients, alpha=self.alpha, permuted=self.permuted)
        server, blocks = Server(federation, folds=self.folds), len(federation.shapes)
        if self.least_shared > blocks:
            raise ConfigError(f"least_shared={self.least_shared}: a client's model has {blocks} blocks")
        alone = self.objective(self.cut(0, blocks), self.cut(0, blocks), None)
        everybody = partial(federation.train, clients=federation.clients, objective=alone)
        last = yield everybody("warm-up", epochs=self.warmup_epochs, now=Progress(0, self.rounds + 2))
        history: list[dict[str, float]] = []
        averaging = self.exchange == "weights"
        for t in range(1, self.rounds + 1):
            federation.load(last)
            now, cut = Progress(t, self.rounds + 2), self.cut(t - 1, blocks)
            clients, soft, sent = federation.taking_part(t, self.participation), None, 0
            if self.exchange == "knowledge":
                upload = partial(federation.upload, clients, cut, temperature=self.temperature, folds=self.folds)
                protected = partial(upload, clip=self.upload_clip, noise=self.upload_noise)
                learn = {"epochs": self.server_epochs, "mu": self.mu, "temperature": self.temperature}
                soft, sent = yield from server.exchange(now, protected, cut, **learn)
            ends = t == self.rounds and not averaging
            last = yield federation.train(
                "student" if ends else f"clients-{t}",
                clients,
                self.objective(cut, self.cut(t, blocks), soft),
                epochs=self.local_epochs,
                now=now,
                save=federation.save if ends else None,
            )
            history.append({"round": t, "cut": cut, "accuracy": last.metrics["accuracy"], "bytes": sent})
            if averaging:
                federation.load(last)
                last = yield Transform(f"average-{t}", partial(federation.average, clients))
        if averaging and self.fine_tune:
            federation.load(last)
            now = Progress(self.rounds + 1, self.rounds + 2)
            last = yield everybody("student", epochs=self.fine_tune, now=now, save=federation.save)
        elif averaging:
            last = yield Transform("student", lambda _: federation.weights, save=federation.save)
        yield federation.evaluation(last, history)

    def claims(self) -> list[Claim]:
        variants: dict[str, tuple[str, dict[str, Any]]] = {
            "fedd2s": ("fedd2s", {}),
            "nothing dropped": ("fedd2s", {"order": "none"}),
            "each for itself": ("fedd2s", {"exchange": "none"}),
            "at odds, fedd2s": ("fedd2s", {"permuted": True}),
            "at odds, fedavg": ("fedd2s", {"permuted": True, "exchange": "weights"}),
        }

        def claim(statement: str, method: str, baseline: str) -> Claim:
            return Claim(
                statement=statement,
                metric="mean accuracy of the clients' models, each on test digits with its own mixture of classes",
                method=method,
                baseline=baseline,
                variants={name: variants[name] for name in (method, baseline)},
                measure=lambda artifacts: artifacts["evaluation"].metrics["accuracy"],
                higher_is_better=True,
                scope="central" if method == "fedd2s" else "consequence",
                seeds=3,
                budget="equal rounds, local steps and initial weights",
            )

        return [
            claim("dropping the deep blocks one by one is better", "fedd2s", "nothing dropped"),
            claim("clients that exchange knowledge are better than each for itself", "fedd2s", "each for itself"),
            claim("where clients name things differently, it beats FedAvg", "at odds, fedd2s", "at odds, fedavg"),
        ]
