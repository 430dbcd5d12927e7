"""What a run may use and where it is sent: GPUs, cores, time, a cluster's and a cloud's own words.

None of it can change what is measured, so none is part of a run_id; what a node then is, is
part of the env_id.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lbi.typed import knob


@dataclass(frozen=True, kw_only=True, slots=True)
class ResourcesConfig:
    """What a run may use and for how long. Not part of the run_id; `slots` is part of a CPU's env_id.

    Cells with the same resources share a job array on a cluster.
    """

    name: str = knob("name shown in tables")
    run_timeout_s: float = knob("a run that takes longer is stopped as `timeout`, in seconds", above=0.0)
    stop_grace_s: float = knob("time a child gets to end by itself when stopped, in seconds", low=0.0)
    fork: bool = knob("fork runs from a process that has imported torch already; false starts each anew")
    isolation: Literal["process", "shared_load"] = knob(
        "process: a process for each run; shared_load: one for runs that differ in decoding, cache or workload alone, "
        "which keeps the loaded and quantized model",
        default="process",
    )
    compile_cache: Literal["store", "node", "off"] = knob(
        "compiled graphs of earlier runs: the store's and this node's, this node's alone, or none, each compiled anew",
        default="store",
    )
    compile_ahead: int | None = knob(
        "graphs that no cache has, compiled side by side before the first of their cells is measured; 1: each by its "
        "cell; null: on a GPU as many as cores (four each) and memory allow, on a CPU 1",
        low=1,
        default=None,
    )
    shared_quality: bool = knob(
        "take a cell's quality from the pass of another that would be the same; false has each cell do its own",
        default=True,
    )
    shared_references: bool = knob(
        "take the unquantized model's outputs from the store; false computes them anew for each cell", default=True
    )
    gpus: int | None = knob(
        "cluster: GPUs of a job, null: one if the cell needs one; here: GPUs with a run each, null: all like the first",
        default=None,
        low=0,
    )
    gpu_type: str | None = knob("cluster: type of GPU, as the cluster calls it (h100)", default=None)
    cpus: int | None = knob("cluster: cores of a job; null: the cluster's default", default=None, low=1)
    memory_gb: float | None = knob(
        "cluster: host memory of a job, in GB; null: from the model's size", default=None, above=0
    )
    exclusive: bool | None = knob("cluster: nobody else on the node; null: for cells on a CPU", default=None)
    partition: str | None = knob("SLURM partition; null: the default one", default=None)
    constraint: str | None = knob("SLURM: features a node must have (h100|a100)", default=None)
    account: str | None = knob("SLURM account that pays", default=None)
    qos: str | None = knob("SLURM quality of service", default=None)
    exclude: str | None = knob("SLURM: nodes left out, besides those that failed", default=None)
    container: str | None = knob(
        "SLURM with pyxis: image the job runs in; python3 in it has lbi's packages", default=None
    )
    mounts: str | None = knob("SLURM with pyxis: --container-mounts", default=None)
    sbatch: dict[str, Any] = knob("SLURM: any other sbatch option, by its name", default_factory=dict)
    setup: tuple[str, ...] = knob("cluster: shell lines before the worker starts (module load cuda)", default=())
    time_min: int | None = knob(
        "cluster: time limit of a job, in minutes; null: from the estimate", default=None, low=1
    )
    signal_s: int = knob("cluster: a job is told this long before its time limit, in seconds", default=90, low=1)
    runs_per_job: int = knob("cluster: runs of one model that one job executes in turn", default=8, low=1)
    array_parallelism: int = knob("cluster: jobs of one array that run at the same time", default=256, low=1)
    requeues: int = knob("cluster: times a run is tried again when its job is lost or preempted", default=3, low=0)
    queue_timeout_s: float | None = knob(
        "cluster, attached: a job that has not begun after this long is given up, in seconds; null: never",
        default=None,
        above=0.0,
    )
    clouds: tuple[str, ...] = knob(
        "rented: where, each as SkyPilot names it (runpod, vast/US, aws/us-east-1, kubernetes), the cheapest of them "
        "first; empty: wherever an account is set up",
        default=(),
    )
    gpu_candidates: tuple[str, ...] = knob(
        "rented: types of GPU in order of preference; the next one is rented when queue_timeout_s has passed without a "
        "worker; empty: gpu_type",
        default=(),
    )
    spot: bool = knob("rented: machines that may be taken away, at a lower price", default=False)
    max_price: float | None = knob("rented: what a machine may cost, in US dollars an hour", default=None, above=0.0)
    disk_gb: int | None = knob("rented: disk of a machine, in GB; null: the cloud's default", default=None, low=1)
    image: str | None = knob(
        "rented, Kubernetes: container image that has lbi's packages; null: they are installed when a machine starts",
        default=None,
    )
    foreign: Literal["void", "wait", "ignore"] = knob(
        "processes of others on the GPU: void repeats the samples they were there for; wait also delays the run's "
        "start until they are gone; ignore records them",
        default="void",
    )
    slots: int = knob("CPU: runs at the same time; each gets its share of the cores", default=1, low=1)
