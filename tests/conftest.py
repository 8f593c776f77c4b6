"""A small DINOv2 in the original release's format, for tests of weights and of backbones."""

import pytest
import torch
from plain_dinov2 import release

from temi.backbones import load_backbone


@pytest.fixture(scope="session", params=["dinov2_vits14", "dinov2_vits14_reg"])
def small(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / f"{request.param}_pretrain.pth"
    tensors = release(request.param)
    torch.save(tensors, path)
    return request.param, tensors, path, load_backbone(request.param, weights=path)
