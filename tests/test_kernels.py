"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for GPUs that are not there.

Both happen in processes of their own: whether Triton interprets is settled when a kernel's module is
imported, and the interpreter's bf16 has to be mended first. Neither shows speed, races or unmasked accesses
out of bounds.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("file, interpret", [("kernels_interpreted.py", "1"), ("kernels_compiled.py", "0")])
def test_triton(file, interpret, tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": interpret,
                   "TRITON_CACHE_DIR": str(tmp_path),
                   "TRITON_DEFAULT_FP_FUSION": "1"}  # fmt: skip
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-s",
        "-p",
        "no:cacheprovider",
        str(Path(__file__).with_name(file)),
    ]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, cwd=Path(__file__).parents[1]
    )
    print(done.stdout)  # registers, spills and shared memory of each kernel: pytest -rP
    assert done.returncode == 0, done.stdout + done.stderr
