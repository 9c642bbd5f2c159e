"""What model-written code may try: limits, walls, nothing left behind. Each program would be harmless outside."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import psutil
import pytest

from stillhouse.base import sandbox_child
from stillhouse.base.sandbox import Outcome, Sandbox, SandboxError

SMALL = Sandbox(seconds=30, cpu_seconds=1, memory=256 * 2**20, processes=6, file_bytes=2**20, output_bytes=1000)


@pytest.fixture(autouse=True, scope="module")
def _closed() -> None:
    try:
        SMALL.run("pass")
    except SandboxError as error:
        pytest.skip(f"this system cannot close code off: {error}")


def run(code: str, box: Sandbox = SMALL, **given: object) -> Outcome:
    return box.run(code, **given)  # type: ignore[arg-type]


def left_over(mark: str) -> list[psutil.Process]:
    """Processes with ``mark`` on their command line or in their folder's name, a moment after the end."""
    for _ in range(50):
        found = [p for p in psutil.process_iter(["cmdline"]) if mark in " ".join(p.info["cmdline"] or [])]
        if not found:
            break
        time.sleep(0.02)
    return found


def test_a_program_runs():
    done = run("import sys; print(sys.stdin.read() + open('data/x.txt').read())", stdin="6*", files={"data/x.txt": "7"})
    assert (done.ended, done.exit_code, done.stdout, done.stderr) == ("ok", 0, "6*7\n", "")
    assert done.ok and not done.truncated and {"network", "files"} <= set(done.isolation)


def test_nothing_of_ours_is_there():
    os.environ["SECRET_OF_THE_TEST"] = "x"
    done = run("import os; print(os.listdir('.'), 'SECRET_OF_THE_TEST' in os.environ, os.environ.get('HOME'))")
    assert done.stdout == "['main.py'] False None\n"


@pytest.mark.parametrize(("code", "exit_code"), [("import sys; sys.exit(3)", 3), ("1/0", 1), ("not Python", 1)])
def test_errors(code, exit_code):
    done = run(code)
    assert (done.ended, done.exit_code) == ("error", exit_code)


def test_an_infinite_loop_ends_by_its_cpu_time():
    done = run("while True: pass", Sandbox(seconds=60, cpu_seconds=1))
    assert done.ended == "cpu" and done.signal == "SIGXCPU"


def test_a_sleeper_ends_by_the_clock():
    done = run("import time; time.sleep(60)", Sandbox(seconds=0.4))
    assert done.ended == "time" and done.exit_code is None and done.seconds < 5


def test_it_cannot_ignore_the_end():
    code = "import signal, time\nfor s in (15, 2, 1, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: time.sleep(1)"
    assert run(code, Sandbox(seconds=0.4)).ended == "time"


def test_a_memory_hog():
    done = run("x = bytearray(2**30)")
    assert done.ended == "memory" and "MemoryError" in done.stderr


FORKS = """
import os, time
for _ in range(60):  # bounded, should the sandbox fail
    try:
        if os.fork() == 0:
            {escape}
            time.sleep(40)
            os._exit(0)
    except OSError as error:
        print(error.errno)
        break
time.sleep(40)
"""


@pytest.mark.parametrize("escape", ["pass", "os.setsid()"])
def test_a_fork_bomb(escape):
    done = run(FORKS.format(escape=escape), Sandbox(seconds=30, processes=6))
    assert done.ended == "processes" or "11" in done.stdout  # stopped by us, or refused by the kernel
    assert left_over("-I -B main.py") == []


def test_huge_output_is_cut():
    done = run("print('a' * 10**7); import sys; print('end', file=sys.stderr)")
    assert done.ended == "ok" and done.truncated and done.stdout == "a" * 1000 and done.stderr == "end\n"


def test_its_own_folder_is_small():
    one = run("open('f', 'wb').write(b'x' * 3 * 2**20)")
    many = run("for i in range(40):\n    open(str(i), 'wb').write(b'x' * 2**17)")
    assert one.ended == many.ended == "error"
    assert "File too large" in one.stderr or "No space" in one.stderr
    if "disk" in many.isolation:
        assert "No space left" in many.stderr


def test_files_outside_cannot_be_written_or_read(tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("abc")
    for code in (
        f"open({str(tmp_path / 'new')!r}, 'w')",
        f"open({str(secret)!r}, 'a')",
        f"print(open({str(secret)!r}).read())",
        f"import os; os.unlink({str(secret)!r})",
        f"import os; print(os.listdir({str(Path.home())!r}))",
        "open('../../escaped', 'w')",
        "import os; os.symlink('/etc/passwd', 'link'); print(open('link').read())",
        f"import os; os.truncate({str(secret)!r}, 0)",
    ):
        done = run(code)
        assert done.ended == "error" and "abc" not in done.stdout, code
        assert "PermissionError" in done.stderr or "Permission denied" in done.stderr or "FileNotFound" in done.stderr
    assert secret.read_text() == "abc" and os.listdir(tmp_path) == ["secret"]


def test_the_network_is_not_there():
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.3)
        port = server.getsockname()[1]
        done = run(f"import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2); print('in')")
        assert done.ended == "error" and "in" not in done.stdout
        with pytest.raises(TimeoutError):
            server.accept()
        name = f"\0stillhouse-{os.getpid()}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(name)
        listener.listen()
        assert run(f"import socket; s = socket.socket(socket.AF_UNIX); s.connect({name!r}); print('in')").stdout == ""
        listener.close()


def test_signals():
    died = run("import os; os.kill(os.getpid(), 11)")
    assert (died.ended, died.signal, died.exit_code) == ("signal", "SIGSEGV", None)
    aborted = run("import os; os.abort()")
    assert (aborted.ended, aborted.signal) == ("signal", "SIGABRT")
    outside = run(f"import os\nfor pid in ({os.getpid()}, {os.getppid()}): os.kill(pid, 0)")
    assert outside.ended == "error"  # not in sight, or not allowed
    above = run("import os; os.kill(os.getppid(), 9); print('on')")
    assert above.ended in ("ok", "error", "signal")  # whichever: we are still here, with an answer


def test_what_it_leaves_running_is_ended():
    mark = "sleep-of-the-sandbox-test"
    code = (
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)', {mark!r}], start_new_session=True,\n"
        "    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\nprint('started')"
    )
    done = run(code)
    assert done.stdout == "started\n" and done.seconds < 25
    assert left_over(mark) == []


def test_the_folder_is_gone(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    run("open('f', 'w').write('x')")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../../x", ""])
def test_file_names_stay_inside(name):
    with pytest.raises(SandboxError, match="plain relative names"):
        run("pass", files={name: "x"})


# -- where walls cannot be built ------------------------------------------------------------------------------------


@pytest.fixture
def no_namespaces(monkeypatch, tmp_path):
    """A child to which the kernel says no."""
    text = Path(sandbox_child.__file__).read_text()
    refusing = tmp_path / "child.py"
    refusing.write_text(
        text.replace("    uid, gid = os.getuid()", "    raise OSError(1, 'no namespaces')\n    uid, gid = os.getuid()")
    )
    monkeypatch.setattr(sandbox_child, "__file__", str(refusing))


def test_it_refuses_what_it_cannot_close_off(no_namespaces, tmp_path):
    with pytest.raises(SandboxError, match=r"network: .*no namespaces.*allow_unisolated"):
        run(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert not (tmp_path / "ran").exists()


def test_allowed_all_the_same_it_says_what_is_missing_and_ends_everything(no_namespaces):
    mark = "sleep-without-namespaces"
    code = (
        "import subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(30)', {mark!r}], start_new_session=True,\n"
        "    stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)\nprint('started')"
    )
    done = run(code, Sandbox(seconds=25, allow_unisolated=True))
    assert done.ended == "ok" and done.stdout == "started\n"
    assert "no namespaces" in done.missing["network"] and "network" not in done.isolation
    assert left_over(mark) == []


def test_bubblewrap_s_command_line(tmp_path):
    line = Sandbox(bubblewrap="/usr/bin/bwrap", processes=5, memory=2**28).command(tmp_path, report=9)
    assert line[0] == "/usr/bin/bwrap" and "--unshare-all" in line and "--die-with-parent" in line
    work = str(tmp_path / "work")
    assert line[line.index("--bind") + 1 : line.index("--bind") + 3] == [work, work]
    assert line.count("--bind") == 1  # the only place that can be written
    bound = {line[i + 1] for i, part in enumerate(line) if part == "--ro-bind-try"}
    assert str(Path.home()) not in bound and "/" not in bound and str(tmp_path / "program.json") in bound
    config = json.loads(line[-1])
    assert set(config["have"]) == {"network", "processes", "files"} and config["limits"]["RLIMIT_AS"] == 2**28
    plain = Sandbox(bubblewrap="").command(tmp_path, report=9)
    assert "bwrap" not in " ".join(plain[:5]) and json.loads(plain[-1])["have"] == []


def test_a_sandbox_that_does_not_start_is_an_error(monkeypatch, tmp_path):
    broken = tmp_path / "child.py"
    broken.write_text("raise SystemExit('broken child')")
    monkeypatch.setattr(sandbox_child, "__file__", str(broken))
    with pytest.raises(SandboxError, match="broken child"):
        run("pass")
