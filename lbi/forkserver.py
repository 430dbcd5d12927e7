"""Starts measuring processes that have imported torch already.

    python -m lbi.forkserver        (started by the worker; speaks JSON lines on stdin and stdout)

Importing torch, transformers and torchao takes 5 s, as long as measuring a small cell.
This process imports them once and forks a child for each run: the child is a process of
its own, with its own memory from there on, that can be killed and leaks only into itself.

Forking is sound only while nothing but memory is shared: so this process starts no thread
(it counts them), touches no GPU (it looks), and runs no computation. If either is not so,
it says so and the worker starts children the slow way.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lbi.process import die_with_parent

MODULES = ("lbi.steps", "lbi.measuring", "lbi.models", "lbi.reference", "transformers.models.llama.modeling_llama")
OPTIONAL = ("torchao.quantization", "hqq.core.quantize")
"""Imported too where they are installed."""


OWN_VARIABLES = {"OPENBLAS_NUM_THREADS": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""OpenBLAS would start its threads when numpy is imported, and pyarrow's allocator one when that is."""


class ForkServer:
    """The worker's end. `process` is the server, `import_s` what its imports took, `refusal` why it cannot be used."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self.variables = {**variables, **OWN_VARIABLES}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "lbi.forkserver"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=self.variables,
            start_new_session=True,
        )
        self._ended: dict[int, int] = {}
        self._received = b""
        said = self._read() or {}
        self.refusal = said.get("refusal", "it did not start")
        self.import_s: float | None = said.get("import_s")

    def serves(self, variables: Mapping[str, str]) -> bool:
        """Whether this server is alive and is, or would be, the one for children with this environment."""
        alive = self.refusal is not None or self.process.poll() is None
        return alive and {**variables, **OWN_VARIABLES} == self.variables

    def start(self, module: str, argument: str, log: Path, stdin: Path | str = os.devnull) -> Forked:
        """Fork a child that runs `module.main(Path(argument))` with its output in `log` and its input from `stdin`."""
        self._send({"module": module, "argument": argument, "log": str(log), "stdin": str(stdin)})
        while (said := self._read()) is not None and "pid" not in said:
            # An earlier child has ended meanwhile.
            self._ended[said["ended"]] = said["returncode"]
        if said is None:
            raise ChildProcessError("the server that children are forked from has ended")
        return Forked(self, int(said["pid"]))

    def poll(self, pid: int) -> int | None:
        """The return code of an ended child, as subprocess counts it; None while it lives.

        A server that has itself been killed took its children with it.
        """
        while pid not in self._ended and self._has_more():
            said = self._read()
            if said is None:
                return -int(signal.SIGKILL)
            self._ended[said["ended"]] = said["returncode"]
        return self._ended.pop(pid, None)

    def close(self) -> None:
        """End the server and every child it still has."""
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()

    def _send(self, message: dict[str, Any]) -> None:
        if self.process.stdin is not None:
            self.process.stdin.write(json.dumps(message).encode() + b"\n")
            self.process.stdin.flush()

    def _has_more(self) -> bool:
        """Whether `_read` would not block."""
        stdout = self.process.stdout
        return b"\n" in self._received or (stdout is not None and bool(select.select([stdout], [], [], 0)[0]))

    def _read(self) -> dict[str, Any] | None:
        """The next message; None if the server has ended.

        Read past Python's buffers, which select does not see: two children may end at once.
        """
        while b"\n" not in self._received:
            more = os.read(self.process.stdout.fileno(), 1 << 16) if self.process.stdout is not None else b""
            if not more:
                return None
            self._received += more
        line, self._received = self._received.split(b"\n", 1)
        found: dict[str, Any] = json.loads(line)
        return found


class Forked:
    """A forked child, with the part of subprocess.Popen's interface that the worker uses."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.server, self.pid = server, pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """The return code, or None while it runs."""
        if self.returncode is None:
            self.returncode = self.server.poll(self.pid)
        return self.returncode

    def wait(self) -> int:
        """Block until it has ended."""
        while self.poll() is None:
            time.sleep(0.02)
        return int(self.returncode or 0)


def serve() -> None:
    """The server's end: import, say whether forking is sound, then fork on request until stdin closes."""
    die_with_parent()
    channel = os.fdopen(os.dup(1), "w")
    # What the imports print must not end up among the messages.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    began = time.perf_counter()
    refusal = _import_all()
    said = {"refusal": refusal, "import_s": time.perf_counter() - began}
    print(json.dumps(said), file=channel, flush=True)
    if refusal is not None:
        return
    gc.collect()
    gc.freeze()
    # Read unbuffered: a request left in a Python buffer would not wake select.
    pending = b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            received = os.read(0, 1 << 16)
            if not received:
                return
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                pid = _fork(json.loads(line), channel)
                print(json.dumps({"pid": pid}), file=channel, flush=True)
        _reap(channel)


def _import_all() -> str | None:
    """Import everything a run needs; why forking would not be sound, or None."""
    import torch

    blamed = ""
    with _told_of_gpus(torch.cuda) as callers:
        for name in (*MODULES, *OPTIONAL):
            try:
                importlib.import_module(name)
            except ImportError as error:
                if name in MODULES:
                    return f"{name} does not import: {error}"
            if torch.cuda.is_initialized():
                outside = [line for line in callers if "/torch/" not in line and "importlib" not in line]
                return f"importing {name} has initialized CUDA ({outside[-1] if outside else 'by an extension'})"
            if not blamed and len(_thread_names()) > 1:
                blamed = f", the first from {name}"
    names = _thread_names()
    if len(names) != 1:
        left = f"the imports left {len(names)} threads{blamed}: {', '.join(names)}"
        return left if names else "threads cannot be counted here"
    return None


def _thread_names() -> list[str]:
    """What the kernel calls this process's threads; none where it does not say."""
    tasks = Path("/proc/self/task")
    with suppress(OSError):
        return sorted((task / "comm").read_text().strip() for task in tasks.iterdir())
    return []


@dataclass(frozen=True)
class Gpus:
    """What a process that was forked to look at the GPUs, and has ended, saw of them."""

    count: int
    """GPUs that torch sees."""
    capability: tuple[int, int] | None
    """Compute capability of the first; None without a GPU."""


@contextmanager
def _told_of_gpus(cuda: Any) -> Iterator[list[str]]:
    """Answer what imports ask of a GPU without touching one, and note the lines that initialize CUDA all the same.

    hqq asks whether there is a GPU, torchao for its capability and, through `has_triton`, for its properties.
    NVML would do for the answers, but it starts a thread in this process (CUDA 13).
    """
    from torch.utils import _triton

    found, callers, initialize = _gpus(), list[str](), cuda._lazy_init
    usable = found.capability is not None and found.capability >= (7, 0) and _triton.has_triton_package()
    answers: dict[tuple[Any, str], Callable[..., Any]] = {
        (cuda, "is_available"): lambda: found.count > 0,
        (cuda, "device_count"): lambda: found.count,
        (_triton, "has_triton"): lambda: usable,
    }
    if found.capability is not None:
        answers[cuda, "get_device_capability"] = lambda *device: found.capability

    def noted() -> None:
        callers.extend(f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-1])
        initialize()

    before = {(module, name): getattr(module, name) for module, name in (*answers, (cuda, "_lazy_init"))}
    for (module, name), answer in {**answers, (cuda, "_lazy_init"): noted}.items():
        setattr(module, name, answer)
    try:
        yield callers
    finally:
        for (module, name), answer in before.items():
            setattr(module, name, answer)


def _gpus() -> Gpus:
    """The GPUs as torch sees them, looked at in a process of their own, which no fork needs to survive."""
    reads, writes = os.pipe()
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException):
            os.write(writes, json.dumps(_seen_by_torch()).encode())
        os._exit(0)
    os.close(writes)
    with os.fdopen(reads) as told:
        said = told.read()
    os.waitpid(pid, 0)
    count, capability = json.loads(said or "[0, null]")
    return Gpus(count, tuple(capability) if capability else None)


def _seen_by_torch() -> tuple[int, tuple[int, int] | None]:
    import torch

    count = torch.cuda.device_count()
    return count, torch.cuda.get_device_capability() if count else None


def _fork(request: dict[str, str], channel: Any) -> int:
    server = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setsid()
        os.environ["LBI_PARENT"] = str(server)
        die_with_parent()
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        os.dup2(os.open(request["stdin"], os.O_RDONLY), 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        channel.close()
        code = importlib.import_module(request["module"]).main(Path(request["argument"])) or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Without the server's exit handlers, which are not this process's to run.
        os._exit(code)


def _reap(channel: Any) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        ended = {"ended": pid, "returncode": os.waitstatus_to_exitcode(status)}
        print(json.dumps(ended), file=channel, flush=True)


if __name__ == "__main__":
    serve()
