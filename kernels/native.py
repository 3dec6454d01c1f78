"""What a CPU computes in C: the files of cpu/, compiled when they are first needed.

A decoding step of a small model is 200 small products. In torch each is a call from Python and, with several
threads, a wait for the slowest of them. decode.c is one call. Its threads, and those of the products that
learning needs (product.c), take work in small pieces, so a thread that another program holds up takes less.
All of it is optional: without a C compiler, or for a model that it was not written for, the torch code does
the same.
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
import weakref
from pathlib import Path

import torch

from kernels.packing import distinct

SOURCES = Path(__file__).with_name("cpu")
COMPILE = "cc -O3 -march=native -shared -fPIC -pthread -Wno-psabi".split()
LARGEST = 300_000  # vocabulary, or tokens times query heads of a key: a thread keeps those on its stack
STACK = 8 << 20  # bytes that this takes at most
FEW_ROWS = 16  # of a product: with fewer, copying the other matrix takes longer than multiplying
ENABLED = True  # `in_torch` turns it off
THREADS = 0  # of this library; 0: as many as torch has
GAP = 1e-3  # between the logits of C and of torch, at most, relative to the largest


def structure(name, **types):
    """A ctypes.Structure with `types` {type: "names of the fields"}, in order, as cpu/ declares it."""
    of = {"size": ctypes.c_int64, "array": ctypes.c_void_p, "number": ctypes.c_float}
    fields = [(field, of[kind]) for kind, names in types.items() for field in names.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields})


Layer = structure("Layer", size="window", array="""input_norm qkv qkv_bias q_norm k_norm o o_bias
    post_norm gate_up gate_up_bias down down_bias""")  # fmt: skip
Model = structure("Model", size="layers hidden intermediate heads kv_heads head_dim vocab",
                  array="embedding norm head layer", number="eps")  # fmt: skip
Draw = structure("Draw", size="vocab", array="logits uniform token logprob", number="temperature top_p")
Product = structure("Product", array="a b c", size="M N K a_row a_column b_row b_column c_row add")
SwiGLU = structure("SwiGLU", array="gate_up grad out", size="T I")
Step = structure(
    "Step",
    size="rows slots capacity",
    array="token position source prompt_length cos sin keys values logits work",
)


def library():
    """The files of cpu/ as a library; None without a compiler, with TTRL_C=0, or inside `in_torch`."""
    return found() if ENABLED else None


@contextlib.contextmanager
def in_torch():
    """A context in which the torch code computes everything."""
    global ENABLED
    before, ENABLED = ENABLED, False
    try:
        yield
    finally:
        ENABLED = before


@functools.cache
def found():
    """The library, compiled once for a version and a processor, and kept in ~/.cache/ttrl; or None."""
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    if os.environ.get("TTRL_C") == "0" or 0 <= stack < STACK:
        return None
    texts = [path.read_text() for path in sorted(SOURCES.glob("*.[ch]"))]
    made_from = [*texts, *COMPILE, platform.processor(), torch.backends.cpu.get_cpu_capability()]
    with contextlib.suppress(OSError):  # what -march=native means here; a home may be shared by machines
        made_from += sorted(set(re.findall("(?:flags|Features).*", Path("/proc/cpuinfo").read_text())))
    name = f"cpu-{hashlib.sha256(repr(made_from).encode()).hexdigest()[:16]}.so"
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
            subprocess.run([*COMPILE, *SOURCES.glob("*.c"), "-o", made, "-lm"], check=True, **quietly)
            made.replace(path)  # another rank may have made it, too
    loaded = ctypes.CDLL(str(path))
    loaded.work_size.restype = ctypes.c_int64
    return loaded


def version():
    """What tells this library from one that may round differently: digits of its SHA-256, or "torch"."""
    return hashlib.sha256(Path(library()._name).read_bytes()).hexdigest()[:8] if library() else "torch"


def threads():
    """How many threads this library has: torch's, before `share_threads`."""
    return THREADS or torch.get_num_threads()


def share_threads():
    """Give this library the threads of torch, and torch a quarter of them for the little that it still does.

    A thread of torch that is done with its part spins for a while, and would hold a core of ours.
    """
    global THREADS
    if library() is not None:
        THREADS = threads()
        torch.set_num_threads(max(1, THREADS // 4))


def turn_off():
    """Let the torch code compute everything, on all threads, from here on."""
    global ENABLED
    ENABLED = False
    torch.set_num_threads(threads())


def address(tensor):
    """Where a tensor's numbers are, or None."""
    return None if tensor is None else tensor.data_ptr()


def can_sample(logits, temperature):
    """Does `sample_rows` take these logits?"""
    return fits(logits) and logits.shape[1] <= LARGEST and temperature > 0


def sample_rows(logits, uniform, temperature, top_p):
    """sampler.sample_inverse_cdf, whose arguments and results these are, in C."""
    token = torch.empty(len(logits), dtype=torch.int64)
    logprob = torch.empty(len(logits), dtype=torch.float32)
    inputs = logits.contiguous(), uniform.contiguous()
    arrays = map(address, (*inputs, token, logprob))
    draw = Draw(logits.shape[1], *arrays, temperature, top_p)
    library().sample_rows(ctypes.byref(draw), ctypes.c_int64(len(logits)), threads())
    return token, logprob


def fits(x):
    """Is x a matrix that this library computes with?"""
    return x.is_cpu and x.dtype == torch.float32 and x.dim() == 2 and library() is not None


def can_multiply(a, b):
    """Does `product` take these?"""
    return fits(a) and fits(b) and len(a) >= FEW_ROWS


def product(a, b, out=None, add=False):
    """a @ b, or out += a @ b if `add`: a [M, K], b [K, N] -> out [M, N], whose rows are contiguous.

    An element depends on a row of a and a column of b, not on the threads or the rows beside it.
    """
    out = torch.empty(len(a), b.shape[1], dtype=torch.float32) if out is None else out
    assert a.shape[1] == len(b) and out.shape == (len(a), b.shape[1]) and out.stride(1) == 1
    if not len(b):
        return out if add else out.zero_()
    sizes = len(a), b.shape[1], len(b), *a.stride(), *b.stride(), out.stride(0), add
    library().product(ctypes.byref(Product(*map(address, (a, b, out)), *sizes)), threads())
    return out


def can_swiglu(gate_up):
    """Does `swiglu` take this?"""
    return fits(gate_up) and gate_up.shape[1] % 16 == 0


def swiglu(gate_up, grad=None):
    """fused.swiglu of gate_up [T, 2 I] -> [T, I]; or with its grad [T, I] that of gate_up, [T, 2 I]."""
    tokens, size = gate_up.shape[0], gate_up.shape[1] // 2
    gate_up, grad = gate_up.contiguous(), None if grad is None else grad.contiguous()
    out = torch.empty(tokens, size if grad is None else 2 * size, dtype=torch.float32)
    library().swiglu(ctypes.byref(SwiGLU(*map(address, (gate_up, grad, out)), tokens, size)), threads())
    return out


def native_step(model, cache):
    """A NativeStep for this model and its cache; None where the torch code has to do it."""
    if library() is None or not isinstance(model, torch.nn.Module):  # some tests have less than a model
        return None
    c = model.config
    can = all(p.is_cpu and p.dtype == torch.float32 and p.is_contiguous() for p in model.parameters())
    can &= model.group is None and c.head_dim % 16 == c.hidden_size % 16 == c.intermediate_size % 16 == 0
    can &= c.heads // c.kv_heads * cache.k.shape[3] <= LARGEST
    return NativeStep(model, cache) if can else None


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
        self.prompts = torch.zeros(cache.k.shape[1], 2, dtype=torch.int64)  # [S] (which, its length); 0: none
        self.number, self.newest = 0, lambda: None  # of prompts; the keys of the last one

    def insert(self, slot, k):
        """Note that a slot holds the prompt whose keys are k [L, K, Tp, E]."""
        if k is not self.newest():
            self.newest, self.number = weakref.ref(k), self.number + 1
        self.prompts[slot] = torch.tensor([self.number, k.shape[2]])

    def move(self, source, target):
        """Note that slots `target` [G] hold what slots `source` [G] held."""
        self.prompts[target] = self.prompts[source]

    def __call__(self, decode, cache, token, position, context):
        """Next-token logits [B, V] of tokens [B] at positions [B], all below `context`.

        decode: rollout.decode. At the first step it computes the first row in torch. If the two differ, as
        they would if somebody had changed model.py alone, torch computes from then on. Weights may change in
        place only.
        """
        expected = None
        if not self.checked:
            with in_torch():
                cache.native = None
                expected = decode(self.model, cache, token[:1], position[:1], context)
        logits = torch.empty(len(token), self.model.config.vocab_size, dtype=torch.float32)
        k, v = cache.k, cache.v
        prompt, prompt_length = self.prompts[: len(token)].T
        first, which = distinct(prompt)  # of the slots that hold the same prompt, all read the first
        inputs = token, position, first[which], prompt_length, *self.model.rotation(position)
        inputs = [x.contiguous() for x in inputs]
        step = Step(len(token), k.shape[1], k.shape[3], *map(address, (*inputs, k, v, logits, self.work)))
        library().decode_step(self.whole, ctypes.byref(step), threads())
        if expected is not None:
            allowed = GAP * float(expected.nan_to_num(0, 0, 0).abs().max().clamp(min=1))
            if not torch.allclose(expected, logits[:1], rtol=0, atol=allowed, equal_nan=True):
                text = "a decoding step in C and in torch differ; torch is used from here on"
                warnings.warn(text, stacklevel=1)
                turn_off()
                return decode(self.model, cache, token, position, context)
            self.checked, cache.native = True, self
        return logits
