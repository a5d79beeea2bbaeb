"""The shipped demo: small real data and a tiny base model. Recipes refer to both as `builtin:demo`."""

from pathlib import Path

NAME = "builtin:demo"
DATA = Path(__file__).parent / "data"
BASE = Path(__file__).parent / "base"
