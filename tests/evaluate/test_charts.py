"""The charts of the report."""

import re

import pytest

from umarvel_ray.evaluate.charts import Line, duration, line_chart, smooth, ticks


def test_points_are_placed_by_value():
    svg = line_chart([Line("a", [0.0, 0.5, 1.0], "local", dots=True)], "t", ["x", "y", "z"], 300, 200, 0, 1)
    dots = [(float(x), float(y)) for x, y in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', svg)]
    xs, ys = zip(*dots, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
    assert ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert ys[0] > ys[2]


def test_small_helpers():
    assert ticks(0, 1) == pytest.approx([0, 0.25, 0.5, 0.75, 1.0])
    assert ticks(3, 3) == [3]
    assert duration(59.6) == "1 min 00 s"
    assert duration(3725) == "1 h 02 min"
    assert smooth([2.0] * 30) == pytest.approx([2.0] * 30)
    assert smooth([0.0] * 50 + [1.0] * 200)[-1] == pytest.approx(1.0, abs=1e-3)
