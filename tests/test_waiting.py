"""A local Ray that is too small ends a job at once; a cluster may grow."""

import pytest
import ray

from umarvel_ray.errors import UserError
from umarvel_ray.waiting import require_room, resources


def test_a_local_ray_must_be_large_enough(ray_cluster, monkeypatch):
    cpus = ray.cluster_resources()["CPU"]
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    require_room("stage1", int(cpus), "workers", resources(1, 0), "cluster.workers")
    message = rf"stage1: 8 workers need {8 * cpus:g} CPUs, and Ray on this machine has {cpus:g}; lower cluster.workers"
    with pytest.raises(UserError, match=message):
        require_room("stage1", 8, "workers", resources(cpus, 0), "cluster.workers")
    with pytest.raises(UserError, match="1 actors need 1 GPUs, and Ray on this machine has 0"):
        require_room("embedding", 1, "actors", resources(0.5, 1), "cluster.embedders")
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    require_room("stage1", 8, "workers", resources(cpus, 0), "cluster.workers")
