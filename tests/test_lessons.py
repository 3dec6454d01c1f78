"""The first lesson against the real functions, lessons 2 to 6, and the pictures of docs/figures.py."""

import math
import re

import pytest
import torch
from conftest import ROOT, program
from safetensors.torch import load_file

import ttrl
from exercises import first_lesson, lessons
from kernels.logprob import linear_logprob
from model import Transformer
from rollout import generate
from support.pretrained import hf_tensors
from support.prompts import encode_prompt, load_tokenizer

FOLDER = ROOT / "tiny" / "model"
PROMPTS = ["4+8+5=?", "What is 9+7+6?"]
OPTIONS = dict(max_new_tokens=32, eos_ids=[328, 330], seed=0, stream="train", step=1)


@pytest.fixture(scope="module")
def policy():
    return Transformer.from_pretrained(FOLDER)


@pytest.fixture
def weights():
    return {name: w.requires_grad_() for name, w in load_file(FOLDER / "model.safetensors").items()}


@pytest.fixture(scope="module")
def prompts():
    tokenizer, _ = load_tokenizer(FOLDER)
    return [encode_prompt(tokenizer, text) for text in PROMPTS]


@pytest.fixture(scope="module")
def rollout(policy, prompts):
    return generate(policy, prompts, lessons.VOTES, **OPTIONS)


def test_forward(weights, policy, prompts):
    tokens = torch.tensor([prompts[0], prompts[0][::-1]])
    assert torch.allclose(first_lesson.forward(weights, tokens), policy.logits(tokens), atol=1e-4)


def test_padding_on_the_right_changes_nothing_before_it(weights, prompts):
    alone = torch.tensor(prompts[:1])
    padded = torch.nn.functional.pad(alone, (0, 5))
    ours = first_lesson.forward(weights, padded)[:, :-5]
    assert torch.allclose(ours, first_lesson.forward(weights, alone), atol=1e-5)


def test_sampling_gives_the_tokens_of_generate(weights, prompts, rollout, monkeypatch):
    """32 rows; some end with an end token, none at the same place as all the others."""
    monkeypatch.setattr(lessons, "MAX_NEW_TOKENS", OPTIONS["max_new_tokens"])
    for i, prompt in enumerate(prompts):
        uniform = lessons.numbers(i, OPTIONS)
        tokens, length, logprob = first_lesson.sample(weights, prompt, uniform, OPTIONS["eos_ids"])
        rows = rollout[rollout.question == i]
        assert length.tolist() == rows.response_length.tolist() and len(set(length.tolist())) > 1
        for row, n in enumerate(length.tolist()):
            assert tokens[row, :n].tolist() == rows.response(row)
            assert torch.allclose(logprob[row, :n], rows.logprob[row, :n], atol=1e-4)


def test_a_number_that_no_running_sum_exceeds_gives_the_last_token(weights, prompts):
    """Rounding may leave the sum of all probabilities below a number near 1."""
    tokens, _, _ = first_lesson.sample(weights, prompts[0], torch.full((1, 3), 1.5), [330])
    assert tokens.tolist() == [[330]] * 3


def test_vote():
    for answers in (["4", None, "7", "4"], ["7", "4", "4", "7"], [None, None, "9"], [None, None]):
        assert first_lesson.vote(answers) == ttrl.vote(answers)[0]


@pytest.mark.parametrize("rewards", [[1.0, 0, 0, 0], [1.0, 1, 0], [1.0, 1, 1], [0.0, 0.0]])
def test_advantages(rewards):
    rewards = torch.tensor(rewards)
    assert torch.equal(first_lesson.advantages(rewards), ttrl.advantages(rewards[None])[0])


def test_loss_and_its_gradient():
    """Ratios from e^-1 to e: both sides of both clips. The real one bounds the objective below besides."""
    old, advantage = torch.zeros(2, 9), torch.tensor([[1.5], [-0.5]])
    mask = torch.arange(9) < torch.tensor([[9], [7]])
    results = []
    for loss_of in (first_lesson.loss_of, lambda *x: ttrl.grpo_loss(*x, dual_clip=math.inf)[0]):
        logprob = torch.linspace(-1, 1, 9).repeat(2, 1).requires_grad_()
        loss = loss_of(logprob, old, advantage, mask)
        loss.backward()
        results.append((loss.detach(), logprob.grad))
    (loss, gradient), (real_loss, real_gradient) = results
    assert torch.allclose(loss, real_loss) and torch.allclose(gradient, real_gradient)
    assert gradient.any() and (gradient == 0).any()


def test_the_gradient_of_an_update(weights, policy, prompts, rollout):
    """With plain gradient descent at rate 1 the weights move by the gradient, which is the real learner's."""
    rows = rollout[rollout.question == 0]
    rewards = torch.tensor([1.0, 0, 0, 1] * (lessons.VOTES // 4))
    old, start, width = rows.logprob - 0.1, len(prompts[0]), int(rows.response_length.max())
    before = {name: w.detach().clone() for name, w in weights.items()}
    responses = rows.tokens[:, start : start + width]
    descent = torch.optim.SGD(weights.values(), lr=1.0)
    first_lesson.learn(weights, descent, prompts[0], responses, rows.response_length, old[:, :width], rewards)

    logprob, _ = policy(rows)
    advantage = ttrl.advantages(rewards[None])[0][:, None]
    loss, _ = ttrl.grpo_loss(logprob, old[:, : logprob.shape[1]], advantage, rows.mask())
    names, parameters = zip(*policy.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    for name, gradient in hf_tensors(policy.config, gradients).items():
        moved = before[name] - weights[name].detach()
        assert gradient.any() and lessons.close(moved, gradient, 1e-5), name


def test_the_first_lesson_runs(monkeypatch, capsys):
    for name, value in dict(QUESTIONS=2, VOTES=4, TRAINED=4, STEPS=1, MAX_NEW_TOKENS=40, LR=1e-3).items():
        monkeypatch.setattr(first_lesson, name, value)
    first_lesson.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["truth", "25", "25", "mean"]
    assert [line.split()[:2] for line in lines[2:]] == [["step", "0"], ["step", "1"]]


def test_the_first_lesson_is_short():
    lines = (ROOT / "exercises" / "first_lesson.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 160


def test_lessons_2_to_5_find_the_same_numbers(monkeypatch, capsys, weights, policy, prompts):
    """The script's own assertions, on few and short responses; and that a wrong number would stop it."""
    monkeypatch.setattr(lessons, "VOTES", 4)
    monkeypatch.setattr(lessons, "MAX_NEW_TOKENS", 16)
    rollout = lessons.lesson_2_and_3(weights, policy, prompts, OPTIONS["eos_ids"])
    lessons.lesson_5(weights, policy, prompts, rollout)
    monkeypatch.setattr(lessons, "HEADS_OF_MODELS", {"331 words": (64, 32, 331)})
    lessons.lesson_4()
    shown = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines()]
    assert [lesson.strip() for lesson, _ in shown] == ["2", "3", "5", "4"]
    monkeypatch.setattr(lessons, "linear_logprob", lambda *x: linear_logprob(*x, temperature=1.01))
    with pytest.raises(AssertionError, match="differs"):
        lessons.lesson_4()


@pytest.mark.long
def test_lesson_6(monkeypatch, capsys):
    lessons.lesson_6([{"prompt": prompt} for prompt in PROMPTS])
    assert "two ranks" in capsys.readouterr().out


def test_memory_is_counted_while_it_is_held():
    """4,000 bytes, let go before the next 4,000; neither a view nor what is done in place takes more."""

    def one_by_one():
        for _ in range(3):
            torch.ones(1000).view(10, 100).add_(1).sum()

    assert 4000 <= lessons.measure(one_by_one).bytes < 4100
    assert lessons.measure(lambda: [torch.ones(1000) for _ in range(3)]).bytes == 12_000


# ----------------------------------------------------------------------------------------------------------
# the pictures


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    import figures

    return figures


def test_the_mask_in_the_picture_is_causal_within_a_row(figures):
    batch, letters = figures.packed_example()
    seen = [
        "".join(letters[batch.tokens[key]] for key in row.nonzero()[:, 0]) for row in figures.who_sees(batch)
    ]
    assert seen == ["a", "ab", "abc", "abcd", "abcf", "abcfg"]


def test_the_pictures_can_be_drawn(figures, policy, prompts, tmp_path, capsys):
    options = {**OPTIONS, "stream": "eval"}
    figures.save(figures.draw_shapes(), tmp_path / "shapes.png")
    figures.save(figures.draw_packing(), tmp_path / "packing.png")
    figures.save(figures.draw_refill(policy, prompts, options, slots=2, votes=2), tmp_path / "refill.png")
    assert all(path.stat().st_size > 10_000 for path in tmp_path.iterdir())
    batches, refilled = map(
        int, re.findall(r"refill: (\d+) steps in batches, (\d+)", capsys.readouterr().out)[0]
    )
    assert refilled <= batches
    assert all((ROOT / "docs" / path.name).exists() for path in tmp_path.iterdir())


@pytest.mark.long
def test_the_numbers_under_the_pictures(tmp_path):
    printed = program("--out", tmp_path, script="docs/figures.py").stdout
    for name, page in (("majority", "theory.md"), ("refill", "lessons.md")):
        text = " ".join((ROOT / "docs" / page).read_text(encoding="utf-8").split())
        lines = re.findall(rf"^{name}: (.*)", printed, re.MULTILINE)
        assert lines and [line for line in lines if line not in text] == []
