"""Run code that a model has written: short, small, alone, and with nothing to reach.

Where the system allows it the program gets its own namespaces (no network, no other process in sight, a small disk in
memory) and, by Landlock, may read the Python installation and write its own folder, nothing else. Where ``bwrap`` is
installed it builds the same walls. Limits on time, memory, processes, files and output always hold. Where the network
or the files cannot be closed off, nothing is run unless ``allow_unisolated`` says so.
"""

from __future__ import annotations

import json
import os
import re
import resource
import selectors
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import psutil

from stillhouse.base import sandbox_child
from stillhouse.base.errors import StillhouseError

Ending = Literal["ok", "error", "signal", "time", "cpu", "memory", "processes"]
SYSTEM = ("/usr", "/lib", "/lib64", "/lib32", "/bin", "/etc/ld.so.cache", "/etc/localtime", "/dev/null", "/dev/zero",
          "/dev/urandom", "/dev/random")  # fmt: skip
POLL = 0.05  # seconds between looks at the program's processes


class SandboxError(StillhouseError):
    """Code was not run, because it could not be closed off."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        ended: ``ok`` (exit code 0), ``error`` (another one), ``signal``, or the limit it ran into: ``time`` (wall
            clock), ``cpu``, ``memory``, ``processes``.
        exit_code: None unless it ended by itself.
        signal: the signal that ended it, by name; empty otherwise.
        stdout, stderr: what it wrote, up to the limit; ``truncated`` says that there was more.
        seconds: wall-clock time.
        isolation: what it was closed off from: ``network``, ``processes``, ``files``, ``disk``.
        missing: what it was not closed off from, and why.
    """

    ended: Ending
    exit_code: int | None
    signal: str
    stdout: str
    stderr: str
    truncated: bool
    seconds: float
    isolation: tuple[str, ...]
    missing: Mapping[str, str]

    @property
    def ok(self) -> bool:
        return self.ended == "ok"


@dataclass(frozen=True, kw_only=True)
class Sandbox:
    """A way of running programs; ``run`` may be called from several threads.

    Args:
        seconds: wall-clock limit.
        cpu_seconds: of each process; whole seconds.
        memory: address space of each process, bytes.
        processes: processes at one time; counted every 50 ms, and by the kernel unless we are root.
        file_bytes: size of a file; with its own disk, of all its files together.
        open_files: per process.
        output_bytes: of stdout and of stderr that are kept.
        allow_unisolated: run programs even where network or files cannot be closed off.
        bubblewrap: path of ``bwrap``; by default the one on the PATH, if any; empty: do without.
    """

    seconds: float = 10.0
    cpu_seconds: int = 5
    memory: int = 512 * 2**20
    processes: int = 16
    file_bytes: int = 16 * 2**20
    open_files: int = 64
    output_bytes: int = 64 * 2**10
    allow_unisolated: bool = False
    bubblewrap: str | None = None

    def run(self, code: str, *, stdin: str = "", files: Mapping[str, str] | None = None) -> Outcome:
        """Run a Python program in an empty folder with an empty environment.

        ``files`` (relative path -> text) are put beside it. Raises `SandboxError` if it could not be closed off.
        """
        for name in files or {}:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)*", name) or ".." in name.split("/"):
                raise SandboxError(f"file name {name!r} is not allowed in a sandbox; use plain relative names")
        with tempfile.TemporaryDirectory(prefix="stillhouse-sandbox-") as folder:
            work = Path(folder, "work")
            work.mkdir(mode=0o700)
            Path(folder, "program.json").write_text(json.dumps({"code": code, "files": dict(files or {})}))
            Path(folder, "stdin").write_text(stdin, encoding="utf-8")
            read, write = os.pipe()
            try:
                with Path(folder, "stdin").open("rb") as given:
                    process = subprocess.Popen(
                        self.command(Path(folder), report=write),
                        stdin=given,
                        stdout=subprocess.PIPE,
                        stderr=subprocess.PIPE,
                        cwd=work,
                        env={},
                        pass_fds=(write,),
                        start_new_session=True,
                    )
                os.close(write)
                write = -1
                return self._follow(process, read)
            finally:
                os.close(read)
                if write >= 0:
                    os.close(write)

    def command(self, folder: Path, *, report: int) -> list[str]:
        """The command line that runs ``folder/program.json`` in ``folder/work``."""
        bwrap = shutil.which("bwrap") if self.bubblewrap is None else self.bubblewrap
        child = sandbox_child.__file__
        config: dict[str, Any] = {
            "work": str(folder / "work"),
            "program": str(folder / "program.json"),
            "python": sys.executable,
            "readable": [*SYSTEM, *_installation()],
            "report": report,
            "disk": self.file_bytes,
            "required": [] if self.allow_unisolated else ["network", "files"],
            "have": ["network", "processes", "files"] if bwrap else [],
            "limits": {
                "RLIMIT_CPU": self.cpu_seconds,
                "RLIMIT_AS": self.memory,
                "RLIMIT_FSIZE": self.file_bytes,
                "RLIMIT_NOFILE": self.open_files,
                "RLIMIT_CORE": 0,
                "RLIMIT_NPROC": min(self.processes + 1, resource.getrlimit(resource.RLIMIT_NPROC)[1] % 2**31),
            },
        }
        python = [sys.executable, "-I", "-S", "-B", child, json.dumps(config)]
        if not bwrap:
            return python
        shown = [part for path in (*SYSTEM[:5], *_installation(), child, str(folder / "program.json"))
                 for part in ("--ro-bind-try", path, path)]  # fmt: skip
        walls = ["--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--dev", "/dev"]
        return [bwrap, *walls, *shown, "--bind", config["work"], config["work"], "--chdir", config["work"], *python]

    def _follow(self, process: subprocess.Popen[bytes], report: int) -> Outcome:
        begun = time.monotonic()
        kept = {"stdout": bytearray(), "stderr": bytearray(), "report": bytearray()}
        truncated, stopped = False, ""
        with selectors.DefaultSelector() as selector:
            for name, stream in (("stdout", process.stdout), ("stderr", process.stderr), ("report", report)):
                selector.register(stream if stream is not None else report, selectors.EVENT_READ, name)
            looked = begun
            while selector.get_map():
                for key, _ in selector.select(timeout=POLL):
                    part = os.read(_number(key.fileobj), 2**16)
                    if not part:
                        selector.unregister(key.fileobj)
                    room = self.output_bytes if key.data != "report" else 2**16
                    truncated |= len(kept[key.data]) + len(part) > room
                    kept[key.data] += part[: room - len(kept[key.data])]
                now = time.monotonic()
                if not stopped and now - begun > self.seconds:
                    stopped = "time"
                if not stopped and now - looked > POLL:
                    looked = now
                    if len(_descendants(process.pid)) > self.processes + 1:  # one of them is our own
                        stopped = "processes"
                if stopped or kept["report"].count(b"\n") > 1 or process.poll() is not None:
                    _kill(process)
        _kill(process)
        process.wait()
        for pipe in (process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()
        seconds = time.monotonic() - begun
        said = [json.loads(line) for line in bytes(kept["report"]).splitlines()]
        out, error = (bytes(kept[name]).decode("utf-8", "replace") for name in ("stdout", "stderr"))
        if not said and not stopped:
            raise SandboxError(f"the sandbox could not be set up: {error.strip()[-300:] or process.returncode}")
        walls: dict[str, Any] = said[0] if said else {"have": [], "missing": {}, "refused": []}
        if walls["refused"]:
            why = "; ".join(f"{name}: {walls['missing'].get(name, 'not closed off')}" for name in walls["refused"])
            raise SandboxError(
                f"code cannot be closed off here ({why}); install bubblewrap, allow user namespaces, or accept it with "
                "allow_unisolated"
            )
        status = said[1]["status"] if len(said) > 1 else None
        ended, code, killer = _ending(stopped, status, error)
        return Outcome(
            ended, code, killer, out, error, truncated, seconds, tuple(walls["have"]), dict(walls["missing"])
        )


def _ending(stopped: str, status: int | None, stderr: str) -> tuple[Ending, int | None, str]:
    if stopped == "time":
        return "time", None, ""
    if stopped == "processes":
        return "processes", None, ""
    if status is None:
        return "signal", None, "SIGKILL"  # something took the walls down with it
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        return ("cpu" if number == signal.SIGXCPU else "signal"), None, name
    code = os.WEXITSTATUS(status)
    if code and re.search(r"^(MemoryError|OSError: \[Errno 12\])", stderr, re.MULTILINE):
        return "memory", code, ""
    return ("error" if code else "ok"), code, ""


def _installation() -> list[str]:
    """Where this Python and its libraries are."""
    return sorted({os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, sys.exec_prefix)})


def _number(stream: int | IO[Any] | Any) -> int:
    return stream if isinstance(stream, int) else stream.fileno()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.Error:
        return []


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End everything that was started, whatever groups and sessions it has moved to."""
    for _ in range(100):
        left = _descendants(process.pid)
        for one in left:
            try:
                one.kill()
            except psutil.Error:
                continue
        if not left:
            break
    for end in (lambda: os.killpg(process.pid, signal.SIGKILL), process.kill):
        try:
            end()
        except (ProcessLookupError, PermissionError):
            continue
