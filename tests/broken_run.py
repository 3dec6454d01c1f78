"""Run ttrl.py with something broken: argv[1] is a folder (unused), the rest are flags of ttrl.py.

RANKS_THAT_CANNOT_READ: those ranks fail to load the questions. Without it every gradient norm is nan.
"""

import os
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import ttrl
from support import questions

if __name__ == "__main__":
    failing = os.environ.get("RANKS_THAT_CANNOT_READ", "").split()
    if os.environ.get("RANK", "0") in failing:

        def load(name):
            raise OSError("the disk is gone")

        questions.load = load
    elif not failing:
        torch.nn.utils.clip_grad_norm_ = lambda parameters, norm: torch.tensor(float("nan"))
    try:
        ttrl.main(sys.argv[2:])
    finally:
        torch.distributed.destroy_process_group()
