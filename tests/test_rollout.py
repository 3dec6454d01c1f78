"""The sampler: the same tokens in any batch, log-probs of what it draws from, right ends and frequencies."""

import copy
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from distributed import weights
from kernels.cuda_graph import GraphCache
from kernels.kv_cache import KVCache
from kernels.sampler import inverse_cdf, row_keys, sample_inverse_cdf, uniform
from rollout import Engine, Rollout, fill_gaps, generate

PROMPTS = [[5, 17, 3, 88, 41], [7, 7, 9], [60, 2, 2, 31, 14, 55, 90, 8], [12]]
EOS = [1, 2, 3, 4]
SEED = 92  # one whose uniform numbers all keep away from the edges of the CDF; `nearest_edge` checks it


def sampled(model, rows=16, **changes):
    options = dict(max_new_tokens=40, eos_ids=EOS, seed=SEED, stream="train", step=2)
    return generate(model, PROMPTS, rows, **{**options, **changes})


def test_lengths_ends_and_prompts(random_model):
    rollout = sampled(random_model)
    assert len(set(rollout.response_length.tolist())) > 8  # otherwise most of this file proves little
    assert 0.1 < rollout.finished.float().mean() < 1
    for row in range(len(rollout)):
        prompt, response = PROMPTS[rollout.question[row]], rollout.response(row)
        assert rollout.tokens[row, : len(prompt)].tolist() == prompt
        assert (response[-1] in EOS) == bool(rollout.finished[row])  # the end is part of the response ...
        assert not set(response[:-1]) & set(EOS)  # ... and nothing comes after it
        assert rollout.finished[row] or len(response) == 40
        assert (
            rollout.tokens[row, len(prompt) + len(response) :].eq(0).all()
            and rollout.logprob[row, len(response) :].eq(0).all()
        )


def test_mask_holds_the_end_of_sequence_token_and_nothing_after_it(random_model):
    rollout = sampled(random_model)
    mask = rollout.mask()
    assert mask.sum(1).equal(rollout.response_length)
    last = torch.stack(
        [rollout.tokens[r, rollout.prompt_length[r] + mask[r].sum() - 1] for r in range(len(rollout))]
    )
    assert torch.isin(last, torch.tensor(EOS)).equal(rollout.finished)


def nearest_edge(model, rollout, temperature, seed=SEED, stream="train", step=2):
    """How close a rollout's uniform numbers come to an edge of the CDF, by a forward pass without a cache."""
    closest = 1.0
    for row in range(len(rollout)):
        length, start = int(rollout.response_length[row]), int(rollout.prompt_length[row])
        logits = (
            model.logits(rollout.tokens[row : row + 1, : start + length])[0, start - 1 : start + length - 1]
            / temperature
        )
        cdf = logits.double().softmax(-1).cumsum(-1)
        key = row_keys(seed, stream, step, rollout.question[row : row + 1], rollout.sample[row : row + 1])
        u = uniform(key, torch.arange(length)).double()
        closest = min(closest, (cdf - u[:, None]).abs().min().item())
    return closest


def check_equal(rollouts, whole):
    """The rows of some rollouts together are those of `whole`, tokens and, to rounding, log-probs."""
    got = {
        (int(p.question[r]), int(p.sample[r])): (p.response(r), p.logprob[r], p.finished[r])
        for p in rollouts
        for r in range(len(p))
    }
    assert len(got) == len(whole)
    for row in range(len(whole)):
        tokens, logprob, finished = got[int(whole.question[row]), int(whole.sample[row])]
        assert tokens == whole.response(row) and finished == whole.finished[row], row
        assert (logprob[: len(tokens)] - whole.logprob[row, : len(tokens)]).abs().max() < 1e-4, row


@torch.no_grad()
def test_a_response_does_not_depend_on_the_batch(random_model):
    """Batch 1 = batch 64 = a tight budget with refills = another order = split over two ranks."""
    whole = sampled(random_model)
    assert len(whole) == 64
    responses = [tuple(whole.response(row)) for row in range(64)]
    assert len(set(responses)) >= 32 and len({len(r) for r in responses}) > 8
    assert nearest_edge(random_model, whole, temperature=1.0) > 1e-5
    pairs = list(zip(whole.question.tolist(), whole.sample.tolist(), strict=True))
    shuffled = [pairs[i] for i in torch.randperm(64, generator=torch.Generator().manual_seed(0)).tolist()]
    check_equal([sampled(random_model, [pair]) for pair in pairs], whole)
    check_equal([sampled(random_model, pairs, budget_tokens=5 * 48)], whole)
    check_equal([sampled(random_model, shuffled)], whole)
    check_equal([sampled(random_model, pairs[rank::2]) for rank in range(2)], whole)


class Recording(TorchDispatchMode):
    """A CUDA graph on the CPU.

    What was called is called again on the same tensors, and writes to the same addresses.
    """

    def __init__(self, action, memory=None):
        super().__init__()
        self.calls, self.fresh = [], True
        with self:
            action()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "the host reads a number of the device"
        out = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, out))
        return out

    def __call__(self):
        if self.fresh:  # capturing on a GPU executes nothing, recording here did
            self.fresh = False
            return
        for func, args, kwargs, out in self.calls:
            for old, new in zip(tree_leaves(out), tree_leaves(func(*args, **kwargs)), strict=True):
                if old.data_ptr() != new.data_ptr():  # neither a view nor in place
                    old.copy_(new)


def engine_as_on_a_gpu(model, monkeypatch, slots=20):
    """An engine that polls every 8 tokens and replays recorded steps of several sizes."""
    monkeypatch.setattr("kernels.cuda_graph.capture", Recording)
    monkeypatch.setattr("torch.cuda.graph_pool_handle", lambda: None)
    monkeypatch.setattr("kernels.native.library", lambda: None)  # of a CPU
    engine = Engine(model, slots, capacity=48, max_new_tokens=40, eos_ids=EOS)
    engine.poll_every, engine.graphs = 8, GraphCache()
    return engine


@torch.no_grad()
def test_replayed_steps_and_rare_polls_sample_the_same(random_model, monkeypatch):
    whole = sampled(random_model)
    engine = engine_as_on_a_gpu(random_model, monkeypatch)
    polls, poll = [], engine.poll
    monkeypatch.setattr(engine, "poll", lambda count: polls.append(count) or poll(count))
    check_equal([sampled(random_model, engine=engine)], whole)
    assert len(polls) < whole.response_length.sum() / 20 / 3  # far fewer than steps
    graphs = engine.graphs.graphs
    replayed = [graph for graph in graphs.values() if isinstance(graph, Recording)]
    assert {shape[0] for shape in graphs} <= {1, 2, 4, 8, 16, 20} and len(replayed) >= 3
    # the engine is used again
    check_equal([sampled(random_model, engine=engine, step=3)], sampled(random_model, step=3))


@torch.no_grad()
def test_recorded_steps_follow_weights_that_are_refreshed_in_place(random_model, monkeypatch):
    model, other = copy.deepcopy(random_model), copy.deepcopy(random_model)
    for parameter in other.parameters():
        parameter.mul_(0.9)
    engine = engine_as_on_a_gpu(model, monkeypatch)
    before = sampled(model, engine=engine)
    weights.refresh(model, other)
    after = sampled(model, engine=engine)
    check_equal([after], sampled(other))
    assert sum(before.response(row) == after.response(row) for row in range(64)) < 32


def test_seed_stream_and_step_each_change_the_responses(random_model):
    base = sampled(random_model)
    for change in ({"seed": 12}, {"step": 3}, {"stream": "eval"}):
        other = sampled(random_model, **change)
        same = sum(base.response(row) == other.response(row) for row in range(64))
        assert same < 16, change  # a few short ones may agree by chance


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_an_uncached_forward(random_model, temperature):
    """The sampler's numbers (cached decode) against the learner's (packed forward) and the plain logits."""
    rollout = sampled(random_model, temperature=temperature)
    logprob, _ = random_model(rollout, temperature)
    gap = (logprob - rollout.logprob).abs()[rollout.mask()]
    assert gap.mean() < 1e-5 and gap.max() < 1e-3
    row = int(rollout.response_length.argmax())
    start, length = int(rollout.prompt_length[row]), int(rollout.response_length[row])
    tokens = rollout.tokens[row : row + 1, : start + length]
    plain = (random_model.logits(tokens)[0, start - 1 : -1] / temperature).log_softmax(-1)
    plain = plain.gather(1, tokens[0, start:, None])[:, 0]
    assert (plain - rollout.logprob[row, :length]).abs().max() < 1e-4


def test_greedy_takes_the_most_likely_token(random_model):
    rollout = sampled(random_model, [(0, 0), (0, 5), (1, 0)], temperature=0.0, stream="eval")
    assert rollout.response(0) == rollout.response(1)
    start = int(rollout.prompt_length[0])
    logits = random_model.logits(rollout.tokens[:1, : start + int(rollout.response_length[0])])[
        0, start - 1 : -1
    ]
    assert logits.argmax(-1).tolist() == rollout.response(0)


def test_a_watcher_sees_rows_and_tokens_and_may_end_the_rollout(random_model):
    seen = []
    whole = sampled(random_model, rows=4, watch=lambda *counts: seen.append(counts))
    finished, tokens = zip(*seen, strict=True)
    assert seen[0] == (0, 0) and all(step >= 1 for step in map(int.__sub__, tokens[1:], tokens))
    assert sorted(finished) == list(finished) and finished[-1] < len(whole)
    assert tokens[1] == 2 * len(whole) and tokens[-1] <= int(whole.response_length.sum())
    cut = sampled(random_model, rows=4, watch=lambda finished, tokens: finished >= 3)
    done = cut.response_length > 0
    assert 3 <= done.sum() < len(whole)
    assert cut.response_length[done].equal(whole.response_length[done])


def test_training_refuses_what_the_loss_does_not_know(random_model):
    for change in ({"top_p": 0.95}, {"temperature": 0.0}):
        with pytest.raises(ValueError, match="evaluation only"):
            sampled(random_model, **change)


@pytest.mark.parametrize("change, said", [
    ({"model": "another"}, "another model"),
    ({"eos_ids": EOS[:-1]}, "another set of EOS tokens"),
    ({"max_new_tokens": 39}, "another number of new tokens"),
    ({"capacity": 47}, "another length (up to 47 tokens, not 48)"),
    ({"capacity": 47, "max_new_tokens": 39, "eos_ids": EOS[:-1]},
     "another number of new tokens and another set of EOS tokens"),
])  # fmt: skip
def test_an_engine_for_something_else_is_refused(random_model, change, said):
    engine = Engine(random_model, 3, change.pop("capacity", 48), max_new_tokens=40, eos_ids=EOS)
    model = copy.deepcopy(random_model) if change.pop("model", None) else random_model
    with pytest.raises(ValueError, match=f"^the engine was built for {re.escape(said)}$"):
        sampled(model, engine=engine, **change)


def test_the_cache_stays_within_its_budget(random_model, monkeypatch):
    sizes = []
    original = KVCache.__init__

    def recorded(self, model, slots, capacity):
        sizes.append((slots, capacity))
        original(self, model, slots, capacity)

    monkeypatch.setattr(KVCache, "__init__", recorded)
    for budget in (48, 300, 10_000, None):
        sampled(random_model, budget_tokens=budget)
    assert sizes == [(1, 48), (6, 48), (64, 48), (64, 48)]
    with pytest.raises(ValueError, match="the budget holds no row of 48 tokens"):
        sampled(random_model, budget_tokens=47)


# ------------------------------------------------------------------------------------------------------------
# one draw


def test_uniform_numbers_are_uniform_and_unrelated():
    question, index = torch.arange(100).repeat_interleave(100), torch.arange(100).repeat(100)
    u = torch.stack(
        [uniform(row_keys(0, "train", 0, question, index), torch.full((10000,), p)) for p in range(5)]
    ).double()
    assert u.min() > 0 and u.max() < 1
    histogram = torch.histc(u, 100, 0, 1)  # 50,000 in 100 bins
    assert ((histogram - 500) ** 2 / 500).sum() < 160  # chi-squared with 99 degrees of freedom: 1e-4 quantile
    grid = u[0].view(100, 100)
    for a, b in (
        (u[0], u[1]),
        (grid[:-1].flatten(), grid[1:].flatten()),
        (grid[:, :-1].flatten(), grid[:, 1:].flatten()),
    ):
        # neighbours in position, question and sample
        assert torch.corrcoef(torch.stack((a, b)))[0, 1].abs() < 0.05


def test_a_uniform_number_is_a_function_of_key_and_position():
    """The same again, whatever else is in the batch, and another one for another key or position."""
    key, position = torch.tensor([3, -7, 3, 2**62, -(2**63)]), torch.tensor([0, 5, 1, 0, 2**40])
    u = uniform(key, position)
    assert u.dtype == torch.float32 and torch.equal(u, uniform(key, position)) and len(set(u.tolist())) == 5
    alone = [uniform(key[i : i + 1], position[i : i + 1]) for i in range(5)]
    assert torch.equal(torch.cat(alone), u) and u.min() > 0 and u.max() < 1


def test_inverse_cdf_by_hand():
    """Targets on an edge belong to the next mass, below 0 to the first, and at the total to the last."""
    mass = torch.tensor([0.0, 0, 1, 0, 2, 0, 0, 0]).repeat(7, 1)
    index, rest = inverse_cdf(mass, torch.tensor([-0.5, 0.0, 0.5, 1.0, 2.5, 3.0, 3.5]))
    assert index.tolist() == [2, 2, 2, 4, 4, 4, 4] and rest.tolist() == [-0.5, 0, 0.5, 0, 1.5, 2, 2.5]
    index, _ = inverse_cdf(torch.tensor([[torch.nan, torch.nan]]), torch.tensor([torch.nan]))
    assert 0 <= index.item() < 2


@pytest.mark.parametrize("temperature, top_p", [(1.0, 1.0), (0.5, 1.0), (1.0, 0.8), (0.6, 0.95)])
def test_tokens_come_with_their_probability(temperature, top_p):
    logits = torch.tensor([2.0, 0.0, 1.0, -1.0, 1.5])
    probability = (logits.double() / temperature).softmax(-1)
    order = probability.argsort(descending=True)
    kept = order[: int((probability[order].cumsum(0) < top_p - 1e-9).sum()) + 1] if top_p < 1 else order
    expected = torch.zeros(5, dtype=torch.float64).index_copy(
        0, kept, probability[kept] / probability[kept].sum()
    )
    u = (torch.arange(20000) + 0.5) / 20000  # an even comb, so frequencies are exact to a tooth
    token, logprob = sample_inverse_cdf(logits.expand(20000, 5), u, temperature, top_p)
    frequency = torch.bincount(token, minlength=5).double() / 20000
    assert (frequency - expected).abs().max() < 1e-4
    assert (logprob.double() - expected.log()[token]).abs().max() < 1e-5


def test_a_token_that_cannot_be_is_never_drawn():
    logits = torch.tensor([[float("-inf"), 0.0, float("-inf"), 0.0, float("-inf")]]).expand(3, 5)
    u = torch.tensor([0.5 / 2**23, 0.5, 1 - 0.5 / 2**23])  # the smallest and the largest there are
    token, logprob = sample_inverse_cdf(logits, u)
    assert token.tolist()[::2] == [1, 3] and token[1] in (1, 3) and logprob.isfinite().all()
    nearly = torch.full((1, 1000), -3e4)
    nearly[0, 10] = 0.0
    # u * total rounds up to total
    assert sample_inverse_cdf(nearly, torch.tensor([1 - 0.5 / 2**23]))[0].item() == 10


def test_fill_gaps_moves_as_few_rows_as_there_are_gaps():
    for seed in range(20):
        alive = torch.rand(30, generator=torch.Generator().manual_seed(seed)) < 0.6
        order = fill_gaps(alive)
        assert sorted(order.tolist()) == alive.nonzero()[:, 0].tolist()
        assert (order != torch.arange(len(order))).sum() == (~alive[: len(order)]).sum()


def test_rows_of_a_rollout_can_be_picked(random_model):
    rollout = sampled(random_model, 2)
    part = rollout[torch.tensor([3, 0])]
    assert (
        isinstance(part, Rollout)
        and part.response(0) == rollout.response(3)
        and part.response(1) == rollout.response(0)
    )
