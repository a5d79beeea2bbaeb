"""Build the demo data from public packages: `python -m tools.demo.build_data --sources DIR [--out DIR]`.

Reads the records (sources.py), joins them into concepts and splits these (world.py, concepts.py), makes each task's
rows (rows.py, tasks.py), and writes documents, queries, pools, prompts and qrels (see docs/demo-data.md). The same
package versions give the same bytes: every random choice comes from a generator seeded with a string.
"""

import argparse
import csv
import hashlib
import json
import sys
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from tools.demo import sources as src
from tools.demo.rows import SPLITS, Tables, clipart_rows, emoji_rows, flag_rows, wiki_rows
from tools.demo.tasks import DATASET_IDS, MODALITIES, PROMPTS, dataset_and_task
from tools.demo.world import World
from umarvel_ray import demo
from umarvel_ray.errors import UserError

DOCUMENT_SCHEMA = pa.schema(
    [
        (name, pa.binary() if name == "image" else pa.string())
        for name in ("id", "text", "image", "modality", "source", "split", "concept")
    ]
)
QUERY_SCHEMA = pa.schema(
    [
        *(
            (name, pa.binary() if name == "image" else pa.string())
            for name in ("id", "text", "image", "modality", "source", "instruction")
        ),
        ("positive_ids", pa.list_(pa.string())),
        ("task", pa.string()),
        ("concept", pa.string()),
    ]
)
POOL_SCHEMA = pa.schema([("task", pa.string()), ("split", pa.string()), ("document_ids", pa.list_(pa.string()))])
CONCEPT_SCHEMA = pa.schema([("concept", pa.string()), ("split", pa.string()), ("names", pa.list_(pa.string()))])


def write_table(rows: list[dict], schema: pa.Schema, path: Path) -> None:
    table = pa.Table.from_pylist(rows, schema=schema)
    # With a dictionary page as large as the column, a repeated picture is stored once.
    pq.write_table(
        table,
        path,
        compression="zstd",
        compression_level=19,
        use_dictionary=True,
        dictionary_pagesize_limit=64 << 20,
        row_group_size=1 << 20,
    )


def write(tables: Tables, world: World, out: Path) -> dict:
    (out / "qrels").mkdir(parents=True, exist_ok=True)
    documents = list(tables.documents.values())
    write_table(documents, DOCUMENT_SCHEMA, out / "documents.parquet")
    for name, rows in tables.queries.items():
        write_table(rows, QUERY_SCHEMA, out / f"{name}.parquet")
    pools = tables.pools()
    write_table(pools, POOL_SCHEMA, out / "pools.parquet")
    held_out = [
        {"concept": world.title(c), "split": split, "names": sorted(world.names[c])}
        for c, split in world.split.items()
        if split != "train"
    ]
    write_table(sorted(held_out, key=lambda row: row["concept"]), CONCEPT_SCHEMA, out / "held_out_concepts.parquet")
    with open(out / "instructions.tsv", "w", newline="") as file:
        tsv = csv.writer(file, delimiter="\t", lineterminator="\n")
        tsv.writerow(
            ["query_modality", "cand_modality", "dataset_name", "dataset_id", *(f"prompt_{i}" for i in range(1, 5))]
        )
        for task, prompts in PROMPTS.items():
            dataset, number = dataset_and_task(task)
            tsv.writerow([*MODALITIES[number], dataset, DATASET_IDS[dataset], *prompts])
    for task in PROMPTS:
        for split in ("validation", "test"):
            lines = [
                f"{row['id']} 0 {d} 1 {dataset_and_task(task)[1]}\n"
                for row in tables.queries[split]
                if row["task"] == task
                for d in row["positive_ids"]
            ]
            (out / "qrels" / f"{task}_{split}_qrels.txt").write_text("".join(lines))
    counts = {
        "documents": tally(documents, "source", "modality", "split"),
        "queries": {name: tally(rows, "task") for name, rows in tables.queries.items()},
        "pools": {f"{p['task']} {p['split']}": len(p["document_ids"]) for p in pools},
        "global_pools": {s: len({d for p in pools if p["split"] == s for d in p["document_ids"]}) for s in SPLITS},
        "concepts": {s: sum(v == s for v in world.split.values()) for s in SPLITS},
    }
    files = {
        str(p.relative_to(out)): {"bytes": p.stat().st_size, "sha256": hashlib.sha256(p.read_bytes()).hexdigest()}
        for p in sorted(out.rglob("*"))
        if p.is_file() and p.name != "manifest.json"
    }
    manifest = {"name": "umarvel-ray demo data", "counts": counts, "files": files, "sources": src.SOURCES}
    (out / "manifest.json").write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    return manifest


def tally(rows: list[dict], *columns: str) -> dict[str, int]:
    counts = defaultdict(int)
    for row in rows:
        counts[" ".join(row[c] for c in columns)] += 1
    return dict(sorted(counts.items()))


def build(sources: Path, out: Path) -> dict:
    src.fetch(sources)
    world = World(sources)
    tables = Tables(world)
    for rows in (emoji_rows, wiki_rows, clipart_rows, flag_rows):
        rows(tables)
    tables.finish()
    return write(tables, world, out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sources", type=Path, required=True, help="folder for the packages, downloaded if missing")
    parser.add_argument("--out", type=Path, default=demo.DATA, help="folder to write the tables to")
    arguments = parser.parse_args()
    try:
        manifest = build(arguments.sources, arguments.out)
    except UserError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(manifest["counts"], indent=1))
    print(f"{sum(f['bytes'] for f in manifest['files'].values()) / 1e6:.2f} MB in {arguments.out}")


if __name__ == "__main__":
    main()
