"""What the benches share: the machine, the model, clocks, peaks of memory and arithmetic, tables, JSON."""

import contextlib
import importlib
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # before this folder, which has a rollout.py of its own

# -----------------------------------------------------------------------------------------------------------
# what is measured, and on what


def peer(name):
    """A package of the extra `bench`, or one sentence on how to get it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SystemExit(
            f'{Path(sys.argv[0]).name}: {name} is missing ({error}); pip install ".[bench]"'
        ) from None


def model_folder(folder):
    """The folder given, or by default SmolLM2-135M-Instruct, made by bench/smollm2.py on first use."""
    if folder is not None:
        return folder.resolve()
    peer("gguf")
    import smollm2

    cache = Path.home() / ".cache/ttrl/smollm2"
    cache.mkdir(parents=True, exist_ok=True)
    smollm2.convert(smollm2.fetch(cache), cache / "SmolLM2-135M-Instruct")
    return cache / "SmolLM2-135M-Instruct"


def processor():
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    return platform.processor() or platform.machine()


def environment():
    """Machine, versions and commit, for the last line."""
    commit = subprocess.run(
        ["git", "-C", ROOT, "describe", "--always", "--dirty"], capture_output=True, text=True
    ).stdout.strip()
    versions = {}
    for name in ("torch", "transformers", "trl", "accelerate"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "machine": processor(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "load": round(os.getloadavg()[0], 2),  # of the last minute: what else ran here
        "python": platform.python_version(),
        **versions,
        "commit": commit,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


# ----------------------------------------------------------------------------------------------------------
# clocks


def clocked(action, *args, **kwargs):
    """(result, seconds by the clock, CPU-seconds of this process)."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = action(*args, **kwargs)
    return result, time.perf_counter() - wall, time.process_time() - cpu


def seconds_of(action, at_least=0.5):
    """Median seconds of a short action, repeated for about `at_least` seconds after a call to warm up."""
    action()
    took = []
    while len(took) < 3 or (sum(took) < at_least and len(took) < 1000):
        took.append(clocked(action)[1])
    return statistics.median(took)


def in_turn(sides, repeats):
    """Run the sides {name: action} in turn, ours, peer, ours, peer: {name: [what each call returned]}."""
    results = {name: [] for name in sides}
    for _ in range(repeats):
        for name, action in sides.items():
            results[name].append(action())
    return results


# ----------------------------------------------------------------------------------------------------------
# memory: /proc has a high-water mark that can be set back; ru_maxrss cannot, and a child begins with its
# parent's


def status(field):
    """Bytes of a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def memory():
    """Bytes that this process holds now."""
    return status("VmRSS") if sys.platform == "linux" else peak_memory()


def peak_memory():
    """Most bytes that this process held since it began, or since `forget_peak`."""
    if sys.platform == "linux":
        return status("VmHWM")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak():
    """Let `peak_memory` count from here on; where the kernel refuses, it still counts from the start."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


# ----------------------------------------------------------------------------------------------------------
# what the machine can do, with the threads that torch has now


def gemm_peaks(size=2048):
    """FLOP/s of one large square product in fp32, by each library that torch has here: {name: FLOP/s}."""
    from kernels.linear import (
        ONEDNN,
        onednn_product,
    )  # here: the processes whose memory is measured do not all need it

    a, b = torch.randn(size, size), torch.randn(size, size)
    products = {"torch.mm": lambda: a @ b}
    if ONEDNN:
        products["oneDNN"] = lambda: onednn_product(a, b)
    return {name: 2 * size**3 / seconds_of(product, 1.5) for name, product in products.items()}


def memory_bandwidth(size=1 << 30):
    """Bytes/s of summing `size` bytes (read) and of copying them (read and written, each counted)."""
    source = torch.ones(size // 4)
    target = torch.empty_like(source)
    return size / seconds_of(source.sum, 1.0), 2 * size / seconds_of(lambda: target.copy_(source), 1.0)


# ----------------------------------------------------------------------------------------------------------
# what is printed


def table(header, rows):
    """Aligned text: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = []
    for row in cells:
        first, *others = zip(row, widths, strict=True)
        line = [first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others)]
        lines.append("  ".join(line).rstrip())
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def say(text):
    print(text, flush=True)


def rounded(value):
    """Floats to four digits, in whatever nesting: the last line is read by people too."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value


def last_line(bench, **results):
    print(json.dumps({"bench": bench, **environment(), **rounded(results)}), flush=True)
