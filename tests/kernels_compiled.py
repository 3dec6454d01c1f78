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
# by the end of the name; any other scalar is an i32
SCALARS = dict.fromkeys(("temperature", "top_p", "scale", "sign"), "fp32")
MULTIPLES_OF_16 = ("stride", "width", "size")  # scalars whose names end so


def compiled(kernel, target, pointers, constants, **options):
    """Compile a kernel as a launch would; pointers: name -> dtype."""
    names = [parameter.name for parameter in kernel.params]
    scalar = {name: next((t for end, t in SCALARS.items() if name.endswith(end)), "i32") for name in names}
    types = {
        **scalar,
        **{n: f"*{kind}" for n, kind in pointers.items()},
        **dict.fromkeys(constants, "constexpr"),
    }
    aligned = [*pointers, *(name for name in names if name.endswith(MULTIPLES_OF_16))]
    hints = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    values = {(names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, types, values, hints)
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
    level = ["--regAllocOptLevel=2"] if recent else []
    command = [get_ptxas(*which).path, "-lineinfo", "-v", *level, f"--gpu-name={gpu}", ptx, "-o", cubin]
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
    splats = re.findall(r"(%\w+) = tt.splat (%\w+) : !tt.ptr", code)
    arguments |= {name for name, of in splats if of in arguments}
    offsets = re.findall(r"tt.addptr (%\w+), %\w+ : \S+, (\S+)", code)
    first = [kind for base, kind in offsets if base in arguments]
    assert first and all(re.search(r"\bi64|xi64>", kind) for kind in first), offsets


@pytest.fixture(params=[*SHARED_LIMIT, "gfx942"])
def target(request):
    return request.param


@pytest.fixture
def check(target, tmp_path):
    """check(kernel, pointers, constants) compiles a kernel for the target and looks at the machine code."""

    def check(kernel, pointers, constants, tensor_core=False, **options):
        machine = compiled(kernel, target, pointers, constants, **options)
        assert_offsets_of_64_bits(machine)
        if target == "gfx942":
            return
        registers, spilled = resources(machine, target, tmp_path)
        kinds = ", ".join(sorted({kind for kind in pointers.values() if kind != "i64"}))
        print(f"sm_{target:<4}{kernel.__name__:<28}{kinds:<12}{registers:>4} registers{spilled:>4} bytes "
              f"spilled{machine.metadata.shared:>8} bytes shared")  # fmt: skip
        assert spilled == 0 and machine.metadata.shared <= SHARED_LIMIT[target]
        assert not tensor_core or TENSOR_CORE[target] in machine.asm["ptx"]

    return check


PRODUCTS = [("bf16", "ieee"), ("fp16", "ieee"), ("fp32", "ieee"), ("fp32", "tf32")]


@pytest.mark.parametrize("dtype, precision", PRODUCTS)
def test_forward(check, target, dtype, precision):
    tiles = logprob.FORWARD_ON_H100 if target == 90 else logprob.FORWARD
    BT, BV, BD = tiles[4 if dtype == "fp32" else 2]
    pointers = {"hidden": dtype, "weight": dtype, "targets": "i64", "out": "fp32"}
    constants = {"PRECISION": precision, "BT": BT, "BV": BV, "BD": BD}
    tensor_core = (dtype, precision) != ("fp32", "ieee")  # exact fp32 products are for the ordinary cores
    check(logprob.partials_kernel, pointers, constants, tensor_core, num_warps=logprob.WARPS)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_gradient_of_logits(check, dtype, entropy):
    per_token = ["top", "lse", "entropy", "grad_logprob", *["grad_entropy"] * entropy]
    pointers = {"z": "fp32", "out": dtype, "targets": "i64", **dict.fromkeys(per_token, "fp32")}
    constants = {"COLUMNS": logprob.COLUMNS, **({} if entropy else {"grad_entropy": None})}
    check(logprob.logits_to_gradient_kernel, pointers, constants)


@pytest.mark.parametrize("top_p", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_sampler(check, dtype, top_p):
    """BLOCKS for a vocabulary of 256k; with key and position in int64; without top-p there is no floor."""
    pointers = {"logits": dtype, "peak": "fp32", "mass": "fp32", **({"floor": "i32"} if top_p else {})}
    constants = {"TILE": sampler.TILE, **({} if top_p else {"floor": None})}
    check(sampler.block_mass, pointers, constants)
    pointers |= {"key": "i64", "position": "i64", "token": "i64", "logprob": "fp32"}
    check(sampler.block_draw, pointers, {**constants, "BLOCKS": 256})


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_floor_of_top_p(check, dtype):
    pointers, digits = {"floor": "i32", "peak": "fp32", "above": "fp32"}, {"DIGITS": 2**sampler.BITS}
    tile = {"TILE": sampler.TILE, **digits}
    check(sampler.block_above, {**pointers, "logits": dtype}, tile, num_warps=1)
    check(sampler.raise_floor, {**pointers, "mass": "fp32"}, {"BLOCKS": 256, **digits})


@pytest.mark.parametrize("group, width, dtype", [
    (6, 128, "bf16"), (7, 64, "bf16"), (1, 96, "fp16"), (8, 256, "bf16"), (4, 128, "fp32"),
])  # fmt: skip
def test_attention_over_a_cache(check, group, width, dtype):
    """Qwen2.5-1.5B's heads, 0.5B's, a width that is no power of 2, the widest, and fp32."""
    tensors = dict.fromkeys(("q", "k", "v", "keys", "values"), dtype)
    partial = dict.fromkeys(("acc", "peak", "mass"), "fp32")
    sizes = attention.tile_sizes(group, width, 4 if dtype == "fp32" else 2)
    pointers = {**tensors, **partial, "length": "i32"}
    check(attention.attend_split, pointers, sizes, num_warps=4, num_stages=3)
    constants = {"N": attention.MOST_SPLITS, "E": width, "BE": sizes["BE"]}
    check(attention.merge_splits, {**partial, "out": dtype}, constants)


@pytest.mark.parametrize("dtype, to", [("bf16", "bf16"), ("fp32", "bf16"), ("fp32", "fp32")])
@pytest.mark.parametrize("half", [32, 40, 64])
def test_rotation(check, half, dtype, to):
    pointers = {"x": dtype, "cos": "fp32", "signed_sin": "fp32", "out": to}
    constants = {"HALF": half, "PAIRS": triton.next_power_of_2(half), "HEADS": fused.HEADS}
    check(fused.rotate_kernel, pointers, constants)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_swiglu(check, dtype):
    pointers, constants = {"gate_up": dtype, "out": dtype}, {"COLUMNS": fused.COLUMNS}
    check(fused.swiglu_kernel, pointers, constants)
    check(fused.swiglu_gradient_kernel, {**pointers, "grad": dtype}, constants)
