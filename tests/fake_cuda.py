"""Test-only: tensors that claim to be on a GPU and hold no numbers, so that the program's CUDA path runs
without a GPU.

torch's FakeTensorMode knows shape, dtype, strides and device of every result, autograd and autocast included,
and refuses to mix devices. `FakeCuda` adds what it lets pass and a GPU does not forgive: a read that makes
the host wait, a copy between host and device inside a recorded step, an index that lies on the wrong side.
Tensors of the CPU stay real.

Only for a process of its own: `install` swaps torch's CUDA hooks, for good.
"""

import contextlib
import ctypes
import importlib.util
import inspect
import shutil
import sys
import textwrap
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest import mock

import flash_attention
import torch
from conftest import execute
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import arg_tree_leaves

# What autograd's engine asks of a CUDA device: that there is one, and which is the current stream.
SOURCE = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <new>
using c10::DeviceIndex;
using c10::DeviceType;

struct Guard final : c10::impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  c10::Device getDevice() const override { return {DeviceType::CUDA, 0}; }
  c10::Device exchangeDevice(c10::Device) const override { return getDevice(); }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, getDevice());
  }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};

struct Hooks final : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  void init() const override {}
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  long versionRuntimeCuDNN() const override { return 0; }
};
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface), "only the vtable may differ");

extern "C" int install() {
  auto& slot = c10::impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)];
  if (slot.load() == nullptr || slot.load()->deviceCount() == 0) slot.store(new Guard());
  auto& hooks = const_cast<at::CUDAHooksInterface&>(at::detail::getCUDAHooks());
  if (!hooks.hasCUDA()) new (&hooks) Hooks(); // where torch made its own at import
  return at::detail::getCUDAHooks().hasCUDA();
}
"""
COMPILER = shutil.which("c++") or shutil.which("g++")


def install(folder):
    """Compile the device in `folder` (5 seconds) and put it into this process, before any backward pass."""
    torch_folder = Path(torch.__file__).parent
    source, library = Path(folder) / "fake_cuda.cpp", Path(folder) / "fake_cuda.so"
    source.write_text(SOURCE)
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    where = [f"-I{torch_folder}/include", f"-L{torch_folder}/lib", "-lc10", "-ltorch_cpu"]
    execute([COMPILER, "-std=c++20", "-O0", "-fPIC", "-shared", abi, source, "-o", library, *where])
    assert ctypes.CDLL(str(library)).install() == 1


class Waits(AssertionError):
    """The host would wait for the device where the program promises not to."""


aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.is_nonzero.default, aten.equal.default, aten.nonzero.default}
COPIES = {aten._to_copy.default, aten.copy_.default, aten._foreach_copy_.default}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._unsafe_index.Tensor}


class FakeCuda(FakeTensorMode):
    """Operations on the CPU run for real, those that touch "cuda" are checked and give fake results."""

    avoid_device_init = True  # there is none, whatever torch.cuda.is_available says below

    def __init__(self):
        super().__init__(allow_non_fake_inputs=True)
        self.may_read = self.recording = False
        self.packed_calls = 0  # of torch's flash attention
        self.slow_uploads = 0  # copies to the device that wait until it has done all it was told before

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = arg_tree_leaves(*args, **(kwargs or {}))
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        asks = any(isinstance(x, torch.device) and x.type == "cuda" for x in leaves)
        if not asks and not any(isinstance(x, FakeTensor) for x in tensors):
            return func(*args, **(kwargs or {}))
        self.check(func, args, kwargs or {}, tensors)
        if func is aten.addmm.dtype_out and torch.__version__ < (2, 13):
            return kwargs["out"]  # the shape is worked out by a function that does not know the dtype
        return super().__torch_dispatch__(func, types, args, kwargs)

    def check(self, func, args, kwargs, tensors):
        sides = {x.device.type for x in tensors}
        if func in READS:
            raise Waits(f"{func}: the host reads a number of the device")
        if func == aten._flash_attention_forward.default:
            q, k, v, ends_q, ends_k = args[:5]
            flash_attention.check(q, k, v)
            for ends in (ends_q, ends_k):
                flash_attention.check_lengths(ends, len(ends_q), q)
            self.packed_calls += 1
        if func in INDEXING:
            self.check_indices(*args)
        elif func in COPIES:
            target = (kwargs.get("device") or tensors[0].device).type
            source = tensors[-1].device.type
            if (target, source) == ("cpu", "cuda") and not self.may_read:
                raise Waits(f"{func}: copies from the device to the host")
            if (target, source) == ("cuda", "cpu"):
                if self.recording:
                    raise Waits(f"{func}: copies from the host to the device in a recorded step")
                queued = kwargs.get("non_blocking") or True in args[2:]
                source = tensors[-1]
                self.slow_uploads += not (queued and hasattr(source, "pinned") and source.is_contiguous())
        elif self.recording and "cpu" in sides:
            raise AssertionError(f"{func}: a CPU tensor in a step that a CUDA graph records")

    def check_indices(self, x, indices, values=None, *_):
        for index in (index for index in indices if index is not None):
            if index.device.type != x.device.type:
                raise AssertionError(f"a tensor on {x.device.type} is indexed by one on {index.device.type}")
            if index.dtype == torch.bool and not (values is not None and values.numel() == 1):
                raise Waits("indexing by a mask: the host has to know how many places are True")

    @contextlib.contextmanager
    def reading(self):
        """Here the program waits for the device, on purpose."""
        self.may_read = not self.recording
        try:
            yield
        finally:
            self.may_read = False

    @contextlib.contextmanager
    def as_recorded(self):
        """Here a CUDA graph may be recorded: neither reads nor copies between host and device."""
        before = self.recording, self.may_read
        self.recording, self.may_read = True, False
        try:
            yield
        finally:
            self.recording, self.may_read = before


def pin_memory(x):
    """Tensor.pin_memory, which would ask the driver: the same numbers with a mark."""
    x = x.view_as(x)
    x.pinned = True
    return x


@contextlib.contextmanager
def fake_cuda():
    """The mode, with torch's own questions about the device answered."""
    properties = SimpleNamespace(multi_processor_count=108, total_memory=80 * 10**9, major=8, minor=0)
    with (
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *_, **__: True),
        mock.patch("torch.cuda.is_available", lambda: True),
        # two questions that torch's CUDA builds put to the driver, which is not there
        mock.patch("torch._subclasses.fake_tensor.init_gpu_context", lambda _: None),
        mock.patch("torch.cuda.is_current_stream_capturing", lambda: False),
        # what DTensor asks, to work out a shape, is not the program's
        mock.patch("torch.distributed.tensor._sharding_prop.detect_fake_mode", lambda: None, create=True),
        mock.patch("torch.cuda.graph_pool_handle", lambda: None),
        mock.patch("torch.cuda.max_memory_allocated", lambda *_: 0),
        mock.patch("torch.cuda.get_device_properties", lambda *_: properties),
        mock.patch("torch.cuda.get_device_capability", lambda *_: (8, 0)),
        mock.patch("torch.backends.cuda.is_flash_attention_available", lambda: True),
        mock.patch("torch.Tensor.pin_memory", pin_memory),
        FakeCuda() as mode,
    ):
        yield mode


class Kernel:
    """Stands in for a Triton kernel: checks what a launch is given, and launches nothing."""

    def __init__(self, name, check, arity=None):
        self.name, self.check, self.arity, self.launches = name, check, arity, 0

    def __getitem__(self, grid):
        sizes_fit = all(type(n) is int and n >= 1 for n in grid) and max(grid[1:], default=1) <= 65535
        assert sizes_fit, f"{self.name}: grid {grid}"

        def launch(*args, num_warps=4, num_stages=3, **constants):
            count = len(args) + len(constants)
            assert self.arity in (None, count), f"{self.name}: {count} arguments"
            for index, x in enumerate(args):
                on_device = isinstance(x, FakeTensor) and x.is_cuda
                is_number = x is None or type(x) in (int, float)
                assert on_device or is_number, f"{self.name}: argument {index} is {x!r}"
            self.check(grid, *args, **constants)
            self.launches += 1

        return launch


def triton_halves():
    """kernels/*_triton.py, also without triton: launches are replaced, the rest needs only its names."""
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("triton") is None:
            stub = ModuleType("triton")
            stub.jit = lambda function=None, **options: function or stub.jit
            stub.language = SimpleNamespace(constexpr=None)
            stack.enter_context(mock.patch.dict(sys.modules, triton=stub))
        from kernels import attention_triton, fused_triton, logprob_triton, sampler_triton
    return attention_triton, fused_triton, logprob_triton, sampler_triton


def plant(monkeypatch, where, name, old, new):
    """A planted mistake: put a function of the program with a change of its source in its place."""
    function = inspect.getattr_static(where, name)
    function = getattr(function, "func", function)  # of a cached property
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{name} does not hold the text to change once: {old}"
    space = {}
    exec(source.replace(old, new), inspect.unwrap(function).__globals__, space)
    if hasattr(space[name], "__set_name__"):
        space[name].__set_name__(where, name)
    monkeypatch.setattr(where, name, space[name])
