"""A solution of the ninth exercise: tests that pass on the project and fail on every planted bug.

Not collected by pytest; tests/test_exercises.py hands it to the check as a student's test_student.py.
"""

import math

import pytest
import torch

import ttrl
from kernels import logprob
from kernels.packing import AttentionGroup, padded_tokens
from kernels.sampler import inverse_cdf, uniform
from rollout import Rollout


def test_vote():
    assert ttrl.vote([None, None, "2"]) == ("2", [[2]])
    assert ttrl.vote(["3", "1/2", "0.5", "1/2"]) == ("1/2", [[0], [1, 2, 3]])
    assert ttrl.vote(["0.5", "1/2", "1/2"])[0] == "1/2"
    assert ttrl.vote(["4", "3", "3", "4"]) == ("4", [[0, 3], [1, 2]])
    assert ttrl.vote(["7", "\\frac{14}{2}", "8"]) == ("7", [[0, 1], [2]])
    assert ttrl.vote(["C", "B", "b"], "choice") == ("B", [[0], [1, 2]])
    assert ttrl.vote(["C", "B", "b"], "math")[1] == [[0], [1], [2]]
    assert len(ttrl.vote(["\\text{B}", "B"], "choice")[1]) == 1


def test_advantages():
    got = ttrl.advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]]))
    assert torch.allclose(got, torch.tensor([[1.5, -0.5, -0.5, -0.5], [0.0, 0.0, 0.0, 0.0]]), atol=1e-4)
    assert ttrl.advantages(torch.ones(2, 1)).eq(0).all()
    assert ttrl.advantages(torch.full((1, 7), 0.1)).eq(0).all()


def loss(logprob, advantage, **options):
    logprob = torch.tensor([logprob])
    mask = torch.ones_like(logprob, dtype=torch.bool)
    got, _ = ttrl.grpo_loss(logprob, torch.zeros_like(logprob), torch.tensor([[advantage]]), mask, **options)
    return got.item()


def test_loss():
    assert loss([0.0, 0.0], 1.0) == pytest.approx(-1)
    assert loss([0.0, 0.0], 1.0, token_count=8) == pytest.approx(-0.25)
    assert loss([1.0], 1.0) == pytest.approx(-1.2)
    assert loss([-1.0], -1.0) == pytest.approx(0.8)
    assert loss([3.0], -1.0) == pytest.approx(3)
    ref = torch.tensor([[0.7]])
    assert loss([0.0], 0.0, ref_logprob=ref, kl=1.0) == pytest.approx(math.exp(0.7) - 1.7)
    assert math.isfinite(loss([200.0], 0.0))


def test_draw():
    epochs = [
        [i for step in (2 * e, 2 * e + 1) for i in ttrl.draw_questions(step, 5, 3, 0)] for e in range(6)
    ]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_sampler():
    numbers = uniform(torch.tensor([7, 7]), torch.tensor([0, 1]))
    assert numbers[0] != numbers[1]
    index, _ = inverse_cdf(torch.tensor([[1.0, 2.0, 0.0]] * 2), torch.tensor([1.0, 3.0]))
    assert index.tolist() == [1, 1]


@pytest.mark.parametrize("which", [0, 1])
def test_logprob(which, monkeypatch):
    monkeypatch.setattr(logprob, "TILE", {"cpu": (2, 3)})
    hidden, weight = torch.eye(3)[[0, 1]] * 2, torch.arange(21.0).view(7, 3).sin() * 3
    targets, gradients = torch.tensor([1, 6]), []
    for function in (logprob.linear_logprob, plain):
        h = hidden.clone().requires_grad_()
        value = function(h, weight, targets, 0.5)[which]
        value.sum().backward()
        gradients.append((value.detach(), h.grad))
    for got, expected in zip(*gradients, strict=True):
        assert torch.allclose(got, expected, atol=1e-4)


def plain(hidden, weight, targets, temperature):
    logp = (hidden @ weight.T / temperature).log_softmax(-1)
    return logp.gather(1, targets[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def test_mask():
    group = AttentionGroup(
        torch.tensor([[3, 4]]), torch.tensor([2]), torch.arange(5)[None], torch.tensor([3])
    )
    assert group.mask(None).int().tolist() == [[[[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]]]
    assert group.mask(2).int().tolist() == [[[[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]]]


def test_micro_batches_are_padded():
    zero, one = torch.zeros(2, dtype=torch.int64), torch.zeros(2, 1)
    rows = Rollout(zero, zero, zero + 4, torch.tensor([1, 9]), one, one, zero.bool())
    assert padded_tokens(rows, [0, 1]) == 4 + 2 * 9
