"""The rewards of rewards.py by hand, that only gold reads the truth, and what is counted of votes."""

import itertools
import math
import random

import pytest
import torch

import rewards
import ttrl
from kernels.sampler import row_keys
from report import metrics, screen
from support import config
from support.questions import Question

A = ["4", "4", "4", "7", "7", "9", None, "5"]
B = ["4"] * 5 + ["7"] * 2 + ["9"]
C = ["4"] * 5 + ["7"] * 3


def group_of(answers, **fields):
    tokens = fields.pop("tokens", [[1, 2, 3, i] for i in range(len(answers))])
    responses = [
        rewards.Response(answer=answer, tokens=ids, logprob=[-0.1], entropy=[0.2], certainty=[3.0])
        for answer, ids in zip(answers, tokens, strict=True)
    ]
    fields = {"question": Question("?", "7"), "responses": responses, **fields}
    coins = [(i % 4 + 0.5) / 4 for i in range(len(answers))]
    return rewards.Group(answers=answers, classes=ttrl.vote(answers)[1], coins=coins, **fields)


# -----------------------------------------------------------------------------------------------------------
# by hand


@pytest.mark.parametrize(
    "name, answers, given, advantages",
    [
        ("vote", A, [1] * 3 + [0] * 5, [1.2076] * 3 + [-0.7246] * 5),
        ("vote", B, [1] * 5 + [0] * 3, [0.7246] * 5 + [-1.2076] * 3),
        ("gold", A, [0] * 3 + [1] * 2 + [0] * 3, [-0.5401] * 3 + [1.6202] * 2 + [-0.5401] * 3),
        ("soft", A, [3 / 8] * 3 + [2 / 8] * 2 + [1 / 8, 0, 1 / 8],
         [0.9991] * 3 + [0.1110] * 2 + [-0.7771, -1.6652, -0.7771]),
        ("soft", B, [5 / 8] * 5 + [2 / 8] * 2 + [1 / 8], [0.7132] * 5 + [-0.9985] * 2 + [-1.5691]),
        ("soft", C, [5 / 8] * 5 + [3 / 8] * 3, [0.7246] * 5 + [-1.2076] * 3),  # those of the vote
        # 3/8 is below one half: no label. 1/8 is rare, 2/8 is not.
        ("selective", A, [0] * 5 + [-1] * 3, [0.7246] * 5 + [-1.2076] * 3),
        ("selective", B, [1] * 5 + [0] * 2 + [-1], [0.6614] * 5 + [-0.6614] * 2 + [-1.9843]),
        ("selective", C, [1] * 5 + [0] * 3, [0.7246] * 5 + [-1.2076] * 3),
        ("selective", ["4"] * 3 + list("7952") + [None], [0] * 3 + [-1] * 5, [1.2076] * 3 + [-0.7246] * 5),
        ("selective", ["4"] * 4 + ["7"] * 4, [0] * 8, [0] * 8),  # half of the votes, but not ahead
        ("selective", ["4"] * 4 + ["7"] * 3 + ["9"], [0] * 7 + [-1], [0.3536] * 7 + [-2.4749]),  # 1/8 ahead
        ("selective", ["4"] * 4 + [None] * 4, [1] * 4 + [-1] * 4, [0.9354] * 4 + [-0.9354] * 4),
        ("selective", [None] * 8, [-1] * 8, [0] * 8),
        ("random", A, [1, 1, 0, 0] * 2, [0.9354, 0.9354, -0.9354, -0.9354] * 2),
    ],
)  # fmt: skip
def test_rewards_and_advantages_by_hand(name, answers, given, advantages):
    got = ttrl.REWARDS[name](group_of(answers))
    assert got == [float(reward) for reward in given]
    of_them = ttrl.advantages(torch.tensor([got]))[0].tolist()
    assert of_them == pytest.approx(advantages, abs=5e-5)


PER_TOKEN = {
    "trajectory_entropy": ("logprob", [-0.5, -0.25], -0.375),
    "probability": ("logprob", [math.log(0.5), math.log(0.4)], 0.2),
    "token_entropy": ("entropy", [0.25, 1.0, 0.25], -0.5),
    "self_certainty": ("certainty", [7.0, 10.0], 8.5),
}


@pytest.mark.parametrize("name", PER_TOKEN)
def test_certainty_rewards_by_hand(name):
    """Of the second response alone, although it has no answer; the first's other numbers are not read."""
    field, values, expected = PER_TOKEN[name]
    fields = {other: [-9.0] for other in ("logprob", "entropy", "certainty")}
    first, second = (
        rewards.Response(answer=None, tokens=range(len(row)), **{**fields, field: row})
        for row in ([-1.0], values)
    )
    group = rewards.Group(answers=[None, None], classes=[], responses=[first, second])
    assert ttrl.REWARDS[name](group)[1] == pytest.approx(expected)
    # of the first response, whose only token has -1: exp(-1), minus -1, -1
    of_first = {"probability": math.exp(-1), "token_entropy": 1.0}.get(name, -1.0)
    assert ttrl.REWARDS[name](group)[0] == pytest.approx(of_first)


@pytest.mark.parametrize("name", PER_TOKEN)
def test_rounding_does_not_tell_equal_responses_apart(name):
    """A sampler computes the same response in other batches, and its numbers differ in the last bits."""
    given = [([5, 7], 0.5), ([5, 7], 0.5000001), ([5, 8], 0.5000001)]
    field = PER_TOKEN[name][0]
    responses = [rewards.Response(answer="4", tokens=ids, **{field: [value]}) for ids, value in given]
    group = rewards.Group(answers=["4"] * 3, classes=[[0, 1, 2]], responses=responses)
    first, same, other = ttrl.REWARDS[name](group)
    assert first == same != other


def test_differences_that_fp32_does_not_have_teach_nothing():
    groups, _, _ = scored("vote", "7")
    tiny = [[10.0**-n for n in range(50, 58)]] * 2
    measured = metrics.of_training(groups, tiny, 8, {})
    assert measured["zero_variance_groups"] == 1 and measured["reward_auc"] == 0.5
    assert ttrl.advantages(torch.tensor(tiny)).eq(0).all()


def test_longer_responses_are_not_worth_more_but_for_probability():
    short, long = ({"logprob": [-0.5] * n, "entropy": [0.3] * n, "certainty": [4.0] * n} for n in (2, 8))
    responses = [rewards.Response(answer="4", tokens=fields["logprob"], **fields) for fields in (short, long)]
    for name in PER_TOKEN:
        group = rewards.Group(answers=["4", "4"], classes=[[0, 1]], responses=responses)
        one, other = ttrl.REWARDS[name](group)
        assert other == pytest.approx(one**4 if name == "probability" else one)


@pytest.mark.parametrize("right, given, expected", [
    ([1, 1, 0, 0], [1, 1, 0, 0], 1.0), ([1, 1, 0, 0], [0, 0, 1, 1], 0.0), ([1, 0, 0], [0.3, 0.3, 0.3], 0.5),
    ([1, 1, 0], [-0.1, -0.3, -0.3], 0.75),
])  # fmt: skip
def test_reward_auc_by_hand(right, given, expected):
    assert metrics.reward_auc(right, given) == expected
    assert math.isnan(metrics.reward_auc([1.0] * len(given), given))
    assert math.isnan(metrics.reward_auc(right, [*given[:-1], math.nan]))


SIMILARITY = [[1, 0.8, 0.2, 0.1], [0.8, 1, 0.4, 0.3], [0.2, 0.4, 1, 0.5], [0.1, 0.3, 0.5, 1]]


def test_novelty_by_hand():
    """Of the first three: 1 - .5/2 - .8/2 = .35, 1 - .6/2 - .8/2 = .3, 1 - .3/2 - .5/2 = .6.

    The largest similarity is over all responses: the third one's is to the fourth, which is not in its group.
    """
    got = rewards.shaped_by_novelty(SIMILARITY, [[0, 1, 2], [3]])
    assert got == pytest.approx(
        [0.5 + 0.5 * 0.05 / 0.3, 0.5, 1.0, -0.5]
    )  # a lone one is its group's most novel
    advantages = ttrl.advantages(torch.tensor([got]))[0].tolist()
    assert advantages == pytest.approx([0.2948, 0.1638, 0.9499, -1.4085], abs=5e-5)


@pytest.mark.parametrize(
    "classes, expected",
    [
        # Novelties of 1 and 3 are 1 - .3/2 - .8/2 = .45 and .6. Different answers are one group of others.
        ([[1, 3], [0], [2]], [-1.0, 0.5, -0.5, 1.0]),
        ([[0, 1], [2], [3]], [0.75, 0.75, -0.75, -0.75]),  # equally novel
        # No answer is nobody's neighbour: without the fourth, the third's is 1 - .3/2 - .4/2 = .65.
        ([[0, 1, 2]], [0.5 + 0.5 * 0.05 / 0.35, 0.5, 1.0, -1.0]),
        ([[2]], [-1.0, -1.0, 1.0, -1.0]),
        ([], [-1.0] * 4),
    ],
)
def test_novelty_within_groups(classes, expected):
    assert rewards.shaped_by_novelty(SIMILARITY, classes) == pytest.approx(expected)


def test_rounding_is_not_novelty():
    similarity = [[1, 0.5, 0.5 + 1e-12], [0.5, 1, 0.5], [0.5 + 1e-12, 0.5, 1]]
    assert rewards.shaped_by_novelty(similarity, [[0, 1, 2]]) == [0.75] * 3


def test_similarity_of_token_trigrams_by_hand():
    """Counts of 123 and 234 are (2, 1) against (1, 1): 3 / sqrt(5 * 2). Short responses have one trigram."""
    responses = [[1, 2, 3, 4, 9, 1, 2, 3], [1, 2, 3, 4], [7], [7], [7, 8]]
    got = rewards.trigram_similarity(responses)
    # 123 twice; 234, 349, 491, 912 once: squares sum to 8
    assert got[0, 1].item() == pytest.approx(3 / 16**0.5) and got[2:, :2].eq(0).all()
    assert got[2, 3] == 1 and got[2, 4] == 0 and got.equal(got.T) and got.diagonal().eq(1).all()


def test_novel_does_not_depend_on_the_order_of_the_responses():
    chance = random.Random(0)
    for _ in range(20):
        answers = chance.choices(["4", "7", None], k=9) + ["4"] * 10
        tokens = [chance.choices(range(3), k=chance.randrange(1, 12)) for _ in answers]
        order = chance.sample(range(19), 19)
        there = rewards.novel_reward(group_of(answers, tokens=tokens))
        shuffled = group_of([answers[i] for i in order], tokens=[tokens[i] for i in order])
        assert rewards.novel_reward(shuffled) == pytest.approx([there[i] for i in order])
        bounds = {"4": (0.5, 1), "7": (-1, -0.5), None: (-1, -1)}
        for answer, reward in zip(answers, there, strict=True):
            assert bounds[answer][0] <= reward <= bounds[answer][1]


# -----------------------------------------------------------------------------------------------------------
# random


def test_coins_are_a_hash_of_what_they_are_for():
    coins = torch.tensor(ttrl.toss_coins(seed=3, step=5, questions=8, n=64))
    assert coins.shape == (8, 64) and abs(coins.lt(0.5).float().mean().item() - 0.5) < 0.07
    assert coins.unique().numel() == 512 and coins.gt(0).all() and coins.lt(1).all()
    assert ttrl.toss_coins(3, 5, 8, 64) == coins.tolist()
    # neither the number of questions nor that of samples changes a coin
    assert ttrl.toss_coins(3, 5, 2, 7) == coins[:2, :7].tolist()
    for other in (ttrl.toss_coins(4, 5, 8, 64), ttrl.toss_coins(3, 6, 8, 64)):
        assert not coins.eq(torch.tensor(other)).any()


def test_coins_share_no_key_with_the_sampling_of_responses():
    question, sample = torch.arange(8).repeat_interleave(64), torch.arange(64).repeat(8)
    keys = {
        stream: {
            key
            for seed, step in itertools.product(range(3), range(40))
            for key in row_keys(seed, stream, step, question, sample).tolist()
        }
        for stream in ("train", "eval", "reward")
    }
    assert all(len(those) == 3 * 40 * 512 for those in keys.values())
    assert not keys["reward"] & (keys["train"] | keys["eval"])


def test_random_rewards_do_not_depend_on_the_answers():
    assert ttrl.random_reward(group_of(A)) == ttrl.random_reward(group_of(B))


# -----------------------------------------------------------------------------------------------------------
# all of them, as a step uses them


class Sealed(Question):
    """A question whose answer nobody may read."""

    def __getattribute__(self, name):
        assert name != "answer"
        return super().__getattribute__(name)


@pytest.mark.parametrize("name", ttrl.REWARDS)
def test_only_gold_reads_the_true_answer(name):
    sealed = group_of(A, question=Sealed("?", "7"))
    if name == "gold":
        with pytest.raises(AssertionError):
            ttrl.REWARDS[name](sealed)
        return
    assert ttrl.REWARDS[name](sealed) == ttrl.REWARDS[name](group_of(A, question=None))


def scored(name, truth, samples=8):
    flags = ["--reward", name, "--votes", "8", "--samples", str(samples)]
    c = config.Config(**config.parse(flags, ttrl.REWARDS))
    groups = [
        [
            rewards.Response(
                answer=answer, tokens=[1, i, i % 3], logprob=[-i / 9], entropy=[i / 9], certainty=[i / 9]
            )
            for i, answer in enumerate(row)
        ]
        for row in (A, B)
    ]
    questions = [Question("?", truth, "0"), Question("?", truth, "1")]
    groups = ttrl.vote_on(questions, groups, ttrl.toss_coins(c.seed, 1, 2, 8))
    given = [ttrl.REWARDS[name](group) for group in groups]
    return groups, given, metrics.of_training(groups, given, c.samples, {})


@pytest.mark.parametrize("name", ttrl.REWARDS)
def test_the_rewards_of_a_step_do_not_depend_on_the_truth(name):
    given = [scored(name, truth)[1] for truth in ("7", "4", None) if (name, truth) != ("gold", None)]
    assert (name == "gold") == (given[0] != given[1]) and (name == "gold" or given[2] == given[0])
    assert all(len(row) == 8 and -1 <= min(row) <= max(row) <= 1 for row in given[0])


def test_mean_reward_and_groups_that_teach_nothing():
    """Of selective: A's rewards are 0 x 5 and -1 x 3, B's 1 x 5, 0 x 2, -1: means -3/8 and 4/8."""
    measured = scored("selective", "7")[2]
    assert measured["reward"] == pytest.approx(0.0625) and measured["zero_variance_groups"] == 0
    assert scored("selective", "7", samples=5)[2]["zero_variance_groups"] == 1
    assert scored("vote", "7", samples=5)[2]["zero_variance_groups"] == 0.5


# -----------------------------------------------------------------------------------------------------------
# what is counted of votes


def record(identity, majority, right=None, truth="1"):
    truth = None if right is None else truth
    return {"id": identity, "kind": "math", "truth": truth, "majority": majority, "majority_right": right}


def test_labels_are_compared_with_the_last_by_hand():
    last = {}
    assert metrics.compared_with_last([record("a", "1/2", False), record("b", None, False)], last) == {}
    assert last == {"a": "1/2", "b": None}
    again = [record("a", "0.5", False), record("b", None, False), record("c", "3", False)]
    # a: the same value, and wrong; b: no label twice, which is no flip and no wrong label; c is asked first
    assert metrics.compared_with_last(again, last) == {"flip_rate": 0, "locked_wrong": 0.5}
    third = [record("a", "1", True), record("b", "2", False), record("c", "3", True), record("d", "4", False)]
    assert metrics.compared_with_last(third, last) == {"flip_rate": 2 / 3, "locked_wrong": 0}
    assert metrics.compared_with_last([record("a", None), record("c", "3")], last) == {"flip_rate": 0.5}
    assert last == {"a": None, "b": "2", "c": "3", "d": "4"}


def test_counted_votes_by_hand():
    answers = ["3", "0.5", "1/2", None, "1/2", "3", "none"]
    [line] = counted(answers)
    assert line == {
        "step": 9,
        "question": "q",
        "label": "1/2",
        "votes": {"1/2": 3, "3": 2, "none": 1},
        "none": 1,
    }
    assert list(line["votes"]) == ["1/2", "3", "none"]


def test_a_tie_is_named_in_the_order_of_the_vote():
    [line] = counted(["8", "3", "4", "4", "3"])
    assert list(line["votes"]) == ["3", "4", "8"] and line["label"] == "3"


def test_many_different_answers_are_summed_up():
    answers = [str(number) for number in range(30)] + ["29"]
    [line] = counted(answers)
    assert list(line["votes"]) == ["29", *map(str, range(19))] and line["other"] == 10 and line["none"] == 0
    assert sum(line["votes"].values()) + line["other"] == 31
    assert "other" not in counted(answers[:20])[0]


def counted(answers):
    group = [rewards.Response(answer=answer, tokens=[7]) for answer in answers]
    return screen.counted_votes(9, ttrl.vote_on([Question("?", None, "q")], [group]))
