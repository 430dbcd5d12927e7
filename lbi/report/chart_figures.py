"""Charts as figures of the page: each with a caption that says in words what it shows."""

from __future__ import annotations

from dataclasses import dataclass, field

from lbi.ranking import KLD_FLOOR, SPEED, Table
from lbi.report import charts
from lbi.report.figures import small
from lbi.report.markup import Html, element, paragraph


@dataclass(slots=True)
class Figures:
    """Makes figures and collects their specifications; `without` says why there can be none, if so."""

    without: str | None = None
    specs: dict[str, charts.Spec] = field(default_factory=dict)

    def of(self, table: Table, index: int, max_kld: float | None) -> Html:
        """The figures of one table, side by side where there is room."""
        if not charts.measured(table):
            return paragraph("There is no chart: no cell has a speed.")
        if self.without:
            return paragraph(f"There are no charts: {self.without}.", class_="note")
        return element("div", self._pareto(table, index, max_kld), self._bars(table, index), class_="charts")

    def _bars(self, table: Table, index: int) -> Html:
        name = f"bars-{index}"
        self.specs[name] = charts.bars(table)
        what = "Median and interval" if charts.has_intervals(charts.bar_rows(table)) else "Median"
        caption = f"{what} of decode tok/s; the dashed line is the baseline."
        shown, total = len(charts.bar_rows(table)), len(charts.measured(table))
        if shown < total:
            caption += f" Shown are {shown} of {total} cells, the fastest and the baseline; the table has all."
        return _figure("Decode speed by cell", name, caption)

    def _pareto(self, table: Table, index: int, max_kld: float | None) -> Html:
        heading = "Speed against quality"
        if not charts.pareto_points(table):
            why = f"There is no chart: no cell of this table has a mean KLD ({_reasons(table)})."
            return element("figure", element("h3", heading), paragraph(why))
        name = f"pareto-{index}"
        self.specs[name] = charts.pareto(table, max_kld)
        return _figure(heading, name, _pareto_caption(table, max_kld))


def _reasons(table: Table) -> str:
    """Why quality is missing, as the results say it."""
    said = dict.fromkeys(
        item.row["missing"].get("mean_kld", "quality was not measured") for item in charts.measured(table)
    )
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
    unscored = len(charts.measured(table)) - len(rows)
    if unscored:
        words.append(f"Not shown, having no mean KLD: {unscored}.")
    listed = [f"{row['name']} ({row[SPEED]:.1f} tok/s, {small(row['mean_kld'])} nat)" for row in front]
    return " ".join([*words, f"On the front: {'; '.join(listed)}."])


def _figure(heading: str, name: str, caption: str) -> Html:
    box = element("div", class_="chart", data_chart=name)
    return element("figure", element("h3", heading), box, element("figcaption", caption))
