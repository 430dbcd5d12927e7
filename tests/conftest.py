"""Fixtures that several tests share: a folder for a store, and plans made without Hydra's command line."""

from __future__ import annotations

import os
import random
import secrets
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.wandb_server import KEY, FakeWandb
from slurm_cluster import Cluster, Clusters, NotInstalled

from lbi.compose import Composed, Composer, parse
from lbi.hydra_compose import Hydra
from lbi.plan import Plan, make_plan
from lbi.store import Store

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "lbi" / "plugins"))


SEED = os.environ.setdefault("LBI_TEST_SEED", str(secrets.randbelow(10**6)))
"""Random inputs are fresh in every session, and the same again for a session that is given the number of another."""


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test's inputs do not depend on the tests before it."""
    number = zlib.crc32(f"{SEED} {item.nodeid}".encode())
    random.seed(number)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(number)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How to have the inputs of a failure again."""
    if terminalreporter.stats.get("failed"):
        terminalreporter.write_line(f"the same random inputs again: LBI_TEST_SEED={SEED}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests on a SLURM cluster come last: the others answer sooner, and no cluster runs beside them."""
    late = ("cloud", "slurm")
    items.sort(key=lambda item: [item.get_closest_marker(marker) is not None for marker in reversed(late)])


@pytest.fixture(autouse=True)
def _no_account(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test may reach a real W&B account or depend on the caller's store."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("LBI_STORE", raising=False)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store.open(tmp_path / "store", write=True)


@pytest.fixture
def loader() -> Iterator[Any]:
    """Hydra's config loader over the project's own conf/."""
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        yield GlobalHydra.instance().config_loader()


@pytest.fixture
def compose(loader: Any) -> Callable[..., list[Composed]]:
    """Compose the grid of some overrides."""

    def cells(*arguments: str) -> list[Composed]:
        overrides = ["hydra/sweeper=basic", "hydra/launcher=basic", *arguments]
        return list(Composer(Hydra(loader, "config"), *parse(overrides, loader)))

    return cells


@pytest.fixture
def plan(compose: Callable[..., list[Composed]], store: Store) -> Callable[..., Plan]:
    """Plan the grid of some overrides on the tiny model."""

    def made(*arguments: str, model: str = "tiny_random") -> Plan:
        return make_plan(compose(f"model={model}", *arguments), store, 0.0)

    return made


@pytest.fixture
def run_lbi(tmp_path: Path) -> Callable[..., Any]:
    """Run `python -m lbi` in a process of its own, in an empty folder."""
    import subprocess

    def run(*arguments: str, timeout: float = 120, **variables: str) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        environment = {**os.environ, "LBI_STORE": str(tmp_path / "store"), "PYTHONPATH": path, **variables}
        return subprocess.run(
            [sys.executable, "-m", "lbi", *arguments],
            capture_output=True,
            text=True,
            timeout=timeout,
            cwd=tmp_path,
            env=environment,
            check=False,
        )

    return run


@pytest.fixture(scope="session")
def _clusters() -> Iterator[Clusters]:
    made = Clusters()
    yield made
    made.stop()


@pytest.fixture(autouse=True)
def _healthy_clusters(_clusters: Clusters) -> Iterator[None]:
    """Whatever a test did to a cluster, the next one finds it up and without jobs."""
    yield
    _clusters.heal()


@pytest.fixture(scope="session")
def make_cluster(_clusters: Clusters) -> Callable[..., Cluster]:
    """A cluster with some settings of scripts/slurm/start, as in make_cluster(MIN_JOB_AGE=2); made once."""

    def make(**settings: object) -> Cluster:
        try:
            return _clusters(**settings)
        except NotInstalled as error:
            pytest.skip(str(error))

    return make


@pytest.fixture(scope="session")
def cluster(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A SLURM cluster as a site has it."""
    return make_cluster()


@pytest.fixture(scope="session")
def cluster_without_accounting(make_cluster: Callable[..., Cluster]) -> Cluster:
    """A SLURM cluster without slurmdbd: sacct refuses."""
    return make_cluster(ACCT="none")


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without W&B settings, and an environment without W&B's or a proxy's variables."""
    for name in list(os.environ):
        if name.startswith("WANDB_") or name.lower().endswith("_proxy") or name == "NETRC":
            monkeypatch.delenv(name)
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    # The driver's process must do without wandb; the writer is another process.
    monkeypatch.setitem(sys.modules, "wandb", None)
    return folder


@pytest.fixture
def server(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeWandb]:
    """A server that the environment points to, and a key for it."""
    with FakeWandb() as fake:
        monkeypatch.setenv("WANDB_BASE_URL", fake.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        yield fake
