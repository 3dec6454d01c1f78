"""Models in Hugging Face format, in and out: config.json and safetensors, and everything in them checked.

Only safetensors are read, nothing is unpickled and no code of a model is run. Every refusal names the file
and the field or tensor. What the fields mean to the forward pass is written at model.ModelConfig.
"""

import json
import math
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "ministral")  # of config.json's model_type
ROPE_TYPES = {  # rope_type: the fields that it cannot do without
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
POSITIVE = ("rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
            "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow")  # fmt: skip
MAY_BE_NULL = ("attention_factor", "beta_fast", "beta_slow")  # as if they were not there
FILE_SIZE = 5 * 10**9  # bytes of the largest safetensors file that is written

# -----------------------------------------------------------------------------------------------------------
# config.json


def read_config(folder):
    """The fields of model.ModelConfig from `folder`/config.json, as a dict.

    Raises FileNotFoundError, or ValueError naming the field that we cannot honour.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json here; a model is a folder in Hugging Face format")
    check_fields(read_json(path), path)
    try:
        hf = AutoConfig.from_pretrained(folder)  # fills in what older files omit, and gathers the rope fields
    except Exception as error:  # its checks raise a dozen types
        raise ValueError(f"{path}: transformers refuses it ({one_line(error)})") from None
    family = hf.model_type
    attention_bias = family in ("qwen3", "llama") and hf.attention_bias  # the others ignore the field
    fields = dict(
        vocab_size=hf.vocab_size,
        hidden_size=hf.hidden_size,
        intermediate_size=hf.intermediate_size,
        layers=hf.num_hidden_layers,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads,
        norm_eps=hf.rms_norm_eps,
        max_positions=hf.max_position_embeddings,
        rope=dict(hf.rope_parameters),
        qkv_bias=family == "qwen2" or attention_bias,
        o_bias=attention_bias,
        mlp_bias=family == "llama" and hf.mlp_bias,
        qk_norm=family == "qwen3",
        tie_word_embeddings=hf.tie_word_embeddings,
        windows=layer_windows(hf, path),
    )
    check_heads(fields, path)
    return fields


def check_heads(fields, path):
    """Raise ValueError for heads that attention or rotary positions cannot work with."""
    heads, kv_heads, head_dim = fields["heads"], fields["kv_heads"], fields["head_dim"]
    if heads % kv_heads:
        raise ValueError(
            f"{path}: num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2 or not head_dim:
        raise ValueError(f"{path}: head_dim {head_dim} is not even, but rotary positions turn pairs")


def check_fields(raw, path):
    """Raise ValueError naming the first field of config.json that the model would get wrong."""
    if raw.get("model_type") not in FAMILIES:
        raise ValueError(f"{path}: model_type {raw.get('model_type')!r} is not one of {', '.join(FAMILIES)}")
    for field in ("quantization_config", "auto_map"):
        if raw.get(field):
            raise ValueError(
                f"{path}: {field} is set; only plain weights of a built-in architecture are loaded"
            )
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    if not isinstance(rope, dict) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(f"{path}: rope_scaling or rope_parameters is not an object of plain values")
    fields = {**raw, **rope}
    check_numbers(fields, path)
    check_rope(rope, path)
    for field, only in (("hidden_act", "silu"), ("partial_rotary_factor", 1.0)):
        if fields.get(field) not in (only, None):
            raise ValueError(f"{path}: {field} {fields[field]!r} is not supported, only {only!r}")


def check_numbers(fields, path):
    """Raise ValueError for a size that is no whole number in range, or a factor that is not positive."""
    for field in SIZES:
        largest = 1024 if field == "num_hidden_layers" else 2**24  # positions are exact in fp32 up to there
        value = fields.get(field)
        if value is not None and not (type(value) is int and 1 <= value <= largest):
            raise ValueError(f"{path}: {field} {value!r} is not a whole number from 1 to {largest}")
    for field in POSITIVE:
        value = fields.get(field, 1)
        if value is None and field in MAY_BE_NULL:
            continue
        if not (type(value) in (int, float) and 0 < value < math.inf):
            raise ValueError(f"{path}: {field} {value!r} is not a positive number")


def check_rope(rope, path):
    """Raise ValueError for a type of rotary positions that we do not have, or that lacks a field."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in list(ROPE_TYPES):  # a list: kind may be anything, also unhashable
        raise ValueError(f"{path}: rope_type {kind!r} is not one of {', '.join(ROPE_TYPES)}")
    missing = [field for field in ROPE_TYPES[kind] if rope.get(field) is None]
    if missing:
        raise ValueError(f"{path}: rope_type {kind!r} needs the field {missing[0]}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(f"{path}: low_freq_factor is not below high_freq_factor")


def layer_windows(hf, path):
    """For each layer how many keys a query sees, itself included, None for all. hf: transformers' config."""
    window = None if hf.model_type == "llama" else hf.sliding_window
    kinds = ["full_attention" if window is None else "sliding_attention"] * hf.num_hidden_layers
    if hf.model_type in ("qwen2", "qwen3", "ministral"):  # layers may differ
        kinds = hf.layer_types
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            raise ValueError(
                f"{path}: layer_types has {kind!r}; only full_attention and sliding_attention are known"
            )
        if kind == "sliding_attention" and (window is None or window < 1):
            raise ValueError(
                f"{path}: sliding_window {window} is not a positive number, but there are layers that use it"
            )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def check_vocabulary(config, tokenizer):
    """Raise ValueError if the tokenizer has ids without an embedding; the other way round is usual."""
    ids = max(tokenizer.get_vocab().values()) + 1
    if ids > config.vocab_size:
        raise ValueError(
            f"{tokenizer.name_or_path}: the tokenizer has {ids} ids, but the model's vocab_size is "
            f"{config.vocab_size}"
        )


# ----------------------------------------------------------------------------------------------------------
# weights


def hf_tensors(config, tensors):
    """Tensors under our parameters' names -> under Hugging Face's, where q, k, v, gate and up are separate.

    What is one matrix for us and several there comes as views of its rows.
    """
    q_rows, kv_rows = config.heads * config.head_dim, config.kv_heads * config.head_dim
    inner = config.intermediate_size
    fused = {
        "qkv_proj": dict(q_proj=q_rows, k_proj=kv_rows, v_proj=kv_rows),
        "gate_up_proj": dict(gate_proj=inner, up_proj=inner),
    }
    found = {}
    for name, tensor in tensors.items():
        full_name = name if name.startswith("lm_head") else f"model.{name}"
        *stem, module, kind = full_name.split(".")  # kind: weight or bias
        parts = fused.get(module, {module: len(tensor)})
        for part, rows in zip(parts, tensor.split(list(parts.values())), strict=True):
            found[".".join((*stem, part, kind))] = rows
    return found


def read_weights(folder, config, shapes):
    """Yield (our name, tensor as the files have it) for all `shapes` (our name -> shape), one after another.

    Raises where the files do not fit.
    """
    file_of = weight_files(folder)
    files = {path: open_safetensors(path) for path in set(file_of.values())}
    parts_of = {
        name: hf_tensors(config, {name: torch.empty(shape, device="meta")}) for name, shape in shapes.items()
    }
    shape_of = {name: part.shape for parts in parts_of.values() for name, part in parts.items()}
    check_names(folder, shape_of.keys(), file_of.keys())

    def read(name):
        path = file_of[name]
        tensor = files[path].get_tensor(name)
        check_tensor(tensor, shape_of[name], name, path)
        return tensor

    if config.tie_word_embeddings and "lm_head.weight" in file_of:
        head = files[file_of["lm_head.weight"]].get_tensor("lm_head.weight")
        if not torch.equal(head, read("model.embed_tokens.weight")):
            raise ValueError(
                f"{folder}: config.json sets tie_word_embeddings, but lm_head.weight is not the embedding"
            )
    for name, parts in parts_of.items():
        tensors = [read(part) for part in parts]
        yield name, tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def check_tensor(tensor, shape, name, path):
    """Raise ValueError if a file's tensor is not as config.json says, or not finite."""
    if tensor.shape != shape:
        raise ValueError(f"{path}: {name} is {list(tensor.shape)}, config.json says {list(shape)}")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{path}: {name} is {tensor.dtype}; only float32, float16 and bfloat16 are read")
    if not is_finite(tensor):
        raise ValueError(f"{path}: {name} has entries that are infinite or not numbers; the file is damaged")


def is_finite(tensor):
    """Are all entries finite? A sum, which NaN and infinity survive, is the fast way to say yes."""
    total = tensor.sum(dtype=torch.float32)  # fp16 would overflow above 65,504
    return bool(total.isfinite() or tensor.isfinite().all())  # a sum of finite entries may overflow too


def check_names(folder, wanted, held):
    """Raise ValueError unless the files hold exactly the tensors that the model has parameters for."""
    missing, extra = sorted(wanted - held), sorted(held - wanted)
    # old Llama files hold their rotary frequencies, and some files of tied models the head a second time
    extra = [name for name in extra if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")]
    if missing:
        fault = f"lacks the tensor {missing[0]}"
    elif extra:
        fault = f"has a tensor that config.json leaves no place for, {extra[0]}"
    else:
        return
    counts = f"{len(missing)} missing, {len(extra)} left over"
    raise ValueError(f"{folder}: {fault} ({counts}); do weights and config belong together?")


def weight_files(folder):
    """{Hugging Face tensor name: path of the safetensors file that holds it}."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():  # it wins where both exist, as in transformers
        return dict.fromkeys(open_safetensors(single).keys(), single)
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder}: no model.safetensors and no {index.name}; pickled weights (pytorch_model.bin) are not"
            " read, transformers' from_pretrained and save_pretrained convert them"
        )
    try:
        file_of = {name: folder / file for name, file in read_json(index)["weight_map"].items()}
    except (KeyError, AttributeError, TypeError):
        raise ValueError(
            f"{index}: not a safetensors index, a JSON object whose weight_map names a file for each tensor"
        ) from None
    absent = sorted({path for path in file_of.values() if not path.is_file()})
    if absent:
        raise FileNotFoundError(
            f"{absent[0]}: this shard is missing, {index.name} names it; copy or download it again"
        )
    held = {path: set(open_safetensors(path).keys()) for path in set(file_of.values())}
    lost = sorted(name for name, path in file_of.items() if name not in held[path])
    if lost:
        raise ValueError(f"{file_of[lost[0]]}: lacks the tensor {lost[0]} that {index.name} says it has")
    return file_of


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a whole safetensors file ({one_line(error)}); copy or download it again"
        ) from None


def write_model(folder, source, config, shapes, tensors):
    """Write fp32 safetensors to `folder`, with the config.json of `source`.

    tensors yields (name, tensor) under our names in the order of `shapes`. Host memory holds one file of
    FILE_SIZE bytes at a time.
    """
    folder, source = Path(folder), Path(source)
    folder.mkdir(parents=True, exist_ok=True)
    raw = read_json(source / "config.json")
    raw.pop("torch_dtype", None)  # the older name of dtype
    (folder / "config.json").write_text(json.dumps({**raw, "dtype": "float32"}, indent=2) + "\n")
    if (source / "generation_config.json").exists():
        (folder / "generation_config.json").write_bytes((source / "generation_config.json").read_bytes())
    for stale in (*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")):
        stale.unlink()
    planned = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    file_of = plan_files({name: 4 * part.numel() for name, part in hf_tensors(config, planned).items()})
    parts = (item for name, tensor in tensors for item in hf_tensors(config, {name: tensor}).items())
    for file, group in groupby(parts, key=lambda item: file_of[item[0]]):
        # copies, because views cannot be saved
        held = {name: part.to("cpu", torch.float32, copy=True) for name, part in group}
        save_file(held, folder / file, {"format": "pt"})
    if len(set(file_of.values())) > 1:
        index = {"metadata": {"total_size": 4 * sum(map(math.prod, shapes.values()))}, "weight_map": file_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def plan_files(sizes):
    """{tensor: bytes} -> {tensor: name of its file}, in order, each file at most FILE_SIZE or one tensor.

    >>> plan_files({"a": 3 * 10**9, "b": 3 * 10**9})
    {'a': 'model-00001-of-00002.safetensors', 'b': 'model-00002-of-00002.safetensors'}
    """
    numbers, number, filled = {}, 1, 0
    for name, size in sizes.items():
        if filled and filled + size > FILE_SIZE:
            number, filled = number + 1, 0
        numbers[name], filled = number, filled + size
    if number == 1:
        return dict.fromkeys(sizes, "model.safetensors")
    return {name: f"model-{n:05d}-of-{number:05d}.safetensors" for name, n in numbers.items()}


# ----------------------------------------------------------------------------------------------------------
# what both files of this kind need


def one_line(error):
    """The last line of what an exception says: wrappers put the reason there."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].strip()


def read_json(path):
    """The JSON object in a file. Raises ValueError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value
