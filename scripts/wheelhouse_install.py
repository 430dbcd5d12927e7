#!/usr/bin/env python3
"""Installs a folder of `wheelhouse collect` on a machine without a network.

Nothing is installed that is not as it was collected, and nothing for another Python or machine than this. It ends with
`python -m lbi doctor`. PYTHON=... before ./scripts/wheelhouse, or before this file's own name, chooses the Python.

Needs Python 3.11 and pip, nothing else; `collect` puts a copy of this file beside the wheels.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import site
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from pip._vendor.packaging.requirements import Requirement

SCHEMA = 1
MANIFEST = "wheelhouse.json"

LEGACY = {"manylinux1": 5, "manylinux2010": 12, "manylinux2014": 17}
"""Old names of manylinux tags, and the glibc 2.N that they stand for."""


class Problem(Exception):
    """What the user must know, with the way out."""


def parts(tag: str) -> tuple[str, int, str]:
    """("manylinux_2", 28, "x86_64") of manylinux_2_28_x86_64."""
    old = re.fullmatch(r"(manylinux1|manylinux2010|manylinux2014)_(\w+)", tag)
    if old:
        return "manylinux_2", LEGACY[old[1]], old[2]
    new = re.fullmatch(r"(manylinux_2|musllinux_1)_(\d+)_(\w+)", tag)
    if not new:
        raise Problem(
            f"--platform {tag}: is none of manylinux_2_N_MACHINE and musllinux_1_N_MACHINE; "
            "N is the second number of the node's glibc, as `ldd --version` says there"
        )
    return new[1], int(new[2]), new[3]


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(folder: Path) -> dict[str, Any]:
    """The list of what was collected."""
    try:
        facts = json.loads((folder / MANIFEST).read_text())
    except (OSError, ValueError) as error:
        raise Problem(f"{folder} is no whole wheelhouse ({error}); collect or copy it again") from error
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        raise Problem(f"{folder / MANIFEST} is not of schema {SCHEMA}; use the install script that lies beside it")
    return facts


def check_python(facts: dict[str, Any]) -> None:
    here = ".".join(map(str, sys.version_info[:2]))
    if here != facts["python"]:
        raise Problem(f"these wheels are for Python {facts['python']}, this is {here}; name another one with PYTHON")


def check_machine(facts: dict[str, Any]) -> None:
    """Whether this machine runs what was collected for one of the platforms."""
    libc, version = platform.libc_ver()
    glibc = int(version.split(".")[1]) if libc == "glibc" else None
    for tag in facts["platforms"]:
        kind, newest, machine = parts(tag)
        fits = glibc is None if kind == "musllinux_1" else glibc is not None and glibc >= newest
        if machine == platform.machine() and fits:
            return
    here = f"{platform.machine()} with " + (f"glibc {version}" if glibc is not None else "another C library than glibc")
    raise Problem(f"these wheels are for {', '.join(facts['platforms'])}, this machine is {here}; collect for it")


def check_files(folder: Path, facts: dict[str, Any]) -> None:
    """Whether every file is there as it was collected."""
    wrong = []
    for row in facts["wheels"]:
        path = folder / row["file"]
        if not path.is_file():
            wrong.append(f"  {row['file']}: is missing")
        elif path.stat().st_size != row["size"]:
            wrong.append(f"  {row['file']}: has {path.stat().st_size} bytes instead of {row['size']}")
        elif sha256(path) != row["sha256"]:
            wrong.append(f"  {row['file']}: has another content than was collected")
    if wrong:
        lines = [f"{folder} is not as it was collected; nothing was installed:", *wrong, "Copy it again."]
        raise Problem("\n".join(lines))


def check_needs(facts: dict[str, Any], accept: bool) -> None:
    """Whether the node has what was left to it, torch for one."""
    missing, other = [], []
    for need in map(Requirement, facts["needs_of_the_node"]):
        try:
            version = metadata.version(need.name)
        except metadata.PackageNotFoundError:
            missing.append(f"  {need}: is not here")
            continue
        if not accept and not need.specifier.contains(version, prereleases=True):
            other.append(f"  {need}: {version} is here")
    if missing or other:
        lines = [f"{sys.executable} lacks what was left to the node:", *missing, *other]
        lines += ["Name a Python that has it with PYTHON, or collect it, too (--torch newest; not --leave-out)."]
        lines += ["--accept-versions tries other versions all the same."] if other else []
        raise Problem("\n".join(lines))


def make_venv(venv: Path, see_node: bool) -> str:
    """A new environment's Python. If something is left to the node, it sees this Python's packages, after its own."""
    # Without a pip of its own, which Debian's Python cannot give it: this Python's pip fills it.
    flags = ["--without-pip", *(["--system-site-packages"] if see_node else [])]
    if subprocess.run([sys.executable, "-m", "venv", *flags, str(venv)], check=False).returncode:
        raise Problem(f"no environment could be made in {venv}; use --target, which needs only pip")
    python = str(venv / "bin" / "python")
    if see_node:
        # Where this Python is an environment itself, the new one would see the packages of the Python below both.
        asked = "import sysconfig; print(sysconfig.get_path('purelib'))"
        place = subprocess.run([python, "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
        Path(place, "packages-of-the-node.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def install(folder: Path, venv: Path | None, target: Path | None, accept_versions: bool) -> None:
    """Check everything, install everything, ask lbi's doctor."""
    facts = manifest(folder)
    check_python(facts)
    check_machine(facts)
    check_files(folder, facts)
    check_needs(facts, accept_versions)
    # What a site has set for pip may name an index or links: the list is complete, and there is no network.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    env["PIP_CONFIG_FILE"] = os.devnull
    python = make_venv(venv, bool(facts["needs_of_the_node"])) if venv else sys.executable
    env["PIP_ROOT_USER_ACTION"] = "ignore"
    # What the environment sees of the node's packages would count as installed, until the node changes.
    where = ["--ignore-installed"] if venv else []
    if target:
        where = ["--target", str(target), "--upgrade"]
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(target), env.get("PYTHONPATH")]))
    files = [str(folder / row["file"]) for row in facts["wheels"]]
    command = [sys.executable, "-m", "pip", *(["--python", python] if venv else []), "install", "--quiet"]
    command += ["--disable-pip-version-check", "--no-index", "--no-deps"]
    if subprocess.run([*command, *where, *files], env=env, check=False).returncode:
        raise Problem("pip could not install the wheels; what it said is above")
    # Python looks into the current folder first: in a checkout, it would find that lbi.
    os.chdir(folder)
    check_installed(python, env, facts)
    print(f"{len(files)} packages are installed; lbi is run by")
    print(f"  {f'PYTHONPATH={target} ' if target else ''}{python} -m lbi", flush=True)
    code = subprocess.run([python, "-m", "lbi", "doctor"], env=env, check=False).returncode
    if code not in {0, 1}:
        raise Problem(f"lbi is installed, but its doctor ended with code {code}")


FOUND = """
import json, sys
from importlib import metadata
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
print(json.dumps({name: version(name) for name in sys.argv[1:]}))
"""


def check_installed(python: str, env: dict[str, str], facts: dict[str, Any]) -> None:
    """Whether Python now finds what was installed: a folder of PYTHONPATH may hold other versions, and comes first."""
    names = [row["name"] for row in facts["wheels"]]
    asked = subprocess.run([python, "-c", FOUND, *names], env=env, capture_output=True, text=True, check=True)
    found = json.loads(asked.stdout)
    wrong = [
        f"  {row['name']} {row['version']}: {found[row['name']] or 'none'} is found"
        for row in facts["wheels"]
        if found[row["name"]] != row["version"]
    ]
    if wrong:
        lines = ["installed, but Python finds other versions; look at PYTHONPATH:", *wrong]
        raise Problem("\n".join(lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    beside = Path(__file__).resolve().parent
    parser.add_argument(
        "folder", type=Path, nargs="?", default=beside, help="that of the wheels; this file's if not given"
    )
    into = parser.add_mutually_exclusive_group()
    into.add_argument("--target", type=Path, help="install into a folder for PYTHONPATH")
    into.add_argument("--venv", type=Path, help="install into an environment to make; with neither: this Python's own")
    parser.add_argument(
        "--accept-versions", action="store_true", help="whatever the versions of what was left to the node"
    )
    given = parser.parse_args()
    target, venv = (path and path.absolute() for path in (given.target, given.venv))
    try:
        install(given.folder.absolute(), venv, target, given.accept_versions)
    except Problem as problem:
        print(f"wheelhouse: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
