import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from plain_dinov2 import plain_dinov2, random_images, release
from safetensors.torch import save_file
from torch import nn

from temi import weights as pretrained
from temi.backbones import load_backbone
from temi.weights import check_tensors, fingerprint, read_tensors

GATED = ("w12.weight", "w12.bias", "w3.weight", "w3.bias")


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
        "dinov2_vitl14",
        pytest.param("dinov2_vitl14_reg", marks=pytest.mark.slow),
        pytest.param("dinov2_vitg14", marks=pytest.mark.slow),  # a minute and 10 GB of memory
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


@pytest.mark.parametrize("name", ["dinov2_vitg14", "dinov2_vitg14_reg"])
def test_every_tensor_of_the_giant_has_its_place(name, monkeypatch):
    with torch.device("meta"):
        monkeypatch.setattr(torch, "randn", lambda *shape, **_: torch.empty(*shape))
        tensors = release(name)
    generator = torch.Generator().manual_seed(0)
    for key, tensor in tensors.items():
        if key.startswith("blocks.0.mlp."):  # the gated layers exist in the giant alone
            tensors[key] = torch.rand(tensor.shape, generator=generator) - 0.5
    monkeypatch.setattr(pretrained, "read_tensors", lambda path: tensors)
    network = pretrained.dinov2(name, 224, "release.pth")
    assert network.pos_embed.shape == (1, 256 + (not name.endswith("_reg")), 1536)
    assert (len(network.blocks), network.num_features) == (40, 1536)
    w12, b12, w3, b3 = (tensors[f"blocks.0.mlp.{key}"] for key in GATED)
    x = torch.rand(3, 1536, generator=generator) - 0.5
    gate, value = (x @ w12.T + b12).split(4096, dim=1)
    expected = (gate * torch.sigmoid(gate) * value) @ w3.T + b3
    torch.testing.assert_close(network.blocks[0].mlp(x), expected, rtol=1e-4, atol=1e-2)


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


def test_timm_weights_that_do_not_fit_are_named(tmp_path):
    import timm

    tensors = timm.create_model("test_vit").state_dict()
    path = tmp_path / "model.safetensors"
    save_file(without(tensors, "norm.weight") | {"more": torch.zeros(1)}, path)
    with pytest.raises(
        ValueError, match=r"not the tensors of timm:test_vit; missing: norm\.weight; "
    ):
        load_backbone("timm:test_vit", weights=path)
    save_file(tensors | {"norm.weight": torch.zeros(3)}, path)
    with pytest.raises(ValueError, match=r"misshapen: norm\.weight \[3\] instead of \[64\]$"):
        load_backbone("timm:test_vit", weights=path)


def test_a_model_without_weights_is_never_random():
    with pytest.raises(ValueError, match="timm has no weights for it; give weights=PATH"):
        load_backbone("timm:coatnet_0_224")


def test_files_saved_on_a_gpu_and_files_at_home_are_read(tmp_path, monkeypatch):
    monkeypatch.setenv("TEMI_HOME", str(tmp_path))
    with monkeypatch.context() as patched:  # as on a machine with a GPU
        patched.setattr(torch.serialization, "location_tag", lambda storage: "cuda:0")
        torch.save({"a": torch.ones(2)}, tmp_path / "gpu.bin")
    assert read_tensors("gpu.bin")["a"].tolist() == [1, 1]


def test_names_dtypes_and_shapes_are_part_of_the_fingerprint():
    def of(name, tensor):
        return fingerprint(nn.ParameterDict({name: nn.Parameter(tensor, requires_grad=False)}))

    zeros = torch.zeros(4)
    others = [of("b", zeros), of("a", zeros[:2].double()), of("a", zeros.reshape(2, 2))]
    assert len({of("a", zeros), *others}) == 4


def test_how_many_more_do_not_fit():
    expected = dict.fromkeys("abcde", torch.Size([1]))
    with pytest.raises(ValueError, match=r"missing: a, b, c and 2 more$"):
        check_tensors("x", "x.pth", {}, expected)
    with pytest.raises(ValueError, match=r"missing: a, b, c and 1 more$"):
        check_tensors("x", "x.pth", {"e": torch.zeros(1)}, expected)


def test_timm_models_with_two_heads_or_one_size(tmp_path):
    for model, side in (("deit_tiny_distilled_patch16_224", None), ("gmixer_12_224", 224)):
        path = tmp_path / f"{model}.safetensors"
        save_file(timm.create_model(model, num_classes=7).state_dict(), path)
        network, _ = pretrained.timm_model(f"timm:{model}", side, path)
        assert network.num_classes == 0
        assert "state_dict" not in network.pretrained_cfg  # would be held twice


def test_loading_draws_no_random_numbers(small):
    name, _, path, _ = small
    before = torch.get_rng_state()
    pretrained.dinov2(name, 224, path)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_tensor_of_whole_numbers_is_refused(small, tmp_path):
    name, tensors, *_ = small
    torch.save(tensors | {"norm.weight": tensors["norm.weight"].long()}, tmp_path / "int.pth")
    with pytest.raises(ValueError, match=r"int\.pth'.*norm\.weight.*floating point"):
        load_backbone(name, weights=tmp_path / "int.pth")
