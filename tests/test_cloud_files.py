"""What SkyPilot and Kubernetes are given, and what comes back, without either."""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lbi import arrivals, environment, homing, parcel, sites, snapshot
from lbi.collect import rows
from lbi.compose import Composed
from lbi.config import ResourcesConfig, SweepConfig
from lbi.errors import InputError
from lbi.executors import cloud_files, homecoming, job, pools
from lbi.executors.cloud import CloudExecutor
from lbi.executors.cloud_files import CloudLauncher, pool_resources, pool_yaml
from lbi.executors.homecoming import Homecoming
from lbi.executors.kubernetes import KubernetesExecutor, KubernetesLauncher
from lbi.executors.scheduler import Job
from lbi.executors.sky import Sky
from lbi.executors.unit_parcel import pack_units
from lbi.files import write_json
from lbi.homing import ByLog
from lbi.identity import digest
from lbi.plan import Plan, make_plan
from lbi.schedule import Unit, make_units
from lbi.store import Store
from lbi.submissions import Submissions, UnitJob
from lbi.sweep_folder import write_plan
from lbi.typed import build, plain

ROOT = Path(__file__).parent.parent
RENTED = yaml.safe_load((ROOT / "conf" / "resources" / "rented.yaml").read_text())


def resources(**changes: Any) -> ResourcesConfig:
    return build(ResourcesConfig, {**RENTED, **changes}, "resources")


@pytest.fixture
def rented(compose: Callable[..., list[Composed]], store: Store) -> Callable[..., Plan]:
    """Plan for rented machines."""

    def made(*arguments: str) -> Plan:
        return make_plan(compose("model=tiny_random", "quality=off", *arguments), store, 0.0, sites.Rented(store))

    return made


def units_of(plan: Plan, store: Store) -> list[Unit]:
    write_plan(store, "test", plan, {"command": "python -m lbi", "planned": 0.0})
    return make_units(plan.cells, pack=True)


def test_hydra_knows_the_knobs_that_the_executors_read() -> None:
    sys.path.append(str(ROOT / "lbi" / "plugins"))
    from hydra_plugins import lbi_plugin

    for conf, typed in ((lbi_plugin.CloudConf, CloudLauncher), (lbi_plugin.KubernetesConf, KubernetesLauncher)):
        told = dataclasses.asdict(conf())
        assert told.pop("_target_").startswith("hydra_plugins.lbi_plugin.")
        assert build(typed, told, "hydra.launcher") == typed()
        assert all(field.metadata["doc"] for field in dataclasses.fields(typed))


def test_a_login_node_without_a_gpu_plans_for_nodes_that_have_one(
    compose: Callable[..., list[Composed]], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "gpus", list)
    asked = compose("model=tiny_random", "quantizer=none,gemlite_a16w4", "resources=h100", "cache=static")
    for site in (sites.Cluster(store), sites.Rented(store)):
        plan = make_plan(asked, store, 0.0, site)
        assert [cell.config.engine.device for cell in plan.cells if cell.config] == ["cuda", "cuda"]
        assert not any("no NVIDIA GPU" in cell.reason for cell in plan.cells)
    # GemLite need not be installed here for a machine that installs it.
    assert [cell.verdict for cell in plan.cells] == ["RUN", "RUN"]
    assert "no NVIDIA GPU" in make_plan(compose("engine.device=cuda"), store, 0.0).cells[0].reason


def test_a_machine_is_asked_for_in_skypilots_words() -> None:
    made = pool_resources(resources(spot=True, disk_gb=50, cpus=8, memory_gb=32.0), "cuda", 0)
    assert made == {
        "accelerators": "H100:1",
        "cpus": "8+",
        "memory": "32+",
        "disk_size": 50,
        "use_spot": True,
        "max_hourly_cost": 4.0,
        "any_of": [{"infra": "runpod"}, {"infra": "vast"}],
    }
    assert pool_resources(resources(), "cuda", 1)["accelerators"] == "H100-SXM:1"
    assert pool_resources(resources(clouds=["vast/US"]), "cuda", 9)["accelerators"] == "A100-80GB:1"
    assert pool_resources(resources(clouds=["vast/US"]), "cuda", 0)["infra"] == "vast/US"
    assert "accelerators" not in pool_resources(resources(), "cpu", 0)
    with pytest.raises(InputError, match="no type of GPU is named"):
        pool_resources(resources(gpu_candidates=[]), "cuda", 0)
    with pytest.raises(InputError, match=r"resources\.clouds=run pod"):
        pool_resources(resources(clouds=["run pod"]), "cuda", 0)
    with pytest.raises(InputError, match="is not a GPU's name"):
        pool_resources(resources(gpu_candidates=["H100:8; rm"]), "cuda", 0)


def test_a_machine_without_an_image_gets_the_packages(rented: Callable[..., Plan], store: Store) -> None:
    (unit,) = units_of(rented("resources=rented"), store)
    config = unit.tasks[0].config
    setup = yaml.safe_load(pool_yaml(CloudLauncher(), config, "/code", [config]))["setup"]
    assert "pip install -q -r requirements.txt" in setup
    subprocess.run(["bash", "-n", "-c", setup], check=True)
    wanted = cloud_files.requirements()
    assert "gemlite" in wanted
    assert "hydra-core" in wanted
    assert "pytest" not in wanted
    assert "extra" not in wanted


def test_units_travel_whole(rented: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = rented("quantizer=none,int8_wo", "workload.new_tokens=8,9,10", "resources.runs_per_job=2")
    units = units_of(plan, store)
    text = pack_units(store, "test", units, "logs", 400.0)
    monkeypatch.setenv("LBI_STORE", str(store.root / "there"))
    found = [job.parcelled(text, number) for number in range(len(units))]
    assert [tuple(one.unit.tasks) for one in found] == [unit.tasks for unit in units]
    assert [cell["index"] for one in found for cell in one.cells] == [
        task.cell for unit in units for task in unit.tasks
    ]
    with pytest.raises(InputError, match="there are 3 units"):
        job.parcelled(text, 3)
    assert job.refused(found[0]) == ""
    monkeypatch.setattr(snapshot, "identity", lambda: "another")
    assert "other code of lbi" in job.refused(found[0])


def test_a_machine_with_other_weights_refuses(
    rented: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    unit = job.parcelled(pack_units(store, "test", units_of(rented(), store), "logs", 400.0), 0)
    run_id = unit.unit.tasks[0].run_id

    class Facts:
        fingerprint = "here"

    monkeypatch.setattr(job, "inspect", lambda model: Facts)
    assert job.refused(dataclasses.replace(unit, weights={run_id: "here"})) == ""
    assert "are not those of the plan (there)" in job.refused(dataclasses.replace(unit, weights={run_id: "there"}))


def test_arrays_are_cut_where_a_variable_is_full(
    rented: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = ",".join(str(8 + number) for number in range(12))
    units = units_of(rented(f"workload.new_tokens={tokens}", "resources.runs_per_job=1"), store)
    executor = CloudExecutor("test", SweepConfig(), CloudLauncher())
    executor._store, executor._units = store, tuple(units)
    assert [len(array.units) for array in executor._arrays(units, "001")] == [12]
    monkeypatch.setattr(cloud_files, "MOST", len(executor._parcel(units[:5])) + 10)
    arrays = executor._arrays(units, "001")
    assert sum(len(array.units) for array in arrays) == 12
    assert len(arrays) > 1
    assert all(len(executor._parcel(array.units)) <= cloud_files.MOST for array in arrays)


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, 0),
        ({"SLURM_ARRAY_TASK_ID": "3"}, 3),
        ({"SKYPILOT_JOB_RANK": "4"}, 4),
        ({"JOB_COMPLETION_INDEX": "5"}, 5),
    ],
)
def test_a_job_finds_its_number(variables: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in job.COUNTED_BY:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert job.index(None) == expected
    assert job.index(7) == 7
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "one")
    with pytest.raises(InputError, match="is not a job's number"):
        job.index(None)


def measured(store: Store, run_id: str, status: str = "ok", log: str = "[12:00:00] load\n") -> Any:
    """A result as a machine made it, in a store of its own."""
    description = environment.describe()
    env_id = environment.identify("cpu")
    folder = store.run_folder(run_id, env_id) / "attempt-1"
    write_json(folder / "env.json", {"schema": 1, **description})
    (folder / "log.txt").write_text(log)
    (folder / "trace").mkdir()
    (folder / "trace" / "trace.json").write_text("{}")
    if status == "ok":
        write_json(folder / "metrics.json", {"schema": 1, "metrics": {"decode_tok_s": 5.0}, "missing": {}})
    outcome = {"schema": 1, "run_id": run_id, "env_id": env_id, "status": status, "reason": "", "attempt": 1}
    outcome |= {"host": "there", "finished": 5.0, "seconds": 1.0}
    write_json(folder / "outcome.json", outcome)
    write_json(folder.parent / "status.json", outcome)
    return store.result(run_id, env_id)


def test_a_result_comes_home_once_and_the_next_plan_knows_where_from(
    rented: Callable[..., Plan], store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = rented()
    (unit,) = units_of(plan, store)
    run_id = unit.tasks[0].run_id
    result = measured(Store.open(tmp_path / "there", write=True), run_id)
    write_json(result.folder / "config.json", {"schema": 1, "config": plain(unit.tasks[0].config)})
    assert ByLog(400.0).send(result)
    log = capsys.readouterr().out
    home = Homecoming(store, "test")
    home.take("log", log, {run_id}, since=100.0)
    home.take("log", log, {run_id}, since=100.0)
    assert home.arrived == 1
    (row,) = rows(store, "test")
    assert row["status"] == "ok"
    assert row["decode_tok_s"] == 5.0
    # Its own clock stood at 5 s; here it is as old as its arrival.
    assert row["finished"] > 1e9
    assert (Path(row["folder"]) / "trace" / "trace.json").exists()
    assert rented().cells[0].verdict == "DONE"
    # Another process finds it home already; runs that nobody asked for are left alone.
    again = Homecoming(store, "test")
    again.take("log", log, {run_id}, since=100.0)
    other = Homecoming(store, "test")
    other.take("log", log, {"f" * 12}, since=100.0)
    assert (again.arrived, other.arrived) == (0, 0)


def test_what_does_not_come_whole_is_not_done(store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = "".join(chr(random.randrange(33, 126)) for _ in range(9_000))
    result = measured(Store.open(tmp_path / "there", write=True), "a" * 12, log=noise)
    assert ByLog(400.0).send(result)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 3
    home = Homecoming(store, "test")
    home.take("log", "\n".join(lines[:-1]), {"a" * 12}, 0.0)
    assert home.received["log"].broken == {(homing.RESULT, f"{'a' * 12}-{result.env_id}")}
    assert home.arrived == 0
    assert store.result("a" * 12, result.env_id) is None
    # A parcel of another result under this name.
    other = measured(Store.open(tmp_path / "other", write=True), "b" * 12)
    text = parcel.pack_files({file.name: file for file in other.folder.iterdir() if file.is_file()})
    forged = "\n".join(parcel.lines(homing.RESULT, f"{'a' * 12}-{result.env_id}", text))
    home.take("log", forged, {"a" * 12}, 0.0)
    assert "is damaged" in capsys.readouterr().out
    assert store.result("a" * 12, result.env_id) is None
    assert list((store.root / "runs").glob("*/*/attempt-*")) == []


def test_a_log_takes_so_much_and_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    noise = "".join(chr(random.randrange(33, 126)) for _ in range(60_000))
    result = measured(Store.open(tmp_path / "there", write=True), "a" * 12, log=noise)
    (result.folder / "trace" / "trace.json").write_text(noise[::-1])
    assert ByLog(400.0).send(result)
    whole = capsys.readouterr().out
    assert ByLog(90.0).send(result)
    (text,) = parcel.read_log(capsys.readouterr().out).of(homing.RESULT).values()
    parcel.unpack_files(text, tmp_path / "out")
    assert not (tmp_path / "out" / "trace").exists()
    assert (tmp_path / "out" / "log.txt").stat().st_size == 60_000
    assert ByLog(40.0).send(result)
    small = capsys.readouterr().out
    (text,) = parcel.read_log(small).of(homing.RESULT).values()
    parcel.unpack_files(text, tmp_path / "least")
    assert (tmp_path / "least" / "log.txt").read_text() == noise[-homing.LOG_TAIL :]
    assert json.loads((tmp_path / "least" / "left_behind.json").read_text())["files"] == [
        "trace/trace.json",
        "log.txt but its end",
    ]
    assert len(small) < len(whole)
    # The result here is whole still.
    assert (result.folder / "log.txt").read_text() == noise
    assert not ByLog(1.0).send(result)
    (told,) = parcel.read_log(capsys.readouterr().out).of(homing.TOO_LARGE).values()
    assert "more than hydra.launcher.max_result_kb=1" in parcel.unpack(told)["reason"]


def test_results_are_collected_from_logs_that_somebody_fetched(
    rented: Callable[..., Plan], store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (unit,) = units_of(rented("workload.new_tokens=8,9"), store)
    there = Store.open(tmp_path / "there", write=True)
    for task in unit.tasks:
        ByLog(400.0).send(measured(there, task.run_id))
    (tmp_path / "logs.txt").write_text(capsys.readouterr().out)
    assert "2 results came home from 1 logs" in homecoming.collect_logs(store, "test", [tmp_path / "logs.txt"])
    assert [row["status"] for row in rows(store, "test")] == ["ok", "ok"]
    with pytest.raises(InputError, match="No such file"):
        homecoming.collect_logs(store, "test", [tmp_path / "none.txt"])


def test_a_local_model_folder_is_refused_before_anything_is_rented(
    rented: Callable[..., Plan], store: Store, tmp_path: Path
) -> None:
    (unit,) = units_of(rented(), store)
    config = unit.tasks[0].config
    model = dataclasses.replace(config.model, source="hf", path=str(tmp_path))
    task = dataclasses.replace(unit.tasks[0], config=dataclasses.replace(config, model=model))
    executor = CloudExecutor("test", SweepConfig(), CloudLauncher(dry_run=True))
    with pytest.raises(InputError, match="a rented one does not see"):
        executor.check([Unit("unit-0", (task,))])
    with pytest.raises(InputError, match="W&B is not to have"):
        CloudExecutor("test", SweepConfig(), CloudLauncher(dry_run=True, results="wandb")).check(
            [dataclasses.replace(unit, tasks=(_untracked(unit),))]
        )
    with pytest.raises(InputError, match="there is no such command"):
        CloudExecutor("test", SweepConfig(), CloudLauncher(sky=("no-such-sky",))).check([unit])


def _untracked(unit: Unit) -> Any:
    task = unit.tasks[0]
    tracker = dataclasses.replace(task.config.tracker, kind="none")
    return dataclasses.replace(task, config=dataclasses.replace(task.config, tracker=tracker))


def stand_in(folder: Path, answers: dict[str, str]) -> Sky:
    """A sky command that answers what a test says."""
    cases = "".join(f'"{words}"*) cat <<"END"\n{text}\nEND\n;;\n' for words, text in answers.items())
    command = folder / "sky"
    command.write_text(f'#!/bin/bash\ncase "$*" in\n{cases}*) echo "no server" >&2; exit 1;;\nesac\n')
    command.chmod(0o755)
    return Sky([str(command)])


def test_skypilots_words_are_understood(tmp_path: Path) -> None:
    listed = [
        {"job_id": 4, "job_name": "lbi-a", "status": "RUNNING", "recovery_count": 2, "pool": "p"},
        {"job_id": 3, "job_name": "lbi-a", "status": "FAILED_SETUP", "failure_reason": "no pip", "pool": "p"},
        {"job_id": 9, "job_name": "other", "status": "PENDING", "pool": "p"},
    ]
    costs = [
        {"name": "p-1", "total_cost": 1.5},
        {"name": "p-2", "total_cost": 0.25},
        {"name": "p-other-1", "total_cost": 9},
    ]
    table = (
        "NAME  VERSION  UPTIME  STATUS  WORKERS\np     1        1h 2m   READY   1/2\nq     1        2m   READY   2/2\n"
    )
    sky = stand_in(
        tmp_path,
        {
            "jobs queue": "Hint: something\n" + json.dumps(listed, indent=2),
            "jobs pool status": table + "\np  1  1  1 hr ago  fake  1x  READY  -",
            "cost-report": json.dumps(costs),
            "jobs logs": "a line",
        },
    )
    found = sky.jobs(["sky-3", "sky-4", "sky-5"])
    assert found is not None
    assert {job: state.state for job, state in found.items()} == {
        "sky-3": "FAILED_SETUP",
        "sky-4": "RUNNING",
        "sky-5": "GONE",
    }
    assert found["sky-3"].reason == "no pip"
    assert found["sky-3"].ended
    assert sky.recovered["sky-4"] == 2
    assert sky.named(["lbi-a"]) == {"lbi-a": "sky-3,sky-4"}
    assert sky.busy("p", besides=["lbi-a"]) == ["other"]
    assert sky.logs(["sky-4"]) == {"sky-4": "a line\n"}
    (pool,) = sky.pools(["p"]) or []
    assert (pool.status, pool.workers, pool.dollars) == ("READY", "1/2", 1.75)


def test_silence_is_no_answer(tmp_path: Path) -> None:
    sky = stand_in(tmp_path, {})
    assert sky.jobs(["sky-1"]) is None
    assert sky.named(["a"]) is None
    assert sky.busy("p") is None
    assert sky.pools(["p"]) is None
    assert sky.logs(["sky-1"]) == {"sky-1": None}
    assert not sky.cancel(["sky-1"])


def test_a_pool_that_may_be_up_is_remembered_until_it_is_ended(store: Store, tmp_path: Path) -> None:
    record = pools.PoolRecord.applied(store, "p", ["no-such-sky"], "first")
    assert pools.PoolRecord.applied(store, "p", ["no-such-sky"], "second").sweeps == ("first", "second")
    assert [known.name for known in pools.up(store, "first")] == ["p"]
    assert pools.up(store, "third") == []
    (line,) = pools.describe(pools.up(store))
    assert "may be up" in line
    record.downed()
    assert pools.up(store) == []
    # Ended by hand: SkyPilot says that there is none.
    made = stand_in(tmp_path, {"jobs pool status": "No existing pools.", "cost-report": "[]"})
    pools.PoolRecord.applied(store, "p", made.command, "first")
    assert pools.describe(pools.up(store)) == []
    assert pools.up(store) == []


def test_the_key_of_a_machine_is_read_from_what_it_recorded() -> None:
    for slots in range(1, min(2, environment.cores()) + 1):
        description = environment.describe(slots)
        assert digest("env", environment.key_of(description, "cpu")) == environment.identify("cpu", slots)
    card = {"name": "NVIDIA H100", "driver": "1", "uuid": "GPU-1"}
    key = environment.key_of({**environment.describe(), "gpus": [card]}, "cuda")
    assert (key["gpu"], key["driver"], key["device"]) == ("NVIDIA H100", "1", "cuda")


def test_a_manifest_has_the_units_and_what_a_pod_needs(rented: Callable[..., Plan], store: Store) -> None:
    units = units_of(rented("resources=h100", "resources.image=ghcr.io/you/lbi:1", "workload.new_tokens=8,9"), store)
    launcher = KubernetesLauncher(queue="gpu", namespace="team", node_selector={"gpu": "h100"})
    text = KubernetesExecutor("test", SweepConfig(), launcher).manifest(store, units, 0)
    documents = list(yaml.safe_load_all(text))
    spec = documents[1]["spec"]
    assert spec["completions"] == 1
    assert spec["suspend"] is True
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert job.parcelled(documents[0]["data"]["units"], 0).unit.tasks == list(units[0].tasks)


@pytest.mark.slow
def test_the_examples_in_the_docs_are_what_is_rendered(tmp_path: Path) -> None:
    subprocess.run([str(ROOT / "scripts" / "cloud" / "render-examples"), str(tmp_path)], check=True, timeout=120)
    made = {str(file.relative_to(tmp_path)): file.read_text() for file in tmp_path.rglob("*.yaml")}
    folder = ROOT / "docs" / "cloud"
    kept = {str(file.relative_to(folder)): file.read_text() for file in folder.rglob("*.yaml")}
    assert sorted(made) == [
        "kubernetes/job.yaml",
        "runpod/job.yaml",
        "runpod/pool.yaml",
        "vast/job.yaml",
        "vast/pool.yaml",
    ]
    assert made == kept


def test_a_copy_of_the_code_has_the_options_that_a_run_may_name(tmp_path: Path) -> None:
    copy = snapshot.take(tmp_path, {"requirements.txt": "torch\n"})
    script = (
        "from lbi.quantizers.options import option; from lbi import snapshot;"
        "print(option('int8_wo').bits, snapshot.identity())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=copy, capture_output=True, text=True, check=False, env={"PATH": ""}
    )
    assert done.stdout.split() == ["8", snapshot.identity()], done.stderr
    assert (copy / "requirements.txt").read_text() == "torch\n"


def test_results_of_an_older_image_are_stale(rented: Callable[..., Plan], store: Store) -> None:
    (cell,) = rented("resources.image=ghcr.io/you/lbi:1").cells
    assert cell.config is not None
    old = environment.key("cpu")
    new = {**old, "packages": {**old["packages"], "torch": "99"}}
    sites.note(store, cell.config, old, digest("env", old), 1.0)
    assert rented("resources.image=ghcr.io/you/lbi:1").cells[0].env_id == digest("env", old)
    sites.note(store, cell.config, new, digest("env", new), 2.0)
    site = sites.Rented(store).site(cell.config)
    assert site.env_ids == (digest("env", new),)
    # Another image is another kind of machine.
    assert rented("resources.image=ghcr.io/you/lbi:2").cells[0].env_id not in (digest("env", old), digest("env", new))


def test_the_next_gpu_is_rented_where_the_first_cannot_be_had(
    rented: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unit,) = units_of(rented("resources=rented"), store)
    executor = CloudExecutor("test", SweepConfig(), CloudLauncher())
    applied: list[dict[str, Any]] = []
    monkeypatch.setattr(
        executor.sky, "apply", lambda pool, file, secrets: applied.append(yaml.safe_load(file.read_text()))
    )
    monkeypatch.setattr(executor.sky, "launch", lambda *_: None)
    monkeypatch.setattr(executor.sky, "named", lambda names: dict.fromkeys(names, "sky-1"))
    assert executor.submit([unit], store, 0.0) == 1
    (made,) = Submissions(store, "test").jobs()
    assert (made.job, made.cluster["kind"]) == ("sky-1", "sky")
    # Machines that are at work for other jobs are no reason to look for others.
    assert executor.waited(made, 1801.0, 1800.0)
    assert len(applied) == 1
    for wanted in (True, True, False):
        executor._progress_at -= 1801.0
        assert executor.waited(made, 1801.0, 1800.0) == wanted
        # Nor are many jobs that wait alike a reason to go on to the next but one.
        assert executor.waited(made, 1801.0, 1800.0) == wanted
    assert [pool["resources"]["accelerators"] for pool in applied] == ["H100:1", "H100-SXM:1", "A100-80GB:1"]
    # It is one pool still, with the same code.
    assert len({pool["workdir"] for pool in applied}) == 1
    assert len(pools.up(store, "test")) == 1


def test_a_pool_is_not_applied_again_as_it_is(
    rented: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unit,) = units_of(rented("resources=rented"), store)
    applied: list[str] = []

    def executor(workers: int) -> CloudExecutor:
        made = CloudExecutor("test", SweepConfig(mode="force"), CloudLauncher(workers=workers))
        monkeypatch.setattr(made.sky, "apply", lambda pool, file, secrets: applied.append(pool))
        monkeypatch.setattr(made.sky, "launch", lambda *_: None)
        monkeypatch.setattr(made.sky, "named", lambda names: dict.fromkeys(names, "sky-1"))
        monkeypatch.setattr(made.sky, "jobs", lambda ids: {name: Job(name, "FAILED") for name in ids})
        monkeypatch.setattr(made.sky, "pools", lambda names: up)
        made.submit([unit], store, 0.0)
        return made

    up: list[Any] = [1]
    first = executor(2)
    first.submit([unit], store, 0.0)
    executor(2)
    assert len(applied) == 1
    executor(3)
    assert len(applied) == 2
    # It was ended by hand.
    up.clear()
    executor(3)
    assert len(applied) == 3


def test_a_wrong_request_does_not_end_the_machines_of_the_one_before(
    rented: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    (unit,) = units_of(rented("resources=rented", "resources.clouds=[no cloud]"), store)
    pools.PoolRecord.applied(store, "p", ["sky"], "test")
    executor = CloudExecutor("test", SweepConfig(), CloudLauncher())
    monkeypatch.setattr(executor.sky, "check", lambda: None)
    monkeypatch.setattr(executor.sky, "down", pytest.fail)
    with pytest.raises(InputError, match="no cloud"):
        executor.execute([unit], store, lambda event: None, 0.0)
    assert len(pools.up(store)) == 1


def test_a_pool_that_others_use_stays(
    rented: Callable[..., Plan], store: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    executor = CloudExecutor("test", SweepConfig(), CloudLauncher())
    pools.PoolRecord.applied(store, "p", ["sky"], "test")
    pools.PoolRecord.applied(store, "q", ["sky"], "other")
    ended: list[str] = []
    monkeypatch.setattr(executor.sky, "down", ended.append)
    monkeypatch.setattr(executor.sky, "busy", lambda pool, besides: ["lbi-other-001"])
    executor.over(store)
    assert ended == []
    assert "stays: lbi-other-001 has jobs in it" in capsys.readouterr().out
    assert len(pools.up(store)) == 2
    # Whether others use it is not known: what costs money is ended.
    monkeypatch.setattr(executor.sky, "busy", lambda pool, besides: None)
    executor.over(store)
    assert ended == ["p"]
    assert [record.name for record in pools.up(store)] == ["q"]


def test_a_recovered_job_with_results_at_home_is_ended_once(store: Store) -> None:
    executor = CloudExecutor("test", SweepConfig(), CloudLauncher())
    made = UnitJob(store.root, "unit-0", "sky-1", (), 0.0, {"kind": "sky"})
    state = Job("sky-1", "RUNNING")
    assert not executor.superseded(made, state, done=2)
    executor.sky.recovered["sky-1"] = 1
    assert executor.superseded(made, state, done=2)
    assert not executor.superseded(made, state, done=2)
    executor.sky.recovered["sky-1"] = 2
    assert not executor.superseded(made, state, done=0)


def test_a_result_that_is_too_large_gives_up_its_own_run_alone(store: Store) -> None:
    executor = CloudExecutor("test", SweepConfig(), CloudLauncher())
    made, over = UnitJob(store.root, "unit-0", "sky-1", (), 0.0, {"kind": "sky"}), Job("sky-1", "FAILED")
    log = "\n".join(parcel.lines(homing.TOO_LARGE, "aaa-eee", parcel.pack({"reason": "9 KB"})))
    executor._home(store).received["sky-1"] = parcel.read_log(log)
    assert executor.hopeless(made, over, "aaa") == "9 KB"
    assert executor.hopeless(made, over, "bbb") == ""
    log = "\n".join(parcel.lines(homing.REFUSAL, "job", parcel.pack({"reason": "other code"})))
    executor._home(store).received["sky-1"] = parcel.read_log(log)
    assert executor.hopeless(made, over, "bbb") == "other code"
    assert "FAILED_SETUP: no pip" in executor.hopeless(made, Job("sky-1", "FAILED_SETUP", reason="no pip"), "bbb")


def test_slots_slurm_and_clouds_have_the_same_plan(compose: Callable[..., list[Composed]], store: Store) -> None:
    preset = yaml.safe_load((ROOT / "sweeps" / "quickstart.yaml").read_text())
    grids = preset["hydra"]["sweeper"]["grids"]
    cells = [
        cell
        for grid in grids
        for cell in compose("measure=brief", "model=tiny_random", *(f"{key}={value}" for key, value in grid.items()))
    ]
    plans = [make_plan(cells, store, 0.0, site) for site in (sites.Here(), sites.Cluster(store), sites.Rented(store))]
    told = [[(cell.run_id, cell.verdict, cell.reason) for cell in made.cells] for made in plans]
    assert told[0] == told[1] == told[2]
    assert len(told[0]) == 16


def test_ids_from_elsewhere_name_no_folders(store: Store, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no ids"):
        arrivals.place(store, tmp_path, "../x", "e" * 12)
