"""kernels/cpu against the torch code that it stands for. Without a C compiler there is nothing to test."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import ROOT

from kernels import native
from kernels.fused import swiglu
from kernels.kv_cache import KVCache
from kernels.sampler import sample_inverse_cdf
from model import Transformer
from rollout import decode, generate

TINY = ROOT / "tiny" / "model"
pytestmark = pytest.mark.skipif(native.library() is None, reason="needs a C compiler")


@pytest.fixture
def random_model():
    torch.manual_seed(0)
    config = Transformer.from_pretrained(TINY).config
    config = replace(config, windows=(None, 5, None, 40), qk_norm=True, o_bias=True, mlp_bias=True)
    model = Transformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


def filled(model, rows, longest=48):
    """(cache, tokens, positions) of a step in which every row has another length."""
    torch.manual_seed(1)
    cache = KVCache(model, rows, longest)
    cache.k.normal_(), cache.v.normal_()
    return cache, torch.randint(0, model.config.vocab_size, (rows,)), torch.randint(0, longest, (rows,))


def computed(model, rows, in_c, threads=1):
    """(logits, keys, values) after a step of `filled`."""
    cache, token, position = filled(model, rows)
    cache.native = cache.native if in_c else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "THREADS", threads)
        patch.setattr(native, "ENABLED", in_c)
        logits = decode(model, cache, token, position, context=int(position.max()) + 1)
    return logits, cache.k, cache.v


@pytest.mark.parametrize("rows", [1, 2, 8, 9, 16, 17, 50])
def test_a_step_in_c_is_the_step_in_torch(random_model, rows):
    for got, expected in zip(*(computed(random_model, rows, in_c) for in_c in (True, False)), strict=True):
        torch.testing.assert_close(got, expected, atol=2e-4, rtol=2e-4)


def test_threads_change_no_bit(random_model):
    alone = computed(random_model, 20, in_c=True)
    for _ in range(100):
        for one, other in zip(alone, computed(random_model, 20, in_c=True, threads=3), strict=True):
            assert torch.equal(one, other)


def test_a_position_inside_the_prompt_sees_what_is_before_it(random_model):
    cache, token, _ = filled(random_model, 1)
    expected = decode(random_model, cache, token, torch.tensor([3]), context=4)
    cache.native.prompts[0] = torch.tensor([1, 40])
    got = decode(random_model, cache, token, torch.tensor([3]), context=4)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("where", ["swiglu", "layer"])
def test_a_model_that_was_changed_in_python_alone_is_sampled_in_torch(random_model, monkeypatch, where):
    monkeypatch.setattr(native, "ENABLED", True)  # and back after the test
    cache, token, position = filled(random_model, 4)
    if where == "layer":
        layer = random_model.layers[1].mlp
        plain = layer.forward
        layer.forward = lambda x: 2 * plain(x)
    else:
        monkeypatch.setattr(torch.nn.functional, "silu", torch.relu)  # in kernels/fused.py
    with pytest.warns(UserWarning, match="differ; torch is used"):
        got = decode(random_model, cache, token, position, context=int(position.max()) + 1)
    assert torch.equal(got, computed(random_model, 4, in_c=False)[0])
    assert cache.native is None and native.library() is None


def test_weights_that_are_not_numbers_are_no_error(random_model):
    random_model.norm.weight.data[0] = torch.nan
    assert computed(random_model, 4, in_c=True)[0].isnan().all()


def test_files_of_others_are_not_loaded(tmp_path):
    tmp_path.chmod(0o777)
    with pytest.raises(PermissionError, match="others may write in"):
        native.compiled(tmp_path, "decode.so")


@pytest.mark.parametrize("top_p", [1.0, 0.95, 0.3])
@pytest.mark.parametrize("vocab", [5, 256, 257, 5000])
def test_a_draw_in_c_is_the_draw_in_torch(vocab, top_p):
    torch.manual_seed(0)
    logits, u = 3 * torch.randn(400, vocab), torch.rand(400).clamp(1e-6, 1 - 1e-6)
    logits[::3, 1] = -torch.inf
    token, logprob = native.sample_rows(logits, u, 0.7, top_p)
    expected, its_logprob = sample_inverse_cdf(logits, u, 0.7, top_p)
    same = token == expected
    assert same.float().mean() > 0.99  # a number at the edge of two tokens may fall to either
    torch.testing.assert_close(logprob[same], its_logprob[same], atol=1e-5, rtol=1e-5)
    p = (logits / 0.7).softmax(-1).gather(1, token[:, None])
    assert (p > 0).all()


@pytest.mark.parametrize("place", [0, 3, 300])
def test_a_nan_in_the_logits_is_one_of_the_log_probability(place):
    logits = torch.zeros(2, 301)
    logits[1, place] = torch.nan
    for top_p in (1.0, 0.9):
        token, logprob = native.sample_rows(logits, torch.tensor([0.5, 0.5]), 1.0, top_p)
        assert logprob[0].isfinite() and logprob[1].isnan() and (token >= 0).all() and (token < 301).all()


@pytest.mark.parametrize("budget", [None, 5 * 32])  # 5: rows enter slots that others left
@pytest.mark.parametrize("windows", [(None,) * 4, (None, 5, 11, None)])
def test_a_rollout_in_c_is_the_rollout_in_torch(budget, windows):
    """Rows end at different lengths, so that prompts, which samples share, move from slot to slot."""
    model, prompts = Transformer.from_pretrained(TINY), [[5, 9, 7, 11, 12, 8], [8, 4], [9] * 12]
    model.config = replace(model.config, windows=windows)
    options = dict(
        max_new_tokens=20, eos_ids=range(0, 300, 30), seed=3, stream="train", step=1, budget_tokens=budget
    )
    in_c = generate(model, prompts, 8, **options)
    assert len(set(in_c.response_length.tolist())) > 3
    with native.in_torch():
        in_torch = generate(model, prompts, 8, **options)
    assert torch.equal(in_c.tokens, in_torch.tokens)
    torch.testing.assert_close(in_c.logprob, in_torch.logprob, atol=1e-4, rtol=0)


def test_samples_read_their_prompt_in_one_slot(random_model):
    cache, token, position = filled(random_model, 6)
    prompts = [torch.randn(4, 2, 9, 32) for _ in range(2)]
    for slot in range(6):
        cache.insert(slot, prompts[slot // 3], -prompts[slot // 3])
    position = position.clamp(min=10)
    expected = decode(random_model, cache, token, position, context=48)
    unread = torch.tensor([1, 2, 4, 5])
    cache.k[:, unread, :, :9] = cache.v[:, unread, :, :9] = torch.nan
    cache.native = native.native_step(random_model, cache)
    for slot in range(6):
        cache.native.insert(slot, prompts[slot // 3])
    cache.native.checked = True
    assert torch.equal(decode(random_model, cache, token, position, context=48), expected)


@pytest.mark.parametrize("add", [False, True])
@pytest.mark.parametrize("transposed", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("sizes", [(16, 5, 3), (100, 33, 700), (17, 1, 1), (130, 3100, 385), (16, 4, 0)])
def test_a_product_in_c_is_that_of_float64(sizes, transposed, add):
    torch.manual_seed(0)
    rows, columns, terms = sizes
    a = torch.randn(terms, rows).T if transposed[0] else torch.randn(rows, 2 * terms)[:, ::2]
    b = torch.randn(columns, terms).T if transposed[1] else torch.randn(terms, columns)
    before = torch.ones(rows, columns + 3)
    out = before.clone()
    native.product(a, b, out[:, :columns], add)
    expected = a.double() @ b.double() + add * before[:, :columns]
    torch.testing.assert_close(out[:, :columns].double(), expected, atol=2e-4, rtol=1e-5)
    assert torch.equal(out[:, columns:], before[:, columns:])  # nothing is written beside it


def test_a_row_of_a_product_depends_on_neither_threads_nor_neighbours(monkeypatch):
    torch.manual_seed(0)
    a, b = torch.randn(100, 700), torch.randn(700, 90)
    whole = native.product(a, b)
    for threads in (2, 3):
        monkeypatch.setattr(native, "THREADS", threads)
        for _ in range(50):
            assert torch.equal(native.product(a, b), whole)
    assert torch.equal(native.product(a[41:60], b[:, 7:50]), whole[41:60, 7:50])


@pytest.mark.parametrize("tokens", [1, 8, 37])
def test_swiglu_in_c_is_that_of_torch(monkeypatch, tokens):
    torch.manual_seed(0)
    gate_up, grad, found = 5 * torch.randn(tokens, 96), torch.randn(tokens, 48), []
    gate_up[0, :4] = torch.tensor([1e4, -1e4, 90, -90])
    for _ in range(2):
        leaf = gate_up.clone().requires_grad_()
        y = swiglu(leaf)
        y.backward(grad)
        found.append((y, leaf.grad))
        monkeypatch.setattr(native, "library", lambda: None)
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected, atol=2e-6, rtol=2e-6)


def test_torch_keeps_a_quarter_of_the_threads():
    code = """
import torch
from kernels import native
torch.set_num_threads({})
native.share_threads()
print(native.threads(), torch.get_num_threads())
"""
    for given, expected in ((1, "1 1"), (3, "3 1"), (9, "9 2")):
        line = [sys.executable, "-c", code.format(given)]
        done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
        assert done.stdout.strip() == expected, done.stderr


def test_without_a_compiler_nothing_is_said(tmp_path):
    code = "import torch; from kernels import native; print(native.library())"
    for change in ({"PATH": str(tmp_path), "HOME": str(tmp_path), "TMPDIR": str(tmp_path)}, {"TTRL_C": "0"}):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, env=change, capture_output=True, text=True
        )
        assert (done.stdout, done.stderr) == ("None\n", "")
