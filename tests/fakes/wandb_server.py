"""A loopback stand-in for the W&B server, so that tests drive the real client without a network.

    with FakeWandb() as server:
        ...                             # WANDB_BASE_URL=server.url, WANDB_API_KEY=40 characters
        server.runs["id"].summary       # what a run said of itself

It answers what `wandb.init`, `log`, `log_artifact` and `finish` of wandb 0.31 ask (operations found by running
that client against it) and keeps what it is told. An operation it does not know lands in `unknown`,
which a test should find empty. `fail` answers with errors; `hanging` accepts and never answers; `down` refuses.
"""

from __future__ import annotations

import base64
import gzip
import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

from fakes.wandb_artifacts import Artifacts
from fakes.wandb_views import Views

Json = dict[str, Any]

KEY = "a" * 40
"""An API key of the form that the client accepts."""


@dataclass(slots=True)
class FakeRun:
    """What the client said about one run. `fields` are as GraphQL names them: groupName, jobType, tags."""

    id: str
    project: str
    entity: str
    fields: Json = field(default_factory=dict)
    raw_config: Json = field(default_factory=dict)
    streams: dict[str, dict[int, str]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    exit_code: int | None = None
    complete: bool = False

    @property
    def storage_id(self) -> str:
        """The client sends this back in place of the three names, so it must be stable."""
        return base64.b64encode(f"{self.entity}:{self.project}:{self.id}".encode()).decode()

    @property
    def config(self) -> Json:
        return {key: item["value"] for key, item in self.raw_config.items() if key != "_wandb"}

    @property
    def summary(self) -> Json:
        lines = self.lines("wandb-summary.json")
        return json.loads(lines[-1]) if lines else {}

    @property
    def history(self) -> list[Json]:
        return [json.loads(line) for line in self.lines("wandb-history.jsonl")]

    def lines(self, stream: str) -> list[str]:
        return [line for _, line in sorted(self.streams.get(stream, {}).items())]


class FakeWandb(Artifacts, Views):
    """The server; use it as a context manager. `runs` is keyed by run id."""

    def __init__(self, entity: str = "team") -> None:
        Artifacts.__init__(self)
        Views.__init__(self)
        self.entity = entity
        self.runs: dict[str, FakeRun] = {}
        self.operations: Counter[str] = Counter()
        self.connections = 0
        self.unknown: list[str] = []
        self.bodies: list[bytes] = []
        self._failures: list[list[Any]] = []
        self._lock = threading.RLock()
        self._hangs_on: bytes | None = None
        self._down = False
        self._http = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}"

    def __enter__(self) -> FakeWandb:
        self._down = False
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._hangs_on = None
        self._down = True
        self._http.shutdown()
        self._http.server_close()

    @contextmanager
    def down(self) -> Iterator[None]:
        """Refuse connections, and drop those there are, until the block ends; what was told is kept."""
        self.__exit__()
        try:
            yield
        finally:
            self._http = self._again()
            self.__enter__()

    def _again(self) -> _Server:
        """A server where the last one was, once nobody else has the port."""
        end = time.monotonic() + 30
        while True:
            try:
                return _Server(("127.0.0.1", int(self.url.rpartition(":")[2])), _handler(self))
            except OSError:
                if time.monotonic() > end:
                    raise
                time.sleep(0.2)

    def fail(self, operation: str, status: int, times: int) -> None:
        """Answer the next `times` requests of an operation (or "PUT /artifacts") with an HTTP error."""
        self._failures.append([operation, status, times])

    def forgive(self) -> None:
        """No more errors from `fail`."""
        self._failures.clear()

    @contextmanager
    def hanging(self, about: str = "") -> Iterator[None]:
        """Accept connections and requests; until the block ends answer none that speaks of `about`."""
        self._hangs_on = about.encode()
        try:
            yield
        finally:
            self._hangs_on = None

    def table(self, run: str, name: str) -> Json:
        """Columns and data of a table that a run's summary refers to."""
        said = self.runs[run].summary[name]
        return json.loads(self.runs[run].files[said["path"]])

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Json | bytes]:
        """Status and body for one request."""
        while (about := self._hangs_on) is not None and about in path.encode() + body:
            time.sleep(0.05)
        if self._down:
            raise ConnectionAbortedError
        path = unquote(urlparse(path).path)
        query: Json = json.loads(body) if path == "/graphql" else {}
        named = re.search(r"\b(?:query|mutation)\s+(\w+)", query.get("query", ""))
        operation = named[1] if named else " ".join([method, *re.findall(r"^/\w+|/file_stream$", path)])
        with self._lock:
            self.operations[operation] += 1
            if not path.startswith("/artifacts/"):
                self.bodies.append(body)
            for failure in self._failures:
                if failure[0] == operation and failure[2] > 0:
                    failure[2] -= 1
                    return failure[1], {"errors": [{"message": "injected"}]}
            if query:
                try:
                    return 200, self._graphql(operation, query.get("variables") or {})
                except LookupError as error:
                    return 200, {"data": {}, "errors": [{"message": str(error)}]}
            return self._rest(method, path, body)

    def _rest(self, method: str, path: str, body: bytes) -> tuple[int, Json | bytes]:
        stream = re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", path)
        if stream and method == "POST":
            return 200, self._file_stream(self.runs[stream[1]], json.loads(body))
        stored = re.fullmatch(r"/storage/([^/]+)/(.+)", path)
        if stored and method == "PUT":
            self.runs[stored[1]].files[stored[2]] = body
            return 200, {}
        if path.startswith("/artifacts/"):
            name = path.removeprefix("/artifacts/")
            if method == "GET":
                return 200, self._get_artifact(name)
            self._put_artifact(name, body)
            return 200, {}
        return 404, {"error": f"no such path: {path}"}

    @staticmethod
    def _file_stream(run: FakeRun, request: Json) -> Json:
        for name, chunk in (request.get("files") or {}).items():
            lines = run.streams.setdefault(name, {})
            if name == "wandb-summary.json":
                lines.clear()
            lines.update({chunk["offset"] + i: line for i, line in enumerate(chunk["content"])})
        if "complete" in request:
            run.complete, run.exit_code = bool(request["complete"]), request.get("exitcode")
        return {"exitcode": None, "limits": {}}

    def _graphql(self, operation: str, variables: Json) -> Json:
        handler = getattr(self, f"_on_{operation}", None)
        if handler is None:
            self.unknown.append(operation)
            return {"data": {}, "errors": [{"message": f"the stand-in does not know {operation}"}]}
        return {"data": handler(variables)}

    def _on_Viewer(self, variables: Json) -> Json:
        teams = {"edges": [{"node": {"name": self.entity}}]}
        return {"viewer": {"id": "u1", "entity": self.entity, "username": "t", "flags": "{}", "teams": teams}}

    def _on_GetDefaultEntity(self, variables: Json) -> Json:
        return {"viewer": {"id": "u1", "entity": self.entity}}

    def _on_ServerFeaturesQuery(self, variables: Json) -> Json:
        return {"serverInfo": {"features": []}}

    def _on_OrganizationCoreWeaveOrganizationID(self, variables: Json) -> Json:
        return {"entity": {"organization": None}}

    def _on_UpsertBucket(self, variables: Json) -> Json:
        if variables.get("id"):
            entity, project, name = base64.b64decode(variables["id"]).decode().split(":")
        else:
            entity, project, name = variables.get("entity") or self.entity, variables["project"], variables["name"]
        is_new = name not in self.runs
        run = self.runs.setdefault(name, FakeRun(name, project, entity))
        if variables.get("config"):
            run.raw_config = json.loads(variables["config"])
        run.fields |= {key: value for key, value in variables.items() if value is not None and key != "config"}
        owner = {"id": f"p:{project}", "name": project, "entity": {"id": f"e:{entity}", "name": entity}}
        bucket = {**self._bucket(run), "description": "", "sweepName": None, "project": owner}
        return {"upsertBucket": {"inserted": is_new, "bucket": bucket}}

    def _on_RunResumeStatus(self, variables: Json) -> Json:
        run = self.runs.get(variables["name"])
        owner = {"id": "p", "name": variables["project"], "entity": {"id": "e", "name": self.entity}}
        return {"model": {**owner, "bucket": self._resumed(run) if run else None}}

    def _on_CreateRunFiles(self, variables: Json) -> Json:
        run = self.runs[variables["run"]]
        files = [{"name": name, "uploadUrl": f"{self.url}/storage/{run.id}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": run.storage_id, "uploadHeaders": [], "files": files}}

    @staticmethod
    def _bucket(run: FakeRun) -> Json:
        return {
            "id": run.storage_id,
            "name": run.id,
            "displayName": run.fields.get("displayName") or run.id,
            "config": json.dumps(run.raw_config),
            "historyLineCount": len(run.history),
        }

    def _resumed(self, run: FakeRun) -> Json:
        """What the client needs to go on with a run: how much of it the server has."""
        return {
            **self._bucket(run),
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": len(run.lines("output.log")),
            "eventsLineCount": len(run.lines("wandb-events.jsonl")),
            "historyTail": json.dumps(run.lines("wandb-history.jsonl")[-1:]),
            "eventsTail": json.dumps(run.lines("wandb-events.jsonl")[-1:]),
            "tags": run.fields.get("tags") or [],
            "notes": run.fields.get("notes"),
            "wandbConfig": json.dumps({"t": (run.raw_config.get("_wandb") or {}).get("value", {}).get("t", {})}),
        }


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        # A client that closes an idle connection, or is killed, is part of what is tested.
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)


def _handler(fake: FakeWandb) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            fake.connections += 1
            super().setup()

        def log_message(self, format: str, *args: Any) -> None:
            return

        def _respond(self) -> None:
            status, content = fake.answer(self.command, self.path, self._body())
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _body(self) -> bytes:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Transfer-Encoding") == "chunked":
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

        do_GET = do_POST = do_PUT = _respond

    return Handler
