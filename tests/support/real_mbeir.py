"""An M-BEIR folder around real queries, qrels and prompts; pools and pictures are generated."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from tests.support.suite_folders import draw
from umarvel_ray.data.mbeir import TARGETS


def make_real_mbeir(root: Path, shared: Path, per_task: int) -> list[str]:
    """The first queries of each published file; returns the tasks."""
    source, tasks, pictures = shared / "data/mbeir", [], []
    for file in sorted((source / "topics").glob("*.jsonl")):
        task = file.name.removeprefix("topics.mbeir-").removesuffix(".test.jsonl")
        number = int(task.rpartition("task")[2])
        with file.open(encoding="utf-8") as lines:
            queries = [json.loads(line) for line, _ in zip(lines, range(per_task), strict=False)]
        name = f"mbeir_{task}_test"
        _write(root / f"query/test/{name}.jsonl", queries)
        ids = {query["qid"] for query in queries}
        judged = (source / f"qrels/qrels.m-beir-{task.replace('_', '-')}.test.txt").read_text().splitlines()
        kept = [f"{line} {number}" for line in judged if line.split()[0] in ids]
        (root / "qrels/test").mkdir(parents=True, exist_ok=True)
        (root / f"qrels/test/{name}_qrels.txt").write_text("\n".join(kept) + "\n")
        relevant = dict.fromkeys(line.split()[2] for line in kept)
        relevant |= dict.fromkeys(did for query in queries for did in query["pos_cand_list"])
        modality = TARGETS[number]
        pool = [
            {
                "did": did,
                "txt": f"Text of {did}" if "text" in modality else None,
                "img_path": f"mbeir_images/made/{did.replace(':', '_')}.jpg" if "image" in modality else None,
                "modality": modality,
                "src_content": None,
            }
            for did in (*relevant, *(f"{next(iter(relevant)).partition(':')[0]}:9999{n}" for n in range(3)))
        ]
        split = "_test" if task.startswith("mscoco") else ""
        _write(root / f"cand_pool/local/mbeir_{task}{split}_cand_pool.jsonl", pool)
        pictures += [row["img_path"] for row in pool if row["img_path"]]
        pictures += [query["query_img_path"] for query in queries if query["query_img_path"]]
        tasks.append(task)
    draw(root, pictures)
    (root / "instructions").mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "query_instructions.tsv", root / "instructions/query_instructions.tsv")
    return tasks


def _write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
