"""Ray for a driver: the cluster named by RAY_ADDRESS, or a local Ray on loopback that it starts and stops itself."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from umarvel_ray.errors import UserError

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors without a GPU keep CUDA_VISIBLE_DEVICES
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TQDM": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name, makes all daemons of a local Ray bind to loopback
    "RAY_AUTH_MODE": "token",
}
LOCAL_CPUS = 4  # logical; lets two training workers, two embedders and the readers run on a two-core laptop
STARTS, TOO_SLOW = 3, "timed out during startup"
CONNECT_S = 20  # to a cluster that may be far away
OBJECT_STORE_BYTES = 512 * 2**20


def prepare_environment(extra: Mapping[str, str] | None = None) -> None:
    """Set the environment variables that Ray reads on import; the user's own values take precedence.

    Args:
        extra: more variables, such as those of the HTTP service.
    """
    for name, value in (QUIET | ({} if "RAY_ADDRESS" in os.environ else LOCAL) | dict(extra or {})).items():
        os.environ.setdefault(name, value)


@contextmanager
def start_ray(
    cpus: int | None = None, object_store_bytes: int = OBJECT_STORE_BYTES, verbose: bool = False
) -> Iterator[None]:
    """Connect to the cluster named by RAY_ADDRESS (set by `ray job submit`), or start a local Ray.

    If this process is already connected to Ray, that connection is used. Only what was started here is shut down.

    Args:
        cpus: logical CPUs of a local Ray; default: 4, or the number of cores if that is larger.
        object_store_bytes: size of a local Ray's object store.
        verbose: show the output of Ray workers.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        yield
    elif "RAY_ADDRESS" in os.environ:
        _require_reachable(os.environ["RAY_ADDRESS"])
        try:
            ray.init(logging_level=logging.WARNING, log_to_driver=verbose)
        except (ConnectionError, ValueError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"no Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']} ({reason})") from None
        try:
            yield
        finally:
            ray.shutdown()
    else:
        # Socket paths are limited to 107 bytes and Ray adds about 70, so a long TMPDIR would not work.
        temp_dir = tempfile.mkdtemp(prefix="um-", dir="/tmp")
        options = {
            "num_cpus": cpus or max(LOCAL_CPUS, os.cpu_count() or 1),
            "include_dashboard": False,
            "object_store_memory": object_store_bytes,
            "logging_level": logging.WARNING,
            "log_to_driver": verbose,
            "_temp_dir": temp_dir,
        }
        try:
            _start_local(options)
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(temp_dir, ignore_errors=True)


def _require_reachable(address: str) -> None:
    """Try to connect: Ray itself would wait for minutes.

    Args:
        address: of a cluster, if it names a host and a port; "auto" and the like do not.

    Raises:
        UserError: nobody answers.
    """
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster at RAY_ADDRESS={address} ({error}); correct or unset it") from None


def _start_local(options: dict[str, Any]) -> None:
    """Start Ray on this machine, again if it took longer than the half minute that Ray 2.60 waits for itself.

    Raises:
        UserError: the machine is too busy.
    """
    import ray

    for _ in range(STARTS):
        try:
            ray.init(address="local", **options)
            return
        except Exception as error:
            if TOO_SLOW not in str(error):
                raise
            ray.shutdown()
    raise UserError(f"Ray did not start in {STARTS} attempts of 30 s each: this machine is too busy; try again later")
