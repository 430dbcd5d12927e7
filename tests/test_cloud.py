"""Sweeps on rented machines: SkyPilot's real client against a loopback server that executes the jobs."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cloud_bench import ROOT, SKY, CloudBench
from fakes.sky_server import FakeSky
from fakes.wandb_server import KEY, FakeWandb
from slurm_bench import finish

pytestmark = [
    pytest.mark.cloud,
    pytest.mark.skipif(not SKY.exists(), reason="SkyPilot is not installed: ./scripts/cloud/install"),
]

SECRET = "s3cr3t" + "b" * 34


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeSky]:
    with FakeSky(tmp_path / "cloud") as fake:
        yield fake
        assert fake.unknown == []


@pytest.fixture
def bench(tmp_path: Path, server: FakeSky) -> CloudBench:
    return CloudBench(tmp_path, server)


def test_good_and_failing_cells_come_home_by_wandb_and_no_secret_is_kept(bench: CloudBench, server: FakeSky) -> None:
    with FakeWandb() as wandb:
        # The server takes any key of this form.
        bench.variables = {"WANDB_BASE_URL": wandb.url, "WANDB_API_KEY": SECRET, "HF_TOKEN": f"hf_{SECRET}"}
        code, said = bench.run(
            "workload.new_tokens=8,9,10",
            "tracker=wandb",
            "tracker.mode=online",
            "hydra.launcher.results=wandb",
            "resources.runs_per_job=2",
            scripts="9=oom",
        )
        assert code == 1, said
        assert bench.statuses() == ["ok", "oom", "ok"], said
        assert {run.fields["groupName"] for run in wandb.runs.values()} == {"test"}
        bench_runs = [run for run in wandb.runs.values() if run.fields["jobType"] == "bench"]
        assert sorted(run.summary["status"] for run in bench_runs) == ["ok", "ok", "oom"]
        assert wandb.unknown == []
        told = json.dumps(
            [[run.raw_config, run.summary, run.lines("wandb-history.jsonl")] for run in wandb.runs.values()]
        )
        assert SECRET not in told
    assert server.pools == {}
    assert "Ended the pool" in said
    assert len(list((server.root / "machines").iterdir())) == 2
    kept = [file for folder in (bench.store, server.root) for file in folder.rglob("*") if file.is_file()]
    assert len(kept) > 50
    assert [file for file in kept if SECRET.encode() in file.read_bytes()] == []
    assert SECRET not in said
    # It did reach the machines, by SkyPilot's own way.
    (launch,) = [sent for path, sent in server.bodies if path == "/jobs/launch"]
    assert SECRET in launch["task"]
    assert "WANDB_API_KEY" in launch["task"]
    # The same command again runs only what failed without a result of its own: nothing.
    before = len(server.jobs)
    code, said = bench.run(
        "workload.new_tokens=8,9,10", "tracker=none", "hydra.launcher.results=logs", "resources.runs_per_job=2"
    )
    assert len(server.jobs) == before, said


def test_what_has_come_home_by_the_log_outlives_its_machine(bench: CloudBench, server: FakeSky) -> None:
    process = bench.sweep(
        "workload.new_tokens=8,9,10", "hydra.launcher.workers=1", scripts="9=gate", PYTHONUNBUFFERED="1"
    )
    bench.wait_home(1)
    (first,) = list(bench.store.glob("runs/*/*/status.json"))
    status = first.read_bytes()
    server.preempt(1)
    bench.gate.touch()
    code, said = finish(process, 240)
    assert code == 0, said
    assert bench.statuses() == ["ok"] * 3, said
    assert first.read_bytes() == status
    # The first job was ended, and the second has only what was missing.
    assert next(job.status for job in server.jobs.values()) in ("CANCELLED", "SUCCEEDED")
    if len(server.jobs) > 1:
        assert re.search(r"\b[12] runs", (server.root / "job-2-0.log").read_text()), said
    assert server.pools == {}


def test_a_recovered_job_skips_what_wandb_has(bench: CloudBench, server: FakeSky) -> None:
    with FakeWandb() as wandb:
        bench.variables = {"WANDB_BASE_URL": wandb.url, "WANDB_API_KEY": KEY}
        arguments = ["workload.new_tokens=8,9", "tracker=wandb", "tracker.mode=online", "hydra.launcher.results=wandb"]
        # Nobody follows: SkyPilot alone begins the job anew.
        code, said = bench.run(*arguments, "hydra.launcher.workers=1", "sweep.wait=false", scripts="9=gate")
        assert code == 0, said
        end = time.monotonic() + 90
        while not (log := server.root / "job-1-0.log").exists() or "lbi-note told" not in log.read_text():
            assert time.monotonic() < end, "the first result did not reach W&B"
            time.sleep(0.2)
        server.preempt(1)
        bench.gate.touch()
        bench.wait_jobs(1, "SUCCEEDED")
        again = (server.root / "job-1-1.log").read_text()
        assert "1 of 2 results fetched" in again
        assert len(re.findall(r"lbi-note begun", again)) == 1
        code, said = bench.verb("collect", "test")
        assert code == 0
        assert "2 results came home" in said
        assert bench.statuses() == ["ok", "ok"]


def test_a_job_that_never_starts_is_given_up_with_the_reason(bench: CloudBench, server: FakeSky) -> None:
    server.no_machines = True
    code, said = bench.run("workload.new_tokens=8,9", "resources.queue_timeout_s=4")
    assert code == 1, said
    assert bench.statuses() == ["lost", "lost"]
    assert all("had not begun after 4 s" in row["reason"] for row in bench.rows())
    assert {job.status for job in server.jobs.values()} == {"CANCELLED"}
    assert server.pools == {}


def test_the_server_may_be_gone_while_jobs_run(bench: CloudBench, server: FakeSky) -> None:
    process = bench.sweep("workload.new_tokens=8,9", scripts="9=gate")
    bench.wait_home(1)
    server.down = True
    # A call of the client's asks two or three times before it gives up.
    end = time.monotonic() + 120
    while server.refused < 6:
        assert time.monotonic() < end, "the driver does not ask"
        time.sleep(0.2)
    bench.gate.touch()
    time.sleep(2)
    server.down = False
    code, said = finish(process, 240)
    assert code == 0, said
    assert bench.statuses() == ["ok", "ok"]
    assert "does not answer" in said
    assert len(server.jobs) == 1
    assert server.pools == {}


def test_detached_looked_at_collected_and_ended_from_other_processes(bench: CloudBench, server: FakeSky) -> None:
    code, said = bench.run("workload.new_tokens=8,9", "sweep.wait=false", scripts="9=gate")
    assert code == 0
    assert "Submitted 1 jobs" in said
    assert bench.home_runs() == []
    bench.wait_jobs(1, "RUNNING")
    code, said = bench.verb("status", "test")
    assert code == 1
    assert "2 queued" in said
    assert "job sky-1" in said
    assert re.search(r"The pool lbi-local-\w+ is up \(READY, \d/\d machines\).*for \$0\.\d\d until now", said), said
    assert "cancel test --down" in said
    bench.gate.touch()
    bench.wait_jobs(1, "SUCCEEDED")
    code, said = bench.verb("collect", "test")
    assert code == 0, said
    assert "2 results came home from 1 jobs" in said
    assert bench.statuses() == ["ok", "ok"]
    # What is home is not asked for again.
    calls = sum(server.calls.values())
    code, said = bench.verb("collect", "test")
    assert code == 0
    assert sum(server.calls.values()) == calls
    assert server.pools != {}
    code, said = bench.verb("cancel", "test", "--down")
    assert code == 0, said
    assert "Ended the pool" in said
    assert server.pools == {}
    assert "is up" not in bench.verb("status", "test")[1]


@pytest.mark.parametrize("over", [False, True])
def test_the_same_command_follows_what_lives_and_fetches_what_is_over(
    bench: CloudBench, server: FakeSky, over: bool
) -> None:
    code, said = bench.run("workload.new_tokens=8,9", "sweep.wait=false", scripts="9=gate")
    assert code == 0, said
    bench.wait_jobs(1, "RUNNING")
    if over:
        bench.gate.touch()
        bench.wait_jobs(1, "SUCCEEDED")
        code, said = bench.run("workload.new_tokens=8,9", scripts="9=gate")
    else:
        process = bench.sweep("workload.new_tokens=8,9", scripts="9=gate")
        bench.wait_home(1)
        bench.gate.touch()
        code, said = finish(process)
    assert code == 0, said
    assert bench.statuses() == ["ok", "ok"]
    assert len(server.jobs) == 1
    assert server.pools == {}


def test_a_running_sweep_is_cancelled_with_its_machines(bench: CloudBench, server: FakeSky) -> None:
    code, said = bench.run(
        "workload.new_tokens=8,9", "sweep.wait=false", "resources.runs_per_job=1", scripts="8=hang,9=hang"
    )
    assert code == 0, said
    bench.wait_jobs(2, "RUNNING")
    code, said = bench.verb("cancel", "test", "--down")
    assert code == 0, said
    assert "Cancelled 2 cells" in said
    assert {job.status for job in server.jobs.values()} == {"CANCELLED"}
    assert server.pools == {}
    bench.verb("collect", "test")
    assert bench.statuses() == ["cancelled", "cancelled"]


def test_machines_end_when_submitting_fails(bench: CloudBench, server: FakeSky) -> None:
    # The pool is made, and then the client cannot be run any more.
    broken = bench.folder / "sky"
    broken.write_text(
        f'#!/bin/sh\n[ "$2" = launch ] && {{ echo "sky: error: no such pool" >&2; exit 1; }}\nexec {SKY} "$@"\n'
    )
    broken.chmod(0o755)
    code, said = bench.run("workload.new_tokens=8", f"hydra.launcher.sky=[{broken}]")
    assert code == 1, said
    assert "no such pool" in said
    assert "Ended the pool" in said
    assert server.pools == {}


def test_rendered_files_are_what_skypilot_takes() -> None:
    """SkyPilot's own schema and rules for pools; the options of the clouds are in the files that docs show."""
    script = """
import glob, sys
import sky
from sky.serve import serve_utils
for file in sorted(glob.glob(sys.argv[1] + '/[rv]*/*.yaml')):
    task = sky.Task.from_yaml(file)
    if file.endswith('pool.yaml'):
        serve_utils.validate_service_task(task, pool=True)
        assert task.service.pool and task.setup
    else:
        assert task.run and not task.setup
    print('valid', file)
"""
    done = subprocess.run(
        [str(SKY.with_name("python")), "-c", script, str(ROOT / "docs" / "cloud")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("valid") == 4


def test_rendered_manifests_are_what_kubernetes_takes(tmp_path: Path) -> None:
    """Kubernetes' own schema, strictly: a field of another name is an error there and none in YAML."""
    text = (ROOT / "docs" / "cloud" / "kubernetes" / "job.yaml").read_text()
    (tmp_path / "wrong.yaml").write_text(text.replace("completionMode:", "completionMod:"))
    (tmp_path / "right.yaml").write_text(text)
    tool = [str(SKY.with_name("kubernetes-validate")), "--strict", "--kubernetes-version", "1.31"]
    for name, wanted in (("right.yaml", True), ("wrong.yaml", False)):
        done = subprocess.run([*tool, str(tmp_path / name)], capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == wanted, done.stdout + done.stderr
