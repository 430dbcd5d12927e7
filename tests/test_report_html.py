"""The HTML report: whole, self-contained, small, and safe against what it shows."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lbi.collect import rows
from lbi.comparing import compare, resolve
from lbi.errors import InputError
from lbi.report import html, vega
from lbi.report.charts import KLD_FLOOR
from lbi.store import Store

SWEEP = "tried"
SCRIPT = 'window.vegaEmbed=()=>Promise.resolve();"http://not.loaded/"'
HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&amp;"
ENVIRONMENT = {
    "host": "node1",
    "cpu": "Some CPU",
    "cores": 8,
    "gpus": [],
    "packages": {"torch": "2.13.0"},
    "lbi": "0.1.0",
    "git": {"commit": "c0ffee", "dirty": None},
}


class Page(HTMLParser):
    """The report as a browser takes it apart."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str, str] = {}
        self.rows: dict[str, str] = {}
        self.text = ""
        self._open: list[str] = []
        self._script = self._row = ""
        self.feed(source)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append((tag, found))
        if tag == "script":
            self._script = found.get("id") or f"script {len(self.scripts)}"
            self.scripts[self._script] = ""
        if tag == "tr":
            self._row = found.get("id") or ""

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._script = ""

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[self._script] += data
            return
        self.text += data
        if self._row:
            self.rows[self._row] = self.rows.get(self._row, "") + " " + data

    def attributes(self, name: str) -> list[str]:
        return [str(found[name]) for _, found in self.tags if name in found]

    def details(self, cell: int) -> dict[str, str]:
        """What the page's script shows when a row is opened."""
        known = json.loads(self.scripts["details"])
        shown = {}
        for (name, between), parts in zip(known["fields"], known["cells"][str(cell)], strict=True):
            listed = parts if isinstance(parts, list) else [parts]
            shown[name] = between.join(known["pool"][part] if isinstance(part, int) else part for part in listed)
        return shown

    def charts(self) -> dict[str, Any]:
        return dict(json.loads(self.scripts["charts"])["specs"])

    def records(self, table: int = 1) -> list[dict[str, Any]]:
        """What the charts of a table are drawn from."""
        return list(json.loads(self.scripts["charts"])["cells"][str(table)])


class Sweep:
    """A store on disk with one sweep, written as lbi.store lays it out."""

    def __init__(self, root: Path, **header: Any) -> None:
        self.store = Store.open(root, write=True)
        asked = {"command": "python -m lbi -m quantizer=none,int8_wo", "planned": 1.7e9, "baseline": None}
        asked |= {"max_kld": 0.05, "notes": {}, "problems": []}
        self.lines = [{"schema": 1, "sweep": SWEEP, **asked, **header}]

    def cell(self, name: str, verdict: str = "RUN", reason: str = "", rule: str = "", **choices: str) -> int:
        """Add a cell to the plan; its number."""
        index = len(self.lines) - 1
        groups = {"model": "tiny", "engine": "hf", "compiler": "eager", "decoding": "greedy", "cache": "dynamic"}
        groups |= {"workload": "chat", "quantizer": name.split()[0], **choices}
        line = {"index": index, "overrides": [f"quantizer={name}", "cache=dynamic"], "choices": groups}
        line |= {"run_id": f"{index:012x}", "env_id": "e0", "verdict": verdict, "reason": reason, "rule": rule}
        self.lines.append(line | {"name": name})
        return index

    def result(self, index: int, status: str = "ok", reason: str = "", **files: Any) -> None:
        """Publish a result for a cell; `files` are the attempt's, without .json."""
        folder = self.store.run_folder(f"{index:012x}", "e0")
        attempt = folder / "attempt-1"
        attempt.mkdir(parents=True)
        outcome = {"schema": 1, "run_id": f"{index:012x}", "status": status, "reason": reason, "attempt": 1}
        (folder / "status.json").write_text(json.dumps(outcome | {"finished": 1.7e9 + index, "seconds": 3.0}))
        for name, content in {"env": ENVIRONMENT, **files}.items():
            (attempt / f"{name}.json").write_text(json.dumps({"schema": 1, **content}))

    def measured(self, name: str, speed: float, kld: float | None = 0.01, noise: float = 1.0, **files: Any) -> int:
        """A cell with a number."""
        index = self.cell(name)
        numbers: dict[str, Any] = {"decode_tok_s": speed, "decode_tok_s_lo": speed - noise}
        numbers |= {"decode_tok_s_hi": speed + noise, "repetitions": 5.0, "interval_coverage": 0.9375}
        numbers |= {"prefill_tok_s": 900.0, "weight_bytes": 1e6 + index, "bits_per_weight": 8.5, "mean_kld": kld}
        metrics = {"metrics": numbers, "missing": {"energy_j_per_token": "no meter"}, "phases_s": {"load": 2.5}}
        kind = {"kind": "Linear[Int8]", "bits": 8.0, "group_size": 32, "quantized": True, "layers": 7}
        kind |= {"params": 1000, "bytes": 1100, "example": "q_proj"}
        effective = {"weights": {"kinds": [kind]}, "compiler": {"graphs": 3, "graph_breaks": 0}, "threads": 8}
        effective |= {"lossless": {"verdict": "equal", "tokens": 32}, "attention": "sdpa"}
        text = {"tokens": [1, 2], "text": "a generated text"}
        self.result(index, **{"metrics": metrics, "effective": effective, "text": text, **files})
        return index

    def page(self) -> Page:
        return Page(self.write().read_text())

    def write(self) -> Path:
        folder = self.store.sweep_folder(SWEEP)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "plan.jsonl").write_text("".join(json.dumps(line) + "\n" for line in self.lines))
        return html.write(self.store, SWEEP)


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Sweep]:
    monkeypatch.setattr(html, "bundle", lambda: SCRIPT)
    return lambda **header: Sweep(tmp_path / "store", **header)


def test_every_cell_is_there_with_its_status_and_reason(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    made.measured("none", 100.0, 0.0)
    made.measured("int8_wo", 150.0)
    made.result(made.cell("hqq4"), "oom", "needs 90 GB")
    made.result(
        made.cell("hqq2"), "crash", "SIGSEGV in the kernel", verdict={"last_phase": "warm up", "status": "crash"}
    )
    made.cell("fp8_wo", "PRUNED", "this CPU has no fp8", "fp8_needs_a_gpu")
    made.cell("int8", "DUPLICATE", "the same setting as cell 1")
    made.cell("late")
    running = made.cell("busy")
    attempt = made.store.claim(f"{running:012x}", "e0", {})
    (attempt.folder / "progress.json").write_text(json.dumps({"schema": 1, "phase": "quantize"}))
    page = made.page()

    assert list(page.rows) == ["c1", "c0", "c2", "c3", "c4", "c5", "c6", "c7"]
    assert "150.0 ±1.0" in page.rows["c1"]
    assert "1.50 (1.48 to 1.53)" in page.rows["c1"]
    assert "baseline" in page.rows["c0"]
    assert "baseline" not in page.rows["c1"]
    for cell, words in enumerate(["oom needs 90 GB", "crash SIGSEGV in the kernel", "pruned this CPU has no fp8"], 2):
        assert words in " ".join(page.rows[f"c{cell}"].split())
    assert "the same setting as cell 1" in page.rows["c5"]
    assert "no result yet" in page.rows["c6"]
    assert "quantize" in page.rows["c7"]
    assert "8 cells: 2 ok, 1 oom, 1 crash, 1 running, 1 missing, 1 pruned, 1 duplicate." in page.text
    assert "not finished: 1 running, 1 missing" in page.text
    assert "ended in: warm up" in page.details(3)["time by phase"]


def test_answers_ties_and_notes_are_on_top(sweep: Callable[..., Sweep]) -> None:
    made = sweep(notes={"tiny": "Random weights."})
    made.measured("none", 100.0, 0.0)
    made.measured("int8_wo", 150.0, 0.5)
    made.measured("int4_wo", 149.0, 0.01)
    page = made.page()
    before = page.text.index("Speed against quality")
    for words in ("int8_wo, 150.0 tok/s, 1.50x", "It is a tie with int4_wo", "int4_wo, 149.0 tok/s", "Smallest within"):
        assert page.text.index(words) < before
    assert [row.split()[0] for row in page.rows.values()] == ["1=", "1=", "3"]
    # Once with the answer, and once right above the table.
    assert page.text.count("Random weights.") == 2
    assert page.text.rindex("Random weights.") < page.text.index("Filter rows")
    assert "#c1" in page.attributes("href")


def test_details_of_a_row(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    made.measured("none", 100.0)
    shown = made.page().details(0)
    assert shown["overrides"] == "quantizer=none cache=dynamic"
    assert shown["run_id"] == "000000000000"
    assert shown["attempt"] == "runs/000000000000/e0/attempt-1"
    assert (
        shown["linear layers as run"] == "7 × Linear[Int8]: 8 bit, groups of 32, 1,000 weights, 1.1 kB (such as q_proj)"
    )
    assert shown["compiler counters"] == "graphs 3, graph breaks 0"
    assert shown["same tokens as the plain path"] == "verdict equal, tokens 32"
    assert shown["time by phase"] == "load 2.50 s"
    assert shown["generated text"] == "a generated text"
    assert "decode_tok_s 100.0 tok/s (99.0 tok/s to 101.0 tok/s)" in shown["other numbers"]
    assert shown["numbers it does not have"] == "energy_j_per_token: no meter"


def test_answers_from_a_busy_machine_say_so(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    numbers = {"decode_tok_s": 9.0, "foreign_cpu": 0.9, "idle_cpu": 0.0}
    made.measured("none", 9.0, metrics={"metrics": numbers, "missing": {}})
    text = made.page().text
    assert text.index("Fastest") < text.index("Others took up to 90% of the CPU") < text.index("Speed against quality")


def test_samples_are_told_by_the_run_itself(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    told = [{"decode_tok_s": 10.0, "void": ""}, {"decode_tok_s": 2.0, "void": "recompiled"}, {"decode_tok_s": None}, 3]
    made.measured("none", 10.0, effective={"samples": told})
    page = made.page()
    assert page.details(0)["samples in turn, decode tok/s"] == "10, 2 (void: recompiled)"


def test_samples_of_an_older_result_are_read_from_their_file(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    folder = made.store.run_folder(f"{made.measured('none', 10.0):012x}", "e0") / "attempt-1"
    steps = ((0.1, ""), (0.5, "recompiled"), (0.2, ""))
    taken = [
        {"repetition": number, "token": token, "seconds": 1 + step * token, "void": void}
        for number, (step, void) in enumerate(steps)
        for token in (0, 1, 2, -1)
    ]
    for row in taken:
        row["seconds"] = 9.0 if row["token"] == -1 else row["seconds"]
    pq.write_table(pa.Table.from_pylist(taken), folder / "samples.parquet")
    made.measured("int8_wo", 20.0)
    damaged = made.store.run_folder(f"{1:012x}", "e0") / "attempt-1" / "samples.parquet"
    damaged.write_text("no parquet")
    page = made.page()
    assert page.details(0)["samples in turn, decode tok/s"] == "10, 2 (void: recompiled), 5"
    assert page.details(1)["samples in turn, decode tok/s"] == ""
    assert "samples.parquet: is not whole Parquet" in page.text


CHOICES = {
    "candidates": ["int8_pack", "int4_wo group_size=64", "fp8_da"],
    "by_shape": [
        {
            "shape": [576, 1536],
            "layers": 32,
            "chosen": {"int4_wo group_size=64": 30, "int8_pack": 2},
            "timed_us": {"none": 12.1, "int8_pack": 5.2, "int4_wo group_size=64": 3.0},
            "error": {"int8_pack": 0.004, "int4_wo group_size=64": 0.08},
            "refused": {"fp8_da": "needs sm_89"},
        }
    ],
    "tokens": 1,
    "max_error": 0.1,
}


def test_what_autoquant_chose_among(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    told = {"choices": {**CHOICES, "from": "an earlier run"}, "quantized": "fresh", "quantized_notes": ["not kept: x"]}
    made.measured("autoquant", 100.0, effective=told)
    made.measured("none", 90.0)
    page = made.page()
    assert page.details(0)["quantized weights"] == "fresh; not kept: x"
    assert page.details(0)["autoquant's choices"].splitlines() == [
        "timed at 1 row, largest error allowed 10%, an earlier run",
        "32 × 576 → 1536: int4_wo group_size=64 for 30, int8_pack for 2 (int4_wo group_size=64 3 µs, error 8.0%; "
        "int8_pack 5.2 µs, error 0.4%; none 12.1 µs; fp8_da left out: needs sm_89)",
    ]
    assert page.details(1)["autoquant's choices"] == ""


@pytest.mark.parametrize(
    ("choices", "words"),
    [
        ({"by_shape": [{}]}, "? × unknown shape: nothing chosen (no times)"),
        ({"by_shape": [{"shape": [8, 9], "error": {"hqq4": 0.5}}]}, "? × 8 → 9: nothing chosen (hqq4 error 50.0%)"),
        (
            {"by_shape": [7, {"layers": 2, "chosen": {"none": 2}}], "tokens": "?"},
            "2 × unknown shape: none for 2 (no times)",
        ),
        ({"by_shape": 3, "max_error": 0.1}, ""),
        ([], ""),
    ],
)
def test_choices_with_parts_missing(sweep: Callable[..., Sweep], choices: Any, words: str) -> None:
    made = sweep()
    made.measured("autoquant", 100.0, effective={"choices": choices})
    assert made.page().details(0)["autoquant's choices"] == words


def unfused(made: Sweep, name: str, speed: float, **effective: Any) -> int:
    """A cell whose decode step writes 212 MB beside the 163 MB that it reads."""
    numbers = {"decode_tok_s": speed, "bytes_per_token": 163e6, "unpacked_bytes_per_token": 212.3e6}
    return made.measured(name, speed, metrics={"metrics": numbers, "missing": {}}, effective=effective)


def test_weights_unpacked_at_every_token_are_flagged(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    made.measured("none", 100.0)
    kernels = {"time": "of the GPU", "steps": 3, "ms_per_step": 1.5}
    kernels |= {"top": [{"name": "elementwise_kernel", "calls": 210.0, "share": 0.8}, "rubbish"]}
    seen = {"per_token_bytes": 212300000, "layers": 210, "evidence": "210 of 210 weights"}
    unfused(made, "fp8_wo", 4.7, kernels=kernels, dequantized=seen)
    page = made.page()
    assert "weight-only without fusion" in page.rows["c1"]
    assert "weight-only without fusion" not in page.rows["c0"]
    line = "the decode step of fp8_wo writes 212.3 MB of unpacked weights per token beside the 163.0 MB it would have"
    assert page.text.index(line) > page.text.index("Filter rows")
    details = page.details(1)
    assert (
        details["kernels of a decode step"]
        == "1.5 ms a decode step (time of the GPU)\n80% elementwise_kernel, 210 calls"
    )
    assert details["unpacked weights written"] == "212.3 MB a token: 210 of 210 weights"
    assert page.details(0)["kernels of a decode step"] == ""


def test_nothing_from_a_result_becomes_markup(sweep: Callable[..., Sweep]) -> None:
    made = sweep(command=HOSTILE, notes={"tiny": HOSTILE}, problems=[HOSTILE])
    made.measured(HOSTILE, 100.0, text={"text": HOSTILE + "\ud800 \u2028"}, env={**ENVIRONMENT, "cpu": HOSTILE})
    made.result(made.cell("hqq4"), "crash", HOSTILE)
    made.cell("fp8_wo", "PRUNED", HOSTILE, HOSTILE)
    made.cell("none", model='"onclick="alert(3)')
    page = made.page()
    assert [tag for tag, _ in page.tags].count("script") == 4
    assert not [tag for tag, _ in page.tags if tag in ("img", "iframe", "object", "embed", "link", "base", "form")]
    assert not [name for _, found in page.tags for name in found if name.startswith("on")]
    assert page.details(0)["generated text"].startswith(HOSTILE)
    assert page.records()[0]["label"] == HOSTILE
    assert HOSTILE in page.rows["c1"]
    assert page.text.count(HOSTILE) >= 8


def test_the_page_loads_nothing_and_runs_only_its_own_scripts(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    made.measured("none", 100.0)
    page = made.page()
    assert page.attributes("src") == []
    assert all(target.startswith("#") for target in page.attributes("href"))
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))
    assert {target[1:] for target in page.attributes("href")} <= set(ids)
    source = made.write().read_text()
    style = source[source.index("<style>") : source.index("</style>")]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(str(found["content"]) for tag, found in page.tags if tag == "meta" and "http-equiv" in found)
    assert "default-src 'none'" in policy
    run = [text for name, text in page.scripts.items() if name not in ("charts", "details")]
    assert run[0] == SCRIPT
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in run]
    assert re.findall(r"'sha256-([^']+)'", policy) == hashes


def test_headings_can_be_sorted_by_keyboard_and_say_so(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    made.measured("none", 100.0)
    source = made.write().read_text()
    heads = re.findall(r"<th scope=\"col\" aria-sort=\"(\w+)\"[^>]*><button type=\"button\"", source)
    assert heads[0] == "ascending"
    assert len(heads) > 10
    assert set(heads[1:]) == {"none"}
    assert '<th scope="row"><span class="name">none</span>' in source


def test_without_a_measured_cell(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    made.result(made.cell("hqq4"), "oom", "needs 90 GB")
    made.cell("fp8_wo", "PRUNED", "this CPU has no fp8", "fp8_needs_a_gpu")
    page = made.page()
    assert "No cell has a number." in page.text
    assert "no cell has a speed" in page.text
    assert page.charts() == {}
    assert set(page.rows) == {"c0", "c1"}


def test_without_quality_there_is_no_front(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    metrics = {"metrics": {"decode_tok_s": 100.0}, "missing": {"mean_kld": "quality=off"}}
    made.measured("none", 100.0, metrics=metrics)
    page = made.page()
    assert "Quality was not measured" in page.text
    assert "no cell of this table has a mean KLD (quality=off)" in page.text
    assert set(page.charts()) == {"bars-1"}


def test_charts_hold_the_numbers(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    made.measured("none", 100.0, 0.0)
    made.measured("int8_wo", 150.0, 0.01)
    made.measured("int8_wo", 120.0, 0.02)
    page = made.page()
    values = {value["label"]: value for value in page.records()}
    # Two cells of one name would be one bar.
    assert set(values) == {"none", "int8_wo (cell 1)", "int8_wo (cell 2)"}
    assert (values["none"]["kld"], values["none"]["shown_kld"]) == (0.0, KLD_FLOOR)
    assert {label for label, value in values.items() if value.get("front")} == {"none", "int8_wo (cell 1)"}
    assert (values["none"]["low"], values["none"]["high"]) == (99.0, 101.0)
    assert "1 cell is below 1e-06 and drawn there" in page.text


def test_a_table_per_model_and_workload(sweep: Callable[..., Sweep]) -> None:
    made = sweep(notes={"tiny": "Random weights."})
    made.measured("none", 100.0)
    other = made.cell("none", model="large")
    made.result(other, "oom", "needs 90 GB")
    page = made.page()
    assert [tag for tag, found in page.tags if found.get("class") == "cells"] == ["table", "table"]
    assert page.text.count("large, chat") >= 3
    assert page.text.count("Note on large") == 0


def test_pruned_cells_and_missing_numbers_are_grouped_by_reason(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    for name in ("none", "int8_wo"):
        made.measured(name, 100.0)
    for name in ("a", "b", "c", "d"):
        made.cell(name, "PRUNED", "this CPU has no fp8", "fp8_needs_a_gpu")
    made.cell("e", "PRUNED", "another reason", "other_rule")
    text = made.page().text
    section = text[text.index("could not have given a number") : text.index("env_id")]
    assert section.count("this CPU has no fp8") == 1
    assert "4 cells" in section
    assert "a; b; c; d" in section
    assert "other_rule" in section
    lacking = text[text.index("Numbers that measured cells lack") :]
    assert lacking.count("no meter") == 1
    assert "none; int8_wo" in lacking


def test_every_environment_is_shown(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    card = {"name": "H200", "uuid": "1", "driver": "580", "memory_bytes": 141e9, "compute_capability": "9.0"}
    made.measured("none", 100.0)
    made.measured("int8_wo", 100.0, env={**ENVIRONMENT, "host": "node2"})
    assert "environment 2" not in made.page().text
    made.measured("int4_wo", 100.0, env={**ENVIRONMENT, "gpus": [card, {**card, "uuid": "2"}]})
    text = made.page().text
    for words in ("environment 2", "node1, node2", "2 × H200, 141 GB, driver 580", "Some CPU", "2.13.0", "c0ffee"):
        assert words in text


def test_damaged_files_are_reported_and_do_not_stop_it(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    index = made.measured("none", 100.0)
    made.measured("int8_wo", 120.0, effective={"weights": 7, "compiler": None, "peaks": [1]}, text={"text": 3})
    (made.store.run_folder(f"{index:012x}", "e0") / "attempt-1" / "effective.json").write_text("{")
    page = made.page()
    assert "effective.json: is not whole JSON" in page.text
    assert set(page.rows) == {"c0", "c1"}


def test_a_thousand_cells_fit(sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "bundle", lambda: SCRIPT + " " * 900_000)
    made = sweep()
    for index in range(900):
        name = f"quantizer{index % 12} inductor_max_autotune static group_size={index}"
        phases = dict.fromkeys(("import", "load", "quantize", "audit", "warm up", "measure"), 1.2345 + index)
        made.measured(
            name, 100.0 + index, 0.001 * index, text={"text": f"{index} " * 500}, verdict={"phases_s": phases}
        )
    for index in range(100):
        made.cell(f"pruned{index} inductor dynamic", "PRUNED", "compiles fixed shapes, and the cache grows", "shapes")
    # A guard against something quadratic, and CPU time, so that a busy machine does not trip it.
    started = time.process_time()
    file = made.write()
    assert time.process_time() - started < 10
    assert file.stat().st_size < 2_000_000
    page = Page(file.read_text())
    assert len(page.rows) == 1000
    assert set(page.charts()) == {"bars-1", "pareto-1", "parallel-1"}
    assert "To keep this file small" in page.text
    assert page.details(899)["run_id"] == f"{899:012x}"


def test_without_the_charts_package(sweep: Callable[..., Sweep], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(html, "bundle", lambda: None)
    made = sweep()
    made.measured("none", 100.0)
    page = made.page()
    assert "vl-convert-python is not installed" in page.text
    assert set(page.rows) == {"c0"}


def test_the_bundle_is_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("vl_convert")
    made = []

    def javascript_bundle() -> str:
        made.append(1)
        return f'"</Script><!--";\r\n{vega.ENTRY}0'

    monkeypatch.setenv("LBI_CACHE", str(tmp_path))
    monkeypatch.setattr(package, "javascript_bundle", javascript_bundle)
    assert vega.bundle() == vega.bundle() == f'"<\\/Script><\\!--";\n{vega.ENTRY}0'
    assert len(made) == 1
    next(tmp_path.iterdir()).write_text("cut off")
    assert vega.bundle() is not None
    assert len(made) == 2
    monkeypatch.setattr(vega, "PACKAGE", "a-package-that-nobody-has")
    assert vega.bundle() is None


def test_against_another_sweep_and_another_environment(sweep: Callable[..., Sweep]) -> None:
    made = sweep()
    made.measured("none", 100.0)
    made.measured("int8_wo", 150.0)
    made.measured("hqq4", 80.0)
    made.measured("int4_wo", 60.0)
    made.result(made.cell("fp8_wo"), "oom", "needs 90 GB")
    made.page()
    # The same cells elsewhere: one as fast, one slower, one faster, one without a number.
    for index, speed in ((0, 100.5), (1, 120.0), (2, 99.0)):
        folder = made.store.run_folder(f"{index:012x}", "e1") / "attempt-1"
        folder.mkdir(parents=True)
        numbers = {
            "decode_tok_s": speed,
            "decode_tok_s_lo": speed - 1,
            "decode_tok_s_hi": speed + 1,
            "repetitions": 5.0,
        }
        (folder / "metrics.json").write_text(json.dumps({"schema": 1, "metrics": numbers}))
        outcome = {"schema": 1, "run_id": f"{index:012x}", "status": "ok", "reason": "", "attempt": 1}
        (folder.parent / "status.json").write_text(json.dumps(outcome | {"finished": 1.0, "seconds": 1.0}))
    found = compare(made.store, SWEEP, rows(made.store, SWEEP), "e1")
    assert [(pair.row["name"], pair.verdict) for pair in found.pairs] == [
        ("hqq4", "slower"), ("none", "tie"), ("int8_wo", "faster"),
    ]  # fmt: skip
    assert [row["name"] for row in found.alone] == ["int4_wo"]
    made.lines[0]["against"] = "e1"
    page = made.page()
    words = (
        "Of 3 cells measured here and in environment e1: 1 faster beyond noise, 1 slower beyond noise, 1 within noise."
    )
    assert words in page.text
    assert "1.25 (1.23 to 1.27)" in page.text
    assert "#against" in page.attributes("href")
    itself = compare(made.store, SWEEP, rows(made.store, SWEEP), SWEEP)
    assert {pair.verdict for pair in itself.pairs} == {"tie"}
    assert resolve(made.store, "e1") == "e1"
    with pytest.raises(InputError, match="neither a sweep nor an env_id"):
        resolve(made.store, "nonsense")


READER = """
addEventListener("load", () => setTimeout(async () => {
  const pause = () => new Promise((done) => setTimeout(done, 300));
  const body = document.querySelector("#cells-1 tbody");
  const shown = () => [...body.rows].filter((row) => row.id && !row.hidden).map((row) => row.id);
  const marks = (chart) => document.querySelectorAll(`[data-chart="${chart}-1"] .mark-symbol.role-mark path`).length;
  const choose = (list, value) => {
    list.value = value;
    list.dispatchEvent(new Event("input", { bubbles: true }));
  };
  const seen = { width: innerWidth, page: document.documentElement.scrollWidth };
  seen.before = document.querySelectorAll(".chart svg").length;
  // What is printed is drawn, in view or not.
  dispatchEvent(new Event("beforeprint"));
  const wanting = () => [...document.querySelectorAll(".chart")].some((chart) => !chart.querySelector("svg"));
  for (let turn = 0; turn < 30 && wanting(); turn++) await pause();
  seen.charts = document.querySelectorAll(".chart svg").length;
  seen.ranked = shown();
  [...document.querySelectorAll("#cells-1 thead button")].find((head) => head.textContent === "cell").click();
  seen.planned = shown();
  const dot = document.querySelector('[data-chart="roofline-1"] .mark-symbol path');
  if (dot) {
    const { x, y } = dot.getBoundingClientRect();
    const there = { bubbles: true, clientX: x + 2, clientY: y + 2 };
    for (const kind of ["pointerover", "pointermove"]) dot.dispatchEvent(new PointerEvent(kind, there));
    for (const kind of ["mouseover", "mousemove"]) dot.dispatchEvent(new MouseEvent(kind, there));
    await pause();
    seen.hover = document.querySelector("#vg-tooltip-element")?.textContent;
  }
  seen.dots = marks("roofline");
  seen.kinds = document.querySelectorAll('[data-chart="kernels-1"] .mark-rect.role-mark path').length;
  const controls = document.querySelector(".filter");
  choose(controls.querySelector("select.by"), "cache");
  seen.groups = [...body.querySelectorAll("tr.group")].map((row) => row.textContent);
  choose(controls.querySelector('[data-group="quantizer"]'), "hqq4");
  await pause();
  seen.chosen = shown();
  seen.said = controls.querySelector("output").textContent;
  seen.fewer = marks("roofline");
  choose(controls.querySelector('[data-group="quantizer"]'), "");
  for (const pick of [...document.querySelectorAll("#cells-1 .pick")].slice(0, 2)) pick.click();
  seen.beside = document.querySelector("#beside-1").innerText;
  // The accessibility tree has no rows of a table without a layout.
  const laid = () => getComputedStyle(document.querySelector(".tall")).contentVisibility;
  for (let turn = 0; turn < 20 && laid() !== "visible"; turn++) await pause();
  seen.laid = laid();
  document.body.dataset.seen = JSON.stringify(seen);
}, 700));
"""
"""Uses the page as a reader would, and leaves what there was to see in an attribute of the body."""


class Browser:
    """Headless Chromium without a network; what it complains of is a failure."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("vl_convert")
        found = shutil.which("chromium") or shutil.which("google-chrome")
        if found is None:
            pytest.skip("there is no chromium here")
        self.program, self.folder = found, folder
        own = html._file
        monkeypatch.setattr(html, "_file", lambda name: own(name) + (READER if name == "page.js" else ""))

    def read(self, file: Path, *more: str) -> dict[str, Any]:
        """What `READER` saw; `dom` is the page afterwards."""
        quiet = "--disable-gpu --disable-dev-shm-usage --disable-background-networking --no-first-run --no-sandbox"
        logged = "--enable-logging=stderr --v=0 --virtual-time-budget=30000"
        command = [self.program, "--headless", *quiet.split(), *logged.split(), f"--user-data-dir={self.folder}"]
        done = subprocess.run(
            [*command, *more, "--dump-dom", file.as_uri()], capture_output=True, text=True, timeout=90, check=True
        )
        assert "CONSOLE" not in done.stderr, done.stderr
        seen = re.search(r'data-seen="([^"]*)"', done.stdout)
        assert seen is not None
        return {**json.loads(unescape(seen.group(1))), "dom": done.stdout}


@pytest.fixture
def browser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Browser:
    return Browser(tmp_path / "profile", monkeypatch)


def numbered(speed: float, kld: float, read: float) -> dict[str, Any]:
    """Metrics of a cell that has a place on the roofline, of a memory with 42 GB/s."""
    numbers = {"decode_tok_s": speed, "decode_tok_s_lo": speed - 1, "decode_tok_s_hi": speed + 1, "mean_kld": kld}
    numbers |= {"bytes_per_token": read, "mbu_measured": speed * read / 42e9, "bits_per_weight": read / 1e7}
    return {"metrics": {**numbers, "repetitions": 5.0, "interval_coverage": 0.9375}, "missing": {}}


def test_a_browser_draws_it_without_a_complaint(tmp_path: Path, browser: Browser) -> None:
    made = Sweep(tmp_path / "store")
    made.measured(HOSTILE, 100.0, 0.0, text={"text": HOSTILE})
    made.measured("int8_wo", 150.0)
    one_repetition = {"metrics": {"decode_tok_s": 7.0, "repetitions": 1.0}, "missing": {}}
    made.result(made.cell("none", model="other"), metrics=one_repetition)
    seen = browser.read(made.write())
    assert seen["charts"] >= 3
    assert seen["dom"].count('class="more"') == 3


def test_a_reader_sorts_points_filters_groups_and_compares(tmp_path: Path, browser: Browser) -> None:
    made = Sweep(tmp_path / "store")
    for number, (name, cache, speed) in enumerate(
        [("none", "dynamic", 90.0), ("none", "static", 95.0), ("hqq4", "dynamic", 40.0), ("hqq4", "static", 120.0)]
    ):
        index = made.cell(name, cache=cache)
        text = {"text": f"text number {number}"}
        taken = {"kinds_ms": {"products": 5.0, "norms": 1.0}, "outside_ms": 2.0, "time": "of the CPU"}
        files = {"metrics": numbered(speed, 0.01 * number, 270e6 - 1e8 * (name == "hqq4")), "text": text}
        made.result(index, **files, effective={"timeline": taken})
    seen = browser.read(made.write(), "--window-size=1300,2000")
    assert seen["ranked"] == ["c3", "c1", "c0", "c2"]
    assert seen["planned"] == ["c0", "c1", "c2", "c3"]
    assert seen["charts"] == 5
    assert seen["laid"] == "visible"
    assert "MBU" in seen["hover"]
    assert seen["dots"] == 4
    assert seen["kinds"] == 4 * 3
    assert seen["groups"] == [
        "cache dynamic: 2 cells, the fastest 90 tok/s",
        "cache static: 2 cells, the fastest 120 tok/s",
    ]
    assert seen["chosen"] == ["c2", "c3"]
    assert seen["said"] == "2 of 4 rows"
    assert seen["fewer"] == 2
    assert "Side by side: 2 cells" in seen["beside"]
    assert "text number 0" in seen["beside"]
    assert "text number 2" in seen["beside"]
    assert "The same in all: " in seen["beside"]


THOUSAND = """
addEventListener("load", () => setTimeout(() => {
  const body = document.querySelector("#cells-1 tbody");
  const rows = () => [...body.rows].filter((row) => row.id && !row.hidden);
  const seen = { rows: rows().length, drawn: document.querySelectorAll(".chart svg").length };
  // A table that is far from view has no layout, and its rows must be found all the same.
  const last = rows().at(-1);
  last.querySelector("button.more").focus();
  seen.focused = document.activeElement.closest("tr").id === last.id;
  last.scrollIntoView();
  seen.reached = last.getBoundingClientRect().height > 0 && last.getBoundingClientRect().top < innerHeight;
  last.querySelector("button.more").click();
  seen.details = last.nextElementSibling.innerText;
  const heads = [...document.querySelectorAll("#cells-1 thead button")];
  heads.find((head) => head.textContent === "cell").click();
  seen.planned = rows().map((row) => Number(row.id.slice(1)));
  heads.find((head) => head.textContent === "mean KLD").click();
  seen.least = rows()[0].id;
  const controls = document.querySelector(".filter");
  controls.querySelector("input").value = "group_size=77";
  controls.querySelector("input").dispatchEvent(new Event("input", { bubbles: true }));
  seen.found = rows().map((row) => row.id).sort();
  seen.said = controls.querySelector("output").textContent;
  document.body.dataset.seen = JSON.stringify(seen);
}, 700));
"""


@pytest.mark.slow
def test_a_thousand_rows_can_be_reached_sorted_and_filtered(
    tmp_path: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Sweep(tmp_path / "store")
    for index in range(1000):
        numbers = numbered(100.0 + (index * 7919) % 1000, 0.001 * (1 + (index * 31) % 1000), 270e6)
        made.result(made.cell(f"quantizer{index % 12} group_size={index}"), metrics=numbers)
    monkeypatch.setattr(f"{__name__}.READER", THOUSAND)
    seen = browser.read(made.write(), "--window-size=1300,700")
    assert seen["rows"] == 1000
    assert seen["drawn"] <= 2
    assert seen["focused"]
    assert seen["reached"]
    # The slowest cell is the last of the ranked rows.
    slowest = min(range(1000), key=lambda index: (index * 7919) % 1000)
    assert f"{slowest:012x}" in seen["details"]
    assert seen["planned"] == list(range(1000))
    assert seen["least"] == "c0"
    assert seen["found"] == sorted(["c77", *(f"c77{digit}" for digit in range(10))])
    assert seen["said"] == "11 of 1000 rows"


def test_a_narrow_window_scrolls_the_table_and_not_the_page(tmp_path: Path, browser: Browser) -> None:
    made = Sweep(tmp_path / "store")
    for name in ("none", "int4_wo", "hqq4"):
        made.result(made.cell(f"{name} inductor_max_autotune"), metrics=numbered(90.0 + len(name), 0.01, 270e6))
    seen = browser.read(made.write(), "--window-size=400,900")
    assert seen["width"] <= 500
    assert seen["page"] <= seen["width"]
