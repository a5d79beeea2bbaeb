"""The base's vocabulary: part of the text teacher's word pieces, each with the teacher's vector of it."""

import math
import re
from collections import Counter

import torch
from torch import Tensor
from torch.nn import functional as F

from tools.demo.base_model import CONTROL_TOKENS, HIDDEN
from tools.demo.corpus import Corpus
from tools.demo.teachers import TextTeacher

VOCABULARY = 12_300
ANSWERS = "▁yes", "▁no"
ANSWER_LENGTH = 1.2  # twice that of the rarest words


def choose_pieces(teacher: TextTeacher, corpus: Corpus) -> tuple[list[tuple[str, float]], list[int]]:
    """Part of the teacher's word pieces: (piece, log probability) with "▁" at word starts, and their teacher ids.

    Kept are all ASCII characters; the most frequent words of the training texts; the most frequent English words (the
    teacher's ids are in order of frequency); words whose meaning is close to a picture's description; and the
    continuations that spell the other words.
    """
    pieces = teacher.pieces()
    ids = {piece: i for i, piece in enumerate(pieces)}
    usable = [p for p in pieces if p.isascii() and not p.startswith("[")]
    words = [p for p in usable if not p.startswith("##") and len(p) > 1]
    seen = Counter()
    for weight, texts in ((1, corpus.passages), (3, [t for own in corpus.texts for t in set(own)])):
        for text in texts:
            for word in re.findall(r"[a-z0-9]+", text.lower()):
                seen[word] += weight
    kept = {p for p in usable if len(p.removeprefix("##")) == 1}
    kept |= set(sorted(words, key=lambda w: -seen[w])[:5000])
    kept |= set(words[:3000])
    rest = [w for w in words if w not in kept and w.isalpha() and len(w) > 2]
    labels = sorted({min(own, key=len) for own in corpus.texts if own})
    near = F.normalize(teacher.embed(rest), dim=-1) @ teacher.embed(labels).T
    nearness = near.topk(5).values.mean(1).tolist()
    room = VOCABULARY - len(CONTROL_TOKENS) - 257 - 1
    pictured = [w for _, w in sorted(zip(nearness, rest, strict=True), reverse=True)]
    kept |= set(pictured[: room - len(kept) - 1600])
    endings = Counter()
    for rank, word in enumerate(w for w in words if w not in kept):
        for part in _spell(word, kept, ids):
            endings[part] += 1000 / (1000 + rank)
    kept |= {part for part, _ in endings.most_common(room - len(kept))}
    chosen = sorted(kept, key=ids.__getitem__)
    frequency = [seen[p] + 2e5 / (ids[p] + 100) for p in chosen]
    total = math.log(sum(frequency))
    named = [p[2:] if p.startswith("##") else "▁" + p for p in chosen]
    scored = [("▁", -25.0), *((n, math.log(f) - total) for n, f in zip(named, frequency, strict=True))]
    return scored, [ids[p] for p in chosen]


def _spell(word: str, kept: set[str], ids: dict[str, int]) -> list[str]:
    """The longest continuations that complete `word` after its longest kept prefix."""
    start = next(n for n in range(len(word), 0, -1) if word[:n] in kept)
    parts = []
    while start < len(word):
        size = next(n for n in range(len(word) - start, 0, -1) if "##" + word[start : start + n] in ids)
        parts.append("##" + word[start : start + size])
        start += size
    return parts


def embed_vocabulary(teacher: TextTeacher, piece_ids: list[int], logprobs: list[float]) -> tuple[Tensor, Tensor]:
    """The teacher's vector of each piece, reduced to HIDDEN dimensions and longer for rarer pieces (SIF weights).

    Returns:
        Embeddings (pieces, HIDDEN), and the basis (HIDDEN, 384) that maps back to the teacher's space.
    """
    meanings = teacher.embed_pieces(piece_ids)
    meanings = F.normalize(meanings - meanings.mean(0), dim=-1)
    basis = torch.linalg.svd(meanings, full_matrices=False).Vh[:HIDDEN]
    weights = 1e-3 / (1e-3 + torch.tensor(logprobs).exp())
    return F.normalize(meanings @ basis.T, dim=-1) * (0.15 + 0.45 * weights)[:, None], basis


@torch.no_grad()
def lengthen(embeddings: Tensor, answers: list[int]) -> None:
    """Give the answers' rows ANSWER_LENGTH: as short as a frequent word's, "no" would lose to "nope" as an output."""
    embeddings[answers] = ANSWER_LENGTH * F.normalize(embeddings[answers], dim=-1)
