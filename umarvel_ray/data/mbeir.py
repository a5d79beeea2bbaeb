"""M-BEIR folders as published (UniIR, arXiv 2311.17136; docs/method.md#mbeir): JSONL queries and pools, qrels, prompts.

- query/{union_train,train,val,test}/*.jsonl                 qid, query_txt, query_img_path, pos_cand_list, task_id …
- cand_pool/{local,global}/*_cand_pool.jsonl                 did, txt, img_path, modality
- qrels/{val,test}/{name of the query file}_qrels.txt        qid 0 did relevance [task]
- instructions/query_instructions.tsv                        query modality, candidate modality, name, id, prompts …

The pairs of the text and image-text phases are not part of M-BEIR; they use its layout, as datasets 10 (nli) and 11
(cc3m): query/nli/*.jsonl, with the documents in cand_pool/global/mbeir_nli_cand_pool.jsonl (no split, so in no pool).
"""

from __future__ import annotations

import csv
import re
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.json as pj

from umarvel_ray.errors import UserError

DATASETS = (
    "visualnews",
    "fashion200k",
    "webqa",
    "edis",
    "nights",
    "oven",
    "infoseek",
    "fashioniq",
    "cirr",
    "mscoco",
    "nli",
    "cc3m",
)
TASKS = {
    "visualnews": (0, 3),
    "mscoco": (0, 3),
    "fashion200k": (0, 3),
    "webqa": (1, 2),
    "edis": (2,),
    "nights": (4,),
    "oven": (6, 8),
    "infoseek": (6, 8),
    "fashioniq": (7,),
    "cirr": (7,),
}
TARGETS = {0: "image", 1: "text", 2: "image,text", 3: "text", 4: "image", 6: "text", 7: "image", 8: "image,text"}
WIKIPEDIA = ("oven", "infoseek")  # the two share their documents
FOLDERS = {"train": ("union_train", "train"), "validation": ("val",), "test": ("test",)}

STRING, STRINGS = pa.string(), pa.list_(pa.string())
DOCUMENT = pa.schema([("did", STRING), ("txt", STRING), ("img_path", STRING), ("modality", STRING)])
QUERY = pa.schema(
    [
        ("qid", STRING),
        ("query_txt", STRING),
        ("query_img_path", STRING),
        ("query_modality", STRING),
        ("pos_cand_list", STRINGS),
        ("task_id", pa.int64()),
    ]
)

Prompts = dict[tuple[int, str, str], list[str]]


def read_mbeir(root: Path) -> tuple[pa.Table, pa.Table, Callable[[str], pa.Table]]:
    """Read documents, pools and a reader of query tables: "train", "validation", "test", or a folder below query/.

    The instruction of a query is one of its task's prompts, chosen by a hash of the query id; the reference draws one
    at random in each run (docs/method.md#instruction-choice). Positives come from the qrels where these exist.

    Raises:
        UserError: a folder or file is missing, or a line is not in M-BEIR's format.
    """
    files = sorted(root.glob("cand_pool/*/*.jsonl"))
    if not files:
        raise UserError(f"{root}/cand_pool: no *_cand_pool.jsonl; put M-BEIR's candidate pools there")
    tables = {file: _read_jsonl(file, DOCUMENT) for file in files}
    documents = _documents(list(tables.values()), root)
    prompts = _read_prompts(root / "instructions" / "query_instructions.tsv")
    modality = dict(zip(documents["id"].to_pylist(), documents["modality"].to_pylist(), strict=True))
    return documents, _pools(tables), lambda name: _queries(root, name, prompts, modality)


def query_files(root: Path, name: str) -> list[Path]:
    """The files of the query table `name`; empty if there is no such table."""
    found = (sorted((root / "query" / folder).glob("*.jsonl")) for folder in _folders(name))
    return next(filter(None, found), [])


def _folders(name: str) -> tuple[str, ...]:
    return FOLDERS.get(name, (name,))


def _documents(tables: list[pa.Table], root: Path) -> pa.Table:
    rows = pa.concat_tables(tables)
    first: dict[str, int] = {}
    for row, did in enumerate(rows["did"].to_pylist()):
        first.setdefault(did, row)
    rows = rows.take(pa.array(list(first.values())))
    return pa.table(
        {
            "id": rows["did"],
            "text": rows["txt"],
            "image": _paths(rows["img_path"], root),
            "modality": rows["modality"],
            "source": pa.array([_dataset(did, root) for did in first], STRING),
        }
    )


def _pools(tables: dict[Path, pa.Table]) -> pa.Table:
    rows = []
    for file, table in tables.items():
        name = re.fullmatch(r"mbeir_(.+?)(?:_(train|val|test))?_cand_pool", file.stem)
        if not name:
            raise UserError(f"{file}: pools are named mbeir_DATASET_taskN[_SPLIT]_cand_pool.jsonl; rename the file")
        task, split = name.groups()
        if (task, split) == ("union", "train"):
            rows += _training_pools(table, file)
            continue
        if file.parent.name == "global" and split != "train":
            continue  # evaluation's global pools are the unions of the local ones
        for part in [{"val": "validation"}.get(split, split)] if split else ["validation", "test"]:
            rows.append({"task": task, "split": part, "document_ids": table["did"].to_pylist()})
    return pa.Table.from_pylist(rows, pa.schema([("task", STRING), ("split", STRING), ("document_ids", STRINGS)]))


def _training_pools(union: pa.Table, file: Path) -> list[dict[str, Any]]:
    """Local pools for training, which M-BEIR does not publish: by a task's dataset and target modality."""
    ids = defaultdict(list)
    for did, modality in zip(union["did"].to_pylist(), union["modality"].to_pylist(), strict=True):
        ids[_dataset(did, file), modality].append(did)
    rows = []
    for dataset, numbers in TASKS.items():
        for number in numbers:
            sources = WIKIPEDIA if dataset in WIKIPEDIA else (dataset,)
            if pool := [did for source in sources for did in ids[source, TARGETS[number]]]:
                rows.append({"task": f"{dataset}_task{number}", "split": "train", "document_ids": pool})
    return rows


def _queries(root: Path, name: str, prompts: Prompts, modality: dict[str, str]) -> pa.Table:
    files = query_files(root, name)
    if not files:
        folder = root / "query" / _folders(name)[0]
        raise UserError(f"{folder}: no *.jsonl for the query table '{name}'; put its queries there")
    rows: list[dict[str, Any]] = []
    seen: Counter[str] = Counter()
    for file in files:
        qrels = _read_qrels(root / "qrels" / file.parent.name / f"{file.stem}_qrels.txt")
        for line, row in enumerate(_read_jsonl(file, QUERY).to_pylist(), 1):
            where = f"{file}: line {line}"
            id_ = row["qid"]
            if file.parent.name == "union_train":  # it repeats the queries of small datasets; each row is kept
                seen[id_] += 1
                id_ += f"#{seen[id_]}" if seen[id_] > 1 else ""
            positives = qrels.get(row["qid"], row["pos_cand_list"] or [])
            target = next((modality[p] for p in positives if p in modality), None)
            rows.append(
                {
                    "id": id_,
                    "text": row["query_txt"],
                    "image": row["query_img_path"],
                    "modality": row["query_modality"],
                    "source": _dataset(row["qid"], where),
                    "instruction": _prompt(prompts, row["qid"], row["query_modality"], target),
                    "positive_ids": positives,
                    "task": f"{_dataset(row['qid'], where)}_task{row['task_id']}",
                }
            )
    names = ("id", "text", "image", "modality", "source", "instruction", "positive_ids", "task")
    schema = pa.schema([(column, STRINGS if column == "positive_ids" else STRING) for column in names])
    table = pa.Table.from_pylist(rows, schema)
    return table.set_column(2, "image", _paths(table["image"], root))


def _prompt(prompts: Prompts, qid: str, query: str, target: str | None) -> str | None:
    choices = prompts.get((int(qid.partition(":")[0]), query, target or ""), [])
    return choices[zlib.crc32(qid.encode()) % len(choices)] if choices else None


def _read_prompts(file: Path) -> Prompts:
    if not file.is_file():
        raise UserError(f"{file}: not found; copy M-BEIR's instruction table there")
    prompts: Prompts = {}
    with file.open(newline="", encoding="utf-8") as stream:
        rows = csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE)
        for line, row in enumerate(rows, 1):
            if line == 1 or not row:
                continue
            if len(row) < 5 or not row[3].isdigit():
                raise UserError(f"{file}: line {line}: expected two modalities, a name, a dataset number and prompts")
            prompts[int(row[3]), row[0], row[1]] = [prompt.strip() for prompt in row[4:] if prompt.strip()]
    return prompts


def _read_qrels(file: Path) -> dict[str, list[str]]:
    positives: dict[str, list[str]] = defaultdict(list)
    for line, text in enumerate(file.read_text().splitlines() if file.is_file() else [], 1):
        fields = text.split()
        if len(fields) not in (4, 5) or not fields[3].lstrip("-").isdigit():
            raise UserError(f"{file}: line {line}: expected 'qid 0 did relevance [task]'")
        if int(fields[3]) > 0:
            positives[fields[0]].append(fields[2])
    return positives


def _read_jsonl(file: Path, schema: pa.Schema) -> pa.Table:
    options = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        table = pj.read_json(file, read_options=pj.ReadOptions(block_size=16 << 20), parse_options=options)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not M-BEIR JSON lines ({str(error).splitlines()[0]})") from None
    if table[schema.names[0]].null_count:
        raise UserError(f"{file}: a line has no '{schema.names[0]}'; add it")
    return table


def _dataset(name: str, where: object) -> str:
    number = name.partition(":")[0]
    if not number.isdigit() or int(number) >= len(DATASETS):
        raise UserError(f"{where}: id '{name}' is not DATASET:NUMBER with a dataset from 0 to {len(DATASETS) - 1}")
    return DATASETS[int(number)]


def _paths(column: pa.ChunkedArray, root: Path) -> pa.Array:
    return pa.array([path and str(root.absolute() / path) for path in column.to_pylist()], STRING)
