"""Install a Chromium for the report's browser tests, with the system's package manager."""

from __future__ import annotations

import shutil
import subprocess
import sys

MANAGERS = {
    "apt-get": [["apt-get", "update", "-qq"], ["apt-get", "install", "-y", "-qq", "chromium"]],
    "dnf": [["dnf", "install", "-y", "chromium"]],
    "brew": [["brew", "install", "--cask", "chromium"]],
}


def main() -> None:
    manager = next((name for name in MANAGERS if shutil.which(name)), None)
    if manager is None:
        sys.exit("no Chromium, and no package manager known here: install chromium, then run this again")
    for command in MANAGERS[manager]:
        if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
            sys.exit(f"`{' '.join(command)}` failed: install chromium by hand (as root), then run this again")


if __name__ == "__main__":
    main()
