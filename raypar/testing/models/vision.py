"""Image models: a residual network, a vision transformer, a U-Net, a mixer, feature dropout."""

# A forward does what its class says.
# ruff: noqa: D102

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from raypar.testing.models._batches import floats, images
from raypar.testing.models._blocks import SelfAttention
from raypar.testing.models._case import register


class Residual(nn.Module):
    """Two 3×3 convolutions with BatchNorm around a skip (He et al. 2015)."""

    def __init__(self, inside: int, outside: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outside)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outside)
        self.relu = nn.ReLU(inplace=True)
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inside != outside:
            conv = nn.Conv2d(inside, outside, 1, stride, bias=False)
            self.skip = nn.Sequential(conv, nn.BatchNorm2d(outside))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.norm2(self.conv2(self.relu(self.norm1(self.conv1(x)))))
        y += self.skip(x)
        return self.relu(y)


class CNN(nn.Module):
    """A stem, three residual blocks and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(inplace=True),
            nn.MaxPool2d(2),
        )
        self.blocks = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 32, 2))
        self.classify = nn.Linear(32, 10)

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = self.blocks(self.stem(image))
        return F.cross_entropy(self.classify(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1)), label)


@register(images, batchnorm=True, feels_microbatches=True)
def cnn() -> nn.Module:
    """A residual network with BatchNorm and in-place activations."""
    return CNN()


def drop_path(x: torch.Tensor, rate: float, training: bool) -> torch.Tensor:
    """Drops whole samples of a residual branch (Huang et al. 2016), scaled to keep the mean."""
    if rate == 0.0 or not training:
        return x
    keep = x.new_empty((x.shape[0],) + (1,) * (x.dim() - 1)).bernoulli_(1 - rate)
    return x * keep.div_(1 - rate)


class ViTBlock(nn.Module):
    """A transformer block whose first branch is scaled, and whose second drops whole samples."""

    def __init__(self, width: int, heads: int, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = SelfAttention(width, heads)
        self.scale = nn.Parameter(torch.full((width,), 0.5))
        self.fc1, self.fc2 = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        branch = self.attention(self.norm1(x)) * self.scale
        if self.training and self.rate > 0:
            noise = torch.rand(x.shape[0], 1, 1, dtype=x.dtype, device=x.device)
            branch = branch / (1 - self.rate) * (noise >= self.rate)
        x = x + branch
        return x + drop_path(self.fc2(F.gelu(self.fc1(self.norm2(x)))), self.rate, self.training)


class ViT(nn.Module):
    """Patches, a class token and learned positions (Dosovitskiy et al. 2020)."""

    def __init__(self, rate: float, width: int = 32, layers: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.cls = nn.Parameter(torch.zeros(1, 1, width))
        self.positions = nn.Parameter(torch.randn(1, 17, width) * 0.1)
        self.blocks = nn.Sequential(*(ViTBlock(width, 4, rate) for _ in range(layers)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 10)

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = self.patches(image).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls.expand(x.shape[0], -1, -1), x), dim=1) + self.positions
        x = self.norm(self.blocks(x))
        return F.cross_entropy(self.head(x[:, 0]), label, label_smoothing=0.1)


@register(images)
def vit() -> nn.Module:
    """Vision transformer without randomness."""
    return ViT(rate=0.0)


@register(images, dropout=True)
def vit_drop_path() -> nn.Module:
    """Vision transformer that draws its own random numbers, in two ways."""
    return ViT(rate=0.25)


def _double_conv(inside: int, outside: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inside, outside, 3, padding=1),
        nn.GroupNorm(4, outside),
        nn.SiLU(inplace=True),
        nn.Conv2d(outside, outside, 3, padding=1),
        nn.GroupNorm(4, outside),
        nn.SiLU(inplace=True),
    )


class UNet(nn.Module):
    """Skips from the way down to the way up (Ronneberger et al. 2015), with GroupNorm."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2, self.bottom = (
            _double_conv(3, 8),
            _double_conv(8, 16),
            _double_conv(16, 24),
        )
        self.lift = nn.ConvTranspose2d(24, 16, kernel_size=2, stride=2)
        self.up2, self.up1 = _double_conv(32, 16), _double_conv(24, 8)
        self.out = nn.Conv2d(8, 3, kernel_size=1)

    def forward(self, image: torch.Tensor, clean: torch.Tensor) -> torch.Tensor:
        high = self.down1(image)
        middle = self.down2(F.max_pool2d(high, 2))
        low = self.bottom(F.avg_pool2d(middle, 2))
        x = self.up2(torch.cat((middle, self.lift(low)), dim=1))
        x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        x = self.up1(torch.cat([high, x], 1))
        return F.mse_loss(self.out(x), clean)


def _image_pairs(g: torch.Generator, batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    clean = floats(g, batch, 3, 16, 16)
    return clean + 0.3 * floats(g, batch, 3, 16, 16), clean


@register(_image_pairs)
def unet() -> nn.Module:
    """Long skips, GroupNorm, transposed convolution and bilinear interpolation."""
    return UNet()


class Mixer(nn.Module):
    """MLP-Mixer (Tolstikhin et al. 2021) behind a channels-last convolution block."""

    def __init__(self, width: int = 24, tokens: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, kernel_size=4, stride=4)
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(5))
        self.point = nn.Linear(width, width)
        self.over_tokens = nn.ModuleList(
            nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens)) for _ in range(2)
        )
        self.over_channels = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width)) for _ in range(2)
        )
        self.head = nn.Linear(width, 10)

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = self.patches(image)
        y = self.point(self.norms[0](self.depthwise(x).permute(0, 2, 3, 1)))
        x = (x + y.permute(0, 3, 1, 2)).flatten(2).swapaxes(1, 2)  # [B, tokens, width]
        for index in range(2):
            y = self.norms[1 + 2 * index](x).mT
            x = x + self.over_tokens[index](y).mT
            x = x + self.over_channels[index](self.norms[2 + 2 * index](x))
        return F.cross_entropy(self.head(x.mean(dim=1)), label)


@register(images)
def mixer() -> nn.Module:
    """Transposes between tokens and channels, and between channels first and last."""
    return Mixer()


class FeatureDropout(nn.Module):
    """Dropout of whole channels, and the dropout that keeps SELU's statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, stride=2)
        self.alpha = nn.AlphaDropout(0.1)
        self.hidden = nn.Linear(12 * 9, 24)
        self.head = nn.Linear(24, 10)

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        x = F.dropout2d(torch.relu(self.conv(image)), 0.2, self.training)
        x = F.adaptive_max_pool2d(x, 3).flatten(1)
        x = self.alpha(F.selu(self.hidden(x)))
        return F.nll_loss(F.log_softmax(self.head(x), dim=-1), label)


@register(images, dropout=True)
def feature_dropout() -> nn.Module:
    """`dropout2d` and `AlphaDropout`."""
    return FeatureDropout()
