"""What Ray Serve reads from the environment when it is imported, in the driver and in each of its processes."""

from __future__ import annotations

SERVE = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # between deployments: half the time of an actor call
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # nothing here blocks an event loop
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",  # handles are used on event loops alone: one change of thread less
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "umarvel_ray.serving.proxy.middlewares",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**31 - 1),  # bytes; by default 4 MiB, a few pictures
}
