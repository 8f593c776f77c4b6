import pytest
import torch

from temi.config import TrainConfig
from temi.devices import half_precision, is_out_of_memory, resolve_device, runs_bf16

CPU = torch.device("cpu")


def test_names():
    assert resolve_device("cpu") == CPU
    assert resolve_device("auto").type in ("cpu", "cuda", "mps")
    with pytest.raises(ValueError, match=r"device='tpu': this machine has auto, .*cpu"):
        TrainConfig(device="tpu")


def test_precision():
    for precision, expected in (("fp32", False), ("auto", False), ("bf16", True)):
        with half_precision(precision, CPU):
            assert torch.is_autocast_enabled("cpu") == expected


def test_a_trial_that_stops_its_process_is_said(monkeypatch):
    """As on a virtual machine that announces instructions and does not run them."""
    crash = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    monkeypatch.setattr("temi.devices._BF16_PRODUCT", crash)
    runs_bf16.cache_clear()
    with pytest.raises(ValueError, match=r"precision='bf16': .*'auto' or 'fp32' is allowed"):
        TrainConfig(precision="bf16", device="cpu")
    assert TrainConfig(device="cpu").precision == "auto"
    runs_bf16.cache_clear()


def test_memory_errors_are_recognised():
    assert is_out_of_memory(MemoryError())
    text = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried"
    assert is_out_of_memory(RuntimeError(text))
    assert not is_out_of_memory(RuntimeError("shape mismatch"))
