"""DINOv2 by its definition, in plain torch operations on tensors named as released."""

import math

import torch
from torch.nn import functional as F

# Width, depth, heads and width of the hidden layer, from the paper's table of architectures
SIZES = {
    "vits14": (384, 12, 6, 1536),
    "vitb14": (768, 12, 12, 3072),
    "vitl14": (1024, 24, 16, 4096),
    "vitg14": (1536, 40, 24, 4096),  # the hidden layer gated, so two matrices of that width
}


def release(name: str) -> dict[str, torch.Tensor]:
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
    noise = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0))
    tensors = {}
    for index, (key, shape) in enumerate(shapes.items()):
        start, count = 997 * index, math.prod(shape)  # different stretches of the same noise
        scale = shape[-1] ** -0.5 if len(shape) == 2 else 0.3
        tensors[key] = noise[start : start + count].reshape(shape) * scale
        if "gamma" in key or ("norm" in key and "weight" in key):
            tensors[key] += 1
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
