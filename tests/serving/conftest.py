"""A service of the tiny run, for each file of tests that asks for its address."""

import pytest
from ray import serve

from tests.support.served import service_of
from umarvel_ray.serving.app import build
from umarvel_ray.serving.settings import Service


@pytest.fixture(scope="module")
def service(run) -> Service:
    return service_of(run)


@pytest.fixture(scope="module")
def url(address, service) -> str:
    serve.run(build(service), name="umarvel", route_prefix="/")
    return address
