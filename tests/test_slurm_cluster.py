"""The test cluster does what the tests of the SLURM executor rely on, and breaks and heals as they are told."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster, ClusterError

pytestmark = pytest.mark.slurm


def test_a_job_has_the_gpus_that_it_asked_for(cluster: Cluster, tmp_path: Path) -> None:
    output = tmp_path / "out"
    job = cluster.sbatch(
        f"--output={output}", "--gres=gpu:a100:2", "--wrap=echo $SLURMD_NODENAME $CUDA_VISIBLE_DEVICES"
    )
    cluster.wait_job(job, "COMPLETED")
    node, devices = output.read_text().split()
    assert node in ("n3", "n4")
    assert devices == "0,1"
    sacct = ("sacct", "-n", "-X", "-P", "-o", "State", "-j", job)
    cluster.wait(lambda: cluster.run(*sacct).stdout == "COMPLETED\n", 10, "the accounting")


def test_jobs_on_one_node_get_different_gpus(cluster: Cluster, tmp_path: Path) -> None:
    command = f"--wrap=echo $CUDA_VISIBLE_DEVICES > {tmp_path}/$SLURM_ARRAY_TASK_ID; sleep 1"
    cluster.sbatch("--array=0-3", "--nodelist=n1", "--gres=gpu:h100:1", command)
    cluster.wait_idle()
    assert sorted((tmp_path / str(task)).read_text().strip() for task in range(4)) == ["0", "1", "2", "3"]


def test_a_crashed_node_is_seen_and_its_job_requeued(cluster: Cluster) -> None:
    job = cluster.sbatch("--gres=gpu:h100:1", "--wrap=sleep 300")
    node = cluster.wait_job(job, "RUNNING")["node"]
    cluster.kill_node(node)
    assert not [process for process in cluster.processes() if process.node == node]
    cluster.wait(lambda: cluster.nodes()[node].startswith("down"), 45, "the node to be down")
    cluster.wait_job(job, "PENDING")


def test_a_crashed_node_is_back_for_the_next_test(cluster: Cluster) -> None:
    assert set(cluster.nodes().values()) == {"idle"}
    assert cluster.squeue() == []


def test_a_job_outlives_the_daemon_of_its_node(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch("--nodelist=n2", f"--wrap=sleep 2; touch {tmp_path}/done")
    cluster.wait_job(job, "RUNNING")
    cluster.kill_slurmd("n2")
    cluster.wait((tmp_path / "done").exists, 10, "the job's file")
    cluster.restart_node("n2")
    assert cluster.wait_job(job, "COMPLETED")["node"] == "n2"


def test_jobs_go_on_without_the_controller(cluster: Cluster, tmp_path: Path) -> None:
    job = cluster.sbatch("--nodelist=n4", f"--wrap=sleep 1; touch {tmp_path}/done")
    cluster.wait_job(job, "RUNNING")
    cluster.stop_controller()
    with pytest.raises(ClusterError, match="Unable to contact slurm controller"):
        cluster.sbatch("--wrap=true")
    assert (tmp_path / "done").exists()
    cluster.start_controller()
    cluster.wait_job(job, "RUNNING", "COMPLETED")


def test_the_controller_crashes(cluster_without_accounting: Cluster) -> None:
    cluster_without_accounting.stop_controller(crash=True)
    cluster_without_accounting.start_controller()
    job = cluster_without_accounting.sbatch("--wrap=true")
    assert cluster_without_accounting.wait_job(job, "COMPLETED")["id"] == job


def test_the_next_test_finds_everything_up_and_no_jobs(cluster: Cluster) -> None:
    for _ in range(3):
        cluster.sbatch("--exclusive", "--wrap=trap '' TERM; while true; do sleep 1; done")
    cluster.wait(lambda: {row["state"] for row in cluster.squeue()} == {"RUNNING"}, 10, "the jobs to start")
    cluster.scontrol("update", "nodename=n3", "state=drain", "reason=test")
    cluster.kill_node("n1")
    cluster.kill_slurmd("n4")
    cluster.stop_controller()
    cluster.heal()
    assert set(cluster.nodes().values()) == {"idle"}
    assert cluster.squeue() == []
    assert not [process for process in cluster.processes() if process.is_of_job]


def test_without_accounting_sacct_refuses(cluster_without_accounting: Cluster) -> None:
    job = cluster_without_accounting.sbatch("--wrap=exit 3")
    cluster_without_accounting.wait_job(job, "FAILED")
    with pytest.raises(ClusterError, match="accounting storage is disabled"):
        cluster_without_accounting.run("sacct", "-j", job)


def test_clusters_with_other_settings_run_side_by_side(make_cluster: Callable[..., Cluster], cluster: Cluster) -> None:
    other = make_cluster(ACCT="none", NODES=2, MAX_ARRAY_SIZE=3)
    assert other.environment != cluster.environment
    assert sorted(other.nodes()) == ["n1", "n2"]
    with pytest.raises(ClusterError, match="Invalid job array specification"):
        other.sbatch("--array=0-3", "--wrap=true")
    assert cluster.squeue() == []


@pytest.fixture
def folder() -> Iterator[Path]:
    """Not tmp_path, which may be too long for a socket."""
    with tempfile.TemporaryDirectory(prefix="lbi-slurm-") as made:
        yield Path(made) / "cluster"


def test_nothing_outlives_the_cluster(cluster: Cluster, folder: Path) -> None:
    made = Cluster(folder, ACCT="none", NODES=1)
    try:
        made.start()
        made.wait_job(made.sbatch("--wrap=trap '' TERM; while true; do sleep 1; done"), "RUNNING")
    finally:
        made.stop()
    assert list(made.processes()) == []
    assert not folder.exists()


def test_the_cluster_ends_with_its_owner(cluster: Cluster, folder: Path) -> None:
    owner = subprocess.Popen(["sleep", "60"])
    made = Cluster(folder, ACCT="none", NODES=1, OWNER=owner.pid)
    try:
        made.start()
        owner.kill()
        owner.wait()
        made.wait(lambda: not folder.exists(), 10, "the cluster to end")
    finally:
        made.stop()
    assert not folder.exists()
