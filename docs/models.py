"""Print the memory table of docs/models.md: the plan's figures for the paper's models, from docs/models.json.

models.json holds what the config.json of each says of its shape. No weight and no GPU is needed.

    python docs/models.py
"""

import json
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from distributed.layout import Job, choose_layout  # noqa: E402
from distributed.machine import find_machine  # noqa: E402
from model import ModelConfig  # noqa: E402
from support.config import configure, flags  # noqa: E402

SHAPES = json.loads((HERE / "models.json").read_text())
PROMPT = 1024  # tokens of the longest; a response has up to 3,072
COLUMNS = ("state", "reference", "sampler", "unsharded", "activations", "graphs")


def model_config(name):
    """The ModelConfig of a model in models.json."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps({"rms_norm_eps": 1e-6, **SHAPES[name]}))
        return ModelConfig.from_pretrained(folder)


def job(name, gpus, **given):
    """A model on GPUs that are not here, with the paper's settings for AIME 2024."""
    c = configure({"model": name, "data": "aime", "dry_run": True, "gpus": gpus, **given})
    most_rows = max(c.questions_per_step * c.votes, 30 * c.eval_samples)
    return Job(c, model_config(name), find_machine(c, None), PROMPT, most_rows)


def layout(name, gpus, **given):
    """The plan's Layout of that job."""
    return choose_layout(job(name, gpus, **given))


def row(name, gpus):
    """A row of the table: GB of each part on a GPU, tokens of a micro-batch, rows, GB of host memory."""
    plan = layout(name, gpus)
    c = plan.config
    chosen = flags(c, ["shard", "sampler_ranks", *["offload"] * c.offload])
    parts = {**plan.parts, "graphs": plan.parts["graphs"] + plan.rows * plan.row["graphs"]}
    sizes = [f"{parts[part] / 1e9:.1f}" if part in parts else "0" for part in COLUMNS]
    sizes.append(f"{sum(parts.values()) / 1e9:.1f}")
    tokens = f"{c.micro_batch_tokens:,}{'' if c.checkpointing else ', all kept'}"
    cells = [f"`{name}`", gpus, f"`{chosen}`", *sizes, tokens, f"{plan.rows}", f"{plan.host / 1e9:.0f}"]
    return f"| {' | '.join(cells)} |"


def table():
    """The lines of the table."""
    head = f"| MODEL | GPUs | the plan's split | {' | '.join(COLUMNS)} | sum | micro-batch | rows | host |"
    cases = [(name, "8x80") for name in SHAPES] + [("Qwen2.5-32B", "16x80")]
    cases += [("Qwen2.5-Math-1.5B", "1x24"), ("Qwen2.5-Math-7B", "1x80")]
    return [head, "|---" * (head.count("|") - 1) + "|", *(row(*case) for case in cases)]


if __name__ == "__main__":
    print(*table(), sep="\n")
