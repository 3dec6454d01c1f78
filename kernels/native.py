"""The decoding step of a CPU in C: decode.c, compiled when it is first needed.

A step of a small model is 200 small products. In torch each is a call from Python and, with several
threads, a wait for the slowest of them. decode.c is one call, and hands out work in small pieces. It is
optional: without a C compiler, or for a model that it was not written for, the torch code does the same.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import resource
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("decode.c")
COMPILE = "cc -O3 -march=native -shared -fPIC -pthread -Wno-psabi".split()
LARGEST = 300_000  # vocabulary, or tokens times query heads of a key: a thread keeps those on its stack
STACK = 8 << 20  # bytes that this takes at most
GAP = 1e-3  # between the logits of C and of torch, at most, relative to the largest


def structure(name, **types):
    """A ctypes.Structure with `types` {type: "names of the fields"}, in order, as decode.c declares it."""
    of = {"size": ctypes.c_int64, "array": ctypes.c_void_p, "number": ctypes.c_float}
    fields = [(field, of[kind]) for kind, names in types.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Layer = structure("Layer", size="window", array="""input_norm qkv qkv_bias q_norm k_norm o o_bias
    post_norm gate_up gate_up_bias down down_bias""")  # fmt: skip
Model = structure("Model", size="layers hidden intermediate heads kv_heads head_dim vocab",
                  array="embedding norm head layer", number="eps")  # fmt: skip
Draw = structure("Draw", size="vocab", array="logits uniform token logprob", number="temperature top_p")
Step = structure("Step", size="rows slots capacity", array="token position cos sin keys values logits work")


@functools.cache
def library():
    """decode.c as a library; None without a compiler, or with TTRL_C=0 in the environment.

    It is compiled once for a source and a processor, and kept in ~/.cache/ttrl.
    """
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    if os.environ.get("TTRL_C") == "0" or 0 <= stack < STACK:
        return None
    made_from = [SOURCE.read_text(), *COMPILE, platform.processor(), torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError):  # what -march=native means here; a home may be shared by machines
        made_from += sorted(set(re.findall("(?:flags|Features).*", Path("/proc/cpuinfo").read_text())))
    name = f"decode-{hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]}.so"
    homes = (
        lambda: Path.home() / ".cache" / "ttrl",
        lambda: Path(tempfile.gettempdir()) / f"ttrl-{os.getuid()}",
    )
    for home in homes:
        with contextlib.suppress(OSError, RuntimeError, subprocess.SubprocessError):
            return compiled(home(), name)
    return None


def compiled(folder, name):
    """The library in a folder of this user's, made if it is not there. Raises OSError or SubprocessError."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    about, path = folder.lstat(), folder / name
    if about.st_uid != os.getuid() or about.st_mode & 0o022:
        raise PermissionError(f"others may write in {folder}")
    if not path.exists():
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / name
            quietly = dict(stdin=subprocess.DEVNULL, capture_output=True, timeout=120)
            subprocess.run([*COMPILE, SOURCE, "-o", made, "-lm"], check=True, **quietly)
            made.replace(path)  # another rank may have made it, too
    found = ctypes.CDLL(str(path))
    found.work_size.restype = ctypes.c_int64
    return found


def address(tensor):
    """Where a tensor's numbers are, or None."""
    return None if tensor is None else tensor.data_ptr()


def can_sample(logits, temperature):
    """Does `sample_rows` take these logits?"""
    fits = logits.device.type == "cpu" and logits.dtype == torch.float32 and logits.shape[1] <= LARGEST
    return fits and temperature > 0 and library() is not None


def sample_rows(logits, uniform, temperature, top_p):
    """sampler.sample_inverse_cdf, whose arguments and results these are, in C."""
    token = torch.empty(len(logits), dtype=torch.int64)
    logprob = torch.empty(len(logits), dtype=torch.float32)
    inputs = logits.contiguous(), uniform.contiguous()
    arrays = map(address, (*inputs, token, logprob))
    draw = Draw(logits.shape[1], *arrays, temperature, top_p)
    library().sample_rows(ctypes.byref(draw), ctypes.c_int64(len(logits)), torch.get_num_threads())
    return token, logprob


def native_step(model, cache):
    """A NativeStep for this model and its cache; None where the torch code has to do it."""
    if library() is None or not isinstance(model, torch.nn.Module):  # some tests have less than a model
        return None
    c = model.config
    fits = all(p.is_cpu and p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())
    fits &= model.group is None and c.head_dim % 16 == c.hidden_size % 16 == c.intermediate_size % 16 == 0
    fits &= c.heads // c.kv_heads * cache.k.shape[3] <= LARGEST
    return NativeStep(model, cache) if fits else None


def layers_of(model):
    """The Layer of each block of a Transformer."""
    for layer, window in zip(model.layers, model.config.windows, strict=True):
        attention, mlp = layer.self_attn, layer.mlp
        norms = (attention.q_norm.weight, attention.k_norm.weight) if attention.qk_norm else (None, None)
        qkv, o, gate_up, down = attention.qkv_proj, attention.o_proj, mlp.gate_up_proj, mlp.down_proj
        tensors = (layer.input_layernorm.weight, qkv.weight, qkv.bias, *norms, o.weight, o.bias,
                   layer.post_attention_layernorm.weight, gate_up.weight, gate_up.bias, down.weight,
                   down.bias)  # fmt: skip
        yield Layer(*map(address, tensors), window or 0)


class NativeStep:
    """decode_step of decode.c for a model and its KVCache: where their numbers are, and room to compute."""

    def __init__(self, model, cache):
        c, self.model = model.config, model
        self.layers = (Layer * c.layers)(*layers_of(model))
        ends = map(address, (model.embed_tokens.weight, model.norm.weight, model.lm_head.weight))
        sizes = c.layers, c.hidden_size, c.intermediate_size, c.heads, c.kv_heads, c.head_dim, c.vocab_size
        self.whole = ctypes.byref(Model(*sizes, *ends, ctypes.addressof(self.layers), c.norm_eps))
        size = library().work_size(self.whole, ctypes.c_int64(cache.k.shape[1]))
        self.work = torch.zeros(size, dtype=torch.float32)
        self.weights = list(model.parameters())  # so that they stay where they are
        self.checked = False

    def __call__(self, decode, cache, token, position, context):
        """Next-token logits [B, V] of tokens [B] at positions [B], all below `context`.

        decode: rollout.decode. At the first step it computes the first row in torch. If the two differ, as
        they would if somebody had changed model.py alone, torch computes from then on. Weights may change in
        place only.
        """
        expected = None
        if not self.checked:
            cache.native = None  # so that decode computes in torch
            expected = decode(self.model, cache, token[:1], position[:1], context)
        logits = torch.empty(len(token), self.model.config.vocab_size, dtype=torch.float32)
        k, v = cache.k, cache.v
        inputs = [x.contiguous() for x in (token, position, *self.model.rotation(position))]
        step = Step(len(token), k.shape[1], k.shape[3], *map(address, (*inputs, k, v, logits, self.work)))
        library().decode_step(self.whole, ctypes.byref(step), torch.get_num_threads())
        if expected is not None:
            allowed = GAP * float(expected.nan_to_num(0, 0, 0).abs().max().clamp(min=1))
            if not torch.allclose(expected, logits[:1], rtol=0, atol=allowed, equal_nan=True):
                text = "a decoding step in C and in torch differ; torch is used from here on"
                warnings.warn(text, stacklevel=1)
                return decode(self.model, cache, token, position, context)
            self.checked, cache.native = True, self
        return logits
