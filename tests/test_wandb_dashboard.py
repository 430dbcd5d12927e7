"""The W&B pages of a sweep, built by wandb-workspaces and saved on a loopback server.

What matters: every field that a panel refers to is one that the sweep's runs really logged.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes.wandb_server import KEY, FakeWandb
from wandb_cases import ENV_ID, cell, config, processes_of, put_plan, put_result

from lbi import verbs
from lbi.errors import InputError
from lbi.files import read_json, write_json
from lbi.store import Store
from lbi.trackers import track
from lbi.trackers.wandb_panels import COLOURS, charts, colours, split
from lbi.trackers.wandb_sweep_run import sweep_run_id

pytest.importorskip("wandb_workspaces")

Json = dict[str, Any]


def panels(part: Any) -> Iterator[Json]:
    """Every panel of a workspace's or a report's spec."""
    if isinstance(part, dict) and "viewType" in part:
        yield part
    elif isinstance(part, dict | list):
        for item in part.values() if isinstance(part, dict) else part:
            yield from panels(item)


def fields(panel: Json) -> set[tuple[str, str]]:
    """What a panel refers to, as (config or summary, name)."""
    said = panel["config"]
    texts = [said.get("xAxis"), said.get("yAxis"), *said.get("metrics", [])]
    texts += [column["accessor"] for column in said.get("columns", [])]
    if "groupBy" in said:
        texts.append(f"config:{said['groupBy']}")
    if "panel2Config" in said:
        texts.append(f"summary:{said['panel2Config']['exp']['fromOp']['inputs']['key']['val']}")
    texts += [f"config:{name}" for name in re.findall(r"\$\{config:(\w+)\}", said.get("legendTemplate", ""))]
    found = set()
    for text in filter(None, texts):
        section, _, name = re.sub("^summary_metrics.", "summary:", text).partition(":")
        found.add((section, name.removesuffix(".value")))
    return found


def pages(server: FakeWandb) -> tuple[Json, Json]:
    (workspace,), (report,) = server.views_of("project-view"), server.views_of("runs")
    return workspace["spec"], report["spec"]


def put_measured(store: Store) -> None:
    """A baseline, two quantizers, and a run that failed."""
    numbers = {"peak_memory_bytes": 2e9, "weight_bytes": 1e9, "bytes_per_token": 1e9, "mbu_measured": 0.5}
    quantizers = ("none", "int4_wo", "hqq4")
    for index in range(3):
        run_id = f"{index:012x}"
        put_result(store, run_id, "ok", speed=100.0 * (index + 1))
        file = store.run_folder(run_id, ENV_ID) / "attempt-1" / "metrics.json"
        content = read_json(file) or {}
        damage = 0.01 * index
        write_json(file, {**content, "metrics": {**content["metrics"], **numbers, "mean_kld": damage}})
    put_result(store, "f" * 12, "oom")
    named = [cell(index, f"{index:012x}", quantizer=name) for index, name in enumerate(quantizers)]
    put_plan(store, "survey", *named, cell(3, "f" * 12, quantizer="int8_wo"))


@pytest.mark.slow
def test_the_pages_show_what_was_logged(
    server: FakeWandb, store: Store, home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    put_measured(store)
    place = ["survey", "--store", str(store.root)]
    assert verbs.run("dashboard", [*place, "--baseline", "int4_wo"]) == 0
    said = capsys.readouterr().out
    assert "4 runs online" in said
    assert f"Workspace: {server.url}/team/lbi?nw=" in said
    assert "Energy" in next(line for line in said.splitlines() if line.startswith("Left out"))
    assert (server.unknown, processes_of(home)) == ([], {})

    workspace, report = pages(server)
    logged = {("summary", name) for run in server.runs.values() for name in run.summary}
    logged |= {("config", name) for run in server.runs.values() for name in run.config}
    for spec in (workspace, report):
        shown = list(panels(spec))
        kinds = [panel["viewType"] for panel in shown]
        assert kinds == [
            *("Scatter Plot", "Bar Chart", "Parallel Coordinates Plot", "Bar Chart", "Scatter Plot"),
            *("Bar Chart", "Bar Chart", "Run Comparer", "Weave"),
        ]
        front, bars, coordinates, _, roofline, *_, table = shown
        assert {("summary", "mean_kld_plotted"), ("summary", "decode_tok_s"), ("config", "quantizer")} <= fields(front)
        assert (front["config"]["xAxisLogScale"], front["config"]["showMaxYAxisLine"]) == (True, True)
        assert (bars["config"]["groupAgg"], bars["config"]["groupArea"]) == ("mean", "stddev")
        assert fields(coordinates) >= {("config", "quantizer"), ("summary", "peak_memory_bytes")}
        assert {("summary", "bytes_per_token"), ("summary", "mbu_measured")} <= fields(roofline)
        assert fields(table) == {("summary", "results")}
        for panel in shown:
            assert fields(panel) <= logged, panel["config"]

    runs = workspace["section"]["runSets"][0]
    assert [item["value"] for item in runs["filters"]["filters"]] == [["sweep:survey"]]
    colour_of = workspace["section"]["customRunColors"]
    assert len({colour_of[f"{index:012x}-{ENV_ID}"] for index in range(3)}) == 3
    whole = server.runs[sweep_run_id("survey")]
    results = server.table(whole.id, "results")
    rows = [dict(zip(results["columns"], row, strict=True)) for row in results["data"]]
    ratios = {row["name"]: row["speed_ratio"] for row in rows}
    assert [ratios[name] for name in ("none eager 0", "int4_wo eager 1", "hqq4 eager 2")] == [0.5, 1.0, 1.5]
    assert whole.summary["workspace"] in said


@pytest.mark.by_hand
def test_saving_again_replaces(server: FakeWandb, store: Store, tmp_path: Path) -> None:
    put_measured(store)
    place = ["survey", "--store", str(store.root)]
    verbs.run("dashboard", place)
    first = set(server.views)
    (store.sweep_folder("survey") / "wandb.json").unlink()
    verbs.run("dashboard", place)
    assert set(server.views) == first, "another machine, which has to say it all anew, finds them too"
    server.views.clear()
    verbs.run("dashboard", place)
    assert len(server.views) == 2, "what somebody has deleted is made again"


@pytest.mark.by_hand
def test_what_cannot_be_saved_is_said(server: FakeWandb, store: Store, home: Path, monkeypatch: Any) -> None:
    put_measured(store)
    place = ["survey", "--store", str(store.root)]
    with pytest.raises(InputError, match=r"--baseline=nothing.*Measured are: none eager 0"):
        verbs.run("dashboard", [*place, "--baseline", "nothing"])
    track(store, "survey", config())
    with server.hanging(about="upsertView"), pytest.raises(InputError, match="took longer than 8 s"):
        verbs.run("dashboard", [*place, "--timeout-s", "8"])
    assert processes_of(home) == {}
    monkeypatch.delenv("WANDB_API_KEY")
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    with pytest.raises(InputError, match="not all of the sweep is online"):
        verbs.run("dashboard", place)


def test_charts_without_numbers_are_left_out() -> None:
    options = {"quantizer": ["a", "b"], "engine": ["hf"]}
    shown, left_out = split(charts(options, {"decode_tok_s"}), {"decode_tok_s"})
    assert [chart.title.split(":")[0] for chart in shown] == ["Decode speed, tok/s", "Options and what came of them"]
    assert len(left_out) == 7
    assert split(charts(options, ()), ())[0] == []


def test_every_quantizer_has_its_colour() -> None:
    names = [f"q{index}" for index in range(25)]
    assert len(set(colours(names[:20]).values())) == 20 == len(set(COLOURS))
    assert colours(names)["q20"] == colours(names)["q0"]


@pytest.mark.by_hand
def test_a_real_sweep_online(server: FakeWandb, run_lbi: Callable[..., Any], home: Path, tmp_path: Path) -> None:
    """Two cells measured, written and shown: no panel refers to a name that a real run does not log."""
    variables = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": KEY, "HOME": str(home)}
    words = ["-m", "model=tiny_random", "measure=brief", "quantizer=none,int8_wo", "trace=kernels", "sweep.name=real"]
    done = run_lbi(*words, "engine.threads=1", **variables)
    assert "2 runs online" in done.stdout, done.stdout + done.stderr
    shown = run_lbi("dashboard", "real", **variables)
    assert shown.returncode == 0, shown.stdout + shown.stderr
    assert (server.unknown, server.uncommitted) == ([], [])
    assert len(server.artifacts("profile")) == 2
    bench = [run for run in server.runs.values() if run.fields["jobType"] == "bench"]
    logged = {("summary", name) for run in bench for name in run.summary} | {("summary", "results")}
    logged |= {("config", name) for run in bench for name in run.config}
    for spec in pages(server):
        kinds = [panel["viewType"] for panel in panels(spec)]
        assert kinds.count("Bar Chart") >= 4
        assert kinds.count("Scatter Plot") >= 2
        assert [panel["config"] for panel in panels(spec) if not fields(panel) <= logged] == []
