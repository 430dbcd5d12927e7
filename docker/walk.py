#!/usr/bin/env python3
"""Walks through the Dockerfile without a container engine, where none can run.

    docker/walk.py context FOLDER      what a builder would be sent: this folder less .dockerignore
    docker/walk.py build ROOT FOLDER   every step, in copies of the root file system ROOT (needs root, Linux)
        [--target STAGE] [--build-arg NAME=VALUE] [--env NAME=VALUE] [--bind PATH]
    docker/walk.py run FOLDER STAGE [--env NAME=VALUE] [--bind PATH] [-- COMMAND]

`debootstrap --variant=minbase bookworm ROOT` makes a root file system. --env and --bind reach the steps without being
kept, as a builder's proxy settings do. The result is FOLDER/STAGE, and FOLDER/STAGE.json with its variables, user,
entry point and command, which `run` starts it with. It is no image: there are no layers, no metadata and no CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).resolve().parent.parent
VARIABLE = re.compile(r"\$(?:\{(\w+)\}|(\w+))")
INSIDE = 'cd "$1" && shift && exec "$@"'


@dataclass(frozen=True)
class Step:
    """One instruction with its continued lines joined; `line` is where it starts."""

    line: int
    name: str
    rest: str

    def words(self) -> list[str]:
        """The arguments: a JSON list, or shell words."""
        if self.rest.startswith("["):
            return list(json.loads(self.rest))
        return shlex.split(self.rest)

    def pairs(self) -> list[tuple[str, str | None]]:
        """NAME=VALUE of ENV and ARG; None for a name alone."""
        split = (word.partition("=") for word in self.words())
        return [(name, value if equals else None) for name, equals, value in split]


@dataclass
class Stage:
    """What a stage has inherited and set so far."""

    name: str
    base: str
    steps: list[Step]
    env: dict[str, str] = field(default_factory=dict)
    user: str = "0:0"
    folder: str = "/"
    shell: list[str] = field(default_factory=lambda: ["/bin/sh", "-c"])
    entrypoint: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)


def parse(text: str) -> list[Step]:
    """The instructions of a Dockerfile; comments between continued lines are left out, as builders do."""
    steps, start, joined = [], 0, ""
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("#") or not (line.strip() or joined):
            continue
        start = start if joined else number
        if line.rstrip().endswith("\\"):
            joined += line.rstrip()[:-1]
            continue
        name, _, rest = (joined + line).strip().partition(" ")
        steps.append(Step(start, name.upper(), rest.strip()))
        joined = ""
    return steps


def expand(text: str, values: Mapping[str, str]) -> str:
    """Put variables in; one that nobody defined raises KeyError, which a builder would take for empty."""
    return VARIABLE.sub(lambda found: values[found[1] or found[2]], text)


def stages(steps: list[Step], given: Mapping[str, str]) -> tuple[dict[str, Stage], dict[str, str]]:
    """Stages by name, in order, and the arguments declared before the first of them."""
    before: dict[str, str] = {}
    found: dict[str, Stage] = {}
    for step in steps:
        if step.name == "ARG" and not found:
            before |= {name: given.get(name, value or "") for name, value in step.pairs()}
        elif step.name == "FROM":
            base, _, name = step.words()
            found[name] = Stage(name, expand(base, before), [])
        else:
            found[list(found)[-1]].steps.append(step)
    return found, before


def ignored(path: str, patterns: list[str]) -> bool:
    """Whether .dockerignore leaves a file out: the last pattern that matches it or a folder above it decides."""
    out = False
    for pattern in patterns:
        keep = pattern.startswith("!")
        regex = _regex(pattern.lstrip("!").strip("/"))
        parts = path.split("/")
        if any(regex.fullmatch("/".join(parts[:count])) for count in range(1, len(parts) + 1)):
            out = not keep
    return out


def _regex(pattern: str) -> re.Pattern[str]:
    text = re.escape(pattern).replace(r"\*\*/", "(?:.*/)?").replace(r"\*\*", ".*")
    return re.compile(text.replace(r"\*", "[^/]*").replace(r"\?", "[^/]"))


def context(source: Path) -> Iterator[str]:
    """The files and links below `source` that a builder would be sent."""
    lines = (source / ".dockerignore").read_text().splitlines()
    patterns = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    for folder, folders, files in os.walk(source):
        links = [name for name in folders if (Path(folder) / name).is_symlink()]
        for name in [*files, *links]:
            path = (Path(folder) / name).relative_to(source).as_posix()
            if not ignored(path, patterns):
                yield path


def copy_context(source: Path, target: Path) -> None:
    """A folder with exactly what a builder would be sent."""
    for path in context(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / path, target / path, follow_symlinks=False)


def build(root: Path, folder: Path, target: str | None, given: Mapping[str, str], extra: Extra) -> None:
    """Walk every stage that the target needs. Stages are copies; one that nobody else needs is handed on."""
    folder.mkdir(parents=True)
    copy_context(HERE, folder / "context")
    found, _ = stages(parse((HERE / "Dockerfile").read_text()), given)
    needed = _needed(found, target or list(found)[-1])
    for stage in (found[name] for name in needed):
        place = folder / stage.name
        parent = found.get(stage.base)
        later = [other for other in needed if other != stage.name and found[other].base == stage.base]
        last = not any(needed.index(other) > needed.index(stage.name) for other in later)
        if parent:
            stage.env, stage.shell = dict(parent.env), parent.shell
            stage.entrypoint, stage.command = parent.entrypoint, parent.command
            stage.folder, stage.user = parent.folder, parent.user
        source = folder / stage.base if parent else root
        if parent and last:
            source.rename(place)
        else:
            subprocess.run(["cp", "-a", "--reflink=auto", str(source), str(place)], check=True)
        arguments: dict[str, str] = {}
        for step in stage.steps:
            print(f"{stage.name}, line {step.line}: {step.name} {step.rest[:100]}", flush=True)
            take(step, stage, place, folder, given, arguments, extra)
        kept = {"env": stage.env, "user": stage.user, "folder": stage.folder}
        run = {"entrypoint": stage.entrypoint, "command": stage.command}
        (folder / f"{stage.name}.json").write_text(json.dumps(kept | run, indent=1))


@dataclass(frozen=True)
class Extra:
    """What reaches the steps and is not kept."""

    env: Mapping[str, str]
    binds: list[str]


def _needed(found: Mapping[str, Stage], target: str) -> list[str]:
    """The target, what it builds on and what it copies from, in the file's order."""
    names, waiting = set(), [target]
    while waiting:
        stage = found[waiting.pop()]
        names.add(stage.name)
        copies = re.findall(r"--from=(\S+)", " ".join(step.rest for step in stage.steps if step.name == "COPY"))
        waiting += [name for name in (stage.base, *copies) if name in found and name not in names]
    return [name for name in found if name in names]


def take(
    step: Step,
    stage: Stage,
    place: Path,
    folder: Path,
    given: Mapping[str, str],
    arguments: dict[str, str],
    extra: Extra,
) -> None:
    """Carry out one instruction."""
    values = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"} | arguments | stage.env
    match step.name:
        case "ARG":
            arguments |= {name: given.get(name, value or "") for name, value in step.pairs()}
        case "ENV":
            stage.env |= {name: expand(value or "", values) for name, value in step.pairs()}
        case "SHELL":
            stage.shell = step.words()
        case "USER":
            stage.user = step.rest
        case "WORKDIR":
            stage.folder = step.rest
            (place / step.rest.lstrip("/")).mkdir(parents=True, exist_ok=True)
        case "ENTRYPOINT":
            stage.entrypoint, stage.command = step.words(), []
        case "CMD":
            stage.command = step.words()
        case "COPY":
            _copy(step, stage, place, folder)
        case "RUN":
            command = [*stage.shell, step.rest]
            subprocess.run(_inside(place, stage, values | dict(extra.env), extra.binds, command), check=True)
        case "VOLUME" | "EXPOSE" | "HEALTHCHECK" | "LABEL":
            pass
        case _:
            sys.exit(f"Dockerfile, line {step.line}: docker/walk.py does not know {step.name}")


def _copy(step: Step, stage: Stage, place: Path, folder: Path) -> None:
    words = step.words()
    origin = next((word.removeprefix("--from=") for word in words if word.startswith("--from=")), "context")
    *sources, target = [word for word in words if not word.startswith("--")]
    to = place / os.path.join(stage.folder, target).lstrip("/")
    for source in sources:
        path = folder / origin / source.lstrip("/")
        into = to / path.name if path.is_file() and (target.endswith("/") or to.is_dir()) else to
        into.parent.mkdir(parents=True, exist_ok=True)
        # A folder's content is copied, not the folder.
        command = ["cp", "-a", "--no-preserve=ownership", f"{path}/." if path.is_dir() else str(path), str(into)]
        subprocess.run(command, check=True)


def _inside(place: Path, stage: Stage, values: Mapping[str, str], binds: list[str], command: list[str]) -> list[str]:
    """The command in the stage's root, as its user, with process and device files of its own."""
    mounts = f"mount -t proc proc {place}/proc && mount --rbind /dev {place}/dev"
    # Terminals as container engines make them: with the group that sshd wants, which it could not give them itself.
    mounts += f" && mount -t devpts -o newinstance,gid=5,mode=620,ptmxmode=666 devpts {place}/dev/pts"
    mounts += f" && mount --bind {place}/dev/pts/ptmx {place}/dev/ptmx"
    mounts += f" && cp /etc/resolv.conf {place}/etc/resolv.conf"
    for path in binds:
        mounts += f" && mkdir -p {place}{path} && mount --bind {path} {place}{path}"
    chroot = ["chroot", f"--userspec={stage.user}", str(place), "/usr/bin/env", "-i"]
    chroot += [f"{name}={value}" for name, value in values.items()]
    chroot += ["/bin/sh", "-c", INSIDE, "sh", stage.folder, *command]
    return ["unshare", "--mount", "--pid", "--fork", "sh", "-c", f"{mounts} && exec {shlex.join(chroot)}"]


def run(folder: Path, name: str, command: list[str], extra: Extra) -> int:
    """What "docker run IMAGE COMMAND" would, with the network of this machine."""
    facts = json.loads((folder / f"{name}.json").read_text())
    stage = Stage(name, "", [], user=facts["user"], folder=facts["folder"])
    words = [*facts["entrypoint"], *(command or facts["command"])]
    return subprocess.run(
        _inside(folder / name, stage, facts["env"] | dict(extra.env), extra.binds, words), check=False
    ).returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("context").add_argument("folder", type=Path)
    build_parser = verbs.add_parser("build")
    build_parser.add_argument("root", type=Path)
    build_parser.add_argument("folder", type=Path)
    build_parser.add_argument("--target")
    build_parser.add_argument("--build-arg", action="append", default=[])
    run_parser = verbs.add_parser("run")
    run_parser.add_argument("folder", type=Path)
    run_parser.add_argument("stage")
    for option in ("--env", "--bind"):
        build_parser.add_argument(option, action="append", default=[])
        run_parser.add_argument(option, action="append", default=[])
    options, _, command = " ".join(shlex.quote(word) for word in sys.argv[1:]).partition(" -- ")
    given = parser.parse_args(shlex.split(options))
    if given.verb == "context":
        copy_context(HERE, given.folder)
        return
    extra = Extra(dict(pair.split("=", 1) for pair in given.env), given.bind)
    if given.verb == "run":
        sys.exit(run(given.folder.absolute(), given.stage, shlex.split(command), extra))
    arguments = dict(pair.split("=", 1) for pair in given.build_arg)
    build(given.root.absolute(), given.folder.absolute(), given.target, arguments, extra)


if __name__ == "__main__":
    main()
