"""Compiles a C++ file of this folder once per machine, and loads it.

There is no build step when lbi is installed: a kernel for the processor at hand has to be
compiled on that processor, and whoever never asks for one needs no compiler. The library is
kept in the cache folder under a name made of everything that went into it, and put there by
one rename, so that any number of processes may ask at once.
"""

from __future__ import annotations

import ctypes
import logging
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from lbi import environment
from lbi.files import write_bytes
from lbi.identity import digest
from lbi.places import cache_folder

COMPILERS = ("g++", "clang++", "c++")
"""Looked for on the PATH, in this order."""

BASE = ("-O3", "-std=c++17", "-shared", "-fPIC")

EXTRAS = (("-march=native", "-fopenmp"), ("-march=native",), ())
"""Tried in turn: clang++ may come without OpenMP's library, and not know every processor."""

TIMEOUT_S = 300


class NoKernel(Exception):
    """There is no compiled form here; the message says why, for a person."""


def load(source: Path) -> ctypes.CDLL:
    """The compiled library of a C++ file. Raises `NoKernel` where it cannot be had; asks only once a process."""
    found = _outcome(source)
    if isinstance(found, str):
        raise NoKernel(found)
    return found


@cache
def _outcome(source: Path) -> ctypes.CDLL | str:
    compiler = next((path for name in COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        return f"there is no C++ compiler ({', '.join(COMPILERS)}) on the PATH"
    problem = ""
    for extra in EXTRAS:
        try:
            library = ctypes.CDLL(str(_built(source, compiler, (*BASE, *extra))))
        except (OSError, subprocess.SubprocessError) as error:
            problem = problem or _reason(error)
            continue
        if "-fopenmp" not in extra:
            logging.getLogger(__name__).warning("%s runs on one thread: %s", source.name, problem)
        return library
    return f"{compiler} does not compile {source.name}: {problem}"


def _built(source: Path, compiler: str, flags: tuple[str, ...]) -> Path:
    """The shared library, from the cache or new. Raises `OSError` or `SubprocessError`."""
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
    made_of = {"source": source.read_text(), "compiler": version.stdout, "flags": flags, "cpu": _processor()}
    target = cache_folder() / "kernels" / f"{source.stem}-{digest('kernel', made_of)}.so"
    if not target.exists():
        with tempfile.TemporaryDirectory(prefix="lbi-kernel-") as folder:
            output = Path(folder) / target.name
            command = [compiler, *flags, str(source), "-o", str(output)]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S)
            write_bytes(target, output.read_bytes())
    return target


def _processor() -> dict[str, str | None]:
    """What -march=native depends on: a cache folder may be shared by nodes that differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return {"model": environment.cpu_model(), "flags": flags}


def _reason(error: Exception) -> str:
    """The compiler's first error, or what kept it from running."""
    said = (error.stderr or "").splitlines() if isinstance(error, subprocess.CalledProcessError) else []
    return next((line for line in said if "error" in line), said[-1] if said else str(error))
