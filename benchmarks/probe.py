"""Where the demo's distance from the peer comes from: the peer's heads over the demo base's own frozen features.

Texts are read by MiniLM, or as the mean of the base's word embeddings; pictures by EfficientNet-Lite0, or as the mean
of the visual tokens of the base's tower. No layer of the base's language model takes part, so each figure is what a
linear map can get out of the base's inputs.

    python -m benchmarks.peer            # first: the same packages, and the features of the two networks
    python -m benchmarks.probe           # three seeds, test split → benchmarks/results/probe.json
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from benchmarks.common.frozen_features import Features, contents_of, load_features
from benchmarks.common.linear_peer import FeatureData, measure
from benchmarks.common.results import write_result
from umarvel_ray import Embedder, demo
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.evaluate.results import SCOPES
from umarvel_ray.recipe import Data, load_recipe

TOWER_BATCH = 128  # pictures


@torch.inference_mode()
def base_features(texts: list[str], images: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Mean word embeddings (n, 256) and mean visual tokens (m, 256) of the demo's base, float32."""
    embedder = Embedder.from_pretrained(demo.BASE, "cpu", settings=load_recipe("demo").model)
    model, encoder = embedder.model, embedder.encoder
    table = model.backbone.get_input_embeddings().weight
    words = [table[encoder.tokenizer(text, add_special_tokens=False).input_ids].mean(0) for text in texts]
    tokens = []
    for start in range(0, len(images), TOWER_BATCH):
        batch = images[start : start + TOWER_BATCH]
        pictures = [encoder.pictures({"image": image}, "picture")[0] for image in batch]
        tokens += [visual.mean(0) for visual in model.run_tower(pictures)]
    return torch.stack(words).numpy(), torch.stack(tokens).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path("runs/peer"), help="folder for the frozen features")
    options = parser.parse_args()
    dataset, settings = open_dataset(Data(root="builtin:demo")), load_recipe("demo").evaluate
    texts, images = contents_of(demo.DATA)
    peer = load_features(texts, images, options.cache)
    words, tokens = base_features(texts, list(images.values()))
    kinds: dict[str, Features] = {
        "words of the base, tower of the base": replace(peer, texts=words, images=tokens),
        "MiniLM, tower of the base": replace(peer, images=tokens),
        "words of the base, EfficientNet": replace(peer, texts=words),
        "MiniLM, EfficientNet (the peer)": peer,
    }
    result = {}
    for kind, features in kinds.items():
        figures = measure(FeatureData(dataset, features, dataset.tasks("test")), settings, options.seeds)
        result[kind] = {name: figures[name] for name in ("seeds", "recall", "standard_deviation")}
        averages = ", ".join(f"{scope} {figures['recall'][scope]['average']:.3f}" for scope in SCOPES)
        print(f"{kind}: {averages}", flush=True)
    write_result("probe", {"features": result})


if __name__ == "__main__":
    main()
