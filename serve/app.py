"""The application builder as `serve.app:build`, for `serve run` in the repository's root."""

from umarvel_ray.serving.app import build

__all__ = ["build"]
