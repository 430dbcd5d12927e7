"""Makes HTML in which text cannot turn into markup.

Names, reasons and generated text come from other programs and from models. So a
string is always escaped, and only what `element` made is taken for markup.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable
from typing import Any

VOID = {"input", "meta"}


class Html(str):
    """Markup: text that `element` or `joined` has made and that is not escaped again."""

    __slots__ = ()


def element(name: str, *content: str, **attributes: str | bool | None) -> Html:
    """An element; `class_` is the class, `data_x` is data-x, and an attribute that is None or False is left out."""
    written = []
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        shown = key.rstrip("_").replace("_", "-")
        written.append(f" {shown}" if value is True else f' {shown}="{html.escape(value)}"')
    start = f"<{name}{''.join(written)}>"
    return Html(start) if name in VOID else Html(f"{start}{joined(content)}</{name}>")


def joined(parts: Iterable[str], between: str = "") -> Html:
    """Texts and markup one after the other."""
    return Html(escaped(between).join(escaped(part) for part in parts))


def escaped(text: str) -> Html:
    """The text as markup that shows it."""
    return text if isinstance(text, Html) else Html(html.escape(text, quote=False))


def paragraph(*content: str, class_: str | None = None) -> Html:
    """A paragraph."""
    return element("p", *content, class_=class_)


def grid(columns: Iterable[str], lines: Iterable[Iterable[str]], class_: str | None = None) -> Html:
    """A plain table whose first column names each line, in a box that scrolls by itself where it is too wide."""
    head = element("tr", *(element("th", column, scope="col") for column in columns))
    body = []
    for first, *rest in lines:
        body.append(element("tr", element("th", first, scope="row"), *(element("td", cell) for cell in rest)))
    table = element("table", element("thead", head), element("tbody", joined(body, "\n")), class_=class_)
    return element("div", table, class_="scroll")


def embedded_json(value: Any) -> str:
    """JSON that may stand inside a script element: no `<` is left that could end it."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
