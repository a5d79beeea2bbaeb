"""YAML that users write: UTF-8, and each key once in its mapping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from umarvel_ray.errors import UserError


class _Loader(yaml.SafeLoader):
    """Refuses a key that a mapping has already: PyYAML would drop the earlier value without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"key '{key.value}' occurs twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text.

    Args:
        where: names the text in errors.

    Raises:
        UserError: not valid, nested too deeply, or with a key twice.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None)
        raise UserError(f"{where}{line}: not valid YAML{f' ({problem})' if problem else ''}") from None
    except (RecursionError, ValueError) as error:  # ValueError: a date or a number that does not exist
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise UserError(f"{where}: not valid YAML ({reason})") from None


def read_yaml(path: Path, where: str) -> Any:
    """The value of a YAML file.

    Raises:
        UserError: it cannot be read, or is not UTF-8; see `parse_yaml`.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: byte {error.start + 1} is not UTF-8; save the file as UTF-8") from None
    return parse_yaml(text, where)
