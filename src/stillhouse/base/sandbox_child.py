"""What stands between a `Sandbox` and the program: run as a script of its own, with nothing but the standard library.

It closes itself off (namespaces, Landlock), starts the program under limits, and writes how it ended to a pipe.
Three processes: this one, the first process of the new process namespace (whose end ends everything in it), and the
program.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import sys
from typing import Any

CLONE = {"user": 0x10000000, "network": 0x40000000, "processes": 0x20000000, "mounts": 0x00020000, "ipc": 0x08000000}
MS_REC, MS_PRIVATE, MS_NOSUID, MS_NODEV = 0x4000, 0x40000, 0x2, 0x4
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_CHILD_SUBREAPER = 1, 38, 36
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
READ, ALL_V1 = 0b1101, (1 << 13) - 1  # execute, read file, read directory; everything of the first version

libc = ctypes.CDLL(None, use_errno=True)


def check(result: int, what: str) -> int:
    """A failed system call as an ``OSError``."""
    if result < 0:
        error = ctypes.get_errno()
        raise OSError(error, f"{what}: {os.strerror(error)}")
    return result


def enter_namespaces() -> None:
    """Own users, network (none), processes, mounts and shared memory."""
    uid, gid = os.getuid(), os.getgid()
    check(libc.unshare(sum(CLONE.values())), "unshare")
    for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{file}", "w") as handle:
            handle.write(text)
    check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mount")


def own_disk(folder: str, size: int) -> None:
    """A disk in memory of ``size`` bytes over the work folder."""
    options = f"size={size},mode=700".encode()
    check(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options), "mount tmpfs")


def restrict_files(readable: list[str], writable: list[str]) -> None:
    """With Landlock (Linux 5.13): read only ``readable``, write only ``writable``, no TCP, no signal to the outside."""
    abi = check(libc.syscall(LANDLOCK_CREATE, None, 0, 1), "landlock")
    handled = ALL_V1 | (1 << 13 if abi >= 2 else 0) | (1 << 14 if abi >= 3 else 0) | (1 << 15 if abi >= 5 else 0)
    attributes = struct.pack("QQQ", handled, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)
    attributes = attributes[: 8 if abi < 4 else 16 if abi < 6 else 24]
    rules = check(libc.syscall(LANDLOCK_CREATE, attributes, len(attributes), 0), "landlock")
    for paths, wanted in ((readable, READ), (writable, handled)):
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
                rights = wanted if os.path.isdir(path) else wanted & (0b111 | 1 << 14 | 1 << 15)
                rule = struct.pack("=Qi", rights & handled, handle)
                check(libc.syscall(LANDLOCK_ADD, rules, 1, rule, 0), "landlock")
                os.close(handle)
    check(libc.syscall(LANDLOCK_RESTRICT, rules, 0), "landlock")


def set_limits(limits: dict[str, int]) -> None:
    for name, value in limits.items():
        hard = value + 1 if name == "RLIMIT_CPU" else value
        resource.setrlimit(getattr(resource, name), (value, hard))


def run_program(config: dict[str, Any], program: dict[str, Any], report: int, *, alone: bool) -> None:
    """Start the program, wait for it, and report how it ended."""
    os.chdir(config["work"])
    for name, text in {**program["files"], "main.py": program["code"]}.items():
        os.makedirs(os.path.dirname(os.path.join(config["work"], name)), exist_ok=True)
        with open(name, "w", encoding="utf-8") as handle:
            handle.write(text)
    child = os.fork()
    if child == 0:
        os.close(report)
        for number in range(1, signal.NSIG):
            with contextlib.suppress(OSError, ValueError):
                signal.signal(number, signal.SIG_DFL)
        # The kernel counts processes by user and user namespace: without our own, those of the whole user.
        limits = {name: value for name, value in config["limits"].items() if alone or name != "RLIMIT_NPROC"}
        set_limits(limits)
        os.execve(config["python"], [config["python"], "-I", "-B", "main.py"], {})
    while True:
        done, status, usage = os.wait4(-1, 0)
        if done == child:
            break
    said = {"status": status, "cpu": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss * 1024}
    os.write(report, json.dumps(said).encode() + b"\n")


def main() -> None:
    config = json.loads(sys.argv[1])
    report = config["report"]
    libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    with open(config["program"], encoding="utf-8") as handle:
        program = json.load(handle)
    have: list[str] = list(config["have"])
    missing: dict[str, str] = {}
    if not have:  # nobody has closed us off yet
        try:
            enter_namespaces()
            have += ["network", "processes"]
            own_disk(config["work"], config["disk"])  # never outside our own namespace of mounts
            have.append("disk")
        except OSError as error:
            missing = {name: str(error) for name in ("network", "processes", "disk") if name not in have}
    try:
        check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
        restrict_files(config["readable"], [config["work"], "/dev/null"])
        have.append("files")
    except OSError as error:
        if "files" not in have:
            missing["files"] = str(error)
    refused = [name for name in config["required"] if name not in have]
    os.write(report, json.dumps({"have": sorted(set(have)), "missing": missing, "refused": refused}).encode() + b"\n")
    if refused:
        return
    if "processes" not in have or config["have"]:
        run_program(config, program, report, alone="processes" in have)
        while True:  # what the program left running is ours now, as their subreaper; we are ended together
            signal.pause()
    first = os.fork()
    if first == 0:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        run_program(config, program, report, alone=True)
        os._exit(0)
    os.waitpid(first, 0)


if __name__ == "__main__":
    main()
