"""The application that `serve/config.yaml` deploys, for `serve run serve.app:build`."""

from umarvel_ray.serving.app import build

__all__ = ["build"]
