"""What tests in several files share."""

import shutil
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from plain_dinov2 import release

from temi import cache
from temi.backbones import load_backbone

CHROMIUM = shutil.which("chromium")


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


@pytest.fixture(scope="module")
def browser():
    """Chromium, for the pages that are looked at; what needs it is skipped without."""
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright, which drives the browser, is not installed"
    )
    if CHROMIUM is None:
        pytest.skip("no chromium is installed")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def folder(tmp_path):
    """Sixty small images of noise."""
    rng = np.random.default_rng(0)
    target = tmp_path / "photos"
    target.mkdir()
    for i in range(60):
        pixels = rng.integers(0, 255, (10, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(target / f"{i:03d}.png")
    return target


@pytest.fixture
def use(monkeypatch):
    """Make a backbone the one that is loaded, whatever its name."""

    def put(backbone):
        monkeypatch.setattr(cache, "load_backbone", lambda *_, **__: backbone)
        return backbone

    return put
