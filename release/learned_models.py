"""Families of models for `release/learned.py`, in sizes that take a core milliseconds."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from release.cost_models import CNN, GPT, MLP, T5, Block

Batch = tuple[torch.Tensor, torch.Tensor]


class Bottleneck(nn.Module):
    """1×1, 3×3 and 1×1 convolutions around a skip (He et al. 2015)."""

    def __init__(self, inside: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inside, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 4 * width, 1, bias=False),
            nn.BatchNorm2d(4 * width),
        )
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inside != 4 * width:
            conv = nn.Conv2d(inside, 4 * width, 1, stride, bias=False)
            self.skip = nn.Sequential(conv, nn.BatchNorm2d(4 * width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] → [B, 4 × width, H / stride, W / stride]."""
        return F.relu(self.body(x) + self.skip(x))


class ResNet(nn.Module):
    """A stem with pooling, bottleneck blocks in three resolutions, a classifier."""

    def __init__(self, width: int, blocks: int, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 7, 2, 3, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        layers: list[nn.Module] = []
        inside = width
        for level in range(3):
            for block in range(blocks):
                stride = 2 if level and not block else 1
                layers.append(Bottleneck(inside, width << level, stride))
                inside = 4 * (width << level)
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(inside, classes)

    def forward(self, image: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the classes."""
        x = self.stem(image)
        for layer in self.layers:
            x = layer(x)
        return F.cross_entropy(self.head(x.mean((2, 3))), label)


class UNet(nn.Module):
    """Convolutions down and up again with group norm and skips (Ronneberger et al. 2015)."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        sizes = [width << i for i in range(levels)]

        def block(inside: int, outside: int) -> nn.Module:
            conv = nn.Conv2d(inside, outside, 3, padding=1)
            again = nn.Conv2d(outside, outside, 3, padding=1)
            norms = nn.GroupNorm(4, outside), nn.GroupNorm(4, outside)
            return nn.Sequential(conv, norms[0], nn.SiLU(), again, norms[1], nn.SiLU())

        self.down = nn.ModuleList(block(i, o) for i, o in zip([3, *sizes[:-1]], sizes, strict=True))
        self.up = nn.ModuleList(
            nn.ConvTranspose2d(o, i, 2, 2) for i, o in itertools.pairwise(sizes)
        )
        self.join = nn.ModuleList(block(2 * n, n) for n in sizes[:-1])
        self.last = nn.Conv2d(width, 1, 1)

    def forward(self, image: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of every pixel."""
        x, skips = image, []
        for i, block in enumerate(self.down):
            x = block(x if not i else F.max_pool2d(x, 2))
            skips.append(x)
        for i in reversed(range(len(self.up))):
            x = self.join[i](torch.cat((self.up[i](x), skips[i]), 1))
        return F.binary_cross_entropy_with_logits(self.last(x), mask)


class Experts(nn.Module):
    """Top-2 routing through masks under a capacity (GShard, Lepikhin et al. 2020, §2.2)."""

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.w1 = nn.Parameter(torch.randn(experts, width, hidden) * 0.05)
        self.w2 = nn.Parameter(torch.randn(experts, hidden, width) * 0.05)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, W] → [N, W]."""
        experts = self.w1.shape[0]
        capacity = math.ceil(2 * x.shape[0] / experts)
        weight, choice = F.softmax(self.gate(x), -1).topk(2, -1)
        chosen = F.one_hot(choice, experts)
        ahead = chosen.view(-1, experts).cumsum(0).view(chosen.shape) - chosen
        place = (ahead * chosen).sum(-1)
        kept = (place < capacity).to(x.dtype)
        seat = F.one_hot(place.clamp(max=capacity - 1), capacity).to(x.dtype)
        taken = chosen.to(x.dtype) * kept.unsqueeze(-1)
        dispatch = torch.einsum("nke,nkc->nec", taken, seat)
        combine = torch.einsum("nke,nkc->nec", taken * weight.unsqueeze(-1), seat)
        inside = torch.einsum("nec,nd->ecd", dispatch, x)
        outside = torch.bmm(F.gelu(torch.bmm(inside, self.w1)), self.w2)
        return torch.einsum("nec,ecd->nd", combine, outside)


class MoE(nn.Module):
    """A decoder whose blocks are followed by mixtures of experts."""

    def __init__(self, layers: int, width: int, heads: int, experts: int, vocab: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.tokens = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.mixtures = nn.ModuleList(Experts(width, 2 * width, experts) for _ in range(layers))
        self.head = nn.Linear(width, vocab, bias=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the next tokens."""
        x = self.tokens(tokens)
        for block, mixture in zip(self.blocks, self.mixtures, strict=True):
            x = block(x)
            x = x + mixture(x.flatten(0, 1)).view_as(x)
        return F.cross_entropy(self.head(x).view(-1, self.vocab), targets.view(-1))


class RNN(nn.Module):
    """Embedding, recurrent layers one by one, a word per position."""

    def __init__(self, kind: str, layers: int, width: int, vocab: int) -> None:
        super().__init__()
        self.vocab = vocab
        self.tokens = nn.Embedding(vocab, width)
        make = nn.LSTM if kind == "lstm" else nn.GRU
        self.layers = nn.ModuleList(make(width, width, batch_first=True) for _ in range(layers))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(layers))
        self.mixed = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))
        self.head = nn.Linear(width, vocab)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """The mean cross-entropy of the next tokens."""
        x = self.tokens(tokens)
        for layer, norm, mix in zip(self.layers, self.norms, self.mixed, strict=True):
            x = x + torch.tanh(mix(layer(norm(x))[0]))
        return F.cross_entropy(self.head(x).view(-1, self.vocab), targets.view(-1))


@dataclass(frozen=True)
class Configuration:
    """One model, cut into stages.

    Attributes:
        family: Its family.
        words: Its sizes, for people.
        build: Makes the model.
        batch: Makes a batch of that many samples.
        samples: Samples of one microbatch.
        stages: Stages.
        tensor: Devices over which the ops of a stage are sharded.
        recompute: Policy of every stage.
    """

    family: str
    words: str
    build: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    samples: int
    stages: int
    tensor: int
    recompute: str


def _words(length: int, vocab: int) -> Callable[[int], Batch]:
    def make(n: int) -> Batch:
        return torch.randint(0, vocab, (n, length)), torch.randint(0, vocab, (n, length))

    return make


def _images(side: int, masks: bool = False) -> Callable[[int], Batch]:
    def make(n: int) -> Batch:
        image = torch.randn(n, 3, side, side)
        if masks:
            return image, torch.rand(n, 1, side, side)
        return image, torch.randint(0, 10, (n,))

    return make


def _rows(width: int) -> Callable[[int], Batch]:
    return lambda n: (torch.randn(n, width), torch.randint(0, 100, (n,)))


Model = tuple[str, Callable[[], nn.Module], Callable[[int], Batch], int]


def _drawn(family: str, draw: random.Random) -> Model:
    """(sizes in words, model, batch, samples) of one member of a family."""
    pick = draw.choice
    layers, vocab = pick((2, 3, 4)), pick((500, 1000, 2000, 4000))
    heads = pick((4, 6, 8))
    width = heads * pick((16, 32, 48))
    length, samples = pick((32, 64, 96, 128, 192)), pick((1, 2, 4, 8))
    text = f"{layers} layers of {width}, {heads} heads, {length} words of {vocab}"
    if family == "gpt":
        return (
            text,
            lambda: GPT(layers, width, heads, vocab, length),
            _words(length, vocab),
            samples,
        )
    if family == "t5":
        few = max(1, layers - 1)
        return text, lambda: T5(few, width, heads, vocab, length), _words(length, vocab), samples
    if family == "moe":
        experts = pick((4, 8))
        model = lambda: MoE(layers, width, heads, experts, vocab)  # noqa: E731
        return f"{text}, {experts} experts", model, _words(length, vocab), samples
    if family == "rnn":
        kind, hidden, length = pick(("lstm", "gru")), pick((64, 128, 192, 256)), pick((16, 32, 48))
        text = f"{layers} {kind} layers of {hidden}, {length} words of {vocab}"
        return text, lambda: RNN(kind, layers, hidden, vocab), _words(length, vocab), 2 * samples
    if family == "mlp":
        wide, deep = pick((256, 384, 640, 1024, 1536)), pick((4, 6, 8))
        return f"{deep} layers of {wide}", lambda: MLP(wide, deep), _rows(wide), 24 * samples
    side = pick((24, 32, 48, 64))
    narrow = pick((8, 16, 24, 32))
    if family == "cnn":
        text = f"width {narrow}, {layers - 1} blocks, {side} pixels"
        return text, lambda: CNN(narrow, layers - 1), _images(side), samples
    if family == "resnet":
        text = f"width {narrow}, {layers - 1} blocks, {2 * side} pixels"
        return text, lambda: ResNet(narrow, layers - 1), _images(2 * side), samples
    text = f"width {narrow}, {layers} levels, {16 * layers} pixels"
    return text, lambda: UNet(narrow, layers), _images(16 * layers, masks=True), samples


FAMILIES = ("mlp", "gpt", "t5", "moe", "rnn", "cnn", "resnet", "unet")


def configurations(family: str, seed: int) -> Iterator[Configuration]:
    """Endless members of a family: the same ones for the same seed."""
    draw = random.Random(f"{family} {seed}")
    while True:
        words, build, batch, samples = _drawn(family, draw)
        stages = draw.choice((2, 2, 3, 4))
        # Mixtures of experts route over the whole batch, recurrent ops run on one device.
        whole = family in ("moe", "rnn")
        tensor = 1 if whole else draw.choice((1, 1, 2))
        recompute = draw.choice(("none", "none", "selective", "full"))
        yield Configuration(
            family, f"{words}, {samples} samples", build, batch, samples, stages, tensor, recompute
        )
