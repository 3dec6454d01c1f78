"""The mathematics of ttrl.py with hand-computed numbers.

Vote, advantages, loss, schedule, draw, micro-batches.
"""

import dataclasses
import itertools
import json
import math

import pytest
import torch

import packing
import plan
import ttrl
from model import ModelConfig
from rollout import Rollout
from support import config, metrics
from support.questions import Question

# -----------------------------------------------------------------------------------------------------------
# vote


def voted(answers, kind="math"):
    """(label, rewards) of the vote."""
    label, classes = ttrl.vote(answers, kind)
    return label, ttrl.vote_reward(None, answers, classes)


@pytest.mark.parametrize(
    "answers, label, rewards",
    [
        (["3", "4", "3"], "3", [1, 0, 1]),
        (["4", "3", "3", "4"], "4", [1, 0, 0, 1]),  # a tie goes to the class that was seen first
        (["7", "5", "3", "5", "3"], "5", [0, 1, 0, 1, 0]),  # ... whatever else came before it
        (["1/2", "3", "0.5", "\\frac{1}{2}", "3"], "1/2", [1, 0, 1, 1, 0]),  # value counts, not spelling
        (["0.5", "1/2", "1/2"], "1/2", [1, 1, 1]),  # the label is the most frequent spelling
        ([None, "2", None, None], "2", [0, 1, 0, 0]),  # no answer never votes
        ([None, None], None, [0, 0]),
        (["9"], "9", [1]),
        ([None], None, [0]),
        ([], None, []),
    ],
)
def test_vote(answers, label, rewards):
    assert voted(answers) == (label, [float(r) for r in rewards])


def test_vote_over_answers_whose_equality_is_not_transitive():
    """50% equals 0.5 and equals 50, but 0.5 is not 50.

    Classes form around their first member, rewards follow the classes.
    """
    for answers in itertools.permutations(["50%", "0.5", "50", "0.5"]):
        label, rewards = voted(list(answers))
        winners = [a for a, r in zip(answers, rewards, strict=True) if r]
        first = answers[rewards.index(1.0)]
        if first == "50%":
            assert sum(rewards) == 4  # everything equals it
        else:
            assert sum(rewards) == len(winners) and not {"0.5", "50"} <= set(winners)
        assert label in winners


def test_vote_counts_choices_by_letter():
    assert voted(["B", "C", "B", None], kind="choice") == ("B", [1.0, 0.0, 1.0, 0.0])


def test_vote_gives_the_classes_in_the_order_of_their_first_members():
    assert ttrl.vote(["3", None, "4", "6/2", "4"]) == ("3", [[0, 3], [2, 4]])


def test_every_reward_is_a_number_per_answer_and_metrics_do_not_depend_on_it(monkeypatch):
    """A reward of one's own: a function in REWARDS, and nothing else."""
    monkeypatch.setitem(ttrl.REWARDS, "half", lambda question, answers, classes: [0.5 for _ in answers])
    question = Question("?", "3")
    group = [ttrl.Response(answer, answer, 1, True) for answer in ("3", "4", "3")]
    measured = {}
    for name in ttrl.REWARDS:
        c = config.Config(**config.parse(["--reward", name, "--votes", "3", "--samples", "2"], ttrl.REWARDS))
        labels, rewards, measured[name] = ttrl.score(c, [question], [group])
        assert (
            labels == ["3"] and len(rewards[0]) == 3 and measured[name].pop("reward") == sum(rewards[0]) / 3
        )
        assert measured[name].pop("zero_variance_groups") == (name == "half")
    assert measured["half"] == measured["vote"] == measured["gold"]


# ----------------------------------------------------------------------------------------------------------
# advantages


def test_advantages_by_hand():
    """Rewards 1 1 0 0.

    Mean 1/2, std with ddof 1 sqrt(4 * 0.25 / 3) = 0.57735 (with ddof 0 it would be 0.5).
    """
    got = ttrl.advantages(torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    by_hand = [[0.866025, 0.866025, -0.866025, -0.866025], [1.5, -0.5, -0.5, -0.5]]
    torch.testing.assert_close(got, torch.tensor(by_hand), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 7, 32])
@pytest.mark.parametrize("value", [0.0, 1.0])
def test_unanimous_group_has_no_advantage(size, value):
    assert ttrl.advantages(torch.full((3, size), value)).eq(0).all()


# ----------------------------------------------------------------------------------------------------------
# loss


def one_token(ratio, advantage, **options):
    """Loss and its gradient in the log-prob of a single token with the given ratio to the old policy."""
    logprob = torch.tensor([[math.log(ratio)]], requires_grad=True)
    loss, sums = ttrl.grpo_loss(
        logprob, torch.zeros(1, 1), torch.tensor([[advantage]]), torch.ones(1, 1, dtype=torch.bool), **options
    )
    loss.backward()
    return loss.item(), logprob.grad.item(), sums


@pytest.mark.parametrize(
    "ratio, advantage, loss, gradient, clipped",
    [
        (1.0, 2.0, -2.0, -2.0, 0),
        (1.1, 2.0, -2.2, -2.2, 0),
        (1.5, 2.0, -2.4, 0.0, 1),  # up is clipped at 1.2
        (0.5, 2.0, -1.0, -1.0, 0),  # a good token that became rare is never clipped
        (0.9, -2.0, 1.8, 1.8, 0),
        (0.5, -2.0, 1.6, 0.0, 1),  # down is clipped at 0.8
        (1.5, -2.0, 3.0, 3.0, 0),
        (4.0, -2.0, 6.0, 0.0, 0),  # dual clip: at most 3 |A|
    ],
)
def test_clipped_surrogate_by_hand(ratio, advantage, loss, gradient, clipped):
    got = one_token(ratio, advantage)
    assert got[0] == pytest.approx(loss, rel=1e-5) and got[1] == pytest.approx(gradient, abs=1e-5)
    assert got[2]["clip_fraction"] == clipped
    assert got[2]["kl_old_new"] == pytest.approx(ratio - 1 - math.log(ratio), abs=1e-6)


@pytest.mark.parametrize("d", [-1.0, 0.0, 0.7])
def test_k3_kl_by_hand(d):
    """k3 = exp(d) - d - 1 with d = ref - new; its gradient in new is 1 - exp(d).

    The surrogate is silent at A = 0.
    """
    loss, gradient, sums = one_token(1.0, 0.0, ref_logprob=torch.tensor([[d]]), kl=0.5)
    assert loss == pytest.approx(0.5 * (math.exp(d) - d - 1), abs=1e-6) and sums["kl"] == pytest.approx(
        math.exp(d) - d - 1, abs=1e-6
    )
    assert gradient == pytest.approx(0.5 * (1 - math.exp(d)), abs=1e-6)


def test_k3_kl_is_clamped():
    assert one_token(1.0, 0.0, ref_logprob=torch.tensor([[5.0]]), kl=1.0)[:2] == (10.0, 0.0)


@pytest.mark.parametrize("ratio", [1e-50, 1e50])
@pytest.mark.parametrize("advantage", [-1.0, 0.0, 1.0])
@pytest.mark.parametrize("d", [-200.0, 200.0])
def test_a_token_that_became_all_but_impossible_has_a_finite_gradient(ratio, advantage, d):
    """exp() overflows in fp32 above 88, and the gradient of what a clamp cuts off an infinity is NaN."""
    loss, gradient, _ = one_token(ratio, advantage, ref_logprob=torch.tensor([[math.log(ratio) + d]]), kl=1.0)
    assert math.isfinite(loss) and math.isfinite(gradient)


def test_loss_is_a_sum_over_tokens_by_the_global_count():
    """Three tokens in two rows; what lies behind the mask, even infinities, has no say.

    Shares of micro-batches add up.
    """
    logprob = torch.tensor([[0.1, -0.2], [0.3, float("inf")]])
    old, mask = torch.zeros(2, 2), torch.tensor([[True, True], [True, False]])
    advantage = torch.tensor([[1.0], [-1.0]])
    whole, _ = ttrl.grpo_loss(logprob, old, advantage, mask)
    by_hand = (-math.exp(0.1) - math.exp(-0.2) + math.exp(0.3)) / 3
    assert whole.item() == pytest.approx(by_hand, rel=1e-5)
    shares = [
        ttrl.grpo_loss(logprob[[i]], old[[i]], advantage[[i]], mask[[i]], token_count=3)[0] for i in range(2)
    ]
    assert sum(shares).item() == pytest.approx(by_hand, rel=1e-5)


def test_masked_tokens_have_no_gradient_even_if_not_finite():
    logprob = torch.tensor([[0.1, float("-inf")]], requires_grad=True)
    loss, _ = ttrl.grpo_loss(logprob, torch.zeros(1, 2), torch.ones(1, 1), torch.tensor([[True, False]]))
    loss.backward()
    assert logprob.grad[0, 1] == 0 and logprob.grad.isfinite().all()


# ----------------------------------------------------------------------------------------------------------
# schedule, draw, micro-batches


def test_learning_rate_rises_then_falls_to_zero_and_the_first_update_moves():
    c = config.Config(lr=1.0, warmup=0.1)
    rates = [ttrl.learning_rate(c, update, 100) for update in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[55] == pytest.approx(0.5) and 0 < rates[-1] < 1e-3
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert ttrl.learning_rate(config.Config(lr=1.0, warmup=0.0), 0, 1) == 1.0


@pytest.mark.parametrize("count, per_step", [(30, 8), (8, 8), (5, 8), (64, 8)])
def test_draw_asks_every_question_once_an_epoch_in_a_new_order(count, per_step):
    batches = math.ceil(count / per_step)
    epochs = [
        [
            i
            for step in range(e * batches, (e + 1) * batches)
            for i in ttrl.draw_questions(step, count, per_step, seed=3)
        ]
        for e in range(3)
    ]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)
    assert epochs[0] != epochs[1] and epochs[0] != [
        i for s in range(batches) for i in ttrl.draw_questions(s, count, per_step, seed=4)
    ]


def rows_of(lengths, prompt=10):
    """A Rollout with the given {question: response lengths}, contents all zero."""
    flat = [(question, length) for question, group in lengths.items() for length in group]
    question, length = (torch.tensor(column) for column in zip(*flat, strict=True))
    zeros = torch.zeros(len(flat), 1)
    return Rollout(
        question, torch.zeros_like(question), torch.full_like(question, prompt), length, zeros, zeros, zeros
    )


def test_micro_batches_keep_to_the_budget_and_count_a_prompt_once():
    rollout = rows_of({0: [5, 20, 7], 1: [8, 3]})
    assert packing.micro_batches(rollout, range(5), 1000) == [[0, 2, 1, 4, 3]]
    assert packing.micro_batches(rollout, range(5), 26) == [
        [0, 2],
        [1],
        [4, 3],
    ]  # 10+2*7, then 10+20 (alone over it), then 10+2*8
    assert packing.micro_batches(rollout, [], 25) == []


def test_micro_batches_count_padding():
    """60 responses of 1 token and one of 3,000 are 63 tokens more than the prompt, but 61 x 3,000 in one micro-batch."""
    rollout = rows_of({0: [1] * 60, 1: [1] * 59 + [3000]})
    batches = packing.micro_batches(rollout, range(120), 4000)
    assert (
        sorted(itertools.chain(*batches)) == list(range(120)) and batches[-1] == [119] and len(batches) == 2
    )
    assert all(packing.padded_tokens(rollout, batch) <= 4000 for batch in batches)


def test_standard_error_is_clustered_by_question():
    assert metrics.standard_error([0.0, 1.0, 1.0, 0.0]) == pytest.approx(math.sqrt(1 / 3 / 4))
    assert metrics.standard_error([0.3]) == 0.0


# ----------------------------------------------------------------------------------------------------------
# flags


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
        (["--wandb"], "--wandb: the package wandb is not installed"),
    ],
)
def test_bad_flags_are_one_sentence(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        ttrl.main(arguments)
    if torch.distributed.is_initialized():  # what depends on the model is found out later
        torch.distributed.destroy_process_group()
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error and error.count("\n") == 1


def test_there_is_no_flag_to_truncate_the_softmax_in_training():
    with pytest.raises(SystemExit):
        config.parse(["--top-p", "0.9"], ttrl.REWARDS)


def test_defaults_are_the_papers():
    c = config.configure({"model": "Qwen2.5-Math-1.5B"})
    assert (c.data, c.epochs, c.votes, c.samples, c.questions_per_step, c.questions_per_update) == (
        "aime",
        80,
        64,
        32,
        8,
        1,
    )
    assert (c.lr, c.warmup, c.clip, c.kl, c.weight_decay, c.grad_clip) == (5e-7, 0.03, 0.2, 0.001, 0.01, 1.0)
    assert (c.temperature, c.max_new_tokens, c.eval_samples, c.eval_temperature, c.eval_top_p) == (
        1.0,
        3072,
        16,
        0.6,
        0.95,
    )
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


def test_the_plan_counts_the_responses_of_evaluation():
    """MATH-500 with the paper's settings.

    160 steps and 82 evaluations of 500 x 16, and greedy before and after.
    """
    c = config.configure({"model": "Qwen2.5-Math-1.5B", "data": "math"})
    assert plan.planned_responses(c, 500, 500) == {"train": 10 * 500 * 64, "eval": 81 * 500 * 16 + 2 * 500}


def test_a_model_that_does_not_fit_is_refused_with_the_bytes(tmp_path, monkeypatch):
    """A 7B model on 80 GB.

    16 bytes a parameter and 4 for the reference are too much to train, 4 are enough to evaluate.
    """
    widths = {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 4096,
    }
    shape = {
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "tie_word_embeddings": False,
    }
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2", **widths, **shape}))
    monkeypatch.setattr(plan, "physical_memory", lambda: 80 * 10**9)
    c = config.configure({"model": "Qwen2.5-Math-7B", "device": "cpu"})
    options = (ModelConfig.from_pretrained(tmp_path), torch.device("cpu"), 4096)
    with pytest.raises(
        ValueError,
        match=r"needs 154\.5 GB \(weights 30\.46, gradients 30\.46, moments 60\.92, .* has 72\.0 GB",
    ):
        plan.budgets(c, *options)
    rollout_tokens, _ = plan.budgets(dataclasses.replace(c, eval_only=True), *options)
    assert 32 * 4096 < rollout_tokens < 64 * 4096
