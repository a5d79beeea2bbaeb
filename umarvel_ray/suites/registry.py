"""All benchmarks by name."""

from __future__ import annotations

from umarvel_ray.errors import UserError
from umarvel_ray.suites.captions import COCO, FLICKR30K, SHAREGPT4V, URBAN1K, VISDIAL
from umarvel_ray.suites.composed import CIRCO, MULTITURN_FASHIONIQ, VIST
from umarvel_ray.suites.galleries import CC_NEG, GENECIS, SUGARCREPE
from umarvel_ray.suites.mmeb import MMEB
from umarvel_ray.suites.videos import MSR_VTT, MSVD

SUITES = {
    suite.name: suite
    for suite in (
        *(SHAREGPT4V, URBAN1K, FLICKR30K, COCO, CIRCO, GENECIS, VISDIAL, MULTITURN_FASHIONIQ, VIST),
        *(CC_NEG, SUGARCREPE, MSR_VTT, MSVD, MMEB),
    )
}
MBEIR, HELD_OUT = "mbeir", "mbeir-held-out"
NAMES = (MBEIR, HELD_OUT, *SUITES)
HELD_OUT_TASKS = ("nights_task4", "oven_task6", "oven_task8", "infoseek_task6", "infoseek_task8")


def check_name(name: str) -> None:
    """Make sure that there is such a benchmark.

    Raises:
        UserError: there is none; the message lists all.
    """
    if name not in NAMES:
        raise UserError(f"no benchmark '{name}'; choose one of: {', '.join(NAMES)}")
