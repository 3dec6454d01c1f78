"""Before and after, by hand and by simulation: fates beyond chance, paired changes, the best evaluation."""

import json
import random

import pytest
from conftest import SMALL, program

from report import ledger, metrics


def record(answers, truth="7", **fields):
    right = [float(answer == truth) for answer in answers]
    counts = sorted(dict.fromkeys(a for a in answers if a), key=answers.count, reverse=True)
    majority = counts[0] if counts else None
    return {
        "id": "0", "kind": "math", "truth": truth, "answers": answers, "right": right,
        "pass@1": metrics.mean(right), "majority": majority, "majority_right": majority == truth,
        "any_right": any(right), **fields,
    }  # fmt: skip


@pytest.mark.parametrize("before, after, changes", [
    # 7 is right and counts 1, 5 is the most frequent wrong answer of both together and counts -1, the others
    # and no answer count 0. Changes: 0, -1 -> 1 rise, -1 -> 0 rise, 0 -> -1 fall, 0 -> 1 rise, 0
    (["7", "5", "5", "1", None, "5"], ["7", "7", "1", "5", "7", "5"], (3, 1)),
    (["0.5", "1/2", "3", "3"], ["7", "7", "7", "3"], (3, 0)),  # a rival is one answer however it is spelled
])  # fmt: skip
def test_lead_changes_by_hand(before, after, changes):
    assert ledger.lead_changes(record(before), record(after)) == changes


@pytest.mark.parametrize(
    "rises, falls, expected",
    # 2/2^6 = .031, 2 (1 + 8)/2^8 = .070
    [(5, 0, 0), (6, 0, 1), (0, 6, -1), (7, 1, 0), (8, 1, 1), (0, 0, 0), (9, 9, 0)],
)
def test_sign_test_by_hand(rises, falls, expected):
    assert ledger.direction(rises, falls) == expected


def test_false_alarms_by_hand():
    assert [ledger.false_alarms(changes) for changes in (5, 6, 9)] == [0, 1 / 64, 10 / 512]


@pytest.mark.parametrize(
    "before, after, expected",
    [
        (["5"] * 9 + ["7"], ["7"] * 9 + ["5"], "learned"),
        (["7"] * 9 + ["5"], ["5"] * 9 + ["7"], "corrupted"),
        (["7"] * 6 + ["5"] * 4, ["7"] * 4 + ["5"] * 6, "unsure"),  # two samples tipped the vote
        # as often right, but outvoted
        (["7"] * 3 + [str(i) for i in range(10, 20)], ["7"] * 3 + ["5"] * 10, "corrupted"),
        (["7"] * 6 + ["5"] * 8, ["7"] * 6 + ["7"] * 8, "learned"),
        (["7"] * 7 + [None] * 6, ["7"] * 13, "sharpened"),
        (["7"] * 13, ["7"] * 7 + [None] * 6, "weakened"),
        (["7"] * 9, ["7"] * 8 + ["5"], "still right"),
        (["5"] * 9, ["5"] * 9, "still wrong"),
    ],
)
def test_fates_by_hand(before, after, expected):
    size = min(len(before), len(after))
    assert ledger.fate(record(before[:size]), record(after[:size])) == expected


def test_chance_alone_claims_no_more_than_the_table_says():
    """Two independent evaluations of policies that did not change: 3,000 questions, 32 samples."""
    chance = random.Random(0)

    def evaluation(p, q):
        return record([chance.choices(["7", "5", "1"], [p, q, 1 - p - q])[0] for _ in range(32)])

    pairs = []
    for _ in range(3000):
        p, q = chance.choice([(0.4, 0.4), (0.3, 0.6), (0.7, 0.2), (0.05, 0.9)])
        pairs.append((evaluation(p, q), evaluation(p, q)))
    rows = ledger.ledger([b for b, _ in pairs], [a for _, a in pairs])
    fates = [row["fate"] for row in rows]
    claimed = [
        fates.count(a) + fates.count(b) for a, b in (("learned", "sharpened"), ("corrupted", "weakened"))
    ]
    expected = sum(row["false_alarms"] for row in rows)
    assert 20 < expected < 0.025 * 3000  # of rises; the old ledger claimed most of the 3,000
    assert all(count < expected + 3 * expected**0.5 for count in claimed) and min(claimed) > 5


def test_weights_that_do_not_move_change_nothing(few_questions, tmp_path):
    """With a learning rate too small to move a weight the real program responds the same before and after."""
    still = ["--lr", "1e-30", "--weight-decay", "0", "--eval-samples", "8"]
    printed = program("--data", few_questions, "--out", tmp_path / "run", *SMALL, *still).stdout
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert set(summary["change"].values()) == {0.0} and summary["before"] == summary["after"]
    assert (
        summary["ledger"]["still right"] + summary["ledger"]["still wrong"] == 6
        and summary["expected_by_chance"] == 0
    )
    assert "+0.000 ± 0.000" in printed


def test_the_error_of_a_change_is_that_of_the_pairs():
    """Questions of 0.1 and 0.9 that both rise by 0.1 or so: the change is sure, the two means are not."""
    before, after = [{"pass@1": 0.1}, {"pass@1": 0.9}], [{"pass@1": 0.2}, {"pass@1": 0.98}]
    change = ledger.paired_changes(before, after, {"pass@1": "pass@1", "maj@4": "majority_right"})
    assert change == {"pass@1": pytest.approx(0.09), "pass@1_se": pytest.approx(0.01)}
    assert metrics.standard_error([0.1, 0.9]) == pytest.approx(0.4)


def test_the_best_evaluation_of_a_policy_that_never_changes_is_no_better_than_it_is():
    """AIME's 30 questions, 16 samples each, 161 evaluations, a true pass@1 of 0.1.

    The largest mean of a run is about 0.13, but the pass@1 reported for the best evaluation is about 0.1.
    """
    chance = random.Random(0)
    largest, reported = [], []
    for _ in range(8):  # runs
        best, means = None, []
        for step in range(161):
            right = [[float(chance.random() < 0.1) for _ in range(16)] for _ in range(30)]
            means.append(metrics.mean(map(metrics.mean, right)))
            best = ledger.better(best, step, [{"truth": "7", "right": row} for row in right])
        largest.append(max(means))
        reported.append(best["pass@1"])
    assert metrics.mean(largest) > 0.125 and abs(metrics.mean(reported) - 0.1) < 0.02


@pytest.mark.parametrize("row", [{"truth": None}, {"truth": "7", "right": [1.0]}])
def test_there_is_no_best_without_answers_or_with_one_sample(row):
    assert ledger.better(None, 0, [row]) is None


@pytest.mark.parametrize("right, step", [
    ([[0.7, 0.7], [0.8, 0.8], [0.6, 0.6], [0.6, 0.6]], 5),
    ([[0.7, 0.7], [0.6, 0.6], [0.8, 0.8], [0.6, 0.6]], None),  # one pass may be noise
    ([[0.7, 0.7], [0.66, 0.66], [0.66, 0.66]], None),  # and so may a vote or two
    ([[0.9, 0.5], [0.6, 0.6], [0.5, 0.7], [0.5]], 3),  # a pass that is not over does not count
    ([[0.9, 0.5], [0.8, 0.8], [0.6, 0.6], [0.5]], None),
    ([[0.7, 0.7], [0.1, 0.1], [0.1, 0.1], [0.7, 0.7]], None),  # it came back
    ([], None),
])  # fmt: skip
def test_the_collapse_step_by_hand(right, step):
    shares = [(epoch, share) for epoch, of_pass in enumerate(right, 1) for share in of_pass]
    lines = [{"step": i, "epoch": e, "train/label_accuracy": share} for i, (e, share) in enumerate(shares, 1)]
    assert ledger.collapse_step([{"step": 0, "epoch": 0}, *lines]) == step
    assert ledger.collapse_step([{"step": i, "epoch": e} for i, (e, _) in enumerate(shares, 1)]) is None
