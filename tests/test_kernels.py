"""The Triton kernels without a GPU: run by Triton's interpreter, and compiled for GPUs that are not there.

Both happen in processes of their own: whether Triton interprets is settled when a kernel's module is
imported, and the interpreter's bf16 has to be mended first. Neither shows speed, races or unmasked accesses
out of bounds.
"""

import sys

import pytest
from conftest import ROOT, environment, execute


@pytest.mark.parametrize("file, interpret", [("kernels_interpreted.py", "1"), ("kernels_compiled.py", "0")])
def test_triton(file, interpret, tmp_path):
    triton = {
        "TRITON_INTERPRET": interpret,
        "TRITON_CACHE_DIR": str(tmp_path),
        "TRITON_DEFAULT_FP_FUSION": "1",
    }
    line = [sys.executable, "-m", "pytest", "-s", "-p", "no:cacheprovider", ROOT / "tests" / file]
    done = execute(line, env=environment() | triton, cwd=ROOT, timeout=None)
    print(done.stdout)  # registers, spills and shared memory of each kernel: pytest -rP
