"""Pre-training in stages: tunnels of small models, a stable phase, a decay with better data, and what follows."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Any

from annotated_types import Ge, Gt, Lt
from torch import nn

from stillhouse.base.errors import ConfigError, Diverged
from stillhouse.base.table import Column, Table
from stillhouse.core.artifact import Artifact
from stillhouse.core.objective import Objective
from stillhouse.core.observed import Observed
from stillhouse.core.player import OptimizerFactory
from stillhouse.core.schedule import cosine, linear
from stillhouse.core.stage import Context, Evaluate, Stage, Transform
from stillhouse.core.train import Train
from stillhouse.data.docstrings import load_preferences, load_quality
from stillhouse.data.mixing import Mixed, all_tokens
from stillhouse.data.responses import Coder
from stillhouse.data.sources import Batches
from stillhouse.data.windows import Windows, WindowSplit, tokenize_windows
from stillhouse.metrics.language import compare_causal_lms
from stillhouse.metrics.scaling_law import batch_size_law, fit_scaling_law
from stillhouse.models.causal_lm import load_causal_lm, parameter_count, student_from_spec
from stillhouse.models.mup import mup_adamw, mup_config, new_mup_lm, router_paths, upcycled
from stillhouse.objectives.language import TokenCrossEntropy, head_of
from stillhouse.objectives.lr_schedules import Course, Form, Segment, decay_form, plan
from stillhouse.objectives.responses import preferring
from stillhouse.objectives.routing import LoadBalance
from stillhouse.tasks.context_extension import extended, long_rows
from stillhouse.tasks.landscape import Valley
from stillhouse.tasks.language import LanguageSystem, LanguageTask, save_pretrained
from stillhouse.tasks.pictures import curves_picture
from stillhouse.tasks.segments import move_on, segment_stage, train_segments

ACTIVE = 2  # experts that read a token
FREE = (2e-3, 5.0)  # exponents outside were stopped by the fit's bounds


@dataclass(kw_only=True)
class PretrainingSystem(LanguageSystem):
    """Fields of systems that pre-train small models in stages: their scaling, and what may come before and after."""

    quality: Annotated[str, "better data for decay and fine-tuning; 'demo': questions on Python's functions"] = "demo"
    sft_steps: Annotated[int, "steps of fine-tuning on the better data's answers", Ge(1)] = 1500
    sft_lr: Annotated[float, "peak rate of fine-tuning", Gt(0)] = 1e-3
    base_width: Annotated[int, "width at which all factors of width are 1", Ge(1)] = 256
    scale_emb: Annotated[float, "what embeddings are multiplied with", Gt(0)] = 12.0
    scale_depth: Annotated[float, "what residual branches are, over the root of the depth", Gt(0)] = 1.4
    init_std: Annotated[float, "of initial weights at the base width", Gt(0)] = 0.1
    tunnel_widths: Annotated[tuple[int, ...], "widths of the models that choose lr; none: it is lr"] = ()
    tunnel_rates: Annotated[tuple[float, ...], "rates that they try"] = (3e-3, 1e-2, 3e-2)
    tunnel_steps: Annotated[int, "steps of each", Ge(2)] = 2000
    law_widths: Annotated[tuple[int, ...], "widths by which a scaling law is fitted; none: no law"] = ()
    law_targets: Annotated[tuple[float, ...], "amounts of data of the law, as shares of the steps"] = (
        0.25,
        0.5,
        0.75,
        1.0,
    )
    preferences: Annotated[str | None, "pairs for DPO (prompt, chosen, rejected); 'demo'; none: no DPO"] = None
    dpo_epochs: Annotated[float, "passes over the pairs", Gt(0)] = 1.0
    dpo_lr: Annotated[float, "peak rate of DPO", Gt(0)] = 1e-5
    dpo_beta: Annotated[float, "of DPO", Gt(0)] = 0.1
    experts: Annotated[int, "experts of an upcycled model, two of them active; 0: none", Ge(0)] = 0
    expert_steps: Annotated[int, "steps of upcycled training", Ge(1)] = 5000
    balance: Annotated[float, "weight of the load-balancing loss", Ge(0)] = 0.01
    long_windows: Annotated[
        tuple[int, ...],
        "longer contexts to go on to from the stable model (32768,131072), a phase each; none: no phase",
    ] = ()
    long_data: Annotated[str | None, "text with long documents; by default the long ones of data"] = None
    long_share: Annotated[float, "share of a phase's tokens that are long documents'", Gt(0), Lt(1)] = 0.44
    long_base: Annotated[float, "what RoPE's base is multiplied with in the first; later ones scale by NTK", Ge(1)] = (
        50.0
    )
    long_steps: Annotated[int, "steps of a phase", Ge(1)] = 1000
    dynamics: Annotated[bool, "measure gradients, curvature and movement in the stable phase and in the decay"] = False


class Trial(Stage):
    """A training that may diverge: it then leaves a note of that, and no figures."""

    kind = "Train"

    def __init__(self, stage: Train) -> None:
        super().__init__(stage.name)
        self.stage = stage

    def execute(self, context: Context) -> str:
        try:
            return self.stage.execute(context)
        except Diverged as error:
            context.run.say(f"{self.name}: diverged")
            return context.save({"diverged": str(error)}) if context.run.main else "none"


@dataclass
class Pretraining:
    """Stages on a language task whose student begins from nothing, scaled so that one rate suits all widths."""

    task: LanguageTask
    quality: Windows
    lr: float

    system: PretrainingSystem
    held_out: frozenset[str] = frozenset()  # answers of the better data that nothing is to learn

    @staticmethod
    def begin(task: LanguageTask, system: PretrainingSystem) -> Pretraining:
        """Read the better data; what is held out of it does not depend on the seed."""
        if system.long_windows:
            long_rows(task, system)  # what is wrong with them is said before anything is trained
        data = load_quality(system.quality)
        quality = tokenize_windows(
            data,
            task.tokenizer,
            window=system.window,
            validation=system.validation,
            selection=system.selection,
        )
        known = set(quality.documents)
        answers = enumerate(data.documents["completion"] if data.kind == "prompt-completion" else ())
        held_out = frozenset(answer for number, answer in answers if number not in known)
        return Pretraining(task, quality, system.lr, system, held_out)

    def sized(self, width: int | None = None) -> LanguageTask:
        """The task with a new student: the system's shape, or that with another width. Loaded models stay."""
        spec, seed = self.task.system.student, self.task.system.seed
        if "=" not in spec and not spec.startswith("scale:"):
            if width is not None:
                raise ConfigError(f"student={spec}: a model that exists has no other widths; give a shape")
            return self.task
        config: Any = student_from_spec(spec, self.task.teacher.config)
        if width is not None:
            config = student_from_spec(f"hidden_size={width}", config)
        system = self.system
        scaled = mup_config(
            config, base_width=system.base_width, scale_emb=system.scale_emb, scale_depth=system.scale_depth
        )
        return replace(self.task, new_student=partial(new_mup_lm, scaled, seed=seed, init_std=system.init_std))

    def optimizer(self, lr: float) -> Callable[[nn.Module], OptimizerFactory]:
        system = self.task.system
        betas, decay = (0.9, system.beta2), system.weight_decay
        return lambda model: mup_adamw(model, lr, betas=betas, weight_decay=decay)

    def segment(self, name: str, segment: Segment, start: Artifact | None, **options: Any) -> Train:
        """The stage of one segment; see `segment_stage`."""
        options = {"objective": self.task.cross_entropy, "optimizer": self.optimizer(self.lr), **options}
        return segment_stage(self.sized(), segment, start, name=name, **options)

    # -- before: the rate and the law -------------------------------------------------------------------------------

    def choose_rate(self) -> Generator[Stage, Artifact, None]:
        """Train a small model of each width with each rate; the best rate of the widest is used from here on.

        The loss of a rate that diverges is infinite.
        """
        widths, rates, steps = self.system.tunnel_widths, self.system.tunnel_rates, self.system.tunnel_steps
        losses: dict[tuple[int, float], float] = {}
        for width in widths:
            for rate in rates:
                course = Course((), max(1, steps // 10))
                stage = segment_stage(
                    self.sized(width),
                    Segment("tunnel", 0, steps, None, course),
                    None,
                    name=f"tunnel-{width}-{rate:g}",
                    objective=self.task.cross_entropy,
                    optimizer=self.optimizer(rate),
                )
                loss = (yield Trial(stage)).metrics.get("selection_loss", math.inf)
                losses[width, rate] = loss if math.isfinite(loss) else math.inf
        if losses:
            yield Evaluate("wind-tunnel", partial(tunnel_table, losses))
            self.lr = best_rate(losses)

    def scaling_law(self, steps: int, **shape: Any) -> Generator[Stage, Artifact, None]:
        """Fit L(N, D) if the system has widths for it; the table splits the compute of the largest point."""
        system = self.system
        if system.law_widths:
            targets = [round(share * steps) for share in system.law_targets]
            points = yield from self.grow(system.law_widths, targets, **shape)
            compute = 6 * max(n for n, *_ in points) * max(d for _, d, _ in points)
            cost = law_cost(targets, shape["decay"]), sum(targets)
            yield Evaluate("scaling-law", partial(law_table, points, compute, cost))

    def grow(
        self, widths: Sequence[int], targets: Sequence[int], *, form: Form, floor: float, decay: float, warmup: int
    ) -> Generator[Stage, Artifact, list[tuple[float, float, float]]]:
        """(N without embeddings, D, loss) of every width at every target: a stable run each, a decay from it each."""
        found = []
        for width in widths:
            task = self.sized(width)
            segments = plan("wsd", targets, form=form, floor=floor, decay=decay, warmup=warmup, charged=False)
            left = yield from train_segments(
                task,
                segments,
                prefix=f"law-{width}-",
                objective=self.task.cross_entropy,
                optimizer=self.optimizer(self.lr),
            )
            model: Any = task.new_student()
            size = float(parameter_count(model) - model.get_input_embeddings().weight.numel())
            per_step = self.task.system.batch_size * self.task.system.accumulate * self.task.system.window
            for part in segments:
                if part.target is not None:
                    loss = left[part.name].metrics["selection_loss"]
                    found.append((size, float(targets[part.target] * per_step), loss))
        return found

    # -- after: better data, answers, preferences, experts ------------------------------------------------------------

    def better_rows(self, share: float, steps: int | None = None) -> int:
        """Rows of the better data in a batch of which they are this share, or in so many steps of such batches."""
        system = self.task.system
        return round(share * system.batch_size) * (1 if steps is None else steps * system.accumulate)

    def mixed(self, share: float, step: int) -> Any:
        """Batches with ``share`` of their rows from the better data, the rest where the text stands at ``step``."""
        system = self.task.system
        better = self.better_rows(share)
        rest = system.batch_size - better
        if not 0 < better < system.batch_size:
            raise ConfigError(f"mix={share}: a batch of {system.batch_size} would hold {better} of the better rows")
        text = Batches(self.task.windows.train, rest, seed=system.seed, gather=True)
        batches = step * system.accumulate * system.batch_size // rest
        text.load_state_dict({"epoch": batches // len(text), "position": batches % len(text)})
        rows = Batches(self.quality.train, better, seed=system.seed, gather=True, collate=all_tokens)
        return Mixed([text, rows])

    def fine_tune(self, name: str, start: Artifact, *, steps: int, lr: float, batch_size: int, read: int = 0) -> Train:
        """Supervised fine-tuning on the answers of the better data, from where ``read`` rows of it were left."""
        task = self.task.beginning_as(start)
        stage = task.train(name, task.cross_entropy, steps=steps)
        _player(stage).optimizer = self.optimizer(lr)(_player(stage).trained[0].module)
        _player(stage).lr = cosine(1.0, 0.0, warmup=0.05)
        rows = Batches(self.quality.train, batch_size, seed=task.system.seed, gather=True)
        move_on(rows, -(-read // rows.batch_size))
        stage.source, stage.best = rows, None
        return stage

    def prefer(self, name: str, start: Artifact, source: str, *, epochs: float, lr: float, beta: float) -> Train:
        """Direct preference optimization, the fine-tuned model being the reference."""
        task, system, coder = self.task.beginning_as(start), self.task.system, Coder(self.task.tokenizer)
        found = load_preferences(source, seed=system.seed)
        free = [p for p in found if p.chosen not in self.held_out]
        rows = [(coder.row(p.prompt, p.chosen), coder.row(p.prompt, p.rejected)) for p in free]
        fitting = [pair for pair in rows if all(len(a) + len(b) <= system.window for a, b in pair)]
        if not fitting:
            raise ConfigError(f"preferences={source}: none of {len(rows)} pairs fits into window={system.window}")

        reference, _ = load_causal_lm(str(start.path))
        frozen = Observed(reference, frozen=True, name="reference", options={"use_cache": False})

        batches = Batches(fitting, max(1, system.batch_size // 2), seed=system.seed, collate=coder.pairs)
        steps = max(1, round(epochs * len(batches)))
        stage = task.train(
            name, lambda student: preferring(head_of(student), head_of(frozen), beta=beta, name="DPO"), steps=steps
        )
        _player(stage).optimizer = self.optimizer(lr)(_player(stage).trained[0].module)
        _player(stage).lr = cosine(1.0, 0.0)
        stage.source, stage.best = batches, None
        return stage

    def experts(self, name: str, start: Artifact, *, steps: int, active: int, balance: float) -> Train:
        """Go on with an upcycled model on the text, its routers kept balanced."""
        task = self.task.beginning_as(start)

        def objective(student: Observed) -> Objective:
            routers = [student.tap(path, index=0) for path in router_paths(student.module)]
            text = TokenCrossEntropy(head_of(student), vocab_size=self.task.vocab_size)
            return text + balance * LoadBalance(routers, active=active)

        stage = task.train(name, objective, steps=steps)
        _player(stage).optimizer = self.optimizer(self.lr)(_player(stage).trained[0].module)
        _player(stage).lr, stage.best = linear(1.0, 0.1), None
        return stage

    def variants(self, stable: Artifact, student: Artifact) -> Generator[Stage, Artifact, dict[str, Artifact]]:
        """DPO after fine-tuning, experts and longer contexts from the stable model, where the system asks for them."""
        system, models = self.system, {}
        if system.preferences:
            models["dpo"] = yield self.prefer(
                "dpo", student, system.preferences, epochs=system.dpo_epochs, lr=system.dpo_lr, beta=system.dpo_beta
            )
        if system.experts:
            grown = partial(upcycled, experts=system.experts, active=ACTIVE, seed=system.seed)
            save = partial(save_pretrained, tokenizer=self.task.tokenizer)
            begin = yield Transform("upcycled", lambda _context: grown(self.task.load(stable).cpu()), save=save)
            models["experts"] = yield self.experts(
                "experts", begin, steps=system.expert_steps, active=ACTIVE, balance=system.balance
            )
        models |= yield from extended(self, stable)
        return models

    def dynamics(self, parts: Sequence[tuple[Segment, Artifact | None, Artifact]]) -> Generator[Stage, Artifact, None]:
        """What gradients and weights do in the parts of a schedule (segment, what it began with, what it left)."""
        if self.system.dynamics:
            new = self.sized().new_student
            yield Evaluate("dynamics", partial(Valley(self.task).dynamics, parts, new))

    def figures(self, models: Mapping[str, Artifact], context: Context) -> Table:
        """Losses on held-out text and on held-out answers of the better data."""
        rows: list[dict[str, Any]] = []
        for name, artifact in models.items():
            model = self.task.load(artifact)
            row: dict[str, Any] = {"name": name, "parameters": parameter_count(model)}
            for kind, split in (("text", self.task.windows.validation), ("quality", self.quality.validation)):
                row[f"{kind}_loss"] = self._loss(model, split)
            rows.append(row)
            context.results |= {f"{name}/{key}": value for key, value in row.items() if key != "name"}
        columns = [
            Column("parameters", "parameters", ",d"),
            Column("text_loss", "text", ".4f", "lower", "loss on held-out text, nats per token"),
            Column("quality_loss", "better data", ".4f", "lower", "loss on held-out answers, nats per token"),
        ]
        return Table("After each stage", columns, rows)

    def _loss(self, model: nn.Module, split: WindowSplit) -> float:
        batches = self.task.batches_of(split)
        return compare_causal_lms({"model": model}, batches, vocab_size=self.task.vocab_size)["model"].loss


def _player(stage: Train) -> Any:
    """The player of a stage that `LanguageTask.train` made."""
    return stage.players


def tunnel_table(losses: Mapping[tuple[int, float], float], context: Context) -> tuple[Table, dict[str, Any]]:
    """Losses by width and rate; the best rate of each width, and the batch that its loss asks for."""
    rates = sorted({rate for _, rate in losses})
    rows: list[dict[str, Any]] = []
    for width in sorted({width for width, _ in losses}):
        row: dict[str, Any] = {f"{r:g}": losses[width, r] for r in rates if math.isfinite(losses[width, r])}
        if row:
            best = min(rates, key=lambda rate: losses[width, rate])
            row |= {"best": best, "batch": batch_size_law(losses[width, best])}
            context.results[f"{width}/best lr"] = best
        rows.append({"name": str(width), **row})
    columns = [
        *(Column(f"{rate:g}", f"lr {rate:g}", ".4f", "lower", "loss on the text to choose by") for rate in rates),
        Column("best", "best lr", "g"),
        Column("batch", "batch", ",.0f", None, "tokens, by MiniCPM's law for C4: 1.21e9 / loss^6.24"),
    ]
    curves = {
        f"width {row['name']}": [(rate, row[f"{rate:g}"]) for rate in rates if f"{rate:g}" in row]
        for row in rows
        if "best" in row
    }
    note = ["–: diverged."] * (not all(map(math.isfinite, losses.values())))
    picture = curves_picture(curves, x="learning rate", y="loss, nats per token", log_x=True)
    return Table("Wind tunnel", columns, rows, note), {"tunnel.svg": picture}


def best_rate(losses: Mapping[tuple[int, float], float]) -> float:
    """The best rate of the widest model of a tunnel.

    Raises:
        ConfigError: it diverged with all of them.
    """
    widest = max(width for width, _ in losses)
    rates = {rate: loss for (width, rate), loss in losses.items() if width == widest}
    if not any(map(math.isfinite, rates.values())):
        tried = ", ".join(f"{rate:g}" for rate in rates)
        raise ConfigError(f"tunnel_rates={tried}: all diverge at width {widest}; add lower ones")
    return min(rates, key=lambda rate: rates[rate])


def law_cost(targets: Sequence[int], decay: float) -> int:
    """Steps of one size at all targets: one stable run up to the last decay, and a decay for each target.

    Runs of their own would take the sum of the targets.
    """
    form = decay_form("linear", floor=0.0)
    parts = plan("wsd", targets, form=form, floor=0.0, decay=decay, charged=False)
    return sum(part.end - part.begin for part in parts)


def law_table(
    points: Sequence[tuple[float, float, float]], compute: float, cost: tuple[int, int], context: Context
) -> tuple[Table, dict[str, Any]]:
    """Measured and fitted losses, the law's constants, and the best split of ``compute``.

    ``cost``: steps of each size, with one stable run and with runs of their own.
    """
    law = fit_scaling_law(*zip(*points, strict=True))
    rows = [{"name": f"{n:,.0f}", "d": d, "loss": loss, "fitted": law.loss(n, d)} for n, d, loss in points]
    columns = [Column("d", "tokens", ",.0f"), Column("loss", "loss", ".4f"), Column("fitted", "fitted", ".4f")]
    split = law.optimum(compute)
    context.results |= {"alpha": law.alpha, "beta": law.beta, "floor": law.floor, "residual": law.residual}
    context.results |= {"tokens_per_parameter": split.d / split.n}
    notes = [
        f"L = {law.c_n:.3g} N^-{law.alpha:.3f} + {law.c_d:.3g} D^-{law.beta:.3f} + {law.floor:.3f}, residual "
        f"{law.residual:.4f} nats.",
        f"{compute:.2g} FLOPs are best spent on {split.n:.3g} parameters and {split.d:.3g} tokens, by this fit.",
        f"{cost[0]:,} steps for each size, by decays from one stable run; runs of their own would take {cost[1]:,}.",
    ]
    for name, exponent in (("N", law.alpha), ("D", law.beta)):
        if not FREE[0] < exponent < FREE[1] or law.residual > 0.05:
            notes.append(
                f"These losses do not fix the exponent of {name}: measure more sizes, or more amounts of data."
            )
    curves: dict[str, list[tuple[float, float]]] = {}
    for n, d, loss in points:
        curves.setdefault(f"{n:,.0f} parameters", []).append((d, loss))
    picture = curves_picture(curves, x="tokens", y="loss, nats per token", log_x=True)
    return Table("Scaling law", columns, rows, notes), {"law.json": law.to_json(), "law.svg": picture}
