"""kernels/adamw.cu against python/funicular/reference.py, bit by bit, and its speed.

Needs torch with CUDA; NVRTC and the driver are called through ctypes. From the repository's root:
    python tests/gpu/check_adamw_cuda.py            compare, then time
    python tests/gpu/check_adamw_cuda.py --compile  only compile, which needs no GPU
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "python" / "funicular"), str(ROOT / "tests" / "data")]

import make_adamw_golden
import reference

NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
TRAFFIC = {torch.float32: 28, torch.bfloat16: 26, torch.float16: 30}
LENGTHS = [1, 7, 8, 255, 4099, 100_003]


class Hyper(ctypes.Structure):
    """`Hyper` of kernels/adamw.cu."""

    _fields_ = [
        *((name, ctypes.c_float) for name in ("decay", "lerp_coeff", "beta2", "one_minus_beta2")),
        *((name, ctypes.c_float) for name in ("bias_correction2_sqrt", "step_size", "eps", "grad_factor")),
        ("lerp_from_grad", ctypes.c_uint32),
        ("clip", ctypes.c_float),
    ]


def nvrtc() -> ctypes.CDLL:
    """The NVRTC that came with torch, or the system's."""
    for root in {str(Path(torch.__file__).parents[1]), *sys.path}:
        for path in sorted(str(p) for p in Path(root).glob("nvidia/*/lib/libnvrtc.so.*")):
            if "alt" not in path:
                return ctypes.CDLL(path)
    return ctypes.CDLL("libnvrtc.so")


def compile_ptx(arch: str, name: str = "adamw.cu") -> bytes:
    """The kernels of a file as PTX."""
    lib = nvrtc()
    program = ctypes.c_void_p()
    source = b"".join((ROOT / "kernels" / file).read_bytes() for file in ("elements.cuh", name))
    assert lib.nvrtcCreateProgram(ctypes.byref(program), source, name.encode(), 0, None, None) == 0
    options = [f"--gpu-architecture={arch}".encode(), b"--fmad=false", b"--std=c++17"]
    status = lib.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options))
    size = ctypes.c_size_t()
    lib.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetProgramLog(program, log)
    if log.value.strip():
        print(log.value.decode())
    if status != 0:
        sys.exit(f"NVRTC refused kernels/{name} (status {status})")
    lib.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    lib.nvrtcGetPTX(program, ptx)
    return ptx.raw


class Kernels:
    """The loaded module, in torch's context."""

    def __init__(self) -> None:
        torch.cuda.init()
        torch.empty(1, device="cuda")
        major, minor = torch.cuda.get_device_capability()
        self.cuda = ctypes.CDLL("libcuda.so.1")
        self.module = ctypes.c_void_p()
        self.check(self.cuda.cuModuleLoadData(ctypes.byref(self.module), compile_ptx(f"compute_{major}{minor}")))
        self.grid = torch.cuda.get_device_properties(0).multi_processor_count * 8

    @staticmethod
    def check(status: int) -> None:
        """Raises for a driver error."""
        if status != 0:
            raise RuntimeError(f"CUDA driver error {status}")

    def launch(self, name: str, grid: int, block: int, *arguments: Any) -> None:
        """Launches on torch's current stream."""
        function = ctypes.c_void_p()
        self.check(self.cuda.cuModuleGetFunction(ctypes.byref(function), self.module, name.encode()))
        pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))
        stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        self.check(self.cuda.cuLaunchKernel(function, grid, 1, 1, block, 1, 1, 0, stream, pointers, None))

    def adamw(self, arrays: dict[str, torch.Tensor | None], hyper: Hyper, *, reset_master: bool) -> None:
        """One step in place."""
        param = arrays["param"]
        assert param is not None
        order = ("param", "grad", "master", "exp_avg", "exp_avg_sq")
        pointers = [ctypes.c_uint64(0 if (t := arrays[k]) is None else t.data_ptr()) for k in order]
        count, reset = ctypes.c_uint64(param.numel()), ctypes.c_uint32(reset_master)
        self.launch(f"adamw_{NAMES[param.dtype]}", self.grid, 256, *pointers, count, hyper, reset)

    def norm_sq(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of squares as an fp64 tensor of one element."""
        blocks = -(-x.numel() // reference.NORM_BLOCK)
        partials = torch.empty(blocks, dtype=torch.float64, device="cuda")
        out = torch.empty(1, dtype=torch.float64, device="cuda")
        data, count = ctypes.c_uint64(x.data_ptr()), ctypes.c_uint64(x.numel())
        at, total = ctypes.c_uint64(partials.data_ptr()), ctypes.c_uint64(out.data_ptr())
        self.launch(f"norm_partials_{NAMES[x.dtype]}", self.grid, 256, data, count, at)
        self.launch("norm_sum", 1, 32, at, ctypes.c_uint64(blocks), total)
        return out


def hyper_of(options: dict[str, Any]) -> Hyper:
    """The scalars of a step."""
    return Hyper(**{k: int(v) if k == "lerp_from_grad" else v for k, v in reference.hyper(**options)._asdict().items()})


def on_cuda(x: torch.Tensor | None, shift: int) -> torch.Tensor | None:
    """A copy whose address is `shift` elements past a 256-byte boundary."""
    if x is None:
        return None
    room = torch.empty(x.numel() + shift, dtype=x.dtype, device="cuda")[shift:]
    room.copy_(x)
    return room


def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    """Equal bits."""
    if a is None or b is None:
        return a is b
    return torch.equal(a.cpu().contiguous().view(torch.uint8), b.cpu().contiguous().view(torch.uint8))


def compare(kernels: Kernels) -> int:
    """Every type, length, alignment and set of options; returns the number of comparisons."""
    count = 0
    cases = itertools.product(NAMES, LENGTHS, (0, 1), enumerate(make_adamw_golden.CASES))
    for dtype, length, shift, (index, case) in cases:
        lr, beta1, beta2, eps, weight_decay, grad_scale, clip, step, maximize, reset_master = case
        options = {"lr": lr, "betas": (beta1, beta2), "eps": eps, "weight_decay": weight_decay, "step": int(step)}
        options |= {"maximize": bool(maximize), "grad_scale": grad_scale, "clip": clip}
        expected = make_adamw_golden.random_arrays(dtype, length, 7 * length + index)
        ours = {name: on_cuda(x, shift) for name, x in expected.items()}
        torch_on_cuda = {name: on_cuda(x, 0) for name, x in expected.items()}
        norm = reference.norm_sq(expected["grad"])
        assert ours["grad"] is not None
        our_norm = kernels.norm_sq(ours["grad"]).item()
        assert norm == our_norm or (norm != norm and our_norm != our_norm), ("norm", dtype, length, norm, our_norm)
        for arrays in (expected, torch_on_cuda):
            order = ("param", "grad", "exp_avg", "exp_avg_sq", "master")
            reference.adamw_step(*(arrays[k] for k in order), **options, reset_master=bool(reset_master))
        kernels.adamw(ours, hyper_of(options), reset_master=bool(reset_master))
        for name, x in expected.items():
            assert same(x, ours[name]), ("kernel", dtype, length, shift, index, name)
            assert same(x, torch_on_cuda[name]), ("the reference on CUDA", dtype, length, index, name)
            count += 1
    long = torch.randn(3_000_001, generator=torch.Generator().manual_seed(1))
    for dtype in NAMES:
        x = long.to(dtype)
        assert reference.norm_sq(x) == kernels.norm_sq(x.cuda()).item(), ("norm", dtype)
        count += 1
    return count


def seconds(work: Any) -> float:
    """Median of several runs, by CUDA events."""
    times = []
    for _ in range(12):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times[2:])


def measure(kernels: Kernels, count: int) -> None:
    """Prints bytes per second."""
    options = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "step": 10}
    for dtype, name in NAMES.items():
        master = make_adamw_golden.MASTERS.get(dtype)
        arrays: dict[str, torch.Tensor | None] = {
            "param": torch.randn(count, device="cuda").to(dtype),
            "grad": torch.randn(count, device="cuda").to(dtype),
            "master": None if master is None else torch.zeros(count, dtype=master, device="cuda"),
            "exp_avg": torch.zeros(count, device="cuda"),
            "exp_avg_sq": torch.zeros(count, device="cuda"),
        }
        hyper = hyper_of(options)
        s = seconds(lambda arrays=arrays, hyper=hyper: kernels.adamw(arrays, hyper, reset_master=False))
        print(f"adamw {name:4} {count / s / 1e9:6.1f} Gparam/s {count * TRAFFIC[dtype] / s / 1e9:7.0f} GB/s")
        grad = arrays["grad"]
        assert grad is not None
        s = seconds(lambda grad=grad: kernels.norm_sq(grad))
        print(f"norm  {name:4} {count / s / 1e9:6.1f} Gelem/s  {count * dtype.itemsize / s / 1e9:7.0f} GB/s")


def main() -> None:
    """Compares and measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--arch", default="compute_90")
    parser.add_argument("--mi", type=int, default=256, help="elements to time, in Mi")
    args = parser.parse_args()
    if args.compile:
        for name in ("adamw.cu", "mean.cu"):
            print(f"{name}: {len(compile_ptx(args.arch, name))} bytes of PTX for {args.arch}")
        return
    kernels = Kernels()
    print(torch.cuda.get_device_name(), "torch", torch.__version__)
    print(f"{compare(kernels)} comparisons: all bits equal")
    measure(kernels, args.mi << 20)


if __name__ == "__main__":
    main()
