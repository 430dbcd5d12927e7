"""Where runs of this machine execute: a GPU for each, or a share of the CPU's cores."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbi import environment, gpu_processes
from lbi.config import LbiConfig
from lbi.errors import InputError
from lbi.gpu_lock import GpuLock

POLL_S = 0.2

TOPOLOGY = Path("/sys/devices/system/cpu")


@dataclass(frozen=True, slots=True)
class Slot:
    """Place `number` of `of`, each of which executes a run at a time.

    `card` is the GPU of a slot that has one, as `environment.gpus` lists it; `cores` are those
    that its runs are held to, none if they may use all.
    """

    number: int = 0
    of: int = 1
    card: dict[str, Any] | None = None
    cores: tuple[int, ...] = ()

    def variables(self) -> dict[str, str]:
        """Environment variables that hold a child to this slot."""
        if self.card is not None:
            return {"CUDA_VISIBLE_DEVICES": self.card["uuid"]}
        return {"OMP_NUM_THREADS": str(len(self.cores))} if self.cores else {}

    def describe(self) -> dict[str, Any]:
        """`environment.describe` of what a run here has.

        The cores are the slot's own: counting them again would not do in a thread that `occupied` holds to them.
        """
        known = environment.describe()
        if self.card is not None:
            return {**known, "gpus": [self.card]}
        return {**known, "cores": len(self.cores), "slots": self.of} if self.cores else known

    def record(self) -> dict[str, int]:
        """For effective.json."""
        return {"slot": self.number, "slots": self.of}

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Hold the calling thread to the slot's cores: what it starts, and only that, inherits them."""
        if not self.cores or not hasattr(os, "sched_setaffinity"):
            yield
            return
        before = os.sched_getaffinity(0)
        os.sched_setaffinity(0, self.cores)
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    @contextmanager
    def held(self, foreign: str, give_up: Callable[[], bool], on_wait: Callable[[str], None]) -> Iterator[bool]:
        """Have the slot's GPU alone while open, waiting for it first; False if `give_up` came before that.

        With foreign=wait, processes other than lbi's are waited for too. A slot without a GPU is free at once.
        """
        if self.card is None:
            yield True
            return
        uuid, lock = self.card["uuid"], GpuLock(self.card["uuid"])
        said = ""
        try:
            while reason := _in_use(uuid, lock, foreign):
                if reason != said:
                    on_wait(reason)
                    said = reason
                if give_up():
                    yield False
                    return
                time.sleep(POLL_S)
            yield True
        finally:
            lock.release()


def _in_use(uuid: str, lock: GpuLock, foreign: str) -> str:
    """Why the GPU cannot be had yet; empty once its lock is held and nobody is in the way."""
    if not lock.acquire():
        return f"{uuid} is used by {lock.owner()}"
    # Nothing of ours is on it yet, so whoever is there is foreign, in whichever pid namespace.
    others = gpu_processes.listed(uuid) if foreign == "wait" else None
    return f"{uuid} is used by {gpu_processes.named(others)}" if others else ""


def device_name(config: LbiConfig, described: dict[str, Any]) -> str:
    """What the run of a cell computes on, in a slot that is `described` so."""
    if config.engine.device == "cuda" and described["gpus"]:
        return str(described["gpus"][0]["name"])
    return str(described["cpu"])


def slots_for(config: LbiConfig) -> list[Slot]:
    """Every slot for runs with this config's device and resources.

    Raises `InputError` for more of them than the machine has.
    """
    if config.engine.device == "cuda" and environment.gpus():
        return _gpu_slots(config.resources.gpus)
    # A run that wants a GPU where there is none says so itself.
    return _cpu_slots(config.resources.slots if config.engine.device == "cpu" else 1)


def _gpu_slots(wanted: int | None) -> list[Slot]:
    cards = environment.gpus()
    # One env_id stands for all of them, so they must be of one kind.
    alike = [card for card in cards if card["name"] == cards[0]["name"]]
    count = len(alike) if wanted is None else wanted
    if not 1 <= count <= len(alike):
        raise InputError(
            "resources.gpus", count, f"this process may use {len(alike)} × {cards[0]['name']}", "null takes all of them"
        )
    free_first = sorted(alike, key=lambda card: not GpuLock(card["uuid"]).is_free())
    return [Slot(number, count, card) for number, card in enumerate(free_first[:count])]


def _cpu_slots(count: int) -> list[Slot]:
    share = environment.cores_per_slot(count)
    if count == 1:
        return [Slot()]
    order = _cores_by_place()
    return [Slot(number, count, None, order[number * share : (number + 1) * share]) for number in range(count)]


def _cores_by_place() -> tuple[int, ...]:
    """The cores this process may use, threads of one physical core side by side, so that no two slots share one."""
    if not hasattr(os, "sched_getaffinity"):
        return tuple(range(environment.cores()))
    return tuple(sorted(os.sched_getaffinity(0), key=lambda core: (*_place(core), core)))


def _place(core: int) -> tuple[int, int]:
    """Package and physical core."""
    folder = TOPOLOGY / f"cpu{core}" / "topology"
    try:
        return int((folder / "physical_package_id").read_text()), int((folder / "core_id").read_text())
    except (OSError, ValueError):
        return 0, 0
