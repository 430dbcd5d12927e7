"""A W&B workspace and a W&B report about a sweep: charts over its runs, its answers, its table.

    python -m lbi.trackers.wandb_dashboard STORE SWEEP FOLDER

is the process that talks to W&B; FOLDER holds request.json, and done.json appears there. The ids
of both pages are kept in the summary of the sweep's own run, so whoever saves them again replaces them.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbi.config import TrackerConfig
from lbi.errors import InputError
from lbi.files import read_json, write_json
from lbi.process import die_with_parent
from lbi.store import SCHEMA, Store
from lbi.trackers.wandb_panels import charts, colours, split
from lbi.trackers.wandb_process import ask, brief
from lbi.trackers.wandb_runs import PAGES, Ledger, Told, of_sweep, sweep_tag
from lbi.trackers.wandb_sweep_run import SweepRun, sweep_run
from lbi.typed import build, plain

PACKAGE = "wandb_workspaces"
LONGEST_TITLE = 128
"""Characters that W&B allows in a title."""

FULL, HALF, HIGH, TABLE = 24, 12, 8, 14
"""Widths and heights of panels, in W&B's grid."""


def check_package() -> None:
    """Raise `InputError` where the package that builds the pages is missing."""
    if importlib.util.find_spec(PACKAGE) is None:
        way_out = 'Install it: pip install "wandb-workspaces>=0.4.13,<0.5"'
        raise InputError("dashboard", None, "the package wandb-workspaces is not installed", way_out)


def save_in_process(store: Store, sweep: str, config: TrackerConfig) -> str:
    """Have both pages saved; where they are, for the user. The sweep must be online.

    Raises `InputError` where that is not so, or W&B does not take them.
    """
    ledger = Ledger(store, sweep, config)
    whole = sweep_run(store, sweep, ledger)
    if whole is None or ledger.state(whole) != "online":
        raise InputError("dashboard", sweep, "not all of the sweep is online, see above", "Call it again once it is")
    arguments = [str(store.root), sweep]
    done = ask("lbi.trackers.wandb_dashboard", arguments, {"config": plain(config)}, config.timeout_s)
    if done["problem"]:
        raise InputError("dashboard", sweep, done["problem"], "Call it again; it replaces what is there")
    lines = [f"Workspace: {done['workspace']}", f"Report: {done['report']}"]
    if done["left_out"]:
        lines.append(f"Left out, since no run has the numbers: {'; '.join(done['left_out'])}")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Pages:
    """What both pages are made of. `baseline` is the W&B id of the run that others are compared with."""

    whole: SweepRun
    told: Told
    panels: list[Any]
    left_out: list[str]
    colour_of: dict[str, str]
    baseline: str | None


def pages(store: Store, sweep: str, ledger: Ledger) -> Pages:
    """Gather it from the store and from what W&B was told. Needs wandb-workspaces."""
    import wandb_workspaces.reports.v2 as wr

    whole = sweep_run(store, sweep, ledger)
    told = ledger.latest(whole) if whole else None
    if whole is None or told is None:
        raise ValueError("W&B does not have the sweep")
    runs = of_sweep(store, sweep)
    logged = {name for run in runs for name in run.metrics()}
    shown, left_out = split(charts(whole.config(sweep)["options"], logged), logged)
    by_quantizer = colours([str(run.row["quantizer"]) for run in runs])
    base = next((cell for cell in whole.cells if cell["is_baseline"]), None)
    return Pages(
        whole=whole,
        told=told,
        panels=[chart.make(wr) for chart in shown],
        left_out=left_out,
        colour_of={run.id: by_quantizer[str(run.row["quantizer"])] for run in runs},
        baseline=f"{base['run_id']}-{base['env_id']}" if base else None,
    )


def workspace(content: Pages) -> Any:
    """The workspace: charts, the comparison of runs and the table, over the runs with the sweep's tag."""
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    whole = content.whole
    columns = ("config:quantizer.value", "summary:decode_tok_s", "summary:mean_kld", "summary:status")
    settings = ws.RunsetSettings(
        filters=[ws.Tags().isin([sweep_tag(whole.sweep)])],
        order=[ws.Ordering(ws.Summary("decode_tok_s"), ascending=False)],
        run_settings={run: ws.RunSettings(color=colour) for run, colour in content.colour_of.items()},
        pinned_columns=["run:displayName", *columns],
        baseline_run=content.baseline,
    )
    sections = [
        ws.Section(name="Speed, damage, memory", panels=content.panels, is_open=True),
        ws.Section(name="Runs compared", panels=[wr.RunComparer(diff_only="split")], is_open=True),
        ws.Section(name="Table, with traces", panels=[wr.WeavePanelSummaryTable(table_name="results")], is_open=True),
    ]
    return ws.Workspace(
        entity=content.told.entity or "",
        project=content.told.project,
        name=f"lbi {whole.sweep}"[:LONGEST_TITLE],
        sections=sections,
        runset_settings=settings,
    )


def report(content: Pages) -> Any:
    """The report: the answers in words, the charts, the comparison of runs, and the table with links."""
    import wandb_workspaces.expr as expr
    import wandb_workspaces.reports.v2 as wr

    whole, told = content.whole, content.told
    place = {"entity": told.entity or "", "project": told.project}
    tagged = expr.Tags().isin([sweep_tag(whole.sweep)])
    cells = wr.Runset(
        **place,
        name=whole.sweep[:LONGEST_TITLE],
        filters=[tagged, expr.Metric("JobType") == "bench"],
        order=[wr.OrderBy(wr.SummaryMetric("decode_tok_s"))],
        run_settings={run: wr.RunSettings(color=colour) for run, colour in content.colour_of.items()},
    )
    about = wr.Runset(**place, name="table", filters=[tagged, expr.Metric("JobType") == "report"])
    for index, panel in enumerate(content.panels):
        panel.layout = wr.Layout(HALF * (index % 2), HIGH * (index // 2), HALF, HIGH)
    comparer = wr.RunComparer(diff_only="split", layout=wr.Layout(0, 0, FULL, TABLE))
    table = wr.WeavePanelSummaryTable(table_name="results", layout=wr.Layout(0, 0, FULL, TABLE))
    left_out = [wr.P(f"Not shown, since no run has the numbers: {'; '.join(content.left_out)}.")]
    return wr.Report(
        **place,
        title=f"lbi {whole.sweep}"[:LONGEST_TITLE],
        description=f"{len(whole.cells)} cells; written by lbi dashboard",
        width="fluid",
        blocks=[
            wr.H1(f"Sweep {whole.sweep}"),
            *(wr.P(line) for line in whole.answers.splitlines()),
            wr.P([wr.Link("The whole table and lbi's own report", told.url or ""), " are in a run of their own."]),
            wr.PanelGrid(runsets=[cells], panels=content.panels),
            *(left_out if content.left_out else []),
            wr.H2("Runs compared"),
            wr.PanelGrid(runsets=[cells], panels=[comparer]),
            wr.H2("Table, with links to runs, traces and files"),
            wr.PanelGrid(runsets=[about], panels=[table]),
        ],
    )


def save(content: Pages, known: dict[str, str]) -> dict[str, str]:
    """Save both, in place of the ones `known` by their ids; their ids and addresses."""
    board, text = workspace(content), report(content)
    if known:
        board._internal_id, board._internal_name = known["workspace_id"], known["workspace_name"]
        text.id = known["report_id"]
    try:
        board.save()
        text.save()
    except Exception:
        if not known:
            raise
        # Somebody has deleted them.
        return save(content, {})
    ids = {"workspace_id": board._internal_id, "workspace_name": board._internal_name, "report_id": text.id}
    return {**ids, "workspace": board.url, "report": text.url}


def main(arguments: Sequence[str]) -> int:
    """Save the pages; done.json says where, or why not."""
    die_with_parent()
    root, sweep, folder = arguments
    scratch = Path(folder)
    request = read_json(scratch / "request.json", SCHEMA) or {}
    config = build(TrackerConfig, request["config"])
    done: dict[str, Any] = {"schema": SCHEMA, "problem": "", "left_out": []}
    try:
        store = Store.open(root, write=True)
        content = pages(store, sweep, Ledger(store, sweep, config))
        done |= {**_save_and_note(content, scratch, float(request["deadline"])), "left_out": content.left_out}
    except Exception as error:
        done["problem"] = brief(error)
    write_json(scratch / "done.json", done)
    return 0


def _save_and_note(content: Pages, scratch: Path, deadline: float) -> dict[str, str]:
    """Save, with the ids from and to the summary of the sweep's run."""
    import wandb

    from lbi.trackers.wandb_writer import run_settings

    told = content.told
    begun = wandb.init(
        project=told.project,
        entity=told.entity,
        id=told.id,
        resume="must",
        reinit="create_new",
        mode="online",
        dir=str(scratch),
        settings=run_settings(True, deadline - time.time()),
    )
    made = save(content, json.loads(begun.summary.get(PAGES) or "{}"))
    begun.summary[PAGES] = json.dumps(made)
    begun.summary.update({"workspace": made["workspace"], "wandb_report": made["report"]})
    begun.finish(exit_code=0)
    return made


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
