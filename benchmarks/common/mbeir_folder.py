"""A folder in M-BEIR's published layout with its published number of rows, or a share of them, for size tests.

The rows are made up: stretches of the demo's texts, and a few hundred small pictures under millions of paths. Published
are the layout and file names, the 16 pools (they add up to the 5,609,079 rows of the test union), the 1,332,790 rows of
the training union, the 614,353 of its documents that are in no test pool, and the test queries of all tasks but OVEN's.
From UniIR's Table 1 (arXiv 2311.17136, as remembered) and so rounded to thousands are OVEN's test queries, all
validation and distinct training queries (1.15 M), and the documents per query. Apportioned so that totals come out are
the training documents per task (1.93 M, published as a rounded total), the repetitions of small datasets in the
training union, MSCOCO's validation pools, and the lengths of texts (2.4 GB in the test pools).

As in M-BEIR, InfoSeek's pools hold some of OVEN's documents under OVEN's ids (its qrels name them); the unions of
evaluation therefore list these rows twice. qids begin at 1 in every split. One document in 20 repeats the content of
another. The pictures of VisualNews', MSCOCO's, Fashion200K's, FashionIQ's and CIRR's queries are those of documents.

    python -m benchmarks.common.mbeir_folder DIR --scale 0.01
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from shutil import copyfileobj
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from umarvel_ray import demo
from umarvel_ray.data.mbeir import DATASETS, TARGETS
from umarvel_ray.files import write_json, write_text

MARKER = "generated.json"  # written last: settings and counts of a finished folder
VERSION = 1
SPLITS = ("train", "val", "test")
QUERIES = {0: "text", 1: "text", 2: "text", 3: "image", 4: "image", 6: "image,text", 7: "image,text", 8: "image,text"}
IDS = 10_000_000  # a number stands for an id: dataset * IDS + number within the dataset
QUERY_PICTURES = (5_000_000, 6_000_000, 7_000_000)  # numbers of pictures that no document shows, by split
PICTURES = 320  # files; divides IDS, so that a folder of pictures belongs to one dataset
SIDES = (32, 65)  # pixels: from, below
COPY_EVERY = 20  # one document in so many repeats the content of one of those just before it
SHARED = 6_000  # OVEN's documents in each of InfoSeek's pools
SHARED_QUERIES = 0.1  # share of InfoSeek's queries with these as positives
CHUNK = 50_000  # lines


class Task(NamedTuple):
    """A task's counts at scale 1; relevant documents per query by split; mean lengths in bytes."""

    dataset: str
    number: int
    pool: int
    training: int  # documents of the pool that are in the training union
    distinct: int  # training queries
    rows: int  # training rows
    val: int
    test: int
    relevant: tuple[float, float, float]
    negatives: int
    query_bytes: int
    text_bytes: int


TASKS = (
    Task("visualnews", 0, 542_246, 99_000, 99_000, 99_000, 20_000, 19_995, (1, 1, 1), 0, 110, 0),
    Task("visualnews", 3, 537_568, 100_000, 100_000, 100_000, 20_000, 20_000, (1, 1, 1), 0, 0, 110),
    Task("fashion200k", 0, 201_824, 50_000, 15_000, 33_500, 1_700, 1_719, (3.3, 3.1, 2.8), 0, 33, 0),
    Task("fashion200k", 3, 61_707, 15_000, 15_000, 33_500, 4_800, 4_889, (1, 1, 1), 0, 0, 35),
    Task("webqa", 2, 403_196, 200_000, 17_000, 38_000, 1_700, 2_511, (1.4, 1.4, 1.4), 32, 94, 90),
    Task("webqa", 1, 544_457, 242_647, 16_000, 36_000, 1_700, 2_455, (2, 2, 2), 30, 110, 400),
    Task("edis", 2, 1_047_067, 200_000, 26_000, 58_000, 3_200, 3_241, (2.6, 2.6, 2.6), 5, 120, 100),
    Task("nights", 4, 40_038, 32_000, 16_000, 36_000, 2_000, 2_120, (1, 1, 1), 1, 0, 0),
    Task("oven", 6, 676_667, 120_000, 150_000, 150_000, 50_000, 50_000, (8.5, 10, 9.9), 0, 45, 920),
    Task("oven", 8, 335_135, 80_000, 157_000, 157_000, 14_700, 14_700, (17.8, 17.5, 17.7), 0, 45, 920),
    Task("infoseek", 6, 611_651, 70_000, 141_000, 141_000, 11_000, 11_323, (6.8, 6.7, 6.5), 0, 50, 920),
    Task("infoseek", 8, 481_782, 50_000, 143_000, 143_000, 17_600, 17_593, (9.1, 7.5, 7.5), 0, 50, 920),
    Task("fashioniq", 7, 74_381, 40_000, 16_000, 36_000, 2_000, 6_003, (1, 1, 1), 0, 60, 0),
    Task("cirr", 7, 21_551, 17_000, 26_000, 58_790, 4_000, 4_170, (1, 1, 1), 1, 59, 0),
    Task("mscoco", 0, 5_000, 0, 100_000, 100_000, 24_800, 24_809, (1, 1, 1), 0, 52, 0),
    Task("mscoco", 3, 24_809, 0, 113_000, 113_000, 5_000, 5_000, (5, 5, 5), 0, 0, 52),
)
MSCOCO: dict[int, dict[str | None, int]] = {  # its pools beside those of test
    0: {"val": 5_000, "train": 47_606},
    3: {"val": 24_800, "train": 566_747},
}
NAMES = {
    "visualnews": ("VisualNews", "news"),
    "fashion200k": ("Fashion200K", "shop"),
    "webqa": ("WebQA", "encyclopedia"),
    "edis": ("EDIS", "news"),
    "nights": ("NIGHTS", "look-alike"),
    "oven": ("OVEN", "encyclopedia"),
    "infoseek": ("INFOSEEK", "encyclopedia"),
    "fashioniq": ("FashionIQ", "clothing"),
    "cirr": ("CIRR", "everyday"),
    "mscoco": ("MSCOCO", "household"),
}
PROMPTS = (
    "Search the {subject} collection for the {target} that goes with my {query}.",
    "Which {subject} {target} belongs to this {query}?",
    "Here is a {query}; look up its {subject} {target}.",
    "Give me one {subject} {target} that answers the {query}.",
)
NOUNS = {"text": "text", "image": "picture", "image,text": "picture with text"}


class Counts(NamedTuple):
    """What a folder holds. `documents` are the rows of the test union and `text_bytes` is the size of their texts."""

    train_queries: int
    test_queries: int
    documents: int
    training_documents: int
    text_bytes: int


class Pool(NamedTuple):
    """The documents of a task; `split` is None where one pool serves all, with `training` rows in the training union.

    The first `shared` rows are another dataset's documents.
    """

    task: Task
    split: str | None
    ids: np.ndarray
    training: int
    shared: int

    def rows(self, split: str) -> int:
        """From how many of the first rows queries of the split draw positives."""
        return self.training if split == "train" else len(self.ids)


class Words:
    """The demo's texts as one text, from which stretches of whole words are cut."""

    def __init__(self, scale: float) -> None:
        rows = pq.read_table(demo.DATA / "documents.parquet", columns=["text"])["text"].drop_null().to_pylist()
        # Without quotes and control characters a stretch is a JSON string as it is.
        words = [word.encode() for word in re.sub(r'["\\\x00-\x1f\x7f]', " ", " ".join(rows)).split()]
        self.text = b" ".join(words)
        self.starts = np.cumsum([0, *(len(word) + 1 for word in words)])
        self.scale = scale

    def spans(self, rng: np.random.Generator, count: int, length: float) -> np.ndarray:
        """(count, 2) beginnings and ends of stretches with about `length` bytes on average."""
        words = self.scale * length * (len(self.starts) - 1) / len(self.text)
        sizes = np.clip(rng.gamma(4, words / 4, count).round().astype(np.int64), 1, len(self.starts) // 2)
        first = (rng.random(count) * (len(self.starts) - sizes)).astype(np.int64)
        return np.stack([self.starts[first], self.starts[first + sizes] - 1], 1)


def write_mbeir_folder(root: Path, scale: float, seed: int = 0, text: float = 1.0) -> Counts:
    """Write the folder, unless `root` already holds it: finished, and with the same arguments.

    Args:
        root: where to write; files of another scale with the same names are overwritten.
        scale: share of the published numbers of rows; every table keeps at least one.
        text: the lengths of all texts are multiplied by it.
    """
    settings = {"version": VERSION, "scale": scale, "seed": seed, "text": text}
    marker = root / MARKER
    if marker.is_file() and (found := json.loads(marker.read_text()))["settings"] == settings:
        return Counts(**found["counts"])
    for folder in ("query/union_train", "query/val", "query/test", "cand_pool/local", "cand_pool/global"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    for folder in ("qrels/val", "qrels/test", "instructions", "mbeir_images/pictures"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    marker.unlink(missing_ok=True)
    counts = _Writer(root, scale, seed, text).write()
    write_json(marker, {"settings": settings, "counts": counts._asdict()})
    return counts


class _Writer:
    """One folder in the making: what all its tables share."""

    def __init__(self, root: Path, scale: float, seed: int, text: float) -> None:
        self.root = root
        self.scale = scale
        self.seed = seed
        self.words = Words(text)
        self.pools = self._plan()
        self.picture_folders: set[int] = set()

    def write(self) -> Counts:
        documents, training, text_bytes = self._write_documents()
        train, test = self._write_queries()
        self._write_pictures()
        self._write_instructions()
        return Counts(train, test, documents, training, text_bytes)

    def _scaled(self, count: int) -> int:
        return max(1, round(count * self.scale))

    def _rng(self, *key: int) -> np.random.Generator:
        """A stream of its own for every table, so that none depends on the others' sizes."""
        return np.random.default_rng([self.seed, *key])

    def _plan(self) -> list[Pool]:
        pools: list[Pool] = []
        used: Counter[str] = Counter()
        for task in TASKS:
            parts: dict[str | None, int] = {None: task.pool}
            if task.dataset == "mscoco":
                parts = {"test": task.pool, **MSCOCO[task.number]}
            for split, count in parts.items():
                twin = next((pool for pool in pools if _twins(pool.task, task)), None)
                shared = twin.ids[: self._scaled(SHARED)] if twin else np.zeros(0, np.int64)
                own = self._scaled(count) - len(shared)
                first = DATASETS.index(task.dataset) * IDS + used[task.dataset] + 1
                used[task.dataset] += own
                ids = np.concatenate([shared, np.arange(first, first + own)])
                training = {None: len(shared) + self._scaled(task.training), "train": own}.get(split, 0)
                pools.append(Pool(task, split, ids, training, len(shared)))
        return pools

    def _pool(self, dataset: str, target: str, split: str) -> Pool:
        return next(
            pool
            for pool in self.pools
            if pool.split in (split, None) and (pool.task.dataset, TARGETS[pool.task.number]) == (dataset, target)
        )

    def _write_documents(self) -> tuple[int, int, int]:
        """Local pools and unions. Returns the rows of the test and training unions and the former's bytes of text."""
        folder = self.root / "cand_pool"
        documents = training = text_bytes = 0
        files: dict[Path, str | None] = {}
        with (folder / "global" / "mbeir_union_train_cand_pool.jsonl").open("wb") as union:
            for pool in self.pools:
                file = folder / "local" / f"mbeir_{'_'.join(_name(pool.task, pool.split))}_cand_pool.jsonl"
                if pool.split == "train":  # not published: these documents are in the union only
                    file = Path(os.devnull)
                files[file] = pool.split
                row = size = 0
                with file.open("wb") as local:
                    for lines, bytes_ in self._document_lines(pool):
                        local.writelines(lines)
                        union.writelines(lines[max(pool.shared - row, 0) : max(pool.training - row, 0)])
                        row += len(lines)
                        size += bytes_
                training += max(pool.training - pool.shared, 0)
                if pool.split in ("test", None):
                    documents += row
                    text_bytes += size
        for split in SPLITS[1:]:
            with (folder / "global" / f"mbeir_union_{split}_cand_pool.jsonl").open("wb") as union:
                for file in [file for file, of in files.items() if of in (split, None)]:
                    with file.open("rb") as local:
                        copyfileobj(local, union, 16 << 20)
        return documents, training, text_bytes

    def _contents(self, pool: Pool) -> tuple[np.ndarray, np.ndarray]:
        """Of each document a number for its picture, which also ends its text, and the stretch of words before that."""
        rng = self._rng(0, DATASETS.index(pool.task.dataset), pool.task.number, _split_number(pool.split))
        contents = pool.ids.copy()
        spans = self.words.spans(rng, len(pool.ids), pool.task.text_bytes)
        if pool.shared:
            twin = next(other for other in self.pools if _twins(other.task, pool.task))
            for mine, theirs in zip((contents, spans), self._contents(twin), strict=True):
                mine[: pool.shared] = theirs[: pool.shared]
        copies = np.arange(COPY_EVERY - 1, len(pool.ids), COPY_EVERY)
        copies = copies[copies >= pool.shared]
        sources = copies - rng.integers(1, COPY_EVERY, len(copies))
        contents[copies], spans[copies] = contents[sources], spans[sources]
        return contents, spans

    def _document_lines(self, pool: Pool) -> Iterator[tuple[list[bytes], int]]:
        """Chunks of JSON lines, each with the bytes of its texts."""
        modality = TARGETS[pool.task.number]
        line = b'{"did": "%%d:%%d", "txt": %%b, "img_path": %%b, "modality": "%b", "src_content": null}\n' % (
            modality.encode()
        )
        contents, spans = self._contents(pool)
        for start in range(0, len(pool.ids), CHUNK):
            part = slice(start, start + CHUNK)
            ids = pool.ids[part]
            texts = self._texts(spans[part], contents[part]) if "text" in modality else [b"null"] * len(ids)
            images = self._images(contents[part]) if "image" in modality else [b"null"] * len(ids)
            datasets, numbers = (ids // IDS).tolist(), (ids % IDS).tolist()
            lines = [line % row for row in zip(datasets, numbers, texts, images, strict=True)]
            yield lines, sum(map(len, texts)) - 2 * len(texts) if "text" in modality else 0

    def _texts(self, spans: np.ndarray, numbers: np.ndarray) -> list[bytes]:
        text = self.words.text
        rows = zip(spans.tolist(), numbers.tolist(), strict=True)
        return [b'"%b %d"' % (text[start:stop], number) for (start, stop), number in rows]

    def _images(self, pictures: np.ndarray) -> list[bytes]:
        folders = pictures // PICTURES
        self.picture_folders.update(np.unique(folders).tolist())
        names = {folder: str(_picture_folder(folder)).encode() for folder in np.unique(folders).tolist()}
        rows = zip(folders.tolist(), (pictures % PICTURES).tolist(), strict=True)
        return [b'"%b/%03d.jpg"' % (names[folder], number) for folder, number in rows]

    def _write_queries(self) -> tuple[int, int]:
        """Query files and qrels. Returns the numbers of training rows and of test queries."""
        rows: Counter[str] = Counter()
        last: Counter[tuple[str, str]] = Counter()  # qids are numbered by dataset and split
        with (self.root / "query" / "union_train" / "mbeir_union_up_train.jsonl").open("wb") as union:
            for task in TASKS:
                for split, count in zip(SPLITS, (task.distinct, task.val, task.test), strict=True):
                    lines, qrels = self._query_lines(task, split, self._scaled(count), last[task.dataset, split] + 1)
                    last[task.dataset, split] += len(lines)
                    if split == "train":
                        times, rest = divmod(self._scaled(task.rows), len(lines))
                        union.writelines(lines * times + lines[:rest])
                        rows[split] += len(lines) * times + rest
                        continue
                    name = f"mbeir_{'_'.join(_name(task, split))}"
                    (self.root / "query" / split / f"{name}.jsonl").write_bytes(b"".join(lines))
                    (self.root / "qrels" / split / f"{name}_qrels.txt").write_bytes(b"".join(qrels))
                    rows[split] += len(lines)
        return rows["train"], rows["test"]

    def _query_lines(self, task: Task, split: str, count: int, first: int) -> tuple[list[bytes], list[bytes]]:
        dataset = DATASETS.index(task.dataset)
        rng = self._rng(1, dataset, task.number, _split_number(split))
        numbers = np.arange(first, first + count)
        modality = QUERIES[task.number]
        texts = images = [b"null"] * count
        if "text" in modality:
            texts = self._texts(self.words.spans(rng, count, task.query_bytes), numbers)
        if "image" in modality:
            images = self._images(self._query_pictures(task, split, numbers, rng))
        pool = self._pool(task.dataset, TARGETS[task.number], split)
        dids = [b"%d:%d" % divmod(id_, IDS) for id_ in pool.ids[: pool.rows(split)].tolist()]
        line = (
            b'{"qid": "%%b", "query_txt": %%b, "query_img_path": %%b, "query_modality": "%b", '
            b'"query_src_content": null, "pos_cand_list": [%%b], "neg_cand_list": [%%b], "task_id": %d}\n'
            % (modality.encode(), task.number)
        )
        lines, qrels = [], []
        starts, ends = self._positives(pool, split, task.relevant[SPLITS.index(split)], count, rng)
        for number, text, image, start, end in zip(numbers.tolist(), texts, images, starts, ends, strict=True):
            qid, positives, negatives = b"%d:%d" % (dataset, number), dids[start:end], dids[end : end + task.negatives]
            lines.append(line % (qid, text, image, _json_strings(positives), _json_strings(negatives)))
            qrels += [b"%b 0 %b 1 %d\n" % (qid, did, task.number) for did in positives]
        return lines, qrels

    def _positives(
        self, pool: Pool, split: str, relevant: float, count: int, rng: np.random.Generator
    ) -> tuple[list[int], list[int]]:
        """Of each query the first row of its positives in the pool and the row after the last."""
        shared = (rng.random(count) < SHARED_QUERIES) & (pool.shared > 0)
        low = np.where(shared, 0, pool.shared)
        room = np.where(shared, pool.shared, pool.rows(split)) - low
        sizes = np.minimum(1 + rng.poisson(relevant - 1, count), room)
        starts = low + (rng.random(count) * (room - sizes + 1)).astype(np.int64)
        return starts.tolist(), (starts + sizes).tolist()

    def _query_pictures(self, task: Task, split: str, numbers: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if task.number not in (3, 7):
            return DATASETS.index(task.dataset) * IDS + QUERY_PICTURES[SPLITS.index(split)] + numbers
        pool = self._pool(task.dataset, "image", split)
        return rng.choice(pool.ids[: pool.rows(split)], len(numbers))

    def _write_pictures(self) -> None:
        """Few files, but a path for every picture: each folder of pictures is a link to the one real folder."""
        rng = self._rng(2)
        for number in range(PICTURES):
            size = tuple(rng.integers(*SIDES, 2).tolist())
            colors = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
            colors.resize(size).save(self.root / "mbeir_images" / "pictures" / f"{number:03d}.jpg")
        for folder in sorted(self.picture_folders):
            link = self.root / _picture_folder(folder)
            if not link.is_symlink():
                link.parent.mkdir(exist_ok=True)
                link.symlink_to("../pictures")

    def _write_instructions(self) -> None:
        lines = ["query_modality\tcand_modality\tdataset_name\tdataset_id\tprompt_1\tprompt_2\tprompt_3\tprompt_4"]
        for task in TASKS:
            query, target = QUERIES[task.number], TARGETS[task.number]
            name, subject = NAMES[task.dataset]
            prompts = [p.format(subject=subject, query=NOUNS[query], target=NOUNS[target]) for p in PROMPTS]
            lines.append("\t".join([query, target, name, str(DATASETS.index(task.dataset)), *prompts]))
        write_text(self.root / "instructions" / "query_instructions.tsv", "\n".join(lines) + "\n")


def _twins(oven: Task, infoseek: Task) -> bool:
    return (oven.dataset, infoseek.dataset, oven.number) == ("oven", "infoseek", infoseek.number)


def _name(task: Task, split: str | None) -> list[str]:
    return [task.dataset, f"task{task.number}", *([split] if split else [])]


def _split_number(split: str | None) -> int:
    return SPLITS.index(split) if split else len(SPLITS)


def _picture_folder(number: int) -> Path:
    dataset, part = divmod(number, IDS // PICTURES)
    return Path("mbeir_images") / f"{DATASETS[dataset]}_images" / f"{part:05d}"


def _json_strings(values: list[bytes]) -> bytes:
    return b'"%b"' % b'", "'.join(values) if values else b""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--scale", type=float, default=1.0, help="share of the published numbers of rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text", type=float, default=1.0, help="multiplies the lengths of texts")
    options = parser.parse_args()
    counts = write_mbeir_folder(options.folder, options.scale, options.seed, options.text)
    print(json.dumps(counts._asdict()))


if __name__ == "__main__":
    main()
