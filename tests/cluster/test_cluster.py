"""The cluster files against Ray's own schemas and autoscaler, and every name in them against the code."""

from __future__ import annotations

import importlib
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import ray
import yaml
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.autoscaler._private.node_provider_availability_tracker import NodeAvailabilitySummary
from ray.autoscaler._private.resource_demand_scheduler import _default_utilization_scorer, get_nodes_for
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from tests.conftest import REPO
from umarvel_ray.recipe import SHIPPED, Cluster, load_recipe
from umarvel_ray.serving.app import (
    EmbedderDeployment,
    Ingress,
    RerankerDeployment,
    SearchDeployment,
    Service,
    WriterDeployment,
    build,
)
from umarvel_ray.serving.environment import SERVE

CLUSTER = REPO / "cluster"
DEPLOYMENTS = (Ingress, EmbedderDeployment, RerankerDeployment, SearchDeployment, WriterDeployment)


def read(name: str) -> dict:
    return yaml.safe_load((REPO / name).read_text())


def aws_config() -> dict:
    """aws.yaml with Ray's defaults filled in, as `ray up` sees it."""
    return prepare_config(read("cluster/aws.yaml"))


def kuberay_config(manifest: dict) -> dict:
    """The autoscaling config that Ray derives from the cluster inside a RayJob or RayService."""
    spec = manifest["spec"].get("rayClusterSpec") or manifest["spec"]["rayClusterConfig"]
    return _derive_autoscaling_config_from_ray_cr({"metadata": {"name": "c", "namespace": "n"}, "spec": spec})


def training(cluster: Cluster) -> list[dict]:
    """The bundles of a training phase: the trainer's controller, its workers, and the data readers."""
    worker = {"CPU": cluster.cpus_per_worker, "GPU": cluster.gpus_per_worker}
    return [{"CPU": 1}, *[worker] * cluster.workers, *[{"CPU": 1}] * cluster.preprocess_tasks]


def embedding(cluster: Cluster) -> list[dict]:
    """The bundles of the actor group that embeds for mining or evaluation."""
    return [{"CPU": cluster.cpus_per_embedder, "GPU": cluster.gpus_per_embedder}] * cluster.embedders


def unplaced(config: dict, demands: list[dict]) -> list[dict]:
    """The demands that Ray's autoscaler cannot place with any number of nodes it may add."""
    demands = [{key: value for key, value in demand.items() if value} for demand in demands]
    _, left = get_nodes_for(
        config["available_node_types"],
        {},
        config["head_node_type"],
        config["max_workers"],
        demands,
        partial(_default_utilization_scorer, node_availability_summary=NodeAvailabilitySummary({})),
    )
    return left


def replica_demands(application: dict) -> list[dict]:
    """Ray resources of every replica at the largest scale the configuration allows."""
    demands = []
    for deployment in application["deployments"]:
        options = deployment["ray_actor_options"]
        replicas = deployment.get("autoscaling_config", {}).get("max_replicas", deployment.get("num_replicas", 1))
        demands += [{"CPU": options["num_cpus"], "GPU": options.get("num_gpus", 0)}] * replicas
    return demands


def check_application(application: dict) -> None:
    module, function = application["import_path"].split(":")
    assert getattr(importlib.import_module(module), function) is build
    Service.model_validate(application["args"])  # rejects unknown names


def test_ray_up_accepts_aws():
    validate_config(aws_config())


@pytest.mark.parametrize(
    ("path", "value"),
    [(("max_workerz",), 3), (("head_node_type",), "boss"), (("available_node_types", "gpu", "resources"), {"GPU": -1})],
)
def test_the_schema_rejects_wrong_keys_and_values(path, value):
    config = aws_config()
    node = config
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    with pytest.raises(Exception, match=r"max_workerz|head_node_type|minimum"):
        validate_config(config)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in SHIPPED.glob("*.yaml")))
def test_aws_holds_every_shipped_recipe(recipe):
    cluster = load_recipe(recipe).cluster
    assert unplaced(aws_config(), training(cluster)) == []
    assert unplaced(aws_config(), embedding(cluster)) == []


def test_the_autoscaler_rejects_what_does_not_fit():
    too_wide = Cluster(gpus_per_worker=9)
    assert len(unplaced(aws_config(), training(too_wide))) == too_wide.workers


def test_rayjob_runs_an_existing_job_and_recipe_on_nodes_that_fit_them():
    manifest = read("cluster/rayjob.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayJob")
    python, script, flag, name, *overrides = shlex.split(manifest["spec"]["entrypoint"])
    assert (python, flag) == ("python", "--recipe")
    compile((REPO / script).read_text(), script, "exec")
    recipe = load_recipe(name, overrides)
    config = kuberay_config(manifest)
    driver = {"CPU": manifest["spec"]["entrypointNumCpus"]}
    assert unplaced(config, [driver, *training(recipe.cluster)]) == []
    assert unplaced(config, [driver, *embedding(recipe.cluster)]) == []
    assert recipe.run_dir.is_relative_to(mount_of(manifest["spec"]["rayClusterSpec"]))


def test_rayservice_is_a_serve_config_whose_replicas_fit():
    manifest = read("cluster/rayservice.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    serve_config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    ServeDeploySchema.model_validate(serve_config)
    [application] = serve_config["applications"]
    check_application(application)
    assert {given["name"] for given in application["deployments"]} == {deployment.name for deployment in DEPLOYMENTS}
    assert unplaced(kuberay_config(manifest), replica_demands(application)) == []
    mount = mount_of(manifest["spec"]["rayClusterConfig"])
    assert all(
        Path(application["args"][name]).is_relative_to(mount) for name in ("embedder", "reranker", "index", "live")
    )


def test_rayservice_sets_the_environment_of_a_local_service_with_haproxy():
    spec = read("cluster/rayservice.yaml")["spec"]["rayClusterConfig"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        [container] = group["template"]["spec"]["containers"]
        given = {one["name"]: one.get("value") for one in container["env"] if one["name"].startswith("RAY_SERVE_")}
        assert given == SERVE | {"RAY_SERVE_ENABLE_HA_PROXY": "1"}


def test_serve_config_fits_two_cores():
    config = read("serve/config.yaml")
    ServeDeploySchema.model_validate(config)
    [application] = config["applications"]
    check_application(application)
    assert sum(deployment.ray_actor_options["num_cpus"] for deployment in DEPLOYMENTS) <= 2


def test_rayservice_serves_what_rayjob_writes():
    run_dir = load_recipe("demo", shlex.split(read("cluster/rayjob.yaml")["spec"]["entrypoint"])[4:]).run_dir
    [application] = yaml.safe_load(read("cluster/rayservice.yaml")["spec"]["serveConfigV2"])["applications"]
    [local] = read("serve/config.yaml")["applications"]
    for name in ("embedder", "reranker", "index", "live"):
        assert Path(application["args"][name]).relative_to(run_dir) == Path(local["args"][name]).relative_to(
            "runs/demo"
        )


def test_every_node_runs_the_same_image_and_ray_version():
    images = {read("cluster/aws.yaml")["docker"]["image"]}
    for name, key in (("rayjob", "rayClusterSpec"), ("rayservice", "rayClusterConfig")):
        spec = read(f"cluster/{name}.yaml")["spec"][key]
        assert spec["rayVersion"] == ray.__version__
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
            [container] = group["template"]["spec"]["containers"]
            images.add(container["image"])
    assert len(images) == 1
    dockerfile = (CLUSTER / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{ray.__version__}-" in dockerfile
    assert f"ray=={ray.__version__}" in re.sub(r"\[.*?\]", "", (REPO / "requirements.lock").read_text())


def mount_of(spec: dict) -> Path:
    """The one shared folder, which must be mounted on every node."""
    mounts = {
        container["volumeMounts"][0]["mountPath"]
        for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])
        for container in group["template"]["spec"]["containers"]
    }
    [mount] = mounts
    return Path(mount)
