"""The composer's configs are Hydra's own, cell by cell, on trees that try to trip it."""

from __future__ import annotations

import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf

from lbi.compose import Composer, parse
from lbi.hydra_compose import Hydra

ROOT = Path(__file__).parent.parent

PROJECT_GRID = [
    "model=smollm2_135m,tiny_random,llama31_8b_random,llama32_1b_random",
    "quantizer=none,int8_wo,int4_wo,intx_sim,hqq8,hqq4,hqq3,hqq2,hqq1",
    "compiler=eager,inductor,inductor_reduce_overhead,inductor_max_autotune,inductor_tuned",
    "cache=static,dynamic",
    "workload=chat,survey,pp512_tg128,long_context,custom",
    "workload.new_tokens=16,32,64",
    "++quantizer.group_size=32,64",
    "measure.repetitions=range(1,4)",
    "decoding=glob(*)",
    "report.max_kld=0.1",
]


def write_tree(folder: Path, files: dict[str, Any]) -> None:
    for name, content in files.items():
        file = folder / f"{name}.yaml"
        file.parent.mkdir(parents=True, exist_ok=True)
        header = "# @package _global_\n" if isinstance(content, dict) and content.pop("GLOBAL", False) else ""
        file.write_text(header + yaml.safe_dump(content, sort_keys=False))


def hydra_says(loader: Any, name: str, overrides: tuple[str, ...]) -> tuple[Any, Any]:
    """Unresolved and resolved config by Hydra's own compose."""
    config = loader.load_configuration(name, list(overrides), run_mode=RunMode.RUN)
    OmegaConf.set_struct(config, False)
    del config["hydra"]
    return OmegaConf.to_container(config, resolve=False), OmegaConf.to_container(config, resolve=True)


def check_against_hydra(folder: Path, arguments: list[str], sample: int, name: str = "config") -> Composer:
    """Compare `sample` random cells (all, if there are fewer) with Hydra; the composer that was used."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(folder), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        composer = Composer(Hydra(loader, name), *parse(arguments, loader))
        cells = list(composer)
        assert len(cells) == len(composer) > 1
        for cell in random.sample(cells, min(sample, len(cells))):
            raw, resolved = hydra_says(loader, name, cell.overrides)
            assert cell.error is None
            assert cell.raw == raw, cell.overrides
            assert cell.sections == resolved, cell.overrides
            assert list(cell.sections) == list(resolved) or set(cell.sections) == set(resolved)
    return composer


@pytest.mark.parametrize("sample", [150, pytest.param(500, marks=pytest.mark.by_hand)])
@pytest.mark.slow
def test_random_cells_of_the_projects_own_groups_equal_hydras(sample: int) -> None:
    arguments = ["hydra/sweeper=basic", "hydra/launcher=basic", *PROJECT_GRID]
    composer = check_against_hydra(ROOT / "conf", arguments, sample=sample)
    assert composer.assembled
    # Nothing in these groups needs Hydra twice.
    assert composer.hydra.composed == 1


def tree() -> dict[str, Any]:
    """Interpolations across groups, nested groups, overrides in defaults lists, global packages."""
    return {
        "config": {
            "defaults": ["_self_", {"db": "mysql"}, {"server": "apache"}, {"zoo/animal": "cat"}, {"mode": "plain"}],
            "root": "${db.host}:${server.port}",
            "deep": {"here": {"up": "${..sibling}", "far": "${zoo.animal.legs}"}, "sibling": "${db.user}"},
            "scale": 2,
        },
        "db/mysql": {
            "host": "localhost",
            "user": "root",
            "url": "${.host}/${server.name}",
            "opts": {"a": 1, "b": [1, 2]},
        },
        "db/postgres": {"host": "pg", "user": "${oc.env:LBI_TEST_USER,nobody}", "opts": {"b": [3]}, "extra": True},
        "server/apache": {"name": "apache", "port": 80, "workers": "${scale}"},
        "server/nginx": {"defaults": [{"tls": "on"}], "name": "nginx", "port": 443},
        "server/tls/on": {"cert": "${db.host}.pem"},
        "zoo/animal/cat": {"legs": 4, "says": "meow"},
        "zoo/animal/bird": {"legs": 2, "says": "${server.name}"},
        "mode/plain": {"name": "plain"},
        "mode/loud": {"GLOBAL": True, "scale": 3, "zoo": {"volume": 11}},
    }


@pytest.mark.slow
def test_interpolations_nested_groups_and_global_packages_equal_hydras(tmp_path: Path) -> None:
    write_tree(tmp_path, tree())
    arguments = [
        "db=mysql,postgres",
        "server=apache,nginx",
        "zoo/animal=cat,bird",
        "mode=plain,loud",
        "db.opts.a=1,2,3",
        "+db.fresh=x,y",
        "scale=4,5",
        "+deep.here.extra=1,2",
    ]
    # db=postgres has no db.opts.a: those cells are errors, and Hydra's too.
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        composer = Composer(Hydra(loader, "config"), *parse(arguments, loader))
        cells = list(composer)
        for cell in random.sample(cells, 150):
            if "db=postgres" in cell.overrides:
                assert cell.error is not None
                with pytest.raises(HydraException):
                    hydra_says(loader, "config", cell.overrides)
            else:
                assert (cell.raw, cell.sections) == hydra_says(loader, "config", cell.overrides)
    assert composer.assembled


def test_a_global_package_is_joined_with_the_axis_it_writes_into(tmp_path: Path) -> None:
    """mode=loud writes below `scale` and `zoo`, which other axes choose: their product must be composed."""
    write_tree(tmp_path, tree())
    composer = check_against_hydra(
        tmp_path, ["mode=plain,loud", "zoo/animal=cat,bird", "scale=1,2", "db=mysql,postgres"], 100
    )
    assert composer.assembled
    # The configuration without the axes, and 2 x 2 x 2 for the joined ones; db comes straight from its files.
    assert composer.hydra.composed == 9


def test_an_interpolated_defaults_list_turns_assembly_off(tmp_path: Path) -> None:
    files = tree()
    files["config"]["defaults"].append({"pair": "${db}_${server}"})
    for db, server in itertools.product(("mysql", "postgres"), ("apache", "nginx")):
        files[f"pair/{db}_{server}"] = {"both": f"{db} {server}", "host": "${db.host}"}
    write_tree(tmp_path, files)
    composer = check_against_hydra(tmp_path, ["db=mysql,postgres", "server=apache,nginx"], 100)
    assert not composer.assembled


def test_an_override_in_a_defaults_list_joins_the_two_axes(tmp_path: Path) -> None:
    files = tree()
    files["mode/fast"] = {"GLOBAL": True, "defaults": [{"override /server": "nginx"}], "speed": 9}
    write_tree(tmp_path, files)
    composer = check_against_hydra(tmp_path, ["mode=plain,fast", "server.port=1,2", "db=mysql,postgres"], 100)
    assert composer.assembled
    assert composer.hydra.composed == 5


def test_a_write_that_only_shows_without_another_option_is_not_lost(tmp_path: Path) -> None:
    """a=hidden writes below `shared` before b=covering overwrites it: the difference shows only with b=open."""
    files = {
        "config": {"defaults": [{"a": "none"}, {"b": "covering"}, "_self_"], "shared": {"y": 0}},
        "a/none": {"q": 1},
        "a/hidden": {"GLOBAL": True, "shared": {"x": 1}, "a": {"q": 2}},
        "b/covering": {"GLOBAL": True, "shared": {"x": 2}, "b": {"r": 1}},
        "b/open": {"GLOBAL": True, "b": {"r": 2}},
    }
    write_tree(tmp_path, files)
    check_against_hydra(tmp_path, ["a=none,hidden", "b=covering,open"], 10)


def test_later_overrides_of_a_key_replace_earlier_ones(loader: Any) -> None:
    fixed, axes, order = parse(["a=1,2", "b=3", "a=4", "b=5,6"], loader)
    assert fixed == {"a": "a=4"}
    assert [axis.overrides for axis in axes] == [("b=5", "b=6")]
    assert order == ["a", "b"]


def test_an_interval_is_refused(loader: Any) -> None:
    with pytest.raises(HydraException, match="interval"):
        parse(["a=interval(0,1)"], loader)


def test_an_unknown_option_names_the_options(compose: Any) -> None:
    (cell, other) = compose("quantizer=none,nope")
    assert cell.error is None
    assert "int8_wo" in other.error
    assert "search path" not in other.error
