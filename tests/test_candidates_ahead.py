"""An autotuner's candidates are compiled by several threads before they are timed, and only then."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core compiles when it times")
def test_candidates_are_compiled_before_they_are_timed(tmp_path: Path) -> None:
    script = Path(__file__).parent / "candidates_ahead.py"
    variables = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, env=variables, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, failing = ["candidate"] * 4 + ["timed"] * 4 + ["tuned"], ["candidate"] * 3 + ["timed"] * 4 + ["tuned"]
    # One of the second four does not compile; what was tuned is not compiled again.
    assert json.loads(done.stdout) == [*first, *failing, "tuned"]
