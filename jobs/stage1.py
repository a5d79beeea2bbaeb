"""Stage 1, progressive transition: text pairs, image-caption pairs, instructions.

python jobs/stage1.py --recipe demo [key=value …] [--dry-run]
ray job submit --working-dir . -- python jobs/stage1.py --recipe demo output=/shared/runs/demo
"""

from umarvel_ray.cli import run_job

if __name__ == "__main__":
    run_job("stage1")
