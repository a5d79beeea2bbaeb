"""Stage 3: score candidates with the reranker and distill recall-then-rerank into the embedder.

python jobs/stage3.py --recipe demo [key=value …] [--dry-run]
ray job submit --working-dir . -- python jobs/stage3.py --recipe demo output=/shared/runs/demo
"""

from umarvel_ray.cli import run_job

if __name__ == "__main__":
    run_job("stage3")
