"""The gradient stage: one loop for every method. What differs between methods stands in their players."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from stillhouse.base.errors import Diverged, Interrupted, RunError
from stillhouse.base.files import Checkpoints, check_room, random_state, restore_random_state
from stillhouse.base.monitor import StopRequest
from stillhouse.base.sharded import clip_gradients, full, load_module_state, load_optimizer_state, whole
from stillhouse.core.artifact import Saver
from stillhouse.core.engine import average_gradients, is_deepspeed, is_sharded, place, set_up_jointly
from stillhouse.core.objective import TermValue, gradient_shares, total
from stillhouse.core.observed import Observed, Turn, as_batch, with_feeds
from stillhouse.core.player import Player
from stillhouse.core.schedule import Progress
from stillhouse.core.source import Source, as_source
from stillhouse.core.stage import Context, Stage

Players = Player | Sequence[Player]


class Train(Stage):
    """``for step: batch -> for each player whose turn it is: objective, backward, clip, step, EMA``.

    Args:
        name: names the stage.
        players: one or several, or a function that builds them (not called when the stage is already done).
        source: a `Source`, or any iterable of batches; players with a source of their own do not read it.
        steps: optimizer steps; with ``accumulate`` micro-batches each.
        together: all players whose turn it is read the same forwards and step at the same time; otherwise each sees
            the weights the one before it has just updated.
        evaluate: called every ``eval_every`` steps (default: ten times) and at the end; returns named figures.
        best: a figure of ``evaluate``; the weights with the best value become the result. Put ``-`` before a figure
            where more is better (``"-accuracy"``).
        patience: stop after so many evaluations without a better ``best``.
        result: the module whose weights are the artifact; by default the first player's EMA or first model.
        save: writes the artifact; by default `save_artifact`.
        log_every: steps between lines in ``metrics.jsonl``.
        shares_every: steps between measurements of each term's gradient share (default: twenty times); 0 turns it off.
        checkpoint_every: steps between checkpoints; by default the run's ``checkpoint_minutes`` decide.
        compile: compile the models players train, with ``torch.compile``; its options if a mapping.
        cache: see `Stage`.
    """

    kind = "Train"

    def __init__(
        self,
        name: str,
        players: Players | Callable[[], Players],
        *,
        source: Any = None,
        steps: int,
        accumulate: int = 1,
        together: bool = False,
        evaluate: Callable[[], Mapping[str, float]] | None = None,
        eval_every: int | None = None,
        best: str | None = None,
        patience: int | None = None,
        result: nn.Module | None = None,
        save: Saver | None = None,
        log_every: int = 10,
        shares_every: int | None = None,
        checkpoint_every: int | None = None,
        compile: bool | Mapping[str, Any] = False,
        cache: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(name, cache=cache)
        self.players = players
        self.source = source
        self.steps = steps
        self.accumulate = accumulate
        self.together = together
        self.evaluate = evaluate
        self.eval_every = eval_every or max(1, steps // 10)
        self.best = None if best is None else best.removeprefix("-")
        self.sign = -1 if best is not None and best.startswith("-") else 1
        self.patience = patience
        self.result = result
        self.save = save
        self.log_every = log_every
        self.shares_every = max(1, steps // 20) if shares_every is None else shares_every
        self.checkpoint_every = checkpoint_every
        self.compile = compile

    def execute(self, context: Context) -> str:
        built = self.players() if callable(self.players) else self.players
        players = [built] if isinstance(built, Player) else list(built)
        loop = _Loop(self, context, players)
        with ExitStack() as stack:
            stack.callback(loop.close)
            loop.run()
            return loop.finish()


@dataclass
class _Cast:
    """What a turn of certain players needs, worked out once."""

    turn: Turn
    engines: list[tuple[Observed, nn.Module]]  # their models, and the wrappers these run in meanwhile
    resting: list[nn.Parameter]  # the other players': no gradient of theirs is wanted


class _Loop:
    """One execution of a `Train` stage."""

    def __init__(self, stage: Train, context: Context, players: list[Player]) -> None:
        self.stage, self.context, self.players = stage, context, players
        self.run_ = context.run
        self.fabric = context.run.fabric
        self.sharded = is_sharded(self.fabric)
        self.deepspeed = is_deepspeed(self.fabric)
        plain = not self.sharded and not self.deepspeed and self.run_.engine.precision in ("32-true", "64-true")
        self.shares_every = stage.shares_every if plain else 0  # one backward a term: wrappers allow only the whole
        self.bare = (
            plain and self.run_.engine.precision == "32-true" and self.fabric.world_size == 1
        )  # wrappers would do nothing
        self.autocast = nullcontext if self.bare else self.fabric.autocast
        self.checkpoints = Checkpoints(context.folder / "checkpoints")
        self.step = 0
        self.elapsed = 0.0
        self.best: dict[str, Any] = {"value": math.inf, "step": -1, "waited": 0, "state": None}
        self.figures: dict[str, float] = {}
        self.buffer: list[tuple[int, str, list[TermValue]]] = []
        self.norms: dict[str, list[Tensor]] = {}
        self.shares: dict[str, dict[str, float]] = {}
        self.casts: dict[tuple[int, ...], _Cast] = {}

        self.sources: dict[str, Source] = {}
        shared = None if stage.source is None else as_source(stage.source)
        for player in players:
            chosen = shared if player.source is None else as_source(player.source)
            if chosen is None:
                raise RunError(f"stage {stage.name!r}: player {player.name!r} has no source of batches")
            self.sources[player.name] = chosen
        if stage.together and any(player.repeats > 1 or player.source is not None for player in players):
            raise RunError(
                f"stage {stage.name!r}: players that play together share one batch: no repeats, no own source"
            )
        if len(self.sources) < len(players):
            raise RunError(f"stage {stage.name!r}: two players have the same name")
        for source in self._streams():
            if hasattr(source, "shard"):
                source.shard = (self.fabric.global_rank, self.fabric.world_size)
        self._set_up()

    # -- setting up -------------------------------------------------------------------------------------------------

    def _streams(self) -> list[Source]:
        return list({id(source): source for source in self.sources.values()}.values())

    def _set_up(self) -> None:
        fabric = self.fabric
        trained = self.trained = {id(m.module): m for player in self.players for m in player.trained}
        heard = {id(m.module): m for player in self.players for m in player.objective.observed()}
        self.tapped = [model.tapped for model in {**heard, **trained}.values()]
        self._check_disk()
        self.skeleton = copy.deepcopy(self._result()).to("meta") if self.sharded else None
        if self.stage.compile:
            options = self.stage.compile if isinstance(self.stage.compile, Mapping) else {}
            signals = list(with_feeds(signal for player in self.players for signal in player.objective.signals()))
            for key, model in trained.items():
                addresses = {s.address for s in signals if id(s.observed.module) == key}
                model.tapped.compile(addresses, **options)
        if not self.deepspeed:
            wrap = partial(place, fabric) if self.bare else fabric.setup_module
            self.engines = {key: wrap(model.tapped) for key, model in trained.items()}
        for key, model in heard.items():
            if key not in trained:
                place(fabric, model.tapped)
        for player in self.players:
            player.objective.to(fabric.device)
            if any(is_lazy(parameter) for parameter in player.objective.parameters()):
                self._size_lazy_parameters(player)
            if player.ema is not None:
                place(fabric, player.ema.module)
        self.parameters = {player.name: player.parameters() for player in self.players}
        self.optimizers = [player.optimizer([{"params": self.parameters[player.name]}]) for player in self.players]
        self.rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in self.optimizers]
        self.steppers: list[Any] = []
        if self.deepspeed:
            self._set_up_deepspeed()
        else:
            self.steppers = self.optimizers if self.bare else [fabric.setup_optimizers(o) for o in self.optimizers]
        for model in trained.values():
            model.module.train(model.mode == "train")

    def _set_up_deepspeed(self) -> None:
        self.engines = {}
        for index, (player, optimizer) in enumerate(zip(self.players, self.optimizers, strict=True)):
            theirs = list(player.objective.parameters())
            if len(player.trained) > 1 or theirs or self.stage.together or id(player.trained[0].module) in self.engines:
                raise RunError(
                    f"stage {self.stage.name!r}, player {player.name!r}: DeepSpeed trains one model a player, each its "
                    "own, without parameters in the objective and not together; use strategy=ddp or fsdp2"
                )
            engine, own, stepper = set_up_jointly(
                self.fabric, player.trained[0].tapped, optimizer, clip=player.clip, accumulate=self.stage.accumulate
            )
            self.engines[id(player.trained[0].module)] = engine
            self.optimizers[index] = own
            self.steppers.append(stepper)

    def _size_lazy_parameters(self, player: Player) -> None:
        """Let projections find their widths on the first batch, which is then put back."""
        source = self.sources[player.name]
        before = source.state_dict()
        batch = self._draw(player)[0]
        with self._looking([player.objective, *(model.module for model in player.objective.observed())]):
            turn = Turn(player.objective.signals())
            player.objective.evaluate(turn, batch, Progress(0, self.stage.steps))
        source.load_state_dict(before)

    def _check_disk(self) -> None:
        parameters = [p for player in self.players for model in player.trained for p in model.module.parameters()]
        # Weights and two moments, the old checkpoint kept until the new one is whole; then the result.
        needed = 8 * sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        check_room(self.context.folder, needed, f"stage {self.stage.name!r}")

    # -- the loop ---------------------------------------------------------------------------------------------------

    def run(self) -> None:
        stage = self.stage
        self._restore()
        begun = time.monotonic() - self.elapsed
        saved = time.monotonic()
        with StopRequest() as stop, self.run_.progress(stage.name, stage.steps) as bar:
            bar.update(self.step)
            patience = math.inf if stage.patience is None else stage.patience
            while self.step < stage.steps and self.best["waited"] < patience:
                self._one_step()
                self.step += 1
                self.elapsed = time.monotonic() - begun
                last = self.step == stage.steps
                if self.step % stage.log_every == 0 or last:
                    bar.update(self.step, self._log())
                if stage.evaluate is not None and (self.step % stage.eval_every == 0 or last):
                    self._evaluate()
                stopping = self._agreed(stop.received)
                if self._checkpoint_due(saved) or stopping:
                    self._log()
                    self._save_checkpoint()
                    saved = time.monotonic()
                if stopping:
                    raise Interrupted(
                        f"stopped at step {self.step} of {stage.steps}; go on: stillhouse resume {self.run_.folder}"
                    )
            self._log()

    def _agreed(self, stop: bool) -> bool:
        """Whether to stop now: several processes do so together, and ask each other only in steps that they log."""
        if self.fabric.world_size > 1:
            if self.step % self.stage.log_every and self.step != self.stage.steps:
                return False
            votes = torch.tensor(float(stop), device=self.fabric.device)
            stop = bool(self.fabric.all_reduce(votes, reduce_op="sum"))
        return stop

    def _one_step(self) -> None:
        playing = [i for i, player in enumerate(self.players) if player.plays(self.step)]
        if self.stage.together:
            self._turn(playing)
            return
        shared: list[Any] | None = None
        for index in playing:
            player = self.players[index]
            for repeat in range(player.repeats):
                if player.source is not None or repeat or shared is None:
                    batches = self._draw(player)
                    if player.source is None and not repeat:
                        shared = batches
                else:
                    batches = shared
                self._turn([index], batches)

    def _draw(self, player: Player) -> list[Any]:
        batches = [next(self.sources[player.name]) for _ in range(self.stage.accumulate)]
        if not self.bare or self.fabric.device.type != "cpu":
            convert = self.fabric.strategy.precision.convert_input
            batches = [convert(self.fabric.to_device(batch)) for batch in batches]
        return [as_batch(batch) for batch in batches]

    def _turn(self, playing: Sequence[int], batches: list[Any] | None = None) -> None:
        """Objective, backward and step for the players of this turn, which read the same forwards."""
        if not playing:
            return
        cast = self.casts.get(tuple(playing)) or self._cast(playing)
        batches = batches or self._draw(self.players[playing[0]])
        progress = Progress(self.step, self.stage.steps, self.sources[self.players[playing[0]].name].epoch)
        for index in playing:
            self.optimizers[index].zero_grad()
        with self._live(cast):
            for micro, batch in enumerate(batches):
                with ExitStack() as stack:
                    if micro < len(batches) - 1 and not self.bare and not self.deepspeed:
                        for _, engine in cast.engines:
                            stack.enter_context(self.fabric.no_backward_sync(engine))
                    for index in playing:
                        self._backward(self.players[index], cast.turn, batch, progress, keep=index != playing[-1])
                        if self.deepspeed and micro < len(batches) - 1:
                            self.steppers[index].step()  # only counts
                cast.turn.clear()
        for index in playing:
            self._update(index, progress)

    def _backward(self, player: Player, turn: Turn, batch: Any, progress: Progress, *, keep: bool) -> None:
        with self.autocast():
            values = player.objective.evaluate(turn, batch, progress)
        stage = self.stage
        if self.shares_every and self.step % self.shares_every == 0 and len(values) > 1:
            self.shares[player.name] = gradient_shares(values, self.parameters[player.name])
        loss = total(values)
        noted = [TermValue(v.name, v.value.detach(), v.weight, v.extras) for v in values]
        self.buffer.append((self.step, player.name, noted))
        if self.fabric.device.type == "cpu" and not math.isfinite(loss.item()):
            self._log()
        # Players that share a turn must not leave gradients in each other's weights.
        only = {"inputs": self.parameters[player.name]} if stage.together and not self.sharded else {}
        if self.deepspeed:
            self.fabric.backward(loss, model=self.engines[id(player.trained[0].module)])
        elif loss.requires_grad:
            loss = loss if stage.accumulate == 1 else loss / stage.accumulate
            backward = Tensor.backward if self.bare else self.fabric.backward
            backward(loss, retain_graph=keep or None, **only)

    def _update(self, index: int, progress: Progress) -> None:
        player, optimizer = self.players[index], self.optimizers[index]
        average_gradients(self.fabric, player.objective)
        for group, rate in zip(optimizer.param_groups, self.rates[index], strict=True):
            group["lr"] = rate * player.lr(progress)
        if player.clip is not None and not self.deepspeed:
            self.fabric.strategy.precision.unscale_gradients(optimizer)
            self.norms.setdefault(player.name, []).append(clip_gradients(self.parameters[player.name], player.clip))
        self.steppers[index].step()
        if player.ema is not None:
            player.ema.update(progress)

    def _cast(self, playing: Sequence[int]) -> _Cast:
        players = [self.players[i] for i in playing]
        mine = {id(m.module): m for player in players for m in player.trained}
        parameters = {id(p) for player in players for p in self.parameters[player.name]}
        others = [p for ps in self.parameters.values() for p in ps if id(p) not in parameters]
        cast = _Cast(
            turn=Turn((s for p in players for s in p.objective.signals()), autocast=self.autocast),
            engines=[(model, self.engines[key]) for key, model in mine.items()],
            # FSDP2 copies requires_grad once; there the next zero_grad clears what leaked.
            resting=[] if self.sharded else others,
        )
        self.casts[tuple(playing)] = cast
        return cast

    @contextmanager
    def _live(self, cast: _Cast) -> Iterator[None]:
        """Route the players' models through their wrappers, and switch off gradients of the others' weights."""
        try:
            for model, engine in cast.engines:
                model.engine = engine
            for parameter in cast.resting:
                parameter.requires_grad_(False)
            yield
        finally:
            for model, _ in cast.engines:
                model.engine = model.tapped
            for parameter in cast.resting:
                parameter.requires_grad_(True)

    # -- figures ----------------------------------------------------------------------------------------------------

    def _log(self) -> str:
        """Write the mean of what was buffered since the last line; a value that is not finite ends the run here."""
        note = ""
        numbers = self._numbers()
        for player, optimizer in zip(self.players, self.optimizers, strict=True):
            rows = [entry for entry in self.buffer if entry[1] == player.name]
            if not rows:
                continue
            found: dict[str, list[tuple[float, float]]] = {}  # a term may be left out of steps where it weighs nothing
            for value in (value for *_, values in rows for value in values):
                found.setdefault(value.name, []).append((numbers[id(value)], value.weight))
            terms = {
                name: {"value": sum(x for x, _ in pairs) / len(pairs), "weight": sum(w for _, w in pairs) / len(rows)}
                for name, pairs in found.items()
            }
            norms = [float(norm) for norm in self.norms.pop(player.name, [])]
            record: dict[str, Any] = {
                "step": self.step,
                "kind": "train",
                "player": player.name,
                "loss": sum(value.weight * numbers[id(value)] for *_, values in rows for value in values) / len(rows),
                "terms": terms,
                "lr": optimizer.param_groups[0]["lr"],
                "seconds": self.elapsed,
            }
            if norms:
                record["grad_norm"] = sum(norms) / len(norms)
            for name, share in self.shares.pop(player.name, {}).items():
                terms[name]["share"] = share
            extras = {f"{v.name}.{key}": float(x) for v in rows[-1][2] for key, x in v.extras.items()}
            if extras:
                record["values"] = extras
            self.context.metrics.append(record)
            scalars = {f"{player.name}/{name}": term["value"] for name, term in terms.items()}
            self.context.metrics.track({f"{player.name}/loss": record["loss"], **scalars, **extras}, self.step)
            note += f"{player.name} {record['loss']:.4f}  "
        self.buffer.clear()
        return note + "  ".join(f"{name} {value:.4g}" for name, value in list(self.figures.items())[:2])

    def _numbers(self) -> dict[int, float]:
        """The buffered values as numbers, by the identity of their `TermValue`; the first bad one is an error."""
        values = [(step, player, value) for step, player, row in self.buffer for value in row]
        if not values:
            return {}
        stacked = torch.stack([value.value.float() for *_, value in values])
        if self.fabric.world_size > 1:
            stacked = self.fabric.all_reduce(stacked, reduce_op="mean")
        numbers = stacked.tolist()
        for (step, player, value), number in zip(values, numbers, strict=True):
            if not math.isfinite(value.weight * number):
                raise self._gone_bad(
                    step + 1, f"term {value.name!r} of player {player!r} became {number} (weight {value.weight:g})"
                )
        return {id(value): number for (*_, value), number in zip(values, numbers, strict=True)}

    def _gone_bad(self, step: int, what: str) -> Diverged:
        kept = self.checkpoints.all()
        where = f"the checkpoint of step {int(kept[-1].name)} is kept" if kept else "no checkpoint was made yet"
        return Diverged(
            f"stage {self.stage.name!r}, step {step}: {what}; {where}; lower the learning rate, clip gradients, "
            "or look at the data"
        )

    def _evaluate(self) -> None:
        """Evaluate in eval mode, leaving the random state as it was: how often one looks must not change the run."""
        assert self.stage.evaluate is not None
        state = random_state()
        looked_at = [*(model.module for model in self.trained.values()), *(player.objective for player in self.players)]
        with self._looking(looked_at):
            self.figures = {name: float(value) for name, value in self.stage.evaluate().items()}
        restore_random_state(state)
        self.context.metrics.append({"step": self.step, "kind": "eval", "metrics": self.figures})
        self.context.metrics.track(self.figures, self.step)
        if self.stage.best is not None:
            if self.stage.best not in self.figures:
                known = ", ".join(self.figures)
                raise RunError(f"stage {self.stage.name!r}: best={self.stage.best!r} is not among {known}")
            value = self.stage.sign * self.figures[self.stage.best]
            if value < self.best["value"]:
                state_dict = {key: t.clone() for key, t in full(self._result().state_dict()).items()}
                self.best = {"value": value, "step": self.step, "waited": 0, "state": state_dict}
            else:
                self.best["waited"] += 1

    @contextmanager
    def _looking(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Forwards that teach nothing: no gradient, and no statistics kept by ``modules``, which are in eval mode."""
        modes = {part: part.training for module in modules for part in module.modules()}
        for module in modules:
            module.eval()
        with torch.no_grad(), self.fabric.autocast(), whole(self.tapped):
            yield
        for part, mode in modes.items():
            part.training = mode

    # -- saving and going on ----------------------------------------------------------------------------------------

    def _checkpoint_due(self, saved: float) -> bool:
        if self.step == self.stage.steps:
            return False
        if self.stage.checkpoint_every is not None:
            return self.step % self.stage.checkpoint_every == 0
        if self.step % self.stage.log_every:
            return False
        due = time.monotonic() - saved > 60 * self.run_.checkpoint_minutes
        return bool(self.fabric.broadcast(due)) if self.fabric.world_size > 1 else due

    def _sound(self, model: Observed) -> dict[str, Tensor]:
        """The weights of a model, for saving: not if they went bad, which a gradient does where no term shows it."""
        state = full(model.module.state_dict())
        for name, parameter in model.module.named_parameters():
            if parameter.requires_grad and not torch.isfinite(state[name]).all():
                raise self._gone_bad(self.step, f"the weights {name!r} of {model.name} became nan or infinite")
        return state

    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = {
            "step": self.step,
            "elapsed": self.elapsed,
            "models": [self._sound(model) for model in self.trained.values()],
            "objectives": [player.objective.state_dict() for player in self.players],
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "ema": [player.ema.module.state_dict() if player.ema else None for player in self.players],
            "sources": [source.state_dict() for source in self._streams()],
            "precision": self.fabric.strategy.precision.state_dict(),
            "best": self.best,
            "figures": self.figures,
        }
        random_states = [random_state()]
        if self.fabric.world_size > 1:
            random_states = [{}] * self.fabric.world_size
            torch.distributed.all_gather_object(random_states, random_state())
        return {**full(state), "random": random_states}

    def _save_checkpoint(self) -> None:
        if self.deepspeed:  # which pickles its optimizers' state: after a kill this stage begins again
            return
        state = self._state()
        if self.run_.main:
            self.checkpoints.save(self.step, state)
        self.fabric.barrier()

    def _restore(self) -> None:
        state = self.checkpoints.latest()
        self.context.metrics.rewrite(
            [line for line in self.context.metrics.read() if line["step"] <= (state["step"] if state else 0)]
        )
        if state is None:
            return
        for model, saved in zip(self.trained.values(), state["models"], strict=True):
            load_module_state(model.module, saved)
        for player, optimizer, objective, moments, mean in zip(
            self.players, self.optimizers, state["objectives"], state["optimizers"], state["ema"], strict=True
        ):
            player.objective.load_state_dict(objective)
            load_optimizer_state(optimizer, moments)
            if player.ema is not None:
                load_module_state(player.ema.module, mean)
        for source, saved in zip(self._streams(), state["sources"], strict=True):
            source.load_state_dict(saved)
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.best, self.figures = state["best"], state["figures"]
        self.step, self.elapsed = state["step"], state["elapsed"]
        if len(state["random"]) == self.fabric.world_size:
            restore_random_state(state["random"][self.fabric.global_rank])

    def _result(self) -> nn.Module:
        first = self.players[0]
        if self.stage.result is not None:
            return self.stage.result
        return first.ema.module if first.ema is not None else first.trained[0].module

    def finish(self) -> str:
        """Put the result together and save it."""
        for model in self.trained.values():
            self._sound(model)
        result = self._result()
        self.context.results = {**self.figures, "steps": self.step}
        if self.best["state"] is not None and self.stage.best:
            load_module_state(result, self.best["state"])
            self.context.facts["best_step"] = self.best["step"]
            self.context.results[self.stage.best] = self.stage.sign * self.best["value"]
        self.context.facts.update(steps=self.step, seconds=self.elapsed)
        kind = "model"
        for parameter in result.parameters() if self.deepspeed else ():  # slices of one buffer
            parameter.data = parameter.detach().clone()
        if self.skeleton is not None:
            self.skeleton.load_state_dict(full(result.state_dict()), assign=True)
            result = self.skeleton
        if self.run_.main:
            kind = self.context.save(result, saver=self.stage.save)
        self.fabric.barrier()
        return kind

    def close(self) -> None:
        """Leave the models as plain modules: no wrapper, gradients on."""
        for player in self.players:
            for model in player.trained:
                model.engine = model.tapped
                model.tapped.uncompile()
                model.module.eval()
