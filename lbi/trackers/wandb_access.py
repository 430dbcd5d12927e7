"""Whether W&B can be used right now: what the user wants, a key, a server that answers.

The driver asks this after every sweep, also when nothing is new; so wandb, which takes a
second to import, is not needed here.
"""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

CONNECT_S = 2.0


@dataclass(frozen=True, slots=True)
class Access:
    """How results can be written, found out by the writer and kept beside the plan.

    `mode` is online, offline or none. `kind` says what stands in the way of online (asked,
    no_key, no_network, refused; empty if nothing does), `reason` says it to a person.
    """

    mode: str
    kind: str
    reason: str
    server: str
    key_sources: str


def wished_mode(configured: str) -> tuple[str, str]:
    """auto, online, offline or disabled, and who wants it so. WANDB_MODE is the user's last word."""
    said = os.environ.get("WANDB_MODE", "")
    if said == "disabled":
        return "disabled", "WANDB_MODE=disabled"
    if said in ("offline", "dryrun"):
        return "offline", f"WANDB_MODE={said}"
    return configured, f"tracker.mode={configured}"


def may_be_online_now(last: Access | None) -> bool:
    """Whether a writer might get online, given what the last one met; False only where it surely cannot."""
    if last is None:
        return True
    if last.kind == "no_key":
        return key_sources() != last.key_sources
    if last.kind == "no_network":
        return unreachable(os.environ.get("WANDB_BASE_URL") or last.server) is None
    return True


def key_sources() -> str:
    """Changes whenever a place changes in which wandb looks for a key. Tells nothing about the key."""
    found = [f"{name}={name in os.environ}" for name in ("WANDB_API_KEY", "WANDB_IDENTITY_TOKEN_FILE")]
    folder = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb")
    netrc = [Path(os.environ["NETRC"])] if os.environ.get("NETRC") else [Path("~/.netrc"), Path("~/_netrc")]
    for path in (folder / "settings", *netrc):
        try:
            found.append(f"{path}={path.expanduser().stat().st_mtime_ns}")
        except (OSError, RuntimeError):
            found.append(f"{path}=absent")
    found.append(os.environ.get("WANDB_BASE_URL", ""))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()[:16]


def unreachable(url: str, seconds: float = CONNECT_S) -> str | None:
    """Why no connection to the server (or the proxy before it) comes about; None if one does."""
    host, port = _first_hop(url)
    problem: list[str | None] = [f"{host}:{port} does not answer within {seconds:g} s"]

    def connect() -> None:
        try:
            socket.create_connection((host, port), timeout=seconds).close()
            problem[0] = None
        except OSError as error:
            problem[0] = f"{host}:{port}: {error.strerror or error}"

    # Looking up a name has no timeout of its own, so it is left behind when it takes too long.
    attempt = threading.Thread(target=connect, daemon=True)
    attempt.start()
    attempt.join(seconds)
    return problem[0]


def _first_hop(url: str) -> tuple[str, int]:
    """Host and port that a client of `url` connects to: the proxy of the environment, or the server."""
    target = urlsplit(url)
    host = target.hostname or "localhost"
    proxy = urllib.request.getproxies_environment().get(target.scheme)
    # Go's HTTP client, which wandb uploads with, never uses a proxy for the machine itself.
    is_local = host == "localhost" or host.startswith("127.")
    if proxy and not is_local and not urllib.request.proxy_bypass(host):
        target = urlsplit(proxy if "//" in proxy else f"//{proxy}", scheme="http")
        host = target.hostname or host
    return host, target.port or (443 if target.scheme == "https" else 80)
