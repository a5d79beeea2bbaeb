"""One Ray for a driver: the cluster it was pointed at, or a local one on loopback that it starts and stops itself."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors without a GPU keep CUDA_VISIBLE_DEVICES as it is
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TQDM": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
SERVE = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # between deployments: half the time of an actor call
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # serve/ blocks no event loop: nothing to guard
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",  # handles are used on event loops alone: one change of thread less
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxy.middlewares",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),  # bytes; by default 4 MiB, a few pictures
}
LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: every daemon of a local Ray binds to loopback only
    "RAY_AUTH_MODE": "token",
}
LOCAL_CPUS = 4  # logical: two train workers, two embedders and the readers fit a two-core laptop
OBJECT_STORE_BYTES = 512 * 2**20


def prepare_environment() -> None:
    """Set what Ray reads from the environment when it is imported; what the user has set stays."""
    for name, value in (QUIET | SERVE | ({} if "RAY_ADDRESS" in os.environ else LOCAL)).items():
        os.environ.setdefault(name, value)


@contextmanager
def start_ray(
    cpus: int | None = None, object_store_bytes: int = OBJECT_STORE_BYTES, verbose: bool = False
) -> Iterator[None]:
    """Connect to the cluster named by RAY_ADDRESS (`ray job submit` sets it), else start a local Ray.

    A Ray that this process has joined already is used as it is. Only what was started here is shut down. `verbose`
    shows the workers' own output.
    """
    prepare_environment()
    import ray

    if ray.is_initialized():
        yield
    elif "RAY_ADDRESS" in os.environ:
        ray.init(logging_level="warning", log_to_driver=verbose)
        try:
            yield
        finally:
            ray.shutdown()
    else:
        # A socket's path ends at 107 bytes and Ray adds about 70 of its own, so a long TMPDIR would not do.
        temp_dir = tempfile.mkdtemp(prefix="um-", dir="/tmp")
        try:
            ray.init(
                address="local",
                num_cpus=cpus or max(LOCAL_CPUS, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=object_store_bytes,
                logging_level="warning",
                log_to_driver=verbose,
                _temp_dir=temp_dir,
            )
            yield
        finally:
            ray.shutdown()
            shutil.rmtree(temp_dir, ignore_errors=True)
