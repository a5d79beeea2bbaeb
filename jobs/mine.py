"""Embed the training set, exact top-k, filter: the hard negatives of stage 2.

python jobs/mine.py --recipe demo [key=value …] [--dry-run]
ray job submit --working-dir . -- python jobs/mine.py --recipe demo output=/shared/runs/demo
"""

from umarvel_ray.cli import run_job

if __name__ == "__main__":
    run_job("mine")
