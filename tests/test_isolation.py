"""Runs that share a process: each has its own record and ending, and what one does reaches no other's number."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lbi import children, isolation_check
from lbi.children import Started, Stop
from lbi.config import LbiConfig
from lbi.isolation_check import Pair
from lbi.plan import Plan
from lbi.schedule import make_units
from lbi.share_key import share_key, why_alone
from lbi.store import Store
from lbi.task_queue import TaskQueue
from lbi.worker import Event, Task, run_unit

FAKES = Path(__file__).parent / "fakes"

SHARE = ("resources.isolation=shared_load", "quality=off")


@pytest.fixture
def tasks(plan: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Task]]:
    """Tasks that may share a process, whose runs follow the given scripts, in order."""

    def made(*scripts: str, reference: bool = False, **resources: Any) -> list[Task]:
        lengths = ",".join(str(8 + number) for number in range(len(scripts)))
        cells = plan(f"workload.new_tokens={lengths}", *SHARE).cells
        found = [task for unit in make_units(cells) for task in unit.tasks]
        changed = [replace(task.config, resources=replace(task.config.resources, **resources)) for task in found]
        found = [replace(task, config=config) for task, config in zip(found, changed, strict=True)]
        by_run = {str(task.config.workload.new_tokens): text for task, text in zip(found, scripts, strict=True)}

        def start(
            self: Any, module: str, folder: Path, log: Path, config: LbiConfig, caches: Path, own: Any = (), **kept: Any
        ) -> Started:
            alone = by_run[str(config.workload.new_tokens)]
            command = [str(FAKES / "child.py"), str(folder), "ok" if alone == "oom_if_shared" else alone]
            if module == "lbi.shared_run":
                command = [str(FAKES / "shared_child.py"), str(folder), json.dumps(by_run)]
            if module == "lbi.reference":
                command[-1] = "reference" if reference else "nothing"
            with log.open("a") as output, open(kept.get("stdin", "/dev/null")) as given:
                process = subprocess.Popen(
                    [sys.executable, *command], stdin=given, stdout=output, stderr=output, start_new_session=True
                )
            return Started(process, "a stand-in")

        monkeypatch.setattr(children.Starter, "start", start)
        return found

    return made


def run(
    unit: list[Task], store: Store, stop: Stop | None = None, look: Callable[[Event], object] = lambda event: None
) -> list[Event]:
    """Measure the tasks; the unquantized model's outputs are there, so that nothing but runs is started.

    `look` sees each event as it comes.
    """
    events: list[Event] = []

    def report(event: Event) -> None:
        events.append(event)
        look(event)

    run_unit(unit, store, report, stop or Stop(), time.time())
    return events


def process_of(store: Store, task: Task) -> dict[str, Any]:
    result = store.result(task.run_id, task.env_id)
    assert result is not None
    found: dict[str, Any] = json.loads((result.folder / "process.json").read_text())
    return found


def statuses(store: Store, unit: list[Task]) -> list[str | None]:
    found = [store.result(task.run_id, task.env_id) for task in unit]
    return [result.status if result else None for result in found]


def have_references(store: Store, unit: list[Task]) -> None:
    from lbi import reference

    for task in unit:
        reference.folders(store.root, task.config, task.env_id)["greedy"].mkdir(parents=True)


def test_one_process_does_a_group_and_each_run_has_its_own_record(tasks: Any, store: Store) -> None:
    unit = tasks("ok", "ok", "ok")
    have_references(store, unit)
    run(unit, store)
    assert statuses(store, unit) == ["ok"] * 3
    processes = [process_of(store, task) for task in unit]
    assert len({process["pid"] for process in processes}) == 1
    ids = [task.run_id for task in unit]
    assert [process["isolation"].get("after", []) for process in processes] == [[], ids[:1], ids[:2]]
    assert all(process["isolation"]["how"] == "shared_load" for process in processes)
    assert processes[2]["isolation"]["compared"] == "this pair was not compared with isolation"
    folders = [store.result(task.run_id, task.env_id).folder for task in unit]  # type: ignore[union-attr]
    assert all((folder / "verdict.json").exists() and (folder / "progress.json").exists() for folder in folders)


@pytest.mark.parametrize(("script", "reason"), [("exit", "exit code 9"), ("kill", "SIGKILL"), ("segfault", "SIGSEGV")])
def test_a_run_that_dies_takes_only_itself_and_the_rest_is_isolated(
    tasks: Any, store: Store, script: str, reason: str
) -> None:
    unit = tasks("ok", script, "ok", "ok")
    have_references(store, unit)
    run(unit, store)
    assert statuses(store, unit) == ["ok", "crash", "ok", "ok"]
    assert reason in store.result(unit[1].run_id, unit[1].env_id).reason  # type: ignore[union-attr]
    processes = [process_of(store, task) for task in unit]
    assert processes[0]["pid"] == processes[1]["pid"]
    assert len({process["pid"] for process in processes}) == 3
    for process in processes[2:]:
        assert process["isolation"]["how"] == "process"
        assert f"{unit[1].run_id}, which shared its process, ended as crash" in process["isolation"]["why"]


def test_a_run_out_of_memory_after_others_is_measured_again_alone(tasks: Any, store: Store) -> None:
    unit = tasks("ok", "oom_if_shared", "ok")
    have_references(store, unit)
    events = run(unit, store)
    assert statuses(store, unit) == ["ok", "ok", "ok"]
    first, second = store.attempts(unit[1].run_id, unit[1].env_id)
    assert (first["status"], second["status"]) == ("lost", "ok")
    assert "oom after other runs of its process (no memory left)" in first["reason"]
    assert process_of(store, unit[1])["isolation"]["how"] == "process"
    assert [event.kind for event in events].count("end") == 3


def test_the_first_run_of_a_process_is_taken_at_its_word(tasks: Any, store: Store) -> None:
    unit = tasks("oom", "ok")
    have_references(store, unit)
    run(unit, store)
    assert statuses(store, unit) == ["oom", "ok"]
    assert len(store.attempts(unit[0].run_id, unit[0].env_id)) == 1


def test_a_model_that_was_spoilt_is_not_used_again(tasks: Any, store: Store) -> None:
    unit = tasks("ok", "spoilt", "ok")
    have_references(store, unit)
    run(unit, store)
    assert statuses(store, unit) == ["ok"] * 3
    why = process_of(store, unit[2])["isolation"]["why"]
    assert why == f"{unit[1].run_id} did not leave the model as it was: a weight was written to"


def test_a_process_that_ends_between_two_runs_costs_neither(tasks: Any, store: Store) -> None:
    unit = tasks("ok", "leave", "ok")
    have_references(store, unit)
    run(unit, store)
    assert statuses(store, unit) == ["ok"] * 3
    assert process_of(store, unit[2])["isolation"]["how"] == "process"


def test_a_run_that_its_process_did_not_live_to_begin_is_measured_all_the_same(tasks: Any, store: Store) -> None:
    unit = tasks("ok", "late", "ok")
    have_references(store, unit)
    run(unit, store)
    assert statuses(store, unit) == ["ok"] * 3
    first, second = store.attempts(unit[2].run_id, unit[2].env_id)
    assert (first["status"], second["status"]) == ("lost", "ok")
    assert "ended before it began" in first["reason"]
    assert process_of(store, unit[2])["isolation"]["how"] == "process"


def test_what_the_check_refuses_is_isolated_and_says_why(tasks: Any, store: Store) -> None:
    unit = tasks("ok", "ok", "ok")
    have_references(store, unit)
    ids = [task.run_id for task in unit]
    wrong = Pair(ids[0], ids[1], False, "decode_tok_s 0.900 (0.890 to 0.910)")
    isolation_check.add(store.root, unit[0].env_id, [wrong, Pair(ids[0], ids[2], True, "decode_tok_s 1.000")])
    run(unit, store)
    found = [process_of(store, task)["isolation"] for task in unit]
    assert found[1] == {"how": "process", "why": f"the A/B check refuses it after {ids[0]}: {wrong.why}"}
    # The process was ended for it, so the third run begins one anew.
    assert found[2] == {"how": "shared_load"}


def test_a_check_that_cannot_be_read_isolates(tasks: Any, store: Store) -> None:
    unit = tasks("ok", "ok")
    have_references(store, unit)
    file = isolation_check.file_of(store.root, unit[0].env_id)
    file.parent.mkdir()
    file.write_text('{"schema": 1, "pairs": [{"before": 3')
    run(unit, store)
    found = [process_of(store, task)["isolation"] for task in unit]
    assert [one["how"] for one in found] == ["process"] * 2
    assert "what the A/B check refused is not known" in found[0]["why"]


def test_what_was_agreed_is_said_and_later_words_stand(store: Store) -> None:
    isolation_check.add(store.root, "env", [Pair("a", "b", False, "slow")])
    assert (
        isolation_check.read(store.root, "env").refusal(["x", "a", "y"], "b")
        == "the A/B check refuses it after a: slow"
    )
    isolation_check.add(store.root, "env", [Pair("a", "b", True, "1.00")])
    checked = isolation_check.read(store.root, "env")
    assert checked.refusal(["a"], "b") == ""
    assert checked.said(["x", "a"], "b") == "agrees with isolation: 1.00"
    assert isolation_check.read(store.root, "other").pairs == {}


def test_the_unquantized_model_has_the_machine_to_itself(tasks: Any, store: Store) -> None:
    """Its outputs for the second workload are missing: the process ends first, and another one goes on."""
    unit = tasks("ok", "ok", "ok", reference=True)
    have_references(store, [unit[0], unit[2]])
    run(unit, store)
    processes = [process_of(store, task) for task in unit]
    assert [len(process["isolation"].get("after", [])) for process in processes] == [0, 0, 1]
    assert processes[0]["pid"] != processes[1]["pid"] == processes[2]["pid"]


@pytest.mark.slow
def test_stopping_and_running_out_of_time_are_as_ever(tasks: Any, store: Store) -> None:
    unit = tasks("ok", "hang", "ok", run_timeout_s=5.0, stop_grace_s=0.3)
    have_references(store, unit)
    run(unit, store)
    assert statuses(store, unit) == ["ok", "timeout", "ok"]
    unit = tasks("ok", "hang", "ok", "ok")
    stop, other = Stop(), Store.open(store.root.with_name("other"), write=True)
    have_references(other, unit)
    run(unit, other, stop, lambda event: stop.request() if (event.kind, event.task) == ("phase", unit[1]) else None)
    assert statuses(other, unit) == ["ok", "cancelled", None, None]


def test_a_slot_goes_on_with_its_group_and_others_take_another() -> None:
    class Job:
        def __init__(self, name: str) -> None:
            self.run_id = self.config = name

    import lbi.task_queue as queues

    before, queues.together = queues.together, lambda config: config[0]  # type: ignore[assignment]
    try:
        queue = TaskQueue([Job(name) for name in ("a1", "a2", "b1", "a3")])  # type: ignore[list-item]
        first = queue.take()
        assert first is not None
        assert first.run_id == "a1"
        assert queue.take().run_id == "b1"  # type: ignore[union-attr]
        assert queue.take_like(lambda job: job.run_id.startswith("a")).run_id == "a2"  # type: ignore[union-attr]
        assert queue.take_like(lambda job: job.run_id.startswith("c")) is None
    finally:
        queues.together = before


def test_a_group_is_what_differs_in_decoding_cache_or_workload(plan: Callable[..., Plan]) -> None:
    grid = ("quantizer=none,int8_wo", "cache=dynamic,static", "decoding=greedy,sampling", "workload=chat,survey")
    configs = [cell.config for cell in plan(*grid, *SHARE).cells if cell.config]
    keys = {share_key(config) for config in configs}
    assert len(configs) == 16
    assert len(keys) == 2
    assert {share_key(config) for config in configs if config.quantizer.name == "none"} < keys
    units = make_units(plan(*grid, *SHARE).cells)
    order = [share_key(task.config) for unit in units for task in unit.tasks]
    # Each group in one piece, the baseline's first.
    assert [key for number, key in enumerate(order) if number == 0 or key != order[number - 1]] == list(
        dict.fromkeys(order)
    )
    alone = [cell.config for cell in plan(*grid).cells if cell.config]
    assert {share_key(config) for config in alone} == {None}


@pytest.mark.parametrize(
    ("overrides", "why"),
    [
        (("engine=fused", "cache=static", "engine.device=cpu"), "engine=fused"),
        (("engine=loop", "cache=static", "decoding=speculative_self"), "decoding.speculative=self"),
        (("trace=kernels",), "trace=kernels"),
        (("quantizer=autoquant",), "autoquant"),
    ],
)
def test_what_would_reach_into_other_runs_is_isolated(
    plan: Callable[..., Plan], overrides: tuple[str, ...], why: str
) -> None:
    (cell,) = plan(*overrides, "sweep.prune=false", *SHARE).cells
    assert cell.config is not None
    assert why in str(why_alone(cell.config))
    assert share_key(cell.config) is None


def test_the_option_is_no_part_of_a_run(plan: Callable[..., Plan]) -> None:
    runs = {plan(f"resources.isolation={how}").cells[0].run_id for how in ("process", "shared_load")}
    assert len(runs) == 1


def test_a_slot_has_no_process_before_its_first_run(store: Store) -> None:
    from lbi.sharing import Sharing

    sharing = Sharing(store.root)
    assert not sharing.lives
    sharing.end()
    with pytest.raises(RuntimeError):
        sharing.give(store.root)
