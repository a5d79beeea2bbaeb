"""Measure recall per task in local and global pools for every finished phase, and write the report.

python jobs/evaluate.py --recipe demo [key=value …] [--dry-run]
ray job submit --working-dir . -- python jobs/evaluate.py --recipe demo output=/shared/runs/demo
"""

from umarvel_ray.cli import run_job

if __name__ == "__main__":
    run_job("evaluate")
