"""Benchmarks, one script each: `python -m benchmarks.NAME` from the repository root. Results: docs/results.md."""
