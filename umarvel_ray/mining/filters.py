"""Which mined candidates may serve as negatives (docs/method.md#mining-filters; the reference has no threshold).

Each candidate gets one verdict, from the first rule that applies:

1. `gold`: it is a positive of the query.
2. `same content`: it has the same text and picture as a positive.
3. `too similar`: its cosine to the query exceeds `max_similarity` (fixed, or calibrated on validation) or the
   positive's cosine less a relative margin.
4. `kept`: none of the above.

Pure functions of row numbers and cosines; the candidates of many queries are judged at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Set

import numpy as np

from umarvel_ray.ragged import Ragged

VERDICTS = GOLD, SAME_CONTENT, TOO_SIMILAR, KEPT = "gold", "same content", "too similar", "kept"


def judge(
    candidates: Ragged, scores: np.ndarray, positives: Ragged, content: np.ndarray, ceiling: np.ndarray
) -> np.ndarray:
    """One verdict per candidate.

    Args:
        candidates: each query's documents.
        scores: their cosines, float32 (m,).
        positives: each query's positives.
        content: for each document, a number that is equal for documents with equal content.
        ceiling: the largest cosine that a negative of each query may have, float64 (n,); see `ceilings`.

    Returns:
        int8 (m,), numbers of VERDICTS.
    """
    owners, documents = candidates.owners, candidates.values
    gold_content = Ragged(positives.offsets, content[positives.values])
    verdicts = np.where(scores.astype(np.float64) > ceiling[owners], 2, 3)  # 3. and 4.
    verdicts[gold_content.contains_pairs(owners, content[documents])] = 1  # 2.
    verdicts[positives.contains_pairs(owners, documents)] = 0  # 1.
    return verdicts.astype(np.int8)


def ceilings(max_similarity: np.ndarray, margin: float | None, positive_scores: np.ndarray | None) -> np.ndarray:
    """The largest cosine that a negative of each query may have, float64 (n,).

    Args:
        max_similarity: of each query's task.
        margin: if set, candidates above positive_score × (1 − margin) are too similar.
        positive_scores: each query's cosine to its nearest positive, NaN if unknown, which disables its margin.
    """
    if margin is None or positive_scores is None:
        return max_similarity
    lowest: np.ndarray = np.fmin(max_similarity, positive_scores.astype(np.float64) * (1.0 - margin))
    return lowest


def best_kept(candidates: Ragged, kept: np.ndarray, first: int, last: int | np.ndarray) -> Ragged:
    """Of each query's candidates that were kept, those at ranks `first` to before `last`, which may differ by query."""
    own = candidates.keep(kept)
    starts = np.minimum(own.offsets[:-1] + first, own.offsets[1:])
    return own.spans(starts, np.minimum(own.offsets[:-1] + last, own.offsets[1:]))


def fill_at_random(
    chosen: np.ndarray, count: int, pool: np.ndarray, forbidden: Set[int], rng: np.random.Generator
) -> list[int]:
    """One query's negatives: those chosen, and random documents of the pool up to `count` in all.

    The reference repeats the first negative instead where too few were kept (docs/method.md#too-few-negatives).

    Args:
        forbidden: documents that must not be drawn.

    Returns:
        Distinct documents; fewer than `count` only if the pool has no others outside `forbidden`.
    """
    filled: list[int] = chosen.tolist()
    taken = {*forbidden, *filled}
    for index in _draws(len(pool), 8 * count, rng):
        if len(filled) >= count:
            break
        document = int(pool[index])
        if document not in taken:
            taken.add(document)
            filled.append(document)
    return filled


def _draws(size: int, tries: int, rng: np.random.Generator) -> Iterator[int]:
    """Random indices, followed by every index once in case most of a small pool is forbidden."""
    if not size:
        return
    yield from rng.integers(0, size, tries)
    yield from rng.permutation(size)


def calibrate_threshold(gold_scores: np.ndarray, other_scores: np.ndarray) -> float:
    """The threshold t that best separates positives from other candidates: "score > t means positive" has the best F1.

    F1 is used because positives are rare among the candidates: accuracy would drop nothing, and Youden's J, which
    ignores class frequencies, would drop most hard negatives.

    Args:
        gold_scores: cosines of validation queries to their positives.
        other_scores: cosines of the same queries to their other top candidates.

    Returns:
        On ties the higher threshold, which drops fewer candidates; 1 if there are scores of one kind only.
    """
    if not len(gold_scores) or not len(other_scores):
        return 1.0
    edges = np.unique(np.concatenate([gold_scores, other_scores]))[::-1]
    gold_sorted, other_sorted = np.sort(gold_scores), np.sort(other_scores)
    hits = len(gold_sorted) - np.searchsorted(gold_sorted, edges, side="left")
    wrong = len(other_sorted) - np.searchsorted(other_sorted, edges, side="left")
    f1 = 2 * hits / (hits + wrong + len(gold_sorted))
    best = int(np.argmax(f1))
    below = edges[best + 1] if best + 1 < len(edges) else edges[best] - 2e-6
    return float((edges[best] + below) / 2)
