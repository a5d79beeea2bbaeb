"""A private name of another package: found, or one line with the package and the versions that have it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import import_module
from importlib.metadata import version
from json import JSONDecoder

import pytest

from tests.conftest import REPO
from umarvel_ray.compat.private import private
from umarvel_ray.errors import UserError


def test_names_and_attributes_of_classes_are_found():
    assert private("pytest", ">=1", "json", "JSONDecoder") is JSONDecoder
    assert private("pytest", ">=1", "json", "JSONDecoder.decode") is JSONDecoder.decode
    assert private("pytest", ">=1", "json.decoder", "JSONDecoder") is JSONDecoder


def test_a_field_of_a_dataclass_is_found():
    assert private("ray", ">=1", "umarvel_ray.items.limits", "MediaLimits.formats").name == "formats"


@pytest.mark.parametrize("upstream", ["deepspeed", "ray", "torch", "transformers"])
def test_the_versions_named_in_errors_are_those_that_can_be_installed(upstream):
    dependencies = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["dependencies"]
    [bounds] = [match[1] for line in dependencies if (match := re.fullmatch(rf"{upstream}(?:\[.*\])?(\W.*)", line))]
    lookup = getattr(import_module(f"umarvel_ray.compat.{upstream}"), f"_{upstream}")
    assert lookup.args == (upstream, bounds)


@pytest.mark.parametrize(
    ("module", "name"),
    [("json", "nothing"), ("json", "JSONDecoder.nothing"), ("json", "nothing.decode"), ("json.nothing", "a")],
)
def test_a_missing_name_is_one_line_with_the_package_and_its_versions(module, name):
    with pytest.raises(UserError) as caught:
        private("pytest", ">=1.2,<1.4", module, name)
    line = str(caught.value)
    assert "\n" not in line
    assert f"pytest {version('pytest')} has no {module}.{name}; install pytest>=1.2,<1.4" in line
    assert caught.value.__cause__ is None


@pytest.mark.parametrize(
    ("upstream", "module", "name"),
    [
        ("transformers", "transformers.masking_utils", "sdpa_mask"),
        ("transformers", "transformers.integrations.sdpa_attention", "sdpa_attention_forward"),
        ("torch", "torch", "_int_mm"),
        ("ray", "ray.data._internal.execution.execution_callback", "ExecutionCallback"),
    ],
)
def test_a_version_without_a_private_name_fails_on_import(upstream, module, name):
    """In a process of its own, in which the name is removed and the compat module imported again."""
    code = f"""
import importlib
from umarvel_ray.errors import UserError
compat = importlib.import_module("umarvel_ray.compat.{upstream}")
delattr(importlib.import_module({module!r}), {name!r})
try:
    importlib.reload(compat)
except UserError as error:
    print(error)
"""
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120)
    [line] = process.stdout.splitlines()
    assert line.startswith(f"{upstream} {version(upstream)} has no {module}.{name}; install {upstream}>=")
