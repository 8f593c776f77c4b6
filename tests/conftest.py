"""What tests in several files share."""

import signal

import pytest
import torch
from plain_dinov2 import release

from temi.backbones import load_backbone


@pytest.fixture(scope="session", autouse=True)
def heeds_interrupts():
    """What a shell starts in the background ignores Ctrl-C, and hands that on to its children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="session", params=["dinov2_vits14", "dinov2_vits14_reg"])
def small(request, tmp_path_factory):
    """A small DINOv2 in the original release's format."""
    path = tmp_path_factory.mktemp("release") / f"{request.param}_pretrain.pth"
    tensors = release(request.param)
    torch.save(tensors, path)
    return request.param, tensors, path, load_backbone(request.param, weights=path)
