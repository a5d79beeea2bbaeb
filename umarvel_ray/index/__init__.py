"""What online search uses: a faiss index over embedding shards."""

from umarvel_ray.index.faiss_index import Index, build_index, make_index, open_index, recall_against_exact

__all__ = ["Index", "build_index", "make_index", "open_index", "recall_against_exact"]
