"""Retrievers and embedding classes of other frameworks, on the HTTP service; each needs its framework installed."""
