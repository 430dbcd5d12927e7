"""Keeps the code that a sweep was submitted with, so that a late or requeued job runs that code.

A job may begin hours after its sweep was submitted; by then the checkout may have moved on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from pathlib import Path


def take(folder: Path) -> Path:
    """A copy of the package below `folder`, named by its content; what to put on PYTHONPATH."""
    package = Path(__file__).resolve().parent
    files = sorted(path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    content = hashlib.sha256()
    for path in files:
        content.update(f"{path.relative_to(package)}\n{path.stat().st_size}\n".encode())
        content.update(path.read_bytes())
    target = folder / f"code-{content.hexdigest()[:12]}"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=folder, prefix=".code-"))
        scratch.chmod(0o755)
        for path in files:
            copy = scratch / package.name / path.relative_to(package)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)
        try:
            os.rename(scratch, target)
        except OSError:
            # Another driver was first, with the same content.
            shutil.rmtree(scratch, ignore_errors=True)
            if not target.exists():
                raise
    return target
