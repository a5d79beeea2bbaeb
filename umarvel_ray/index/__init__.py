"""Online search: a faiss index over embedding shards, and a live index on top that accepts changes."""

from umarvel_ray.index.corpus import Corpus
from umarvel_ray.index.faiss_index import Index, build_index, make_index, open_index, recall_against_exact
from umarvel_ray.index.hits import Hit
from umarvel_ray.index.live import LiveIndex
from umarvel_ray.index.records import Add, Delete
from umarvel_ray.index.writer import Committed, IndexWriter

__all__ = [
    "Add",
    "Committed",
    "Corpus",
    "Delete",
    "Hit",
    "Index",
    "IndexWriter",
    "LiveIndex",
    "build_index",
    "make_index",
    "open_index",
    "recall_against_exact",
]
