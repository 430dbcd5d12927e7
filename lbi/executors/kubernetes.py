"""Writes a sweep as a Kubernetes manifest: an Indexed Job whose pods each run one unit. Nothing is submitted.

    python -m lbi render k8s +sweep=quickstart resources.image=ghcr.io/you/lbi:0.1.0
    kubectl apply -f MANIFEST
    kubectl logs -l lbi.dev/sweep=NAME --tail=-1 --prefix > logs.txt
    python -m lbi collect NAME --from-logs logs.txt

The units are in a ConfigMap, secrets are referred to by name, and results come home in the
pods' logs or by W&B.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import yaml

from lbi.children import Stop
from lbi.config import LbiConfig, SweepConfig
from lbi.errors import InputError
from lbi.executors import cloud_files
from lbi.executors.queue_executor import classes, forecast_text, gpus_of
from lbi.executors.unit_parcel import pack_units
from lbi.files import write_text
from lbi.schedule import Unit
from lbi.store import Store
from lbi.typed import knob
from lbi.worker import Report

MOST = 900_000
"""Letters of units in one ConfigMap, of which Kubernetes takes 1 MiB."""

STORE, UNITS = "/var/lib/lbi", "/etc/lbi"

FAILURES = [
    # A pod that a node drain or a preemption ended says nothing about its unit.
    {"action": "Ignore", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
    # The job said that it cannot do what it is asked to: it could not the next time either.
    {"action": "FailIndex", "onExitCodes": {"containerName": "lbi", "operator": "In", "values": [2]}},
]


@dataclass(frozen=True, kw_only=True, slots=True)
class KubernetesLauncher:
    """hydra/launcher=lbi_k8s: what the manifest says besides `resources`."""

    namespace: str | None = knob("namespace; null: kubectl's own", default=None)
    parallelism: int = knob("pods at the same time", default=2, low=1)
    queue: str | None = knob("Kueue's local queue; null: the job starts without one", default=None)
    secret: str = knob("Secret with WANDB_API_KEY and HF_TOKEN, as far as there are any", default="lbi-secrets")
    node_selector: dict[str, Any] = knob("labels that a node must have", default_factory=dict)
    gpu_resource: str = knob("how the cluster calls its GPUs", default="nvidia.com/gpu")
    python: str = knob("Python in the image", default="python3")
    results: Literal["logs", "wandb"] = knob("how results come home, as for lbi_cloud", default="logs")
    max_result_kb: float = knob("a result that takes more letters in a log is not sent, in KB", default=400.0, above=0)
    ttl_s: int | None = knob(
        "a finished job, with its logs, is kept so long, in seconds; null: for ever", default=86400
    )


class KubernetesExecutor:
    """Writes one manifest for each resource class, below the sweep's folder."""

    pack = True
    here = False

    def __init__(self, sweep: str, settings: SweepConfig, launcher: KubernetesLauncher) -> None:
        self.sweep, self.settings, self.launcher = sweep, settings, launcher

    def forecast(self, units: Sequence[Unit], store: Store) -> str:
        """Pods, GPUs and GPU time that these units will take, in words."""
        return forecast_text("Kubernetes", units, store) if units else ""

    def execute(self, units: Sequence[Unit], store: Store, report: Report, since: float) -> Stop:
        """Write the manifests. Raises `InputError` for what a pod cannot have."""
        stop = Stop()
        written = []
        for number, members in enumerate(classes(units)):
            file = store.sweep_folder(self.sweep) / "k8s" / f"{self.name(number)}.yaml"
            write_text(file, self.manifest(store, members, number))
            written.append(str(file))
        stop.detached = "\n".join(
            [
                *(f"kubectl apply -f {file}" for file in written),
                f"kubectl logs -l lbi.dev/sweep={_label(self.sweep)} --tail=-1 --max-log-requests=64 > logs.txt",
                f"python -m lbi collect {self.sweep} --from-logs logs.txt --store {store.root}",
            ]
        )
        return stop

    def name(self, number: int) -> str:
        """A job's name: it begins the names of pods, which may have 63 letters."""
        name = re.sub(r"[^a-z0-9-]+", "-", f"lbi-{self.sweep}".lower()).strip("-")[:45].rstrip("-")
        return f"{name}-{number}"

    def manifest(self, store: Store, units: Sequence[Unit], number: int) -> str:
        """The ConfigMap with the units and the Job of their pods, as YAML."""
        config = units[0].tasks[0].config
        if not config.resources.image:
            raise InputError(
                "resources.image",
                None,
                "a pod runs an image",
                "resources.image=ghcr.io/you/lbi:0.1.0 (docs/container.md)",
            )
        text = pack_units(store, self.sweep, units, self.launcher.results, self.launcher.max_result_kb)
        if len(text) > MOST:
            raise InputError(
                "resources.runs_per_job",
                config.resources.runs_per_job,
                f"the units take {len(text):,} letters, and a ConfigMap holds {MOST:,}",
                "Render a part of the grid at a time",
            )
        documents = [self._config_map(number, text), self._job(number, config, units)]
        head = f"# Made by lbi for: kubectl apply -f THIS_FILE\n# {len(units)} units of the sweep {self.sweep}\n"
        return head + "---\n".join(yaml.safe_dump(item, sort_keys=False, width=110) for item in documents)

    def _about(self, number: int) -> dict[str, Any]:
        labels = {"app.kubernetes.io/name": "lbi", "lbi.dev/sweep": _label(self.sweep)}
        namespace = {"namespace": self.launcher.namespace} if self.launcher.namespace else {}
        return {"name": self.name(number), **namespace, "labels": labels}

    def _config_map(self, number: int, text: str) -> dict[str, Any]:
        return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": self._about(number), "data": {"units": text}}

    def _job(self, number: int, config: LbiConfig, units: Sequence[Unit]) -> dict[str, Any]:
        about = self._about(number)
        if self.launcher.queue:
            about["labels"] = {**about["labels"], "kueue.x-k8s.io/queue-name": self.launcher.queue}
        spec: dict[str, Any] = {
            "completionMode": "Indexed",
            "completions": len(units),
            "parallelism": min(self.launcher.parallelism, len(units)),
            "backoffLimitPerIndex": config.resources.requeues,
            "maxFailedIndexes": len(units),
            "podFailurePolicy": {"rules": FAILURES},
        }
        if self.launcher.queue:
            # Kueue lets it start.
            spec["suspend"] = True
        if self.launcher.ttl_s is not None:
            spec["ttlSecondsAfterFinished"] = self.launcher.ttl_s
        labels = {"app.kubernetes.io/name": "lbi", "lbi.dev/sweep": _label(self.sweep)}
        spec["template"] = {"metadata": {"labels": labels}, "spec": self._pod(number, config, units)}
        return {"apiVersion": "batch/v1", "kind": "Job", "metadata": about, "spec": spec}

    def _pod(self, number: int, config: LbiConfig, units: Sequence[Unit]) -> dict[str, Any]:
        resources = config.resources
        gpus = max(gpus_of(task) for unit in units for task in unit.tasks)
        limits: dict[str, Any] = {self.launcher.gpu_resource: gpus} if gpus else {}
        requests: dict[str, Any] = {}
        if resources.cpus:
            requests["cpu"] = str(resources.cpus)
        if resources.memory_gb:
            requests["memory"] = limits["memory"] = f"{resources.memory_gb:g}G"
        pod: dict[str, Any] = {
            "restartPolicy": "Never",
            "securityContext": {"fsGroup": 1000},
            "containers": [self._container(config, {"limits": limits, "requests": requests})],
            "volumes": [
                {"name": "store", "emptyDir": {}},
                {"name": "shm", "emptyDir": {"medium": "Memory"}},
                # A variable may have 128 KiB, a ConfigMap has eight times as much.
                {"name": "units", "configMap": {"name": self.name(number)}},
            ],
        }
        if self.launcher.node_selector:
            pod["nodeSelector"] = {name: str(value) for name, value in self.launcher.node_selector.items()}
        if gpus:
            pod["tolerations"] = [{"key": self.launcher.gpu_resource, "operator": "Exists", "effect": "NoSchedule"}]
        return pod

    def _container(self, config: LbiConfig, asked: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        secrets = [
            {
                "name": name,
                "valueFrom": {"secretKeyRef": {"name": self.launcher.secret, "key": name, "optional": True}},
            }
            for name in cloud_files.SECRETS
        ]
        variables: list[dict[str, Any]] = [
            {"name": "LBI_STORE", "value": f"{STORE}/store"},
            {"name": "LBI_CACHE", "value": f"{STORE}/cache"},
            {"name": "PYTHONUNBUFFERED", "value": "1"},
            *({"name": name, "value": value} for name, value in cloud_files.passed().items()),
            *secrets,
        ]
        container: dict[str, Any] = {
            "name": "lbi",
            "image": config.resources.image,
            # Past the image's own entry point, which is for people.
            "command": [self.launcher.python, "-m", "lbi.executors.job", "--parcel", f"{UNITS}/units"],
            "env": variables,
            "volumeMounts": [
                {"name": "store", "mountPath": STORE},
                {"name": "shm", "mountPath": "/dev/shm"},
                {"name": "units", "mountPath": UNITS, "readOnly": True},
            ],
        }
        kept = {name: dict(value) for name, value in asked.items() if value}
        if kept:
            container["resources"] = kept
        return container


def _label(text: str) -> str:
    """A label's value may have letters, digits, dots, hyphens and underscores, 63 in all."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", text)[:63].strip("-_.")
