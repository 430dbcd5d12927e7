"""The process that talks to W&B, so that a driver does not have to.

    python -m lbi.trackers.wandb_writer STORE SWEEP FOLDER

FOLDER holds request.json; problem.json appears there if not everything could be written. The
client waits for its server in places without a limit and starts a helper process: whoever
starts this one bounds its time and ends what is left of it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from lbi.config import TrackerConfig
from lbi.errors import InputError
from lbi.files import read_json, write_json
from lbi.process import die_with_parent
from lbi.store import SCHEMA, Store
from lbi.trackers.wandb_access import Access, key_sources, unreachable, wished_mode
from lbi.trackers.wandb_process import brief
from lbi.trackers.wandb_runs import Ledger, Run, Told, of_sweep
from lbi.trackers.wandb_sweep_run import sweep_run
from lbi.typed import build

WAIT_S = 30.0
"""Bound on the client's wait for an answer when a run begins, and again when it ends."""

SLOWEST = 1e6
"""Bytes a second below which an upload counts as stuck."""

CLOSING_S = 1.0
"""Time kept for ending in order before whoever waits for this process ends it."""


class Refused(Exception):
    """The server does not take what it is given, or did not answer in time."""


class Writer:
    """Writes the runs of a sweep that W&B does not have yet, in the way that `access` allows."""

    def __init__(
        self,
        store: Store,
        sweep: str,
        config: TrackerConfig,
        scratch: Path,
        deadline: float,
        access: Access,
        whole: bool,
    ) -> None:
        self.store, self.sweep, self.config, self.scratch = store, sweep, config, scratch
        self.deadline, self.access, self.whole = deadline, access, whole
        self.ledger = Ledger(store, sweep, config)

    def write(self) -> str:
        """Write what is to be written. Why something was not; empty if everything was.

        Raises `Refused` at the first run that cannot be written online.
        """
        # Kept at once: this process may be ended at any time.
        self.ledger.last = self.access
        self.ledger.save()
        if self.access.mode == "none":
            return self.access.reason
        try:
            return self._write_all()
        finally:
            self.ledger.save()

    def _write_all(self) -> str:
        pace = Pace(self.config.runs_per_minute)
        for run in self._wanted():
            if self.ledger.state(run) in ("online", self.access.mode):
                continue
            wait = pace.wait_s(time.monotonic()) if self.access.mode == "online" else 0.0
            if time.time() + wait > self.deadline - CLOSING_S:
                return "no time was left"
            time.sleep(wait)
            problem = self._try(run)
            if problem:
                return problem
        return ""

    def _wanted(self) -> Iterator[Run]:
        """Every run there is to tell of, in the end the sweep's own, which links to those before it."""
        yield from of_sweep(self.store, self.sweep)
        # Without its table and its page, which an offline run loses, it would be empty.
        whole = sweep_run(self.store, self.sweep, self.ledger) if self.access.mode == "online" and self.whole else None
        if whole:
            yield whole

    def _try(self, run: Run) -> str:
        try:
            told = self._write_run(run)
        except Exception as error:
            reason = brief(error)
            if self.access.mode == "online":
                raise Refused(reason) from error
            return reason
        self.ledger.note(run, told)
        return ""

    def _write_run(self, run: Run) -> Told:
        """One W&B run from begin to end."""
        earlier = self.ledger.earlier(run)
        told = Told(
            mode=self.access.mode,
            id=run.id,
            # A result that several sweeps share stays in the group, and under the name, that it got first.
            name=earlier[0].name if earlier else str(run.row["name"]),
            project=self.config.project,
            entity=self.config.entity,
            server=self.access.server,
            sweep=earlier[0].sweep if earlier else self.sweep,
            sweeps=list(dict.fromkeys([*(known for old in earlier for known in old.sweeps), self.sweep])),
            digest=run.digest,
        )
        begun = self._begin(run, told)
        self._fill(begun, run)
        if self.access.mode == "online":
            told = replace(told, entity=begun.entity, url=begun.url, project_url=begun.project_url)
            told = self._attach(begun, run, told)
        else:
            told = replace(told, folder=os.path.relpath(Path(begun.dir).parent, self.store.root))
        begun.finish(exit_code=0 if run.row["status"] in ("ok", "pruned") else 1)
        return told

    def _begin(self, run: Run, told: Told) -> Any:
        import wandb

        online = self.access.mode == "online"
        return wandb.init(
            project=told.project,
            entity=told.entity,
            mode="online" if online else "offline",
            id=told.id,
            resume="allow",
            reinit="create_new",
            group=told.sweep,
            job_type=run.job_type,
            name=told.name,
            tags=run.tags(told.sweeps),
            config=run.config(told.sweep),
            allow_val_change=True,
            # wandb makes a folder `wandb` in it.
            dir=str(self.scratch if online else self.store.root),
            settings=run_settings(online, self.deadline - time.time()),
        )

    def _attach(self, begun: Any, run: Run, told: Told) -> Told:
        """Tables, pages and artifacts; returns once the server has committed the artifacts.

        Only online: an offline run keeps them outside its folder, and `wandb sync` leaves them out in silence.
        """
        import wandb

        for name, (columns, cells) in run.grids().items():
            begun.summary[name] = wandb.Table(columns=list(columns), data=[list(row) for row in cells])
        for name, page in run.pages().items() if self.config.files != "none" else ():
            begun.summary[name] = wandb.Html(page.read_text(), inject=False)
        wanted = run.attachments(self.config, self.scratch)
        if wanted.too_large:
            begun.summary["not_attached"] = f"larger than {self.config.max_file_mb:g} MB: {', '.join(wanted.too_large)}"
        logged = []
        for item in wanted.made:
            artifact = wandb.Artifact(item.name, item.type)
            item.add_to(artifact)
            logged.append((item, begun.log_artifact(artifact)))
        addresses, opens = {}, ""
        for item, artifact in logged:
            patience = WAIT_S + item.bytes() / SLOWEST
            artifact.wait(timeout=max(1, int(min(patience, self.deadline - time.time()))))
            addresses[item.name] = f"{begun.project_url}/artifacts/{item.type}/{item.name}/{artifact.version}"
            if item.opens:
                opens = f"{addresses[item.name]}/files/{item.opens}"
        if opens:
            begun.summary["trace"] = opens
        return replace(told, files=self.config.files, artifacts=addresses, opens=opens)

    @staticmethod
    def _fill(begun: Any, run: Run) -> None:
        """Numbers and ending, in place of what an earlier attempt left in the summary."""
        for key in list(begun.summary.keys()):
            if not key.startswith("_") and key not in run.keeps:
                del begun.summary[key]
        metrics, attempt = run.metrics(), run.row["attempt"]
        # The summary is the truth. W&B draws charts only of what was logged, so an attempt is also
        # one point of them; an attempt that was begun before, and did not get to its end, has its point.
        if metrics and begun.starting_step <= attempt:
            begun.log(metrics, step=attempt)
        begun.summary.update(run.summary())


class Pace:
    """When the next run may be written: as many as go at once in a minute, then evenly."""

    def __init__(self, per_minute: float) -> None:
        self.per_minute = per_minute
        self._left = per_minute
        self._at: float | None = None

    def wait_s(self, now: float) -> float:
        """Seconds to wait before the next run, which then counts as written; `now` is a monotonic clock."""
        passed = 0.0 if self._at is None else now - self._at
        self._at = now
        self._left = min(self.per_minute, self._left + passed * self.per_minute / 60.0) - 1.0
        return max(0.0, -self._left * 60.0 / self.per_minute)


def find_access(configured: str) -> Access:
    """How W&B can be reached, by wandb's own reading of the user's settings."""
    import wandb

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    server = str(settings.base_url)
    wish, who = wished_mode(configured)
    if wish == "offline" or settings.mode in ("offline", "dryrun"):
        return Access("offline", "asked", who if wish == "offline" else "W&B's settings file", server, key_sources())
    if settings.mode == "disabled":
        return Access("none", "asked", "W&B is disabled in its settings file", server, key_sources())
    kind, reason = _obstacle(server)
    mode = "online" if not reason else "none" if wish == "online" else "offline"
    return Access(mode, kind, reason, server, key_sources())


def _obstacle(server: str) -> tuple[str, str]:
    import wandb

    try:
        has_key = wandb.login(prompt=False, verify=False)
    except wandb.errors.AuthenticationError as error:
        return "refused", f"the API key cannot be used ({error})"
    if not has_key:
        return "no_key", f"no API key for {urlsplit(server).netloc}"
    problem = unreachable(server)
    return ("no_network", f"no connection to {problem}") if problem else ("", "")


def run_settings(online: bool, left_s: float) -> Any:
    """Nothing of this machine but what the store says of the results, and an end to every wait."""
    import wandb

    wait = max(1.0, min(WAIT_S, left_s))
    return wandb.Settings(
        silent=True,
        console="off",
        disable_code=True,
        disable_git=True,
        x_disable_stats=True,
        x_disable_machine_info=True,
        x_disable_meta=True,
        x_save_requirements=False,
        init_timeout=wait,
        finish_timeout=wait,
        finish_timeout_raises=True,
        # An online run's copy on the disk has no use: the store has it all.
        x_skip_transaction_log=online,
    )


def main(arguments: Sequence[str]) -> int:
    """Write a sweep's runs; 0 also if not all could be, then problem.json says why."""
    die_with_parent()
    root, sweep, folder = arguments
    request = read_json(Path(folder) / "request.json", SCHEMA) or {}
    try:
        store = Store.open(root, write=True)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if request["meanwhile"]:
        # Its helper inherits it. Somebody is measuring beside it.
        os.nice(19)
    config = build(TrackerConfig, request["config"])
    access = find_access(config.mode)
    if request["refused"]:
        access = replace(access, mode="offline", kind="refused", reason=request["refused"])
    writer = Writer(store, sweep, config, Path(folder), float(request["deadline"]), access, not request["meanwhile"])
    try:
        _say(Path(folder), writer.write(), refused=False)
    except Refused as refusal:
        _say(Path(folder), str(refusal), refused=True)
        # wandb's exit handler would wait for the server once more.
        os._exit(0)
    return 0


def _say(folder: Path, problem: str, *, refused: bool) -> None:
    if problem:
        write_json(folder / "problem.json", {"schema": SCHEMA, "problem": problem, "refused": refused})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
