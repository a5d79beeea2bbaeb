"""Which mined candidates may serve as negatives (docs/method.md#mining-filters; the reference has no threshold).

Each candidate gets one verdict, from the first rule that applies:

1. `gold`: it is a positive of the query.
2. `same content`: it has the same text and picture as a positive.
3. `too similar`: its cosine to the query exceeds `max_similarity` (fixed, or calibrated on validation) or the
   positive's cosine less a relative margin.
4. `kept`: none of the above.

Pure functions of ids and cosines.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence, Set

import numpy as np

GOLD, SAME_CONTENT, TOO_SIMILAR, KEPT = "gold", "same content", "too similar", "kept"


def judge(
    ids: Sequence[str],
    scores: Sequence[float],
    contents: Sequence[Hashable],
    gold: Set[str],
    gold_contents: Set[Hashable],
    max_similarity: float,
    margin: float | None = None,
    positive_score: float | None = None,
) -> list[str]:
    """One verdict per candidate: GOLD, SAME_CONTENT, TOO_SIMILAR or KEPT.

    Args:
        ids, scores, contents: the candidates' ids, cosines to the query, and content keys.
        gold, gold_contents: the ids and content keys of the query's positives.
        margin: if set, candidates above positive_score × (1 − margin) are too similar.
        positive_score: the cosine of the query's nearest positive; None disables the margin.
    """
    ceiling = max_similarity
    if margin is not None and positive_score is not None:
        ceiling = min(ceiling, positive_score * (1.0 - margin))
    verdicts = []
    for id_, score, content in zip(ids, scores, contents, strict=True):
        if id_ in gold:  # 1.
            verdicts.append(GOLD)
        elif content in gold_contents:  # 2.
            verdicts.append(SAME_CONTENT)
        else:  # 3. and 4.
            verdicts.append(TOO_SIMILAR if score > ceiling else KEPT)
    return verdicts


def choose_negatives(
    kept: Sequence[str],
    count: int,
    min_rank: int,
    random_mix: float,
    pool: Sequence[str],
    forbidden: Set[str],
    rng: np.random.Generator,
) -> list[str]:
    """Choose `count` distinct negatives: the best kept candidates, and a share drawn at random from the pool.

    1. Take the best kept candidates, starting at `min_rank`.
    2. Fill up with random documents of the pool, also where too few candidates were kept (the reference repeats the
       first one instead, docs/method.md#too-few-negatives).

    Args:
        kept: candidates that passed the filters, best first.
        random_mix: the share of `count` drawn at random.
        forbidden: documents that must not be drawn.

    Returns:
        Fewer than `count` ids only if the pool has no other documents outside `forbidden`.
    """
    chosen = list(kept[min_rank : min_rank + count - round(count * random_mix)])  # 1.
    taken = {*forbidden, *chosen}
    for index in _draws(len(pool), 8 * count, rng):  # 2.
        if len(chosen) >= count:
            break
        if pool[index] not in taken:
            taken.add(pool[index])
            chosen.append(pool[index])
    return chosen


def _draws(size: int, tries: int, rng: np.random.Generator) -> Iterator[int]:
    """Random indices, followed by every index once in case most of a small pool is forbidden."""
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
        On ties the higher threshold, which drops fewer candidates; 1 if there are no gold scores.
    """
    if not len(gold_scores):
        return 1.0
    edges = np.unique(np.concatenate([gold_scores, other_scores]))[::-1]
    gold_sorted, other_sorted = np.sort(gold_scores), np.sort(other_scores)
    hits = len(gold_sorted) - np.searchsorted(gold_sorted, edges, side="left")
    wrong = len(other_sorted) - np.searchsorted(other_sorted, edges, side="left")
    f1 = 2 * hits / (hits + wrong + len(gold_sorted))
    best = int(np.argmax(f1))
    below = edges[best + 1] if best + 1 < len(edges) else edges[best] - 2e-6
    return float((edges[best] + below) / 2)
