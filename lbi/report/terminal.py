"""The terminal: the plan, progress while it runs, the table and the answer at the end."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table as Grid

from lbi import tracing
from lbi.collect import Row
from lbi.ranking import AGGREGATE, SPEED, Ranked, Table, disturbance, outrun, tables, unfused
from lbi.report import cost_section
from lbi.report.figures import small, with_noise
from lbi.store import Store
from lbi.sweep_folder import read_header
from lbi.verdicts import DONE, DUPLICATE, PRUNED, RUN

if TYPE_CHECKING:
    from lbi.plan import Cell, Plan
    from lbi.schedule import Estimate
    from lbi.worker import Event, Task

SHOWN_CELLS = 60
"""A plan with more cells is shown in part; plan.jsonl and the report have them all."""

COLOURS = {RUN: "cyan", DONE: "green", DUPLICATE: "dim", PRUNED: "yellow"}


def console() -> Console:
    """Plain and wide where the output is not a terminal, so that a log keeps whole lines."""
    made = Console(highlight=False)
    return made if made.is_terminal else Console(highlight=False, width=200)


def show_plan(plan: Plan, name: str, store: Store, estimate: Estimate, forecast: str = "") -> None:
    """Every cell with its verdict, and what the runs will take; `forecast` is the executor's own word on that."""
    out = console()
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for column in ("cell", "setting", "verdict", "why"):
        grid.add_column(column, justify="right" if column == "cell" else "left", overflow="fold")
    shown = plan.cells if len(plan.cells) <= SHOWN_CELLS else _sample(plan.cells)
    for cell in shown:
        colour = COLOURS[cell.verdict]
        grid.add_row(str(cell.index), escape(cell.name), f"[{colour}]{cell.verdict}[/]", escape(cell.reason))
    out.print(grid)
    if len(shown) < len(plan.cells):
        out.print(f"... {len(plan.cells) - len(shown)} more cells")
    counts = plan.counts()
    listed = ", ".join(f"{counts[verdict]} {verdict}" for verdict in (RUN, DONE, DUPLICATE, PRUNED) if counts[verdict])
    out.print(f"Sweep [bold]{escape(name)}[/]: {len(plan.cells)} cells, {listed} (planned in {plan.seconds:.2f} s)")
    for problem in plan.problems:
        out.print(f"[yellow]Ignored in the store:[/] {escape(problem)}")
    if counts[RUN] and forecast:
        out.print(escape(forecast))
    elif counts[RUN]:
        out.print(f"About {_duration(estimate.seconds)} for {estimate.runs} runs{_certainty(estimate)}.")


def _sample(cells: Sequence[Cell]) -> list[Cell]:
    """The first cells, and the first of each verdict and reason among the rest."""
    shown, seen = list(cells[:20]), set()
    for cell in cells[20:]:
        key = (cell.verdict, cell.reason)
        if key not in seen and len(shown) < SHOWN_CELLS:
            seen.add(key)
            shown.append(cell)
    return shown


def _certainty(estimate: Estimate) -> str:
    if not estimate.guessed:
        return ", from what like runs took"
    if estimate.guessed == estimate.runs:
        return ", a guess: the store has no like runs yet"
    return f"; {estimate.guessed} of them are guessed, having no like runs in the store"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


class Live:
    """Shows runs as they go: a moving line on a terminal, a line per change elsewhere. By slot, what is running."""

    def __init__(self, total: int, store: Store, sweep: str) -> None:
        self.total, self.store, self.sweep = total, store, sweep
        self.out = console()
        self.done = 0
        self.lock = threading.Lock()
        self.running: dict[int, tuple[Task, str]] = {}
        self.progress = Progress(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            console=self.out,
            transient=True,
        )

    def __enter__(self) -> Live:
        if self.out.is_terminal:
            self.progress.start()
        self.bar = self.progress.add_task("", total=self.total)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.out.is_terminal:
            self.progress.stop()

    def report(self, event: Event) -> None:
        """Take in a worker's event; from any thread."""
        with self.lock:
            if event.kind == "end" and event.result is not None:
                self._end(event)
            elif event.kind == "note":
                self._note(event.text)
            else:
                self._change(event)

    def _note(self, text: str) -> None:
        self.progress.update(self.bar, description=escape(text))
        if not self.out.is_terminal:
            self.out.print(f"[{self.done}/{self.total}] {escape(text)}")

    def _end(self, event: Event) -> None:
        self.done += 1
        # Another slot may be shown as waiting with the same cell in view.
        self.running = {
            slot: shown
            for slot, shown in self.running.items()
            if slot != event.slot and shown[0].cell != event.task.cell
        }
        self.progress.update(self.bar, advance=1, description=escape(self._moving_line()))
        self.out.print(f"[{self.done}/{self.total}] {escape(event.task.name)}: {self._ending(event)}")

    def _change(self, event: Event) -> None:
        doing = {
            "reference": "unquantized model, for comparison (once)",
            "wait": f"waiting, {event.text}",
            "start": "start",
        }.get(event.kind, event.text)
        self.running[event.slot] = (event.task, doing)
        self.progress.update(self.bar, description=escape(self._moving_line()))
        if not self.out.is_terminal and event.kind != "phase":
            number = min(self.done + len(self.running), self.total)
            self.out.print(f"[{number}/{self.total}] {escape(event.task.name)}: {escape(doing)}")

    def _moving_line(self) -> str:
        """What every slot is doing."""
        if len(self.running) == 1:
            return next(f"{task.name}: {doing}" for task, doing in self.running.values())
        shown = [f"{task.name} ({doing})" for _, (task, doing) in sorted(self.running.items())]
        return f"{len(shown)} running: {', '.join(shown)}" if shown else ""

    def _ending(self, event: Event) -> str:
        result = event.result
        if result is None:
            return "[red]lost[/]"
        lacking = tracing.lacking(self.store.read(result, "effective.json") or {})
        untraced = f"; [yellow]{escape(lacking)}[/]" if lacking else ""
        if not result.ok:
            return f"[red]{result.status}[/] {escape(result.reason)}{untraced}"
        measured = (self.store.read(result, "metrics.json") or {}).get("metrics", {})
        parts = [f"[green]ok[/] decode {measured.get(SPEED, 0):.1f} tok/s"]
        if measured.get("mean_kld") is not None:
            parts.append(f"mean KLD {small(measured['mean_kld'])}")
        return ", ".join([*parts, f"{result.seconds:.0f} s"]) + untraced


def show_results(store: Store, sweep: str, rows: Sequence[Row]) -> None:
    """The table, best first, the cells without a number, and the answer in words."""
    out = console()
    header = read_header(store, sweep)
    for table in tables(rows, header["baseline"], header["max_kld"]):
        _show_table(out, table, header)
    for line in cost_section.lines(rows, header):
        out.print(escape(line), style="dim", soft_wrap=True)
    for problem in {str(problem) for problem in store.problems}:
        out.print(f"[yellow]Ignored in the store:[/] {escape(problem)}")
    folder = store.sweep_folder(sweep)
    out.print(f"\nReport: {_shown_path(folder / 'report.html')} (also results.csv, results.parquet)", soft_wrap=True)


def _show_table(out: Console, table: Table, header: dict[str, Any]) -> None:
    title = f"\n[bold]{escape(table.model or 'no model')}, {escape(table.workload or 'no workload')}[/]"
    out.print(title)
    numbered = [ranked for ranked in table.ranked if ranked.rank is not None]
    if numbered:
        shown = numbered if len(numbered) <= SHOWN_CELLS else _best(numbered)
        out.print(_grid(shown))
        if len(shown) < len(numbered):
            out.print(f"... and {len(numbered) - len(shown)} slower ones; the report has them all")
        first = numbered[0].row
        if first["repetitions"]:
            out.print(_legend(first), style="dim")
        rows = [ranked.row for ranked in numbered]
        for warning in (disturbance(rows), unfused(rows), outrun(rows)):
            if warning:
                out.print(f"[yellow]{escape(warning)}[/]")
    others = [ranked.row for ranked in table.ranked if ranked.rank is None]
    if others:
        out.print("\nWithout a number:")
        if len(others) > SHOWN_CELLS:
            out.print(f"  {len(others)} cells, of which the first {SHOWN_CELLS}:")
        for row in others[:SHOWN_CELLS]:
            out.print(f"  {escape(row['name'])}: [yellow]{row['status']}[/] {escape(row['reason'])}")
    out.print()
    for answer in table.answers:
        out.print(f"[bold]{escape(answer.question)}:[/] {escape(answer.text)}")
    note = header["notes"].get(table.model)
    if note:
        out.print(f"Note on {escape(table.model)}: {escape(note)}", style="dim")


def _best(numbered: Sequence[Ranked]) -> list[Ranked]:
    """The fastest, and the baseline wherever it is."""
    return [*numbered[: SHOWN_CELLS - 1], *(one for one in numbered[SHOWN_CELLS - 1 :] if one.is_baseline)]


COLUMNS = (
    ("#", "right"),
    ("setting", "left"),
    ("decode tok/s", "right"),
    ("x baseline", "right"),
    ("prefill tok/s", "right"),
    ("peak MB", "right"),
    ("bits/weight", "right"),
    ("MB/token", "right"),
    ("MBU", "right"),
    ("mean KLD", "right"),
    ("top-1", "right"),
    ("PPL ratio", "right"),
)


def _grid(numbered: Sequence[Ranked]) -> Grid:
    grid = Grid(box=None, pad_edge=False, header_style="bold")
    is_batch = any(ranked.row[AGGREGATE] for ranked in numbered)
    for column, side in COLUMNS:
        name = f"{column} a sequence" if is_batch and column == "decode tok/s" else column
        grid.add_column(name, justify=side, no_wrap=column != "setting")  # type: ignore[arg-type]
    if is_batch:
        grid.add_column("decode tok/s all together", justify="right", no_wrap=True)
    for ranked in numbered:
        row = ranked.row
        grid.add_row(
            f"{ranked.rank}{'=' if ranked.shared else ''}",
            escape(row["name"]) + _tags(ranked),
            with_noise(row, SPEED),
            _ratio(ranked),
            with_noise(row, "prefill_tok_s"),
            _number(row["peak_memory_bytes"], 1e6, "{:.0f}"),
            _number(row["bits_per_weight"], 1, "{:.2f}"),
            _number(row["bytes_per_token"], 1e6, "{:.1f}"),
            _number(row["mbu_measured"], 0.01, "{:.0f}%"),
            small(row["mean_kld"]),
            _number(row["top1_agreement"], 0.01, "{:.1f}%"),
            small(row["ppl_ratio"]),
            *([with_noise(row, AGGREGATE)] if is_batch else []),
        )
    return grid


def _tags(ranked: Ranked) -> str:
    flags = "".join(f" [yellow]({flag})[/]" for flag in ranked.row["flags"])
    return (" [cyan](baseline)[/]" if ranked.is_baseline else "") + flags


def _legend(row: Row) -> str:
    coverage = row["interval_coverage"]
    covered = "" if coverage is None else f" The interval covers the median in {coverage:.1%} of cases."
    return (
        f"Medians of {row['repetitions']:.0f} repetitions, ± half the interval.{covered} "
        "'=' after a rank: a tie, the intervals overlap."
    )


def _ratio(ranked: Ranked) -> str:
    if ranked.ratio is None:
        return "-"
    return f"{ranked.ratio.value:.2f}{' tie' if ranked.ratio.tie else ''}"


def _number(value: float | None, unit: float, form: str) -> str:
    return "-" if value is None else form.format(value / unit)


def _shown_path(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
