"""Mine stage 2's hard negatives: embed the training set, search it exactly, filter.

python jobs/mine.py --recipe demo [key=value …] [--dry-run]
ray job submit --working-dir . -- python jobs/mine.py --recipe demo output=/shared/runs/demo
"""

from umarvel_ray.cli import run_job

if __name__ == "__main__":
    run_job("mine")
