"""Bulk embedding from picture files, side by side on the CPU in fp32: ours, sentence-transformers, a plain padded loop.

- ours: `Embedder.encode_document`;
- sentence-transformers 6: `SentenceTransformer.encode`, batches of 32, sorted by its own estimate of length;
- padded loop: transformers' processor and model on batches of 32 in the given order, padded to the longest.

All read the same weights, files and texts, see the same tokens (checked), and pool the mean over all of them. Pictures
differ a little: torchvision, which the others use, resizes otherwise than Pillow. The check therefore gives them once
Pillow's processor.

    PYTHONPATH=.venv/speed python benchmarks/embed.py [items=192] [rounds=3]    → benchmarks/results/embed.json
    pip install --no-deps --target .venv/speed -r requirements-speed.lock     (before; `make bench` does it)
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from bench_model import KINDS, SETTINGS, SHAPE, ItemMaker, arguments, make_model, make_peer_model, race, report
from bench_peers import embed_padded, open_pictures, pillow_processor, read_padded, sentence_transformer
from sentence_transformers import SentenceTransformer

from umarvel_ray import Embedder

OURS, PEER, LOOP = "umarvel-ray", "sentence-transformers", "padded loop"
BATCH = 32
WANTED = {PEER: 1.3, LOOP: 2.0}


@torch.inference_mode()
def padded_loop(peer: SentenceTransformer, items: list[dict]) -> np.ndarray:
    """What one writes first: unit vectors (n, d)."""
    batches = (items[start : start + BATCH] for start in range(0, len(items), BATCH))
    parts = [embed_padded(peer[0].model, read_padded(peer[0].processor, batch)) for batch in batches]
    return torch.cat(parts).numpy()


def check_vectors(ours: Embedder, peer: SentenceTransformer, items: list[dict]) -> dict[str, float]:
    """The largest difference of a component, over the items."""
    expected = ours.encode_document(items)
    with pillow_processor(peer):
        found = {PEER: peer.encode(open_pictures(items)), LOOP: padded_loop(peer, items)}
    found[f"{PEER}, its own resizing"] = peer.encode(open_pictures(items))
    return {name: float(np.abs(vectors - expected).max()) for name, vectors in found.items()}


def check_tokens(peer: SentenceTransformer, items: list[dict], lengths: list[int]) -> None:
    seen = peer.preprocess(open_pictures(items))["attention_mask"].sum(1).tolist()
    if seen != lengths:
        sys.exit(f"the peer reads other tokens: {seen} instead of {lengths}")


def main(items: int = 192, rounds: int = 3) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        given = ItemMaker(folder / "pictures").items(items)
        ours = Embedder.from_pretrained(make_model(folder / "model"), settings=SETTINGS)
        peer = sentence_transformer(make_peer_model(folder / "peer"))
        lengths = [ours.encoder.encode(item, "document").length for item in given]
        check_tokens(peer, given[:BATCH], lengths[:BATCH])
        differences = check_vectors(ours, peer, given[:BATCH])
        taken = race(
            {
                OURS: lambda: ours.encode_document(given),
                PEER: lambda: peer.encode(open_pictures(given), batch_size=BATCH),
                LOOP: lambda: padded_loop(peer, given),
            },
            rounds,
        )
    report(
        "embed",
        f"{SHAPE}. {items} items, {sum(lengths)} tokens ({min(lengths)} to {max(lengths)}): {KINDS}",
        {"items": items, "tokens": sum(lengths)},
        taken,
        WANTED,
        differences,
    )


if __name__ == "__main__":
    main(**arguments(sys.argv[1:]))
