"""Coverage-guided fuzzing of `open_image`; not part of the test suite, and atheris is not a dependency.

After `pip install --target DIR atheris`:
`PYTHONPATH=DIR:. python tests/support/fuzz_images.py -max_total_time=300 CORPUS`.
CORPUS is a folder for the inputs it finds, seeded with valid pictures of every format. Anything but a one-line
`UserError` ends the run and saves the input.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["PIL", "umarvel_ray.items"]):
    from PIL import Image

    from umarvel_ray.items.images import open_image
    from umarvel_ray.items.limits import MediaLimits

    Image.init()  # load every plugin while imports are instrumented

from tests.items.test_hostile_images import VALID, outcome

LIMITS = MediaLimits(pixels=1_000_000, only_bytes=True)


def one(data: bytes) -> None:
    outcome(lambda: open_image(data, "input[0]", LIMITS))


if __name__ == "__main__":
    corpus = Path(next((argument for argument in sys.argv[1:] if not argument.startswith("-")), "corpus"))
    corpus.mkdir(exist_ok=True)
    for name, data in VALID.items():
        (corpus / name.replace(" ", "-")).write_bytes(data)
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
