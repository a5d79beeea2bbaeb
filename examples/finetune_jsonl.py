"""Fine-tune an embedder on your own rows: a JSONL file of queries, each with a positive and negatives.

    python examples/finetune_jsonl.py          # rows of the demo; about a minute on two CPU cores
    python examples/finetune_jsonl.py rows.jsonl --steps 200 --output runs/mine

A row is `{"query": …, "positive": …, "negatives": […]}`. Each of them is a string or an item, `{"text"?, "image"?}`, a
query's with an "instruction"; pictures are paths relative to the file. Every fifth row is held out, and the search for
its positive among all held-out positives is measured before and after. With this few rows and steps, a gain is not
certain.

This is the phase `hard-negatives` alone. `umarvel train` also mines negatives, trains a reranker and distills it.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from demo_files import demo_jsonl

from umarvel_ray import Embedder, demo
from umarvel_ray.data.plan import contrastive_plan, write_plan
from umarvel_ray.ragged import Ragged
from umarvel_ray.ray_session import prepare_environment, start_ray
from umarvel_ray.recipe import HARD_NEGATIVES, load_recipe
from umarvel_ray.runs import Run
from umarvel_ray.train.phases import phase_spec

HELD_OUT = 5  # every fifth row
DOCUMENT = dict.fromkeys(("id", "text", "image", "modality", "source"), pa.string())
QUERY = DOCUMENT | {"instruction": pa.string(), "positive_ids": pa.list_(pa.string()), "task": pa.string()}
POOL = {"task": pa.string(), "split": pa.string(), "document_ids": pa.list_(pa.string())}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="?", type=Path, help="a JSONL file; default: rows of the demo")
    parser.add_argument("--base", default=demo.NAME, help="a Hugging Face directory or Hub id")
    parser.add_argument("--output", type=Path, default=Path("runs/finetune"))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--batch-size", type=int, default=16)
    args = parser.parse_args(arguments)
    if args.output.exists():
        parser.error(f"{args.output} exists; remove it or choose another --output")

    prepare_environment()  # before Ray is imported
    from umarvel_ray.train.launch import train_phases

    rows = read_rows(args.rows or demo_jsonl(args.output / "example" / "rows.jsonl"))
    held_out = rows[::HELD_OUT]
    training = [row for number, row in enumerate(rows) if number % HELD_OUT]
    negatives = write_tables(training, args.output / "data")
    changes = {
        "base": args.base,
        "data.root": args.output / "data",
        "output": args.output,
        "cluster.workers": 1,
        "stage2.train.max_steps": args.steps,
        "stage2.train.batch_size": args.batch_size,
        "stage2.train.hard_negatives": int(negatives.counts.max()),
        "stage2.train.temperature.init": 0.05,  # the recipe takes its parent's, and a base model has none
    }
    run = Run.open(load_recipe("demo", [f"{key}={value}" for key, value in changes.items()]))
    base = Embedder.from_pretrained(run.base, settings=run.recipe.model)
    print(f"recall@1 of the base on {len(held_out)} held-out rows: {recall(base, held_out):.2f}")

    # The batch plan says which queries and documents meet in each step. Other rows' positives are negatives too.
    data, phase = run.open_dataset(), run.recipe.stage2.train
    data.validate("train")
    queries = data.queries("train")
    spec = phase_spec(run, HARD_NEGATIVES, phase, parent="base")
    plan = contrastive_plan(queries, phase, run.recipe.seed, data.content(), negatives, phase.hard_negatives)
    write_plan(plan, spec.plan_path)
    with start_ray():
        train_phases("finetune", [spec], {spec.name: queries.table}, data.documents, run.recipe.cluster, run.dir)

    tuned = Embedder.from_pretrained(run.checkpoint(HARD_NEGATIVES))
    print(f"recall@1 after {args.steps} steps on {len(training)} rows: {recall(tuned, held_out):.2f}")
    print(f"the checkpoint: {run.checkpoint(HARD_NEGATIVES)}")


def read_rows(file: Path) -> list[dict[str, Any]]:
    """The rows with all sides as items, pictures by absolute path."""

    def item(side: str | dict[str, str]) -> dict[str, str]:
        given = {"text": side} if isinstance(side, str) else side
        return given | ({"image": str((file.parent / given["image"]).absolute())} if "image" in given else {})

    rows = [json.loads(line) for line in file.read_text().splitlines() if line.strip()]
    return [
        {
            "query": item(row["query"]),
            "positive": item(row["positive"]),
            "negatives": [item(negative) for negative in row.get("negatives", [])],
        }
        for row in rows
    ]


def write_tables(rows: list[dict[str, Any]], folder: Path) -> Ragged:
    """Write documents, queries and the candidate pool as a Parquet data folder.

    Equal documents get one id, so that a positive of one row is never used as a negative of a row that shares it.

    Returns:
        The negatives of each query, as row numbers of the documents.
    """
    row_numbers: dict[str, int] = {}
    documents, queries, negatives = [], [], []

    def row_of(id_: str, item: dict[str, str]) -> dict[str, str]:
        modality = ",".join(key for key in ("image", "text") if key in item)
        return item | {"id": id_, "modality": modality, "source": "finetune"}

    def document(item: dict[str, str]) -> int:
        key = json.dumps(item, sort_keys=True)
        if key not in row_numbers:
            row_numbers[key] = len(documents)
            documents.append(row_of(f"d{len(documents)}", item))
        return row_numbers[key]

    for number, row in enumerate(rows):
        positives = {"positive_ids": [f"d{document(row['positive'])}"], "task": "finetune"}
        queries.append(row_of(f"q{number}", row["query"]) | positives)
        negatives.append([document(item) for item in row["negatives"]])
    pools = [{"task": "finetune", "split": "train", "document_ids": [row["id"] for row in documents]}]
    folder.mkdir(parents=True)
    tables = {"documents": (documents, DOCUMENT), "train": (queries, QUERY), "pools": (pools, POOL)}
    for name, (records, schema) in tables.items():
        pq.write_table(pa.Table.from_pylist(records, schema=pa.schema(schema)), folder / f"{name}.parquet")
    return Ragged.of(negatives)


def recall(embedder: Embedder, rows: list[dict[str, Any]]) -> float:
    """Share of queries whose own positive is the best of all rows' positives."""
    queries = embedder.encode_query([row["query"] for row in rows])
    documents = embedder.encode_document([row["positive"] for row in rows])
    scores = embedder.similarity(queries, documents)  # (n, n), a query's own positive on the diagonal
    return float(np.mean(scores.diagonal() >= scores.max(axis=1)))


if __name__ == "__main__":
    main()
