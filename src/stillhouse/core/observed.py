"""Observed models: a model, the places in it that are listened to, and forwards that are not repeated.

A `Signal` is a handle: it names a tensor (an output, a tap inside the model, a parameter) of one model under one
view of the batch. A `Turn` knows all signals that will be read, so that every model runs once per view and batch,
with gradients only where somebody needs them, and stops as soon as the last wanted tensor is there.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.hooks import RemovableHandle

from stillhouse.base.errors import ModelError, suggest

Batch = Mapping[str, Any]


def as_batch(batch: Any) -> Batch:
    """Bring what a data loader yields into the form signals read: a mapping.

    A tensor becomes ``{"inputs": x}``, a pair ``{"inputs": x, "labels": y}``; a mapping stays as it is.
    """
    if isinstance(batch, Mapping):
        return batch
    if isinstance(batch, Tensor):
        return {"inputs": batch}
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return {"inputs": batch[0], "labels": batch[1]}
    raise TypeError(f"a batch must be a tensor, an (inputs, labels) pair or a mapping, not {type(batch).__name__}")


@dataclass(frozen=True)
class Address:
    """A place in a model: an output by name, a module's input or output by path, or a parameter by path."""

    kind: Literal["output", "module", "input", "parameter"]
    path: str | int | None = None
    index: int = 0
    call: int = 0


@dataclass(frozen=True, eq=False)
class View:
    """One way of feeding a model: a name, how the batch is changed, and what is set up around the forward."""

    observed: Observed
    name: str = ""
    transform: Callable[[Batch], Batch] | None = None
    feed: Mapping[str, Signal] = field(default_factory=dict)
    around: Callable[[nn.Module], AbstractContextManager[Any]] | None = None

    def output(self, name: str | int | None = None) -> Signal:
        """The model's output, or the part of it called ``name`` (``"logits"``; an index for tuples)."""
        return Signal(self, Address("output", name))

    def tap(self, path: str, *, of: Literal["output", "input"] = "output", index: int = 0, call: int = 0) -> Signal:
        """The output (or input) of the sub-module at ``path``.

        ``index`` picks from a module that returns a tuple; ``call`` picks one of several calls of a shared module
        (0 the first, -1 the last). Raises `ModelError` with the closest existing paths if ``path`` does not exist.
        """
        modules = dict(self.observed.module.named_modules(remove_duplicate=False))
        if path not in modules:
            raise ModelError(
                f"{self.observed.name} has no sub-module {path!r}{suggest(path, (n for n in modules if n))}"
            )
        return Signal(self, Address("module" if of == "output" else "input", path, index, call))

    def parameter(self, path: str) -> Signal:
        """The parameter at ``path``, as a tensor that objectives may compute with (an output matrix, say)."""
        names = [name for name, _ in self.observed.module.named_parameters(remove_duplicate=False)]
        if path not in names:
            raise ModelError(f"{self.observed.name} has no parameter {path!r}{suggest(path, names)}")
        return Signal(self, Address("parameter", path))

    def batch(self, batch: Batch) -> Batch:
        """The batch as this view sees it; what other models feed is in it already."""
        if self.transform is not None:
            return self.transform(batch)
        if self.feed or self.around or not self.name:
            return batch
        if self.name not in batch:
            raise KeyError(f"view {self.name!r} needs batch[{self.name!r}]; the batch has: {', '.join(batch)}")
        other = batch[self.name]
        if isinstance(other, Mapping):
            return other
        self.observed.takes_inputs(self.name, batch)
        return {**batch, "inputs": other}


@dataclass(frozen=True, eq=False)
class Signal:
    """A handle that yields one tensor of an observed model for a batch."""

    view: View
    address: Address
    detached: bool = False
    transforms: tuple[Callable[[Tensor], Tensor], ...] = ()

    @property
    def observed(self) -> Observed:
        return self.view.observed

    def detach(self) -> Signal:
        """The same tensor without gradient; a model read only so runs under ``no_grad``."""
        return replace(self, detached=True, transforms=(*self.transforms, _detached))

    def map(self, function: Callable[[Tensor], Tensor]) -> Signal:
        """The tensor after ``function``."""
        return replace(self, transforms=(*self.transforms, function))

    def __call__(self, batch: Any) -> Tensor:
        """Run the model on ``batch`` just for this signal."""
        return Turn([self]).read(self, as_batch(batch))

    def __str__(self) -> str:
        where = self.address.path if self.address.path is not None else "output"
        return f"{self.observed.name}.{where}"


def _detached(value: Any) -> Any:
    """A tensor, or a structure of tensors, without gradient."""
    return value.detach() if isinstance(value, Tensor) else tree_map_only(Tensor, Tensor.detach, value)


class _Stop(Exception):
    pass


class Tapped(nn.Module):
    """A model whose forward returns the tensors at the addresses of the current plan.

    Wrappers (DDP, FSDP2, precision) go around this module, so that taps and parameters are outputs of the wrapped
    forward and an early stop is caught inside it.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.compiled: Callable[..., Any] | None = None
        self.plan: tuple[Address, ...] = ()
        self._captured: dict[Address, Any] = {}
        self._built_in: list[RemovableHandle] = []

    def compile(self, addresses: Iterable[Address], **options: Any) -> None:
        """Compile the model with hooks for ``addresses`` built in; from then on forwards never stop early."""
        for address in addresses:
            if address.kind in ("module", "input"):
                if address.call:
                    raise ModelError("torch.compile works with the first call of a tapped module only")
                self._built_in.append(self._hook(address, functools.partial(self._captured.__setitem__, address)))
        # Code compiled for another model of this class, with other hooks, must not be taken for this one.
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        self.compiled = torch.compile(self.model, **options)

    def uncompile(self) -> None:
        """Go back to plain forwards, with no hook left behind."""
        while self._built_in:
            self._built_in.pop().remove()
        self.compiled = None

    def _hook(self, address: Address, keep: Callable[[Any], None]) -> RemovableHandle:
        module = self.model.get_submodule(str(address.path))

        def element(value: Any) -> Any:
            return value[address.index] if isinstance(value, tuple | list) else value

        if address.kind == "input":
            return module.register_forward_pre_hook(
                lambda _module, args, kwargs: keep(element(args or tuple(kwargs.values()))), with_kwargs=True
            )
        return module.register_forward_hook(lambda _module, _args, value: keep(element(value)))

    def _listen(self, address: Address, waiting: set[Address] | None) -> RemovableHandle:
        calls = 0

        def keep(value: Any) -> None:
            nonlocal calls
            if address.call in (calls, -1):
                self._captured[address] = value
                if waiting is not None:
                    waiting.discard(address)
                    if not waiting:
                        raise _Stop
            calls += 1

        return self._hook(address, keep)

    def _may_stop(self, taps: list[Address]) -> bool:
        """Whether a forward may end early: nothing else is wanted, and no sharded module would be left half-way."""
        if any(address.kind == "output" or address.call < 0 for address in self.plan):
            return False
        sharded = [name for name, module in self.model.named_modules() if name and hasattr(module, "unshard")]
        return not any(str(address.path).startswith(name + ".") for address in taps for name in sharded)

    def forward(self, *args: Any, **kwargs: Any) -> dict[Address, Tensor]:
        taps = [address for address in self.plan if address.kind in ("module", "input")]
        self._captured.clear()
        handles: list[RemovableHandle] = []
        output = None
        try:
            if self.compiled is not None:
                output = self.compiled(*args, **kwargs)
            elif taps or any(address.kind == "output" for address in self.plan):
                waiting = set(taps) if taps and self._may_stop(taps) else None
                handles = [self._listen(address, waiting) for address in taps]
                output = self.model(*args, **kwargs)
        except _Stop:
            pass
        finally:
            for handle in handles:
                handle.remove()
        found = {address: self._captured[address] for address in taps if address in self._captured}
        self._captured.clear()
        for address in self.plan:
            if address.kind == "output":
                found[address] = _pick(output, address.path)
            elif address.kind == "parameter":
                parameter = self.model.get_parameter(str(address.path))
                found[address] = parameter.view_as(parameter)  # a leaf would escape DDP's search for used parameters
            elif address not in found:
                if self.compiled is not None:
                    raise ModelError(f"{address.path!r} was not tapped when the model was compiled; compile it again")
                raise ModelError(f"the forward did not call {address.path!r} {address.call + 1} time(s)")
        return found


def _pick(output: Any, name: str | int | None) -> Any:
    if name is None or isinstance(output, Tensor):
        return output
    if isinstance(name, int):
        return output[name]
    if isinstance(output, Mapping):
        if name in output:
            return output[name]
        raise ModelError(f"the model's output has no {name!r}{suggest(name, (str(key) for key in output))}")
    if hasattr(output, name):
        return getattr(output, name)
    raise ModelError(f"the model returned {type(output).__name__}, which has no {name!r}; ask for an index instead")


class Observed:
    """A model that objectives listen to.

    Args:
        module: any ``nn.Module``.
        frozen: run without gradient and in evaluation mode, always.
        name: what logs and errors call it; by default the class name.
        options: keyword arguments added to every forward (``{"output_attentions": True}``).
        call: how to feed a batch, ``call(module, batch)``, where matching names is not enough. By default the entries
            of the batch whose names the forward takes are passed by name (labels excepted); a batch with none of
            them is passed as ``module(batch["inputs"])``.
        mode: ``"train"`` or ``"eval"``: what the modules are switched to for training forwards.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        frozen: bool = False,
        name: str | None = None,
        options: Mapping[str, Any] | None = None,
        call: Callable[[Callable[..., Any], Batch], Any] | None = None,
        mode: Literal["train", "eval"] = "train",
    ) -> None:
        self.module = module
        self.frozen = frozen
        self.name = name or type(module).__name__
        self.options = dict(options or {})
        self.mode = mode
        self.tapped = Tapped(module)
        self.engine: nn.Module = self.tapped  # replaced by the wrapped module while a stage trains it
        self._call = call or self._by_name
        self._views: dict[Any, View] = {}
        self._plain = View(self)
        if frozen:
            module.requires_grad_(False)
            module.eval()
        elif mode == "eval":
            module.eval()
        parameters = inspect.signature(module.forward).parameters
        self._accepts = {
            name
            for name, parameter in parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        } - {"labels", "label"}

    def view(
        self,
        name: str,
        transform: Callable[[Batch], Batch] | None = None,
        *,
        feed: Mapping[str, Signal] | None = None,
        around: Callable[[nn.Module], AbstractContextManager[Any]] | None = None,
    ) -> View:
        """The same model on another input or in another shape.

        Args:
            name: what the view is called. Alone, it feeds ``batch[name]`` in place of the inputs.
            transform: makes the view's batch from the batch.
            feed: entries of the batch that other models yield: ``critic.view("fake", feed={"inputs":
                generator.output()})``. Gradients flow through unless the signal is detached.
            around: ``around(module)`` is a context entered for the forward: a sub-network of an elastic model, say.

        Asking again with the same arguments gives the same view, so its forward is shared.
        """
        fed = tuple((entry, s.view, s.address, s.detached, s.transforms) for entry, s in (feed or {}).items())
        key = (name, transform, around, fed)
        return self._views.setdefault(key, View(self, name, transform, dict(feed or {}), around))

    def output(self, name: str | int | None = None) -> Signal:
        """See `View.output`."""
        return self._plain.output(name)

    def tap(self, path: str, *, of: Literal["output", "input"] = "output", index: int = 0, call: int = 0) -> Signal:
        """See `View.tap`."""
        return self._plain.tap(path, of=of, index=index, call=call)

    def parameter(self, path: str) -> Signal:
        """See `View.parameter`."""
        return self._plain.parameter(path)

    def takes_inputs(self, entry: str, batch: Batch) -> None:
        """Raise ``KeyError`` if ``batch["inputs"]`` would be passed over for entries of the batch with other names."""
        named = sorted(self._accepts & batch.keys())
        if self._call == self._by_name and named and "inputs" not in self._accepts:
            raise KeyError(
                f"batch[{entry!r}] is a tensor, but {self.name} is fed by name ({', '.join(named)}); make it a mapping"
            )

    def _by_name(self, run: Callable[..., Any], batch: Batch) -> Any:
        named = {key: value for key, value in batch.items() if key in self._accepts}
        if named:
            return run(**named, **self.options)
        if "inputs" not in batch:
            raise KeyError(
                f"{self.name} takes {', '.join(sorted(self._accepts))}, but the batch has {', '.join(batch)}; "
                "name them alike, call one of them 'inputs', or pass call="
            )
        return run(batch["inputs"], **self.options)

    def run(self, view: View, plan: tuple[Address, ...], batch: Batch, *, grad: bool) -> dict[Address, Tensor]:
        """One forward that returns the tensors at the addresses of ``plan``."""
        module = self.engine if grad else self.tapped
        if self.frozen and self.module.training:  # somebody else holds it too
            self.module.eval()
        self.tapped.plan = plan
        around = view.around(self.module) if view.around else nullcontext()
        with torch.set_grad_enabled(grad and torch.is_grad_enabled()), around:
            return self._call(module, view.batch(batch))


def with_feeds(signals: Iterable[Signal]) -> Iterator[Signal]:
    """The signals, and those that feed their views."""
    for signal in signals:
        yield from with_feeds(signal.view.feed.values())
        yield signal


class Turn:
    """The forwards of one turn: each model runs at most once per view and batch, however many terms read it.

    Args:
        signals: everything that will be read during the turn.
        autocast: entered around each forward of a model that no precision wrapper surrounds.
    """

    def __init__(
        self,
        signals: Iterable[Signal],
        *,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        self._plans: dict[View, dict[Address, bool]] = {}
        self._autocast = autocast
        for signal in with_feeds(signals):
            plan = self._plans.setdefault(signal.view, {})
            grad = not signal.detached and not signal.observed.frozen
            plan[signal.address] = plan.get(signal.address, False) or grad
        self._memo: dict[tuple[View, int], dict[Address, Tensor]] = {}
        self._batches: list[Batch] = []  # kept alive: the memo is keyed by identity

    def read(self, signal: Signal, batch: Batch) -> Tensor:
        """The tensor of ``signal`` for ``batch``; the first reader of a view pays for the forward."""
        key = (signal.view, id(batch))
        if key not in self._memo:
            plan = self._plans[signal.view]
            self._batches.append(batch)
            fed = {name: self.read(other, batch) for name, other in signal.view.feed.items()}
            with self._autocast():
                self._memo[key] = signal.observed.run(
                    signal.view, tuple(plan), {**batch, **fed} if fed else batch, grad=any(plan.values())
                )
        value = self._memo[key][signal.address]
        if signal.detached:
            value = _detached(value)
        for transform in signal.transforms:
            value = transform(value)
        return value

    def clear(self) -> None:
        """Forget all forwards; their graphs are freed with the losses that hold them."""
        self._memo.clear()
        self._batches.clear()
