"""What the benchmarks share: peak memory, alternated timing, the machine and its versions, table and JSON.

Peak memory on a CPU is measured in two ways, because neither sees everything:

- ``allocated``: bytes live in torch's CPU allocator, summed over its allocation events as the profiler records
  them. Exact and repeatable for every tensor, those inside C++ operators included; blind to the workspace that
  BLAS takes for itself and to what the C library keeps after a free.
- ``resident``: the kernel's high-water mark of the resident set (``VmHWM``, reset through
  ``/proc/self/clear_refs``) above the resident set before the call, after ``malloc_trim``. It misses no peak,
  however short, which a sampling thread would; it counts the C library's leftovers too. Where the kernel does not
  offer the reset, a thread samples the resident set every millisecond instead.

On CUDA the allocator's own peak counter (``torch.cuda.max_memory_allocated``) is exact.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib.metadata
import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch

MIB = 2**20
QUIET = 0.1
RESULTS = Path(__file__).parent / "results"


def peak_allocated(call: Callable[[], object], device: str = "cpu") -> int:
    """Peak of the bytes that torch's allocator holds during ``call``, above those it held before."""
    _settle()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def peak_resident(call: Callable[[], object]) -> tuple[int, str]:
    """Peak growth of the resident set during ``call``, and how it was measured."""
    _settle()
    process = psutil.Process()
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5 resets the high-water mark
    except OSError:
        return _sampled_peak(call, process), "sampled every millisecond"
    before = process.memory_info().rss
    call()
    status = Path("/proc/self/status").read_text()
    high_water = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return high_water * 1024 - before, "VmHWM"


@dataclass
class Timing:
    """Wall-clock seconds of every call in every round, and the share of the machine others used meanwhile."""

    seconds: dict[str, list[float]]
    others: list[float]

    @property
    def rounds(self) -> list[int]:
        """The rounds to judge by: those on a quiet machine if there are three, otherwise all."""
        quiet = [k for k, share in enumerate(self.others) if share <= QUIET]
        return quiet if len(quiet) >= 3 else list(range(len(self.others)))

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name][k] for k in self.rounds)

    def ratio(self, numerator: str, denominator: str) -> float:
        """Median of the ratios within a round, which cancels what slows a whole round down."""
        return statistics.median(self.seconds[numerator][k] / self.seconds[denominator][k] for k in self.rounds)

    def summary(self) -> str:
        quiet = sum(share <= QUIET for share in self.others)
        return (
            f"{len(self.others)} rounds, {quiet} of them quiet (others used at most {QUIET:.0%} of the machine), "
            f"judged by {len(self.rounds)}"
        )


def time_alternated(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmups: int = 1,
    patience: float = 0.0,
    device: str = "cpu",
) -> Timing:
    """Time every call, in rounds through all of them, so that they share the machine's moods.

    Before each round wait up to ``patience`` seconds for other processes to leave the machine alone: threads
    that share cores with strangers spend their time waiting for one another.
    """
    timing = Timing({name: [] for name in calls}, [])
    for round_ in range(-warmups, repeats):
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline and _share_of_others(_busy_now(), wait=1.0) > QUIET:
            pass
        before = _busy_now()
        for name, call in calls.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            if round_ >= 0:
                timing.seconds[name].append(time.perf_counter() - start)
        if round_ >= 0:
            timing.others.append(_share_of_others(before))
    return timing


def environment(*packages: str) -> dict[str, object]:
    """The machine and the versions that a figure depends on."""
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "torch_threads": torch.get_num_threads(),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": versions,
    }


def print_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """A plain table; numbers to the right."""
    cells = [[*header], *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[k]) for row in cells) for k in range(len(header))]
    for number, row in enumerate(cells):
        first, *others = (
            cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        print("  ".join([first, *others]).rstrip())
        if number == 0:
            print("  ".join("-" * w for w in widths))


def write_json(path: Path, payload: Mapping[str, object]) -> None:
    """Write the results so that the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(json.dumps(payload, indent=2) + "\n")
    temporary.replace(path)
    print(f"wrote {path}")


def _cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def _settle() -> None:
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _busy_now() -> tuple[float, float, float]:
    """The time, and the CPU seconds that the whole machine and this process have used."""
    machine = psutil.cpu_times()
    idle = machine.idle + getattr(machine, "iowait", 0.0)
    return time.monotonic(), sum(machine[:8]) - idle, time.process_time()


def _share_of_others(before: tuple[float, float, float], *, wait: float = 0.0) -> float:
    """Share of the machine's cores that other processes have used since ``before``."""
    time.sleep(wait)
    wall, machine, own = (now - then for now, then in zip(_busy_now(), before, strict=True))
    return max(0.0, machine - own) / (wall * (os.cpu_count() or 1))


def _synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _sampled_peak(call: Callable[[], object], process: psutil.Process) -> int:
    before = peak = process.memory_info().rss
    done = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        call()
    finally:
        done.set()
        thread.join()
    return peak - before


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()
