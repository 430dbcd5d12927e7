"""What is sent to a cluster and what is believed of it, without a cluster."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from lbi import environment, sites, snapshot
from lbi.compose import Composed
from lbi.executors import scheduler
from lbi.executors.follow import Follower
from lbi.executors.reconcile import Ending, endings
from lbi.executors.scheduler import Job
from lbi.executors.slurm import SlurmExecutor, parameters
from lbi.identity import digest
from lbi.plan import Plan, make_plan
from lbi.schedule import Durations, Unit, make_units
from lbi.store import Result, Store
from lbi.submissions import Array, CellRef, Submissions, marked_submitted, note_job
from lbi.worker import Event, Task


class FakeScheduler:
    """Answers what a test says; None where it is silent."""

    def __init__(self, states: dict[str, str] | None = None, names: dict[str, str] | None = None) -> None:
        self.states, self.names = states, names or {}

    def jobs(self, ids: Any) -> dict[str, Job] | None:
        return None if self.states is None else {job: Job(job, self.states.get(job, "GONE")) for job in ids}

    def named(self, names: Sequence[str]) -> dict[str, str] | None:
        return None if self.states is None else {name: job for name, job in self.names.items() if name in names}


@pytest.fixture
def on_cluster(compose: Callable[..., list[Composed]], store: Store) -> Callable[..., Plan]:
    """Plan for a cluster that the store may know."""

    def made(*arguments: str) -> Plan:
        return make_plan(compose("model=tiny_random", *arguments), store, 0.0, sites.Cluster(store))

    return made


def tasks_of(plan: Plan) -> list[Task]:
    return [task for unit in make_units(plan.cells) for task in unit.tasks]


def test_a_gpu_is_used_where_the_resources_ask_for_one(on_cluster: Callable[..., Plan]) -> None:
    plan = on_cluster("resources=local,h100", "workload.new_tokens=8")
    devices = [cell.config.engine.device for cell in plan.cells if cell.config]
    assert devices == ["cpu", "cuda"]
    assert plan.cells[0].env_id != plan.cells[1].env_id


def test_the_next_plan_expects_what_workers_found(on_cluster: Callable[..., Plan], store: Store) -> None:
    (cell,) = on_cluster("resources=h100").cells
    assert cell.config is not None
    found = {
        "device": "cuda",
        "gpu": "NVIDIA H100",
        "driver": "1",
        "packages": environment.packages(),
        "lbi": environment.key("cpu")["lbi"],
    }
    sites.note(store, cell.config, found, digest("env", found), time.time())
    (again,) = on_cluster("resources=h100").cells
    assert again.env_id == digest("env", found) != cell.env_id
    # Another kind of node is another class, of which nothing is known.
    (other,) = on_cluster("resources=a100").cells
    assert other.env_id not in (cell.env_id, again.env_id)


def test_newer_packages_here_make_the_results_stale(
    on_cluster: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = on_cluster().cells
    assert cell.config is not None
    found = environment.key("cpu")
    sites.note(store, cell.config, found, digest("env", found), time.time())
    before = on_cluster().cells[0].env_id
    monkeypatch.setattr(environment, "packages", lambda: {**found["packages"], "torchao": "99"})
    assert on_cluster().cells[0].env_id != before


def test_units_hold_so_many_runs_and_each_begins_with_a_plain_one(on_cluster: Callable[..., Plan]) -> None:
    plan = on_cluster("quantizer=none,int8_wo,int4_wo", "workload.new_tokens=8,9,10,11", "resources.runs_per_job=5")
    units = make_units(plan.cells, pack=True)
    assert [len(unit.tasks) for unit in units] == [4, 4, 4]
    assert all(unit.tasks[0].config.quantizer.name == "none" for unit in units)
    assert sorted(task.cell for unit in units for task in unit.tasks) == list(range(12))


def test_arrays_are_one_per_class_and_as_long_as_the_cluster_takes(
    on_cluster: Callable[..., Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = on_cluster(
        "resources=h100,a100", "workload.new_tokens=8,9,10,11,12", "resources.runs_per_job=1", "sweep.prune=false"
    )
    units = make_units([cell for cell in plan.cells if cell.config], pack=True)
    executor = SlurmExecutor("name", plan.cells[0].config.sweep)  # type: ignore[union-attr]
    monkeypatch.setattr(executor.scheduler, "max_array_size", lambda: 3)
    arrays = executor._arrays(units, "001")
    assert [len(array.units) for array in arrays] == [3, 2, 3, 2]
    assert len({array.name for array in arrays}) == 4
    kinds = [{task.config.resources.name for unit in array.units for task in unit.tasks} for array in arrays]
    assert kinds == [{"h100"}, {"h100"}, {"a100"}, {"a100"}]


def test_every_resource_reaches_sbatch(on_cluster: Callable[..., Plan], store: Store, tmp_path: Path) -> None:
    plan = on_cluster(
        "resources=h100",
        "resources.gpus=2",
        "resources.partition=gpu",
        "resources.constraint=nvlink",
        "resources.account=me",
        "resources.qos=low",
        "resources.exclude=n9",
        "resources.container=image.sqsh",
        "resources.mounts=/data",
        "resources.setup=[module load cuda]",
        "+resources.sbatch.comment=hello",
        "resources.time_min=30",
    )
    array = Array("name", tuple(make_units(plan.cells)))
    found = parameters(array, tmp_path / "code", Durations(store), ["n1"])
    assert found["slurm_additional_parameters"] == {"requeue": True, "gres": "gpu:h100:2", "comment": "hello"}
    assert found["slurm_exclude"] == "n9,n1"
    assert (found["timeout_min"], found["mem_gb"], found["cpus_per_task"]) == (30, 64.0, 8)
    assert (found["slurm_partition"], found["slurm_constraint"]) == ("gpu", "nvlink")
    assert (found["slurm_account"], found["slurm_qos"]) == ("me", "low")
    assert found["slurm_srun_args"] == ["--container-image=image.sqsh", "--container-mounts=/data"]
    assert found["slurm_setup"][0] == "module load cuda"
    assert f"PYTHONPATH={tmp_path}/code" in found["slurm_setup"][1]


def test_what_is_not_asked_for_is_made_from_the_cell(
    on_cluster: Callable[..., Plan], store: Store, tmp_path: Path
) -> None:
    def found(*arguments: str) -> dict[str, Any]:
        plan = on_cluster("model=llama31_8b_random", *arguments)
        return parameters(Array("name", tuple(make_units(plan.cells))), tmp_path, Durations(store), [])

    on_cpu, on_gpu = found("resources=local"), found("resources=h100", "resources.memory_gb=null")
    # 8.03e9 weights of two bytes.
    assert (on_cpu["mem_gb"], on_gpu["mem_gb"]) == (55, 33)
    assert on_cpu["slurm_exclusive"] is True
    assert "slurm_exclusive" not in on_gpu
    assert "slurm_exclusive" not in found("resources.exclusive=false")


def submit(store: Store, plan: Plan) -> tuple[Submissions, Path]:
    """A submission whose driver has written the plan's units and no job id."""
    submissions = Submissions(store, "name")
    folder = submissions.try_begin()
    assert folder is not None
    units = make_units(plan.cells, pack=True)
    submissions.write_arrays(folder, [Array("lbi-name-001-0", tuple(units))], 0.0)
    return submissions, folder


def test_an_array_whose_driver_died_is_found_by_its_name(on_cluster: Callable[..., Plan], store: Store) -> None:
    submissions, folder = submit(store, on_cluster("workload.new_tokens=8,9", "resources.runs_per_job=1"))
    scheduled = FakeScheduler({"7_0": "RUNNING", "7_1": "COMPLETED"}, {"lbi-name-001-0": "7"})
    # Its driver lives: it is left alone.
    assert not submissions.adopt(scheduled)  # type: ignore[arg-type]
    (folder / "claim.json").write_text('{"schema": 1, "host": "gone", "boot": "x", "pid": 1, "start_ticks": 1}')
    import os

    os.utime(folder / "claim.json", (1, 1))
    assert submissions.adopt(scheduled)  # type: ignore[arg-type]
    jobs = submissions.jobs()
    assert [job.job for job in jobs] == ["7_0", "7_1"]
    assert submissions.living(scheduled) == {jobs[0].cells[0].run_id}  # type: ignore[arg-type]


def test_an_array_that_was_never_submitted_has_no_jobs(on_cluster: Callable[..., Plan], store: Store) -> None:
    submissions, folder = submit(store, on_cluster())
    with pytest.raises(RuntimeError), marked_submitted(folder):
        raise RuntimeError("sbatch refused")
    note_job(folder, 0, None)
    assert submissions.adopt(FakeScheduler({}))  # type: ignore[arg-type]
    assert submissions.jobs() == []


def test_only_one_driver_gets_the_next_number(store: Store) -> None:
    first, second = Submissions(store, "name"), Submissions(store, "name")
    numbers = second.numbers()
    assert first.try_begin() is not None
    second.numbers = lambda: numbers  # type: ignore[method-assign]
    assert second.try_begin() is None


@pytest.mark.parametrize(
    ("state", "log", "status"),
    [
        ("OUT_OF_MEMORY", "", "oom"),
        ("FAILED", "slurmstepd: error: Step 3.0 exceeded memory limit (900 > 500), being killed", "oom"),
        ("FAILED", "", "lost"),
        ("NODE_FAIL", "", "lost"),
        ("GONE", "", "lost"),
        ("COMPLETED", "", "lost"),
        ("CANCELLED", "", "cancelled"),
        ("TIMEOUT", "", "timeout"),
        ("PREEMPTED", "", "preempted"),
    ],
)
def test_how_a_job_ended_says_how_its_run_did(
    on_cluster: Callable[..., Plan],
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    state: str,
    log: str,
    status: str,
) -> None:
    submissions, folder = submit(store, on_cluster("workload.new_tokens=8,9", "resources.runs_per_job=2"))
    note_job(folder, 0, "7")
    (job,) = submissions.jobs()
    job.log.parent.mkdir(parents=True)
    job.log.write_text(log)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    attempt = store.claim(job.cells[0].run_id, "elsewhere", {})
    claim = attempt.folder / "claim.json"
    # The job's host is another one, and its heart has not beaten for long.
    claim.write_text(claim.read_text().replace('"host": "', '"host": "not-'))
    assert endings(store, job, Job("7", state), list(job.cells)) is None
    import os

    os.utime(claim, (1, 1))
    found = endings(store, job, Job("7", state), list(job.cells))
    assert found is not None
    assert [ending.status for ending in found] == [status, "cancelled" if status == "cancelled" else ""]
    assert [ending.begun for ending in found] == [True, False]


def test_text_of_squeue_and_sacct_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {
        "squeue": "5_0|RUNNING|n1|None|lbi-a\n6|PENDING||Resources|lbi-b\n",
        "sacct": "4|CANCELLED by 1000|n2|None|lbi-c\n5_1|RUNNING|n1||lbi-a\n",
    }
    monkeypatch.setattr(scheduler, "_ask", lambda *command, **_: answers.get(command[0]))
    asked = scheduler.Scheduler()
    found = asked.jobs(["5_0", "6", "4", "5_1", "9"])
    assert found is not None
    assert {job: state.state for job, state in found.items()} == {
        "5_0": "RUNNING",
        "6": "PENDING",
        "4": "CANCELLED",
        "5_1": "RUNNING",
        "9": "GONE",
    }
    assert found["6"].reason == "Resources"
    monkeypatch.setattr(scheduler, "ACCOUNTING_LAG_S", -1.0)
    # The controller has forgotten it, whatever accounting still believes.
    assert asked.jobs(["5_1"])["5_1"].state == "GONE"  # type: ignore[index]
    answers.pop("squeue")
    assert asked.jobs(["6"]) is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1:05", 65.0), ("2:00:01", 7201.0), ("1-00:00:00", 86400.0), ("UNLIMITED", None), ("", None)],
)
def test_time_left(monkeypatch: pytest.MonkeyPatch, text: str, seconds: float | None) -> None:
    monkeypatch.setattr(scheduler, "_ask", lambda *command, **_: text)
    assert scheduler.seconds_left("7") == seconds


def test_a_snapshot_is_named_by_its_content_and_taken_once(tmp_path: Path) -> None:
    first = snapshot.take(tmp_path)
    assert (first / "lbi" / "worker.py").read_bytes() == Path(snapshot.__file__).with_name("worker.py").read_bytes()
    assert (first / "lbi" / "texts").is_dir()
    (first / "marker").touch()
    assert snapshot.take(tmp_path) == first
    assert (first / "marker").exists()
    assert not list(first.rglob("__pycache__"))


def test_a_time_limit_is_generous_where_nothing_is_known(on_cluster: Callable[..., Plan], store: Store) -> None:
    plan = on_cluster("workload.new_tokens=8,9", "resources.runs_per_job=2")
    array = Array("name", tuple(make_units(plan.cells, pack=True)))
    # Two runs guessed at 20 s, four times over, and ten minutes to start.
    assert parameters(array, Path("code"), Durations(store), [])["timeout_min"] == 13


def test_tasks_of_a_living_job_are_not_submitted_again(
    on_cluster: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = on_cluster("workload.new_tokens=8,9", "resources.runs_per_job=1")
    submissions, folder = submit(store, plan)
    note_job(folder, 0, "7")
    with marked_submitted(folder):
        pass
    executor = SlurmExecutor("name", plan.cells[0].config.sweep)  # type: ignore[union-attr]
    executor.scheduler = FakeScheduler({"7_0": "RUNNING", "7_1": "FAILED"})  # type: ignore[assignment]
    _, wanted = executor._begin(submissions, make_units(plan.cells, pack=True))
    assert [task.run_id for unit in wanted for task in unit.tasks] == [plan.cells[1].run_id]


class FakeExecutor:
    """Notes what is submitted."""

    sweep = "name"

    def __init__(self) -> None:
        self.submitted: list[tuple[list[list[int]], list[str]]] = []

    def submit(self, units: Sequence[Unit], store: Store, since: float, exclude: Sequence[str]) -> int:
        self.submitted.append(([[task.cell for task in unit.tasks] for unit in units], list(exclude)))
        return len(units)


def test_a_node_with_three_failed_runs_is_left_out(on_cluster: Callable[..., Plan], store: Store) -> None:
    tasks = tasks_of(on_cluster("workload.new_tokens=8,9,10,11"))
    executor = FakeExecutor()
    follower = Follower(executor, store, {task.run_id: task for task in tasks}, 0.0, lambda event: None)  # type: ignore[arg-type]
    for count, task in enumerate(tasks[:3], start=1):
        result = Result(task.run_id, task.env_id, "lost", "", 1, 1.0, 0.0, store.root, host="bad")
        follower._blame(result)
        follower._blame(result)
        follower._submit([tasks[3]])
        assert executor.submitted[-1][1] == (["bad"] if count == 3 else [])


def test_the_run_that_took_its_job_down_is_submitted_alone(on_cluster: Callable[..., Plan], store: Store) -> None:
    tasks = tasks_of(on_cluster("workload.new_tokens=8,9,10", "resources.requeues=1"))
    executor = FakeExecutor()
    follower = Follower(executor, store, {task.run_id: task for task in tasks}, 0.0, lambda event: None)  # type: ignore[arg-type]
    cells = [CellRef(task.cell, task.name, task.run_id, task.env_id) for task in tasks]
    job = Job("7", "FAILED", "n1")
    begun = Ending(cells[0], "lost", "why", store.claim(tasks[0].run_id, tasks[0].env_id, {}))
    assert follower._again(begun, job, blameless=True)
    for _ in range(9):
        # Never its own fault, so never given up.
        assert follower._again(Ending(cells[1], "", "why", None), job, blameless=True)
    follower._submit(tasks)
    assert executor.submitted[0][0] == [[0], [1, 2]]
    again = Ending(cells[0], "lost", "why", store.claim(tasks[0].run_id, tasks[0].env_id, {}))
    assert not follower._again(again, job, blameless=True)
    assert follower.given_up == {tasks[0].run_id}


def test_a_crash_is_tried_once_more_whatever_the_retries_of_lost_jobs(
    on_cluster: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (task,) = tasks_of(on_cluster("resources.requeues=0"))
    ended: list[str] = []

    def report(event: Event) -> None:
        if event.result is not None:
            ended.append(event.result.status)

    follower = Follower(FakeExecutor(), store, {task.run_id: task}, 0.0, report)  # type: ignore[arg-type]
    cell = CellRef(task.cell, task.name, task.run_id, task.env_id)
    store.publish(store.claim(task.run_id, task.env_id, {}), "crash", "", 1.0)
    follower._look()
    assert ended == []
    # Its job is over: another cell's fate there does not change that it has had its first attempt.
    assert follower._again(Ending(cell, "", "", None), Job("7", "COMPLETED", "n1"), blameless=True)
    follower._submit([task])
    follower._look()
    assert ended == []
    store.publish(store.claim(task.run_id, task.env_id, {}), "crash", "", 1.0)
    follower._look()
    assert ended == ["crash"]


def test_a_job_owes_what_it_has_not_settled(on_cluster: Callable[..., Plan], store: Store) -> None:
    submissions, folder = submit(store, on_cluster())
    note_job(folder, 0, "7")
    (job,) = submissions.jobs()
    before, after = job.began - 1, job.began + 1
    assert job.owes(None, None)
    assert job.owes("cancelled", before)
    # Requeued by itself: the same job runs it again.
    assert job.owes("preempted", after)
    assert not job.owes("cancelled", after)
    assert not job.owes("ok", after)


def test_no_two_submissions_share_a_job_name(on_cluster: Callable[..., Plan], store: Store) -> None:
    """Two stores may have a sweep of the same name, and an orphan is known by its name alone."""
    plan = on_cluster()
    executor = SlurmExecutor("name", plan.cells[0].config.sweep)  # type: ignore[union-attr]
    executor.scheduler = FakeScheduler()  # type: ignore[assignment]
    executor.scheduler.max_array_size = lambda: 1000  # type: ignore[method-assign]
    first, second = (executor._arrays(make_units(plan.cells, pack=True), "001")[0].name for _ in range(2))
    assert first != second
