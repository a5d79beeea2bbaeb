"""Look up a private name of another package, with a one-line error if the installed version lacks it."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

from umarvel_ray.errors import UserError


def private(package: str, versions: str, module: str, name: str) -> Any:
    """The object `name` of a module; `name` may be `Class.attribute`, or a field of a dataclass (its `Field`).

    Args:
        versions: versions of `package` known to have it, for the error message.

    Raises:
        UserError: the installed version does not have it.
    """
    try:
        found = import_module(module)
        for part in name.split("."):
            fields = getattr(found, "__dataclass_fields__", {})
            found = fields[part] if part in fields else getattr(found, part)
    except (ImportError, AttributeError):
        raise UserError(
            f"{package} {version(package)} has no {module}.{name}; install {package}{versions}, which this version of "
            "umarvel-ray was tested with"
        ) from None
    return found
