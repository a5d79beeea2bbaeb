"""A picture and what to change about it, or several turns of that, to a picture: CIRCO, multi-turn FashionIQ, VIST."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from umarvel_ray.suites.files import pictures_in, read_json
from umarvel_ray.suites.suite import EVERY_TASK, Content, Document, Query, Rerank, Suite

UNLABELED = "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json"


def _circo(root: Path) -> Content:
    folder = "COCO2017_unlabeled/unlabeled2017"
    pool = {str(row["id"]): f"{folder}/{row['file_name']}" for row in read_json(root / UNLABELED)["images"]}
    queries = [
        Query(
            id=f"q{row['id']}",
            task="circo",
            positives=[str(number) for number in row["gt_img_ids"]],
            text=row["relative_caption"],
            image=pool.get(str(row["reference_img_id"])),
        )
        for row in read_json(root / "annotations/val.json")
    ]
    return Content([Document(id_, image=path) for id_, path in pool.items()], queries, {"circo": list(pool)})


CIRCO = Suite(
    name="circo",
    title="CIRCO",
    files=("annotations/val.json", UNLABELED, "COCO2017_unlabeled/unlabeled2017/"),
    source="https://github.com/miccunifi/CIRCO and https://cocodataset.org (2017 unlabeled images)",
    read=_circo,
    metrics=("mAP@5", "mAP@10", "mAP@25", "mAP@50"),
    instructions={EVERY_TASK: "I'm looking for a similar everyday image with the described changes."},
    rerank=Rerank(top=50),
)


def _fashion_turns(root: Path) -> Content:
    names = read_json(root / "image_splits/split.all.val.json")
    paths = {name: f"images/{name}.jpg" for name in names}
    queries = []
    for number, row in enumerate(read_json(root / "data/all.val.json")):
        shown = [f"images/{name}.jpg" for _, _, name in row["reference"]]
        said = [" and ".join(filter(None, texts)) for _, texts, _ in row["reference"]]
        queries.append(Query(f"q{number}", "fashioniq", [row["target"][1]], "\n".join(said), shown))
    return Content([Document(name, image=path) for name, path in paths.items()], queries, {"fashioniq": list(paths)})


MULTITURN_FASHIONIQ = Suite(
    name="multiturn-fashioniq",
    title="Multi-turn FashionIQ",
    files=("data/all.val.json", "image_splits/split.all.val.json", "images/"),
    source="https://github.com/yfyuan01/MultiturnFashionRetrieval; images as FashionIQ's, named ASIN.jpg",
    read=_fashion_turns,
    metrics=("R@5", "R@8", "R@10"),
    instructions={EVERY_TASK: "Find me a similar fashion image based on the following multi-round modifications."},
)


def _vist(root: Path) -> Content:
    stories = defaultdict(list)
    for [row] in read_json(root / "sis/val.story-in-sequence.json")["annotations"]:
        stories[row["story_id"]].append(row)
    pictures = pictures_in(root, "images/val")
    used = sorted({row["photo_flickr_id"] for story in stories.values() for row in story})
    paths = {photo: pictures.get(photo, f"images/val/{photo}.jpg") for photo in used}
    queries = []
    for number, story in stories.items():
        *seen, last = (row["photo_flickr_id"] for row in story)
        text = "\n".join(row["text"] for row in story)
        queries.append(Query(number, "vist", [last], text, [paths[photo] for photo in seen]))
    return Content([Document(photo, image=path) for photo, path in paths.items()], queries, {"vist": used})


VIST = Suite(
    name="vist",
    title="VIST",
    files=("sis/val.story-in-sequence.json", "images/val/"),
    source="https://visionandlanguage.net/VIST (stories of images in sequence, and its images)",
    read=_vist,
    metrics=("R@1", "R@5", "R@10"),
    instructions={
        EVERY_TASK: "I will provide you with a series of images and captions from a story, and I need you to retrieve "
        "the image corresponding to the last caption."
    },
    hide_seen=True,
)
