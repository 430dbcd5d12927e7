"""A GPU among several processes: which may be used, who has it, and who else is on it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fakes.driver import CARDS, UUIDS

from lbi import environment, gpu_processes
from lbi.errors import InputError
from lbi.gpu_lock import GpuLock
from lbi.gpu_processes import ForeignWatch
from lbi.slots import Slot


def test_a_lock_outlives_nobody_and_is_open_to_every_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    lock = GpuLock("GPU-x")
    holder = (
        "import sys, tempfile, time\n"
        f"tempfile.tempdir = {tempfile.gettempdir()!r}\n"
        "from lbi.gpu_lock import GpuLock\n"
        "held = GpuLock('GPU-x')\n"
        "print(held.acquire(), flush=True)\n"
        "time.sleep(600)"
    )
    other = subprocess.Popen(
        [sys.executable, "-c", holder], stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    )
    assert other.stdout is not None
    assert other.stdout.readline().strip() == "True"
    assert not lock.acquire()
    assert f"process {other.pid}" in lock.owner()
    assert lock.path.stat().st_mode & 0o777 == 0o666
    other.kill()
    other.wait()
    other.stdout.close()
    assert lock.acquire()
    assert not GpuLock("GPU-x").acquire()
    lock.release()
    assert lock.path.exists()
    # A link in a folder that everybody may write to is not followed.
    (tmp_path / "victim").write_text("whole")
    (tmp_path / "lbi-gpu-GPU-y.lock").symlink_to(tmp_path / "victim")
    with pytest.raises(InputError, match="lock"):
        GpuLock("GPU-y").acquire()
    assert (tmp_path / "victim").read_text() == "whole"


@pytest.mark.parametrize(
    ("named", "expected"),
    [
        (None, [0, 1, 2, 3]),
        ("", []),
        ("2", [2]),
        ("3,1", [3, 1]),
        ("1,9,2", [1]),
        ("-1", []),
        ("NoDevFiles", []),
        (UUIDS[2], [2]),
        (f"{UUIDS[3][:6]},0", [3, 0]),
        ("GPU-nope,0", []),
    ],
)
def test_cuda_visible_devices_of_the_driver_decides_which_gpus_are_used(named: str | None, expected: list[int]) -> None:
    assert environment.visible(CARDS, named) == [CARDS[index] for index in expected]


def test_a_slice_of_a_gpu_keeps_its_name() -> None:
    (card,) = environment.visible(CARDS, "MIG-abc")
    assert Slot(0, 1, card).variables() == {"CUDA_VISIBLE_DEVICES": "MIG-abc"}


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process that is none of ours."""
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE, start_new_session=True)
    yield process.pid
    process.kill()
    process.wait()
    assert process.stdin is not None
    process.stdin.close()


def watched(monkeypatch: pytest.MonkeyPatch, *looks: set[int] | None) -> tuple[set[int], dict[str, Any]]:
    """What a watch finds in one sample, NVML giving these lists in turn; then its report."""
    answers = iter(looks)
    monkeypatch.setattr(gpu_processes, "current_gpu", lambda: UUIDS[0])
    monkeypatch.setattr(gpu_processes, "listed", lambda uuid: next(answers))
    watch = ForeignWatch("cuda")
    with watch:
        pass
    return watch.during, watch.report()


def test_a_stranger_on_the_gpu_is_noticed(monkeypatch: pytest.MonkeyPatch, stranger: int) -> None:
    me = os.getpid()
    for looks in (({me, stranger}, {me}), ({me}, {me, stranger}), ({me, stranger}, {me, stranger})):
        during, report = watched(monkeypatch, *looks)
        assert during == {stranger}
        assert (report["gpu"], report["foreign_gpu"]) == (UUIDS[0], "seen")
        assert str(stranger) in report["foreign_gpu_detail"]


def test_a_helper_of_our_own_is_no_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    helper = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    both = {os.getpid(), helper.pid}
    assert watched(monkeypatch, both, both) == (set(), {"gpu": UUIDS[0], "foreign_gpu": "none"})
    helper.communicate()


def test_what_cannot_be_known_is_said_and_void_nothing(monkeypatch: pytest.MonkeyPatch, stranger: int) -> None:
    # Neither a list without ourselves, which is of another pid namespace, nor none at all.
    for look, why in (({stranger}, "pid namespace"), (set(), "pid namespace"), (None, "NVML")):
        during, report = watched(monkeypatch, look, look)
        assert during == set()
        assert report["foreign_gpu"] == "unknown"
        assert why in report["foreign_gpu_detail"]
    assert ForeignWatch("cpu").report() == {}


def test_nvml_may_be_absent_or_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def fail(*_: object) -> None:
        raise NVMLError

    working = {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda uuid: f"handle of {uuid}",
        "nvmlDeviceGetComputeRunningProcesses": lambda handle: [SimpleNamespace(pid=4711), SimpleNamespace(pid=12)],
    }

    def ask(module: object) -> set[int] | None:
        gpu_processes.nvml_handle.cache_clear()
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, "pynvml", module)
            return gpu_processes.listed(UUIDS[0])

    assert ask(SimpleNamespace(**working)) == {12, 4711}
    assert ask(None) is None
    for name in ("nvmlInit", "nvmlDeviceGetHandleByUUID", "nvmlDeviceGetComputeRunningProcesses"):
        assert ask(SimpleNamespace(**{**working, name: fail})) is None
    gpu_processes.nvml_handle.cache_clear()
