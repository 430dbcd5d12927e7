"""Faults on a real SLURM cluster: the status that each must end in, and that nothing finished is lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_bench import SlurmBench, finish, wait
from slurm_cluster import Cluster

pytestmark = pytest.mark.slurm


@pytest.fixture
def bench(tmp_path: Path, cluster: Cluster) -> SlurmBench:
    return SlurmBench(tmp_path, cluster)


def test_a_child_that_dies_is_tried_once_more_and_the_runs_after_it_go_on(bench: SlurmBench) -> None:
    scripts = "8=ok,9=raise,10=exit,11=kill,12=exit_once,13=ok"
    code, output = bench.run("workload.new_tokens=8,9,10,11,12,13", scripts=scripts)
    assert code == 1, output
    assert bench.statuses() == ["ok", "crash", "crash", "crash", "ok", "ok"], output
    reasons = [row["reason"] for row in bench.rows()]
    assert "exit code 1 in phase measure" in reasons[1]
    assert "exit code 9" in reasons[2]
    assert "SIGKILL" in reasons[3]
    assert [bench.attempts(cell) for cell in range(6)] == [1, 2, 2, 2, 2, 1]
    # Elsewhere: the second attempt was kept off the node of the first.
    assert "leaving out n1" in output


def test_out_of_memory_ends_one_cell_and_the_others_of_its_job_are_run(bench: SlurmBench) -> None:
    code, output = bench.run("workload.new_tokens=8,9,10", "resources.memory_gb=0.6", scripts="9=memory")
    assert code == 1, output
    assert bench.statuses() == ["ok", "oom", "ok"], output
    assert "raise resources.memory_gb" in bench.rows()[1]["reason"]
    assert bench.attempts(1) == 1


def test_the_time_limit_in_mid_unit_requeues_and_skips_what_is_finished(bench: SlurmBench) -> None:
    # Two units: cell 1 alone takes its job's whole time; cell 2 was begun late in its job.
    limits = ["resources.runs_per_job=2", "resources.time_min=1", "resources.signal_s=40"]
    code, output = bench.run("workload.new_tokens=8,9,10", *limits, scripts="9=hang,10=hang_once")
    assert code == 1, output
    assert bench.statuses() == ["ok", "timeout", "ok"], output
    assert "raise resources.time_min" in bench.rows()[1]["reason"]
    assert bench.outcomes(0) == ["ok"]
    assert bench.outcomes(2) == ["preempted", "ok"]


def test_a_run_that_outlasts_a_whole_limit_is_not_requeued_for_ever(bench: SlurmBench) -> None:
    limits = ["resources.runs_per_job=2", "resources.time_min=1", "resources.signal_s=40"]
    code, output = bench.run("workload.new_tokens=8,9", *limits, scripts="9=hang")
    assert code == 1, output
    # At first it began late; the job's second start was its alone, for what is finished takes no time.
    assert bench.outcomes(1) == ["preempted", "timeout"], output
    assert bench.outcomes(0) == ["ok"]
    assert len(bench.jobs()) == 1


def test_cancelled_while_running_and_while_pending(bench: SlurmBench) -> None:
    one_by_one = ["resources.runs_per_job=1", "resources.array_parallelism=1"]
    driver = bench.sweep("workload.new_tokens=8,9,10", *one_by_one, scripts="9=hang")
    (array,) = bench.wait_jobs()
    bench.cluster.wait_job(f"{array}_1", "RUNNING")
    bench.wait_begun(2)
    bench.cluster.scancel(f"{array}_2")
    bench.cluster.scancel(f"{array}_1")
    code, output = finish(driver)
    assert code == 1, output
    assert bench.statuses() == ["ok", "cancelled", "cancelled"], output
    code, output = bench.run("workload.new_tokens=8,9,10", *one_by_one)
    assert code == 0, output
    assert bench.outcomes(0) == ["ok"]


@pytest.mark.parametrize("grace", [15, 0])
def test_preempted_with_and_without_grace(tmp_path: Path, make_cluster: Callable[..., Cluster], grace: int) -> None:
    bench = SlurmBench(tmp_path, make_cluster(GRACE=grace))
    driver = bench.sweep("workload.new_tokens=8,9", scripts="9=hang_once")
    bench.wait_begun(2)
    bench.cluster.sbatch("-p", "high", "--nodes=4", "--exclusive", "--wrap", "sleep 3")
    code, output = finish(driver)
    assert code == 0, output
    assert bench.statuses() == ["ok", "ok"]
    assert bench.outcomes(0) == ["ok"]
    assert bench.outcomes(1)[-1] == "ok"
    assert bench.attempts(1) == 2
    assert len(bench.jobs()) == 1, "SLURM starts the job again; nothing is submitted"


def test_a_crashed_node_costs_the_run_that_was_on_it_and_no_other(bench: SlurmBench) -> None:
    driver = bench.sweep("workload.new_tokens=8,9,10", scripts="9=hang_once")
    claims = bench.wait_begun(2)
    bench.cluster.kill_node(claims[0]["node"])
    code, output = finish(driver)
    assert code == 0, output
    assert bench.statuses() == ["ok"] * 3
    assert bench.outcomes(0) == ["ok"]
    assert bench.attempts(1) == 2


def test_two_copies_of_a_job_yield_one_result(bench: SlurmBench) -> None:
    driver = bench.sweep("workload.new_tokens=8", scripts="8=sleep45")
    (claim,) = bench.wait_begun(1)
    bench.cluster.kill_slurmd(claim["node"])
    copies: set[str] = set()

    def second_copy() -> bool:
        copies.update(p.node or "" for p in bench.cluster.processes() if p.is_of_job and p.name.startswith("python"))
        return len(copies) > 1

    wait(second_copy, 60, "SLURM to start the job on another node")
    code, output = finish(driver)
    assert code == 0, output
    assert bench.outcomes(0) == ["ok"]
    assert bench.attempts(0) == 1


def test_the_controller_down_at_submit(bench: SlurmBench) -> None:
    bench.cluster.stop_controller()
    code, output = bench.run("workload.new_tokens=8,9")
    assert code == 1, output
    assert "The same command tries again" in output
    assert "Traceback" not in output
    bench.cluster.start_controller()
    code, output = bench.run("workload.new_tokens=8,9")
    assert code == 0, output
    assert bench.statuses() == ["ok", "ok"]


def test_the_controller_down_while_jobs_run(bench: SlurmBench) -> None:
    driver = bench.sweep("workload.new_tokens=8,9", scripts="8=sleep6,9=sleep2")
    bench.wait_begun(1)
    bench.cluster.stop_controller()
    code, output = finish(driver)
    assert code == 0, output
    assert bench.statuses() == ["ok", "ok"]
    assert bench.verb("status", "test")[0] == 0
    assert [bench.attempts(cell) for cell in (0, 1)] == [1, 1]


def test_without_accounting_a_job_that_vanishes_is_lost_and_run_again(
    tmp_path: Path, make_cluster: Callable[..., Cluster]
) -> None:
    bench = SlurmBench(tmp_path, make_cluster(ACCT="none"))
    code, output = bench.run("workload.new_tokens=8,9,10", scripts="9=murder_once")
    assert code == 0, output
    assert bench.statuses() == ["ok"] * 3
    assert bench.outcomes(1) == ["lost", "ok"]
    assert bench.outcomes(0) == ["ok"]


def test_a_worker_that_always_vanishes_ends_as_lost(bench: SlurmBench) -> None:
    code, output = bench.run("workload.new_tokens=8,9", "resources.requeues=1", scripts="8=murder")
    assert code == 1, output
    assert bench.statuses() == ["lost", "ok"]
    assert bench.outcomes(0) == ["lost", "lost"]


def test_a_task_that_never_starts_is_given_up_and_the_others_count(bench: SlurmBench) -> None:
    own = ["resources.runs_per_job=1", "resources.array_parallelism=1", "resources.queue_timeout_s=8"]
    driver = bench.sweep("workload.new_tokens=8,9", *own, scripts="8=sleep3")
    (array,) = bench.wait_jobs()
    bench.cluster.scontrol("hold", f"{array}_1")
    code, output = finish(driver)
    assert code == 1, output
    assert bench.statuses() == ["ok", "lost"]
    assert "had not begun after 8 s" in bench.rows()[1]["reason"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_driver_killed_around_sbatch_loses_nothing_and_submits_nothing_twice(bench: SlurmBench, moment: str) -> None:
    shims = bench.folder / "bin"
    shims.mkdir()
    real = shutil.which("sbatch")
    submit = f'{real} "$@" > /dev/null' if moment == "after" else ":"
    (shims / "sbatch").write_text(f"#!/bin/sh\n{submit}\nkill -9 $PPID\n")
    (shims / "sbatch").chmod(0o755)
    before = {job["id"] for job in bench.cluster.jobs()}
    driver = bench.sweep("workload.new_tokens=8,9", PATH=f"{shims}:{os.environ['PATH']}")
    assert finish(driver)[0] == -signal.SIGKILL
    # It may be running by now.
    known = [job for job in bench.cluster.jobs() if job["name"].startswith("lbi-test") and job["id"] not in before]
    assert bool(known) == (moment == "after")
    code, output = bench.run("workload.new_tokens=8,9")
    assert code == 0, output
    assert bench.statuses() == ["ok", "ok"]
    assert [bench.outcomes(cell) for cell in (0, 1)] == [["ok"], ["ok"]]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], check=False)
    if mounted.returncode:
        pytest.skip("this user may not mount a small disk")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=False)


def test_a_full_disk_loses_nothing_that_is_finished(small_disk: Path, cluster: Cluster) -> None:
    bench = SlurmBench(small_disk, cluster)
    bench.store = small_disk / "lbi_store"
    code, output = bench.run("workload.new_tokens=8,9,10", "resources.requeues=1", scripts="9=fill", timeout=120)
    assert code == 1, output
    assert "Traceback" not in output
    assert "No space left" in output
    (bench.store / "filler").unlink()
    assert bench.statuses()[0] == "ok"
    code, output = bench.run("workload.new_tokens=8,9,10")
    assert code == 0, output
    assert bench.outcomes(0) == ["ok"]


def test_two_drivers_of_one_sweep_measure_no_cell_twice(bench: SlurmBench) -> None:
    cells = "workload.new_tokens=8,9,10,11"
    drivers = [bench.sweep(cells, "resources.runs_per_job=2", scripts="8=sleep2") for _ in range(2)]
    ended = [finish(driver) for driver in drivers]
    assert [code for code, _ in ended] == [0, 0], ended
    assert bench.statuses() == ["ok"] * 4
    assert [bench.attempts(cell) for cell in range(4)] == [1] * 4


def test_ctrl_c_detaches_and_the_same_command_follows_again(bench: SlurmBench) -> None:
    gate = bench.folder / "gate"
    driver = bench.sweep("workload.new_tokens=8,9", scripts="8=gate", LBI_TEST_GATE=str(gate))
    bench.wait_begun(1)
    driver.send_signal(signal.SIGINT)
    code, output = finish(driver)
    assert code == 1
    assert "Detached; the jobs go on" in output
    assert "python -m lbi cancel test" in output
    code, output = bench.verb("status", "test")
    assert "1 running, 1 queued" in output, output
    gate.touch()
    code, output = bench.run("workload.new_tokens=8,9")
    assert code == 0, output
    assert len(bench.jobs()) == 1
    assert [bench.outcomes(cell) for cell in (0, 1)] == [["ok"], ["ok"]]


def test_ctrl_c_twice_cancels(bench: SlurmBench) -> None:
    driver = bench.sweep("workload.new_tokens=8,9", scripts="8=hang")
    bench.wait_begun(1)
    driver.send_signal(signal.SIGINT)
    time.sleep(1.5)
    driver.send_signal(signal.SIGINT)
    code, output = finish(driver)
    assert code == 1
    assert "Cancelled the jobs" in output
    bench.cluster.wait_idle()
    wait(lambda: bench.outcomes(0) == ["cancelled"], 15, "the run in progress to be published as cancelled")


def test_detached_logs_and_cancel_from_another_shell(bench: SlurmBench) -> None:
    code, output = bench.run("workload.new_tokens=8,9,10", "sweep.wait=false", scripts="9=hang")
    assert code == 0
    assert "status test --watch" in output
    bench.wait_begun(2)
    assert bench.verb("logs", "test", "0")[0] == 0
    code, output = bench.verb("cancel", "test", "new_tokens=9")
    assert code == 0, output
    code, output = bench.verb("status", "test", "--watch")
    assert code == 1, output
    assert bench.statuses() == ["ok", "cancelled", "ok"], output
    assert bench.verb("cancel", "test")[0] == 2


def test_a_late_job_runs_the_code_that_was_submitted(bench: SlurmBench) -> None:
    checkout = bench.folder / "checkout"
    for part in ("lbi", "conf", "sweeps"):
        shutil.copytree(bench.code / part, checkout / part, symlinks=True)
    bench.code = checkout
    bench.cluster.scontrol("update", "partitionname=main", "state=down")
    try:
        assert bench.run("workload.new_tokens=8", "sweep.wait=false")[0] == 0
        (checkout / "lbi" / "executors" / "slurm_job.py").write_text("raise RuntimeError('not the code submitted')\n")
    finally:
        bench.cluster.scontrol("update", "partitionname=main", "state=up")
    bench.cluster.wait_idle()
    assert bench.statuses() == ["ok"]


def test_packages_that_changed_since_the_plan_are_seen_before_anything_runs(bench: SlurmBench) -> None:
    bench.cluster.scontrol("update", "partitionname=main", "state=down")
    try:
        assert bench.run("workload.new_tokens=8", "sweep.wait=false")[0] == 0
        (unit,) = bench.store.glob("sweeps/test/submissions/001/units/unit-0.json")
        unit.write_text(unit.read_text().replace('"torch": "2', '"torch": "1'))
    finally:
        bench.cluster.scontrol("update", "partitionname=main", "state=up")
    bench.cluster.wait_idle()
    (row,) = bench.rows()
    assert row["status"] == "lost"
    assert "torch 1" in row["reason"]
    assert bench.run("workload.new_tokens=8")[0] == 0


def test_two_of_forty_cells_that_fail_leave_the_other_results(bench: SlurmBench) -> None:
    lengths = ",".join(str(number) for number in range(8, 48))
    code, output = bench.run(f"workload.new_tokens={lengths}", scripts="20=oom,30=exit")
    assert code == 1, output
    statuses = bench.statuses()
    assert statuses.count("ok") == 38
    page = (bench.store / "sweeps" / "test" / "report.html").read_text()
    for reason in ("no memory left", "exit code 9 in phase measure"):
        assert reason in page
        assert reason in output


def test_resource_classes_share_a_sweep(bench: SlurmBench) -> None:
    grids = "[{workload.new_tokens: 8, resources: h100}, {workload.new_tokens: 9, resources: a100}]"
    code, output = bench.run(f"hydra.sweeper.grids={grids}", "engine.device=cpu")
    assert code == 0, output
    assert "2 jobs in 2 resource classes, 1 GPU each" in output
    hosts = [json.loads((Path(row["folder"]) / "outcome.json").read_text())["host"] for row in bench.rows()]
    assert hosts[0] in ("n1", "n2")
    assert hosts[1] in ("n3", "n4")


def test_another_sweeper_drives_the_cluster_and_is_answered_from_the_store(bench: SlurmBench) -> None:
    """Hydra's own sweeper knows a launcher by its contract alone; a search does no more."""
    code, output = bench.run("hydra/sweeper=basic", "workload.new_tokens=8,9")
    assert code == 0, output
    assert bench.statuses() == ["ok", "ok"]
    code, output = bench.run("hydra/sweeper=basic", "workload.new_tokens=9,8")
    assert code == 0, output
    assert len(bench.jobs()) == 1
    assert [bench.attempts(cell) for cell in (0, 1)] == [1, 1]
    code, output = bench.run("hydra/sweeper=basic", "workload.new_tokens=10", scripts="10=oom")
    assert code != 0
    assert "no memory left" in output
