"""Environment variables that Ray Serve reads on import, in the driver and in each of its processes."""

from __future__ import annotations

SERVE = {
    "RAY_SERVE_USE_GRPC_BY_DEFAULT": "1",  # between deployments: half the latency of an actor call
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",  # our code never blocks an event loop
    "RAY_SERVE_RUN_ROUTER_IN_SEPARATE_LOOP": "0",  # handles are only used on event loops: one thread switch less
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "umarvel_ray.serving.proxy.middlewares",
    "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**28),  # bytes; the default of 4 MiB is a few pictures
}
