"""The HTTP service: one FastAPI ingress in front of the embedder, the reranker and search, on Ray Serve."""
