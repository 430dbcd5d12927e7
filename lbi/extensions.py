"""Which of torchao's compiled extensions a process has: some of its kernels are in there and nowhere else.

torchao says in its log that it could not load one, and goes on with slower code.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def torchao_extensions() -> dict[str, Any]:
    """Names of the `.so` files `loaded` and `failed`; `skipped` is why torchao tried none, where it did not."""
    import torch
    import torchao

    files = sorted(Path(torchao.__file__).parent.glob("_C*.so"))
    present = {str(path) for path in torch.ops.loaded_libraries}
    loaded = [file.name for file in files if str(file) in present]
    reason = str(getattr(torchao, "_skip_reason", None) or "")
    failed = [] if reason else [file.name for file in files if file.name not in loaded]
    return {"loaded": loaded, "failed": failed, "skipped": reason}


def in_words(found: dict[str, Any]) -> str:
    """One line about them."""
    total = len(found["loaded"]) + len(found["failed"])
    if found["skipped"]:
        return f"compiled extensions: {found['skipped']}"
    if not total:
        return "installed without compiled extensions"
    failed = f"; not loaded: {', '.join(found['failed'])}" if found["failed"] else ""
    return f"{len(found['loaded'])} of {total} compiled extensions loaded{failed}"
