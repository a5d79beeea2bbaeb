"""Embed all documents with the final model, in shards.

python jobs/embed.py --recipe demo [key=value …] [--dry-run]
ray job submit --working-dir . -- python jobs/embed.py --recipe demo output=/shared/runs/demo
"""

from umarvel_ray.cli import run_job

if __name__ == "__main__":
    run_job("embed")
