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
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pj

from umarvel_ray.data.stored import StoredTable
from umarvel_ray.data.writing import Pool, document_rows, store_documents, store_pools, store_queries
from umarvel_ray.errors import UserError
from umarvel_ray.ragged import Ragged

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
        ("task_id", pa.int64()),
    ]
)
POSITIVES = pa.schema([("qid", STRING), ("pos_cand_list", STRINGS)])
DID = pa.schema([DOCUMENT.field("did")])
BLOCK = 4 << 20  # bytes of a file that are parsed at once: more than the longest line

Prompts = dict[tuple[int, str, str], list[str]]


class MbeirFolder:
    """A folder in the layout above.

    Args:
        prompt: the number, from 0, of the prompt that every query gets; None: chosen by a hash of the query's id.
    """

    def __init__(self, root: Path, prompt: int | None = None) -> None:
        self.root, self.prompt = root, prompt
        self.key = "" if prompt is None else f"prompt {prompt}"

    def files(self, name: str) -> list[Path]:
        """The files that `name` is read from: "documents", "pools", "train", "validation", "test", or below query/.

        Raises:
            UserError: there is none.
        """
        if name in ("documents", "pools"):
            files = sorted(self.root.glob("cand_pool/*/*.jsonl"))
            if not files:
                raise UserError(f"{self.root}/cand_pool: no *_cand_pool.jsonl; put M-BEIR's candidate pools there")
            local = {part for file in files if file.parent.name == "local" for part in _splits(file)}
            return [file for file in files if not (_is_union(file) and local.issuperset(_splits(file)))]
        files = query_files(self.root, name)
        if not files:
            folder = self.root / "query" / _folders(name)[0]
            raise UserError(f"{folder}: no *.jsonl for the query table '{name}'; put its queries there")
        return [*files, *filter(Path.is_file, [*map(self._qrels, files), self._prompts])]

    def write_documents(self, path: Path) -> StoredTable:
        """Convert the documents of all pools, each once; a document is the first line with its id."""
        return store_documents(path, self._documents(), self.root, f"{self.root}: documents")

    def write_pools(self, path: Path, documents: StoredTable) -> StoredTable:
        """Convert the pools; the training pools, which M-BEIR does not publish, follow from the training union.

        Raises:
            UserError: see `store_pools`.
        """
        pools: list[Pool] = []
        for file, rows in self._rows.items():
            task, split = _name_of(file)
            if (task, split) == ("union", "train"):
                pools += _training_pools(rows, documents)
            elif file.parent.name == "local" or split == "train":
                pools += [(task, part, rows) for part in _splits(file)]
            # The other global pools are the unions of the local ones, or belong to pairs, which have no pool.
        return store_pools(path, pools, f"{self.root}/cand_pool")

    def write_queries(self, path: Path, name: str, documents: StoredTable) -> StoredTable:
        """Convert a query table.

        The instruction of a query is one of its task's prompts, by default chosen by a hash of its id; the reference
        draws one at random in each run (docs/method.md#instruction-choice). Positives come from the qrels where these
        exist.

        Raises:
            UserError: a line is not in M-BEIR's format; see `store_queries`.
        """
        files = query_files(self.root, name)
        listed = [self._positives(file) for file in files]
        ids = pa.concat_arrays([qids for qids, _ in listed])
        positives = pa.concat_arrays([lists for _, lists in listed])
        rows = document_rows(positives, documents)
        targets = _first_modality(rows, documents)
        if files[0].parent.name == "union_train":  # it repeats the queries of small datasets; each row is kept
            ids = _numbered(ids)
        return store_queries(
            path, self._queries(files, ids, targets), positives, rows, self.root, f"{self.root}: {name}"
        )

    @property
    def _prompts(self) -> Path:
        return self.root / "instructions" / "query_instructions.tsv"

    def _qrels(self, file: Path) -> Path:
        return self.root / "qrels" / file.parent.name / f"{file.stem}_qrels.txt"

    @cached_property
    def _rows(self) -> dict[Path, np.ndarray]:
        """The row of the document on each line of each pool's file: documents are numbered by their first lines."""
        files = self.files("documents")
        ids = [[batch["did"] for batch in _read_jsonl(file, DID)] for file in files]
        encoded = pa.chunked_array([chunk for of_file in ids for chunk in of_file], STRING).dictionary_encode()
        rows = np.concatenate([chunk.indices.to_numpy() for chunk in encoded.chunks])
        ends = np.cumsum([sum(map(len, of_file)) for of_file in ids])
        return dict(zip(files, np.split(rows, ends[:-1]), strict=True))

    def _documents(self) -> Iterator[pa.RecordBatch]:
        written = 0
        for file, rows in self._rows.items():
            start = 0
            for batch in _read_jsonl(file, DOCUMENT):
                before = np.maximum.accumulate(np.concatenate([[written - 1], rows[start : start + batch.num_rows]]))
                start += batch.num_rows
                written = int(before[-1]) + 1
                fresh = batch.filter(pa.array(before[1:] > before[:-1]))
                sources = _datasets(fresh["did"], file)
                columns = [fresh["did"], fresh["txt"], fresh["img_path"], fresh["modality"], sources]
                yield pa.RecordBatch.from_arrays(columns, names=["id", "text", "image", "modality", "source"])

    def _positives(self, file: Path) -> tuple[pa.Array, pa.ListArray]:
        """The ids of a file's queries and of each one's positives."""
        batches = list(_read_jsonl(file, POSITIVES))
        table = pa.Table.from_batches(batches, POSITIVES).combine_chunks()
        ids, lists = (table[name].combine_chunks() for name in POSITIVES.names)
        if qrels := _read_qrels(self._qrels(file)):
            both = zip(ids.to_pylist(), lists.to_pylist(), strict=True)
            lists = pa.array([qrels.get(qid, listed) for qid, listed in both], STRINGS)
        return ids, lists.fill_null([])

    def _queries(self, files: list[Path], ids: pa.Array, targets: pa.Array) -> Iterator[pa.RecordBatch]:
        """Every column but the positives.

        Args:
            ids: of the queries.
            targets: the modality of each query's first known positive.
        """
        prompts = _read_prompts(self._prompts)
        row = 0
        for file in files:
            for batch in _read_jsonl(file, QUERY):
                own = slice(row, row := row + batch.num_rows)
                sources = _datasets(batch["qid"], file)
                asked = (batch["qid"], batch["query_modality"], targets[own])
                asked_rows = zip(*(column.to_pylist() for column in asked), strict=True)
                columns = {
                    "id": ids[own],
                    "text": batch["query_txt"],
                    "image": batch["query_img_path"],
                    "modality": batch["query_modality"],
                    "source": sources,
                    "instruction": pa.array((_prompt(prompts, self.prompt, *one) for one in asked_rows), STRING),
                    "task": pc.binary_join_element_wise(sources, batch["task_id"].cast(STRING), "_task"),
                }
                yield pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))


def query_files(root: Path, name: str) -> list[Path]:
    """The files of the query table `name`; empty if there is no such table."""
    found = (sorted((root / "query" / folder).glob("*.jsonl")) for folder in _folders(name))
    return next(filter(None, found), [])


def _folders(name: str) -> tuple[str, ...]:
    return FOLDERS.get(name, (name,))


def _name_of(file: Path) -> tuple[str, str | None]:
    """Task and split in the name of a pool's file."""
    name = re.fullmatch(r"mbeir_(.+?)(?:_(train|val|test))?_cand_pool", file.stem)
    if not name:
        raise UserError(f"{file}: pools are named mbeir_DATASET_taskN[_SPLIT]_cand_pool.jsonl; rename the file")
    return name[1], name[2]


def _splits(file: Path) -> list[str]:
    """The splits that a pool belongs to; one without a split in its name belongs to validation and test."""
    split = _name_of(file)[1]
    return [{"val": "validation"}.get(split, split)] if split else ["validation", "test"]


def _is_union(file: Path) -> bool:
    """Whether the file only repeats the local pools of its split."""
    task, split = _name_of(file)
    return task == "union" and split != "train"


def _training_pools(union: np.ndarray, documents: StoredTable) -> list[Pool]:
    """Local pools for training: by a task's dataset and target modality."""
    of_source, sources = documents.codes("source")
    of_modality, modalities = documents.codes("modality")
    source, modality = of_source[union], of_modality[union]
    pools = []
    for dataset, numbers in TASKS.items():
        own = [sources.index(name) for name in (WIKIPEDIA if dataset in WIKIPEDIA else (dataset,)) if name in sources]
        for number in numbers:
            if TARGETS[number] not in modalities:
                continue
            fits = np.isin(source, own) & (modality == modalities.index(TARGETS[number]))
            # The documents of one source follow those of another, each in the order of the union.
            rows = np.concatenate([union[:0], *(union[fits & (source == part)] for part in own)])
            if len(rows):
                pools.append((f"{dataset}_task{number}", "train", rows))
    return pools


def _first_modality(positives: Ragged, documents: StoredTable) -> pa.Array:
    """The modality of each query's first positive that is a document; null if none is."""
    known = positives.keep(positives.values >= 0)
    first = np.full(known.n, -1)
    first[known.counts > 0] = known.values[known.offsets[:-1][known.counts > 0]]
    return documents.column("modality").combine_chunks().take(pa.array(first, mask=first < 0))


def _numbered(ids: pa.Array) -> pa.Array:
    """Ids that occur again get a number: a, b, a#2, a#3."""
    codes = ids.dictionary_encode().indices.to_numpy()
    order = np.argsort(codes, kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(codes))])
    times = np.empty(len(codes), np.int64)
    times[order] = np.arange(1, len(codes) + 1) - starts[codes[order]]
    return pc.if_else(pa.array(times > 1), pc.binary_join_element_wise(ids, pa.array(times).cast(STRING), "#"), ids)


def prompt_count(root: Path) -> int:
    """The most prompts that any task of an M-BEIR folder has."""
    return max(map(len, _read_prompts(MbeirFolder(root)._prompts).values()), default=0)


def _prompt(prompts: Prompts, number: int | None, qid: str, query: str, target: str | None) -> str | None:
    choices = prompts.get((int(qid.partition(":")[0]), query, target or ""), [])
    number = zlib.crc32(qid.encode()) if number is None else number
    return choices[number % len(choices)] if choices else None


def _read_prompts(file: Path) -> Prompts:
    prompts: Prompts = {}
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            for line, row in enumerate(csv.reader(stream, delimiter="\t", quoting=csv.QUOTE_NONE), 1):
                if line == 1 or not row:
                    continue
                if len(row) < 5 or not row[3].isdigit():
                    raise UserError(
                        f"{file}: line {line}: expected two modalities, a name, a dataset number and prompts"
                    )
                prompts[int(row[3]), row[0], row[1]] = [prompt.strip() for prompt in row[4:] if prompt.strip()]
    except FileNotFoundError:
        raise UserError(f"{file}: not found; copy M-BEIR's instruction table there") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: not UTF-8 text with tabs ({error}); convert it") from None
    return prompts


def _read_qrels(file: Path) -> dict[str, list[str]]:
    positives: dict[str, list[str]] = defaultdict(list)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines() if file.is_file() else []
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: not UTF-8 text ({error}); convert it") from None
    for line, text in enumerate(lines, 1):
        fields = text.split()
        if len(fields) not in (4, 5) or not fields[3].lstrip("-").isdigit():
            raise UserError(f"{file}: line {line}: expected 'qid 0 did relevance [task]'")
        if int(fields[3]) > 0:
            positives[fields[0]].append(fields[2])
    return positives


def _read_jsonl(file: Path, schema: pa.Schema) -> Iterator[pa.RecordBatch]:
    parse = pj.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    try:
        for batch in pj.open_json(file, read_options=pj.ReadOptions(block_size=BLOCK), parse_options=parse):
            batch.validate(full=True)  # the parser takes text that is not UTF-8
            if batch[schema.names[0]].null_count:
                raise UserError(f"{file}: a line has no '{schema.names[0]}'; add it")
            yield batch
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not M-BEIR JSON lines ({str(error).splitlines()[0]})") from None


def _datasets(ids: pa.Array, file: Path) -> pa.Array:
    """The name of the dataset that each id begins with the number of."""
    numbers = pc.list_element(pc.split_pattern(ids, ":", max_splits=1), 0)
    known = pc.index_in(numbers, value_set=pa.array(map(str, range(len(DATASETS))), STRING))
    if known.null_count:
        wrong = ids[pc.index(known.is_null(), True).as_py()].as_py()
        raise UserError(f"{file}: id '{wrong}' is not DATASET:NUMBER with a dataset from 0 to {len(DATASETS) - 1}")
    return pa.array(DATASETS, STRING).take(known)
