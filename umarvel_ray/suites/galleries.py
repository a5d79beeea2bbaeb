"""A few candidates per query: GeneCIS, SugarCrepe, CC-Neg."""

from __future__ import annotations

import io
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pyarrow as pa

from umarvel_ray.errors import UserError
from umarvel_ray.suites.files import read_json
from umarvel_ray.suites.suite import EVERY_TASK, Content, Crop, Document, Query, Rerank, Suite

CHANGES = "I'm looking for a similar everyday image with the described changes."
SAME = "I'm looking for an image with the same attributes as described."
DESCRIBES = "Find an image caption describing the following everyday image."
# The reference's, which it chose by their scores on these very queries.
TUNED_CHANGES = (
    "I want you to retrieve an similar image with the described changes. Show me an image that best captures the "
    "following the described changes."
)
TUNED_SAME = (
    "I want you to retrieve an image with the same attributes as described. Show me an image that best captures the "
    "following the same attributes."
)
GENECIS_TASKS = ("change_object", "focus_object", "change_attribute", "focus_attribute")
SUGARCREPE_TASKS = ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj")
CC_NEG_LAST = 40_000


def _genecis(root: Path) -> Content:
    rows = {task: read_json(root / f"{task}.json") for task in GENECIS_TASKS}
    queries = []
    for task, samples in rows.items():
        for number, sample in enumerate(samples):
            gallery = [_name(task, picture) for picture in (sample["target"], *sample["gallery"])]
            queries.append(
                Query(
                    id=f"{task} {number}",
                    task=task,
                    positives=gallery[:1],
                    text=sample["condition"],
                    image=_cut(root, task, sample["reference"]),
                    gallery=list(dict.fromkeys(gallery)),
                )
            )
    return Content(_genecis_documents(root, rows), queries, {})


def _genecis_documents(root: Path, rows: dict[str, list[dict[str, Any]]]) -> Iterator[Document]:
    seen = set()
    for task, samples in rows.items():
        for picture in chain.from_iterable((sample["target"], *sample["gallery"]) for sample in samples):
            name = _name(task, picture)
            if name not in seen:
                seen.add(name)
                yield Document(name, image=_cut(root, task, picture))


def _name(task: str, picture: dict[str, Any]) -> str:
    if task.endswith("object"):
        return f"coco {picture['val_image_id']}"
    return f"vg {picture['image_id']} {' '.join(f'{side:g}' for side in picture['instance_bbox'])}"


def _cut(root: Path, task: str, picture: dict[str, Any]) -> Crop:
    """A whole picture of COCO, or an object in one of Visual Genome with its surroundings, as GeneCIS cuts it out."""
    if task.endswith("object"):
        return Crop(root / "val2017" / f"{picture['val_image_id']:012d}.jpg")
    return Crop(root / "VG_100K_all" / f"{picture['image_id']}.jpg", tuple(picture["instance_bbox"]), dilate=0.7)


GENECIS = Suite(
    name="genecis",
    title="GeneCIS",
    files=(*(f"{task}.json" for task in GENECIS_TASKS), "val2017/", "VG_100K_all/"),
    source="https://github.com/facebookresearch/genecis, https://cocodataset.org (2017 validation images) and "
    "https://homes.cs.washington.edu/~ranjay/visualgenome (both parts in one folder)",
    read=_genecis,
    metrics=("R@1", "R@2", "R@3"),
    instructions={EVERY_TASK: CHANGES, "focus_object": SAME, "focus_attribute": SAME},
    reference={task: TUNED_SAME if task == "focus_attribute" else TUNED_CHANGES for task in GENECIS_TASKS},
    image=pa.binary(),
    rerank=Rerank(weights={EVERY_TASK: 0.1, "change_object": 1.0, "focus_object": 1.0}),
)


def _sugarcrepe(root: Path) -> Content:
    documents, queries = [], []
    for task in SUGARCREPE_TASKS:
        for key, row in read_json(root / "data" / f"{task}.json").items():
            right, wrong = f"{task} {key} right", f"{task} {key} wrong"
            documents += [Document(right, text=row["caption"]), Document(wrong, text=row["negative_caption"])]
            image = f"val2017/{row['filename']}"
            queries.append(Query(f"{task} {key}", task, [right], image=image, gallery=[right, wrong]))
    return Content(documents, queries, {})


SUGARCREPE = Suite(
    name="sugarcrepe",
    title="SugarCrepe",
    files=(*(f"data/{task}.json" for task in SUGARCREPE_TASKS), "val2017/"),
    source="https://github.com/RAIVNLab/sugar-crepe and https://cocodataset.org (2017 validation images)",
    read=_sugarcrepe,
    metrics=("accuracy",),
    instructions={EVERY_TASK: DESCRIBES},
    reference={"replace_rel": None, "swap_att": None, "swap_obj": None},
    rerank=Rerank(top=2),
)


def _cc_neg(root: Path) -> Content:
    import torch  # the annotations are a file of PyTorch's

    path = root / "ccneg_preprocessed.pt"
    try:
        data = torch.load(io.BytesIO(path.read_bytes()), weights_only=True)
        rows = list(zip(data["image_paths"], data["annotations"], strict=True))[-CC_NEG_LAST:]
    except Exception as error:  # of a damaged file, PyTorch raises anything
        raise UserError(f"{path}: not CC-Neg's annotations ({type(error).__name__}); get the file again") from None
    documents, queries = [], []
    for number, (image, row) in enumerate(rows):
        right, wrong = f"{number} right", f"{number} wrong"
        negated = row["sop_data"]["negative-prompt"].replace(",", "")
        documents += [Document(right, text=row["json"]["caption"]), Document(wrong, text=negated)]
        file = f"cc3m/{image.rpartition('/cc3m/')[2]}"
        queries.append(Query(str(number), "cc-neg", [right], image=file, gallery=[right, wrong]))
    return Content(documents, queries, {})


CC_NEG = Suite(
    name="cc-neg",
    title="CC-Neg",
    files=("ccneg_preprocessed.pt", "cc3m/"),
    source="https://github.com/jaisidhsingh/CoN-CLIP; the pictures of CC3M as its paths name them",
    read=_cc_neg,
    metrics=("accuracy",),
    instructions={EVERY_TASK: DESCRIBES},
    rerank=Rerank(top=2, weights={EVERY_TASK: 1.0}),
)
