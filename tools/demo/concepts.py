"""Concepts: a thing with all its names and pictures, and the rule that keeps held-out concepts out of training.

A concept is a connected component: records that share a normalized name, an emoji key or a picture's pixels belong
together, and a whole component goes to one split. A name of a validation or test concept must not occur as a
whole-word phrase in any training text, nor the pixels of one of its pictures in any training row (`find_leaks`).
"""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator


def normalize(text: str) -> str:
    """Lower case, no accents, punctuation to single spaces, '&' to 'and'."""
    text = unicodedata.normalize("NFKD", text.replace("&", " and ")).casefold()
    text = "".join(c for c in text if not unicodedata.combining(c))
    return " ".join(re.findall(r"[^\W_]+", text))


class Phrases:
    """A set of normalized phrases to find in a text, as whole words."""

    def __init__(self, phrases: Iterable[str]):
        self.by_first_word: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        for phrase in phrases:
            words = tuple(phrase.split())
            self.by_first_word[words[0]].add(words)

    def found_in(self, text: str) -> set[str]:
        words = tuple(normalize(text).split())
        return {
            " ".join(phrase)
            for start, word in enumerate(words)
            for phrase in self.by_first_word.get(word, ())
            if words[start : start + len(phrase)] == phrase
        }


def group(links: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Union-find over (node, node) links: node -> the smallest node of its component."""
    parent: dict[str, str] = {}

    def root(node: str) -> str:
        parent.setdefault(node, node)
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    for a, b in links:
        low, high = sorted((root(a), root(b)))
        parent[high] = low
    return {node: root(node) for node in parent}


def mentions(texts: Iterable[tuple[str, str]], names: dict[str, set[str]]) -> dict[str, int]:
    """How many texts of other concepts name each concept.

    Args:
        texts: (concept, text).
        names: concept -> phrases.
    """
    owners = defaultdict(set)
    for concept, phrases in names.items():
        for phrase in phrases:
            owners[phrase].add(concept)
    lookup = Phrases(owners)
    counts = dict.fromkeys(names, 0)
    for concept, text in texts:
        for owner in set().union(*(owners[phrase] for phrase in lookup.found_in(text))) - {concept}:
            counts[owner] += 1
    return counts


def find_leaks(
    rows: Iterable[dict], held_out: Phrases, held_out_pixels: set[str], pixel_hash: Callable[[bytes], str]
) -> Iterator[tuple[str, str]]:
    """(row id, reason) for every row that names a held-out concept in text, instruction or concept, or shows it.

    Rows are dicts with `id`, `text`, `image`, `concept` and, for queries, `instruction`; values may be None.
    """
    for row in rows:
        for column in ("text", "instruction", "concept"):
            for phrase in sorted(held_out.found_in(row.get(column) or "")):
                yield row["id"], f"{column} names {phrase!r}"
        if row["image"] is not None and pixel_hash(row["image"]) in held_out_pixels:
            yield row["id"], "image shows a held-out concept"
