"""Which mined candidates may serve as negatives (method section 3; the paper's threshold, which its code lacks).

Each candidate gets one verdict, by the first rule that applies: it is `gold`; it has the `same content` as a gold
document; it is `too similar` to the query (above `max_similarity`, fixed or calibrated on validation, or above the
positive's similarity less a margin); else it is `kept`. Pure functions on ids and cosines.
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
    """One verdict (the four above) per candidate.

    Args:
        ids, scores, contents: the candidates, their cosines to the query and their content keys.
        gold, gold_contents: the query's positives and their content keys.
        margin: when set, candidates above positive_score × (1 − margin) are too similar.
    """
    ceiling = max_similarity
    if margin is not None and positive_score is not None:
        ceiling = min(ceiling, positive_score * (1.0 - margin))
    verdicts = []
    for id_, score, content in zip(ids, scores, contents, strict=True):
        if id_ in gold:
            verdicts.append(GOLD)
        elif content in gold_contents:
            verdicts.append(SAME_CONTENT)
        else:
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
    """`count` distinct negatives: the best kept candidates from `min_rank` on, and a share drawn at random.

    Where too few candidates were kept the rest is drawn at random too (the reference repeats the first one). Fewer than
    `count` come back only when the pool itself has no more documents outside `forbidden`.
    """
    chosen = list(kept[min_rank : min_rank + count - round(count * random_mix)])
    taken = {*forbidden, *chosen}
    for index in _draws(len(pool), 8 * count, rng):
        if len(chosen) >= count:
            break
        if pool[index] not in taken:
            taken.add(pool[index])
            chosen.append(pool[index])
    return chosen


def _draws(size: int, tries: int, rng: np.random.Generator) -> Iterator[int]:
    """Random indices; then, for a pool so small that these were mostly forbidden, every index once."""
    yield from rng.integers(0, size, tries)
    yield from rng.permutation(size)


def calibrate_threshold(gold_scores: np.ndarray, other_scores: np.ndarray) -> float:
    """The similarity that best tells gold from other candidates: the t of largest F1 for "score > t means gold".

    Args:
        gold_scores: cosines of validation queries to their gold documents.
        other_scores: cosines of the same queries to their other top candidates.

    F1 rather than accuracy (gold is rare among candidates, so accuracy would drop nothing) or Youden's J (it ignores
    that rarity and would drop most hard negatives). Ties go to the higher threshold, which drops less. Without any gold
    score nothing can be told apart and the threshold is 1.
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
