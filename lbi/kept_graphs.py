"""Compiled graphs of earlier runs: a run's own folder while it compiles, the node's cache, the store's archives.

    <node cache>/<env_id>/{inductor,triton}/      what inductor and Triton have made here
    <node cache>/<env_id>/graphs/<key>.json       what each graph's cold compile took
    <node cache>/<env_id>/runs/<process>/         a run's own folder: links to the above, and what it adds
    <store>/compile_caches/<env_id>/<arch>/<key>/<sha256>.tar.gz

A run never compiles into the node's cache. It has links to its files in a folder of its own, and what
it adds becomes the node's when it has ended, a file by an atomic link: a run that is killed leaves nothing that is
half a file, and two slots cannot meet in one. The archive in the store is for nodes that have not
compiled the graph. It is named by its digest and read only if it has that digest; the env_id in its path
is of the versions and the device. What is missing, damaged or too much is a cold start, nothing else.

torch.compiler.save_cache_artifacts does not serve here: it leaves out the libraries that inductor builds on a
CPU, which are most of a compile there (docs/log.md).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import tarfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from lbi import environment
from lbi.config import LbiConfig
from lbi.files import BadFile, read_json, write_bytes, write_json
from lbi.graph_key import graph_key
from lbi.store import SCHEMA, process_is_dead, process_name

PARTS = {"inductor": "TORCHINDUCTOR_CACHE_DIR", "triton": "TRITON_CACHE_DIR"}
"""Folders of a cache, and the variable that names each to its library."""

TIMED = ".best_config"
"""Ends the files in which inductor keeps what its kernels were timed to be best with."""

NEW = ("cold", "mixed")
"""What `compilers.start_of` says where something was compiled."""

COLD = "graph.json"
"""In an archive: what the graph's cold compile took."""


def architecture() -> str:
    """What the code in a cache was made for: the GPU's compute capability, or the kind of processor."""
    capability = environment.capability()
    return f"sm{capability * 10:.0f}" if capability else platform.machine()


@dataclass(slots=True)
class KeptGraphs:
    """The compile cache of one run. `node` is the node's for its environment, `kept` the store's folder for it.

    `problems` says what could not be used or kept; the run goes on without it. A run that compiles `beside` so many
    others keeps nothing that it has timed.
    """

    key: str
    node: Path
    kept: Path | None
    most_bytes: int
    own: Path
    keeps: bool = True
    seeded: bool = False
    beside: int = 0
    problems: list[str] = field(default_factory=list)
    _before: set[Path] = field(default_factory=set)

    @classmethod
    def of(cls, config: LbiConfig, node: Path, store_folder: Path) -> KeptGraphs | None:
        """The cache that the cell's run is to have; None for a cell that compiles nothing."""
        key, mode = graph_key(config), config.resources.compile_cache
        if key is None:
            return None
        own = node / "runs" / process_name()
        if mode == "off":
            # Nothing is linked into its folder, and nothing of it kept.
            return cls(key, own / "none", None, 0, own, keeps=False)
        most_bytes = int(config.store.graphs_gb * 1e9)
        kept = store_folder / architecture() / key if mode == "store" and most_bytes else None
        return cls(key, node, kept, most_bytes, own)

    def open(self) -> None:
        """Fill the run's folder with what the node has, or else the store, and point the libraries to it."""
        _clear_dead(self.own.parent)
        for part, variable in PARTS.items():
            (self.own / part).mkdir(parents=True, exist_ok=True)
            os.environ[variable] = str(self.own / part)
        try:
            if self.kept is not None and not self._note().exists():
                self._seed(self.kept)
            for part in PARTS:
                _link_all(self.node / part, self.own / part)
        except OSError as error:
            self.problems.append(f"not all of the node's cache could be used ({error})")
        self._before = {file.relative_to(self.own) for file in _files(self.own)}

    def known(self) -> bool:
        """Whether an earlier run has compiled the graph, as far as names tell."""
        return self._note().exists() or (self.kept is not None and any(self.kept.glob("*.tar.gz")))

    def cold(self) -> dict[str, float]:
        """What the graph's cold compile took, as `close` was told, and beside how many others; empty if unknown."""
        try:
            found = read_json(self._note(), SCHEMA) or {}
        except BadFile:
            return {}
        numbers = {name: found.get(name) for name in ("phase_s", "compile_s", "beside")}
        return {name: float(value) for name, value in numbers.items() if isinstance(value, int | float)}

    def close(self, start: str | None, phase_s: float, compile_s: float | None) -> None:
        """Give the node what the run has added, the store a graph that was not found whole, and remove the folder.

        `start` is what `compilers.start_of` said; the seconds are those of a cold compile, if this was one. Without a
        start nothing was compiled to its end, and nothing is kept.
        """
        try:
            if start is not None and self.keeps:
                added = [file for file in _files(self.own) if self._is_for_others(file)]
                self._give_to_node(added)
                if start in NEW and added:
                    cold = {"schema": SCHEMA, "phase_s": phase_s, "compile_s": compile_s or 0.0, "beside": self.beside}
                    write_json(self._note(), cold)
                    if self.kept is not None:
                        self._give_to_store(self.kept, [*added, *self._used()], cold)
        except OSError as error:
            self.problems.append(f"not kept ({error})")
        finally:
            shutil.rmtree(self.own, ignore_errors=True)

    def _is_for_others(self, file: Path) -> bool:
        """Whether the run has made the file, and it says nothing that is only so beside others."""
        return file.relative_to(self.own) not in self._before and not (self.beside and file.suffix == TIMED)

    def _note(self) -> Path:
        return self.node / "graphs" / f"{self.key}.json"

    def _seed(self, kept: Path) -> None:
        """Unpack the store's archive into the node's cache."""
        for archive in sorted(kept.glob("*.tar.gz")):
            content = archive.read_bytes()
            if hashlib.sha256(content).hexdigest() != archive.name.removesuffix(".tar.gz"):
                self.problems.append(f"{archive} is damaged and was not used")
                continue
            scratch = self.own / "seed"
            try:
                cold = _unpack(content, scratch)
            except (tarfile.TarError, EOFError, ValueError, gzip.BadGzipFile) as error:
                self.problems.append(f"{archive} cannot be unpacked ({error})")
                continue
            for part in PARTS:
                _link_all(scratch / part, self.node / part)
            write_json(self._note(), cold)
            shutil.rmtree(scratch, ignore_errors=True)
            self.seeded = True
            with suppress(OSError):
                # What is used stays: eviction takes what was used least recently.
                os.utime(archive)
            return

    def _give_to_node(self, added: list[Path]) -> None:
        for file in added:
            target = self.node / file.relative_to(self.own)
            target.parent.mkdir(parents=True, exist_ok=True)
            _link(file, target)

    def _used(self) -> list[Path]:
        """Libraries of earlier graphs that this process has loaded: this graph needs them, too, where it goes next."""
        try:
            maps = Path("/proc/self/maps").read_text()
        except OSError:
            return []
        mapped = {Path(line.split(maxsplit=5)[5]) for line in maps.splitlines() if line.endswith(".so")}
        own = {file for file in mapped if file.is_relative_to(self.own)}
        return sorted(file for file in own if file.relative_to(self.own) in self._before)

    def _give_to_store(self, kept: Path, files: list[Path], cold: dict[str, Any]) -> None:
        if any(kept.glob("*.tar.gz")) and not self.problems:
            # Another run has given it, and this one found no fault with it.
            return
        content = _pack(self.own, files, cold)
        if len(content) > self.most_bytes:
            self.problems.append(f"not kept in the store: {len(content) / 1e9:.2f} GB are more than store.graphs_gb")
            return
        _make_room(kept.parent.parent.parent, self.most_bytes - len(content))
        for damaged in kept.glob("*.tar.gz"):
            damaged.unlink(missing_ok=True)
        write_bytes(kept / f"{hashlib.sha256(content).hexdigest()}.tar.gz", content)


def _pack(root: Path, files: list[Path], cold: dict[str, Any]) -> bytes:
    """The files as a tar, by their names under `root`."""
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w:gz", compresslevel=1) as archive:
        text = json.dumps(cold).encode()
        about = tarfile.TarInfo(COLD)
        about.size = len(text)
        archive.addfile(about, io.BytesIO(text))
        for file in files:
            archive.add(file, str(file.relative_to(root)), recursive=False)
    return made.getvalue()


def _unpack(content: bytes, folder: Path) -> dict[str, Any]:
    """Write the files of a tar under `folder`; what it says of its cold compile. `ValueError` for other content."""
    cold: dict[str, Any] | None = None
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:gz") as archive:
        for member in archive:
            name, stream = PurePosixPath(member.name), archive.extractfile(member) if member.isreg() else None
            if stream is None:
                raise ValueError(f"{member.name} is not a plain file")
            if member.name == COLD:
                cold = json.loads(stream.read())
                continue
            if name.is_absolute() or ".." in name.parts or name.parts[0] not in PARTS:
                raise ValueError(f"{member.name} lies outside of a cache")
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(stream.read())
            target.chmod(member.mode & 0o777)
    if not isinstance(cold, dict):
        raise ValueError("it does not say what it is")
    return cold


def _make_room(folder: Path, most_bytes: int) -> None:
    """Delete the archives used least recently, of every environment, until at most `most_bytes` are left."""
    found = []
    for file in folder.glob("*/*/*/*.tar.gz"):
        with suppress(OSError):
            found.append((file.stat().st_mtime, file.stat().st_size, file))
    total = sum(size for _, size, _ in found)
    for _, size, file in sorted(found):
        if total <= most_bytes:
            return
        file.unlink(missing_ok=True)
        total -= size


def _files(folder: Path) -> Iterator[Path]:
    """Files under a folder that are whole: locks and what is still being written are left out."""
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name not in ("locks", "seed")]
        for name in names:
            if not name.endswith((".lock", ".tmp")) and not name.startswith("."):
                yield Path(parent) / name


def _link_all(source: Path, target: Path) -> None:
    for file in _files(source):
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        _link(file, place)


def _link(source: Path, target: Path) -> None:
    """Have the file under another name too, whole or not at all; one that is there already stays."""
    try:
        os.link(source, target)
    except FileExistsError:
        return
    except OSError:
        # Another file system, or one without links.
        if not target.exists():
            write_bytes(target, source.read_bytes())
            shutil.copymode(source, target)


def _clear_dead(folder: Path) -> None:
    """Remove what runs have left that were killed."""
    for left in folder.glob("*"):
        if process_is_dead(left.name):
            shutil.rmtree(left, ignore_errors=True)
