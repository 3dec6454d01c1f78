"""The mathematics of ttrl.py by hand: vote, advantages, loss, schedule, draw, micro-batches."""

import contextlib
import itertools
import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

import grading
import ttrl
from distributed import parallel
from kernels import packing
from model import Transformer
from report import metrics
from rewards import Group, Response
from rollout import Rollout
from support import config
from support.prompts import load_tokenizer
from support.questions import Question
from support.schedule import Schedule
from tiny import make

# -----------------------------------------------------------------------------------------------------------
# vote


def voted(answers, kind="math"):
    """(label, rewards) of the vote."""
    label, classes = ttrl.vote(answers, kind)
    return label, ttrl.vote_reward(Group(answers=answers, classes=classes))


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
    """50% equals 0.5 and 50, but 0.5 is not 50: classes form around first members, rewards follow classes."""
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
    assert voted(["B", "C", "b", None], kind="choice") == ("B", [1.0, 0.0, 1.0, 0.0])


def test_vote_gives_the_classes_in_the_order_of_their_first_members():
    assert ttrl.vote(["3", None, "4", "6/2", "4", "4"]) == ("4", [[0, 3], [2, 4, 5]])


def test_reports_group_answers_as_the_vote_does():
    lines = (ROOT / "tests" / "answer_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [json.loads(line) for line in lines[::40]]
    answers = [None, "50%", *(pair[side] for pair in pairs for side in "ab"), "0.5", "50", None]
    classes = ttrl.vote(answers)[1]
    assert classes == grading.classes(answers) and 10 < len(classes) < len(answers) - 10


def test_every_reward_is_a_number_per_answer_and_metrics_do_not_depend_on_it(monkeypatch):
    """A reward of one's own: a function in REWARDS, and nothing else."""
    monkeypatch.setitem(ttrl.REWARDS, "half", lambda group: [0.5 for _ in group.answers])
    question = Question("?", "3")
    fields = dict(tokens=[7], logprob=[-1.0], entropy=[1.0], certainty=[1.0])
    group = [Response(answer=answer, text=answer, **fields) for answer in ("3", "4", "3")]
    measured = {}
    for name in ttrl.REWARDS:
        c = config.Config(**config.parse(["--reward", name, "--votes", "3", "--samples", "2"], ttrl.REWARDS))
        [voted] = ttrl.vote_on([question], [group], ttrl.toss_coins(c.seed, 1, 1, 3))
        rewards = [ttrl.REWARDS[name](voted)]
        measured[name] = metrics.of_training([voted], rewards, c.samples, {})
        assert (voted.label, voted.classes) == ("3", [[0, 2], [1]]) and len(rewards[0]) == 3
        assert measured[name].pop("reward") == sum(rewards[0]) / 3
        assert measured[name].pop("zero_variance_groups") == (rewards[0][0] == rewards[0][1])
        assert measured[name].pop("reward_auc") == metrics.reward_auc([1.0, 0.0, 1.0], rewards[0])
    assert rewards[0] == [0.5] * 3 and all(other == measured["vote"] for other in measured.values())


# ----------------------------------------------------------------------------------------------------------
# advantages


def test_advantages_by_hand():
    """Rewards 1 1 0 0: mean 1/2, std with ddof 1 sqrt(4 * 0.25 / 3) = 0.57735 (0.5 with ddof 0)."""
    got = ttrl.advantages(torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]]))
    by_hand = [[0.866025, 0.866025, -0.866025, -0.866025], [1.5, -0.5, -0.5, -0.5]]
    torch.testing.assert_close(got, torch.tensor(by_hand), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 7, 32])
@pytest.mark.parametrize("value", [0.0, 1.0, 0.1])  # the mean of seven 0.1 is not 0.1 in fp32
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

    At A = 0 the surrogate adds nothing.
    """
    loss, gradient, sums = one_token(1.0, 0.0, ref_logprob=torch.tensor([[d]]), kl=0.5)
    assert loss == pytest.approx(0.5 * (math.exp(d) - d - 1), abs=1e-6) and sums["kl"] == pytest.approx(
        math.exp(d) - d - 1, abs=1e-6
    )
    assert gradient == pytest.approx(0.5 * (1 - math.exp(d)), abs=1e-6)


@pytest.mark.parametrize("d", [1e-3, -1e-3, 1e-4, -1e-4, 1e-5, -1e-5])
def test_the_kl_of_policies_that_are_close_keeps_its_digits(d):
    """In fp32 exp(d) - d - 1 is off by several times its value there, and may be negative."""
    _, _, sums = one_token(math.exp(d), 0.0, ref_logprob=torch.tensor([[2 * d]]), kl=1.0)  # ref - new = d too
    by_hand = pytest.approx(d**2 / 2 + d**3 / 6, rel=0.01)
    assert sums["kl"].item() == by_hand and sums["kl_old_new"].item() == by_hand


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
    """Three tokens in two rows: a masked infinity has no say, and the shares of micro-batches add up."""
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
    loss, sums = ttrl.grpo_loss(logprob, torch.zeros(1, 2), torch.ones(1, 1), torch.tensor([[True, False]]))
    loss.backward()
    assert logprob.grad[0, 1] == 0 and logprob.grad.isfinite().all()
    assert all(value.isfinite() for value in sums.values())


def test_the_gradient_of_the_loss_equals_finite_differences():
    """In float64, away from the corners of the clips: tokens clipped and not, masked ones, a KL."""
    generator = torch.Generator().manual_seed(0)
    logprob, old, ref = torch.randn(3, 4, 5, generator=generator, dtype=torch.float64)
    advantage = torch.tensor([[1.0], [-1.0], [0.5], [-2.0]], dtype=torch.float64)
    mask = torch.rand(4, 5, generator=generator) < 0.7
    logprob.requires_grad_()

    def loss(x):
        return ttrl.grpo_loss(x, old, advantage, mask, ref_logprob=ref, kl=0.3)[0]

    assert torch.autograd.gradcheck(loss, logprob)
    (gradient,) = torch.autograd.grad(loss(logprob), logprob)
    assert gradient[~mask].eq(0).all() and gradient.ne(0).sum() > 5


# ----------------------------------------------------------------------------------------------------------
# how right the rewards of a vote are


@pytest.mark.parametrize(
    "answers, truth, expected",
    [
        ("4 4 4 7 7 9 none 5", "7", 3 / 8),  # of 8 rewards the 9, the 5 and the one without an answer agree
        ("4 4 4 7 7 9 none 5", "4", 1),  # the label is right, so every reward is
        ("4 4 4 7 7 9 none 5", "8", 5 / 8),  # nobody is right: all but the majority agree
        ("1 2 3 4 5 6 6 7", "7", 5 / 8),  # "lucky hit": the label is wrong and most rewards are right
        ("3 3 3 3", "5", 0),
        ("none none", "5", 1),  # no label and nobody right: no reward, as it should be
    ],
)
def test_reward_accuracy_by_hand(answers, truth, expected):
    answers = [None if answer == "none" else answer for answer in answers.split()]
    spellings = [answer for answer in dict.fromkeys(answers) if answer is not None]
    label = max(spellings, key=answers.count, default=None)  # a vote by spelling, ties to the first
    agreeing = [i for i, answer in enumerate(answers) if answer is not None and answer == label]
    assert metrics.reward_accuracy([float(answer == truth) for answer in answers], agreeing) == expected


def test_the_embedded_model_is_measured_by_this_vote(monkeypatch, capsys):
    """Answers count by value, and none never wins: of these five 1/2 and 0.5 do, on the true 0.5."""
    answers = iter([None, "1/2", None, "0.5", "3"])
    monkeypatch.setattr(make, "extract_answer", lambda *_, **__: next(answers))
    folder = make.HERE / "model"
    model, (tokenizer, _) = Transformer.from_pretrained(folder), load_tokenizer(folder)
    make.measure(model, tokenizer, [{"prompt": "1+2=?", "answer": "0.5", "id": "half"}], 5, 1.0)
    assert "pass@1 0.400, maj@5 1.000; 2.0 different answers" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------------
# schedule, draw, micro-batches


def test_learning_rate_rises_then_falls_to_zero_and_the_first_update_moves():
    """100 updates: 10 epochs of 10 questions, in a step of 6 and one of 4."""
    schedule = Schedule(config.Config(lr=1.0, warmup=0.1, epochs=10, questions_per_step=6), 10)
    numbers = [(step, number) for step in range(1, 21) for number in range(6 if step % 2 else 4)]
    rates = [schedule.learning_rate(*number) for number in numbers]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[55] == pytest.approx(0.5) and 0 < rates[-1] < 1e-3
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    c = config.Config(lr=1.0, warmup=0.0, epochs=1, questions_per_step=1)
    assert Schedule(c, 1).learning_rate(1, 0) == 1.0


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


def test_every_seed_and_epoch_draws_in_an_order_of_its_own():
    """Every bit of a seed counts (torch's CPU generator keeps 32), and no epoch of one is that of another."""
    seeds = [0, *(2**bit for bit in range(32))]
    orders = [tuple(ttrl.draw_questions(epoch, 64, 64, seed)) for seed in seeds for epoch in (0, 1, 2**20)]
    assert len(set(orders)) == len(orders)


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
    assert packing.split_by_tokens(rollout, range(5), 1000) == [[0, 2, 1, 4, 3]]
    # 10+2*7, then 10+20 (alone over it), then 10+2*8
    assert packing.split_by_tokens(rollout, range(5), 26) == [[0, 2], [1], [4, 3]]
    assert packing.split_by_tokens(rollout, [], 25) == []


def test_a_rank_without_more_micro_batches_repeats_its_shortest_row(monkeypatch):
    """Of two real rows and three passes, as another rank has them: prompt and response both count."""
    rollout, seen = rows_of({0: [3000, 8], 1: [7]}), []
    rollout.prompt_length[2] = 12
    monkeypatch.setattr(ttrl.ranks, "all_reduce", lambda numbers, *_: numbers)
    monkeypatch.setattr(parallel, "all_reduce", lambda numbers, *_: {"passes": 3})
    monkeypatch.setattr(ttrl.ranks, "world_size", lambda: 2)
    monkeypatch.setattr(parallel, "exchange_gradients", lambda *_, **__: contextlib.nullcontext())

    def loss(run, micro_batch, mask, *_):
        seen.append((micro_batch.response_length.tolist(), bool(mask.any())))
        return torch.zeros((), requires_grad=True)

    monkeypatch.setattr(ttrl, "micro_batch_loss", loss)
    run = SimpleNamespace(config=config.Config(micro_batch_tokens=100), learner=None)
    ttrl.accumulate_gradients(run, rollout, torch.tensor([0, 2]), None, None)
    assert seen == [([3000], True), ([7], True), ([8], False)]


def test_micro_batches_count_padding():
    """60 responses of 1 token and one of 3,000 are 3,060 tokens, but 61 x 3,000 when padded together."""
    rollout = rows_of({0: [1] * 60, 1: [1] * 59 + [3000]})
    batches = packing.split_by_tokens(rollout, range(120), 4000)
    assert (
        sorted(itertools.chain(*batches)) == list(range(120)) and batches[-1] == [119] and len(batches) == 2
    )
    assert all(packing.padded_tokens(rollout, batch) <= 4000 for batch in batches)


def test_standard_error_is_clustered_by_question():
    assert metrics.standard_error([0.0, 1.0, 1.0, 0.0]) == pytest.approx(math.sqrt(1 / 3 / 4))
    assert metrics.standard_error([0.3]) == 0.0
