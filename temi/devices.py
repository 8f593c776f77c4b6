"""Which device and which precision a computation runs in."""

import ctypes
import functools
import platform
import subprocess
import sys

import torch

_BF16_PRODUCT = "import torch; x = torch.ones(64, 64, dtype=torch.bfloat16); x @ x"


def resolve_device(device: str) -> torch.device:
    """Torch device for a name; ``auto`` is the first of CUDA, MPS and CPU that is there.

    Raises
    ------
    ValueError
        If there is no device of that name on this machine.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    available[:0] = ["cuda"] * (gpus > 0) + [f"cuda:{index}" for index in range(gpus)]
    if device == "auto":
        return torch.device(available[0])
    if device not in available:
        raise ValueError(f"device={device!r}: this machine has {', '.join(['auto', *available])}")
    return torch.device(device)


@functools.cache
def runs_bf16(device_type: str) -> bool:
    """Whether matrix products in bfloat16 run on a device; tried on a CPU, asked of a GPU.

    Some virtual machines announce a processor's AMX instructions and then stop the process that
    uses them, so the trial is a process of its own (about two seconds, once).
    """
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    trial = subprocess.run([sys.executable, "-c", _BF16_PRODUCT], capture_output=True, check=False)
    return trial.returncode == 0


@functools.cache
def has_bf16(device_type: str) -> bool:
    """Whether a device has instructions for matrix products in bfloat16, which are faster then.

    Of a CPU these are AVX512-BF16 and AMX; others take longer than for products in float32. AMX is
    tried, as :func:`runs_bf16` says why.
    """
    if device_type != "cpu":
        return device_type == "cuda" and runs_bf16("cuda")
    has = getattr(torch.cpu, "get_capabilities", dict)()  # not in every version of torch
    amx = has.get("amx_bf16", False)
    return runs_bf16("cpu") if amx else has.get("avx512_bf16", False)


def check_precision(precision: str, device: torch.device) -> None:
    """Raise a ValueError if ``precision`` cannot be had on ``device``."""
    if precision == "bf16" and not (has_bf16(device.type) or runs_bf16(device.type)):
        raise ValueError(
            f"precision='bf16': products in bfloat16 do not run on this machine's {device.type}; "
            "'auto' or 'fp32' is allowed (on a virtual machine whose AMX is cut off, setting the "
            "environment variable ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 helps)"
        )


def uses_bf16(precision: str, device: torch.device) -> bool:
    """Whether matrix products run in bfloat16: ``auto`` means where :func:`has_bf16`."""
    return precision == "bf16" or (precision == "auto" and has_bf16(device.type))


def half_precision(precision: str, device: torch.device) -> torch.autocast:
    """Context in which matrix products run in bfloat16 if :func:`uses_bf16`, else in float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=uses_bf16(precision, device))


def device_name(device: torch.device) -> str:
    """What a GPU's maker calls it; else the type of the device, as ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def keep_freed_memory() -> None:
    """Let this process keep memory that it has freed, up to 1 GB, where glibc manages it.

    A network's forward pass on a CPU frees tensors of some megabytes after each layer. Left to
    itself, glibc gives many of them back to the system, which has to clear the pages that it hands
    out again: up to twice the time of the pass (benchmarks/embedding.py). Blocks from 32 MiB on,
    the most that glibc allows here, still come and go.
    """
    if platform.libc_ver()[0] == "glibc":
        trim_threshold, mmap_threshold = -1, -3  # their numbers in malloc.h
        libc = ctypes.CDLL(None)
        libc.mallopt(mmap_threshold, 2**25)
        libc.mallopt(trim_threshold, 2**30)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory, of a GPU or of the machine, was not enough."""
    texts = ("out of memory", "can't allocate memory")
    return isinstance(error, (torch.cuda.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )
