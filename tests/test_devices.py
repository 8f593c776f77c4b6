import os
import platform
import subprocess
import sys

import pytest
import torch

from temi.config import TrainConfig
from temi.devices import (
    device_name,
    half_precision,
    has_bf16,
    is_out_of_memory,
    resolve_device,
    runs_bf16,
    uses_bf16,
)

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def asked_anew():
    """What a test pretends of the machine, the next one does not remember."""
    yield
    has_bf16.cache_clear()
    runs_bf16.cache_clear()


def pretend(monkeypatch, **capabilities: bool) -> None:
    """Let the processor have instructions."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    has_bf16.cache_clear()
    runs_bf16.cache_clear()


def test_names():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match=r"device='tpu': this machine has auto, .*cpu"):
        TrainConfig(device="tpu")


@pytest.mark.parametrize("own", [True, False])
def test_precision(own, monkeypatch):
    pretend(monkeypatch, avx512_bf16=own)
    for precision, expected in (("fp32", False), ("auto", own), ("bf16", True)):
        with half_precision(precision, CPU):
            assert torch.is_autocast_enabled("cpu") == expected


CRASH = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"


@pytest.mark.parametrize(("product", "expected"), [("", True), (CRASH, False)])
def test_amx_is_tried_before_auto_takes_it(product, expected, monkeypatch):
    monkeypatch.setattr("temi.devices._BF16_PRODUCT", product)
    pretend(monkeypatch, avx512_bf16=True, amx_bf16=True)
    assert uses_bf16("auto", CPU) == expected


def test_a_torch_that_cannot_tell_stays_with_fp32(monkeypatch):
    has_bf16.cache_clear()
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert not uses_bf16("auto", CPU)


def test_a_trial_that_stops_its_process_is_said(monkeypatch):
    """As on a virtual machine that announces instructions and does not run them."""
    monkeypatch.setattr("temi.devices._BF16_PRODUCT", CRASH)
    pretend(monkeypatch)
    with pytest.raises(ValueError, match=r"precision='bf16': .*'auto' or 'fp32' is allowed"):
        TrainConfig(precision="bf16", device="cpu")
    assert TrainConfig(device="cpu").precision == "auto"
    pretend(monkeypatch, avx512_bf16=True)  # which need no trial
    assert TrainConfig(precision="bf16", device="cpu").precision == "bf16"


def test_memory_errors_are_recognised():
    assert is_out_of_memory(MemoryError())
    text = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another libc has its own ways")
def test_freed_memory_is_used_again_without_page_faults():
    """In a process of its own, as what it sets holds for all of a process.

    Whether glibc gives memory back depends on what lies beside it, unless it is told to, by its own
    environment variable, for blocks from 128 KiB on.
    """
    code = """
import resource, sys, torch
from temi.devices import keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        several = [torch.zeros(2**21) for _ in range(3)]  # 8 MiB each, as a layer's output
        del several
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
plain = faults()
keep_freed_memory()
faults()
print(plain, faults())
"""
    told = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**17)},
        capture_output=True,
        text=True,
        check=True,
    )
    plain, kept = map(int, told.stdout.split())
    assert kept < 100 < plain


def test_auto_is_the_first_device_that_is_there(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert resolve_device("auto").type == "mps"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert [str(resolve_device(name)) for name in ("auto", "cuda:1")] == ["cuda", "cuda:1"]
    with pytest.raises(ValueError, match=r"has auto, cuda, cuda:0, cuda:1, mps, cpu$"):
        resolve_device("cuda:2")


@pytest.mark.parametrize("own", [True, False])
def test_auto_is_bf16_on_a_gpu_that_has_it_itself(own, monkeypatch):
    def asked(including_emulation=True):
        return own or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", asked)
    pretend(monkeypatch)
    assert uses_bf16("auto", torch.device("cuda")) == own


def test_products_are_in_bf16_where_it_is_used(monkeypatch):
    monkeypatch.setattr("temi.devices.uses_bf16", lambda *_: True)
    with half_precision("auto", CPU):
        assert torch.is_autocast_enabled("cpu")


def test_a_gpu_has_its_makers_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"H100 {device.index}")
    assert [device_name(torch.device(d)) for d in ("cuda:1", "cpu")] == ["H100 1", "cpu"]
