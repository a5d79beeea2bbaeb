"""Splits by content: what shares a picture or a text, directly or through others, stays together."""

from __future__ import annotations

import hashlib

import numpy as np

from umarvel_ray.errors import UserError
from umarvel_ray.importing.store import Links

TRAIN, VALIDATION, TEST = range(3)
SPLITS = ("train", "validation", "test")
NOWHERE = -1
SHARE, FEWEST, MOST = 0.05, 100, 1000  # of the queries, in each held-out split
SMALL = 10  # where there are few queries, one in ten is held out


def held_out_count(queries: int, holdout: str | None) -> int:
    """How many queries validation and test shall each have.

    Args:
        holdout: a share ("0.1", "10%") or a count ("200"); None for the default.

    Raises:
        UserError: neither, or nothing would be left to train on.
    """
    if holdout is None:
        return max(1, min(MOST, max(round(SHARE * queries), min(FEWEST, queries // SMALL))))
    try:
        number = float(holdout.removesuffix("%")) / (100 if holdout.endswith("%") else 1)
    except ValueError:
        number = -1.0
    whole = number >= 1 and number % 1 == 0 and not holdout.endswith("%")
    if not (0 < number < 1 or whole):
        raise UserError(f"--holdout {holdout}: give a share such as 0.05 or 5%, or a count such as 200")
    count = max(1, round(number * queries) if number < 1 else int(number))
    if 2 * count >= queries:
        raise UserError(f"--holdout {holdout}: twice that leaves none of {queries} queries to train on; give less")
    return count


def split_queries(links: Links, holdout: str | None, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Assign queries and items to splits, by content alone: the order of rows does not matter.

    Contents are joined that an item, or a query with its positives, has together. Whole groups are drawn for test and
    validation until these are full; a group that is too large stays in train. Negatives join no groups, or there would
    be only one: a negative is in the split of the group that it belongs to, or else in train if a training query names
    it, or else in validation, or else in test.

    Returns:
        The split of each query, int64 (m,), and of each item, int64 (n,); NOWHERE for an item that would be in two.

    Raises:
        UserError: fewer than three groups; see `held_out_count`.
    """
    count = held_out_count(len(links.asked), holdout)
    group = groups_of(len(links.digests), _joined(links))
    some = np.empty(len(links.modality), np.int64)  # one content of each item
    some[links.contents[:, 0]] = links.contents[:, 1]
    query_group = group[some[links.asked]]
    owned, sizes = np.unique(query_group, return_counts=True)
    if len(owned) < len(SPLITS):
        raise UserError(
            f"{len(links.asked)} queries cannot be split: they are too few, or connected by pictures and texts that "
            f"they share ({', '.join(SPLITS)} need one group each, found {len(owned)}); add rows with other content"
        )
    lowest = np.full(len(links.digests), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(lowest, group, links.digests)
    splits = held_out(sizes, _drawn(lowest[owned], seed), count)
    of_group = np.full(len(links.digests), NOWHERE)
    of_group[owned] = splits
    query_split = of_group[query_group]
    of_content = _with_negatives(of_group[group], links, query_split)
    items, contents = links.contents.T
    first, last = (np.full(len(links.modality), end) for end in (len(SPLITS), NOWHERE))
    np.minimum.at(first, items, of_content[contents])
    np.maximum.at(last, items, of_content[contents])
    return query_split, np.where(first == last, last, NOWHERE)


def groups_of(count: int, pairs: np.ndarray) -> np.ndarray:
    """Connected components: for each of `count` nodes a number, int64 (count,), equal where pairs (·, 2) connect."""
    parent = list(range(count))

    def root(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for one, other in pairs.tolist():
        one, other = root(one), root(other)
        parent[max(one, other)] = min(one, other)
    return np.array([root(node) for node in range(count)], np.int64)


def held_out(sizes: np.ndarray, order: np.ndarray, count: int) -> np.ndarray:
    """Draw whole groups for test and validation: int64 (g,), the split of each.

    Args:
        sizes: queries of each group, int64 (g,), of at least three groups.
        order: the groups in the order in which they are drawn.
        count: the queries that test and validation have at most, unless no group is that small.
    """
    split = np.full(len(sizes), TRAIN)
    room = {TEST: count, VALIDATION: count}
    for group in order.tolist():
        target = max(room, key=room.__getitem__)
        if sizes[group] <= room[target]:
            split[group] = target
            room[target] -= int(sizes[group])
    for target in room:
        if not (split == target).any():
            left = order[split[order] == TRAIN]
            split[left[np.argmin(sizes[left])]] = target
    return split


def _joined(links: Links) -> np.ndarray:
    """Pairs of contents, int64 (·, 2), that must be in the same split."""
    of_item = links.contents[np.argsort(links.contents[:, 0], kind="stable")]
    used = np.zeros(len(links.modality), bool)  # an item that is only a negative joins nothing
    used[links.asked] = used[links.positives[:, 1]] = True
    own = of_item[used[of_item[:, 0]]]
    within = np.flatnonzero(own[1:, 0] == own[:-1, 0])
    some = np.empty(len(links.modality), np.int64)
    some[of_item[:, 0]] = of_item[:, 1]
    across = np.stack([some[links.asked[links.positives[:, 0]]], some[links.positives[:, 1]]], axis=1)
    return np.concatenate([np.stack([own[within, 1], own[within + 1, 1]], axis=1), across])


def _with_negatives(of_content: np.ndarray, links: Links, query_split: np.ndarray) -> np.ndarray:
    """The split of each content, where those that only negatives have are in the first split that names them."""
    named = np.full(len(links.modality), len(SPLITS))
    np.minimum.at(named, links.negatives[:, 1], query_split[links.negatives[:, 0]])
    items, contents = links.contents.T
    earliest = np.full(len(of_content), len(SPLITS))
    np.minimum.at(earliest, contents, named[items])
    free = (of_content == NOWHERE) & (earliest < len(SPLITS))
    return np.where(free, earliest, of_content)


def _drawn(keys: np.ndarray, seed: int) -> np.ndarray:
    """An order of groups, int64 (g,), that depends on their keys, uint64 (g,), and the seed only."""
    salt = str(seed).encode()[:16]
    drawn = (hashlib.blake2b(key.to_bytes(8, "big"), digest_size=8, salt=salt).digest() for key in keys.tolist())
    return np.argsort(np.frombuffer(b"".join(drawn), ">u8"), kind="stable")
