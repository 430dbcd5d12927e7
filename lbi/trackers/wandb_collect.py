"""A sweep's results from W&B into a store: the way back of what `lbi sync` attached.

    python -m lbi.trackers.wandb_collect FOLDER

is the process that talks to W&B; FOLDER holds request.json, and done.json appears there. Results
that the store has are kept, so it may be repeated, and goes on where it was stopped.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from lbi import arrivals
from lbi.config import TrackerConfig
from lbi.errors import InputError
from lbi.files import read_json, write_json
from lbi.process import die_with_parent
from lbi.store import SCHEMA, Store
from lbi.sweep_folder import note_environment
from lbi.trackers.wandb_files import VIEWED
from lbi.trackers.wandb_process import ask, brief
from lbi.trackers.wandb_sweep_run import sweep_run_id

ANSWER_S = 30
"""Bound on the client's wait for one answer."""


def collect_in_process(store: Store, sweep: str, config: TrackerConfig) -> str:
    """Have the results of a sweep fetched; how many there are now, for the user.

    Raises `InputError` where they cannot be had; what was fetched until then stays.
    """
    place = f"{config.entity or 'the default entity'}/{config.project}"
    request = {"root": str(store.root), "sweep": sweep, "project": config.project, "entity": config.entity}
    done = ask("lbi.trackers.wandb_collect", [], request, config.timeout_s)
    if done["problem"]:
        raise InputError(
            "--from-wandb", f"{place} {sweep}", done["problem"], "The same command goes on where it stopped"
        )
    return f"From W&B: {done['fetched']} results fetched, {done['kept']} in the store already"


def collect_runs(store: Store, sweep: str, config: TrackerConfig, names: Sequence[str]) -> str:
    """Have results by their names (RUN_ID-ENV_ID) fetched, those that W&B has; how many, for the user.

    A result that came so is as old as its arrival. Raises `InputError` where W&B cannot be asked.
    """
    request = {"root": str(store.root), "sweep": sweep, "project": config.project, "entity": config.entity}
    done = ask("lbi.trackers.wandb_collect", [], {**request, "names": list(names)}, config.timeout_s)
    if done["problem"]:
        raise InputError("tracker", config.name, done["problem"], "See lbi sync")
    return f"From W&B: {done['fetched']} of {len(names)} results fetched"


class Collector:
    """Fetches what a store lacks. `api` is a `wandb.Api`."""

    def __init__(self, store: Store, sweep: str, api: Any, prefix: str, scratch: Path) -> None:
        self.store, self.sweep, self.api, self.prefix, self.scratch = store, sweep, api, prefix, scratch
        self.fetched = self.kept = 0

    def collect(self) -> None:
        """Results first, then the plan: a sweep that has its plan is there.

        Raises `ValueError` for what is not as lbi wrote it, and what wandb raises.
        """
        folder = self._download(sweep_run_id(self.sweep))
        listed = read_json(folder / "results.json", SCHEMA)
        if listed is None:
            raise ValueError(f"the artifact of the sweep {self.sweep} has no results.json")
        for result in listed["results"]:
            self._place(result)
        plan = self.store.sweep_folder(self.sweep) / "plan.jsonl"
        if not plan.exists():
            plan.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / "plan.jsonl", plan.with_suffix(".part"))
            os.replace(plan.with_suffix(".part"), plan)
        for result in listed["results"]:
            note_environment(self.store, self.sweep, str(result["env_id"]))

    def collect_named(self, names: Sequence[str]) -> None:
        """The results of these names, as far as W&B has them whole."""
        import wandb

        for name in names:
            run_id, _, env_id = name.partition("-")
            self._check(run_id, env_id)
            try:
                source = self._download(f"result-{name}")
            except wandb.errors.CommError:
                # Not there, or not committed yet.
                continue
            arrivals.place(self.store, source, run_id, env_id, arrived=time.time())
            arrivals.note_origin(self.store, self.sweep, run_id, env_id)
            self.fetched += 1

    @staticmethod
    def _check(run_id: str, env_id: str) -> None:
        """Ids become names of folders. Raises `ValueError`."""
        if not arrivals.ID.fullmatch(run_id) or not arrivals.ID.fullmatch(env_id):
            raise ValueError(f"{run_id!r}, {env_id!r} are no ids of a result")

    def _place(self, result: Mapping[str, Any]) -> None:
        """One result, whole once its status.json is there."""
        run_id, env_id = str(result["run_id"]), str(result["env_id"])
        self._check(run_id, env_id)
        if self.store.result(run_id, env_id) is not None:
            self.kept += 1
            return
        name = f"result-{run_id}-{env_id}"
        if name not in result["artifacts"]:
            raise ValueError(f"{name} was not attached; call lbi sync --files results where it is")
        source = self._download(name)
        trace = f"trace-{run_id}-{env_id}"
        if trace in result["artifacts"]:
            shutil.copytree(self._download(trace), source, dirs_exist_ok=True)
        try:
            arrivals.place(self.store, source, run_id, env_id)
        except ValueError as error:
            raise ValueError(f"{name} {error}") from error
        self.fetched += 1

    def _download(self, name: str) -> Path:
        """The files of an artifact's newest version, whose sums wandb compares."""
        artifact = self.api.artifact(f"{self.prefix}/{name}:latest")
        target = self.scratch / name
        target.mkdir()
        paths = list(artifact.manifest.entries)
        for path in paths:
            if PurePosixPath(path).is_absolute() or ".." in PurePosixPath(path).parts:
                raise ValueError(f"{name} has a file outside its folder: {path}")
        wanted = [path for path in paths if not path.endswith(VIEWED)]
        # A trace is there once more, unpacked for W&B's viewer and ten times as large.
        for prefix in [None] if wanted == paths else wanted:
            artifact.download(root=str(target), path_prefix=prefix)
        return target


def main(arguments: Sequence[str]) -> int:
    """Fetch; done.json says how many, or why not."""
    die_with_parent()
    import wandb

    from lbi.trackers.wandb_writer import find_access

    (folder,) = arguments
    scratch = Path(folder)
    request = read_json(scratch / "request.json", SCHEMA) or {}
    access = find_access("online")
    done = {"schema": SCHEMA, "problem": access.reason, "fetched": 0, "kept": 0}
    if access.mode == "online":
        try:
            api = wandb.Api(timeout=ANSWER_S)
            prefix = f"{request['entity'] or api.default_entity}/{request['project']}"
            files = scratch / "files"
            files.mkdir()
            collector = Collector(Store.open(request["root"], write=True), request["sweep"], api, prefix, files)
            if "names" in request:
                collector.collect_named(request["names"])
            else:
                collector.collect()
            done |= {"fetched": collector.fetched, "kept": collector.kept}
        except Exception as error:
            done["problem"] = brief(error)
    write_json(scratch / "done.json", done)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
