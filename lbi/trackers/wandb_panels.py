"""The charts of a sweep's W&B pages, named by the metrics that they show.

A chart without numbers is worse than none: what no run of the sweep has is left out, and named.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lbi.trackers.wandb_runs import KLD_PLOTTED

COLOURS = (
    "#4E79A7 #F28E2B #59A14F #E15759 #B07AA1 #76B7B2 #9C755F #EDC948 #FF9DA7 #BAB0AC "
    "#1F3A5F #A65E1A #2E6B2A #8C2D2F #6B4566 #3E7C78 #5E4637 #9A7F1F #B85C68 #6E6661"
).split()
"""A colour a quantizer, the first twenty of them."""

COORDINATES = ("decode_tok_s", KLD_PLOTTED, "peak_memory_bytes")
"""The numbers beside the options in the parallel coordinates."""

SPREAD = "mean and standard deviation over settings"


@dataclass(frozen=True, slots=True)
class Chart:
    """A panel, made by `make` from wandb_workspaces' reports module. All of `metrics` must have been logged."""

    title: str
    metrics: Sequence[str]
    make: Callable[[Any], Any]


def charts(options: Mapping[str, Collection[str]], logged: Collection[str]) -> list[Chart]:
    """Every chart there could be of a sweep with these options of each group, whose runs logged these metrics."""
    return [
        _front(),
        _bars("Decode speed, tok/s", "decode_tok_s"),
        _coordinates(options, logged),
        _bars("Mean KLD, nats", "mean_kld"),
        _roofline("mbu_measured", "measured bandwidth"),
        _roofline("mbu_nominal", "data sheet's bandwidth"),
        _bars("Peak memory, bytes", "peak_memory_bytes"),
        _bars("Weights, bytes", "weight_bytes"),
        _bars("Energy, J per token", "energy_j_per_token"),
    ]


def split(wanted: Sequence[Chart], logged: Collection[str]) -> tuple[list[Chart], list[str]]:
    """The charts that have numbers, and the titles of the others."""
    shown = [chart for chart in wanted if set(chart.metrics) <= set(logged)]
    return shown, [chart.title for chart in wanted if chart not in shown]


def _front() -> Chart:
    def make(wr: Any) -> Any:
        return wr.ScatterPlot(
            title=title,
            x=wr.SummaryMetric(KLD_PLOTTED),
            y=wr.SummaryMetric("decode_tok_s"),
            log_x=True,
            # The fastest so far from the least damage on: the Pareto front.
            running_ymax=True,
            legend_template="${config:quantizer} ${run:displayName}",
        )

    title = "Decode speed against mean KLD, and the front"
    return Chart(title, (KLD_PLOTTED, "decode_tok_s"), make)


def _bars(title: str, metric: str) -> Chart:
    title = f"{title}: {SPREAD}"

    def make(wr: Any) -> Any:
        return wr.BarPlot(
            title=title,
            metrics=[wr.SummaryMetric(metric)],
            orientation="h",
            groupby=wr.Config("quantizer"),
            groupby_aggfunc="mean",
            groupby_rangefunc="stddev",
        )

    return Chart(title, (metric,), make)


def _roofline(metric: str, of: str) -> Chart:
    title = f"Share of the {of} against bytes per token"

    def make(wr: Any) -> Any:
        return wr.ScatterPlot(
            title=title,
            x=wr.SummaryMetric("bytes_per_token"),
            y=wr.SummaryMetric(metric),
            log_x=True,
            legend_template="${config:quantizer} ${run:displayName}",
        )

    return Chart(title, ("bytes_per_token", metric), make)


def _coordinates(options: Mapping[str, Collection[str]], logged: Collection[str]) -> Chart:
    title = "Options and what came of them"
    # An axis with one option is the same for all.
    groups = [group for group, known in options.items() if len(known) > 1] or ["quantizer"]
    numbers = [metric for metric in COORDINATES if metric in logged]

    def make(wr: Any) -> Any:
        columns = [wr.ParallelCoordinatesPlotColumn(wr.Config(group)) for group in groups]
        columns += [
            wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(metric), log=metric == KLD_PLOTTED) for metric in numbers
        ]
        return wr.ParallelCoordinatesPlot(title=title, columns=columns)

    return Chart(title, numbers or COORDINATES[:1], make)


def colours(quantizers: Sequence[str]) -> dict[str, str]:
    """A colour for each quantizer, in their order; beyond twenty they come again."""
    return {name: COLOURS[index % len(COLOURS)] for index, name in enumerate(dict.fromkeys(quantizers))}
