"""What the ingress does between the routes and the models."""

import asyncio
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from umarvel_ray.errors import UserError
from umarvel_ray.serving import backend
from umarvel_ray.serving.errors import BadItem, NotSeen


@given(st.lists(st.integers(0, 150), max_size=40), st.integers(1, 6))
def test_calls_are_bounded_and_lose_nothing(sizes, most):
    items = list(range(len(sizes)))
    calls = list(backend.in_calls(items, [size * backend.CALL_BYTES // 100 for size in sizes], most))
    assert [one for call in calls for one in call] == items
    for call in calls:
        assert 0 < len(call) <= most
        assert len(call) == 1 or sum(sizes[one] for one in call) <= 100
    for call, following in pairwise(calls):  # no call could have taken the next item too
        assert len(call) == most or sum(sizes[one] for one in call) + sizes[following[0]] > 100


def test_who_waits_for_a_commit_looks_ever_less_often(monkeypatch):
    """A commit that takes ten times as long costs a few more looks, not ten times as many."""
    monkeypatch.setattr(backend, "AFTER_STEP_S", 0.001)
    looks = []

    async def look(seen_at: float):
        looks.append(time.perf_counter() - start)
        return backend.Behind(6) if looks[-1] < seen_at else ["hit"]

    counts = []
    for seen_at in (0.05, 0.5):
        looks.clear()
        start = time.perf_counter()
        assert asyncio.run(backend.until_seen(lambda at=seen_at: look(at), 7)) == ["hit"]
        counts.append(len(looks))
    assert counts[1] < 3 * counts[0]
    monkeypatch.setattr(backend, "AFTER_S", 0.2)
    monkeypatch.setattr(backend, "AFTER_STEP_S", 30.0)
    with pytest.raises(NotSeen):  # after 0.2 s, not after 30
        asyncio.run(asyncio.wait_for(backend.until_seen(lambda: look(99.0), 7), 20))


def test_a_prompts_documents_stay_together():
    a, b = object(), object()
    assert backend.by_prompt([(a, 1), (a, 2), (b, 3), (a, 4)]) == [(a, [1, 2]), (b, [3]), (a, [4])]


def test_what_nobody_foresaw_is_one_items_error(capfd):
    def encode(item, where, pictures):
        if item == {"text": "odd"}:
            raise ZeroDivisionError("do-not-log-me")
        if item == {"text": "bad"}:
            raise UserError(f"{where}: too bad")
        return item

    found = [
        backend._encode(encode, backend.ReadItem({"text": text}, f"input[{n}]", n), None)
        for n, text in enumerate(("good", "odd", "bad"))
    ]
    assert found[0] == {"text": "good"}
    assert [(one.message, one.param, one.index) for one in found[1:]] == [
        ("input[1]: cannot be read (ZeroDivisionError)", "input[1]", 1),
        ("input[2]: too bad", "input[2]", 2),
    ]
    assert "do-not-log-me" not in capfd.readouterr().err


def test_require_good_raises_the_first_bad_one():
    bad = BadItem("no", "input[1]", 1)
    with pytest.raises(BadItem) as error:
        backend.require_good(["good", bad, BadItem("neither", "input[2]", 2)])
    assert error.value is bad
