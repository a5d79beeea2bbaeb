"""Coverage-guided fuzzing of the image path; not part of the tests, and atheris is no dependency.

`pip install --target DIR atheris`, then `PYTHONPATH=DIR:. python tests/support/fuzz_images.py -max_total_time=300 CORPUS`.
CORPUS is a folder for what it learns; valid pictures of every format are put there first. Anything but a `UserError`
of one line ends the run and leaves the bytes.
"""

from __future__ import annotations

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["PIL", "umarvel_ray.data"]):
    from PIL import Image

    from umarvel_ray.items.images import open_image
    from umarvel_ray.items.limits import MediaLimits

    Image.init()  # every plugin, here, where imports are instrumented

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
