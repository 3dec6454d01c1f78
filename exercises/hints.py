"""Known mistakes of each exercise: a sentence that names the concept, and the symptom that shows the mistake.

A symptom is tested only after the real tests have failed, with the student's functions swapped in. It is true
if they return exactly what a function with this one misunderstanding would; the numbers are worked out by
hand. A symptom that raises is not there.
"""

import math
from types import SimpleNamespace
from unittest import mock

import torch

import ttrl
from kernels import kv_cache, logprob, sampler
from kernels.packing import AttentionGroup
from report import metrics


def recognised(name):
    """The sentences of the first two mistakes that the functions in use make."""
    return [sentence for sentence, symptom in MISTAKES[name].items() if holds(symptom)][:2]


def holds(symptom):
    try:
        return bool(symptom())
    except Exception:  # a student's function may fail in any way, and the test has said how
        return False


def close(x, expected):
    """Are numbers, in whatever form, the expected ones?"""
    x = torch.as_tensor(x, dtype=torch.float64).flatten()
    expected = torch.as_tensor(expected, dtype=torch.float64).flatten()
    return x.shape == expected.shape and torch.allclose(x, expected, atol=1e-3)


def raises(function, *arguments):
    try:
        function(*arguments)
    except Exception:
        return True
    return False


# ----------------------------------------------------------------------------------------------------------
# the students' functions on small inputs: vote, advantages, loss


def vote(*answers, kind="math"):
    return ttrl.vote(list(answers), kind)


def advantages(*rows):
    return ttrl.advantages(torch.tensor(rows))


def one_reward_fails():
    return raises(advantages, [1.0]) or advantages([1.0]).isnan().item()


def loss(logprob, advantage, mask=None, **options):
    """The loss of rows of log-probabilities under old ones of 0, with one advantage for each row."""
    logprob, advantage = torch.tensor(logprob), torch.tensor(advantage)[:, None]
    mask = logprob == logprob if mask is None else torch.tensor(mask)
    return ttrl.grpo_loss(logprob, torch.zeros_like(logprob), advantage, mask, **options)[0].item()


def loss_of_rows():
    """Ratios of 1. Row 1 has one token of advantage 3, row 2 three of advantage -1; then there is padding."""
    return loss([[0.0] * 5] * 2, [3.0, -1.0], [[True] + [False] * 4, [True] * 3 + [False] * 2])


def kl():
    """The KL for log p = 0 and log p_ref = 0.7."""
    return loss([[0.0]], [0.0], ref_logprob=torch.tensor([[0.7]]), kl=1.0)


def small_kls():
    """Both sums for d = 1e-4, which are d^2/2 = 5e-9."""
    d, zero = torch.tensor([[1e-4]]), torch.zeros(1, 1)
    _, sums = ttrl.grpo_loss(d, zero, zero, zero == 0, ref_logprob=2 * d, kl=1.0)
    return [abs(sums[name].item()) for name in ("kl", "kl_old_new")]


def all_is_finite_beside_a_masked_infinity():
    new = torch.tensor([[0.1, -math.inf]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    value, sums = ttrl.grpo_loss(new, torch.zeros(1, 2), torch.ones(1, 1), mask)
    value.backward()
    return all(x.isfinite().all() for x in (new.grad, *sums.values()))


# ----------------------------------------------------------------------------------------------------------
# attention


def cache(window=None):
    """A cache of two slots and six places with one head of width 2; all values are still 100."""
    config = SimpleNamespace(windows=(window,), head_dim=2, kv_heads=1, layers=1)
    model = SimpleNamespace(config=config, embed_tokens=SimpleNamespace(weight=torch.zeros(1)))
    made = kv_cache.KVCache(model, 2, 6)
    made.k.fill_(0), made.v.fill_(100)
    return made


def attended(*positions, window=None):
    """A step of rows at these positions. The scores are equal, so it gives the mean of the values seen.

    The token at place t has the value t + 1, the new one too.
    """
    made = cache(window)
    for row, position in enumerate(positions):
        made.v[0, row, :, :position] = torch.arange(1.0, position + 1)[:, None]
    made.open_step(torch.tensor(positions), 6)
    value = torch.tensor(positions)[:, None, None].expand(-1, 1, 2) + 1.0
    zero = torch.zeros(len(positions), 1, 2)
    return made.attend_cached(0, zero, zero, value)[:, 0, 0]


def stored():
    """The key and value that a step at position 2 stores there, all of them 1."""
    made, one = cache(), torch.ones(1, 1, 2)
    made.open_step(torch.tensor([2]), 3)
    made.attend_cached(0, 0 * one, one, one)
    return torch.stack((made.k[0, 0, 0, 2], made.v[0, 0, 0, 2]))


def learner_mask(window=None):
    """The mask of a row with two queries behind a prompt of three keys, as two words of 0 and 1."""
    group = AttentionGroup(
        torch.tensor([[3, 4]]), torch.tensor([2]), torch.arange(5)[None], torch.tensor([3])
    )
    seen = group.mask(window).expand(1, 1, 2, 5)[0, 0].int().tolist()
    return " ".join("".join(map(str, row)) for row in seen)


# ----------------------------------------------------------------------------------------------------------
# sampling


def uniform(key, position=0):
    return sampler.uniform(torch.tensor([key]), torch.tensor([position])).item()


def many_uniform():
    return sampler.uniform(torch.arange(256), torch.zeros(256, dtype=torch.int64))


def place(mass, target):
    return sampler.inverse_cdf(torch.tensor([mass]), torch.tensor([target]))[0].item()


def sampled(logits, u, *options):
    """(token, log-probability)."""
    token, value = sampler.sample_inverse_cdf(torch.tensor([logits]), torch.tensor([u]), *options)
    return token.item(), value.item()


def log_softmax(*logits):
    """The log-probability of the first of some logits."""
    return math.log(math.exp(logits[0]) / sum(map(math.exp, logits)))


# ----------------------------------------------------------------------------------------------------------
# log-probabilities in tiles: logits 0 1 2 3 and target 1, in tiles of two unless said otherwise


def tiled(temperature=1.0, tile=2, grads=(1.0, None), scale=1.0):
    """(log-probability, entropy, gradient of the logits), where the loss weighs the first two by `grads`."""
    h, w = torch.ones(1, 1, requires_grad=True), torch.arange(4.0)[:, None] * scale
    w.requires_grad_()
    with mock.patch.object(logprob, "TILE", {"cpu": (1, tile)}):
        outputs = logprob.linear_logprob(h, w, torch.tensor([1]), temperature)
        sum(g * output.sum() for g, output in zip(grads, outputs, strict=True) if g is not None).backward()
    return outputs[0].item(), outputs[1].item(), w.grad[:, 0]


def exact(temperature=1.0):
    """(log p of all four, entropy)."""
    logp = (torch.arange(4, dtype=torch.float64) / temperature).log_softmax(0)
    return logp, -(logp.exp() * logp).sum()


def forward_is_right(temperature=1.0, tile=2):
    logp, entropy = exact(temperature)
    return close(tiled(temperature, tile)[:2], [logp[1], entropy])


def gradient_is(of_target, of_p, temperature=1.0, tile=2):
    """Is the gradient of the log-probability of_target [j == y] - of_p p_j, and the forward pass right?"""
    expected = of_target * torch.eye(4)[1] - of_p * exact(temperature)[0].exp()
    ways = (tiled(temperature, tile, grads)[2] for grads in ((1.0, None), (1.0, 0.0)))  # through the code
    return forward_is_right(temperature) and any(close(way, expected) for way in ways)


def entropy_gradient_without_h():
    logp, _ = exact()
    return close(tiled(grads=(None, 1.0))[2], -logp.exp() * logp)


# ----------------------------------------------------------------------------------------------------------
# the kernel: a token with logits 0 -1 -2 ... times scale, and target 1


def kernel(vocabulary, width, pieces=1, scale=1.0, temperature=1.0):
    """The four sums of each piece, [4, pieces]."""
    from kernels import logprob_triton  # Triton exists for Linux only

    weight = -torch.arange(float(vocabulary))[:, None].expand(-1, width) * scale / width
    with mock.patch.object(logprob_triton, "programs_wanted", lambda device: pieces):
        sums = logprob_triton.partials_triton(torch.ones(1, width), weight, torch.tensor([1]), temperature)
    return sums[:, :, 0]


def exact_sums(vocabulary, scale=1.0):
    """The four sums of one piece; those of rising logits, if scale is negative."""
    z = -torch.arange(vocabulary, dtype=torch.float64) * scale
    c = z - z.max()
    return torch.stack((z.max(), c.exp().sum(), (c.exp() * c).sum(), z[1]))


def kernel_is_right(vocabulary=64, width=16, scale=1.0):
    return close(kernel(vocabulary, width, scale=scale), exact_sums(vocabulary, scale))


# ----------------------------------------------------------------------------------------------------------
# lucky hit


def accuracy():
    """Of answers 4 4 4 7 7 9 none 5 with truth 7: 3/8."""
    return metrics.reward_accuracy([0.0, 0, 0, 1, 1, 0, 0, 0], [0, 1, 2])


# ----------------------------------------------------------------------------------------------------------
# {exercise: {sentence: symptom}}

MISTAKES = {
"vote": {
    "A response without an answer (None) never votes: it is in no class.":
        lambda: vote(None, None, "2")[0] is None or any(0 in members for members in vote(None, "2")[1]),
    "Answers are counted by value, not by spelling: 1/2 and 0.5 are one candidate.":
        lambda: vote("3", "3", "1/2", "0.5", "\\frac{1}{2}")[0] == "3",
    "A tie goes to the class that was seen first.":
        lambda: vote("4", "3", "3", "4")[0] == "3",
    "The label is the most frequent spelling in the largest class, not the spelling of its first member.":
        lambda: vote("0.5", "1/2", "1/2")[0] == "0.5",
    "The classes are in the order of their first members, not by size.":
        lambda: [len(members) for members in vote("4", "3", "3")[1]] == [2, 1],
    "If there are no answers at all, the label is None and there are no classes.":
        lambda: (raises(vote) or raises(vote, None)) and not raises(vote, "4"),
    "The kind decides what is equal: pass it to grading.same_answer.":
        lambda: len(vote("B", "b", kind="choice")[1]) == 2,
},
"advantages": {
    "The standard deviation has ddof 1: divide by M - 1, not M (rewards 1 1 0 0 give 0.5774).":
        lambda: close(advantages([1.0, 1.0, 0.0, 0.0]), [1, 1, -1, -1]),
    "A group is one row: mean and standard deviation are those of each row, not of all rows.":
        lambda: not close(advantages([1.0, 1.0, 0.0, 0.0], [0.0] * 4)[0], advantages([1.0, 1.0, 0.0, 0.0])),
    "The baseline is missing: subtract the mean of the row.":
        lambda: advantages([1.0, 1.0, 0.0, 0.0]).min() >= 0,
    "Divide by the standard deviation of the row.":
        lambda: close(advantages([1.0, 1.0, 0.0, 0.0]), [0.5, 0.5, -0.5, -0.5]),
    "Divide by the standard deviation, not by its square, the variance.":
        lambda: close(advantages([1.0, 1.0, 0.0, 0.0]), [1.5, 1.5, -1.5, -1.5]),
    "A row of equal rewards has advantage exactly 0: the mean may differ from them in its last bit.":
        lambda: 0 < advantages([0.1] * 7).abs().max() < 0.1,
    "A row of equal rewards has standard deviation 0: add 1e-6 before you divide.":
        lambda: advantages([1.0, 1.0, 1.0]).isnan().any(),
    "A row of one reward has no standard deviation with ddof 1: its advantage is 0.":
        lambda: advantages([1.0, 0.0]).isfinite().all() and one_reward_fails(),
},
"loss": {
    "The loss is a mean over tokens, not a mean over rows of their means: every token counts alike.":
        lambda: close(loss_of_rows(), -1.0),  # (-3/1 + 3/3) / 2 instead of (-3 + 3) / 4
    "The loss is divided by the number of response tokens, not by the rows.":
        lambda: close(loss([[0.0, 0.0, 0.0]], [1.0]), -3.0),
    "Padding is counted: divide by the number of tokens that the mask marks, not by all places.":
        lambda: close(loss([[0.0, 0.0]], [1.0], [[True, False]]), -0.5),
    "token_count is ignored: divide the sum by it if it is given.":
        lambda: close(loss([[0.0]], [1.0], token_count=4), -1.0),
    "The sign is wrong: an optimizer descends, so the loss is minus the objective.":
        lambda: close(loss([[0.0]], [1.0]), 1.0),
    "The surrogate is the minimum of clipped and unclipped, not the maximum.":
        lambda: close(loss([[1.0]], [1.0]), -math.e) and close(loss([[-1.0]], [1.0]), -0.8),
    "The ratio is not clipped: above 1 + clip a good token gains nothing more.":
        lambda: close(loss([[1.0]], [1.0]), -math.e),
    "The ratio is not clipped from below: below 1 - clip a bad token loses nothing more.":
        lambda: close(loss([[-1.0]], [-1.0]), math.exp(-1)),
    "Only the clipped term is used: the objective is the minimum of clipped and unclipped.":
        lambda: close(loss([[-1.0]], [1.0]), -0.8),  # e^-1 = 0.37 is below 0.8, and the minimum keeps it
    "The dual clip is missing: for a negative advantage A the objective is at least 3 A.":
        lambda: close(loss([[3.0]], [-1.0]), math.exp(3)),
    "The dual clip is for negative advantages only.":
        lambda: close(loss([[0.0]], [1.0]), -3.0) or close(loss([[-3.0]], [1.0]), -3.0),
    "The KL has the wrong direction: k3 is exp(d) - d - 1 with d = ref - new.":
        lambda: close(kl(), math.exp(-0.7) + 0.7 - 1),
    "The KL is the estimator k3, exp(d) - d - 1, not the difference d itself.":
        lambda: close(abs(kl()), 0.7),
    "For a small d, exp(d) - d - 1 is d^2/2, which fp32 loses beside exp(d): torch.expm1(d) - d keeps it. "
    "The same holds for kl_old_new.":
        lambda: any(1e-9 < abs(value - 5e-9) < 1e-6 for value in small_kls()),
    "A masked token may hold anything, even infinity: 0 x inf is NaN, so select with torch.where instead of "
    "multiplying by the mask.":
        lambda: not math.isfinite(loss([[0.0, math.inf]], [1.0], [[True, False]])),
    "A masked token makes the gradient or a reported sum NaN: select the log-ratio with torch.where before "
    "exp(), not only after it.":
        lambda: not all_is_finite_beside_a_masked_infinity(),
    "exp() overflows above 88 in fp32: bound the log-ratio before it, for example at 20.":
        lambda: not math.isfinite(loss([[200.0]], [0.0])),
},
"attention": {
    "The step does not store its own key and value at its position in the cache.":
        lambda: not close(stored(), torch.ones(4)),
    "A query sees places behind its own position, which hold nothing or what another row left there: mask "
    "every place above the position.":
        lambda: attended(2).item() > 10,
    "A token has to see itself too: its own key is among those that it attends to.":
        lambda: close(attended(3), 2.0),  # (1 + 2 + 3) / 3 instead of (1 + 2 + 3 + 4) / 4
    "Each row has a position of its own, so the mask has to be made row by row.":
        lambda: not close(attended(1, 3), [1.5, 2.5]) and close(attended(3), 2.5),
    "The cached step ignores the sliding window.":
        lambda: close(attended(4, window=2), 3.0),
    "The window counts the token itself: with window 2 it sees itself and one more.":
        lambda: close(attended(4, window=2), 4.0) or close(attended(4, window=2), 5.0),
    "The learner's mask ignores the offset: the queries of a response come after offset keys of its prompt.":
        lambda: learner_mask() == "10000 11000",
    "The learner's mask is not causal: a query sees keys behind itself.":
        lambda: learner_mask()[4] == "1",
    "In the learner's mask a token has to see itself too.":
        lambda: learner_mask() == "11100 11110",
    "The learner's mask has a wrong window: with window w a query sees itself and the w - 1 keys before it.":
        lambda: learner_mask() == "11110 11111" and learner_mask(2) != "00110 00011",
},
"sampling": {
    "The numbers come from a stream: they have to be a hash of key and position, so that a token is the same "
    "in any batch.":
        lambda: uniform(7) != uniform(7),
    "The position is ignored: each token of a response needs a number of its own.":
        lambda: uniform(7, 0) == uniform(7, 1),
    "The key is ignored: all rows would draw the same numbers.":
        lambda: uniform(7) == uniform(8),
    "Some numbers are negative or 0: a shift of an int64 copies the sign, so use logical_shift.":
        lambda: (many_uniform() <= 0).any(),
    "The numbers do not fill (0, 1).":
        lambda: many_uniform().max() < 0.6 or many_uniform().min() > 0.4,
    "A target that was rounded up to the total has to give the last index that has mass, never one of "
    "probability 0.":
        lambda: place([1.0, 2.0, 0.0], 3.0) != 1,
    "A target on an edge belongs to the next index: the running sum has to exceed the target (`>`, or "
    "searchsorted with right=True).":
        lambda: place([1.0, 2.0], 1.0) == 0 or place([0.0, 2.0], 0.0) == 0,
    "A token of probability 0 (logit -inf) is drawn at the edge of the range.":
        lambda: sampled([-math.inf, 0.0, -math.inf], 0.5 / 2**23)[0] != 1,
    "The temperature divides the logits.":
        lambda: close(sampled([1.0, 0.0], 0.1, 0.5)[1], log_softmax(0.5, 0.0)),
    "The log-probability is that of the distribution sampled from, which the temperature is part of.":
        lambda: close(sampled([1.0, 0.0], 0.1, 0.5)[1], log_softmax(1.0, 0.0)),
    "The log-probability is that of the distribution sampled from: top-p normalises the kept tokens anew.":
        lambda: close(sampled([3.0, 0.0], 0.1, 1.0, 0.9)[1], log_softmax(3.0, 0.0)),
    "The likeliest token is always taken: u decides nothing.":
        lambda: all(sampled([1.0, 0.9, 0.8], u)[0] == 0 for u in (0.1, 0.5, 0.9)),
},
"logprob": {
    "exp() overflows for large logits: subtract the largest one first.":
        lambda: not all(math.isfinite(x) for x in tiled(scale=100.0)[:2]),
    "The temperature is forgotten: the softmax is of logits / temperature.":
        lambda: close(tiled(0.5)[0], exact()[0][1]),
    "The entropy is wrong where pieces are merged: under a higher maximum every c shifts, so sum_exp_c "
    "changes by shift * sum_exp before it is scaled.":
        lambda: close(tiled()[0], exact()[0][1]) and not close(tiled()[1], exact()[1]),
    "One tile is right, two are not: bring the sums under the old maximum to the new one before you add them "
    "(online softmax).":
        lambda: forward_is_right(tile=4) and not forward_is_right(tile=2),
    "The gradient has to be divided by the temperature too (chain rule).":  # one of its two terms, or both
        lambda: any(gradient_is(*factors, temperature=0.5) for factors in ((1, 1), (2, 1), (1, 2))),
    "The gradient lacks the target's term: d logprob / d z_j = [j == y] - p_j.":
        lambda: gradient_is(0, 1),
    "The target's term of the gradient belongs to the one tile that contains the target: `locate` says "
    "whether it is inside.":
        lambda: gradient_is(1, 1, tile=4) and not gradient_is(1, 1, tile=2),
    "The entropy's gradient is -p (log p + H): H is missing.":
        lambda: forward_is_right() and entropy_gradient_without_h(),
},
"kernel": {
    "Columns past the end of the vocabulary count: the value that replaces a masked load gives the logit 0, "
    "so set these logits to -1e30 before the maximum.":
        lambda: kernel_is_right() and not kernel_is_right(vocabulary=5),
    "Numbers past the end of the width count: mask the loads of both factors with other=0.":
        lambda: kernel_is_right() and not kernel_is_right(width=7),
    "The product has to run over the whole width, BD numbers at a time.":
        lambda: kernel_is_right() and not kernel_is_right(width=32),
    "When a later block raises the maximum, the old sums have to be rescaled to it (online softmax): "
    "multiply by exp(shift), after sum_exp_c has grown by shift * sum_exp.":
        lambda: kernel_is_right(192, scale=0.01) and not close(
            kernel(192, 16, scale=-0.01)[:3], exact_sums(192, -0.01)[:3]),
    "Program (block, piece) has to run through its own piece only, the `size` columns from "
    "program_id(1) * size on.":
        lambda: kernel_is_right(192, scale=0.01) and not close(
            kernel(192, 16, pieces=3, scale=0.01)[0], [0.0, -0.64, -1.28]),
    "The exponents are (logit - maximum) * inverse_temperature.":
        lambda: kernel_is_right() and close(kernel(64, 16, temperature=0.5)[1], exact_sums(64)[1]),
},
"lucky": {
    "That is the label accuracy, whether the label is right. Reward accuracy asks each response whether its "
    "reward is right.":
        lambda: close(accuracy(), 0.0),
    "That is the share of right responses. A wrong response that the vote does not reward also has the right "
    "reward, 0.":
        lambda: close(accuracy(), 2 / 8),
    "That is the share of responses in the majority: compare each reward with the one that the truth would "
    "give.":
        lambda: close(accuracy(), 3 / 8) and close(metrics.reward_accuracy([1.0, 1, 0, 0], [0]), 1 / 4),
    "That is the share of wrong rewards: count those that agree.":
        lambda: close(accuracy(), 5 / 8),
},
}  # fmt: skip
