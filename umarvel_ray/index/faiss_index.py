"""The index for online search: faiss over embedding shards, saved with its ids and checked against exact search.

    index = build_index(run / "embeddings" / "documents", run / "index")   # prints recall@10 against exact
    scores, ids = open_index(run / "index").search(embedder.encode_query([...]), k=10)

Mining and evaluation never use it; they search exactly.
"""

from __future__ import annotations

import json
from pathlib import Path

import faiss
import numpy as np

from umarvel_ray.errors import UserError
from umarvel_ray.files import atomic_path, write_json
from umarvel_ray.inference.embeddings import embedder_of, read_embeddings
from umarvel_ray.retrieve.topk import topk

FLAT_UP_TO = 200_000  # vectors: exact search over this many still takes only tens of milliseconds
TRAIN_VECTORS = 400_000
PROBE_SHARE = 16  # an IVF index searches one list in this many


class Index:
    """Unit vectors with document ids, searched by cosine."""

    def __init__(self, ids: list[str], index: faiss.Index, checkpoint: str | None = None) -> None:
        self.ids = ids
        self.checkpoint = checkpoint  # identity of the checkpoint that produced the vectors, if known
        self._index = index

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def dimension(self) -> int:
        return self._index.d

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, list[list[str]]]:
        """Cosines float32 (n, k') and document ids, best first, for queries float32 (n, d); k' = min(k, size).

        Raises:
            UserError: the dimension of the vectors differs from the index's.
        """
        scores, rows = self.search_rows(vectors, k)
        return scores, [[self.ids[row] for row in line] for line in rows]

    def search_rows(
        self, vectors: np.ndarray, k: int, among: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Cosines float32 (n, k') and rows int64 (n, k'), best first, for queries float32 (n, d).

        An approximate index falls back to an exhaustive scan if its usual search finds fewer than k' allowed rows, or
        if so few rows are allowed that the scan costs no more.

        Args:
            among: bool (size,), the rows that may be returned; None for all. k' = min(k, number of allowed rows).

        Raises:
            UserError: the dimension of the vectors differs from the index's, or the index cannot filter rows.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.dimension:
            raise UserError(
                f"index of dimension {self.dimension}: queries have shape {vectors.shape}; use its own model"
            )
        vectors = np.ascontiguousarray(vectors, np.float32)
        allowed = len(self) if among is None else int(np.count_nonzero(among))
        selector = None if among is None or allowed == len(self) else bitmap_of(among)
        k = min(k, allowed)
        if not k:
            return np.empty((len(vectors), 0), np.float32), np.empty((len(vectors), 0), np.int64)
        if allowed * PROBE_SHARE > len(self):
            scores, rows = _search(self._index, vectors, k, selector, exhaustive=False)
            if (rows >= 0).all():
                return scores, rows
        return _search(self._index, vectors, k, selector, exhaustive=True)

    def save(self, folder: str | Path) -> None:
        """Write `index.faiss` and `ids.json`, each atomically.

        Raises:
            UserError: the folder cannot be written.
        """
        folder = Path(folder)
        try:
            with atomic_path(folder / "index.faiss") as partial:
                faiss.write_index(self._index, str(partial))
                write_json(folder / "ids.json", {"checkpoint": self.checkpoint, "ids": self.ids}, indent=None)
        except (OSError, RuntimeError) as error:
            raise UserError(f"cannot write the index to {folder}: {error}") from None


def bitmap_of(among: np.ndarray) -> faiss.IDSelector:
    """A faiss selector from bool (n,): the rows that may be returned."""
    return faiss.IDSelectorBitmap(np.packbits(among, bitorder="little"))


def _search(
    index: faiss.Index, vectors: np.ndarray, k: int, selector: faiss.IDSelector | None, exhaustive: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Search the selected rows with faiss. `exhaustive` scans every list or vector, not just the most likely ones."""
    if isinstance(index, faiss.IndexPreTransform):
        for position in range(index.chain.size()):
            vectors = faiss.downcast_VectorTransform(index.chain.at(position)).apply(vectors)
        return _search(faiss.downcast_index(index.index), vectors, k, selector, exhaustive)
    if isinstance(index, faiss.IndexHNSW) and exhaustive:
        return _search(faiss.downcast_index(index.storage), vectors, k, selector, exhaustive)
    if isinstance(index, faiss.IndexHNSW):
        parameters = faiss.SearchParametersHNSW(sel=selector, efSearch=index.hnsw.efSearch)
    elif isinstance(index, faiss.IndexIVF):
        parameters = faiss.SearchParametersIVF(sel=selector, nprobe=index.nlist if exhaustive else index.nprobe)
    else:
        parameters = selector and faiss.SearchParameters(sel=selector)
    try:
        return index.search(vectors, k, params=parameters)
    except RuntimeError:
        name = type(index).__name__
        raise UserError(f"faiss {name} cannot filter rows; build a Flat, IVF or HNSW index") from None


def make_index(ids: list[str], vectors: np.ndarray, factory: str | None = None, checkpoint: str | None = None) -> Index:
    """Index unit vectors float32 (n, d).

    Args:
        factory: a faiss factory string; None selects exact search up to FLAT_UP_TO vectors and IVF with fp16 vectors
            beyond.
        checkpoint: identity of the checkpoint that produced the vectors.

    Raises:
        UserError: no vectors, too few of them, or a factory string that faiss does not know.
    """
    if not len(ids):
        raise UserError("nothing to index: no embeddings; run the embed job first")
    lists = int(4 * len(ids) ** 0.5)
    factory = factory or ("Flat" if len(ids) <= FLAT_UP_TO else f"IVF{lists},SQfp16")
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError:
        raise UserError(f"faiss does not know the index '{factory}'; try Flat, IVF1024,SQfp16 or HNSW32") from None
    if not index.is_trained:
        rng = np.random.default_rng(0)
        sample = rng.choice(len(vectors), min(len(vectors), TRAIN_VECTORS), replace=False)
        try:
            index.train(vectors[np.sort(sample)])
        except RuntimeError:  # faiss says so in several lines of C++
            raise UserError(
                f"{len(ids):,} documents are too few to train the faiss index '{factory}'; try Flat or HNSW32"
            ) from None
    index.add(np.ascontiguousarray(vectors, np.float32))
    if isinstance(index, faiss.IndexIVF):
        index.nprobe = max(1, index.nlist // PROBE_SHARE)
    return Index(ids, index, checkpoint)


def recall_against_exact(index: Index, vectors: np.ndarray, queries: np.ndarray, k: int = 10) -> float:
    """The share of the exact top k that the index finds.

    Args:
        vectors: float32 (n, d), the indexed vectors in the order of the index's ids.
        queries: float32 (m, d).
    """
    _, exact = topk(queries, vectors, min(k, len(vectors)))
    _, found = index.search(queries, k)
    hits = [len({index.ids[row] for row in line} & set(ids)) for line, ids in zip(exact, found, strict=True)]
    return sum(hits) / exact.size


def build_index(
    embeddings_dir: str | Path, out_dir: str | Path, factory: str | None = None, queries: np.ndarray | None = None
) -> Index:
    """Index a finished embed job, save the index and print its recall against exact search.

    Args:
        queries: float32 (n, d) for measuring recall; None samples 256 of the documents.

    Raises:
        UserError: no finished embed job; see also `make_index` and `Index.save`.
    """
    ids, vectors = read_embeddings(embeddings_dir)
    index = make_index(ids, vectors, factory, embedder_of(embeddings_dir))
    if queries is None:
        queries = vectors[np.random.default_rng(0).choice(len(ids), min(len(ids), 256), replace=False)]
    index.save(out_dir)
    recall = recall_against_exact(index, vectors, queries)
    print(f"indexed {len(ids):,} documents in {out_dir}; recall@10 against exact search {recall:.4f}")
    return index


def is_saved(folder: str | Path) -> bool:
    """Whether the folder holds a saved index."""
    return (Path(folder) / "index.faiss").is_file()


def open_index(folder: str | Path) -> Index:
    """Open a saved index.

    Raises:
        UserError: the index is missing or damaged, or its two files do not match.
    """
    folder = Path(folder)
    try:
        saved = json.loads((folder / "ids.json").read_text())
        ids = saved["ids"]
        index = faiss.read_index(str(folder / "index.faiss"))
    except FileNotFoundError:
        raise UserError(f"{folder} holds no index; build it with: umarvel index") from None
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{folder}: the index is damaged ({reason}); build it again with: umarvel index") from None
    if len(ids) != index.ntotal:
        raise UserError(f"{folder}: {len(ids)} ids for {index.ntotal} vectors; build it again with: umarvel index")
    return Index(ids, index, saved["checkpoint"])
