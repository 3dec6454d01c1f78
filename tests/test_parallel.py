"""One model over several ranks against one: rollouts, gradients, weights, samplers, checkpoints, bytes.

The cases are those of several_ranks.py. Two processes of gloo run all of them, and this one runs them alone;
what is compared here is what each of them saw. Four processes are the long tier.
"""

import dataclasses
import shutil
import subprocess
import sys

import pytest
import several_ranks
import torch
from conftest import ROOT, SMALL, command, environment, lines_of
from several_ranks import FAULTS, FOUR, MODELS, SPLITS, TIED, TWO, Case, InSlices, Split
from test_run import largest_difference, leave_in_the_middle, moved, train, weights

from distributed import ranks
from distributed import weights as weights_module
from model import Transformer

SCRIPT = ROOT / "tests" / "several_ranks.py"
# Two ranks sum in another order than one: gradients, and the outputs of a sampler's heads.
NORM, LOGITS = 1e-4, 2e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Models, and a checkpoint that one rank has written; this process is a group of one meanwhile."""
    folder = tmp_path_factory.mktemp("ranks")
    several_ranks.write_models(folder / "models")
    ranks.start_processes("cpu")
    saved = several_ranks.save_after_a_step(folder / "models", folder / "saved by one rank", Split())
    torch.save(saved, folder / "saved by one rank.pt")
    yield folder
    torch.distributed.destroy_process_group()


def started(folder, count):
    line = [sys.executable, str(SCRIPT), str(folder)]
    options = {"env": environment(), "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*line, str(rank), str(count)], **options) for rank in range(count)]


def results(folder, processes):
    """What each rank saw: a list of {name of the case: ...}."""
    errors = [process.communicate(timeout=900)[1] for process in processes]
    assert not any(process.returncode for process in processes), "\n".join(error[-3000:] for error in errors)
    assert not any("returned a view" in error for error in errors)  # FSDP2 warns of it
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(len(processes))]


@pytest.fixture(scope="module")
def alone(folder):
    """alone(case): what one rank sees of it."""
    seen = {}

    def run(case):
        key = case.alone()
        if key not in seen:
            seen[key] = several_ranks.train(key, folder / "models")
        return seen[key]

    return run


@pytest.fixture(scope="module")
def two(folder, alone):
    """What two ranks saw. This process makes its own side meanwhile."""
    processes = started(folder, 2)
    for case in TWO.values():
        alone(case)
    return results(folder, processes)


@pytest.fixture(scope="module")
def four(folder, tmp_path_factory):
    apart = tmp_path_factory.mktemp("four")
    for name in ("models", "saved by one rank"):
        (apart / name).symlink_to(folder / name)
    return results(apart, started(apart, 4))


LONG = pytest.mark.long


@pytest.fixture(scope="module", params=["two", pytest.param("four", marks=LONG)])
def several(request):
    """What two ranks saw, and in the long tier what four saw."""
    return request.getfixturevalue(request.param)


# ----------------------------------------------------------------------------------------------------------
# learning


def differences(case, one, several, models):
    """What of a case is not the same on several ranks as on one: a set of names, empty if all is well."""
    found, base = set(), dict(Transformer.from_pretrained(models / case.model).named_parameters())
    tokens = {}
    for seen in several:
        tokens.update(seen["tokens"])
        same_shape = one["norms"].shape == seen["norms"].shape
        if not (same_shape and torch.allclose(seen["norms"], one["norms"], rtol=NORM, atol=0)):
            found.add("norms")
        learned = largest_difference(base, one["weights"])
        if largest_difference(one["weights"], seen["weights"]) > 0.01 * learned:
            found.add("weights")
        if largest_difference(several[0]["weights"], seen["weights"]) > 0:
            found.add("copies")
        if seen["sampler"]:
            found.add("sampler")
        if seen["moved"]:
            found.add("addresses")
    return found | ({"tokens"} if tokens != one["tokens"] else set())


@pytest.mark.parametrize("ranks, name", [
    *(("two", name) for name in TWO), *(pytest.param("four", name, marks=LONG) for name in FOUR)
])  # fmt: skip
def test_several_ranks_learn_what_one_learns(request, folder, alone, ranks, name):
    """Tokens of the first step, unclipped norm of every update, weights; samplers at their places."""
    case, seen = {"two": TWO, "four": FOUR}[ranks][name], request.getfixturevalue(ranks)
    one = alone(case)
    assert len(one["tokens"]) == 18 and len({len(ids) for ids in one["tokens"].values()}) > 3
    assert len(one["norms"]) == (6 if case.questions_per_update == 1 else 4) and one["norms"].min() > 0.01
    assert differences(case, one, [results[name] for results in seen], folder / "models") == set()


@pytest.mark.parametrize("name", TWO)
def test_several_ranks_measure_what_one_measures(alone, two, name):
    """Entropy and certainty of every response, whatever it is that the ranks share out."""
    one, several = alone(TWO[name])["measures"], {}
    for seen in two:
        several.update(seen[name]["measures"])
    assert several.keys() == one.keys() and len(one) == 18
    for key, values in one.items():
        assert len(values["certainty"]) == len(alone(TWO[name])["tokens"][key])
        for field in ("entropy", "certainty"):
            assert several[key][field].tolist() == pytest.approx(values[field].tolist(), abs=1e-5)
        assert min(values["certainty"]) > 0 and min(values["entropy"]) > 0


@pytest.mark.parametrize("one, other", [
    ("DDP", "whole shards"),  # DDP is shards that are whole
    ("DDP, one micro-batch", "shards, one micro-batch"),  # and two numbers have one sum
])  # fmt: skip
def test_they_are_the_same_bitwise(two, one, other):
    for seen in two:
        # The norm of shards is summed shard by shard. It clips nothing here, or weights would follow it.
        torch.testing.assert_close(seen[one]["norms"], seen[other]["norms"], rtol=1e-6, atol=0)
        assert largest_difference(seen[one]["weights"], seen[other]["weights"]) == 0


@pytest.mark.parametrize("split", [InSlices(), Split(offload=True)], ids=["one shard", "in host memory"])
def test_one_rank_in_slices_is_one_rank_bitwise(folder, alone, split):
    case = Case(TIED, split)
    seen = several_ranks.train(case, folder / "models")
    assert seen["norms"].equal(alone(case)["norms"])
    assert largest_difference(seen["weights"], alone(case)["weights"]) == 0


def test_metrics_are_of_all_ranks(alone, two):
    """Entropy, KL and the gap are means over the tokens of all ranks, and each rank knows them."""
    for name in ("DDP", "shards", "shards and a sampler on two ranks"):
        for seen in two:
            mine, theirs = seen[name]["metrics"][0], alone(TWO[name])["metrics"][0]
            assert mine.keys() == theirs.keys()
            exact = ("trained_tokens", "updates", "skipped_updates", "lr")
            assert all(mine[key] == theirs[key] for key in exact)
            for key in ("entropy", "kl", "grad_norm", "grad_norm_max"):
                assert mine[key] == pytest.approx(theirs[key], rel=NORM), key
            assert mine["logprob_gap"] < 1e-5


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_mistake_is_noticed(folder, alone, two, name):
    case, changed = FAULTS[name]
    several = [seen[f"planted: {name}"] for seen in two]
    assert changed in differences(case, alone(case), several, folder / "models")


# ----------------------------------------------------------------------------------------------------------
# sampling


def test_a_sampler_on_several_ranks_has_the_logits_of_one(folder, several):
    assert several[0]["logits 2"].keys() == MODELS.keys()
    for key in ("logits 2", "logits 4")[: len(several) // 2]:
        for name, logits in several[0][key].items():
            whole = several_ranks.next_logits(folder / "models", name, None)
            assert whole.std() > 1
            # Of all logits: a small one is a sum of terms as large as the others'.
            rounding = LOGITS * whole.abs().max().item()
            for seen in several:
                torch.testing.assert_close(seen[key][name], whole, rtol=0, atol=rounding)
                assert seen[key][name].equal(logits), "two ranks of a sampler compute apart"


def test_an_evaluation_may_have_fewer_rows_than_ranks(folder, several):
    """Ranks and groups without a row wait for none."""
    [[alone]] = several_ranks.evaluate_few(folder / "models", Split())["unsharded"]
    for key in {2: ("few 1", "few 2"), 4: ("few 2", "few 4")}[len(several)]:
        [[response]] = several[0][key]["unsharded"]
        assert response.logprob.tolist() == pytest.approx(alone.logprob.tolist(), abs=1e-5)
        assert dataclasses.replace(response, logprob=alone.logprob) == alone
        assert [seen[key]["rows"] for seen in several] == [1] + [0] * (len(several) - 1)


# ----------------------------------------------------------------------------------------------------------
# saved and resumed


def same(a, b):
    return a.keys() == b.keys() and all(a[name].equal(b[name]) for name in a)


def test_several_ranks_resume_what_one_and_several_saved(folder, several):
    """Whatever wrote it, whatever reads it: weights and moments bitwise, and training goes on as it did."""
    for source in ("one rank", *SPLITS):
        written = [seen[f"saved by {source}"] for seen in several if source in SPLITS]
        written = written or [torch.load(folder / "saved by one rank.pt")]
        for name in SPLITS:
            for rank, seen in enumerate(several):
                saved, resumed = written[rank % len(written)], seen[f"{source} to {name}"]
                assert same(saved["saved"], resumed["saved"]), f"{source} to {name}"
                learned = largest_difference(saved["saved"], saved["end"])
                assert largest_difference(saved["end"], resumed["end"]) < 0.01 * learned
                if source == name:
                    assert same(saved["end"], resumed["end"]), f"{source} goes on"


def test_one_rank_resumes_what_two_saved(folder, two):
    for source in SPLITS:
        files = {path.name for path in (folder / f"saved by {source}" / "step-000001").iterdir()}
        count = SPLITS[source].shard
        shards = [f"{number}-of-{count}.safetensors" for number in range(1, count + 1)]
        names = [f"{kind}-{part}" for kind in ("weights", "optimizer") for part in shards]
        assert files == {*names, "state.json", "SHA256SUMS"}
        resumed = several_ranks.resume(folder / "models", folder / f"saved by {source}", Split())
        assert same(two[0][f"saved by {source}"]["saved"], resumed["saved"])
        moments = [name for name in resumed["saved"] if name.startswith("exp_avg ")]
        assert moments and all(resumed["saved"][name].abs().max() > 0 for name in moments)


def test_moments_of_another_slice_are_noticed(two):
    for seen in two:
        saved, resumed = seen["saved by shards"], seen["moments in the wrong shard"]
        assert not same(saved["saved"], resumed["saved"])
        learned = largest_difference(saved["saved"], saved["end"])
        assert largest_difference(saved["end"], resumed["end"]) > 0.01 * learned


# ----------------------------------------------------------------------------------------------------------
# bytes


def test_no_group_is_made_while_weights_are_read(folder, monkeypatch):
    """A rank whose files are damaged would leave the others waiting in it."""
    load, made = several_ranks.run_module.load_models, []

    def load_and_note(*arguments):
        monkeypatch.setattr(several_ranks.parallel, "mesh", lambda *line: made.append(line) or mesh(*line))
        return load(*arguments)

    mesh = several_ranks.parallel.mesh
    monkeypatch.setattr(several_ranks.run_module, "load_models", load_and_note)
    several_ranks.open_case(Case("deep", Split(offload=True), kl=0.1), folder / "models")
    assert not made


def held_little(held):
    """A rank's own shards, and one tensor besides, which may be there twice while it is joined."""
    return held["own"] + held["largest"] <= held["loading"] <= held["own"] + 2.2 * held["largest"]


def test_loading_holds_one_tensor_besides_its_slice(two):
    for seen in two:
        for name, share in (("export shards", 2), ("export DDP", 1)):
            held = seen[name]
            assert held["own"] * share == pytest.approx(held["whole"], rel=0.02)
            assert held_little(held) and held["whole"] > 4 * held["largest"]


def test_loading_all_tensors_first_would_be_noticed(folder, tmp_path, monkeypatch):
    read = weights_module.read_weights
    monkeypatch.setattr(weights_module, "read_weights", lambda *arguments: list(read(*arguments)))
    held = several_ranks.load_and_export(folder / "models", tmp_path, Split())
    assert held["loading"] >= held["own"] + held["whole"] and not held_little(held)


def test_export_is_the_same_and_holds_one_file(folder, two):
    """Several files, the same bytes under shards as under DDP; no rank holds more than one of them."""
    here, there = (folder / f"export {name}" / "model" for name in ("DDP", "shards"))
    names = sorted(path.name for path in here.iterdir())
    assert sum(name.endswith(".safetensors") for name in names) > 2
    assert names == sorted(path.name for path in there.iterdir())
    assert all((here / name).read_bytes() == (there / name).read_bytes() for name in names)
    trained = dict(Transformer.from_pretrained(here).named_parameters())
    base = dict(Transformer.from_pretrained(folder / "models" / "deep").named_parameters())
    assert same(trained, base)
    for seen in two:
        held = seen["export shards"]
        assert held["exporting"] <= several_ranks.FILE_SIZE + 3 * held["largest"] < held["whole"]


# ----------------------------------------------------------------------------------------------------------
# the real program, killed


def check_it_went_on(out, printed, undisturbed):
    """All steps are there once, and the weights are as they would have been: to rounding."""
    assert "resume   from step" in printed
    assert [line["step"] for line in lines_of(out / "metrics.jsonl")] == [0, 1, 2, 3, 4]
    assert moved(undisturbed) > 1e-3
    assert largest_difference(weights(out), weights(undisturbed)) < 0.01 * moved(undisturbed)


@pytest.fixture(scope="module")
def sharded(few_questions, tmp_path_factory):
    """(a run of two ranks with --shard 2, the same killed on its way)."""
    out = tmp_path_factory.mktemp("in shards")
    train(few_questions, out / "run", "--shard", "2", ranks=2)
    kill(few_questions, out / "killed", 2)
    return out / "run", out / "killed"


def kill(few_questions, out, shard):
    flags = ["--data", few_questions, "--out", out, *SMALL]
    line = command(*flags, "--shard", shard, ranks=shard) if shard > 1 else command(*flags)
    leave_in_the_middle(line, out)


def test_a_killed_run_in_slices_goes_on_bitwise(few_questions, sharded, tmp_path):
    out = shutil.copytree(sharded[1], tmp_path / "run")
    check_it_went_on(out, train(few_questions, out, "--shard", "2", ranks=2), sharded[0])
    assert same(weights(out), weights(sharded[0]))


def test_one_rank_goes_on_with_what_two_left(few_questions, sharded, tmp_path):
    """How a model is spread is no setting of the run: no flag is complained about."""
    out = shutil.copytree(sharded[1], tmp_path / "run")
    printed = train(few_questions, out)
    check_it_went_on(out, printed, sharded[0])
    assert "ranks was 2 and is 1: the run goes on, but not bitwise the same" in printed


SPREAD = {"copies": [], "shards": ["--shard", "2"], "heads": ["--sampler-ranks", "2"],
          "host": ["--shard", "2", "--offload"]}  # fmt: skip


@pytest.mark.long
@pytest.mark.parametrize("then", SPREAD)
def test_two_ranks_go_on_with_what_two_left(few_questions, sharded, tmp_path, then):
    out = shutil.copytree(sharded[1], tmp_path / "run")
    check_it_went_on(out, train(few_questions, out, *SPREAD[then], ranks=2), sharded[0])


@pytest.mark.long
@pytest.mark.parametrize("before, then", [(1, 2), (4, 2)])
def test_another_number_of_ranks_goes_on_in_slices(few_questions, sharded, tmp_path, before, then):
    out = tmp_path / "run"
    kill(few_questions, out, before)
    check_it_went_on(out, train(few_questions, out, "--shard", then, ranks=then), sharded[0])
