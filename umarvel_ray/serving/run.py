"""`umarvel serve`: Ray Serve in a process of its own, whose output goes to a file; shown is what a person needs."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from umarvel_ray.errors import UserError
from umarvel_ray.serving import haproxy
from umarvel_ray.serving.settings import Service, read_config

TELL_EVERY_S = 10.0
PR_SET_PDEATHSIG = 1
STOP_S = 60.0  # for requests in flight, and for Ray's own processes
_ERROR = re.compile(r"umarvel_ray\.[\w.]+\.(?:UserError|Damaged|BadRemote|Unreachable): (.*)")


def run(config: Path) -> None:
    """Serve until SIGINT or SIGTERM; both let requests in flight end.

    Raises:
        UserError: an invalid config, a path that does not exist, a port in use, or a service that does not start.
    """
    service, host, port = read_config(config)
    address = f"http://{'127.0.0.1' if host in ('0.0.0.0', '::') else host}:{port}"
    _check_port(host, port)
    proxy = Path(tempfile.mkdtemp(prefix=haproxy.FOLDER_PREFIX, dir="/tmp"))
    descriptor, log = tempfile.mkstemp(prefix="umarvel-serve-", suffix=".log")
    with os.fdopen(descriptor, "w") as output:
        serving = subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", str(config)],
            stdout=output,
            stderr=output,
            env=haproxy.environment(proxy) | os.environ,
            start_new_session=True,  # Ctrl-C reaches only this process, which passes it on once
            preexec_fn=_become_service,
        )
    # A shell that starts it in the background has SIGINT ignored.
    previous = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        print(f"umarvel: starting; Ray's log is {log}", flush=True)
        _wait_until_ready(serving, address, Path(log))
        print(summary(service, address), flush=True)
        serving.wait()
        raise UserError(f"the service ended by itself; see {log}")
    except KeyboardInterrupt:
        print("umarvel: stopping", flush=True)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        _stop(serving)
        shutil.rmtree(proxy, ignore_errors=True)


def summary(service: Service, address: str) -> str:
    """What is served, where it answers and how to stop it."""
    own = f"{service.index}, with the documents of {service.data}" if service.index else "none: no search"
    lines = {
        "search page": f"{address}/" if service.index or service.live or service.store else None,
        "API": f"{address}/docs",
        "embedder": service.embedder,
        "reranker": service.reranker or "none: no reranking",
        "index": service.store.place if service.store else own,
        "new documents": "into the same" if service.store else service.live or "not taken",
        "keys": service.keys
        or ("from UMARVEL_API_KEYS" if os.environ.get("UMARVEL_API_KEYS") else "none: open to all"),
    }
    shown = [f"  {name:14}{value}" for name, value in lines.items() if value]
    return "\n".join(["umarvel: ready", *shown, "Press Ctrl-C to stop."])


def _wait_until_ready(serving: subprocess.Popen[bytes], address: str, log: Path) -> None:
    started = told = time.monotonic()
    errors: list[str] = []
    while serving.poll() is None and not errors:  # Serve goes on when an application cannot be built
        waiting = _waiting_for(address)
        if waiting == []:
            return
        errors = _ERROR.findall(log.read_text(errors="replace"))
        if time.monotonic() - told > TELL_EVERY_S:
            told = time.monotonic()
            of = f", waiting for {', '.join(waiting)}" if waiting else ""
            print(f"umarvel: starting for {told - started:.0f} s{of}", flush=True)
        time.sleep(0.5)
    text = log.read_text(errors="replace")
    if errors := _ERROR.findall(text):
        raise UserError(errors[-1].strip())
    last = text.strip().splitlines()[-1:] or ["it said nothing"]
    raise UserError(f"the service did not start ({last[0][:200]}); see {log}")


def _waiting_for(address: str) -> list[str] | None:
    """The deployments that are not ready; None if nothing answers yet."""
    try:
        with urllib.request.urlopen(f"{address}/health", timeout=5):
            return []
    except urllib.error.HTTPError as error:
        with error:
            return _deployments(error.read()) if error.code == 503 else None
    except OSError:
        return None


def _deployments(body: bytes) -> list[str] | None:
    try:
        found: Any = json.loads(body)["waiting_for"]
        return [str(name).removesuffix("Deployment") for name in found]
    except (ValueError, TypeError, KeyError):  # Serve's own answer, before the application's
        return None


def _check_port(host: str, port: int) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(
                f"cannot listen on {host}:{port} ({error.strerror}); set another port in a copy of the config"
            ) from None


def _stop(serving: subprocess.Popen[bytes]) -> None:
    if serving.poll() is None:
        serving.send_signal(signal.SIGINT)
        try:
            serving.wait(STOP_S)
        except subprocess.TimeoutExpired:
            serving.kill()


def _become_service() -> None:
    """Heed SIGINT, and on Linux get it when the process that started this one ends, however it ends."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt
