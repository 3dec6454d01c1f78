"""Files in Hugging Face format: what is read, what is written, and every damage refused in a sentence."""

import json
import os
from types import SimpleNamespace

import pytest
import torch
from parity import (
    FIXED,
    LLAMA3,
    MAX_POSITIONS,
    TOLERANCE,
    YARN,
    assert_one_sentence,
    difference,
    draw_tokens,
    write_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from model import ModelConfig, Transformer
from support import pretrained
from support.pretrained import check_vocabulary, hf_tensors


@pytest.fixture
def folder(tmp_path):
    """A good model of one shard, to be damaged."""
    path = tmp_path / "some-model"
    path.mkdir()
    write_model(path, FIXED)
    return path


def replace(folder, **tensors):
    """Write other tensors into model.safetensors; None takes one away."""
    weights = load_file(folder / "model.safetensors") | tensors
    kept = {name: tensor for name, tensor in weights.items() if tensor is not None}
    save_file(kept, folder / "model.safetensors")


def shard(folder):
    """Cut model.safetensors in two, with an index, as the hub has it."""
    weights = load_file(folder / "model.safetensors")
    names = sorted(weights)
    number = {name: 1 + (i >= len(names) // 2) for i, name in enumerate(names)}
    files = {name: f"model-0000{number[name]}-of-00002.safetensors" for name in names}
    for file in sorted(set(files.values())):
        save_file({name: weights[name] for name in names if files[name] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "model.safetensors").unlink()
    return files


def refused(folder, *words, kind=ValueError):
    with pytest.raises(kind) as caught:
        Transformer.from_pretrained(folder)
    assert type(caught.value) is kind
    assert_one_sentence(caught.value, *words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sharded", [False, True])
def test_reads_every_dtype_and_shards(folder, dtype, sharded):
    replace(folder, **{name: w.to(dtype) for name, w in load_file(folder / "model.safetensors").items()})
    want = load_file(folder / "model.safetensors")
    if sharded:
        shard(folder)
    ours = Transformer.from_pretrained(folder)
    got = hf_tensors(ours.config, dict(ours.named_parameters()))
    assert got.keys() == want.keys()
    assert all(torch.equal(got[name], want[name].float()) for name in want)
    assert {tensor.dtype for tensor in got.values()} == {torch.float32}
    assert all(p.requires_grad and not p.is_meta for p in ours.parameters())
    half = Transformer.from_pretrained(folder, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    assert half.rope_frequency.dtype == torch.float32


@pytest.mark.parametrize("changes", [
    {"tie_word_embeddings": True},
    {"model_type": "ministral", "layer_types": ["full_attention", "sliding_attention"]},
])  # fmt: skip
def test_reads_what_transformers_writes(tmp_path, changes):
    (tmp_path / "scratch").mkdir()
    reference = write_model(tmp_path / "scratch", FIXED | changes)
    reference.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    ours = Transformer.from_pretrained(tmp_path / "model")
    assert difference(ours, reference, draw_tokens(FIXED, (2, 20))) < TOLERANCE


@pytest.mark.parametrize("changes", [
    {}, {"tie_word_embeddings": True}, {"model_type": "qwen3", "rope_scaling": {"rope_type": "yarn", **YARN}}
])  # fmt: skip
@pytest.mark.parametrize("file_size", [5 * 10**9, 20_000])
def test_save_pretrained_round_trip(tmp_path, monkeypatch, capfd, changes, file_size):
    config = {**FIXED, **changes, "torch_dtype": "bfloat16", "eos_token_id": [1, 2], "note": "kept"}
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    write_model(source, config)
    (source / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    monkeypatch.setattr(pretrained, "FILE_SIZE", file_size)
    capfd.readouterr()
    ours = Transformer.from_pretrained(source)
    ours.save_pretrained(target)
    ours.save_pretrained(target)  # over itself, as a run does
    ours.source = target
    ours.save_pretrained(target)
    assert "".join(capfd.readouterr()) == ""
    files = "model.safetensors" if file_size > 20_000 else "model-*.safetensors"
    assert sorted(target.glob("*.safetensors")) == sorted(target.glob(files)) != []
    del config["torch_dtype"]
    added = {"dtype": "float32", "architectures": [f"{config['model_type'].capitalize()}ForCausalLM"]}
    assert json.loads((target / "config.json").read_text()) == config | added
    assert (target / "generation_config.json").read_text() == '{"eos_token_id": [1, 2]}'
    theirs = AutoModelForCausalLM.from_pretrained(target, attn_implementation="eager")
    assert theirs.dtype == torch.float32
    assert difference(ours, theirs, draw_tokens(FIXED, (2, 20))) < TOLERANCE
    again = Transformer.from_pretrained(target)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), again.parameters(), strict=True))


def test_a_config_without_architectures_gets_them_when_it_is_saved(folder, tmp_path):
    """Such configs come from converted files. vLLM finds a model's class by them."""
    fields = json.loads((folder / "config.json").read_text())
    changed = {"architectures": None, "rms_norm_eps": 9.999999974752427e-07}  # 1e-6, in fp32
    (folder / "config.json").write_text(json.dumps(fields | changed))
    Transformer.from_pretrained(folder).save_pretrained(tmp_path / "to")
    written = json.loads((tmp_path / "to" / "config.json").read_text())
    assert written["architectures"] == [f"{fields['model_type'].capitalize()}ForCausalLM"]
    assert written["rms_norm_eps"] == changed["rms_norm_eps"]


def test_tied_head_is_one_parameter(tmp_path):
    write_model(tmp_path, FIXED | {"tie_word_embeddings": True})
    ours = Transformer.from_pretrained(tmp_path)
    assert ours.lm_head.weight is ours.embed_tokens.weight
    assert "lm_head.weight" not in dict(ours.named_parameters())
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    replace(tmp_path, **{"lm_head.weight": embedding.clone()})  # some files have both
    Transformer.from_pretrained(tmp_path)
    replace(tmp_path, **{"lm_head.weight": embedding + 1})
    refused(tmp_path, "config.json", "tie_word_embeddings", "lm_head.weight")


def test_weights_outlive_their_file(folder):
    """safetensors maps the file: without a copy, writing over it would change the model, or kill us."""
    ours = Transformer.from_pretrained(folder)
    before = [p.detach().clone() for p in ours.parameters()]
    with open(folder / "model.safetensors", "r+b") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(0)
        file.write(bytes(size))
    assert all(torch.equal(a, b) for a, b in zip(before, ours.parameters(), strict=True))


def test_max_positions_is_what_config_says(folder):
    assert ModelConfig.from_pretrained(folder).max_positions == MAX_POSITIONS


def test_old_rotary_buffers_are_ignored(folder):
    replace(folder, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)})
    Transformer.from_pretrained(folder)


@pytest.mark.parametrize("keep", [0, 4, 8, 100, -1])
@pytest.mark.parametrize("sharded", [False, True])
def test_truncated_weights_are_refused(folder, keep, sharded):
    path = folder / "model.safetensors"
    if sharded:
        path = folder / sorted(shard(folder).values())[-1]
    path.write_bytes(path.read_bytes()[:keep])
    refused(folder, path, "safetensors")


@pytest.mark.parametrize("text", [
    b"\xff" * 64, b"not a model at all, but long enough to have a header", b"\x02" + b"\0" * 7 + b"{}" + b"x"
])  # fmt: skip
def test_corrupt_weights_are_refused(folder, text):
    (folder / "model.safetensors").write_bytes(text)
    refused(folder, folder / "model.safetensors", "safetensors")


@pytest.mark.parametrize("name, words", [
    ("model.safetensors", ("pytorch_model.bin", "save_pretrained")), ("config.json", ("no config.json here",))
])  # fmt: skip
def test_a_missing_file_is_refused(folder, name, words):
    (folder / "pytorch_model.bin").write_bytes(b"pickle")  # as deepseek-math-7b-instruct has it
    (folder / name).unlink()
    refused(folder, folder, *words, kind=FileNotFoundError)


def test_missing_shard_is_refused(folder):
    files = shard(folder)
    gone = folder / sorted(files.values())[-1]
    gone.unlink()
    refused(folder, gone, "model.safetensors.index.json", kind=FileNotFoundError)


def test_shard_without_its_tensor_is_refused(folder):
    files = shard(folder)
    name = "model.norm.weight"
    weights = load_file(folder / files[name])
    del weights[name]
    save_file(weights, folder / files[name])
    refused(folder, folder / files[name], name, "model.safetensors.index.json")


@pytest.mark.parametrize(
    "text", ["", "[]", "{", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}']
)
def test_damaged_index_is_refused(folder, text):
    shard(folder)
    (folder / "model.safetensors.index.json").write_text(text)
    refused(folder, folder / "model.safetensors.index.json")


@pytest.mark.parametrize("name, tensor, words", [
    ("model.norm.weight", None, ""), ("lm_head.weight", None, ""),
    ("model.layers.0.self_attn.q_proj.bias", torch.zeros(32), ""),
    ("model.layers.2.mlp.up_proj.weight", torch.zeros(32, 24), ""),
    ("model.embed_tokens.weight", torch.zeros(41, 24), " is [41, 24]"),
    ("model.norm.weight", torch.zeros(24, dtype=torch.int8), " is torch.int8"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_refused(folder, name, tensor, words):
    replace(folder, **{name: tensor})
    refused(folder, folder, name + words)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused(folder, dtype, value):
    name = "model.layers.1.mlp.up_proj.weight"
    weight = load_file(folder / "model.safetensors")[name].to(dtype)
    weight[3, 5] = value
    replace(folder, **{name: weight})
    refused(folder, folder / "model.safetensors", name, "infinite or not numbers")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_large_weights_are_finite(folder, dtype):
    """Their sum overflows, in their own precision and in fp32."""
    largest = torch.finfo(dtype).max / 2
    weights = load_file(folder / "model.safetensors")
    replace(folder, **{name: torch.full_like(w, largest, dtype=dtype) for name, w in weights.items()})
    ours = Transformer.from_pretrained(folder)
    assert all(p.isfinite().all() and p.max() == largest for p in ours.parameters())


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "\0"])
def test_config_that_is_no_json_is_refused(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, folder / "config.json", "JSON")


SLIDING = ["full_attention", "sliding_attention"]
BAD_FIELDS = [  # (what the sentence names, the fields)
    *(("model_type", {"model_type": value}) for value in ("mixtral", "qwen3_moe", "", None, 3, ["llama"])),
    ("quantization_config", {"quantization_config": {"quant_method": "gptq"}}),
    ("auto_map", {"auto_map": {"AutoModelForCausalLM": "modeling.Evil"}}),
    ("hidden_act", {"hidden_act": "gelu"}),
    ("hidden_act", {"hidden_act": 3}),
    *((name, {name: value}) for name in pretrained.SIZES for value in (0, -1, "3", 2.5, True, [3], 10**30)),
    *((name, {name: None})
      for name in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads")),
    *(("rms_norm_eps", {"rms_norm_eps": value}) for value in (-1.0, "small", None, float("nan"))),
    ("num_key_value_heads", {"num_key_value_heads": 3}),
    ("head_dim", {"head_dim": 7}),
    ("head_dim", {"model_type": "qwen2", "head_dim": 3}),
    ("attention_bias", {"attention_bias": "yes"}),
    ("tie_word_embeddings", {"tie_word_embeddings": "no"}),
    *(("rope_theta", {"rope_theta": value}) for value in (0, -1.0, "10000", None, float("inf"))),
    *(("rope_type", {"rope_scaling": {"rope_type": kind, "factor": 2.0}})
      for kind in ("longrope", "su", None, ["linear"])),
    ("rope_type", {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}}),
    *(("rope_scaling", {"rope_scaling": value}) for value in ("linear", 3, [2])),
    ("rope_parameters", {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}}),
    *(("factor", {"rope_scaling": {"type": kind}}) for kind in ("linear", "dynamic", "yarn", "llama3")),
    *(("factor", {"rope_scaling": {"type": "linear", "factor": value}})
      for value in (None, "2", 0, -2.0, True)),
    *((field, {"rope_scaling": {"rope_type": "llama3", **LLAMA3, field: None}}) for field in LLAMA3),
    ("low_freq_factor", {"rope_scaling": {"rope_type": "llama3", **LLAMA3, "low_freq_factor": 4.0}}),
    ("beta_fast", {"rope_scaling": {"rope_type": "yarn", **YARN, "beta_fast": "32"}}),
    ("original_max", {"rope_scaling": {"rope_type": "yarn", **YARN, "original_max_position_embeddings": 0}}),
    ("partial_rotary_factor", {"partial_rotary_factor": 0.5}),
    ("partial_rotary_factor", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}),
    ("layer_types", {"model_type": "qwen2", "layer_types": ["full_attention"]}),
    ("layer_types", {"model_type": "qwen2", "layer_types": ["full_attention", "linear_attention"]}),
    ("layer_types", {"model_type": "qwen3", "layer_types": 3}),
    ("sliding_window", {"model_type": "qwen2", "layer_types": SLIDING}),
    ("sliding_window", {"model_type": "mistral", "layer_types": SLIDING, "sliding_window": None}),
    *(("sliding_window", {"model_type": "mistral", "sliding_window": value}) for value in (0, -4, "8")),
    ("use_sliding_window", {"model_type": "qwen2", "use_sliding_window": "yes"}),
]  # fmt: skip


@pytest.mark.parametrize(("field", "changes"), BAD_FIELDS, ids=[json.dumps(row[1]) for row in BAD_FIELDS])
def test_config_that_is_not_understood_is_refused(tmp_path, field, changes):
    (tmp_path / "config.json").write_text(json.dumps(FIXED | changes))
    refused(tmp_path, tmp_path / "config.json", field)


def test_vocabulary_smaller_than_the_tokenizers_is_refused(folder):
    config = ModelConfig.from_pretrained(folder)
    tokenizer = SimpleNamespace(name_or_path="some-tokenizer", get_vocab=lambda: {"a": 0, "b": 39})
    check_vocabulary(config, tokenizer)
    tokenizer.get_vocab = lambda: {"a": 0, "<pad>": 40}  # few tokens, but an id past the end
    with pytest.raises(ValueError) as caught:
        check_vocabulary(config, tokenizer)
    assert_one_sentence(caught.value, "some-tokenizer", "vocab_size", 40, 41)
