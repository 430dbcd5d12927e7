"""Where cells will run, as far as the plan can know it before they do.

On this machine everything is known. On a cluster the plan is made on a login node: a
worker notes the hardware that it finds under the store (devices/site-*.json), and the
next plan expects what the last workers of the same resource class found. Until then the
environment has a stand-in name, and results are found by where the sweep's workers ran.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import lbi
from lbi import environment, rules
from lbi.config import LbiConfig, ResourcesConfig
from lbi.files import BadFile, read_json, write_json
from lbi.identity import digest
from lbi.store import SCHEMA, Store
from lbi.typed import plain

CLASS_KNOBS = ("gpu_type", "partition", "constraint", "container")
RENTED_KNOBS = ("gpu_type", "gpu_candidates", "clouds", "image")
"""Knobs of the resources that decide which hardware and software a job finds."""


@dataclass(frozen=True, slots=True)
class Site:
    """What a cell's rules may ask, and where its result may come from: the likeliest environment first."""

    machine: rules.Machine
    env_ids: tuple[str, ...]
    hardware: frozenset[tuple[Any, ...]]


class Here:
    """This machine."""

    def __init__(self) -> None:
        self._has_gpu = bool(environment.gpus())
        self._known: dict[tuple[str, int], Site] = {}

    def device(self, resources: ResourcesConfig) -> str:
        """What `engine.device=auto` comes to."""
        return "cuda" if self._has_gpu else "cpu"

    def site(self, config: LbiConfig) -> Site:
        """Where this cell will run."""
        device, slots = config.engine.device, config.resources.slots
        if (device, slots) not in self._known:
            hardware = frozenset([environment.hardware(environment.describe(slots), device)])
            env_ids = (environment.identify(device, slots),)
            self._known[device, slots] = Site(rules.Machine.here(device), env_ids, hardware)
        return self._known[device, slots]


class Cluster:
    """Nodes that this process cannot see, by what workers found on them before."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._known: dict[str, Site] = {}

    def device(self, resources: ResourcesConfig) -> str:
        """What `engine.device=auto` comes to: a GPU only where one is asked for."""
        return "cuda" if resources.gpus or resources.gpu_type or resources.gpu_candidates else "cpu"

    def site(self, config: LbiConfig) -> Site:
        """Where this cell will run, from what workers of its class found."""
        key = class_key(config)
        if key not in self._known:
            seen = self._seen(key)
            own = self._own(config)
            env_ids = [digest("env", {**found, **own}) for found in seen]
            stand_in = digest("env", {"site": key, "lbi": lbi.__version__, **own})
            self._known[key] = Site(
                self._machine(config, seen),
                tuple(dict.fromkeys(env_ids)) or (stand_in,),
                frozenset(
                    (found["gpu"],) if "gpu" in found else (found["cpu"], found["cores"], found.get("slots", 1))
                    for found in seen
                ),
            )
        return self._known[key]

    def _machine(self, config: LbiConfig, seen: Sequence[Mapping[str, Any]]) -> rules.Machine:
        """What is known of the nodes. The login node's own GPU, or that it has none, says nothing about theirs."""
        return replace(rules.Machine.here(config.engine.device), capability=None, has_gpu=True)

    def _own(self, config: LbiConfig) -> dict[str, Any]:
        """What a job has from here. A container brings its own packages; else it has those that are installed here."""
        return {} if config.resources.container else {"packages": environment.packages(), "lbi": lbi.__version__}

    def _seen(self, key: str) -> list[dict[str, Any]]:
        """What workers found, the latest first, each as `environment.key` gives it."""
        notes = []
        for file in (self.store.root / "devices").glob(f"site-{key}-*.json"):
            try:
                found = read_json(file, SCHEMA)
            except BadFile as bad:
                self.store.problems.append(bad)
                continue
            notes += [found] if found else []
        return [found["environment"] for found in sorted(notes, key=lambda found: -float(found["seen"]))]


class Rented(Cluster):
    """Machines in a cloud or in Kubernetes: their packages come from an image, or are installed there."""

    def _machine(self, config: LbiConfig, seen: Sequence[Mapping[str, Any]]) -> rules.Machine:
        """With the packages that were found there, or else those that a setup of lbi for a GPU brings."""
        brought = {**dict.fromkeys(environment.required_packages(), ""), **environment.packages()}
        packages = seen[0]["packages"] if seen else brought
        return rules.Machine(config.engine.device, packages, has_compiler=True)

    def _own(self, config: LbiConfig) -> dict[str, Any]:
        return {"lbi": lbi.__version__}

    def _seen(self, key: str) -> list[dict[str, Any]]:
        """Of what workers found only that with the packages of the newest: after an upgrade the older is stale."""
        found = super()._seen(key)
        return [known for known in found if known.get("packages") == found[0].get("packages")]


def class_key(config: LbiConfig) -> str:
    """Names the kind of node that a cell's job is sent to."""
    names = [*CLASS_KNOBS, *(name for name in RENTED_KNOBS if getattr(config.resources, name))]
    knobs = {name: plain(getattr(config.resources, name)) for name in names}
    return digest("site", {"device": config.engine.device, **knobs})


def note(store: Store, config: LbiConfig, found: Mapping[str, Any], env_id: str, now: float) -> None:
    """Keep what a worker found on its node (`environment.key`), for the next plan."""
    content = {"schema": SCHEMA, "environment": dict(found), "seen": now}
    write_json(store.root / "devices" / f"site-{class_key(config)}-{env_id}.json", content)
