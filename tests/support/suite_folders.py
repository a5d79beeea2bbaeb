"""Tiny folders in the exact published layout of each benchmark, two or three queries each, with generated media."""

from __future__ import annotations

import csv
import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny_run import picture

SIDE = (96, 80)


def write(root: Path, name: str, value: Any) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def draw(root: Path, names: Iterable[str]) -> None:
    """A picture of its own under each name."""
    for number, name in enumerate(dict.fromkeys(names)):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(picture(number, SIDE))


def sharegpt4v(root: Path) -> None:
    rows = [{"image_name": f"sa_{n}.jpg", "caption": f"A long caption, number {n}."} for n in range(3)]
    write(root, "datas_for_validation.json", rows)
    draw(root, (f"val_data/{row['image_name']}" for row in rows))


def urban1k(root: Path) -> None:
    for n in (1, 2, 10):
        write(root, f"caption/{n}.txt", f"A street with {n} cars.\nA second line that is not read.\n")
    draw(root, (f"image/{n}.jpg" for n in (1, 2, 10)))


def karpathy(root: Path, file: str, folder: str) -> None:
    images = [
        {"filename": f"{n}.jpg", "split": split, "sentences": [{"raw": f"Caption {k} of {n}."} for k in range(5)]}
        for n, split in ((1, "test"), (2, "train"), (3, "test"))
    ]
    write(root, file, {"dataset": "x", "images": images})
    draw(root, (f"{folder}/{row['filename']}" for row in images))


def flickr30k(root: Path) -> None:
    karpathy(root, "dataset_flickr30k.json", "flickr30k-images")


def coco(root: Path) -> None:
    karpathy(root, "dataset_coco.json", "val2014")


def visdial(root: Path) -> None:
    data = {
        "questions": ["is it sunny", "any people"],
        "answers": ["yes", "2 people", "no"],
        "dialogs": [
            {
                "image_id": number,
                "caption": "a beach",
                "dialog": [{"question": 0, "answer": 0}, {"question": 1, "answer": answer}],
            }
            for number, answer in ((185565, 1), (284024, 2))
        ],
    }
    write(root, "visdial_1.0_val.json", {"split": "val2018", "version": "1.0", "data": data})
    draw(root, (f"VisualDialog_val2018/VisualDialog_val2018_000000{n}.jpg" for n in (185565, 284024)))


def circo(root: Path) -> None:
    rows = [
        {
            "reference_img_id": 10,
            "target_img_id": 11,
            "relative_caption": "has two dogs",
            "shared_concept": "a dog",
            "gt_img_ids": [11, 12],
            "id": 0,
        },
        {
            "reference_img_id": 13,
            "target_img_id": 10,
            "relative_caption": "is at night",
            "shared_concept": "a road",
            "gt_img_ids": [10],
            "id": 1,
        },
    ]
    write(root, "annotations/val.json", rows)
    images = [{"id": n, "file_name": f"{n:012d}.jpg", "height": 80, "width": 96} for n in range(10, 16)]
    write(root, "COCO2017_unlabeled/annotations/image_info_unlabeled2017.json", {"images": images})
    draw(root, (f"COCO2017_unlabeled/unlabeled2017/{row['file_name']}" for row in images))


def multiturn_fashioniq(root: Path) -> None:
    names = [f"B00{n}" for n in range(5)]
    rows = [
        {
            "target": ["http://x/1.jpg", names[0]],
            "reference": [
                ["http://x/2.jpg", ["is longer", ""], names[1]],
                ["http://x/3.jpg", ["is red", "has no sleeves"], names[2]],
            ],
        },
        {"target": ["http://x/4.jpg", names[3]], "reference": [["http://x/1.jpg", ["is blue", "is short"], names[0]]]},
    ]
    write(root, "data/all.val.json", rows)
    write(root, "image_splits/split.all.val.json", names)
    draw(root, (f"images/{name}.jpg" for name in names))


def vist(root: Path) -> None:
    rows = [
        [
            {
                "original_text": f"Sentence {n}.",
                "text": f"sentence {n} .",
                "photo_flickr_id": photo,
                "story_id": story,
                "worker_arranged_photo_order": n,
            }
        ]
        for story, photos in (("1", "abcde"), ("2", "bbcda"))
        for n, photo in enumerate(photos)
    ]
    write(root, "sis/val.story-in-sequence.json", {"images": [], "albums": [], "annotations": rows})
    draw(root, (f"images/val/{photo}.{'png' if photo == 'c' else 'jpg'}" for photo in "abcde"))


def genecis(root: Path) -> None:
    for task in ("change_object", "focus_object"):
        sample = {
            "condition": "wall",
            "reference": {"val_image_id": 1},
            "target": {"val_image_id": 2},
            "gallery": [{"val_image_id": n} for n in (3, 4)],
        }
        write(root, f"{task}.json", [sample, sample | {"target": {"val_image_id": 5}}])
    for task in ("change_attribute", "focus_attribute"):
        boxes = [{"image_id": n, "instance_bbox": [10 + n, 20, 30, 20], "object_name": "cup"} for n in range(1, 5)]
        sample = {"condition": "red", "reference": boxes[0], "target": boxes[1], "gallery": boxes[2:]}
        write(root, f"{task}.json", [sample])
    draw(root, [*(f"val2017/{n:012d}.jpg" for n in range(1, 6)), *(f"VG_100K_all/{n}.jpg" for n in range(1, 5))])


def sugarcrepe(root: Path) -> None:
    for task in ("add_att", "add_obj", "replace_att", "replace_obj", "replace_rel", "swap_att", "swap_obj"):
        rows = {
            str(n): {"filename": f"00000000000{n}.jpg", "caption": f"A {task}.", "negative_caption": f"Not {task} {n}."}
            for n in range(2)
        }
        write(root, f"data/{task}.json", rows)
    draw(root, (f"val2017/00000000000{n}.jpg" for n in range(2)))


def cc_neg(root: Path) -> None:
    paths = [f"/workspace/datasets/cc3m/cc3m_images/{n}.jpg" for n in range(3)]
    rows = [
        {"json": {"caption": f"a dog {n}"}, "sop_data": {"negative-prompt": f"a dog, that is, not {n}"}}
        for n in range(3)
    ]
    root.mkdir(parents=True, exist_ok=True)
    torch.save({"image_paths": paths, "annotations": rows}, root / "ccneg_preprocessed.pt")
    draw(root, (f"cc3m/cc3m_images/{n}.jpg" for n in range(3)))


def film(path: Path, seed: int, frames: int = 8, rate: int = 4) -> None:
    """A video of seeded noise."""
    import av
    import numpy as np

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for number in range(frames):
            shown = np.random.default_rng([seed, number]).integers(0, 255, (64, 64, 3), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown)))
        container.mux(stream.encode())


def msr_vtt(root: Path) -> None:
    root.mkdir(parents=True, exist_ok=True)
    with (root / "MSRVTT_JSFUSION_test.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["key", "vid_key", "video_id", "sentence"])
        for n, text in enumerate(("a man, singing", "a woman cooks")):
            writer.writerow([f"ret{n}", f"msr{9770 + n}", f"video{9770 + n}", text])
    for n in range(2):
        film(root / f"MSRVTT_Videos/video{9770 + n}.mp4", n)


def msvd(root: Path) -> None:
    names = ["-4wsuPCjDBc_5_15", "video_1_2"]
    write(root, "test_list.txt", "\n".join(names) + "\n")
    captions = {name: [["a", "squirrel", "eats", str(n)] for n in range(3)] for name in [*names, "not_in_test_0_1"]}
    (root / "raw-captions.pkl").write_bytes(pickle.dumps(captions, protocol=2))
    for n, name in enumerate(names):
        film(root / f"YouTubeClips/{name}.avi", n)


def mmeb(root: Path) -> None:
    from umarvel_ray.suites.mmeb import SETS

    told = {"qry_instruction": "Represent the given image for classification", "tgt_instruction": "Say what it is"}
    write(root, "data_instruction.json", {"VOC2007": told})
    for name in SETS:
        row = {
            "qry_text": f"<|image_1|>\n{told['qry_instruction']}\n",
            "qry_img_path": f"{name}/1.jpg",
            "tgt_text": ["right", "wrong"],
            "tgt_img_path": ["", ""],
        }
        if name == "MSCOCO_t2i":
            row = {
                "qry_text": "A red bus.",
                "qry_img_path": "",
                "tgt_text": ["<|image_1|>\n"] * 2,
                "tgt_img_path": [f"{name}/1.jpg", f"{name}/2.jpg"],
            }
        write(root, f"{name}/{name}_test.jsonl", json.dumps(row) + "\n" + json.dumps(row) + "\n")
        draw(root, (f"images/{name}/{n}.jpg" for n in (1, 2)))


FOLDERS = {
    "sharegpt4v": sharegpt4v,
    "urban1k": urban1k,
    "flickr30k": flickr30k,
    "coco": coco,
    "visdial": visdial,
    "circo": circo,
    "multiturn-fashioniq": multiturn_fashioniq,
    "vist": vist,
    "genecis": genecis,
    "sugarcrepe": sugarcrepe,
    "cc-neg": cc_neg,
    "msr-vtt": msr_vtt,
    "msvd": msvd,
    "mmeb": mmeb,
}
