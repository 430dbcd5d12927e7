"""Charts as figures of the page: each with a caption that says in words what it shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lbi.ranking import KLD_FLOOR, SPEED, Table
from lbi.report import charts, kernel_chart, parallel_chart, roofline_chart
from lbi.report.chart_data import Spec, measured, records
from lbi.report.facts import Facts, part
from lbi.report.figures import percent, small
from lbi.report.markup import Html, element, joined, paragraph


@dataclass(slots=True)
class Figures:
    """Makes figures and collects their specifications; `without` says why there can be none, if so."""

    without: str | None = None
    specs: dict[str, Spec] = field(default_factory=dict)
    cells: dict[str, list[Spec]] = field(default_factory=dict)

    def embedded(self) -> dict[str, Any]:
        """What the page's script draws from: the specifications, and the records of each table once."""
        return {"specs": self.specs, "cells": self.cells}

    def of(self, table: Table, index: int, max_kld: float | None, facts: Mapping[int, Facts]) -> Html:
        """The figures of one table, side by side where there is room."""
        if not measured(table):
            return paragraph("There is no chart: no cell has a speed.")
        if self.without:
            return paragraph(f"There are no charts: {self.without}.", class_="note")
        self.cells[str(index)] = records(table)
        first = element("div", self._pareto(table, index, max_kld), self._bars(table, index), class_="charts")
        kernel_chart.extend(self.cells[str(index)], table, facts)
        more = [*self._roofline(table, index), *self._parallel(table, index), *self._kernels(table, index, facts)]
        return joined([first, element("div", *more, class_="charts")] if more else [first])

    def _roofline(self, table: Table, index: int) -> list[Html]:
        points = roofline_chart.points(table)
        if not points:
            return []
        name = f"roofline-{index}"
        self.specs[name] = roofline_chart.roofline(table)
        nearest = max(points, key=lambda item: float(item.row["mbu_measured"]))
        caption = (
            "The lines are what the memory's bandwidth allows: bytes a second over bytes a token. "
            f"Nearest to the measured one: {nearest.row['name']}, at {percent(nearest.row['mbu_measured'])} of it. "
            "Colours are the quantizers', as in the bars."
        )
        return [self._figure("Roofline of decoding", name, caption)]

    def _kernels(self, table: Table, index: int, facts: Mapping[int, Facts]) -> list[Html]:
        shown = kernel_chart.bars(table, facts)
        if not shown:
            return []
        name = f"kernels-{index}"
        self.specs[name] = kernel_chart.breakdown(table, facts)
        ways = {str(part(facts[item.row["cell"]].effective, "timeline").get("time")) for item in shown}
        caption = f"Time {'; '.join(sorted(ways))}. It is that of a short pass after the measurement."
        if len(shown) == kernel_chart.MOST_BARS:
            caption += f" Shown are the {len(shown)} fastest cells."
        return [self._figure("Where a decode step's time goes", name, caption)]

    def _parallel(self, table: Table, index: int) -> list[Html]:
        if len(measured(table)) < 2 or len(parallel_chart.axes(table)) < 2:
            return []
        name = f"parallel-{index}"
        self.specs[name] = parallel_chart.parallel(table)
        caption = "A line per cell. Each axis runs from the smallest value at its foot to the largest at its top; "
        caption += "cells on the front and the baseline are drawn stronger."
        if len(measured(table)) > parallel_chart.MOST_LINES:
            caption += f" Shown are the {parallel_chart.MOST_LINES} fastest cells."
        return [self._figure("All numbers at once", name, caption)]

    def _bars(self, table: Table, index: int) -> Html:
        name = f"bars-{index}"
        self.specs[name] = charts.bars(table)
        what = "Median and interval" if charts.has_intervals(charts.bar_rows(table)) else "Median"
        caption = f"{what} of decode tok/s; the dashed line is the baseline."
        shown, total = len(charts.bar_rows(table)), len(measured(table))
        if shown < total:
            caption += f" Shown are {shown} of {total} cells, the fastest and the baseline; the table has all."
        return self._figure("Decode speed by cell", name, caption)

    def _pareto(self, table: Table, index: int, max_kld: float | None) -> Html:
        heading = "Speed against quality"
        if not charts.pareto_points(table):
            why = f"There is no chart: no cell of this table has a mean KLD ({_reasons(table)})."
            return element("figure", element("h3", heading), paragraph(why))
        name = f"pareto-{index}"
        self.specs[name] = charts.pareto(table, max_kld)
        return self._figure(heading, name, _pareto_caption(table, max_kld))

    def _figure(self, heading: str, name: str, caption: str) -> Html:
        """The box has its height before there is a chart in it: what is further down must not seem to be in view."""
        height = f"min-height: {self.specs[name]['height']}px"
        table = name.rpartition("-")[2]
        box = element("div", class_="chart", data_chart=name, data_table=table, style=height)
        return element("figure", element("h3", heading), box, element("figcaption", caption))


def _reasons(table: Table) -> str:
    """Why quality is missing, as the results say it."""
    said = dict.fromkeys(item.row["missing"].get("mean_kld", "quality was not measured") for item in measured(table))
    return "; ".join(str(reason) for reason in said)


def _pareto_caption(table: Table, max_kld: float | None) -> str:
    rows = [item.row for item in charts.pareto_points(table)]
    front = [item.row for item in charts.pareto_points(table) if item.on_front]
    words = ["Lower right is better. Large points and the line are the front."]
    if charts.has_intervals(charts.pareto_points(table)):
        few = (
            ", drawn for the front alone where there are this many points" if len(rows) > charts.MOST_INTERVALS else ""
        )
        words.append(f"Bars are the interval of the speed{few}.")
    if max_kld:
        words.append(f"The dashed line is the bound of {max_kld:g} nat.")
    clipped = sum(row["mean_kld"] < KLD_FLOOR for row in rows)
    if clipped:
        cells = "1 cell is" if clipped == 1 else f"{clipped} cells are"
        words.append(f"A log axis has no zero: {cells} below {KLD_FLOOR:.0e} and drawn there.")
    unscored = len(measured(table)) - len(rows)
    if unscored:
        words.append(f"Not shown, having no mean KLD: {unscored}.")
    listed = [f"{row['name']} ({row[SPEED]:.1f} tok/s, {small(row['mean_kld'])} nat)" for row in front]
    return " ".join([*words, f"On the front: {'; '.join(listed)}."])
