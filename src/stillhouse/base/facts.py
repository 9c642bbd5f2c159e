"""Facts about where a run happens: versions, machine, code revision."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("stillhouse", "torch", "lightning-fabric", "transformers", "datasets", "numpy")


def digest(*parts: Any) -> str:
    """A fingerprint of JSON-like values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


def code_fingerprint() -> str:
    """A digest of this package's source: results of other code are not taken for results of this one."""
    root = Path(__file__).parents[1]
    sources = b"".join(path.read_bytes() for path in sorted(root.rglob("*.py")))
    return hashlib.sha256(sources).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """What the run was done on."""
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "platform": platform.platform(),
        "processor": platform.processor() or platform.machine(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(psutil.virtual_memory().total / 2**30, 1),
        "devices": devices,
    }


def revision() -> dict[str, Any] | None:
    """The git revision of the code, if it is in a checkout."""

    def git(*arguments: str) -> str:
        where = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(where, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"revision": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
