"""Run the whole recipe; the same command resumes an interrupted run.

python jobs/pipeline.py --recipe demo [key=value …] [--dry-run]
ray job submit --working-dir . -- python jobs/pipeline.py --recipe demo output=/shared/runs/demo
"""

from umarvel_ray.cli import run_job

if __name__ == "__main__":
    run_job("pipeline")
