"""A loopback stand-in for SkyPilot's API server, to which the real `sky` client (0.14.1) speaks.

It executes what it is given: a pool's setup once for each machine, in a folder with the
uploaded code, and each job's script in turn, one job a machine, with the variables that
SkyPilot sets. A machine is a folder with a home of its own, and can be taken away.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import shutil
import signal
import subprocess
import threading
import time
import uuid
import zipfile
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlparse

import yaml

API_VERSION, VERSION = "62", "0.14.1"
NONE = base64.b64encode(pickle.dumps(None)).decode()
OVER = ("SUCCEEDED", "CANCELLED", "FAILED", "FAILED_SETUP", "FAILED_NO_RESOURCE")
DOLLARS_AN_HOUR = 2.0


@dataclass
class Machine:
    """A worker of a pool."""

    name: str
    folder: Path
    began: float
    ended: float | None = None
    ready: bool = False


@dataclass
class PoolState:
    """A pool as it was applied last."""

    name: str
    task: dict[str, Any]
    blob: str | None
    machines: list[Machine] = field(default_factory=list)
    made: int = 0
    began: float = field(default_factory=time.time)

    @property
    def workers(self) -> int:
        """As the client's own YAML has it."""
        return int(self.task["service"]["pool"]["workers"])


@dataclass
class JobState:
    """A managed job."""

    id: int
    name: str
    rank: int
    count: int
    pool: str
    docs: dict[str, Any]
    status: str = "PENDING"
    recoveries: int = 0
    log: Path | None = None
    process: subprocess.Popen[bytes] | None = None
    machine: Machine | None = None
    cancel: bool = False
    submitted: float = field(default_factory=time.time)


class FakeSky:
    """The server; `url` is where. `no_machines` keeps pools empty, `down` answers nothing; `refused` counts what."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.calls: Counter[str] = Counter()
        self.bodies: list[tuple[str, dict[str, Any]]] = []
        self.results: dict[str, tuple[str, Any]] = {}
        self.jobs: dict[int, JobState] = {}
        self.pools: dict[str, PoolState] = {}
        self.ended: list[Machine] = []
        self.no_machines = False
        self.down = False
        self.refused = 0
        self.lock = threading.RLock()
        self.unknown: list[str] = []
        self._stopping = threading.Event()
        handler = type("Handler", (_Handler,), {"server_state": self})
        self.httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.httpd.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.httpd.server_address[1]}"

    def __enter__(self) -> FakeSky:
        threading.Thread(target=self.httpd.serve_forever, daemon=True).start()
        threading.Thread(target=self._schedule, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stopping.set()
        self.httpd.shutdown()
        self.httpd.server_close()
        for job in self.jobs.values():
            self._kill(job)

    def preempt(self, job: int) -> None:
        """Take the machine of a running job away: its processes and its disk are gone, and the job is begun anew."""
        with self.lock:
            state = self.jobs[job]
            machine = state.machine
            state.recoveries += 1
            state.status = "RECOVERING"
            self._kill(state)
            if machine is not None:
                machine.ended = time.time()
                self.pools[state.pool].machines.remove(machine)
                self.ended.append(machine)
                shutil.rmtree(machine.folder, ignore_errors=True)
            state.machine = None

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any, str | None]:
        with self.lock:
            self.calls[f"{method} {path}"] += 1
        if path == "/api/health":
            known = {"status": "healthy", "api_version": API_VERSION, "version": VERSION, "version_on_disk": VERSION}
            return 200, {**known, "commit": "fake", "user": None, "basic_auth_enabled": False}, None
        if path in ("/api/get", "/api/stream"):
            return self._get(path, query)
        if path == "/upload_v2/blob":
            return 200, {"exists": (self.root / "blobs" / query["blob_id"]).exists()}, None
        if path == "/upload_v2":
            return self._upload(query, body)
        sent = json.loads(body) if body else {}
        with self.lock:
            self.bodies.append((path, sent))
        routes = {
            "/validate": lambda: (200, {}, None),
            "/optimize": lambda: self._ticket("optimize", None),
            "/jobs/pool_apply": lambda: self._ticket("jobs.pool_apply", self._apply(sent)),
            "/jobs/pool_status": lambda: self._ticket("jobs.pool_status", self._pool_status(sent)),
            "/jobs/pool_down": lambda: self._ticket("jobs.pool_down", self._pool_down(sent)),
            "/jobs/launch": lambda: self._ticket("jobs.launch", self._launch(sent)),
            "/jobs/queue/v2": lambda: self._ticket("jobs.queue_v2", self._queue()),
            "/jobs/cancel": lambda: self._ticket("jobs.cancel", self._cancel(sent)),
            "/jobs/logs": lambda: self._logs(sent),
            "/cost_report": lambda: self._ticket("cost_report", self._costs()),
        }
        if path not in routes:
            self.unknown.append(path)
            return 404, {"detail": f"fake: {path}"}, None
        return routes[path]()

    def _ticket(self, name: str, value: Any) -> tuple[int, Any, str]:
        ticket = str(uuid.uuid4())
        self.results[ticket] = (name, value)
        return 200, {}, ticket

    def _get(self, path: str, query: dict[str, str]) -> tuple[int, Any, str]:
        ticket = query["request_id"]
        name, value = self.results[ticket]
        if path == "/api/stream":
            return 200, b"", ticket
        content = {"request_id": ticket, "name": f"sky.{name}", "entrypoint": NONE, "request_body": NONE}
        content |= {"status": "SUCCEEDED", "created_at": time.time(), "finished_at": time.time(), "user_id": "u"}
        content |= {"return_value": json.dumps(value), "error": "null", "pid": None, "schedule_type": "long"}
        return 200, content, ticket

    def _upload(self, query: dict[str, str], body: bytes) -> tuple[int, Any, None]:
        # Tests upload less than one chunk.
        target = self.root / "blobs" / query["upload_id"]
        with zipfile.ZipFile(io.BytesIO(body)) as packed:
            packed.extractall(target)
        return 200, {"status": "completed", "missing_chunks": None}, None

    def _apply(self, sent: dict[str, Any]) -> None:
        documents = [found for found in yaml.safe_load_all(sent["task"]) if found]
        task = next(found for found in documents if "service" in found)
        with self.lock:
            known = self.pools.get(sent["pool_name"])
            if known is not None:
                known.task, known.blob = task, sent.get("file_mounts_blob_id")
                return
            self.pools[sent["pool_name"]] = PoolState(sent["pool_name"], task, sent.get("file_mounts_blob_id"))

    def _pool_down(self, sent: dict[str, Any]) -> None:
        with self.lock:
            for name in sent.get("pool_names") or []:
                pool = self.pools.pop(name, None)
                for machine in pool.machines if pool else []:
                    machine.ended = time.time()
                    self.ended.append(machine)

    def _pool_status(self, sent: dict[str, Any]) -> list[dict[str, Any]]:
        names = sent.get("pool_names")
        with self.lock:
            return [_told(pool) for pool in self.pools.values() if names is None or pool.name in names]

    def _launch(self, sent: dict[str, Any]) -> dict[str, Any]:
        documents = [found for found in yaml.safe_load_all(sent["task"]) if found and found.get("run")]
        count, ids = sent.get("num_jobs") or 1, []
        with self.lock:
            for rank in range(count):
                number = len(self.jobs) + 1
                ids.append(number)
                name = sent.get("name") or documents[0]["name"]
                self.jobs[number] = JobState(number, name, rank, count, sent["pool"], documents[0])
        return {"job_id": ids, "handle": NONE}

    def _queue(self) -> dict[str, Any]:
        with self.lock:
            rows = [
                {
                    "job_id": job.id,
                    "job_name": job.name,
                    "task_id": 0,
                    "status": job.status,
                    "pool": job.pool,
                    "submitted_at": job.submitted,
                    "recovery_count": job.recoveries,
                    "job_duration": 0.0,
                }
                for job in self.jobs.values()
            ]
        counts = dict(Counter(str(row["status"]) for row in rows))
        return {"jobs": rows, "total": len(rows), "total_no_filter": len(rows), "status_counts": counts}

    def _cancel(self, sent: dict[str, Any]) -> None:
        with self.lock:
            for number in sent.get("job_ids") or []:
                job = self.jobs[number]
                if job.status not in OVER:
                    job.cancel = True
                    job.status = "CANCELLED"
                    self._kill(job)

    def _logs(self, sent: dict[str, Any]) -> tuple[int, Any, str]:
        job = self.jobs[sent["job_id"]]
        text = job.log.read_bytes() if job.log and job.log.exists() else b""
        # As SkyPilot prints what a job prints.
        told = b"".join(b"(%s, pid=77) %s\n" % (job.name.encode(), line) for line in text.split(b"\n") if line)
        return 200, told, self._ticket("jobs.logs", None)[2]

    def _costs(self) -> list[dict[str, Any]]:
        with self.lock:
            living = [machine for pool in self.pools.values() for machine in pool.machines]
            return [
                {
                    "name": machine.name,
                    "launched_at": machine.began,
                    "duration": (machine.ended or time.time()) - machine.began,
                    "num_nodes": 1,
                    "resources": None,
                    "status": "UP" if machine.ended is None else None,
                    "total_cost": DOLLARS_AN_HOUR * ((machine.ended or time.time()) - machine.began) / 3600,
                    "cluster_hash": machine.name,
                    "usage_intervals": [],
                    "user_hash": "u",
                    "user_name": "u",
                    "workspace": "default",
                }
                for machine in [*living, *self.ended]
            ]

    def _schedule(self) -> None:
        """Give waiting jobs to machines that have none."""
        while not self._stopping.wait(0.1):
            with self.lock:
                for pool in self.pools.values():
                    while len(pool.machines) < pool.workers and not self.no_machines:
                        pool.machines.append(self._machine(pool))
                    busy = [job.machine for job in self.jobs.values() if job.machine and job.status == "RUNNING"]
                    free = [machine for machine in pool.machines if machine not in busy]
                    for job in self.jobs.values():
                        if job.pool == pool.name and job.status in ("PENDING", "RECOVERING") and free:
                            job.machine, job.status = free.pop(), "RUNNING"
                            threading.Thread(target=self._run, args=(job, pool), daemon=True).start()

    def _machine(self, pool: PoolState) -> Machine:
        pool.made += 1
        name = f"{pool.name}-{pool.made}"
        return Machine(name, self.root / "machines" / name, time.time())

    def _run(self, job: JobState, pool: PoolState) -> None:
        machine, recoveries = job.machine, job.recoveries
        assert machine is not None
        folder = machine.folder / "sky_workdir"
        log = self.root / f"job-{job.id}-{recoveries}.log"
        job.log = log
        status = "FAILED_SETUP"
        if machine.ready or self._set_up(pool, machine, folder, log):
            machine.ready = True
            status = "SUCCEEDED" if self._execute(job, machine, folder, log, recoveries) == 0 else "FAILED"
        with self.lock:
            if job.status == "RUNNING" and job.recoveries == recoveries:
                job.status = status

    def _set_up(self, pool: PoolState, machine: Machine, folder: Path, log: Path) -> bool:
        home = machine.folder / "home"
        home.mkdir(parents=True, exist_ok=True)
        if pool.blob and pool.task.get("workdir"):
            uploaded = self.root / "blobs" / pool.blob / str(pool.task["workdir"]).lstrip("/")
            found = uploaded if uploaded.exists() else next((self.root / "blobs" / pool.blob).iterdir())
            shutil.copytree(found, folder, dirs_exist_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            setup = pool.task.get("setup") or "true"
            done = subprocess.run(
                ["bash", "-c", setup], cwd=folder, env=_variables(home, {}), stdout=output, stderr=output, check=False
            )
        return done.returncode == 0

    def _execute(self, job: JobState, machine: Machine, folder: Path, log: Path, recoveries: int) -> int:
        given = {"SKYPILOT_JOB_RANK": str(job.rank), "SKYPILOT_NUM_JOBS": str(job.count)}
        given |= {"SKYPILOT_TASK_ID": f"sky-managed-{job.id}-0", "SKYPILOT_NUM_GPUS_PER_NODE": "0"}
        for section in ("envs", "secrets"):
            given |= {name: str(value) for name, value in (job.docs.get(section) or {}).items()}
        with log.open("ab") as output:
            with self.lock:
                # Cancelled, or given another machine, while this one was being set up.
                if job.status != "RUNNING" or job.recoveries != recoveries:
                    return 1
                process = job.process = subprocess.Popen(
                    ["bash", "-c", job.docs["run"]],
                    cwd=folder,
                    env=_variables(machine.folder / "home", given),
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            return process.wait()

    @staticmethod
    def _kill(job: JobState) -> None:
        if job.process is not None and job.process.poll() is None:
            with suppress(ProcessLookupError):
                os.killpg(job.process.pid, signal.SIGKILL)


class _Handler(BaseHTTPRequestHandler):
    server_state: FakeSky
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing."""

    def do_GET(self) -> None:
        body = self._body()
        if self.server_state.down:
            with self.server_state.lock:
                self.server_state.refused += 1
            self.close_connection = True
            self.connection.close()
            return
        url = urlparse(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        status, value, ticket = self.server_state.answer(self.command, url.path, query, body)
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain" if isinstance(value, bytes) else "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-SkyPilot-API-Version", API_VERSION)
        self.send_header("X-SkyPilot-Version", VERSION)
        if ticket:
            self.send_header("X-Skypilot-Request-ID", ticket)
            self.send_header("X-SkyPilot-Stream-Request-ID", ticket)
        self.end_headers()
        self.wfile.write(data)

    do_POST = do_GET

    def _body(self) -> bytes:
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body


def _variables(home: Path, given: dict[str, str]) -> dict[str, str]:
    """A machine's variables: nothing of the driver's but where programs are, and what makes tests quick."""
    kept = ("PATH", "LANG", "TMPDIR", "OMP_NUM_THREADS", "LBI_TEST_MACHINE")
    return {name: os.environ[name] for name in kept if name in os.environ} | {"HOME": str(home), **given}


def _told(pool: PoolState) -> dict[str, Any]:
    return {
        "name": pool.name,
        "uptime": pool.began,
        "status": "READY" if pool.machines else "NO_REPLICA",
        "active_versions": [1],
        "endpoint": None,
        "policy": f"Fixed-size ({pool.workers} workers)",
        "requested_resources_str": "",
        "load_balancing_policy": None,
        "pool": True,
        "replica_info": [
            {
                "replica_id": number,
                "version": 1,
                "name": machine.name,
                "status": "READY",
                "launched_at": int(machine.began),
                "handle": None,
                "infra": "fake",
                "resources_str": "1x",
                "endpoint": None,
                "used_by": None,
                "is_spot": False,
            }
            for number, machine in enumerate(pool.machines, 1)
        ],
    }
