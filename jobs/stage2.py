"""Stage 2: mine and filter hard negatives, then continue contrastive training with them.

python jobs/stage2.py --recipe demo [key=value …] [--dry-run]
ray job submit --working-dir . -- python jobs/stage2.py --recipe demo output=/shared/runs/demo
"""

from umarvel_ray.cli import run_job

if __name__ == "__main__":
    run_job("stage2")
