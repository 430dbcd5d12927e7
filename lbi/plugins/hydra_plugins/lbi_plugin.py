"""Registers lbi's sweeper and launcher with Hydra. Imports nothing heavy: Hydra loads it at every start.

Hydra executes this module before it is in sys.modules, which postponed annotations do
not survive; so there is no `from __future__ import annotations` here.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, List, Optional, Sequence

from hydra.core.config_store import ConfigStore
from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf


@dataclass
class SweeperConf:
    """hydra/sweeper=lbi. `params` is one grid, as in Hydra's own sweeper; `grids` are more of them, joined."""

    _target_: str = "hydra_plugins.lbi_plugin.PlanSweeper"
    params: Optional[Dict[str, Any]] = None
    grids: List[Dict[str, Any]] = field(default_factory=list)


@dataclass
class LocalConf:
    """hydra/launcher=lbi_local: runs on this machine, one at a time on each GPU or share of the cores."""

    _target_: str = "hydra_plugins.lbi_plugin.LocalLauncher"


@dataclass
class SlurmConf:
    """hydra/launcher=lbi_slurm: jobs on a SLURM cluster, through submitit."""

    _target_: str = "hydra_plugins.lbi_plugin.SlurmLauncher"


@dataclass
class CloudConf:
    """hydra/launcher=lbi_cloud: rented machines, through SkyPilot. Documented in lbi/executors/cloud_files.py."""

    _target_: str = "hydra_plugins.lbi_plugin.CloudLauncher"
    sky: List[str] = field(default_factory=lambda: ["sky"])
    pool: str = "lbi"
    workers: int = 2
    results: str = "logs"
    max_result_kb: float = 400.0
    poll_s: float = 20.0
    logs_s: float = 60.0
    down: bool = True
    python: Optional[str] = None
    dry_run: bool = False


@dataclass
class KubernetesConf:
    """hydra/launcher=lbi_k8s: a manifest for kubectl. Documented in lbi/executors/kubernetes.py."""

    _target_: str = "hydra_plugins.lbi_plugin.KubernetesLauncher"
    namespace: Optional[str] = None
    parallelism: int = 2
    queue: Optional[str] = None
    secret: str = "lbi-secrets"
    node_selector: Dict[str, str] = field(default_factory=dict)
    gpu_resource: str = "nvidia.com/gpu"
    python: str = "python3"
    results: str = "logs"
    max_result_kb: float = 400.0
    ttl_s: Optional[int] = 86400


class PlanSweeper(Sweeper):
    """Plans the whole grid, shows the plan, and has the launcher's executor run what is missing."""

    def __init__(self, params: Optional[Dict[str, Any]], grids: List[Dict[str, Any]]) -> None:
        self.params, self.grids = dict(params or {}), [dict(grid) for grid in grids or []]

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        from hydra.core.plugins import Plugins

        self.settings, self.context = config, hydra_context
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: List[str]) -> Any:
        from lbi.drive import Request, drive

        hydra_overrides = OmegaConf.to_container(self.settings.hydra.overrides.hydra)
        request = Request(
            loader=self.context.config_loader,
            config_name=str(self.settings.hydra.job.config_name),
            arguments=tuple(arguments),
            hydra_overrides=tuple(str(item) for item in hydra_overrides),  # type: ignore[union-attr]
            params=self.params,
            grids=tuple(self.grids),
        )
        return drive(request, self.launcher)


class LocalLauncher(Launcher):
    """Gives the plan sweeper its executor, and other sweepers Hydra's own contract."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        self.settings, self.context = config, hydra_context

    def executor(self, sweep: str, settings: Any) -> Any:
        from lbi.executors.local import LocalExecutor

        return LocalExecutor(sweep)

    def sites(self, store: Any) -> Any:
        from lbi.sites import Here

        return Here()

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        from lbi.drive import launch

        return launch(self, job_overrides)


class SlurmLauncher(LocalLauncher):
    """The same on a SLURM cluster."""

    def executor(self, sweep: str, settings: Any) -> Any:
        from lbi.executors.slurm import SlurmExecutor

        return SlurmExecutor(sweep, settings)

    def sites(self, store: Any) -> Any:
        from lbi.sites import Cluster

        return Cluster(store)


class CloudLauncher(LocalLauncher):
    """The same on rented machines."""

    def __init__(self, **knobs: Any) -> None:
        self.knobs = knobs

    def executor(self, sweep: str, settings: Any) -> Any:
        from lbi.executors.cloud import CloudExecutor
        from lbi.executors.cloud_files import CloudLauncher as Settings

        return CloudExecutor(sweep, settings, self.typed(Settings))

    def sites(self, store: Any) -> Any:
        from lbi.sites import Rented

        return Rented(store)

    def typed(self, cls: Any) -> Any:
        """The launcher's knobs, checked."""
        from lbi.typed import build

        plain: Any = OmegaConf.to_container(OmegaConf.create(self.knobs), resolve=True)
        return build(cls, plain, "hydra.launcher")


class KubernetesLauncher(CloudLauncher):
    """A manifest of the same jobs."""

    def executor(self, sweep: str, settings: Any) -> Any:
        from lbi.executors.kubernetes import KubernetesExecutor
        from lbi.executors.kubernetes import KubernetesLauncher as Settings

        return KubernetesExecutor(sweep, settings, self.typed(Settings))


ConfigStore.instance().store(group="hydra/sweeper", name="lbi", node=SweeperConf, provider="lbi")
ConfigStore.instance().store(group="hydra/launcher", name="lbi_local", node=LocalConf, provider="lbi")
ConfigStore.instance().store(group="hydra/launcher", name="lbi_slurm", node=SlurmConf, provider="lbi")
ConfigStore.instance().store(group="hydra/launcher", name="lbi_cloud", node=CloudConf, provider="lbi")
ConfigStore.instance().store(group="hydra/launcher", name="lbi_k8s", node=KubernetesConf, provider="lbi")
