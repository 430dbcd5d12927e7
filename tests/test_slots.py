"""Slots: which run is where, never two on one GPU, and how they end together."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.driver import (
    CARDS,
    UUIDS,
    assert_one_at_a_time,
    at_once,
    execute,
    interrupts,
    make_driver_units,
    places,
    statuses,
    tasks_of,
)

from lbi import environment, gpu_processes, slots
from lbi.errors import InputError
from lbi.executors import local
from lbi.executors.local import batches
from lbi.gpu_lock import GpuLock
from lbi.plan import Plan
from lbi.process import child_environment
from lbi.schedule import Unit
from lbi.store import Store
from lbi.worker import Event

MakePlan = Callable[..., Plan]
MakeUnits = Callable[..., list[Unit]]


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Four GPUs with nobody on them, and locks that are this test's own."""
    (tmp_path / "locks").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "locks"))
    monkeypatch.setattr(environment, "gpus", lambda: CARDS)
    monkeypatch.setattr(gpu_processes, "listed", lambda uuid: set())


@pytest.fixture
def units(plan: MakePlan, monkeypatch: pytest.MonkeyPatch) -> MakeUnits:
    return make_driver_units(plan, monkeypatch)


@pytest.fixture
def taken() -> Iterator[Callable[..., list[GpuLock]]]:
    """Take the locks of some GPUs, as another driver would. Given back in time for a test to fail, not hang."""
    timers = []

    def take(*uuids: str, seconds: float = 30.0) -> list[GpuLock]:
        locks = [GpuLock(uuid) for uuid in uuids]
        assert all(lock.acquire() for lock in locks)
        for lock in locks:
            timers.append(threading.Timer(seconds, lock.release))
            timers[-1].start()
        return locks

    yield take
    for timer in timers:
        timer.cancel()
        timer.function()


def test_every_gpu_is_used_by_one_run_at_a_time(units: MakeUnits, store: Store) -> None:
    made = units(script=["meet4"] * 4 + ["place"] * 4)
    events, _ = execute(made, store)
    seen = places(made, store)
    assert {place["CUDA_VISIBLE_DEVICES"] for place in seen} == set(UUIDS)
    assert at_once(seen) == 4
    assert_one_at_a_time(seen)
    for place in seen:
        assert [card["uuid"] for card in place["env"]["gpus"]] == [place["CUDA_VISIBLE_DEVICES"]]
        assert UUIDS[place["slot"]["slot"]] == place["CUDA_VISIBLE_DEVICES"]
        assert place["slot"]["slots"] == 4
    assert {event.slot for event in events} == {0, 1, 2, 3}


@pytest.mark.slow
def test_tasks_are_taken_in_their_order_the_baseline_first(units: MakeUnits, store: Store) -> None:
    made = units("quantizer=int8_wo,none", "resources.gpus=1", count=3)
    events, _ = execute(made, store)
    wanted = [task.cell for task in tasks_of(made)]
    assert wanted == [1, 3, 5, 0, 2, 4]
    assert [event.task.cell for event in events if event.kind == "start"] == wanted


def test_all_slots_take_from_the_front_of_one_queue(units: MakeUnits, store: Store) -> None:
    made = units("quantizer=int8_wo,none", script=["place", "meet4"] * 4, count=4)
    events, _ = execute(made, store)
    started = [event.task.cell for event in events if event.kind == "start"]
    assert set(started[:4]) == {1, 3, 5, 7}
    assert sorted(started) == list(range(8))


def test_fewer_gpus_on_request_and_more_than_there_are_is_refused(units: MakeUnits, store: Store) -> None:
    made = units("resources.gpus=2", script="meet2", count=2)
    execute(made, store)
    assert len({place["CUDA_VISIBLE_DEVICES"] for place in places(made, store)}) == 2
    with pytest.raises(InputError, match=r"resources.gpus=5: .*4 × Fake H200"):
        execute(units("resources.gpus=5"), store)
    with pytest.raises(InputError, match=r"resources.gpus=0: .*4 × Fake H200"):
        slots._gpu_slots(0)


def test_a_gpu_that_is_free_is_taken_before_one_that_is_not(units: MakeUnits, store: Store, taken: Any) -> None:
    taken(UUIDS[0])
    made = units("resources.gpus=1", count=1)
    execute(made, store)
    assert places(made, store)[0]["CUDA_VISIBLE_DEVICES"] == UUIDS[1]


def test_another_kind_of_gpu_is_left_alone(units: MakeUnits, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "gpus", lambda: [*CARDS[:2], {**CARDS[2], "name": "Fake T4"}])
    made = units(script=["meet2"] * 2 + ["place"] * 2, count=4)
    execute(made, store)
    assert {place["CUDA_VISIBLE_DEVICES"] for place in places(made, store)} == set(UUIDS[:2])


def test_no_more_slots_than_tasks(units: MakeUnits, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    run_slot = local.run_slot
    monkeypatch.setattr(local, "run_slot", lambda work, slot: (opened.append(slot.number), run_slot(work, slot)))
    execute(units(count=2), store)
    assert opened == [0, 1]


def test_two_drivers_never_meet_on_a_gpu(
    units: MakeUnits, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Processes of their own with stores of their own: only the locks are common."""
    monkeypatch.setattr(environment, "gpus", lambda: CARDS[:2])
    made = units(count=4)
    stores = [Store.open(tmp_path / name, write=True) for name in ("one", "two")]
    fork = multiprocessing.get_context("fork")
    drivers = [fork.Process(target=execute, args=(made, own)) for own in stores]
    for driver in drivers:
        driver.start()
    for driver in drivers:
        driver.join(60)
        assert driver.exitcode == 0
    seen = [place for own in stores for place in places(made, own)]
    assert len(seen) == 8
    assert len({place["CUDA_VISIBLE_DEVICES"] for place in seen}) == 2
    assert_one_at_a_time(seen)


def test_a_gpu_in_use_is_waited_for_and_its_user_named(units: MakeUnits, store: Store, taken: Any) -> None:
    began = time.monotonic()
    locks = taken(*UUIDS)
    made = units("resources.gpus=2", count=2)

    def look(events: list[Event]) -> None:
        if {event.slot for event in events} == {0, 1}:
            locks[0].release()

    events, _ = execute(made, store, look)
    waits = [event for event in events if event.kind == "wait"]
    assert {event.slot for event in waits} == {0, 1}
    assert all(f"process {os.getpid()}" in event.text for event in waits)
    # The slot whose GPU stays taken does not sit on a task: the other has done both.
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(made, store)] == [UUIDS[0]] * 2
    assert time.monotonic() - began < 25


def test_ctrl_c_ends_all_running_children_cleanly_and_starts_no_more(units: MakeUnits, store: Store) -> None:
    made = units(script="hang", count=6)
    began = time.monotonic()
    _, stop = execute(made, store, interrupts("phase", 4, 0.0))
    assert stop.wanted
    assert not stop.now
    assert statuses(made, store) == ["cancelled"] * 4 + [None] * 2
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_grace(units: MakeUnits, store: Store) -> None:
    made = units("resources.stop_grace_s=120", script="stubborn", count=6)
    began = time.monotonic()
    _, stop = execute(made, store, interrupts("phase", 4, 0.0, 2.0))
    assert stop.now
    assert statuses(made, store) == ["cancelled"] * 4 + [None] * 2
    assert time.monotonic() - began < 60


def test_ctrl_c_ends_the_wait_for_a_gpu(units: MakeUnits, store: Store, taken: Any) -> None:
    taken(*UUIDS)
    made = units(count=2)
    execute(made, store, interrupts("wait", 1, 0.0))
    assert statuses(made, store) == [None, None]


def test_a_slot_that_fails_is_heard_of_and_the_others_finish(
    units: MakeUnits, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = units(count=8)
    broken, publish = tasks_of(made)[1], Store.publish

    def refuse(self: Store, attempt: Any, *rest: Any) -> None:
        if attempt.run_id == broken.run_id:
            raise OSError("the disk is full")
        publish(self, attempt, *rest)

    monkeypatch.setattr(Store, "publish", refuse)
    with pytest.raises(OSError, match="the disk is full"):
        execute(made, store)
    assert statuses(made, store) == ["ok", None, *["ok"] * 6]
    assert all(GpuLock(uuid).is_free() for uuid in UUIDS)


@pytest.mark.parametrize("reference", ["reference", "none"])
def test_a_reference_that_two_slots_need_is_computed_once(units: MakeUnits, store: Store, reference: str) -> None:
    """Also where it fails: the second slot takes the first one's word for it."""
    made = units("cache=dynamic,static", script="meet2", count=1, reference=reference)
    events, _ = execute(made, store)
    assert [event.kind for event in events].count("reference") == 1
    seen = places(made, store)
    assert len({place["CUDA_VISIBLE_DEVICES"] for place in seen}) == 2
    assert [place["reference_problem"] is None for place in seen] == [reference == "reference"] * 2


needs_cores = pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or environment.cores() < 2, reason="needs two cores that can be chosen"
)


@needs_cores
def test_cpu_slots_have_cores_of_their_own(units: MakeUnits, store: Store) -> None:
    made = units("engine.device=cpu", "resources.slots=2", script=["meet2"] * 2 + ["place"] * 2, count=4)
    execute(made, store)
    seen = places(made, store)
    share = environment.cores() // 2
    by_slot = defaultdict(set)
    for place in seen:
        by_slot[place["slot"]["slot"]].add(tuple(place["cores"]))
        assert place["OMP_NUM_THREADS"] == str(share)
        assert place["CUDA_VISIBLE_DEVICES"] == ""
        assert (place["env"]["cores"], place["env"]["slots"]) == (share, 2)
    assert at_once(seen) == 2
    ((first,), (second,)) = by_slot[0], by_slot[1]
    assert len(first) == len(second) == share
    assert not set(first) & set(second)
    # The driver itself is not held to anything afterwards.
    assert environment.cores() >= 2 * share


@needs_cores
def test_a_shared_cpu_is_another_environment(plan: MakePlan, units: MakeUnits, store: Store) -> None:
    alone, shared = (plan("engine.device=cpu", f"resources.slots={count}").cells[0] for count in (1, 2))
    assert alone.run_id == shared.run_id
    assert alone.env_id != shared.env_id
    assert alone.env_id == environment.identify("cpu")
    assert environment.identify("cuda", 2) == environment.identify("cuda")
    # What the attempt records is what the plan identified.
    made = units("engine.device=cpu", "resources.slots=2", count=1)
    execute(made, store)
    env = places(made, store)[0]["env"]
    key = environment.key("cpu", 2)
    assert {name: env[name] for name in key if name in env} == {name: key[name] for name in key if name != "device"}
    # Nor does one pass for the other where only the device must be the same.
    again = ("engine.device=cpu", "workload.new_tokens=8", "quality=off", "sweep.reuse=same_gpu")
    verdicts = [plan(*again, f"resources.slots={count}").cells[0].verdict for count in (1, 2)]
    assert verdicts == ["RUN", "DONE"]


def test_one_cpu_slot_leaves_the_machine_to_the_run(units: MakeUnits, store: Store) -> None:
    made = units("engine.device=cpu", count=2)
    execute(made, store)
    seen = places(made, store)
    assert at_once(seen) == 1
    assert all(len(place["cores"]) == environment.cores() for place in seen if place["cores"])
    assert all("slots" not in place["env"] for place in seen)
    assert all(place["slot"] == {"slot": 0, "slots": 1} for place in seen)


def test_threads_of_the_engine_win_over_the_share(units: MakeUnits) -> None:
    (task,) = tasks_of(units("engine.device=cpu", "engine.threads=3", count=1))
    shared = slots.Slot(0, 2, None, (0, 1, 2, 3))
    assert child_environment(task.config, Path("x"), shared.variables())["OMP_NUM_THREADS"] == "3"


def test_more_slots_than_cores_is_a_wrong_request(plan: MakePlan) -> None:
    with pytest.raises(InputError, match=r"resources.slots=9999: .* cores"):
        plan("engine.device=cpu", "resources.slots=9999")


def test_no_two_slots_share_a_physical_core(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Linux often numbers the second threads of all cores after the first ones."""
    for thread in range(8):
        folder = tmp_path / f"cpu{thread}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text("0\n")
        (folder / "core_id").write_text(f"{thread % 4}\n")
    monkeypatch.setattr(slots, "TOPOLOGY", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    assert [slot.cores for slot in slots._cpu_slots(2)] == [(0, 4, 1, 5), (2, 6, 3, 7)]
    assert [len(slot.cores) for slot in slots._cpu_slots(3)] == [2, 2, 2]


def test_cpu_runs_on_a_machine_with_gpus_need_no_gpu_and_run_apart(units: MakeUnits, store: Store, taken: Any) -> None:
    taken(*UUIDS)
    began = time.monotonic()
    made = units("engine.device=cpu", count=1)
    execute(made, store)
    assert statuses(made, store) == ["ok"]
    assert time.monotonic() - began < 25
    made = units("engine.device=cuda,cpu", count=2, script=["place"] * 4)
    devices = [[task.config.engine.device for task in tasks] for tasks in batches(made)]
    assert sorted(devices) == [["cpu", "cpu"], ["cuda", "cuda"]]


def test_a_run_can_be_made_to_wait_until_the_gpu_is_free(
    units: MakeUnits, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = units("resources.foreign=wait", "resources.gpus=1", count=1)
    gone: list[float] = []
    looks = itertools.count()

    def listed(uuid: str) -> set[int]:
        if next(looks) < 2:
            return {4711}
        gone.append(time.monotonic())
        return set()

    monkeypatch.setattr(gpu_processes, "listed", listed)
    events, _ = execute(made, store)
    assert [event.text for event in events if event.kind == "wait"] == [f"{UUIDS[0]} is used by process 4711"]
    assert places(made, store)[0]["began"] >= gone[0]


@pytest.mark.parametrize("foreign", ["void", "ignore"])
def test_otherwise_a_run_does_not_wait_for_strangers(
    units: MakeUnits, store: Store, monkeypatch: pytest.MonkeyPatch, foreign: str
) -> None:
    monkeypatch.setattr(gpu_processes, "listed", lambda uuid: {4711})
    made = units(f"resources.foreign={foreign}", count=1)
    events, _ = execute(made, store)
    assert "wait" not in {event.kind for event in events}
    assert statuses(made, store) == ["ok"]
