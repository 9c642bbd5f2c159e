"""Files that appear whole or not at all, and state trees in safetensors and JSON. Nothing is pickled."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillhouse.base.errors import RunError


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path to write; on leaving without error it becomes ``path`` in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent)
    except OSError as error:
        raise _disk_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A temporary folder to fill; on leaving without error it replaces ``path``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            _sync(file)
        _sync(temporary)
        shutil.rmtree(path, ignore_errors=True)
        os.replace(temporary, path)
        _sync(path.parent)
    except Exception as error:
        # Libraries written in Rust (safetensors, tokenizers) wrap the system's errors in their own.
        if not isinstance(error, OSError) and "(os error " not in str(error):
            raise
        raise _disk_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def sweep(folder: Path) -> None:
    """Remove what writers that were killed left in ``folder``, which no other process may be writing to."""
    for left in list(folder.rglob(".*.tmp")):
        if re.fullmatch(r"\..+\.\d+\.tmp", left.name):
            shutil.rmtree(left, ignore_errors=True)
            left.unlink(missing_ok=True)


@contextmanager
def room_to_write(folder: Path) -> Iterator[None]:
    """A full disk is a `RunError`, wherever under ``folder`` it shows: in a log, or in a library."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise _disk_error(Path(error.filename or folder), error) from error


@contextmanager
def locked(file: Path, busy: Callable[[], None]) -> Iterator[None]:
    """Hold the lock ``file``; if another process has it, call ``busy`` (which may raise), then wait."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(file)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            busy()
            lock.acquire()
    except OSError as error:
        raise RunError(f"cannot use the folder {file.parent}: {error}") from error
    try:
        yield
    finally:
        lock.release()


def check_room(folder: Path, needed: int, what: str) -> None:
    """Raise `RunError` if ``folder`` has fewer than ``needed`` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise RunError(
            f"{what} needs about {needed / 2**20:,.0f} MiB for checkpoints and its result, but {folder} has "
            f"{free / 2**20:,.0f} MiB free; free some space or choose another output"
        )


def _disk_error(path: Path, error: Exception) -> RunError:
    return RunError(
        f"could not write {path}: {error}; what was saved before is intact: free some space and resume the run"
    )


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, default=str) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON; a file that is not JSON is a `RunError` that names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise RunError(f"cannot read {path}: {error}; delete it to have it made again") from error


def _encode(tree: Any, tensors: dict[str, Tensor], seen: dict[tuple[Any, ...], str]) -> Any:
    if isinstance(tree, Tensor):
        local = tree.detach()
        key = (local.data_ptr(), local.dtype, tuple(local.shape), local.stride())
        if local.numel() == 0 or key not in seen:
            seen[key] = str(len(tensors))
            storage = ("storage", local.untyped_storage().data_ptr())
            whole = local.numel() * local.element_size() == local.untyped_storage().nbytes() and storage not in seen
            seen[storage] = ""
            tensors[seen[key]] = local.cpu().contiguous() if whole else local.cpu().contiguous().clone()
        return {"tensor": seen[key]}
    if isinstance(tree, dict):
        return {"items": [[key, _encode(value, tensors, seen)] for key, value in tree.items()]}
    if isinstance(tree, list | tuple):
        return {"list": [_encode(value, tensors, seen) for value in tree]}
    if tree is None or isinstance(tree, bool | int | float | str):
        return {"value": tree}
    raise TypeError(f"a checkpoint cannot hold a {type(tree).__name__}")


def _decode(node: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "items" in node:
        return {key: _decode(value, tensors) for key, value in node["items"]}
    if "list" in node:
        return [_decode(value, tensors) for value in node["list"]]
    return node["value"]


def save_tree(folder: Path, tree: Any) -> None:
    """Write nested dicts, lists, numbers, strings and tensors to ``folder``; shared tensors are stored once."""
    tensors: dict[str, Tensor] = {}
    structure = _encode(tree, tensors, {})
    with whole_folder(folder) as temporary:
        save_file(tensors, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(structure), encoding="utf-8")


def load_tree(folder: Path) -> Any:
    """Read what `save_tree` wrote."""
    try:
        structure = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        return _decode(structure, load_file(folder / "state.safetensors"))
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise RunError(f"the checkpoint {folder} is damaged ({error}); delete it to go on from an older one") from error


class Checkpoints:
    """The checkpoints of one stage: numbered folders, the newest ``keep`` of them kept."""

    def __init__(self, folder: Path, *, keep: int = 1) -> None:
        self.folder = folder
        self.keep = keep

    def all(self) -> list[Path]:
        """Complete checkpoints, oldest first."""
        return sorted(path for path in self.folder.glob("[0-9]*") if path.is_dir())

    def save(self, step: int, tree: Any) -> None:
        save_tree(self.folder / f"{step:09d}", tree)
        for old in self.all()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)

    def latest(self) -> Any | None:
        """The newest checkpoint that can be read, or None."""
        for folder in reversed(self.all()):
            try:
                return load_tree(folder)
            except RunError:
                shutil.rmtree(folder, ignore_errors=True)
        return None

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def random_state() -> dict[str, Any]:
    """The state of every random generator of this process, as a tree `save_tree` takes."""
    version, numbers, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": list(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss],
        "numpy": [
            kind,
            torch.from_numpy(np.asarray(keys).astype(np.int64)),
            int(position),
            int(has_gauss),
            float(cached),
        ],
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Put every random generator back to ``state``."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))


def seed_all(*parts: object) -> int:
    """Seed every generator from ``parts`` (a run's seed, a stage's name, ...); returns the seed used."""
    import hashlib

    seed = int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:4], "big")
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return seed
