"""What several test files share: a small random model, a few real questions, the program as a subprocess."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).parents[1]
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # for the programs that are started here, even under nohup
torch.set_num_threads(1)  # the other cores belong to the subprocesses, and small matrices gain nothing


@pytest.fixture(scope="session")
def random_model(tmp_path_factory):
    """A Qwen2 of 3 layers with every parameter random, biases and norms too, so that nothing is flat."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from model import Transformer

    config = Qwen2Config(vocab_size=101, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2,
                         max_position_embeddings=512)  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    hf = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in hf.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.22 * noise if parameter.dim() > 1 else 1 + 0.3 * noise)
    folder = tmp_path_factory.mktemp("random_model")
    hf.save_pretrained(folder)
    return Transformer.from_pretrained(folder)


@pytest.fixture(scope="session")
def few_questions(tmp_path_factory):
    """A file with the first six questions of the embedded set."""
    path = tmp_path_factory.mktemp("questions") / "six.json"
    path.write_text(json.dumps(json.loads((ROOT / "tiny" / "questions.json").read_text())[:6]))
    return path


def rollout_of(prompts, responses, room=1):
    """A Rollout of made-up `responses`, (question, tensor of token ids) each, that did not finish."""
    from rollout import empty_rollout

    asked = [question for question, _ in responses]
    pairs = [(question, asked[:row].count(question)) for row, question in enumerate(asked)]
    rows = empty_rollout(prompts, pairs, max(room, *(len(tokens) for _, tokens in responses)))
    for row, (_, tokens) in enumerate(responses):
        rows.fill(row, tokens, torch.zeros(len(tokens)), eos_ids=())
    return rows


SMALL = """--votes 8 --samples 6 --questions-per-step 3 --questions-per-update 2 --epochs 2 --eval-samples 4
    --eval-every 2 --save-every 1 --lr 1e-3 --max-new-tokens 48""".split()


def command(*arguments, ranks=None, script="ttrl.py"):
    """The command line of the real program, under torchrun if `ranks` is given."""
    torchrun = "-m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node"  # as train.sh
    launcher = [] if ranks is None else [*torchrun.split(), str(ranks)]
    exercises = os.environ.get("EXERCISES")  # whose functions a student wrote
    swap = [str(ROOT / "exercises" / "swap.py"), exercises] if exercises else []
    return [sys.executable, *launcher, *swap, str(ROOT / script), *map(str, arguments)]


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def execute(line, code=0, **options):
    """Run a command line to its end and return it with its output; fails unless it exits with `code`."""
    options = {"env": environment(), "timeout": 900, "cwd": "/", **options}
    done = subprocess.run(list(map(str, line)), capture_output=True, text=True, **options)
    assert done.returncode == code, f"exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


def program(*arguments, ranks=None, script="ttrl.py", code=0):
    """Run the real program to its end and return it; fails unless it exits with `code`."""
    return execute(command(*arguments, ranks=ranks, script=script), code)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]
