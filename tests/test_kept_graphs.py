"""A graph is compiled once: by key, by node, by store; whatever goes wrong with what is kept is a cold start."""

from __future__ import annotations

import os
import random
import socket
import subprocess
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lbi import kept_graphs
from lbi.compilers import start_of
from lbi.config import LbiConfig
from lbi.graph_key import graph_key
from lbi.kept_graphs import KeptGraphs
from lbi.plan import Plan
from lbi.schedule import make_packs, make_units
from lbi.store import process_is_dead, process_name
from lbi.task_queue import TaskQueue
from lbi.worker import Task

MakePlan = Callable[..., Plan]
COMPILED = ("cache=static", "compiler=inductor", "quality=off")


def tasks_of(plan: Plan) -> list[Task]:
    return [task for unit in make_units(plan.cells) for task in unit.tasks]


def keys(plan: Plan) -> list[str | None]:
    return [graph_key(task.config) for task in tasks_of(plan)]


@pytest.mark.parametrize(
    ("arguments", "graphs"),
    [
        # generate() chooses outside of the forward pass; the loop's step has the choice in it.
        (("decoding=greedy,sampling",), 1),
        (("decoding=greedy,sampling", "engine=loop"), 2),
        (("measure.repetitions=2,3",), 1),
        (("model.seed=1,2",), 1),
        (("workload.new_tokens=8,9",), 2),
        (("workload.new_tokens=8,9", "cache.max_len=64"), 1),
        (("model.dtype=bfloat16,float32",), 2),
        (("quantizer=none,int8_wo",), 2),
        (("compiler=inductor", "+compiler.options.cpp.threads=1,2"), 2),
    ],
)
@pytest.mark.slow
def test_cells_share_a_graph_where_its_code_is_the_same(
    plan: MakePlan, arguments: tuple[str, ...], graphs: int
) -> None:
    found = keys(plan(*COMPILED, *arguments))
    assert len(found) == 2
    assert len(set(found)) == graphs


def test_what_is_not_compiled_has_no_graph(plan: MakePlan) -> None:
    assert keys(plan("compiler=eager", "cache=static,dynamic")) == [None, None]


def test_cells_of_one_graph_follow_each_other_after_the_plain_ones(plan: MakePlan) -> None:
    made = plan("quantizer=none,int8_wo", "compiler=eager,inductor", "cache=static", "decoding=greedy,sampling")
    names = [task.name for task in tasks_of(made)]
    assert names[0] == "none eager greedy"
    compiled = [name.split()[0] for name in names if "inductor" in name]
    assert compiled == ["none", "none", "int8_wo", "int8_wo"]


def test_a_pack_has_all_cells_of_its_graphs_and_none_is_longer_than_the_others(plan: MakePlan) -> None:
    made = plan(
        "quantizer=none,int8_wo,hqq4", "compiler=eager,inductor", "cache=static", "decoding=greedy,sampling",
        "resources.runs_per_job=4",
    )  # fmt: skip
    packs = make_packs(tasks_of(made))
    assert [len(pack) for pack in packs] == [4, 4, 4]
    places: dict[str, set[int]] = {}
    for number, pack in enumerate(packs):
        assert graph_key(pack[0].config) is None
        for task in pack:
            if key := graph_key(task.config):
                places.setdefault(key, set()).add(number)
    assert sorted(len(found) for found in places.values()) == [1, 1, 1]


def test_a_graph_with_more_cells_than_a_job_takes_is_torn(plan: MakePlan) -> None:
    made = plan(*COMPILED, "measure.repetitions=range(2,9)", "resources.runs_per_job=4")
    assert [len(pack) for pack in make_packs(tasks_of(made))] == [4, 3]


def test_two_slots_do_not_compile_one_graph_at_the_same_time(plan: MakePlan) -> None:
    tasks = tasks_of(plan(*COMPILED, "quantizer=none,int8_wo", "decoding=greedy,sampling"))
    queue = TaskQueue(tasks)
    first, second = queue.take(), queue.take()
    assert first is not None
    assert second is not None
    assert graph_key(first.config) != graph_key(second.config)
    queue.done(first)
    third = queue.take()
    assert third is not None
    assert graph_key(third.config) == graph_key(first.config)
    # Nothing else is left: better twice than not at all.
    assert queue.take() is not None
    assert queue.take() is None


def test_a_start_is_cold_warm_or_mixed() -> None:
    assert start_of({"cache_hits": 0, "cache_misses": 2}) == "cold"
    assert start_of({"cache_hits": 2, "cache_misses": 0}) == "warm"
    assert start_of({"cache_hits": 2, "cache_misses": 1}) == "mixed"


class Bench:
    """A node's cache and a store's folder for one environment."""

    def __init__(self, folder: Path, config: LbiConfig) -> None:
        self.node, self.store, self.config = folder / "node", folder / "compile_caches" / "env", config

    def open(self, **resources: Any) -> KeptGraphs:
        config = replace(self.config, resources=replace(self.config.resources, **resources))
        graphs = KeptGraphs.of(config, self.node, self.store)
        assert graphs is not None
        graphs.open()
        return graphs

    def compile(self, name: str = "ab/kernel.so", content: str = "code", **resources: Any) -> KeptGraphs:
        """A run that compiles one file if it does not find it."""
        graphs = self.open(**resources)
        file = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / name
        found = file.exists()
        if not found:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(content)
        graphs.close("warm" if found else "cold", 40.0, 39.0)
        return graphs

    def another_node(self) -> None:
        self.node = self.node.with_name(self.node.name + "2")

    def archives(self) -> list[Path]:
        return sorted(self.store.rglob("*.tar.gz"))

    def kernel(self) -> Path:
        return self.node / "inductor" / "ab" / "kernel.so"


@pytest.fixture
def bench(plan: MakePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    for name in kept_graphs.PARTS.values():
        monkeypatch.setenv(name, "elsewhere")
    return Bench(tmp_path, tasks_of(plan(*COMPILED))[0].config)


def test_what_one_run_compiles_the_next_finds_here_and_on_another_node(bench: Bench) -> None:
    bench.compile()
    assert bench.kernel().read_text() == "code"
    second = bench.open()
    assert (Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "ab" / "kernel.so").read_text() == "code"
    assert second.cold() == {"phase_s": 40.0, "compile_s": 39.0, "beside": 0.0}
    assert not second.seeded
    second.close("warm", 3.0, 2.0)
    assert list((bench.node / "runs").iterdir()) == []
    bench.another_node()
    third = bench.open()
    assert third.seeded
    # The cold figure travels with the graph: a warm start never takes its place.
    assert third.cold() == {"phase_s": 40.0, "compile_s": 39.0, "beside": 0.0}
    third.close("warm", 3.0, 2.0)
    assert bench.kernel().read_text() == "code"
    assert len(bench.archives()) == 1


def test_a_run_that_does_not_end_its_compile_leaves_nothing(bench: Bench) -> None:
    killed = bench.open()
    (Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "half.so").write_text("ha")
    # It is killed here: its folder stays, and is removed by the next run once the process is dead.
    dead = killed.own.with_name(f"{socket.gethostname()}-999999999-1")
    killed.own.rename(dead)
    following = bench.open()
    assert not dead.exists()
    assert not (Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "half.so").exists()
    following.close(None, 0.0, None)
    assert not any(bench.node.rglob("*.so"))
    assert bench.archives() == []


def test_a_damaged_archive_is_a_cold_start_and_is_replaced(bench: Bench) -> None:
    bench.compile()
    (archive,) = bench.archives()
    archive.write_bytes(archive.read_bytes()[:-20])
    bench.another_node()
    found = bench.compile()
    assert not found.seeded
    assert "damaged" in found.problems[0]
    (replaced,) = bench.archives()
    bench.another_node()
    assert bench.open().seeded
    assert replaced.exists()


def test_an_archive_that_is_something_else_is_not_unpacked(bench: Bench, tmp_path: Path) -> None:
    import hashlib

    bench.compile()
    (archive,) = bench.archives()
    (tmp_path / "evil").write_text("evil")
    with tarfile.open(tmp_path / "evil.tar.gz", "w:gz") as made:
        made.add(tmp_path / "evil", "inductor/../../../escaped")
    content = (tmp_path / "evil.tar.gz").read_bytes()
    archive.unlink()
    (archive.parent / f"{hashlib.sha256(content).hexdigest()}.tar.gz").write_bytes(content)
    bench.another_node()
    found = bench.open()
    assert not found.seeded
    assert "outside of a cache" in found.problems[0]
    assert not list(tmp_path.rglob("escaped"))


def test_a_full_disk_costs_the_archive_and_not_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(kept_graphs, "write_bytes", full)
    found = bench.compile()
    assert found.problems == ["not kept ([Errno 28] No space left on device)"]
    assert bench.archives() == []
    assert bench.kernel().exists()


def test_two_runs_at_once_do_not_meet(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own folder, the first to end gives the file its name, and one archive is kept."""
    monkeypatch.setattr(kept_graphs, "process_name", lambda: "1-1")
    first = bench.open()
    place = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    monkeypatch.setattr(kept_graphs, "process_name", lambda: "2-2")
    second = bench.open()
    other = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert place != other
    for folder, text in ((place, "of the first"), (other, "of the second")):
        (folder / "ab").mkdir(parents=True)
        (folder / "ab" / "kernel.so").write_text(text)
    second.close("cold", 1.0, 1.0)
    first.close("cold", 1.0, 1.0)
    assert bench.kernel().read_text() == "of the second"
    assert len(bench.archives()) == 1


def test_libraries_of_earlier_graphs_that_were_used_go_into_the_archive(
    bench: Bench, plan: MakePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.compile("ab/shared.so")
    bench.config = tasks_of(plan(*COMPILED, "workload.new_tokens=9"))[0].config
    graphs = bench.open()
    shared = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"]) / "ab" / "shared.so"
    assert shared.exists()
    monkeypatch.setattr(KeptGraphs, "_used", lambda self: [shared])
    (shared.parent / "own.so").write_text("own")
    graphs.close("cold", 1.0, 1.0)
    newest = max(bench.archives(), key=lambda file: file.stat().st_mtime_ns)
    with tarfile.open(newest) as archive:
        assert set(archive.getnames()) == {"graph.json", "inductor/ab/own.so", "inductor/ab/shared.so"}


def test_a_library_that_this_process_has_loaded_is_found(bench: Bench) -> None:
    if not Path("/proc/self/maps").exists():
        pytest.skip("only Linux says what is mapped")
    import ctypes

    graphs = bench.open()
    library = graphs.own / "inductor" / "loaded.so"
    source = "int one(void) { return 1; }"
    made = subprocess.run(["gcc", "-shared", "-x", "c", "-o", str(library), "-"], input=source, text=True, check=False)
    if made.returncode:
        pytest.skip("there is no C compiler")
    graphs._before.add(library.relative_to(graphs.own))
    ctypes.CDLL(str(library))
    assert graphs._used() == [library]


def noise(seed: int) -> str:
    """2,000 characters that hardly shrink when they are packed."""
    return random.Random(seed).randbytes(1000).hex()


def test_the_store_keeps_no_more_than_it_may(bench: Bench, plan: MakePlan) -> None:
    bench.config = replace(bench.config, store=replace(bench.config.store, graphs_gb=3e-6))
    bench.compile(content=noise(0))
    (oldest,) = bench.archives()
    os.utime(oldest, (1, 1))
    size = oldest.stat().st_size
    for number in range(2):
        config = tasks_of(plan(*COMPILED, f"workload.new_tokens={9 + number}"))[0].config
        bench.config = replace(config, store=bench.config.store)
        bench.another_node()
        bench.compile(content=noise(1 + number))
    assert oldest not in bench.archives()
    assert sum(file.stat().st_size for file in bench.archives()) <= 3000
    assert size < 3000
    bench.config = replace(bench.config, store=replace(bench.config.store, graphs_gb=1e-9))
    bench.another_node()
    bench.config = replace(bench.config, cache=replace(bench.config.cache, max_len=99))
    assert "more than store.graphs_gb" in bench.compile().problems[0]


def test_each_level_can_be_switched_off(bench: Bench) -> None:
    bench.compile(compile_cache="node")
    assert bench.archives() == []
    assert bench.kernel().exists()
    alone = bench.compile(compile_cache="off", content="compiled anew")
    assert alone.problems == []
    assert bench.kernel().read_text() == "code"
    assert bench.archives() == []


def test_another_environment_has_another_folder(bench: Bench) -> None:
    """The env_id, of versions and device, is in both paths; nothing is looked up beside it."""
    bench.compile()
    bench.store = bench.store.with_name("other")
    bench.another_node()
    assert not bench.open().seeded


def test_a_process_is_known_by_its_name() -> None:
    host = socket.gethostname()
    assert not process_is_dead(process_name())
    assert process_is_dead(f"{host}-999999999-1")
    assert process_is_dead(f"{host}-{os.getpid()}-1")
    # Of a cache on a network folder that another host uses, too, nothing is taken away.
    assert not process_is_dead("another-host-999999999-1")
    assert not process_is_dead("something else")
