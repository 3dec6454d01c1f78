"""Read, check and write models in Hugging Face format: config.json and safetensors.

Nothing is unpickled and no code of a model is run. Each error names the file and the field or tensor. What
the fields mean for the forward pass is documented in model.ModelConfig.
"""

import json
import math
import os
from itertools import groupby
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import AutoConfig

from support.untrusted import quote, read_json, reason, shorten

FAMILIES = ("qwen2", "qwen3", "llama", "mistral", "ministral")  # supported model_types
ROPE_TYPES = {  # rope_type: its required fields
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor",),
}
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
         "num_key_value_heads", "head_dim", "max_position_embeddings")  # fmt: skip
MAY_BE_NULL = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")  # null means absent
POSITIVE = ("rms_norm_eps", "rope_theta", "factor", "low_freq_factor", "high_freq_factor",
            "original_max_position_embeddings", *MAY_BE_NULL)  # fmt: skip
# All that transformers is told: of what else a file may hold, it would make use
READ = (*SIZES, "rms_norm_eps", "rope_theta", "rope_scaling", "rope_parameters", "hidden_act", "layer_types",
        "attention_bias", "mlp_bias", "tie_word_embeddings", "sliding_window", "use_sliding_window",
        "max_window_layers")  # fmt: skip
FILE_SIZE = 5 * 10**9  # maximum bytes of a safetensors file that we write

# -----------------------------------------------------------------------------------------------------------
# config.json


def read_config(folder):
    """The fields of model.ModelConfig from `folder`/config.json, as a dict.

    Raises FileNotFoundError, or ValueError naming the field that we do not support.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{folder}: no config.json here; a model is a folder in Hugging Face format")
    raw = read_json(path)
    check_fields(raw, path)
    family = raw["model_type"]
    if family == "mistral" and "layer_types" in raw:
        family = "ministral"  # the hub calls a mistral whose layers differ so
    try:  # fills in defaults for older files and gathers rope fields
        hf = AutoConfig.for_model(family, **{field: raw[field] for field in READ if field in raw})
    except Exception as error:  # its checks raise a dozen types
        raise ValueError(f"{path}: transformers rejects it ({reason(error)})") from None
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
    """Raise ValueError for numbers of heads or a head_dim that the model cannot use."""
    heads, kv_heads, head_dim = fields["heads"], fields["kv_heads"], fields["head_dim"]
    if heads % kv_heads:
        raise ValueError(
            f"{path}: num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    if head_dim % 2 or not head_dim:
        raise ValueError(f"{path}: head_dim {head_dim} is not even; rotary positions need pairs")


def check_fields(raw, path):
    """Raise ValueError naming the first field of config.json that the model does not support."""
    if raw.get("model_type") not in FAMILIES:
        raise ValueError(
            f"{path}: model_type {quote(raw.get('model_type'))} is not one of {', '.join(FAMILIES)}"
        )
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
            raise ValueError(f"{path}: {field} {quote(fields[field])} is not supported, only {only!r}")


def check_numbers(fields, path):
    """Raise ValueError for a size that is not an integer in range, or a factor that is not positive."""
    for field in SIZES:
        largest = 1024 if field == "num_hidden_layers" else 2**24  # up to here, positions are exact in fp32
        value = fields.get(field)
        if value is not None and not (type(value) is int and 1 <= value <= largest):
            raise ValueError(f"{path}: {field} {quote(value)} is not a whole number from 1 to {largest}")
    for field in POSITIVE:
        value = fields.get(field, 2)
        if value is None and field in MAY_BE_NULL:
            continue
        least, most = 2 if field == "rope_theta" else 1e-30, 1e30  # what is computed from them stays finite
        if not (type(value) in (int, float) and least <= value <= most):
            raise ValueError(f"{path}: {field} {quote(value)} is not a number from {least} to {most}")


def check_rope(rope, path):
    """Raise ValueError for a rope_type that we do not support, or that lacks a required field."""
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in list(ROPE_TYPES):  # a list, because kind may be unhashable
        raise ValueError(f"{path}: rope_type {quote(kind)} is not one of {', '.join(ROPE_TYPES)}")
    missing = [field for field in ROPE_TYPES[kind] if rope.get(field) is None]
    if missing:
        raise ValueError(f"{path}: rope_type {kind!r} needs the field {missing[0]}")
    if kind == "llama3" and rope["low_freq_factor"] >= rope["high_freq_factor"]:
        raise ValueError(f"{path}: low_freq_factor is not below high_freq_factor")


def layer_windows(hf, path):
    """For each layer, how many keys a query sees, itself included; None is all. hf: transformers' config."""
    window = None if hf.model_type == "llama" else hf.sliding_window
    kinds = ["full_attention" if window is None else "sliding_attention"] * hf.num_hidden_layers
    if hf.model_type in ("qwen2", "qwen3", "ministral"):  # their layers may differ
        kinds = hf.layer_types
    for kind in kinds:
        if kind not in ("full_attention", "sliding_attention"):
            known = "only full_attention and sliding_attention are supported"
            raise ValueError(f"{path}: layer_types has {quote(kind)}; {known}")
        if kind == "sliding_attention" and (window is None or window < 1):
            raise ValueError(
                f"{path}: sliding_window {quote(window)} is not a positive number, but some layers use it"
            )
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def check_vocabulary(config, tokenizer):
    """Raise ValueError if the tokenizer has ids without an embedding. (Spare embeddings are common.)"""
    where, ids = tokenizer.name_or_path, max(tokenizer.get_vocab().values(), default=0) + 1
    if ids > config.vocab_size:
        raise ValueError(f"{where}: the tokenizer has {ids} ids, but vocab_size is {config.vocab_size}")


# ----------------------------------------------------------------------------------------------------------
# weights


def hf_tensors(config, tensors):
    """Rename tensors from our parameters' names to Hugging Face's, where q, k, v, gate and up are separate.

    Our fused matrices become views of their rows.
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
    """Yield (our name, tensor with the files' dtype) for all `shapes` {our name: shape}, one at a time.

    Raises ValueError or FileNotFoundError if the files do not match.
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
                f"{folder}: config.json sets tie_word_embeddings, but lm_head.weight is not the embedding; "
                "set it to false to keep both"
            )
    for name, parts in parts_of.items():
        tensors = [read(part) for part in parts]
        yield name, tensors[0] if len(tensors) == 1 else torch.cat(tensors)


def check_tensor(tensor, shape, name, path):
    """Raise ValueError if a file's tensor does not match config.json or is not finite."""
    if tensor.shape != shape:
        raise ValueError(f"{path}: {name} is {list(tensor.shape)}, but config.json says {list(shape)}")
    if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{path}: {name} is {tensor.dtype}, not float32, float16 or bfloat16")
    if not is_finite(tensor):
        raise ValueError(f"{path}: {name} has entries that are infinite or not numbers; the file is damaged")


def is_finite(tensor):
    """Are all entries finite? A finite sum proves it fast, since a NaN or an infinity survives summing."""
    total = tensor.sum(dtype=torch.float32)  # fp16 would overflow above 65,504
    return bool(total.isfinite() or tensor.isfinite().all())  # a sum of finite entries may overflow too


def check_names(folder, wanted, held):
    """Raise ValueError unless the files hold exactly the model's parameters."""
    missing, extra = sorted(wanted - held), sorted(held - wanted)
    # Old Llama files hold rotary frequencies, and some files of tied models hold the head again.
    extra = [name for name in extra if name != "lm_head.weight" and not name.endswith("rotary_emb.inv_freq")]
    if missing:
        fault = f"lacks the tensor {shorten(missing[0])}"
    elif extra:
        fault = f"has a tensor that config.json does not provide for, {shorten(extra[0])}"
    else:
        return
    counts = f"{len(missing)} missing, {len(extra)} unexpected"
    raise ValueError(f"{folder}: {fault} ({counts}); the weights do not belong to this config.json")


def weight_files(folder):
    """{Hugging Face tensor name: path of the safetensors file that holds it}."""
    folder = Path(folder)
    index, single = folder / "model.safetensors.index.json", folder / "model.safetensors"
    if single.is_file():  # takes precedence over the index, as in transformers
        return dict.fromkeys(open_safetensors(single).keys(), single)
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder}: no model.safetensors and no {index.name}; convert pickled weights (pytorch_model.bin)"
            " with transformers' from_pretrained and save_pretrained"
        )
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(map(is_file_name, names.values())):
        raise ValueError(
            f"{index}: not a safetensors index, a JSON object whose weight_map names a .safetensors file of "
            "this folder for each tensor"
        )
    file_of = {name: folder / file for name, file in names.items()}
    absent = sorted({path for path in file_of.values() if not path.is_file()})
    if absent:
        raise FileNotFoundError(
            f"{shorten(str(absent[0]))}: is missing, but {index.name} names it; copy or download it again"
        )
    held = {path: set(open_safetensors(path).keys()) for path in set(file_of.values())}
    lost = sorted(name for name, path in file_of.items() if name not in held[path])
    if lost:
        raise ValueError(
            f"{file_of[lost[0]]}: lacks the tensor {shorten(lost[0])}, which {index.name} puts there"
        )
    return file_of


def is_file_name(name):
    """May a file of a model have this name? Not if it leads out of the model's folder."""
    plain = isinstance(name, str) and len(name) < 256 and name.isprintable() and name.endswith(".safetensors")
    return plain and os.path.basename(name) == name


def open_safetensors(path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path}: not a complete safetensors file ({reason(error)}); copy or download it again"
        ) from None


def write_model(folder, source, config, shapes, tensors):
    """Write fp32 safetensors to `folder`, with the config.json of `source`.

    tensors yields (our name, tensor) in the order of `shapes`. Host memory holds one file, of FILE_SIZE bytes
    at most, at a time.
    """
    folder, source = Path(folder), Path(source)
    folder.mkdir(parents=True, exist_ok=True)
    raw = read_json(source / "config.json")
    raw.pop("torch_dtype", None)  # the older name of dtype
    names = raw.get("architectures") or [f"{raw['model_type'].capitalize()}ForCausalLM"]  # vLLM reads it
    raw.update(dtype="float32", architectures=names)
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n")
    if (source / "generation_config.json").exists():
        (folder / "generation_config.json").write_bytes((source / "generation_config.json").read_bytes())
    for stale in (*folder.glob("model*.safetensors"), *folder.glob("model.safetensors.index.json")):
        stale.unlink()
    planned = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    file_of = plan_files({name: 4 * part.numel() for name, part in hf_tensors(config, planned).items()})
    parts = (item for name, tensor in tensors for item in hf_tensors(config, {name: tensor}).items())
    for file, group in groupby(parts, key=lambda item: file_of[item[0]]):
        # copied, because safetensors cannot save views
        held = {name: part.to("cpu", torch.float32, copy=True) for name, part in group}
        save_file(held, folder / file, {"format": "pt"})
    if len(set(file_of.values())) > 1:
        index = {"metadata": {"total_size": 4 * sum(map(math.prod, shapes.values()))}, "weight_map": file_of}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def plan_files(sizes):
    """{tensor: bytes} -> {tensor: file name}, in order; a file has at most FILE_SIZE bytes or one tensor.

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
