"""The JavaScript that draws the charts, taken from the package vl-convert-python.

It carries Vega, Vega-Lite and vega-embed, so that a report needs no network. Bundling
them takes longer than all the rest of a report; the text is kept in the cache folder.
"""

from __future__ import annotations

import contextlib
import re
from importlib import metadata
from pathlib import Path

from lbi.files import write_text
from lbi.places import cache_folder

PACKAGE = "vl-convert-python"

ENTRY = "window.vegaEmbed="
"""Every whole bundle ends by setting this."""


def bundle() -> str | None:
    """The script, safe inside a script element; None where the package is not installed."""
    try:
        version = metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return None
    kept = cache_folder() / f"vega-{version}.js"
    text = _kept(kept)
    if text is None:
        try:
            import vl_convert
        except ImportError:
            return None
        # The package's type stub demands an argument that the function does not need.
        text = _inside_script(vl_convert.javascript_bundle())  # type: ignore[call-arg]
        # A cache folder that cannot be written costs time at every report, and nothing else.
        with contextlib.suppress(OSError):
            write_text(kept, text)
    return text


def _kept(file: Path) -> str | None:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None
    return text if ENTRY in text else None


def _inside_script(text: str) -> str:
    """No sequence that ends or changes a script element, and no CR, which a browser would turn into LF."""
    text = re.sub(r"<(/script|!--)", r"<\\\1", text, flags=re.IGNORECASE)
    return text.replace("\r\n", "\n").replace("\r", "\n")
