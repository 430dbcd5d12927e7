"""Drives a sweep from the command line to its report: plan, show, run, collect, track.

Called by the sweeper plugin. Exit codes: 0 all cells ok, 1 some cells failed or are
missing, 2 the request was wrong.
"""

from __future__ import annotations

import hashlib
import itertools
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra.core.config_loader import ConfigLoader
from hydra.errors import HydraException

from lbi import schedule
from lbi.children import Stop
from lbi.compose import Composed, Composer, parse
from lbi.config import LbiConfig
from lbi.errors import ClusterError, InputError
from lbi.hydra_compose import Hydra
from lbi.plan import Plan, make_plan
from lbi.store import Store
from lbi.sweep_folder import environments, extend_plan, find_result, write_plan
from lbi.verdicts import PRUNED, RUN

OK, SOME_FAILED = 0, 1

WITHOUT_NAME = ("sweep.", "store", "tracker", "resources", "report.", "trace", "hydra")
"""Overrides that begin so do not make another sweep of the same grid."""


@dataclass(frozen=True, slots=True)
class Request:
    """What the command line asked for, as Hydra hands it over."""

    loader: ConfigLoader
    config_name: str
    arguments: tuple[str, ...]
    hydra_overrides: tuple[str, ...]
    params: dict[str, Any]
    grids: tuple[dict[str, Any], ...]

    def composers(self) -> list[Composer]:
        """One composer per grid: `params` crossed with each of `grids`, or `params` alone."""
        made, hydra = [], Hydra(self.loader, self.config_name)
        for grid in self.grids or ({},):
            preset = [f"{key}={value}" for key, value in {**self.params, **grid}.items()]
            fixed, axes, order = parse([*self.hydra_overrides, *preset, *self.arguments], self.loader)
            made.append(Composer(hydra, fixed, axes, order))
        return made


def drive(request: Request, launcher: Any) -> None:
    """Carry out the request. Raises `SystemExit` with the exit code unless all cells are ok.

    Raises `InputError` or `HydraException` for a request that cannot be carried out.
    """
    code = _drive(request, launcher)
    if code != OK:
        raise SystemExit(code)


def _drive(request: Request, launcher: Any) -> int:
    from lbi.report import terminal
    from lbi.trackers import meanwhile

    started = time.time()
    store, plan = _plan(request, launcher)
    config = _any_config(plan)
    name = config.sweep.name or sweep_name(request, plan)
    runs = plan.having(RUN)
    executor = launcher.executor(name, config.sweep)
    units = schedule.make_units(runs, executor.pack)
    estimate = schedule.estimate(units, store)
    terminal.show_plan(plan, name, store, estimate, executor.forecast(units, store))
    if config.sweep.dry_run:
        return OK
    if all(cell.verdict == PRUNED for cell in plan.cells):
        raise InputError("overrides", " ".join(request.arguments), "no cell of the grid can run; the reasons are above")
    header = _header("python -m lbi -m " + shlex.join(request.arguments), plan, started)
    write_plan(store, name, plan, header | {"estimate_s": estimate.seconds})
    stop = Stop()
    if runs:
        on_cpu = executor.here and any(cell.config and cell.config.engine.device == "cpu" for cell in runs)
        with meanwhile(store, name, config.tracker, on_cpu), terminal.Live(len(runs), store, name) as live:
            try:
                stop = executor.execute(units, store, live.report, started)
            except ClusterError as error:
                terminal.console().print(f"[red]{error}[/]")
                return SOME_FAILED
    if stop.detached:
        print(stop.detached)
        return SOME_FAILED if stop.wanted else OK
    return finish(store, name, config, stop.wanted)


def _plan(request: Request, launcher: Any) -> tuple[Store, Plan]:
    """The store and the plan. The store's path is the same for all cells, so the first cell names it."""
    if not hasattr(launcher, "executor"):
        known = "Use hydra/launcher=lbi_local, lbi_slurm, lbi_cloud or lbi_k8s"
        raise InputError("hydra/launcher", type(launcher).__name__, "cannot run lbi's plan", known)
    started = time.perf_counter()
    cells = list(itertools.chain.from_iterable(request.composers()))
    first = next((cell for cell in cells if cell.error is None), None)
    if first is None:
        raise InputError("overrides", " ".join(cells[0].overrides), str(cells[0].error))
    settings = first.sections["sweep"]
    read_only = bool(settings["dry_run"]) or settings["mode"] == "read_only"
    store = Store.open(str(first.sections["store"]["path"]), write=not read_only)
    return store, make_plan(cells, store, started, launcher.sites(store))


def finish(store: Store, name: str, config: LbiConfig, stopped: bool) -> int:
    """Write the reports, hand the results to the tracker, and say what came out."""
    from lbi.report.write import write_reports
    from lbi.trackers import track

    table = write_reports(store, name)
    print(track(store, name, config.tracker))
    if stopped:
        print("Stopped. Finished cells are kept; the same command runs the rest.")
    return OK if all(row["status"] in ("ok", "pruned", "duplicate") for row in table) else SOME_FAILED


def _header(command: str, plan: Plan, started: float) -> dict[str, Any]:
    """What the sweep's folder keeps about the request."""
    config = _any_config(plan)
    notes = {cell.config.model.name: cell.config.model.note for cell in plan.cells if cell.config}
    return {
        "command": command,
        "planned": started,
        "baseline": config.report.baseline,
        "max_kld": config.report.max_kld,
        "notes": {model: note for model, note in notes.items() if note},
        "problems": plan.problems,
    }


def sweep_name(request: Request, plan: Plan) -> str:
    """The preset's name, and a few digits for whatever was added to it; the same command has the same name."""
    preset = next((item.split("=", 1)[1] for item in request.arguments if item.startswith("+sweep=")), None)
    rest = sorted(item for item in request.arguments if not item.lstrip("+~").startswith(("sweep=", *WITHOUT_NAME)))
    digits = hashlib.sha256("\n".join(rest).encode()).hexdigest()[:6]
    if preset:
        return f"{preset}-{digits}" if rest else preset
    return f"{'run' if len(plan.cells) == 1 else 'sweep'}-{digits}"


def launch(launcher: Any, job_overrides: Sequence[Sequence[str]]) -> list[Any]:
    """Hydra's launcher contract, for sweepers other than ours.

    Each job's return value is its `tpot_s`, so that a search that minimizes finds the fastest
    setting; a job without a number comes back as failed, with the reason.
    """
    from hydra.core.utils import JobReturn, JobStatus

    from lbi.report import terminal

    started = time.time()
    # Hydra's launchers make this folder, and sweepers write into it.
    Path(str(launcher.settings.hydra.sweep.dir)).mkdir(parents=True, exist_ok=True)
    hydra_overrides = tuple(str(item) for item in launcher.settings.hydra.overrides.hydra)
    config_name = str(launcher.settings.hydra.job.config_name)
    composed: list[Composed] = []
    hydra = Hydra(launcher.context.config_loader, config_name)
    for job in job_overrides:
        composed += Composer(hydra, *parse([*hydra_overrides, *job], hydra.loader))
    try:
        store = Store.open(str(composed[0].sections["store"]["path"]), write=True)
        plan = make_plan(composed, store, time.perf_counter(), launcher.sites(store))
    except InputError as error:
        raise HydraException(str(error)) from error
    runs = plan.having(RUN)
    config = _any_config(plan)
    name = config.sweep.name or "search"
    extend_plan(store, name, plan, _header("a search by another sweeper", plan, started))
    if runs:
        executor = launcher.executor(name, replace(config.sweep, wait=True))
        with terminal.Live(len(runs), store, name) as live:
            try:
                executor.execute(schedule.make_units(runs, executor.pack), store, live.report, started)
            except (InputError, ClusterError) as error:
                raise HydraException(str(error)) from error
    found = environments(store, name)
    returns = []
    for cell in plan.cells:
        done = JobReturn(overrides=list(cell.overrides), status=JobStatus.COMPLETED)
        result = find_result(store, found, cell.run_id, cell.env_id) if cell.run_id else None
        measured = store.read(result, "metrics.json") if result and result.ok else None
        tpot_s = measured["metrics"].get("tpot_s") if measured else None
        if tpot_s is not None:
            done.return_value = tpot_s
        else:
            done.status = JobStatus.FAILED
            why = result.reason if result and not result.ok else cell.reason
            done.return_value = HydraException(f"{cell.name}: {why or 'it has no time per token'}")
        returns.append(done)
    return returns


def _any_config(plan: Plan) -> LbiConfig:
    """A cell's config, for what all cells share: the sweep, report, store and tracker sections."""
    return next(cell.config for cell in plan.cells if cell.config is not None)
