"""`ByteCache` against a list that does the same by brute force, and shared by threads."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from random import Random

from hypothesis import given
from hypothesis import strategies as st

from umarvel_ray.caches import ByteCache

KEYS = st.integers(0, 5)
CALLS = st.lists(
    st.one_of(
        st.tuples(st.just("get"), KEYS),
        st.tuples(st.just("put"), KEYS, st.binary(max_size=12)),
        st.tuples(st.just("clear")),
    ),
    max_size=60,
)


class Model:
    """Pairs of key and value, the most recently used last."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.pairs: list[tuple[int, bytes]] = []

    @property
    def nbytes(self) -> int:
        return sum(len(value) for _, value in self.pairs)

    def get(self, key: int) -> bytes | None:
        for pair in self.pairs:
            if pair[0] == key:
                self.pairs.remove(pair)
                self.pairs.append(pair)
                return pair[1]
        return None

    def put(self, key: int, value: bytes) -> None:
        if len(value) > self.max_bytes or key in dict(self.pairs):
            return
        while self.nbytes + len(value) > self.max_bytes:
            self.pairs.pop(0)
        self.pairs.append((key, value))

    def clear(self) -> None:
        self.pairs = []


@given(st.integers(0, 30), CALLS)
def test_does_what_the_model_does(max_bytes, calls):
    cache: ByteCache[int, bytes] = ByteCache(max_bytes, len)
    model = Model(max_bytes)
    for name, *arguments in calls:
        assert getattr(cache, name)(*arguments) == getattr(model, name)(*arguments)
        assert (len(cache), cache.nbytes) == (len(model.pairs), model.nbytes)
        assert cache.nbytes <= max_bytes
    for key, value in list(model.pairs):
        assert cache.get(key) == value


def test_a_value_larger_than_the_bound_is_not_kept_and_evicts_nothing():
    cache: ByteCache[str, bytes] = ByteCache(4, len)
    cache.put("a", b"1234")
    cache.put("b", b"12345")
    assert cache.get("b") is None
    assert cache.get("a") == b"1234"
    assert cache.nbytes == 4


def test_the_least_recently_used_is_evicted():
    cache: ByteCache[str, bytes] = ByteCache(4, len)
    for key in "abcd":
        cache.put(key, b"1")
    cache.get("a")
    cache.put("e", b"12")
    assert [key for key in "abcde" if cache.get(key)] == ["a", "d", "e"]


def test_a_cache_without_room_keeps_nothing_but_works():
    cache: ByteCache[str, bytes] = ByteCache(0, len)
    cache.put("a", b"1")
    assert cache.get("a") is None
    assert (len(cache), cache.nbytes) == (0, 0)


def test_threads_may_share_one():
    """Each key has one value, so whoever reads it must get that value or nothing."""
    cache: ByteCache[int, bytes] = ByteCache(1000, len)
    value_of = {key: bytes([key]) * (key + 1) for key in range(60)}

    def work(seed: int) -> int:
        random, hits = Random(seed), 0
        for _ in range(5000):
            key = random.randrange(60)
            found = cache.get(key)
            assert found in (None, value_of[key])
            hits += found is not None
            cache.put(key, value_of[key])
            assert cache.nbytes <= 1000
            if random.random() < 0.001:
                cache.clear()
        return hits

    with ThreadPoolExecutor(8) as threads:
        assert min(threads.map(work, range(8))) > 0
    kept = {key: value for key in value_of if (value := cache.get(key))}
    assert cache.nbytes == sum(map(len, kept.values()))
    assert len(cache) == len(kept)
