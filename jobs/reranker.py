"""Train the generative pointwise reranker on mined negatives.

python jobs/reranker.py --recipe demo [key=value …] [--dry-run]
ray job submit --working-dir . -- python jobs/reranker.py --recipe demo output=/shared/runs/demo
"""

from umarvel_ray.cli import run_job

if __name__ == "__main__":
    run_job("reranker")
