"""What the benchmarks share: models, items, timing, the machine, results and the evaluation protocol."""

from benchmarks.common import torchvision_operators  # noqa: F401  (has to run before transformers is imported)
