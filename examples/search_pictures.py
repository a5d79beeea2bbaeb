"""Search a folder of pictures with a text query, a picture, or both.

    python examples/search_pictures.py "a dog"
    python examples/search_pictures.py "the same in blue" --image flag.png --folder ~/Pictures
    python examples/search_pictures.py "a dog on a beach" --folder ~/Pictures --model runs/demo/checkpoints/distillation

Without arguments it searches pictures of the demo with the demo's base model, which has had little training; the
checkpoints of `make demo` find more. Larger models work the same way, on a GPU if there is one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from demo_files import demo_pictures

from umarvel_ray import Embedder, demo
from umarvel_ray.recipe import load_recipe

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".gif", ".avif"}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", nargs="?", default="a dog")
    parser.add_argument("--image", help="a picture that is part of the query")
    parser.add_argument("--instruction", default="Find a picture that matches the description.")
    parser.add_argument("--folder", type=Path, help="default: 300 pictures of the demo, in runs/pictures")
    parser.add_argument("--model", help="a checkpoint's directory or Hub id; default: the demo's base model")
    parser.add_argument("--top", type=int, default=5)
    args = parser.parse_args(arguments)

    folder = args.folder or demo_pictures(Path("runs/pictures"), 300)
    paths = sorted(path for path in folder.expanduser().rglob("*") if path.suffix.lower() in SUFFIXES)
    if not paths:
        parser.error(f"{folder}: no pictures")

    # A base model is no checkpoint of umarvel-ray: it does not say how it embeds, so the settings come from a recipe.
    embedder = (
        Embedder.from_pretrained(args.model)
        if args.model
        else Embedder.from_pretrained(demo.BASE, settings=load_recipe("demo").model)
    )
    pictures = embedder.encode_document([{"image": str(path)} for path in paths])  # (n, d)
    query = embedder.encode_query({"text": args.text, "image": args.image}, prompt=args.instruction)  # (d,)
    [scores] = embedder.similarity(query, pictures)
    for index in scores.argsort()[::-1][: args.top]:
        print(f"{scores[index]:.3f}  {paths[index]}")


if __name__ == "__main__":
    main()
