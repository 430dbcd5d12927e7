"""How long a browser needs for the report of a large sweep: this checkout's, and another one's beside it.

    python benchmarks/report_load.py [--cells 1000] [--rounds 5] [--against CHECKOUT]

Writes a made-up sweep, renders it by each checkout, and loads the pages in turn in headless Chromium from disk, each
time in a fresh context. Shown are medians, with the range: the load event, the first moment at which a row's button
answers, and the last chart in view; then the seconds that the page's main thread computed, which others on the machine
disturb less. Needs the package playwright and Debian's chromium; neither is needed for anything else.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

HERE = Path(__file__).parent.parent
MODEL, SWEEP = "made-up", "large"
QUANTIZERS = 12
KINDS = ("products", "attention", "norms", "copies", "element by element")

TIMES = {
    "load_ms": "load event, ms",
    "usable_ms": "a row answers, ms",
    "charts_ms": "charts in view drawn, ms",
    "thread_s": "main thread, CPU s",
    "all_charts_ms": "scrolled past every chart, ms",
}

CLICK = """() => new Promise((done) => {
  const look = () => {
    const button = document.querySelector("#cells-1 button.more");
    if (!button) return setTimeout(look, 5);
    button.click();
    const open = document.querySelector("#cells-1 tr.detail");
    button.click();
    return open ? done(performance.now()) : setTimeout(look, 5);
  };
  look();
})"""

IN_VIEW = """(all) => new Promise((done) => {
  const boxes = [...document.querySelectorAll(".chart")];
  const seen = (box) => box.getBoundingClientRect().top < innerHeight;
  const look = () => boxes.filter((box) => all || seen(box)).every((box) => box.querySelector("svg"))
    ? requestAnimationFrame(() => done(performance.now())) : setTimeout(look, 5);
  look();
})"""

SCROLL = """async () => {
  const started = performance.now();
  for (const box of document.querySelectorAll(".chart")) {
    box.scrollIntoView();
    while (!box.querySelector("svg")) await new Promise((done) => setTimeout(done, 5));
  }
  return performance.now() - started;
}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cells", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="another checkout, whose report is loaded in turn with this one's")
    given = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("pip install playwright; it drives Debian's chromium", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_sweep(root / "store", given.cells)
        sides = {"this checkout": HERE, **({str(given.against): given.against} if given.against else {})}
        pages = {name: render(checkout, root, number) for number, (name, checkout) in enumerate(sides.items())}
        taken: dict[str, list[dict[str, float]]] = {name: [] for name in pages}
        load = os.getloadavg()[0]
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for number in range(-1, given.rounds):
                for name, page in pages.items():
                    times = visit(browser, page)
                    # The first visit of each warms the browser up.
                    if number >= 0:
                        taken[name].append(times)
            browser.close()
        show(taken, pages, given.cells, load)
    return 0


def write_sweep(root: Path, cells: int) -> None:
    """A store with `cells` results: nine in ten measured, the others pruned."""
    lines = [{"schema": 1, "sweep": SWEEP, "command": "made up", "planned": 1.7e9, "baseline": None, "max_kld": 0.05}]
    lines[0] |= {"notes": {}, "problems": []}
    for index in range(cells):
        quantizer, cache = f"quantizer{index % QUANTIZERS}", ("dynamic", "static")[index % 2]
        measured = index % 10 != 9
        choices = {"model": MODEL, "engine": "hf", "compiler": "eager", "decoding": "greedy", "cache": cache}
        choices |= {"workload": "chat", "quantizer": quantizer}
        line = {"index": index, "overrides": [f"quantizer={quantizer}", f"cache={cache}", f"group_size={index}"]}
        line |= {"choices": choices, "run_id": f"{index:012x}", "env_id": "e0", "rule": "" if measured else "shapes"}
        line |= {"verdict": "RUN" if measured else "PRUNED", "name": f"{quantizer} {cache} group_size={index}"}
        lines.append(line | {"reason": "" if measured else "compiles fixed shapes, and this cache grows"})
        if measured:
            write_result(root / "runs" / f"{index:012x}" / "e0", index)
    (root / "store.json").write_text(json.dumps({"schema": 1, "kind": "lbi store"}))
    plan = root / "sweeps" / SWEEP / "plan.jsonl"
    plan.parent.mkdir(parents=True)
    plan.write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_result(folder: Path, index: int) -> None:
    """A result like one of a run: numbers with intervals, layers, kernels, text."""
    speed, read = 20 + 300 * ((index * 7919) % 1000) / 1000, 1e8 * (1 + index % QUANTIZERS)
    numbers = {"decode_tok_s": speed, "decode_tok_s_lo": speed - 1, "decode_tok_s_hi": speed + 1, "repetitions": 5.0}
    numbers |= {"interval_coverage": 0.9375, "prefill_tok_s": 900.0 + index, "weight_bytes": read, "ppl_ratio": 1.01}
    numbers |= {"bits_per_weight": 4.0 + index % QUANTIZERS, "mean_kld": 1e-4 * (1 + index), "top1_agreement": 0.97}
    numbers |= {"bytes_per_token": read, "mbu_measured": speed * read / 4e11, "peak_memory_bytes": 1e9 + index}
    kernels = [{"name": f"kernel number {number}", "calls": 30.0, "share": 0.1} for number in range(6)]
    kind = {"kind": "Linear[Int8]", "bits": 8.0, "group_size": 32, "layers": 7, "params": 1000, "bytes": 1100}
    spent = dict.fromkeys(KINDS, 1000 / speed / 6)
    effective = {
        "weights": {"kinds": [{**kind, "quantized": True, "example": "q_proj"}]},
        "kernels": {"time": "of the GPU", "steps": 3, "ms_per_step": 1e3 / speed, "top": kernels},
        "timeline": {"time": "of the GPU", "kinds_ms": spent, "waiting_ms": 100 / speed},
        "compiler": {"graphs": 3, "graph_breaks": 0},
    }
    outcome = {"run_id": f"{index:012x}", "status": "ok", "reason": "", "attempt": 1, "finished": 1.7e9, "seconds": 3.0}
    phases = dict.fromkeys(("import", "load", "quantize", "audit", "measure"), 1.23 + index)
    files = {"metrics": {"metrics": numbers, "missing": {}, "phases_s": phases}, "effective": effective}
    files |= {"text": {"text": f"{index} is a number that a text may begin with. " * 20}, "env": {"cpu": "Some CPU"}}
    (folder / "attempt-1").mkdir(parents=True)
    (folder / "status.json").write_text(json.dumps({"schema": 1, **outcome}))
    for name, content in files.items():
        (folder / "attempt-1" / f"{name}.json").write_text(json.dumps({"schema": 1, **content}))


def render(checkout: Path, root: Path, number: int) -> Path:
    """The report as that checkout's code writes it."""
    code = "import sys; from lbi.report import html; from lbi.store import Store; "
    code += f"html.write(Store.open(sys.argv[1], write=True), '{SWEEP}')"
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    subprocess.run([sys.executable, "-c", code, str(root / "store")], check=True, env=environment, cwd=checkout)
    page = root / f"report-{number}.html"
    (root / "store" / "sweeps" / SWEEP / "report.html").rename(page)
    return page


def visit(browser: object, page: Path) -> dict[str, float]:
    """Load it as a reader would, and look at all of its charts afterwards."""
    context = browser.new_context(viewport={"width": 1400, "height": 900}, offline=True)  # type: ignore[attr-defined]
    tab = context.new_page()
    session = context.new_cdp_session(tab)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    tab.goto(page.as_uri(), wait_until="commit")
    times = {"usable_ms": tab.evaluate(CLICK), "charts_ms": tab.evaluate(IN_VIEW, False)}
    times["load_ms"] = tab.evaluate("() => performance.getEntriesByType('navigation')[0].loadEventEnd")
    known = {item["name"]: item["value"] for item in session.send("Performance.getMetrics")["metrics"]}
    times["thread_s"] = known["TaskDuration"]
    times["all_charts_ms"] = tab.evaluate(SCROLL)
    context.close()
    return times


def show(taken: dict[str, list[dict[str, float]]], pages: dict[str, Path], cells: int, load: float) -> None:
    """A column a checkout."""
    rounds = len(next(iter(taken.values())))
    loads = f"load {load:.1f} before, {os.getloadavg()[0]:.1f} after"
    print(f"{cells} cells, medians of {rounds} visits in turn (range); {loads}")
    print(f"{'':32}" + "".join(f"{name[-24:]:>26}" for name in taken))
    print(f"{'size, MB':32}" + "".join(f"{pages[name].stat().st_size / 1e6:>26.2f}" for name in taken))
    for key, words in TIMES.items():
        cells_of = []
        for visits in taken.values():
            values = [times[key] for times in visits]
            digits = 2 if key.endswith("_s") else 0
            cells_of.append(f"{median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})")
        print(f"{words:32}" + "".join(f"{text:>26}" for text in cells_of))


if __name__ == "__main__":
    raise SystemExit(main())
