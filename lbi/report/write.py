"""Everything that a sweep's folder says of its results, made anew from the store: after a sweep, and for `lbi report`.

It knows nothing of Hydra, whose import would be a fifth of what a report of a thousand cells takes.
"""

from __future__ import annotations

from lbi.collect import Row, rows, write_tables
from lbi.report import html, terminal
from lbi.store import Store


def write_reports(store: Store, name: str) -> list[Row]:
    """Write the tables and the report of a sweep, and show the result; the rows."""
    table = rows(store, name)
    write_tables(store.sweep_folder(name), table)
    html.write(store, name, table)
    terminal.show_results(store, name, table)
    return table
