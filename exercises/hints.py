"""Known mistakes of each exercise, recognised by what a function returns: the concept in words.

A probe is called only where the real tests have failed, with the student's functions swapped in. It is true
if they do just what somebody's would who has misunderstood this one thing; numbers are worked out by hand. A
probe that raises recognises nothing.
"""

import math
from types import SimpleNamespace

import torch

NAN = float("nan")


def close(x, expected):
    """Are numbers, in whatever form, the expected ones?"""
    x = torch.as_tensor(x, dtype=torch.float64).flatten()
    expected = torch.tensor(expected, dtype=torch.float64).flatten()
    return x.shape == expected.shape and torch.allclose(x, expected, atol=1e-3, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------
# 1 vote


def vote(*answers, kind="math"):
    import ttrl

    return ttrl.vote(list(answers), kind)


def raises(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except Exception:
        return True
    return False


def none_votes():
    label, classes = vote(None, None, "2")
    return label is None or any(0 in members for members in classes)


def spelling_decides():
    return vote("3", "3", "1/2", "0.5", "\\frac{1}{2}")[0] == "3"


def last_of_equals():
    return vote("4", "3", "3", "4")[0] == "3"


def first_spelling():
    return vote("0.5", "1/2", "1/2")[0] == "0.5"


def classes_are_sorted():
    return [len(members) for members in vote("4", "3", "3")[1]] == [2, 1]


def no_answer_fails():
    return (raises(vote) or raises(vote, None)) and not raises(vote, "4")


def kind_is_ignored():
    return len(vote("B", "(B)", kind="choice")[1]) == 2


# ----------------------------------------------------------------------------------------------------------
# 2 advantages


def advantage_of(*rows):
    import ttrl

    return ttrl.advantages(torch.tensor(rows))


def ddof_0():
    return close(advantage_of([1.0, 1.0, 0.0, 0.0]), [1, 1, -1, -1])


def not_per_row():
    two = advantage_of([1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0])
    return bool(two.abs().max() > 0.1) and not two.isnan().any()


def mean_not_subtracted():
    return bool(advantage_of([1.0, 1.0, 0.0, 0.0]).min() >= 0)


def not_divided():
    return close(advantage_of([1.0, 1.0, 0.0, 0.0]), [0.5, 0.5, -0.5, -0.5])


def divided_by_the_variance():
    return close(advantage_of([1.0, 1.0, 0.0, 0.0]), [1.5, 1.5, -1.5, -1.5])


def unanimous_is_nan():
    return bool(advantage_of([1.0, 1.0, 1.0]).isnan().any())


def unanimous_by_rounding():
    got = advantage_of([0.1] * 7)  # whose mean in fp32 is not 0.1
    return bool(got.any()) and got.abs().max().item() < 0.1


def one_sample_is_nan():
    return raises(advantage_of, [1.0]) or bool(advantage_of([1.0]).isnan().any())


# ----------------------------------------------------------------------------------------------------------
# 3 loss


def loss_of(logprob, advantage, mask=None, **options):
    """The loss of rows of log-probabilities under old ones of 0, advantage a number per row."""
    import ttrl

    logprob = torch.tensor(logprob)
    mask = torch.ones_like(logprob, dtype=torch.bool) if mask is None else torch.tensor(mask)
    advantage = torch.tensor(advantage)[:, None]
    return ttrl.grpo_loss(logprob, torch.zeros_like(logprob), advantage, mask, **options)[0].item()


# Ratios of 1. Row 1 has one token of advantage 3, row 2 three of advantage -1; then two columns of padding.
RAGGED = ([[0.0] * 5] * 2, [3.0, -1.0], [[True] + [False] * 4, [True] * 3 + [False] * 2])


def mean_of_rows():
    return close(loss_of(*RAGGED), [-1.0])  # (-3/1 + 3/3) / 2 instead of (-3 + 3) / 4


def divided_by_the_rows():
    return close(loss_of([[0.0, 0.0, 0.0]], [1.0]), [-3.0])


def padding_counts():
    return close(loss_of([[0.0, 0.0]], [1.0], [[True, False]]), [-0.5])


def token_count_is_ignored():
    return close(loss_of([[0.0]], [1.0], token_count=4), [-1.0])


def sign_is_wrong():
    return close(loss_of([[0.0]], [1.0]), [1.0])


def not_clipped():
    return close(loss_of([[1.0]], [1.0]), [-math.e])


def clipped_only():
    return close(loss_of([[-1.0]], [1.0]), [-0.8])  # e^-1 = 0.37 is below 0.8, and the minimum keeps it


def maximum_taken():
    return close(loss_of([[1.0]], [1.0]), [-math.e]) and close(loss_of([[-1.0]], [1.0]), [-0.8])


def no_dual_clip():
    return close(loss_of([[3.0]], [-1.0]), [math.exp(3)])


def dual_clip_for_all():
    return close(loss_of([[0.0]], [1.0]), [-3.0]) or close(loss_of([[-3.0]], [1.0]), [-3.0])


def kl_of_new_minus_ref():
    d = -0.7
    ref = torch.tensor([[0.7]])
    return close(loss_of([[0.0]], [0.0], ref_logprob=ref, kl=1.0), [math.exp(d) - d - 1])


def kl_is_the_difference():
    ref = torch.tensor([[0.7]])
    return close(abs(loss_of([[0.0]], [0.0], ref_logprob=ref, kl=1.0)), [0.7])


def digits_of_the_kl_cancel():
    import ttrl

    d, zero = torch.tensor([[1e-4]]), torch.zeros(1, 1)  # d^2/2 is 5e-9
    _, sums = ttrl.grpo_loss(d, zero, zero, zero == 0, ref_logprob=2 * d, kl=1.0)
    return any(1e-9 < abs(sums[name].item() - 5e-9) < 1e-6 for name in ("kl", "kl_old_new"))


def masked_tokens_reach_the_sum():
    return not math.isfinite(loss_of([[0.0, math.inf]], [1.0], [[True, False]]))


def masked_gradient():
    import ttrl

    logprob = torch.tensor([[0.1, -math.inf]], requires_grad=True)
    mask = torch.tensor([[True, False]])
    loss, sums = ttrl.grpo_loss(logprob, torch.zeros(1, 2), torch.ones(1, 1), mask)
    loss.backward()
    return not logprob.grad.isfinite().all() or not all(value.isfinite() for value in sums.values())


def exponent_overflows():
    return not math.isfinite(loss_of([[200.0]], [0.0]))


# ----------------------------------------------------------------------------------------------------------
# 4 attention


def cache(windows=(None,)):
    """A cache of two slots and six places with one head of width 2; what is not filled yet is 100."""
    from rollout import KVCache

    config = SimpleNamespace(windows=windows, head_dim=2, kv_heads=1, layers=len(windows))
    made = KVCache(SimpleNamespace(config=config, embed_tokens=SimpleNamespace(weight=torch.zeros(1))), 2, 6)
    made.k.fill_(0), made.v.fill_(100)
    return made


def attended(position, window=None, context=6):
    """What equal scores give where the value of the token at place t is t + 1, a mean of those seen."""
    made = cache((window,))
    for row, place in enumerate(position):
        for t in range(place):
            made.v[0, row, :, t] = t + 1
    made.open_step(torch.tensor(position), context)
    value = torch.tensor(position).float()[:, None, None].expand(-1, 1, 2) + 1
    out = made.attend_cached(0, torch.zeros(len(position), 1, 2), torch.zeros(len(position), 1, 2), value)
    return out[:, 0, 0]


def later_places_are_seen():
    return bool((attended([2]) > 10).any())


def own_token_is_not_seen():
    return close(attended([3]), [2.0])  # (1 + 2 + 3) / 3 instead of (1 + 2 + 3 + 4) / 4


def rows_share_a_position():
    return not close(attended([1, 3]), [1.5, 2.5]) and close(attended([3]), [2.5])


def cache_window_is_ignored():
    return close(attended([4], window=2), [3.0])


def cache_window_is_off_by_one():
    return close(attended([4], window=2), [4.0]) or close(attended([4], window=2), [5.0])


def nothing_is_stored():
    made = cache()
    made.open_step(torch.tensor([2]), 3)
    made.attend_cached(0, torch.zeros(1, 1, 2), torch.ones(1, 1, 2), torch.ones(1, 1, 2))
    return not (close(made.k[0, 0, 0, 2], [1, 1]) and close(made.v[0, 0, 0, 2], [1, 1]))


def learner_mask(window=None):
    """The mask of a row with two queries behind three keys of a prompt, [2, 5] of 0 and 1."""
    from kernels.packing import AttentionGroup

    group = AttentionGroup(
        torch.tensor([[3, 4]]), torch.tensor([2]), torch.arange(5)[None], torch.tensor([3])
    )
    return group.mask(window).expand(1, 1, 2, 5)[0, 0].int().tolist()


def offset_is_ignored():
    return learner_mask() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0]]


def learner_sees_the_future():
    return learner_mask()[0][4] == 1


def learner_misses_itself():
    return learner_mask() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]


def learner_window_is_wrong():
    return learner_mask() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]] and learner_mask(2) != [
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 1],
    ]


# ----------------------------------------------------------------------------------------------------------
# 5 sampling


def uniform(key, position):
    from kernels.sampler import uniform

    return uniform(torch.tensor(key), torch.tensor(position))


def place_of(mass, target):
    from kernels.sampler import inverse_cdf

    return inverse_cdf(torch.tensor([mass]), torch.tensor([target]))[0].item()


def sampled(logits, u, *options):
    from kernels.sampler import sample_inverse_cdf

    token, logprob = sample_inverse_cdf(torch.tensor([logits]), torch.tensor([u]), *options)
    return token.item(), logprob.item()


def position_is_ignored():
    return uniform([7], [0]).equal(uniform([7], [1]))


def key_is_ignored():
    return uniform([7], [0]).equal(uniform([8], [0]))


def a_stream_of_random_numbers():
    return not uniform([7], [0]).equal(uniform([7], [0]))


def sign_is_copied():
    return bool((uniform(list(range(64)), [0] * 64) <= 0).any())


def only_half_of_the_range():
    u = uniform(list(range(256)), [0] * 256)
    return bool(u.max() < 0.6 or u.min() > 0.4)


def edge_belongs_to_the_lower():
    return place_of([1.0, 2.0], 1.0) == 0 or place_of([0.0, 2.0], 0.0) == 0


def past_the_last_mass():
    return place_of([1.0, 2.0, 0.0], 3.0) >= 2


def impossible_token():
    return sampled([-math.inf, 0.0, -math.inf], 0.5 / 2**23)[0] != 1


def logprob_without_temperature():
    return close(sampled([1.0, 0.0], 0.1, 0.5)[1], [math.log(math.e / (math.e + 1))])


def temperature_multiplied():
    half = math.exp(0.5)
    return close(sampled([1.0, 0.0], 0.1, 0.5)[1], [math.log(half / (half + 1))])


def logprob_before_top_p():
    whole = math.log(math.exp(3) / (math.exp(3) + 1))
    return close(sampled([3.0, 0.0], 0.1, 1.0, 0.9)[1], [whole])


def always_the_likeliest():
    return all(sampled([1.0, 0.9, 0.8], u)[0] == 0 for u in (0.1, 0.5, 0.9))


# ----------------------------------------------------------------------------------------------------------
# 6 log-prob


def tiled(temperature=1.0, tile=2, grads=(1.0, None), scale=1.0):
    """logprob, entropy, gradient of the logits for logits 0 1 2 3 (times `scale`), target 1, by tiles.

    grads: of logprob and entropy; None is an output that the loss does not use.
    """
    from kernels import logprob

    kept, logprob.TILE = logprob.TILE, {"cpu": (1, tile)}
    try:
        weight = torch.tensor([[0.0], [1.0], [2.0], [3.0]]) * scale
        h, w = torch.ones(1, 1, requires_grad=True), weight.requires_grad_()
        outputs = logprob.linear_logprob(h, w, torch.tensor([1]), temperature)
        used = [g * output.sum() for g, output in zip(grads, outputs, strict=True) if g is not None]
        sum(used).backward()
        return outputs[0].item(), outputs[1].item(), w.grad[:, 0]
    finally:
        logprob.TILE = kept


def exact(temperature=1.0, scale=1.0):
    """(log p [4], entropy) of the same."""
    logp = (torch.arange(4, dtype=torch.float64) * scale / temperature).log_softmax(0)
    return logp, -(logp.exp() * logp).sum()


def one_tile_is_right_two_are_not():
    logp, entropy = exact()
    right = close(tiled(tile=4)[:2], [logp[1], entropy])
    return right and not close(tiled(tile=2)[:2], [logp[1], entropy])


def entropy_alone_is_wrong():
    logp, entropy = exact()
    got = tiled(tile=2)
    return close(got[0], [logp[1]]) and not close(got[1], [entropy])


def temperature_is_forgotten():
    logp, _ = exact()
    return close(tiled(temperature=0.5)[0], [logp[1]])


def far_logits_overflow():
    return not all(math.isfinite(x) for x in tiled(scale=100.0)[:2])


def forward_is_right(temperature=1.0):
    logp, entropy = exact(temperature)
    return close(tiled(temperature)[:2], [logp[1], entropy])


def gradient_is(expected, **options):
    """With the entropy unused or used: two ways through the code."""
    return any(
        close(tiled(grads=grads, **options)[2], expected.tolist()) for grads in ((1.0, None), (1.0, 0.0))
    )


def gradient_of_logprob(temperature=1.0, of_target=1.0, of_p=1.0):
    """[j == y] - p_j, its two terms times a factor each."""
    one_hot = torch.tensor([0.0, 1, 0, 0], dtype=torch.float64)
    return of_target * one_hot - of_p * exact(temperature)[0].exp()


def gradient_without_temperature():
    """One of the two terms or both lack the factor 1 / 0.5."""
    wrong = [gradient_of_logprob(0.5, *factors) for factors in ((1, 1), (2, 1), (1, 2))]
    return forward_is_right(0.5) and any(gradient_is(each, temperature=0.5) for each in wrong)


def target_in_every_tile():
    right = gradient_is(gradient_of_logprob(), tile=4)
    return forward_is_right() and right and not gradient_is(gradient_of_logprob(), tile=2)


def target_is_forgotten():
    return forward_is_right() and gradient_is(-exact()[0].exp())


def entropy_gradient_without_h():
    logp, _ = exact()
    return forward_is_right() and close(tiled(grads=(None, 1.0))[2], (-logp.exp() * logp).tolist())


# ----------------------------------------------------------------------------------------------------------
# 7 kernel


def kernel_pieces(vocabulary, width, pieces=1, scale=1.0, temperature=1.0):
    """partials_triton of one token with hidden 1 1 1 ... and logits 0, -1, -2, ... times scale; target 1."""
    from kernels import logprob_triton

    kept, logprob_triton.programs_wanted = logprob_triton.programs_wanted, lambda device: pieces
    try:
        weight = -torch.arange(float(vocabulary))[:, None].expand(-1, width) * scale / width
        out = logprob_triton.partials_triton(torch.ones(1, width), weight, torch.tensor([1]), temperature)
        return out.double()[:, :, 0]  # [4, pieces]
    finally:
        logprob_triton.programs_wanted = kept


def exact_piece(vocabulary, scale=1.0):
    c = -torch.arange(float(vocabulary), dtype=torch.float64) * scale
    return [0.0, c.exp().sum(), (c.exp() * c).sum(), -scale]


def kernel_is_right(*arguments, scale=1.0):
    return close(kernel_pieces(*arguments, scale=scale), [[x] for x in exact_piece(arguments[0], scale)])


def padding_of_the_vocabulary_counts():
    return kernel_is_right(64, 16) and not kernel_is_right(5, 16)


def padding_of_the_width_counts():
    return kernel_is_right(64, 16) and not kernel_is_right(64, 7)


def maximum_moves():
    """Right for falling logits, whose maximum is in the first block, and wrong for rising ones."""
    if not kernel_is_right(192, 16, scale=0.01):
        return False
    got = kernel_pieces(192, 16, scale=-0.01)
    c = torch.arange(192, dtype=torch.float64) * 0.01 - 1.91
    return not close(got[:3, 0], [1.91, c.exp().sum(), (c.exp() * c).sum()])


def pieces_overlap():
    return kernel_is_right(192, 16, scale=0.01) and not close(
        kernel_pieces(192, 16, pieces=3, scale=0.01)[0], [0.0, -0.64, -1.28]
    )


def kernel_without_temperature():
    return kernel_is_right(64, 16) and close(kernel_pieces(64, 16, temperature=0.5)[1], [exact_piece(64)[1]])


def only_the_first_slice_of_the_width():
    return kernel_is_right(64, 16) and not kernel_is_right(64, 32)


# ----------------------------------------------------------------------------------------------------------
# 8 lucky hit


def accuracy():
    """Of answers 4 4 4 7 7 9 none 5 with truth 7: 3/8."""
    from report.metrics import reward_accuracy

    return reward_accuracy([0.0, 0, 0, 1, 1, 0, 0, 0], [0, 1, 2])


def is_the_label_accuracy():
    return close(accuracy(), [0.0])


def is_the_share_of_right():
    return close(accuracy(), [2 / 8])


def is_the_share_of_agreement():
    return close(accuracy(), [3 / 8]) and reward_is_of_the_majority()


def reward_is_of_the_majority():
    from report.metrics import reward_accuracy

    return close(reward_accuracy([1.0, 1, 0, 0], [0]), [1 / 4])


def errors_are_counted():
    return close(accuracy(), [5 / 8])


# ----------------------------------------------------------------------------------------------------------

MISTAKES = {
    "vote": {
        none_votes: "A response without an answer (None) never votes: it is in no class.",
        spelling_decides: "Answers are counted by value, not by spelling: 1/2 and 0.5 are one candidate.",
        last_of_equals: "A tie goes to the class that was seen first.",
        first_spelling: "The label is the most frequent spelling of the largest class, not its first member.",
        classes_are_sorted: "The classes stand in the order of their first members, not by size.",
        no_answer_fails: "With no answers at all the label is None and there are no classes.",
        kind_is_ignored: "The kind decides what is equal: hand it to grading.classes.",
    },
    "advantages": {
        ddof_0: "The standard deviation has ddof 1: divide by M - 1, not M (rewards 1 1 0 0 give 0.5774).",
        not_per_row: (
            "A group is one row: mean and standard deviation are those of each row, not of all rows."
        ),
        mean_not_subtracted: "The baseline is missing: subtract the mean of the row.",
        not_divided: "Divide by the standard deviation of the row.",
        divided_by_the_variance: "Divide by the standard deviation, not by its square, the variance.",
        unanimous_by_rounding: (
            "A row of equal rewards has advantage exactly 0: their mean may differ from them in the last bit."
        ),
        unanimous_is_nan: "A row of equal rewards has standard deviation 0: add 1e-6 before you divide.",
        one_sample_is_nan: "A row of one reward has no standard deviation with ddof 1: its advantage is 0.",
    },
    "loss": {
        mean_of_rows: (
            "The loss is a mean over tokens, not a mean over rows of means: every token counts alike."
        ),
        divided_by_the_rows: "The loss is divided by the response tokens, not by the rows.",
        padding_counts: "Padding counts: divide by the tokens that the mask marks, not by all places.",
        token_count_is_ignored: "token_count is ignored: where it is given, it divides the sum.",
        sign_is_wrong: "The sign is wrong: an optimizer descends, so the loss is minus the objective.",
        maximum_taken: "The surrogate is the minimum of clipped and unclipped, not the maximum.",
        not_clipped: "The ratio is not clipped: above 1 + clip a good token brings nothing more.",
        clipped_only: "Only the clipped term is used: the objective is the minimum of clipped and unclipped.",
        no_dual_clip: "The dual clip is missing: for a negative advantage the objective is at least 3 A.",
        dual_clip_for_all: "The dual clip is for negative advantages only.",
        kl_of_new_minus_ref: "The KL has the wrong direction: k3 is exp(d) - d - 1 with d = ref - new.",
        kl_is_the_difference: "The KL is the estimator k3, exp(d) - d - 1, not the difference d itself.",
        digits_of_the_kl_cancel: (
            "Where d is small exp(d) - d - 1 is d^2/2, which fp32 loses beside exp(d): torch.expm1(d) - d "
            "keeps it. Likewise in kl_old_new."
        ),
        masked_tokens_reach_the_sum: (
            "A masked token may hold anything, infinity too: 0 x inf is NaN, so select with torch.where "
            "instead of multiplying by the mask."
        ),
        masked_gradient: (
            "A masked token makes the gradient or what is reported NaN: select the log-ratio with "
            "torch.where before exp(), not only after."
        ),
        exponent_overflows: (
            "exp() overflows above 88 in fp32: bound the log-ratio before it, for example at 20."
        ),
    },
    "attention": {
        nothing_is_stored: "The step's own key and value are not stored at their position in the cache.",
        later_places_are_seen: (
            "A query sees places behind its own position, which hold other rows' leftovers or nothing: mask "
            "every place above the position."
        ),
        own_token_is_not_seen: "A token has to see itself too: its own key belongs to those it attends to.",
        rows_share_a_position: "Each row has a position of its own, so the mask has to be made row by row.",
        cache_window_is_ignored: "The sliding window is ignored in the cached step.",
        cache_window_is_off_by_one: (
            "The window counts the token itself: with window 2 it sees itself and one more."
        ),
        offset_is_ignored: (
            "The learner's mask ignores the offset: query j stands behind offset keys of its prompt."
        ),
        learner_sees_the_future: "The learner's mask is not causal: a query sees keys behind itself.",
        learner_misses_itself: "In the learner's mask a token has to see itself too.",
        learner_window_is_wrong: (
            "The learner's mask has a wrong window: with window w a query sees itself and the w - 1 keys "
            "before it."
        ),
    },
    "sampling": {
        a_stream_of_random_numbers: (
            "The numbers come from a stream: they have to be a hash of key and position, so that the same "
            "token is drawn in any batch."
        ),
        position_is_ignored: "The position is ignored: each token of a response needs a number of its own.",
        key_is_ignored: "The key is ignored: all rows would draw the same numbers.",
        sign_is_copied: "Some numbers are negative or 0: an int64 shift copies the sign, use logical_shift.",
        only_half_of_the_range: "The numbers do not fill (0, 1).",
        past_the_last_mass: (
            "A target that was rounded up to the total has to give the last index with mass, never one of "
            "probability 0."
        ),
        edge_belongs_to_the_lower: (
            "A target on an edge belongs to the next index: the running sum has to exceed the target "
            "(`>`, or searchsorted with right=True)."
        ),
        impossible_token: "A token of probability 0 (logit -inf) is drawn at the edge of the range.",
        temperature_multiplied: "The temperature divides the logits.",
        logprob_without_temperature: (
            "The log-probability is that of the distribution sampled from, temperature included."
        ),
        logprob_before_top_p: (
            "The log-probability is that of the distribution sampled from: after top-p the kept tokens are "
            "normalised anew."
        ),
        always_the_likeliest: "The likeliest token is always taken: u decides nothing.",
    },
    "logprob": {
        far_logits_overflow: "exp() overflows for large logits: subtract the largest one first.",
        temperature_is_forgotten: "The temperature is forgotten: the softmax is of logits / temperature.",
        entropy_alone_is_wrong: (
            "The entropy is wrong where pieces are merged: under a higher maximum every c shifts, so "
            "sum_exp_c changes by shift * sum_exp before it is scaled."
        ),
        one_tile_is_right_two_are_not: (
            "One tile is right, two are not: sums under an old maximum have to be brought under the new one "
            "before they are added (online softmax)."
        ),
        gradient_without_temperature: "The gradient has to be divided by the temperature too (chain rule).",
        target_is_forgotten: "The gradient lacks the target's term: d logprob / d z_j = [j == y] - p_j.",
        target_in_every_tile: (
            "The target's term of the gradient belongs to the one tile that holds the target: `locate` says "
            "whether it is inside."
        ),
        entropy_gradient_without_h: "The entropy's gradient is -p (log p + H): H is missing.",
    },
    "kernel": {
        padding_of_the_vocabulary_counts: (
            "Columns past the end of the vocabulary count: what a masked load fills in gives the logit 0, "
            "so set these logits to -1e30 before the maximum."
        ),
        padding_of_the_width_counts: (
            "Numbers past the width count: mask the loads of both factors with other=0."
        ),
        only_the_first_slice_of_the_width: (
            "The product has to run over the whole width, BD numbers at a time."
        ),
        maximum_moves: (
            "When a later block raises the maximum, the old sums have to be rescaled to it (online "
            "softmax): exp(shift), and sum_exp_c moves by shift * sum_exp."
        ),
        pieces_overlap: (
            "Program (block, piece) has to run through its own piece only: `size` columns from "
            "program_id(1) * size on."
        ),
        kernel_without_temperature: "The exponents are (logit - maximum) * inverse_temperature.",
    },
    "lucky": {
        is_the_label_accuracy: (
            "That is the label accuracy, whether the label is right. Reward accuracy asks each response "
            "whether its reward is right."
        ),
        is_the_share_of_right: (
            "That is the share of right responses. A wrong response that the vote does not reward has the "
            "right reward too, 0."
        ),
        is_the_share_of_agreement: (
            "That is the share of responses in the majority: compare each one's reward with the reward that "
            "the truth would give."
        ),
        errors_are_counted: "That is the share of wrong rewards: count those that agree.",
    },
}


def recognised(name):
    """The sentences of the mistakes that the functions in use make."""
    found = []
    for probe, sentence in MISTAKES[name].items():
        try:
            if probe():
                found.append(sentence)
        except Exception:  # a student's function may fail in any way; the test has said how
            continue
    return found[:2]
