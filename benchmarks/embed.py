"""Bulk embedding from picture files on the CPU in fp32: ours, sentence-transformers and a plain padded loop.

- ours: `Embedder.encode_document`;
- sentence-transformers 6: `SentenceTransformer.encode`, batches of 32, sorted by its own estimate of length;
- padded loop: transformers' processor and model on batches of 32 in input order, padded to the longest item.

All sides read the same weights, files and texts, see the same tokens (checked) and mean-pool over all of them. Pictures
differ slightly, because the others resize with torchvision and we resize with Pillow, so vectors are also compared with
Pillow on all sides.

    PYTHONPATH=.venv/speed python -m benchmarks.embed [items=192] [rounds=3]    → benchmarks/results/embed.json
    pip install --no-deps --target .venv/speed -r requirements-speed.lock     (first; `make bench` does it)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

from benchmarks.common.items import KINDS, ItemMaker
from benchmarks.common.padded_peers import (
    embed_padded,
    open_pictures,
    pillow_processor,
    read_padded,
    sentence_transformer,
)
from benchmarks.common.results import integer_arguments, report_comparison
from benchmarks.common.small_model import SETTINGS, SHAPE, make_model, make_peer_model
from benchmarks.common.timing import alternate
from umarvel_ray import Embedder

OURS, PEER, LOOP = "umarvel-ray", "sentence-transformers", "padded loop"
BATCH = 32
TARGETS = {PEER: 1.3, LOOP: 2.0}


@torch.inference_mode()
def padded_loop(peer: SentenceTransformer, items: list[dict]) -> np.ndarray:
    """The obvious loop: unit vectors (n, d)."""
    batches = (items[start : start + BATCH] for start in range(0, len(items), BATCH))
    parts = [embed_padded(peer[0].model, read_padded(peer[0].processor, batch)) for batch in batches]
    return torch.cat(parts).numpy()


def check_vectors(ours: Embedder, peer: SentenceTransformer, items: list[dict]) -> dict[str, float]:
    """The largest difference in any component of any item's vector."""
    expected = ours.encode_document(items)
    with pillow_processor(peer):
        found = {PEER: peer.encode(open_pictures(items)), LOOP: padded_loop(peer, items)}
    found[f"{PEER}, its own resizing"] = peer.encode(open_pictures(items))
    return {name: float(np.abs(vectors - expected).max()) for name, vectors in found.items()}


def check_tokens(peer: SentenceTransformer, items: list[dict], lengths: list[int]) -> None:
    seen = peer.preprocess(open_pictures(items))["attention_mask"].sum(1).tolist()
    if seen != lengths:
        sys.exit(f"sentence-transformers sees other tokens: {seen} instead of {lengths}")


def main(items: int = 192, rounds: int = 3) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = ItemMaker(folder / "pictures").items(items)
        ours = Embedder.from_pretrained(make_model(folder / "model"), "cpu", settings=SETTINGS)
        peer = sentence_transformer(make_peer_model(folder / "peer"))
        lengths = [ours.encoder.encode(item, "document").length for item in made]
        check_tokens(peer, made[:BATCH], lengths[:BATCH])
        differences = check_vectors(ours, peer, made[:BATCH])
        times = alternate(
            {
                OURS: lambda: ours.encode_document(made),
                PEER: lambda: peer.encode(open_pictures(made), batch_size=BATCH),
                LOOP: lambda: padded_loop(peer, made),
            },
            rounds,
        )
    report_comparison(
        "embed",
        f"{SHAPE}. {items} items, {sum(lengths)} tokens ({min(lengths)} to {max(lengths)}): {KINDS}",
        {"items": items, "tokens": sum(lengths)},
        times,
        TARGETS,
        differences,
    )


if __name__ == "__main__":
    main(**integer_arguments(sys.argv[1:]))
