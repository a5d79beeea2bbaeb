"""Print the oldest versions that pyproject.toml allows, one requirement per line: `name[extra]==bound`.

Usage: `python tools/oldest.py [EXTRA ...]`; without extras, the package's own dependencies only.
"""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def main(extras: list[str]) -> None:
    """Turn every lower bound into a pin."""
    project = tomllib.loads(PYPROJECT.read_text())["project"]
    for requirement in project["dependencies"] + [one for e in extras for one in project["optional-dependencies"][e]]:
        print(re.sub(r">=([^,]+).*", r"==\1", requirement))


if __name__ == "__main__":
    main(sys.argv[1:])
