"""One Ray for a driver: the cluster it was pointed at, or a local one on loopback that it starts and stops itself."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # actors without a GPU keep CUDA_VISIBLE_DEVICES as it is
    "RAY_TRAIN_V2_ENABLED": "1",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TQDM": "0",
    "TOKENIZERS_PARALLELISM": "false",
}
LOCAL = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # despite its name: every daemon of a local Ray binds to loopback only
    "RAY_AUTH_MODE": "token",
}
LOCAL_CPUS = 4  # logical: two train workers, two embedders and the readers fit a two-core laptop
OBJECT_STORE_BYTES = 512 * 2**20


def prepare_environment(extra: Mapping[str, str] | None = None) -> None:
    """Set what Ray reads from the environment when it is imported; what the user has set stays.

    Args:
        extra: further variables, such as those of the HTTP service.
    """
    for name, value in (QUIET | ({} if "RAY_ADDRESS" in os.environ else LOCAL) | dict(extra or {})).items():
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
