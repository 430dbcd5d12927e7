"""Children forked from the server are processes of their own, and it refuses where forking is unsound."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lbi import forkserver
from lbi.forkserver import ForkServer

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="forking is used on Linux only")

PRETENDED = """
import torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
torch._C._cuda_getCurrentRawStream = lambda device: 0
begun = []
torch.cuda._lazy_init = lambda: begun.append(1)
torch.cuda.get_device_capability = lambda device=None: torch.cuda._lazy_init() or (9, 0)
torch.cuda.is_initialized = lambda: bool(begun)
from lbi import forkserver
print(forkserver._import_all())
"""
"""As much of a machine with a GPU as imports ask of."""

MODULE = """
import json, os, sys, time
from pathlib import Path
COUNT = 0
def main(folder):
    global COUNT
    COUNT += 1
    print("said by the child")
    (folder / "seen.json").write_text(json.dumps({
        "pid": os.getpid(), "session": os.getsid(0), "parent": os.getppid(), "count": COUNT,
        "torch": "torch" in sys.modules, "given": os.environ.get("LBI_TEST"), "stdin": sys.stdin.fileno(),
    }))
    if (folder / "sleep").exists():
        time.sleep(600)
    if (folder / "raise").exists():
        raise RuntimeError("on purpose")
    return 3
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ForkServer]:
    folder = tmp_path_factory.mktemp("modules")
    (folder / "fake_run.py").write_text(MODULE)
    root = str(Path(__file__).parent.parent)
    variables = {**os.environ, "LBI_PARENT": str(os.getpid()), "PYTHONPATH": f"{folder}:{root}", "LBI_TEST": "yes"}
    made = ForkServer({**variables, "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1"})
    yield made
    made.close()


def run(server: ForkServer, folder: Path) -> tuple[int, dict[str, Any]]:
    code = server.start("fake_run", str(folder), folder / "log.txt").wait()
    return code, json.loads((folder / "seen.json").read_text())


@pytest.mark.slow
def test_a_child_has_torch_and_shares_nothing_else(server: ForkServer, tmp_path: Path) -> None:
    assert server.refusal is None
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        code, seen = run(server, tmp_path / name)
        assert code == 3
        assert seen["torch"]
        assert seen["given"] == "yes"
        # A session of its own, and memory of its own: the other child's counting is not seen.
        assert seen["session"] == seen["pid"] != os.getpid()
        assert seen["parent"] == server.process.pid
        assert seen["count"] == 1
        assert "said by the child" in (tmp_path / name / "log.txt").read_text()


def test_an_exception_is_an_exit_code_and_a_traceback_in_the_log(server: ForkServer, tmp_path: Path) -> None:
    (tmp_path / "raise").touch()
    code, _ = run(server, tmp_path)
    assert code == 70
    assert "RuntimeError: on purpose" in (tmp_path / "log.txt").read_text()


def test_children_that_end_at_once_are_all_seen_to_end(server: ForkServer, tmp_path: Path) -> None:
    children = []
    for number in range(4):
        folder = tmp_path / str(number)
        folder.mkdir()
        children.append(server.start("fake_run", str(folder), folder / "log.txt"))
    for number in range(4):
        wait_for(tmp_path / str(number) / "seen.json")
    # All have ended, and said so, before the first is asked about.
    time.sleep(0.2)
    assert [child.wait() for child in children] == [3] * 4


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 120
    while not file.exists():
        assert time.monotonic() < deadline, f"{file.name} did not come about"
        time.sleep(0.01)


def test_a_killed_child_takes_nothing_with_it(server: ForkServer, tmp_path: Path) -> None:
    (tmp_path / "sleep").touch()
    child = server.start("fake_run", str(tmp_path), tmp_path / "log.txt")
    wait_for(tmp_path / "seen.json")
    assert child.poll() is None
    os.killpg(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    (tmp_path / "sleep").unlink()
    assert run(server, tmp_path)[0] == 3


@pytest.mark.slow
def test_a_server_that_is_killed_takes_its_children_with_it(tmp_path: Path) -> None:
    (tmp_path / "fake_run.py").write_text(MODULE)
    (tmp_path / "sleep").touch()
    root = str(Path(__file__).parent.parent)
    own = ForkServer({**os.environ, "LBI_PARENT": str(os.getpid()), "PYTHONPATH": f"{tmp_path}:{root}"})
    child = own.start("fake_run", str(tmp_path), tmp_path / "log.txt")
    wait_for(tmp_path / "seen.json")
    own.process.kill()
    assert child.wait() == -signal.SIGKILL
    own.close()
    deadline = time.monotonic() + 5
    while _lives(child.pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not _lives(child.pid)


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_it_refuses_to_fork_beside_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "MODULES", ())
    monkeypatch.setattr(forkserver, "OPTIONAL", ())
    monkeypatch.setattr(forkserver, "_thread_names", lambda: ["python", "watcher"])
    assert str(forkserver._import_all()) == "the imports left 2 threads: python, watcher"


def test_it_refuses_what_does_not_import(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forkserver, "MODULES", ("lbi.no_such_module",))
    assert "does not import" in str(forkserver._import_all())


@pytest.mark.slow
def test_imports_on_a_machine_with_a_gpu_do_not_initialize_cuda() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PRETENDED], capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "TORCHAO_FORCE_SKIP_LOADING_SO_FILES": "1", "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "initialized CUDA" not in done.stdout
