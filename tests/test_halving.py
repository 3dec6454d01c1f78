"""Out of memory in the middle of a run: the same work with half of a budget has the same result.

On a CPU nothing fails by itself: errors are raised above a number of rows.
"""

import re

import pytest
import several_ranks
import torch
from conftest import SMALL, lines_of, program

import rollout as rollout_module
import ttrl
from distributed import halving, ranks
from model import Transformer

ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried"),
]
CASE = several_ranks.Case(several_ranks.TIED, questions_per_update=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    several_ranks.write_models(folder)
    ranks.start_processes("cpu")
    yield folder
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_a_rollout_in_halves_has_the_same_responses(models, monkeypatch, capsys, error):
    """Of five rows at once two are left. That they are two is seen by what decoding is given."""
    _, whole = several_ranks.begin(CASE, models)
    decode, counts = rollout_module.decode, []

    def failing(model, cache, token, *rest):
        counts.append(len(token))
        if len(token) > 3:
            raise error
        return decode(model, cache, token, *rest)

    monkeypatch.setattr(rollout_module, "decode", failing)
    run, halves = several_ranks.begin(CASE, models)
    assert max(counts) == 5 and max(counts[counts.index(5) + 1 :]) == 2
    assert run.config.rollout_tokens == 52
    assert capsys.readouterr().err == "ttrl.py: out of memory in step 1: --rollout-tokens 105 -> 52\n"
    assert halves.tokens.equal(whole.tokens) and halves.finished.equal(whole.finished)
    torch.testing.assert_close(halves.logprob, whole.logprob, rtol=1e-5, atol=1e-6)


def test_a_kept_engine_is_built_anew_with_half_the_slots(models, monkeypatch):
    run, whole = several_ranks.begin(CASE, models)
    built, make = [], rollout_module.Engine.__init__

    def counting(self, model, slots, *rest):
        assert run.engine is None, "two engines at once"
        built.append(slots)
        make(self, model, slots, *rest)

    run.engine = first = rollout_module.Engine(run.sampler, 5, 21, 12, run.eos_ids)
    monkeypatch.setattr(rollout_module.Engine, "__init__", counting)
    decode = rollout_module.decode

    def failing(model, cache, token, *rest):
        if cache.k.shape[1] > 2:
            raise ERRORS[0]
        return decode(model, cache, token, *rest)

    monkeypatch.setattr(rollout_module, "decode", failing)
    halves = ttrl.sample(run, several_ranks.PROMPTS, 6, stream="train", step=1, temperature=1.0)
    assert built == [2] and run.engine is not first and halves.tokens.equal(whole.tokens)


@pytest.mark.parametrize("budget", [80, 5000], ids=["a pass without exchange", "the exchange"])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_an_update_in_halves_is_the_same(models, monkeypatch, capsys, when, budget):
    """Above 3 rows the second pass over a model fails, or each that is the only one of its update."""
    case = CASE._replace(micro_batch_tokens=budget)
    before, rows_of = several_ranks.train(case, models), []
    forward = Transformer.forward

    def fail(*_):
        if torch.is_grad_enabled() or when == "backward":
            rows_of.clear()
            raise ERRORS[0]

    def failing(self, rows, temperature, **options):
        if not torch.is_grad_enabled():  # the reference, or what rewards.measure asks for
            return forward(self, rows, temperature, **options)
        rows_of.append(len(rows))
        fails = len(rows) > 3 and (budget == 5000 or len(rows_of) == 2)
        if fails and when == "forward":
            fail()
        output = forward(self, rows, temperature)
        if fails:  # in the first layer, whose gradients come last
            hook = self.layers[0].self_attn.qkv_proj.bias.register_hook(lambda _: hook.remove() or fail())
        return output

    monkeypatch.setattr(Transformer, "forward", failing)
    after, error = several_ranks.train(case, models), capsys.readouterr().err
    said = re.findall(r"ttrl.py: out of memory in step 1: --micro-batch-tokens (\d+) -> (\d+)", error)
    assert said and int(said[0][1]) == int(said[0][0]) // 2
    assert before["tokens"] == after["tokens"] and len(before["norms"]) == len(after["norms"]) == 4
    torch.testing.assert_close(after["norms"], before["norms"], rtol=1e-4, atol=0)
    for name, weight in before["weights"].items():
        torch.testing.assert_close(after["weights"][name], weight, rtol=1e-3, atol=1e-4)
    for one, other in zip(before["metrics"], after["metrics"], strict=True):
        assert one["trained_tokens"] == other["trained_tokens"] and one.keys() == other.keys()
        assert all(other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-6) for name in one)


def test_another_error_is_raised(models, monkeypatch):
    run = several_ranks.open_case(CASE, models)
    monkeypatch.setattr(ttrl, "generate", lambda *_, **__: torch.ones(2) @ torch.ones(3))
    with pytest.raises(RuntimeError, match="size"):
        ttrl.sample(run, several_ranks.PROMPTS, 6, stream="train", step=1, temperature=1.0)
    assert run.config.rollout_tokens == 105


class Left(Exception):
    pass


def test_a_single_row_is_the_end(models, monkeypatch):
    def leave(code, why, alone):
        raise Left(why)

    def failing(*_, **__):
        raise MemoryError

    monkeypatch.setattr(halving, "leave", leave)
    run = several_ranks.open_case(CASE, models)
    monkeypatch.setattr(ttrl, "generate", failing)
    with pytest.raises(Left, match="in an evaluation with a single row"):
        ttrl.sample(run, several_ranks.PROMPTS, 6, stream="eval", step=0, temperature=1.0)
    assert run.config.rollout_tokens == 21  # 105, 52, 26, 21: one row


# ----------------------------------------------------------------------------------------------------------
# the real program


def broken(monkeypatch, tmp_path, few_questions, fault, **options):
    monkeypatch.setenv("BROKEN", fault)
    monkeypatch.setenv("FROM_STEP", "2")
    flags = ["--data", few_questions, "--out", tmp_path / "run", *SMALL, "--eval-samples", "2"]
    return program(tmp_path, *flags, script="tests/broken_run.py", **options).stderr


def test_a_run_goes_on_with_less_memory(few_questions, tmp_path, monkeypatch):
    error = broken(monkeypatch, tmp_path, few_questions, "memory")
    assert re.search(r"ttrl.py: out of memory in step 2: --rollout-tokens \d+ -> \d+\n", error)
    assert re.search(r"ttrl.py: out of memory in step 2: --micro-batch-tokens \d+ -> \d+\n", error)
    assert "in step 3" not in error  # the smaller budgets stay
    assert len(lines_of(tmp_path / "run" / "metrics.jsonl")) == 5


def test_a_rank_that_has_no_memory_alone_says_what_to_change(few_questions, tmp_path, monkeypatch):
    """It samples again by itself; its update would need the other rank."""
    error = broken(monkeypatch, tmp_path, few_questions, "memory", ranks=2, code=1)
    assert re.search(r"ttrl.py: rank 1: out of memory in step 2: --rollout-tokens \d+ -> \d+\n", error)
    said = re.search(r"rank 1: out of memory in step 2 with --micro-batch-tokens (\d+): rerun the same "
                     r"command with --micro-batch-tokens (\d+)\n", error)  # fmt: skip
    assert int(said[2]) == int(said[1]) // 2 and "exitcode  : 1 " in error


def test_a_single_row_that_does_not_fit_ends_the_run(few_questions, tmp_path, monkeypatch):
    error = broken(monkeypatch, tmp_path, few_questions, "no_memory", code=1)
    assert "ttrl.py: out of memory in step 2 with a single row; see docs/troubleshooting.md" in error
    assert (tmp_path / "run" / "checkpoint" / "step-000001").exists()
