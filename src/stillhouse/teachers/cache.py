"""Teacher outputs, computed once, kept on disk, and read in place of the teacher.

A cache is a folder of shards, each a safetensors file beside a JSON file with its checksum; reading maps a shard into
memory and decodes only the samples asked for. Every file appears whole or not at all, so that filling goes on where
it was stopped; a shard that is missing or damaged is found, and it alone is computed again. Nothing is pickled.

Shapes: S samples, T positions of each (any further shape for dense columns), K kept tokens, V vocabulary.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file
from torch import Tensor, nn

from stillhouse.base.errors import ConfigError, DataError
from stillhouse.base.files import check_room, whole_file, write_json
from stillhouse.core.observed import Batch, Observed
from stillhouse.core.stage import Context, Transform
from stillhouse.teachers.topk_codec import Arrays, Tables, TopK, TopKCodec

FORMAT = 1  # raise it when the same outputs are written differently
SAMPLE_ID = "sample_id"
READ = ("input_ids", "attention_mask", "position_ids")  # what a language model is fed
Compute = Callable[[list[int]], Mapping[str, Tensor]]


class Column(Protocol):
    """How one output of a teacher is kept. Outputs are tensors (S, ...), a sample a row."""

    def describe(self) -> dict[str, Any]:
        """Everything the bytes on disk depend on."""
        ...

    def gather(self, outputs: Iterator[Tensor]) -> Any:
        """What is kept of a shard's outputs, which come some samples at a time."""
        ...

    def fit(self, kept: Any) -> dict[str, np.ndarray]:
        """What all shards share, from the first of them; may be empty."""
        ...

    def encode(self, kept: Any, shared: Arrays) -> dict[str, np.ndarray]:
        """The arrays of a shard: "words" and "offsets" into them, and others with a row per sample."""
        ...

    def decode(self, name: str, arrays: Arrays, shared: Arrays) -> Mapping[str, Tensor]:
        """The tensors of the samples that ``arrays`` hold, by name."""
        ...


@dataclass
class TopKColumn:
    """The ``k`` likeliest tokens of logits (S, T, V), coded by `TopKCodec`.

    It reads as ``tokens``, ``log_p`` and ``log_rest``, and under its own name as whole logits, for terms that want
    them: log-probabilities with the rest's mass spread evenly.
    """

    k: int
    vocab_size: int
    error: float = 1e-4
    _tables: Tables | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.codec = TopKCodec(self.k, self.vocab_size, self.error)

    def describe(self) -> dict[str, Any]:
        return {"kind": "top-k", "k": self.k, "vocab_size": self.vocab_size, "error": self.error}

    def gather(self, outputs: Iterator[Tensor]) -> TopK:
        parts = [top_k(logits[..., : self.vocab_size], self.k) for logits in outputs]
        return TopK(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))

    def fit(self, kept: TopK) -> dict[str, np.ndarray]:
        return dict(self.codec.fit(kept))

    def encode(self, kept: TopK, shared: Arrays) -> dict[str, np.ndarray]:
        return self.codec.encode(kept, shared)

    def decode(self, name: str, arrays: Arrays, shared: Arrays) -> Mapping[str, Tensor]:
        self._tables = self._tables or self.codec.tables(shared)
        top = self.codec.decode(arrays, shared, tables=self._tables)
        return {part: torch.from_numpy(array) for part, array in top._asdict().items()}

    def dense(self, tokens: Tensor, log_p: Tensor, log_rest: Tensor) -> Tensor:
        """Log-probabilities of the whole vocabulary (S, T, V), the rest's mass spread evenly."""
        return spread_evenly(tokens, log_p, log_rest, self.vocab_size)


@dataclass(frozen=True)
class DenseColumn:
    """Any output as it is (``float32``) or rounded (``float16``), squeezed without loss; reads under its own name."""

    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float16", "float32"):
            raise ConfigError(f"dtype={self.dtype!r}: a cache keeps float16 or float32")

    def describe(self) -> dict[str, Any]:
        return {"kind": "dense", "dtype": self.dtype}

    def gather(self, outputs: Iterator[Tensor]) -> np.ndarray:
        with np.errstate(over="ignore"):  # told below
            kept = np.concatenate([tensor.detach().float().cpu().numpy().astype(self.dtype) for tensor in outputs])
        if not np.isfinite(kept).all():
            raise DataError(f"the teacher gave values that are not finite in {self.dtype}; nothing was stored")
        return kept

    def fit(self, kept: np.ndarray) -> dict[str, np.ndarray]:
        return {}

    def encode(self, kept: np.ndarray, shared: Arrays) -> dict[str, np.ndarray]:
        codec = pa.Codec("zstd", 3)
        planes = [np.moveaxis(row.reshape(-1, 1).view(np.uint8), 0, 1).tobytes() for row in kept]  # like beside like
        packed = [np.frombuffer(codec.compress(plane, asbytes=True), np.uint8) for plane in planes]
        return {
            "words": np.concatenate(packed),
            "offsets": np.concatenate([[0], np.cumsum([len(row) for row in packed])]).astype(np.int64),
            "shape": np.tile(np.array(kept.shape[1:], np.int64), (len(kept), 1)),
        }

    def decode(self, name: str, arrays: Arrays, shared: Arrays) -> Mapping[str, Tensor]:
        shape, width, rows = arrays["shape"][0], np.dtype(self.dtype).itemsize, []
        size = int(np.prod(shape)) * width
        for start, stop in zip(arrays["offsets"], arrays["offsets"][1:], strict=False):
            raw = pa.decompress(
                arrays["words"][start:stop].tobytes(), decompressed_size=size, codec="zstd", asbytes=True
            )
            planes = np.frombuffer(raw, np.uint8).reshape(width, -1)
            rows.append(np.ascontiguousarray(planes.T).view(self.dtype).reshape(shape))
        return {name: torch.from_numpy(np.stack(rows)).float()}


@torch.no_grad()
def top_k(logits: Tensor, k: int) -> TopK:
    """The likeliest ``k`` of logits (..., V); the others' mass is summed from their own logits."""
    log_p = logits.detach().double().log_softmax(-1)
    kept = log_p.topk(k, -1)
    log_rest = log_p.scatter(-1, kept.indices, -torch.inf).logsumexp(-1)
    return TopK(kept.indices.cpu().numpy(), kept.values.cpu().numpy(), log_rest.cpu().numpy())


def spread_evenly(tokens: Tensor, log_p: Tensor, log_rest: Tensor, vocab_size: int) -> Tensor:
    """Log-probabilities (..., V) from the kept ones (..., K); the tokens not kept share ``log_rest`` (...) evenly."""
    others = vocab_size - tokens.shape[-1]
    each = log_rest - torch.log(torch.tensor(float(max(1, others)), dtype=log_p.dtype, device=log_p.device))
    whole = each.unsqueeze(-1).expand(*tokens.shape[:-1], vocab_size)
    return whole.scatter(-1, tokens, log_p)


class TeacherCache:
    """Outputs of a teacher by sample id, on disk.

    Args:
        folder: where the files are, or will be.
        columns: what is kept: ``{"logits": TopKColumn(64, vocab_size=50257), "hidden": DenseColumn("float16")}``.
        samples: ids run from 0 to ``samples`` - 1.
        fingerprint: identifies teacher and data; a folder made for another one is not read.
        compute: ``compute(ids) -> {column: tensor (len(ids), ...)}``: the live teacher, for filling and repairs.
        shard_samples: samples in a file: what is computed again when one is damaged.
        batch: samples computed at one time.
    """

    def __init__(
        self,
        folder: Path | str,
        columns: Mapping[str, Column],
        samples: int,
        *,
        fingerprint: str = "",
        compute: Compute | None = None,
        shard_samples: int = 512,
        batch: int = 8,
    ) -> None:
        if not columns or samples < 1 or shard_samples < 1:
            raise ConfigError("a teacher cache needs a column, a sample, and shards of at least one sample")
        self.folder = Path(folder)
        self.columns = dict(columns)
        self.samples = samples
        self.compute = compute
        self.shard_samples = shard_samples
        self.batch = batch
        self.plan = {
            "format": FORMAT,
            "fingerprint": fingerprint,
            "samples": samples,
            "shard_samples": shard_samples,
            "columns": {name: column.describe() for name, column in self.columns.items()},
        }
        self._open: dict[int, Any] = {}
        self._shared: dict[str, np.ndarray] | None = None

    @property
    def shards(self) -> int:
        return -(-self.samples // self.shard_samples)

    def bytes(self) -> int:
        """Size of all files."""
        return sum(file.stat().st_size for file in self.folder.iterdir()) if self.folder.is_dir() else 0

    # -- filling ----------------------------------------------------------------------------------------------------

    def damaged(self) -> list[int]:
        """Shards that are missing or do not have the checksum they were written with; all, if the plan differs."""
        if not self._planned() or self._read_whole("shared") is None:
            return list(range(self.shards))
        return [number for number in range(self.shards) if not self._sound(self._name(number))]

    def fill(self, done: Callable[[int], None] = lambda samples: None) -> list[int]:
        """Compute and write what is missing or damaged; returns these shards. ``done`` is told how far it is."""
        todo = self.damaged()
        if todo and self.compute is None:
            raise DataError(self._help(f"shard {todo[0]} of {self.shards} is missing or damaged"))
        if len(todo) == self.shards:
            for file in self.folder.glob("*"):
                file.unlink()
            write_json(self.folder / "cache.json", self.plan)
        for number in todo:
            self._write(number)
            done(min((number + 1) * self.shard_samples, self.samples))
        done(self.samples)
        return todo

    def _write(self, number: int) -> None:
        self._open.pop(number, None)
        kept = self._computed(number)
        if self._shared is None and (shared := self._read_whole("shared")) is not None:
            self._shared = shared
        if self._shared is None:
            first = kept if number == 0 else self._computed(0)
            fitted = {name: column.fit(first[name]) for name, column in self.columns.items()}
            self._shared = {f"{name}/{part}": a for name, arrays in fitted.items() for part, a in arrays.items()}
            self._save("shared", self._shared)
        arrays = {
            f"{name}/{part}": array
            for name, column in self.columns.items()
            for part, array in column.encode(kept[name], _under(self._shared, name)).items()
        }
        check_room(self.folder, sum(array.nbytes for array in arrays.values()), "a shard of the teacher cache")
        self._save(self._name(number), arrays)

    def _computed(self, number: int) -> dict[str, Any]:
        """What is kept of a shard, from the live teacher; no more than a batch of whole outputs exists at a time."""
        assert self.compute is not None
        ids = range(number * self.shard_samples, min((number + 1) * self.shard_samples, self.samples))
        batches = [list(ids[start : start + self.batch]) for start in range(0, len(ids), self.batch)]
        parts: dict[str, list[Any]] = {name: [] for name in self.columns}
        for batch in batches:
            outputs = self.compute(batch)
            for name, column in self.columns.items():
                if name not in outputs or len(outputs[name]) != len(batch):
                    raise DataError(f"the teacher gave no output {name!r} with a row for each of {len(batch)} samples")
                parts[name].append(column.gather(iter([outputs[name]])))
        return {name: _joined(found) for name, found in parts.items()}

    def _save(self, name: str, arrays: Mapping[str, np.ndarray]) -> None:
        with whole_file(self.folder / f"{name}.safetensors") as temporary:
            save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, temporary)
            record = {"sha256": _checksum(temporary), "bytes": temporary.stat().st_size}
        write_json(self.folder / f"{name}.json", record)

    # -- reading ----------------------------------------------------------------------------------------------------

    def read(self, ids: Sequence[int] | Tensor) -> dict[str, dict[str, Tensor]]:
        """``column -> part -> tensor``, a row per id, in their order; damaged shards are computed again."""
        wanted = [int(number) for number in ids]
        wrong = next((number for number in wanted if not 0 <= number < self.samples), None)
        if wrong is not None:
            raise DataError(f"the teacher cache {self.folder} holds samples 0 to {self.samples - 1}, not {wrong}")
        by_shard: dict[int, list[int]] = {}
        for row, number in enumerate(wanted):
            by_shard.setdefault(number // self.shard_samples, []).append(row)
        found: dict[str, dict[str, Tensor]] = {}
        for shard, rows in by_shard.items():
            handle = self._shard(shard)
            inside = [wanted[row] - shard * self.shard_samples for row in rows]
            for name, column in self.columns.items():
                arrays = _rows(handle, name, inside)
                for part, tensor in column.decode(name, arrays, _under(self._shared or {}, name)).items():
                    whole = found.setdefault(name, {})
                    if part not in whole:
                        whole[part] = tensor.new_empty(len(wanted), *tensor.shape[1:])
                    whole[part][rows] = tensor
        return found

    def _shard(self, number: int) -> Any:
        if self._shared is None:
            if not self._planned():
                raise DataError(self._help("there is no cache of this teacher, these samples and these columns"))
            self._shared = self._read_whole("shared")
            if self._shared is None:
                if self.compute is None:
                    raise DataError(self._help("shared.safetensors is missing or damaged"))
                before = _recorded(self.folder / "shared.json")
                self._write(0)  # the same outputs give the same codebook
                if _recorded(self.folder / "shared.json") != before:
                    self.fill()
        if number not in self._open:
            if not self._sound(self._name(number)):
                if self.compute is None:
                    raise DataError(self._help(f"shard {number} is missing or damaged"))
                self._write(number)
            while len(self._open) >= 64:
                self._open.pop(next(iter(self._open)))
            self._open[number] = safe_open(self.folder / f"{self._name(number)}.safetensors", framework="numpy")
        return self._open[number]

    def _planned(self) -> bool:
        try:
            return json.loads((self.folder / "cache.json").read_text(encoding="utf-8")) == self.plan
        except (OSError, ValueError):
            return False

    def _read_whole(self, name: str) -> dict[str, np.ndarray] | None:
        try:
            return load_file(self.folder / f"{name}.safetensors") if self._sound(name) else None
        except (OSError, SafetensorError):
            return None

    def _sound(self, name: str) -> bool:
        file = self.folder / f"{name}.safetensors"
        recorded = _recorded(self.folder / f"{name}.json")
        return recorded is not None and file.exists() and _checksum(file) == recorded

    def _name(self, number: int) -> str:
        return f"{number:05d}"

    def _help(self, problem: str) -> str:
        return f"teacher cache {self.folder}: {problem}; fill it again (only what is missing is computed)"


def _joined(parts: list[Any]) -> Any:
    if isinstance(parts[0], TopK):
        return TopK(*(np.concatenate(arrays) for arrays in zip(*parts, strict=True)))
    return np.concatenate(parts)


def _under(arrays: Arrays, name: str) -> dict[str, np.ndarray]:
    return {key[len(name) + 1 :]: array for key, array in arrays.items() if key.startswith(f"{name}/")}


def _rows(handle: Any, name: str, rows: list[int]) -> dict[str, np.ndarray]:
    """The arrays of some samples of a shard; nothing else is read from disk."""
    parts = [key[len(name) + 1 :] for key in handle.keys() if key.startswith(f"{name}/")]  # noqa: SIM118
    offsets = handle.get_tensor(f"{name}/offsets")
    words = handle.get_slice(f"{name}/words")
    found = {
        part: np.stack([handle.get_slice(f"{name}/{part}")[row : row + 1][0] for row in rows])
        for part in parts
        if part not in ("words", "offsets")
    }
    lengths = [int(offsets[row + 1] - offsets[row]) for row in rows]
    found["words"] = np.concatenate([words[int(offsets[row]) : int(offsets[row + 1])] for row in rows])
    found["offsets"] = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return found


def _checksum(file: Path) -> str:
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def _recorded(file: Path) -> str | None:
    try:
        return json.loads(file.read_text(encoding="utf-8"))["sha256"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


# -- in place of the teacher ----------------------------------------------------------------------------------------


class _Outputs(Mapping[str, Tensor]):
    """What was read, with whole logits made only if a term asks for them."""

    def __init__(self, cache: TeacherCache, found: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._cache, self._found = cache, found
        self._parts = {
            key: tensor
            for name, parts in found.items()
            for part, tensor in parts.items()
            for key in ((name,) if part == name else (part, f"{name}.{part}"))
        }

    def __getitem__(self, name: str) -> Tensor:
        if name in self._parts:
            return self._parts[name]
        column = self._cache.columns[name]
        return column.dense(**self._found[name])  # type: ignore[attr-defined]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._parts, **self._cache.columns})

    def __len__(self) -> int:
        return len(list(iter(self)))


class _CacheReader(nn.Module):
    def __init__(self, cache: TeacherCache) -> None:
        super().__init__()
        self.cache = cache

    def forward(self, sample_id: Tensor) -> _Outputs:
        found = self.cache.read(sample_id.tolist())
        moved = {
            name: {part: tensor.to(sample_id.device) for part, tensor in parts.items()} for name, parts in found.items()
        }
        return _Outputs(self.cache, moved)


def cached_teacher(cache: TeacherCache, *, name: str = "teacher") -> Observed:
    """A stand-in for the observed teacher: its outputs come from ``cache``, by ``batch["sample_id"]``.

    ``teacher.output("logits")`` works wherever the live teacher's logits do; ``output("tokens")``, ``output("log_p")``
    and ``output("log_rest")`` are the parts of a top-k column, ``output("hidden")`` is a dense column of that name.
    """

    def call(run: Callable[..., Any], batch: Batch) -> Any:
        if SAMPLE_ID not in batch:
            raise KeyError(f"a cached teacher needs batch[{SAMPLE_ID!r}]; wrap the data set: Numbered(data)")
        return run(batch[SAMPLE_ID])

    return Observed(_CacheReader(cache), frozen=True, name=name, call=call)


class Numbered:
    """A map-style data set whose items are dicts, with their place in it as ``sample_id``."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int | Sequence[int]) -> dict[str, Any]:
        return {**self.data[index], SAMPLE_ID: torch.as_tensor(index)}


# -- filling as a stage ---------------------------------------------------------------------------------------------


def fill_stage(
    name: str, open_cache: Callable[[Path], TeacherCache], *, cache: Mapping[str, Any] | None = None
) -> Transform:
    """A stage that fills a cache; its artifact is the cache's folder, which ``open_cache`` is given.

    Killed, it goes on after the last whole shard. With ``cache`` the stage is shared between runs: see `Stage`.
    """

    def fill(context: Context) -> None:
        if not context.run.main:
            return
        filling = context.folder / "filling"
        if context.artifact_path.exists():  # killed in the very moment after
            os.replace(context.artifact_path, filling)
        filling.mkdir(parents=True, exist_ok=True)
        opened = open_cache(filling)
        with context.run.progress(name, opened.samples, unit="samples") as bar:
            opened.fill(bar.update)
        context.results = {"samples": opened.samples, "bytes": opened.bytes()}
        os.replace(filling, context.artifact_path)

    return Transform(name, fill, cache=cache)


def model_fingerprint(model: nn.Module) -> str:
    """A checksum of a model's weights and buffers, names and shapes included."""
    found = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        raw = tensor.detach().cpu().contiguous()
        found.update(f"{name} {raw.dtype} {tuple(raw.shape)}".encode())
        found.update(raw.flatten().view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
    return found.hexdigest()[:20]


def causal_lm_cache(
    folder: Path,
    model: nn.Module,
    data: Any,
    *,
    k: int,
    vocab_size: int,
    error: float = 1e-4,
    fingerprint: str,
    shard_samples: int = 256,
    batch: int = 8,
) -> TeacherCache:
    """The cache of a causal language model's next-token distributions on windows of text.

    ``data[ids]`` gives ``input_ids`` (S, T), an ``attention_mask`` if there is padding, ``position_ids`` if windows are
    packed; position t of the cache
    is what the model says after token t, for t = 0 ... T - 2. From ``k`` = ``vocab_size`` on, logits are kept whole.
    """
    whole = k >= vocab_size
    column: Column = DenseColumn("float32") if whole else TopKColumn(k, vocab_size, error)

    @torch.no_grad()
    def compute(ids: list[int]) -> dict[str, Tensor]:
        device = next(model.parameters()).device
        batch = {key: value.to(device) for key, value in data[ids].items() if key in READ}
        model.eval()
        return {"logits": model(**batch, use_cache=False).logits[:, :-1, :vocab_size]}

    return TeacherCache(
        folder,
        {"logits": column},
        len(data),
        fingerprint=fingerprint,
        compute=compute,
        shard_samples=shard_samples,
        batch=batch,
    )
