"""Where the demo's distance from the peer comes from: the peer's heads over the demo base's own frozen features.

Texts are read by MiniLM, or as the mean of the base's word embeddings; pictures by EfficientNet-Lite0, or as the mean
of the visual tokens of the base's tower. No layer of the base's language model takes part: what stands here is what a
linear map gets of its inputs.

    python benchmarks/peer.py            # the same packages, and the features of the two networks
    python benchmarks/probe.py           # three seeds, test split; writes benchmarks/results/probe.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peer import Bench, measure
from peer_features import Features, contents_of, load_features

from umarvel_ray import Embedder, demo
from umarvel_ray.data.tables import open_dataset
from umarvel_ray.recipe import Data, load_recipe
from umarvel_ray.runs import base_folder

BASE = base_folder("builtin:demo")
RESULTS = Path(__file__).parent / "results" / "probe.json"
PART = 128  # pictures in one pass of the tower


@torch.inference_mode()
def base_features(texts: list[str], images: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """Mean word embeddings (n, 256) and mean visual tokens (m, 256) of the demo's base, float32."""
    embedder = Embedder.from_pretrained(BASE, settings=load_recipe("demo").model)
    model, encoder = embedder.model, embedder.encoder
    words = model.backbone.get_input_embeddings().weight
    read = [words[encoder.tokenizer(text, add_special_tokens=False).input_ids].mean(0) for text in texts]
    seen = []
    for start in range(0, len(images), PART):
        pictures = [encoder.pictures({"image": image}, "picture")[0] for image in images[start : start + PART]]
        seen += [tokens.mean(0) for tokens in model.run_tower(pictures)]
    return torch.stack(read).numpy(), torch.stack(seen).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--cache", type=Path, default=Path("runs/peer"), help="where the frozen features are kept")
    arguments = parser.parse_args()
    dataset, protocol = open_dataset(Data(root="builtin:demo")), load_recipe("demo").evaluate
    texts, images = contents_of(demo.DATA)
    peer = load_features(texts, images, arguments.cache)
    words, tokens = base_features(texts, list(images.values()))
    kinds: dict[str, Features] = {
        "words of the base, tower of the base": replace(peer, texts=words, images=tokens),
        "MiniLM, tower of the base": replace(peer, images=tokens),
        "words of the base, EfficientNet": replace(peer, texts=words),
        "MiniLM, EfficientNet (the peer)": peer,
    }
    result = {}
    for kind, features in kinds.items():
        figures = measure(Bench(dataset, features, dataset.tasks("test")), protocol, arguments.seeds)
        result[kind] = {name: figures[name] for name in ("seeds", "recall", "standard_deviation")}
        averages = (f"{scope} {figures['recall'][scope]['average']:.3f}" for scope in ("local", "global"))
        print(f"{kind}: {', '.join(averages)}", flush=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
