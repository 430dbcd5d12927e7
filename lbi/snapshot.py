"""Keeps the code that a sweep was submitted with, so that a late or requeued job runs that code.

A job may begin hours after its sweep was submitted; by then the checkout may have moved on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from lbi.places import conf_folder

GROUPS = ("quantizer", "model")
"""Config groups that a run reads by itself: the parts of a mix, the option of an lm_head, a draft model."""


def files() -> dict[str, Path]:
    """Everything that can change what a run does, by its path in a copy: the package, and the options it may name.

    A wheel has the config groups inside the package, a checkout beside it; a copy has them beside it.
    """
    package, conf = Path(__file__).resolve().parent, conf_folder()
    found = {
        f"{package.name}/{path.relative_to(package).as_posix()}": path
        for path in package.rglob("*")
        if path.is_file() and not {"__pycache__", "conf"} & set(path.relative_to(package).parts[:-1])
    }
    found |= {f"conf/{group}/{path.name}": path for group in GROUPS for path in (conf / group).glob("*.yaml")}
    return dict(sorted(found.items()))


def identity() -> str:
    """12 hex digits of the code that this process was started from, whether it is a checkout, a copy or a wheel."""
    content = hashlib.sha256()
    for name, path in files().items():
        content.update(f"{name}\n{path.stat().st_size}\n".encode())
        content.update(path.read_bytes())
    return content.hexdigest()[:12]


def take(folder: Path, beside: Mapping[str, str] | None = None) -> Path:
    """A copy of the code below `folder`, named by its content; what to put on PYTHONPATH.

    `beside` are more files, by name, that lie beside the package in the copy.
    """
    more = "".join(f"{name}\n{text}\n" for name, text in sorted((beside or {}).items()))
    extra = f"-{hashlib.sha256(more.encode()).hexdigest()[:6]}" if more else ""
    target = folder / f"code-{identity()}{extra}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".code-"))
        scratch.chmod(0o755)
        for name, path in files().items():
            copy = scratch / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        for name, text in (beside or {}).items():
            (scratch / name).write_text(text)
        try:
            os.rename(scratch, target)
        except OSError:
            # Another driver was first, with the same content.
            shutil.rmtree(scratch, ignore_errors=True)
            if not target.exists():
                raise
    return target
