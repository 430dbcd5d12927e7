"""The wheelhouse: what is collected for another machine, from a folder of small packages, and installed there."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "scripts" / "wheelhouse"
HERE = ".".join(map(str, sys.version_info[:2]))
MACHINE = os.uname().machine
PLATFORM = f"manylinux_2_28_{MACHINE}"

BACKEND = """
import pathlib, zipfile
name, version, tag, requires = {name!r}, {version!r}, {tag!r}, {requires!r}
def build_wheel(folder, config_settings=None, metadata_directory=None):
    file = f"{{name}}-{{version}}-{{tag}}.whl"
    info = f"{{name}}-{{version}}.dist-info"
    said = f"Metadata-Version: 2.1\\nName: {{name}}\\nVersion: {{version}}\\n" + "".join(
        f"Requires-Dist: {{line}}\\n" for line in requires)
    with zipfile.ZipFile(pathlib.Path(folder, file), "w") as archive:
        for path in pathlib.Path(name).glob("*.py"):
            archive.write(path)
        archive.writestr(f"{{info}}/METADATA", said)
        archive.writestr(f"{{info}}/WHEEL", f"Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: {{tag}}\\n")
        archive.writestr(f"{{info}}/RECORD", "")
    return file
"""
"""A package's own build backend: nothing has to be fetched to build it."""

DOCTOR = 'import os, sys; print("asked", *sys.argv[1:]); sys.exit(int(os.environ.get("DOCTOR", "0")))'


def source(folder: Path, name: str, version: str, requires: tuple[str, ...] = (), tag: str = "py3-none-any") -> Path:
    """The source of a package in a folder of its own."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(f"version = {version!r}\n")
    (folder / name / "__main__.py").write_text(DOCTOR)
    (folder / "backend.py").write_text(BACKEND.format(name=name, version=version, tag=tag, requires=requires))
    (folder / "pyproject.toml").write_text(
        f'[project]\nname = "{name}"\n[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    )
    (folder / "PKG-INFO").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


def wheel(links: Path, name: str, version: str, *requires: str, tag: str = "py3-none-any", size: int = 0) -> None:
    info = f"{name}-{version}.dist-info"
    said = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    with zipfile.ZipFile(links / f"{name}-{version}-{tag}.whl", "w") as archive:
        archive.writestr(f"{name}/__init__.py", f"version = {version!r}\n# {'x' * size}\n")
        archive.writestr(f"{info}/METADATA", said + "".join(f"Requires-Dist: {line}\n" for line in requires))
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")


def sdist(links: Path, work: Path, name: str, version: str, tag: str = "py3-none-any") -> None:
    folder = source(work / f"{name}-{version}", name, version, tag=tag)
    with tarfile.open(links / f"{name}-{version}.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages, and in `lbi` the source of the one that everything is for."""
    folder = tmp_path_factory.mktemp("index")
    links = folder / "links"
    links.mkdir()
    requires = ("torch>=2.11,<2.16", "alpha>=1", "beta", "src-only", "compiled", 'newer; python_version >= "3.90"')
    requires += ("iniconfig", "slow-beta>=1", 'nvidia-ml-py; extra == "gpu"', 'rare; extra == "rare"')
    source(folder / "lbi", "lbi", "1.0", requires)
    wheel(links, "alpha", "1.5", "gamma[fast]")
    wheel(links, "alpha", "2.0")
    wheel(links, "beta", "1.0", "alpha<2", "triton", "nvidia-cublas-cu13", 'windows; sys_platform == "win32"')
    wheel(links, "slow_beta", "2.0", "only-for-slow-beta")
    wheel(links, "gamma", "1.0", "slow-beta<3", 'fastgamma; extra == "fast"', 'slowgamma; extra == "slow"', "alpha")
    wheel(links, "fastgamma", "1.0", size=5_000_000)
    wheel(links, "newer", "1.0")
    wheel(links, "nvidia_ml_py", "13.0")
    # As old a name, as new a C library, and as new a Python as there may be: only the first is for the node.
    wheel(links, "compiled", "1.0", tag=f"cp36-abi3-manylinux2014_{MACHINE}")
    wheel(links, "compiled", "1.1", tag=f"cp36-abi3-manylinux_2_99_{MACHINE}")
    wheel(links, "compiled", "1.2", tag=f"cp399-cp399-manylinux_2_17_{MACHINE}")
    # Of the same version as one that this Python has.
    wheel(links, "iniconfig", metadata.version("iniconfig"))
    sdist(links, folder, "src_only", "1.0")
    # Where something is missing: a wheel for a newer C library, and a source with code to compile.
    wheel(links, "rare", "1.0", "too_new", "native", "alpha")
    wheel(links, "too_new", "1.0", tag=f"py3-none-manylinux_2_40_{MACHINE}")
    sdist(links, folder, "native", "1.0", tag=f"cp311-cp311-linux_{MACHINE}")
    return folder


def run(*words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHONPATH"))}
    env |= {"PYTHON": sys.executable, "PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"} | variables
    return subprocess.run([*map(str, words)], env=env, capture_output=True, text=True, check=False, timeout=300)


def collect(index: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    options = [folder, "--project", index / "lbi", "--platform", PLATFORM, *words]
    return run(SCRIPT, "collect", *options, PIP_FIND_LINKS=str(index / "links"))


@pytest.fixture(scope="module")
def collected(index: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("collected") / "house"
    done = collect(index, folder, "--extra", "gpu", "--leave-out", "Slow_Beta,another")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def house(collected: Path, tmp_path: Path) -> Path:
    """A copy, as on the node, which has torch."""
    shutil.copytree(collected, tmp_path / "house")
    change(tmp_path / "house", needs_of_the_node=["torch<2.16,>=2.11"])
    return tmp_path / "house"


def change(house: Path, **facts: object) -> None:
    listed = json.loads((house / "wheelhouse.json").read_text())
    (house / "wheelhouse.json").write_text(json.dumps(listed | facts))


@pytest.fixture
def collecting(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import wheelhouse_collect

    return wheelhouse_collect


@pytest.fixture
def installing(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import wheelhouse_install

    return wheelhouse_install


# Collecting


@pytest.mark.slow
def test_everything_is_there_in_versions_that_fit_together(collected: Path) -> None:
    names = {path.name for path in collected.iterdir()}
    assert names == {
        "install",
        "wheelhouse.json",
        "lbi-1.0-py3-none-any.whl",
        "alpha-1.5-py3-none-any.whl",
        "beta-1.0-py3-none-any.whl",
        "gamma-1.0-py3-none-any.whl",
        "fastgamma-1.0-py3-none-any.whl",
        f"iniconfig-{metadata.version('iniconfig')}-py3-none-any.whl",
        "nvidia_ml_py-13.0-py3-none-any.whl",
        f"compiled-1.0-cp36-abi3-manylinux2014_{MACHINE}.whl",
        "src_only-1.0-py3-none-any.whl",
    }


def test_the_list_is_of_what_is_there(collected: Path) -> None:
    facts = json.loads((collected / "wheelhouse.json").read_text())
    assert (facts["schema"], facts["python"], facts["platforms"]) == (1, HERE, [PLATFORM])
    assert (facts["torch"], facts["extras"]) == ("keep", ["gpu"])
    assert facts["needs_of_the_node"] == ["slow-beta<3,>=1", "torch<2.16,>=2.11"]
    assert facts["left_out"] == ["nvidia-cublas-cu13", "slow-beta", "torch", "triton"]
    assert {row["file"] for row in facts["wheels"]} == {path.name for path in collected.glob("*.whl")}
    for row in facts["wheels"]:
        content = (collected / row["file"]).read_bytes()
        assert (row["size"], row["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
    assert ("alpha", "1.5") in {(row["name"], row["version"]) for row in facts["wheels"]}


@pytest.mark.slow
def test_all_that_is_missing_is_said_at_once_with_the_way_out(index: Path, tmp_path: Path) -> None:
    done = collect(index, tmp_path / "house", "--extra", "rare")
    assert done.returncode == 2
    assert f"too-new (needed by rare): there is too_new-1.0-py3-none-manylinux_2_40_{MACHINE}.whl" in done.stderr
    assert f"native (needed by rare): its source becomes native-1.0-cp311-cp311-linux_{MACHINE}.whl" in done.stderr
    assert "--platform" in done.stderr
    assert "PIP_FIND_LINKS" in done.stderr
    assert not (tmp_path / "house").exists()


@pytest.fixture
def first(collected: Path, collecting: ModuleType) -> Any:
    return collecting.Wheel.read(collected / "lbi-1.0-py3-none-any.whl")


def test_the_node_decides_conditions_not_this_python(collecting: ModuleType, first: Any) -> None:
    for python, expected in (("3.98", {"newer"}), (HERE, set())):
        node = collecting.Node(python, (PLATFORM,))
        needed, _ = collecting.wanted(collecting.roots(first, [], "keep"), {"lbi": first}, node, collecting.NODES_OWN)
        assert {"newer", "nvidia-ml-py"} & set(needed) == expected
        assert needed["alpha"].by == ("lbi",)
    linux = collecting.Node("3.12.4", ("manylinux_2_28_aarch64",)).markers()
    assert (linux["platform_machine"], linux["python_full_version"]) == ("aarch64", "3.12.4")


@pytest.mark.parametrize(
    ("torch", "asked"), [("keep", None), ("newest", "<2.16,>=2.11"), ("2.13.0", "<2.16,==2.13.0,>=2.11")]
)
def test_torch_is_taken_where_it_is_asked_for(
    collecting: ModuleType, first: Any, torch: str, asked: str | None
) -> None:
    own = collecting.nodes_own(torch, [])
    node = collecting.Node(HERE, (PLATFORM,))
    needed, left = collecting.wanted(collecting.roots(first, [], torch), {"lbi": first}, node, own)
    assert set(left) == ({"torch"} if torch == "keep" else set())
    assert (str(needed["torch"].specifier) if "torch" in needed else None) == asked


def test_too_much_is_refused_and_said_and_nothing_is_kept(
    collecting: ModuleType,
    first: Any,
    collected: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    chosen = collecting.read_all(collected)
    monkeypatch.setattr(collecting, "build_own", lambda project, folder: first)
    monkeypatch.setattr(collecting, "resolve", lambda *arguments: (chosen, {}))
    monkeypatch.setattr(sys, "argv", ["collect", str(tmp_path / "house"), "--max-mb", "4"])
    assert collecting.main() == 2
    said = capsys.readouterr().err
    assert re.search(r"9 wheels are 5\.0 MB, more than --max-mb 4\. The largest:\n +5\.0 MB  fastgamma", said)
    assert not (tmp_path / "house").exists()
    assert len(list(collected.glob("*.whl"))) == 9


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--platform", "linux"], "manylinux_2_N"),
        (["--python", "3"], "no version of Python"),
    ],
)
def test_what_cannot_be_meant_is_refused(index: Path, tmp_path: Path, words: list[str], said: str) -> None:
    done = collect(index, tmp_path / "house", *words)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert said in done.stderr


def test_a_folder_with_something_in_it_is_left_alone(index: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("")
    done = collect(index, tmp_path)
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_tags_are_all_whose_wheels_run_there(collecting: ModuleType) -> None:
    tags = set(collecting.Node("3.12", ("manylinux_2_28_x86_64",)).tags())
    assert {f"manylinux_2_{minor}_x86_64" for minor in (5, 17, 27, 28)} <= tags
    assert {"manylinux1_x86_64", "manylinux2010_x86_64", "manylinux2014_x86_64", "linux_x86_64"} <= tags
    assert not {tag for tag in tags if "_29_" in tag or "musl" in tag or "aarch64" in tag}
    old = set(collecting.Node("3.12", ("manylinux2010_aarch64",)).tags())
    assert {"manylinux_2_12_aarch64", "manylinux1_aarch64"} <= old
    assert not {"manylinux_2_13_aarch64", "manylinux2014_aarch64"} & old
    assert not [tag for tag in collecting.Node("3.12", ("musllinux_1_2_x86_64",)).tags() if "manylinux" in tag]


@pytest.mark.parametrize("name", ["torch", "triton", "pytorch-triton", "nvidia-cudnn-cu13", "cuda-toolkit"])
def test_what_comes_with_torch_is_the_nodes(collecting: ModuleType, name: str) -> None:
    assert collecting.NODES_OWN.fullmatch(name)


@pytest.mark.parametrize("name", ["nvidia-ml-py", "torchao", "triton-viz", "numpy"])
def test_what_does_not_is_collected(collecting: ModuleType, name: str) -> None:
    assert not collecting.NODES_OWN.fullmatch(name)


def test_the_model_is_that_of_setup(collecting: ModuleType) -> None:
    assert f'model_package="{collecting.MODEL}"' in (ROOT / "scripts" / "setup").read_text()


def test_the_script_says_how_it_is_called() -> None:
    for words, code in ((["--help"], 0), ([], 2), (["collected"], 2)):
        done = run(SCRIPT, *words)
        assert done.returncode == code
        assert "wheelhouse collect FOLDER" in done.stdout
    for verb in ("collect", "install"):
        assert "--" in run(SCRIPT, verb, "--help").stdout


# Installing


def install(house: Path, *words: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """The install script beside the wheels, with settings of pip that would spoil it."""
    return run(sys.executable, house / "install", *words, PIP_REQUIRE_HASHES="1", **variables)


def test_installed_into_a_folder_it_ends_with_doctor_who_may_miss_something(house: Path, tmp_path: Path) -> None:
    done = install(house, "--target", tmp_path / "site", DOCTOR="1")
    assert done.returncode == 0, done.stderr
    assert "9 packages are installed" in done.stdout
    assert done.stdout.endswith("asked doctor\n")
    assert {"alpha", "src_only", "lbi"} <= {path.name for path in (tmp_path / "site").iterdir()}


def test_a_doctor_that_crashes_is_a_failure(house: Path, tmp_path: Path) -> None:
    done = install(house, "--target", tmp_path / "site", DOCTOR="3")
    assert done.returncode == 2
    assert "ended with code 3" in done.stderr


def test_an_environment_has_its_own_packages_and_sees_the_nodes_torch(house: Path, tmp_path: Path) -> None:
    done = run(SCRIPT, "install", house, "--venv", tmp_path / "venv")
    assert done.returncode == 0, done.stderr
    asked = "import alpha, iniconfig; from importlib.metadata import version; "
    asked += "print(alpha.__file__, iniconfig.__file__, version('torch'))"
    alpha, iniconfig, torch = run(tmp_path / "venv" / "bin" / "python", "-c", asked).stdout.split()
    assert Path(alpha).is_relative_to(tmp_path / "venv")
    # This Python has the same version, which pip would leave where it is.
    assert Path(iniconfig).is_relative_to(tmp_path / "venv")
    assert torch == metadata.version("torch")


def test_another_version_that_python_finds_first_is_said(house: Path, tmp_path: Path, installing: ModuleType) -> None:
    info = tmp_path / "first" / "alpha-0.1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: alpha\nVersion: 0.1\n")
    facts = {"wheels": [{"name": "alpha", "version": "1.5"}, {"name": "no-such-thing", "version": "1"}]}
    with pytest.raises(installing.Problem, match=r"alpha 1.5: 0.1 is found\n.*no-such-thing 1: none is found"):
        installing.check_installed(sys.executable, {"PYTHONPATH": str(tmp_path / "first")}, facts)


def test_damage_is_all_named_and_nothing_is_installed(house: Path, tmp_path: Path) -> None:
    (house / "beta-1.0-py3-none-any.whl").unlink()
    with (house / "gamma-1.0-py3-none-any.whl").open("ab") as file:
        file.write(b"x")
    alpha = house / "alpha-1.5-py3-none-any.whl"
    content = bytearray(alpha.read_bytes())
    content[50] ^= 1
    alpha.write_bytes(content)
    done = install(house, "--target", tmp_path / "site")
    assert done.returncode == 2
    for said in (
        "alpha-1.5-py3-none-any.whl: has another",
        "beta-1.0-py3-none-any.whl: is",
        "gamma-1.0-py3-none-any.whl: has",
    ):
        assert said in done.stderr
    assert not (tmp_path / "site").exists()


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"python": "3.99"}, "are for Python 3.99"),
        ({"platforms": ["manylinux_2_28_m68k"]}, "manylinux_2_28_m68k, this machine is"),
        ({"platforms": [f"manylinux_2_999_{MACHINE}"]}, "this machine is"),
        ({"schema": 2}, "schema 1"),
        ({"needs_of_the_node": ["torch>=99", "no-such-thing>1"]}, "no-such-thing>1: is not here\n  torch>=99: "),
    ],
)
def test_what_is_for_another_machine_is_refused(house: Path, tmp_path: Path, facts: dict, said: str) -> None:
    change(house, **facts)
    done = install(house, "--target", tmp_path / "site")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert said in done.stderr
    assert not (tmp_path / "site").exists()


def test_other_versions_can_be_accepted_but_nothing_that_is_missing(installing: ModuleType) -> None:
    installing.check_needs({"needs_of_the_node": ["torch>=99"]}, accept=True)
    with pytest.raises(installing.Problem, match="--accept-versions"):
        installing.check_needs({"needs_of_the_node": ["torch>=99"]}, accept=False)
    with pytest.raises(installing.Problem, match="no-such-thing: is not here"):
        installing.check_needs({"needs_of_the_node": ["no-such-thing"]}, accept=True)


def test_a_copy_that_was_broken_off_is_refused(house: Path) -> None:
    (house / "wheelhouse.json").unlink()
    done = install(house)
    assert done.returncode == 2
    assert "no whole wheelhouse" in done.stderr
