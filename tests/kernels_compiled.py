"""Run by test_kernels.py: kernels compiled for GPUs that are not there, and what the machine code uses.

On A100 (sm_80), H100 (sm_90) and B200 (sm_100) nothing may spill, shared memory must fit (only a launch would
refuse it) and the products must run on tensor cores. For AMD's MI300 (gfx942) the kernels have to compile.
"""

import inspect
import re
import subprocess

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from kernels import attention_triton as attention
from kernels import fused_triton as fused
from kernels import logprob_triton as logprob
from kernels import sampler_triton as sampler

# bytes a block, CUDA C++ Programming Guide, table 24
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_CORE = {80: "mma.sync", 90: "wgmma.mma", 100: "tcgen05.mma"}
TARGETS = [*SHARED_LIMIT, "gfx942"]
# by the end of the name; any other scalar is an i32
SCALARS = dict.fromkeys(("temperature", "top_p", "scale", "sign"), "fp32")


def compiled(kernel, target, pointers, constants, aligned, **options):
    """Compile a kernel as a launch would.

    pointers: name -> dtype; aligned: the scalars that are multiples of 16.
    """
    names = [parameter.name for parameter in kernel.params]
    scalar = {name: next((t for end, t in SCALARS.items() if name.endswith(end)), "i32") for name in names}
    types = {
        n: "constexpr" if n in constants else f"*{pointers[n]}" if n in pointers else scalar[n] for n in names
    }
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in (*pointers, *aligned)}
    source = ASTSource(
        kernel, types, {(names.index(name),): value for name, value in constants.items()}, hints
    )
    gpu = GPUTarget("hip", target, 64) if target == "gfx942" else GPUTarget("cuda", target, 32)
    try:
        return triton.compile(source, target=gpu, options=options)
    except Exception as error:
        if "ROCm linker" in str(error):
            pytest.skip("this Triton (3.4) brings no linker for AMD's GPUs")
        raise


def resources(machine, arch, tmp_path):
    """(registers, bytes spilled) according to ptxas.

    It is called as triton/backends/nvidia/compiler.py calls it, so that the same cubin comes out.
    """
    gpu = re.search(r"^\.target\s+(sm_\w+)", machine.asm["ptx"], re.M).group(1)
    ptx, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    ptx.write_text(machine.asm["ptx"])
    which = [arch] if inspect.signature(get_ptxas).parameters else []  # Triton 3.4 has one ptxas for all
    recent = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
    command = [
        get_ptxas(*which).path,
        "-lineinfo",
        "-v",
        *(["--regAllocOptLevel=2"] if recent else []),
        f"--gpu-name={gpu}",
        ptx,
        "-o",
        cubin,
    ]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    assert cubin.read_bytes() == machine.asm["cubin"]
    stores, loads = (
        int(re.search(rf"(\d+) bytes spill {kind}", said).group(1)) for kind in ("stores", "loads")
    )
    return int(re.search(r"Used (\d+) registers", said).group(1)), stores + loads


def assert_offsets_of_64_bits(machine):
    """What is added to a pointer argument itself must be an i64, as V x D passes 2^31.

    Later steps stay inside a row.
    """
    code = machine.asm["ttir"]
    arguments = set(re.findall(r"(%\w+): !tt.ptr", code))
    arguments |= {
        name for name, of in re.findall(r"(%\w+) = tt.splat (%\w+) : !tt.ptr", code) if of in arguments
    }
    offsets = re.findall(r"tt.addptr (%\w+), %\w+ : \S+, (\S+)", code)
    first = [kind for base, kind in offsets if base in arguments]
    assert first and all(re.search(r"\bi64|xi64>", kind) for kind in first), offsets


def check(kernel, target, pointers, constants, aligned, tmp_path, tensor_core=False, **options):
    machine = compiled(kernel, target, pointers, constants, aligned, **options)
    assert_offsets_of_64_bits(machine)
    if target == "gfx942":
        return
    registers, spilled = resources(machine, target, tmp_path)
    kinds = ", ".join(sorted({kind for kind in pointers.values() if kind != "i64"}))
    print(f"sm_{target:<4}{kernel.__name__:<28}{kinds:<12}{registers:>4} registers{spilled:>4} bytes spilled"
          f"{machine.metadata.shared:>8} bytes shared")  # fmt: skip
    assert spilled == 0 and machine.metadata.shared <= SHARED_LIMIT[target]
    if tensor_core:
        assert TENSOR_CORE[target] in machine.asm["ptx"]


@pytest.mark.parametrize(
    "dtype, precision", [("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")]
)
@pytest.mark.parametrize("target", TARGETS)
def test_forward(target, dtype, precision, tmp_path):
    tiles = logprob.FORWARD_ON_H100 if target == 90 else logprob.FORWARD
    BT, BV, BD = tiles[4 if dtype == "fp32" else 2]
    pointers = {"hidden": dtype, "weight": dtype, "targets": "i64", "out": "fp32"}
    constants = {"PRECISION": precision, "BT": BT, "BV": BV, "BD": BD}
    tensor_core = (dtype, precision) != ("fp32", "ieee")  # exact fp32 products are for the ordinary cores
    check(
        logprob.partials_kernel,
        target,
        pointers,
        constants,
        ["width", "size"],
        tmp_path,
        tensor_core,
        num_warps=logprob.WARPS,
    )


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_gradient_of_logits(target, dtype, entropy, tmp_path):
    per_token = ["top", "lse", "entropy", "grad_logprob", *["grad_entropy"] * entropy]
    pointers = {"z": "fp32", "out": dtype, "targets": "i64", **dict.fromkeys(per_token, "fp32")}
    constants = {"COLUMNS": logprob.COLUMNS, **({} if entropy else {"grad_entropy": None})}
    check(
        logprob.logits_to_gradient_kernel, target, pointers, constants, ["z_stride", "out_stride"], tmp_path
    )


@pytest.mark.parametrize("top_p", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_sampler(target, dtype, top_p, tmp_path):
    """BLOCKS for a vocabulary of 256k; with key and position in int64; without top-p there is no floor."""
    pointers = {"logits": dtype, "peak": "fp32", "mass": "fp32", **({"floor": "i32"} if top_p else {})}
    constants = {"TILE": sampler.TILE, **({} if top_p else {"floor": None})}
    check(sampler.block_mass, target, pointers, constants, ["stride"], tmp_path)
    pointers |= {"key": "i64", "position": "i64", "token": "i64", "logprob": "fp32"}
    check(sampler.block_draw, target, pointers, {**constants, "BLOCKS": 256}, ["stride"], tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_floor_of_top_p(target, dtype, tmp_path):
    pointers, digits = {"floor": "i32", "peak": "fp32", "above": "fp32"}, {"DIGITS": 2**sampler.BITS}
    tile = {"TILE": sampler.TILE, **digits}
    check(sampler.block_above, target, {**pointers, "logits": dtype}, tile, ["stride"], tmp_path, num_warps=1)
    check(sampler.raise_floor, target, {**pointers, "mass": "fp32"}, {"BLOCKS": 256, **digits}, [], tmp_path)


@pytest.mark.parametrize("group, width, dtype", [
    (6, 128, "bf16"), (7, 64, "bf16"), (1, 96, "fp16"), (8, 256, "bf16"), (4, 128, "fp32"),
])  # fmt: skip
@pytest.mark.parametrize("target", TARGETS)
def test_attention_over_a_cache(target, group, width, dtype, tmp_path):
    """Qwen2.5-1.5B's heads, 0.5B's, a width that is no power of 2, the widest, and fp32."""
    tensors = dict.fromkeys(("q", "k", "v", "keys", "values"), dtype)
    partial = dict.fromkeys(("acc", "peak", "mass"), "fp32")
    sizes = attention.tile_sizes(group, width, 4 if dtype == "fp32" else 2)
    strides = ["q_stride", "k_stride", "v_stride", "row_stride", "head_stride"]
    pointers = {**tensors, **partial, "length": "i32"}
    check(attention.attend_split, target, pointers, sizes, strides, tmp_path, num_warps=4, num_stages=3)
    constants = {"N": attention.MOST_SPLITS, "E": width, "BE": sizes["BE"]}
    check(attention.merge_splits, target, {**partial, "out": dtype}, constants, [], tmp_path)


@pytest.mark.parametrize("dtype, to", [("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32")])
@pytest.mark.parametrize("half", [32, 40, 64])
@pytest.mark.parametrize("target", TARGETS)
def test_rotation(target, half, dtype, to, tmp_path):
    pointers = {"x": dtype, "cos": "fp32", "signed_sin": "fp32", "out": to}
    constants = {"HALF": half, "PAIRS": triton.next_power_of_2(half), "HEADS": fused.HEADS}
    check(fused.rotate_kernel, target, pointers, constants, ["token_stride", "head_stride"], tmp_path)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("target", TARGETS)
def test_swiglu(target, dtype, tmp_path):
    pointers, constants = {"gate_up": dtype, "out": dtype}, {"COLUMNS": fused.COLUMNS}
    check(fused.swiglu_kernel, target, pointers, constants, ["width", "stride"], tmp_path)
    pointers, aligned = {**pointers, "grad": dtype}, ["width", "stride", "grad_stride"]
    check(fused.swiglu_gradient_kernel, target, pointers, constants, aligned, tmp_path)
