"""support/config.py: bad flags are refused in one sentence, defaults are the paper's."""

import pytest
import torch

import ttrl
from support import config


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--vote", "8"], "unknown flag --vote, did you mean --votes?"),
        (["--lr", "fast"], "--lr"),
        (["--reward", "truth"], "--reward"),
        (["--samples", "65"], "--samples 65"),
        (["--temperature", "0"], "--temperature 0"),
        (["--lr", "nan"], "--lr nan"),
        (["--epochs", "0"], "--epochs 0"),
        (["--warmup", "1.5"], "--warmup 1.5"),
        (["--eval-top-p", "0"], "--eval-top-p 0"),
        (["--kl", "-1"], "--kl -1"),
        (["--device", "cuda"], "--device cuda"),
        (["--seed", "20000000000000"], "--seed 20000000000000"),
        (["--seed", "-1"], "--seed -1"),
        (["--rollout-tokens", "10"], "--rollout-tokens 10: must be at least 148"),
        (["--prompt-suffix", "x\udcff"], r"--prompt-suffix 'x\udcff': is not UTF-8 text"),
        (["--data", "\udcff.json"], r"--data '\udcff.json': is not UTF-8 text"),
        (["--out", "\udcff"], r"--out '\udcff': is not UTF-8 text"),
        (["--data", "a\x1b[2J.json"], r"--data 'a\x1b[2J.json': has a character that cannot be printed"),
        (["--wandb", " "], "unknown flag ; --help lists them all"),
        (["--\x1b[2J" + "a" * 999], r"unknown flag --\x1b[2Jaa"),
        (["--votes", "9" * 5000], "--votes: invalid int value: '999"),
        (["--wandb"], "--wandb: the package wandb is not installed"),
    ],
)
def test_bad_flags_are_one_sentence(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        ttrl.main(arguments)
    if torch.distributed.is_initialized():  # what depends on the model is found out later
        torch.distributed.destroy_process_group()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1 and len(error) < 400


def test_there_is_no_flag_to_truncate_the_softmax_in_training():
    with pytest.raises(SystemExit):
        config.parse(["--top-p", "0.9"], ttrl.REWARDS)


def test_defaults_are_the_papers():
    c = config.configure({"model": "Qwen2.5-Math-1.5B"})
    assert (c.data, c.epochs, c.votes, c.samples) == ("aime", 80, 64, 32)
    assert (c.questions_per_step, c.questions_per_update, c.eval_samples) == (8, 1, 16)
    assert (c.lr, c.warmup, c.clip, c.kl, c.weight_decay, c.grad_clip) == (5e-7, 0.03, 0.2, 0.001, 0.01, 1.0)
    assert (c.temperature, c.max_new_tokens, c.eval_temperature, c.eval_top_p) == (1.0, 3072, 0.6, 0.95)
    assert config.configure({"model": "Llama-3.1-8B-Instruct"}).temperature == 0.6
    qwen3 = config.configure({"model": "Qwen3-8B", "data": "math"})
    assert (qwen3.questions_per_step, qwen3.epochs, qwen3.temperature) == (32, 10, 0.6)
    assert config.configure({"model": "Qwen3-8B", "thinking": True}).temperature == 1.0


@pytest.mark.parametrize("model, temperature", [
    ("tiny", 1.0), ("TinyLlama-1.1B-Chat", 0.6), ("my/destiny-7b", 0.6), ("runs/tiny-aime", 0.6),
    ("a/Qwen2.5-Math-7B-ft", 1.0),
])  # fmt: skip
def test_only_the_embedded_model_is_called_tiny(model, temperature):
    assert config.configure({"model": model, "data": "tiny"}).temperature == temperature
