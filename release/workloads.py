"""Models of the sizes that papers train, to plan for and to simulate: captured, never built.

Sizes and batches are those of Zheng et al. 2022 ("Alpa", tables 4 to 6: 1,024 sequences, 1,536
images), Narayanan et al. 2021 ("Efficient Large-Scale Language Model Training on GPU Clusters Using
Megatron-LM", table 1: 1,536 sequences for 175 billion parameters, 3,072 for a trillion), Raffel et
al. 2020 ("Exploring the Limits of Transfer Learning with a Unified Text-to-Text Transformer",
sections 3.6 and 3.7: 2,048 sequences of 512 tokens) and the DLPerf report of Megatron-LM.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from raypar import capture
from raypar.graph.opgraph import OpGraph


class Attention(nn.Module):
    """Self- or cross-attention; `explicit` writes out the scores, as kernels of 2021 did."""

    def __init__(
        self, width: int, heads: int, causal: bool, explicit: bool, head_size: int | None = None
    ) -> None:
        super().__init__()
        self.heads, self.causal, self.explicit = heads, causal, explicit
        inner = heads * (head_size or width // heads)
        self.q, self.k, self.v = (nn.Linear(width, inner) for _ in range(3))
        self.out = nn.Linear(inner, width)

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        source = x if memory is None else memory

        def split(t: torch.Tensor) -> torch.Tensor:
            return t.view(t.shape[0], t.shape[1], self.heads, -1).transpose(1, 2)

        q, k, v = split(self.q(x)), split(self.k(source)), split(self.v(source))
        if self.explicit:
            scores = (q * q.shape[-1] ** -0.5) @ k.transpose(2, 3)
            if self.causal:
                mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device)
                scores = scores.masked_fill(~mask.tril(), -1e4)
            mixed = F.softmax(scores, -1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Two linear layers with a GELU between."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, inner), nn.Linear(inner, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class Experts(nn.Module):
    """Top-2 gating with a capacity, written as einsums (Lepikhin et al. 2020, "GShard")."""

    def __init__(self, width: int, inner: int, experts: int, capacity_factor: float = 2.0) -> None:
        super().__init__()
        self.experts, self.factor = experts, capacity_factor
        self.gate = nn.Linear(width, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, width, inner))
        self.down = nn.Parameter(torch.empty(experts, inner, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.shape[1]
        capacity = max(int(self.factor * tokens / self.experts), 4)
        gates = F.softmax(self.gate(x), -1)
        dispatch, combine = 0.0, 0.0
        for _ in range(2):
            top = gates.argmax(-1)
            chosen = F.one_hot(top, self.experts).to(x.dtype)
            place = (chosen.cumsum(1) - 1) * chosen
            fits = chosen * (place < capacity)
            slot = F.one_hot((place * fits).sum(-1).long(), capacity).to(x.dtype)
            part = torch.einsum("bse,bsc->bsec", fits, slot)
            dispatch = dispatch + part
            combine = combine + part * (gates * chosen).sum(-1)[..., None, None]
            gates = gates * (1 - chosen)
        routed = torch.einsum("bsec,bsm->ebcm", dispatch, x)
        hidden = F.gelu(torch.einsum("ebcm,emh->ebch", routed, self.up))
        result = torch.einsum("ebch,ehm->ebcm", hidden, self.down)
        return torch.einsum("bsec,ebcm->bsm", combine, result)


class Block(nn.Module):
    """A transformer block; with `experts` its feed-forward part is a mixture of experts."""

    def __init__(
        self, width: int, heads: int, *, inner: int | None = None, causal: bool = True,
        cross: bool = False, explicit: bool = False, experts: int = 0,
        head_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        inner = inner or 4 * width
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, causal, explicit, head_size)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Experts(width, inner, experts) if experts else FeedForward(width, inner)
        self.cross = Attention(width, heads, False, explicit, head_size) if cross else None
        self.norm3 = nn.LayerNorm(width) if cross else None

    def forward(self, x: torch.Tensor, memory: torch.Tensor | None = None) -> torch.Tensor:
        x = x + self.attention(self.norm1(x))
        if self.cross is not None and self.norm3 is not None:
            x = x + self.cross(self.norm3(x), memory)
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """A decoder, dense or with a mixture of experts in every block."""

    def __init__(
        self, layers: int, width: int, heads: int, vocabulary: int, sequence: int,
        explicit: bool = False, experts: int = 0, tied: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(sequence, width)
        self.blocks = nn.ModuleList(
            Block(width, heads, explicit=explicit, experts=experts) for i in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class T5(nn.Module):
    """An encoder and a decoder that attends to it."""

    def __init__(
        self, layers: int, width: int, heads: int, inner: int, head_size: int, vocabulary: int,
        sequence: int,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(sequence, width)
        self.encoder = nn.ModuleList(
            Block(width, heads, inner=inner, head_size=head_size, causal=False)
            for _ in range(layers)
        )
        self.decoder = nn.ModuleList(
            Block(width, heads, inner=inner, head_size=head_size, cross=True) for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, source: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        def embed(tokens: torch.Tensor) -> torch.Tensor:
            return self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))

        memory = embed(source)
        for block in self.encoder:
            memory = block(memory)
        x = embed(target)
        for block in self.decoder:
            x = block(x, memory)
        return self.head(self.norm(x))


class Bottleneck(nn.Module):
    """A residual block of three convolutions (He et al. 2016, "Deep Residual Learning").

    The middle one makes `widen` times as many channels as it takes.
    """

    def __init__(self, before: int, inner: int, after: int, stride: int, widen: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, inner, 1, bias=False)
        self.conv2 = nn.Conv2d(inner, inner * widen, 3, stride, 1, bias=False)
        self.conv3 = nn.Conv2d(inner * widen, after, 1, bias=False)
        channels = (inner, inner * widen, after)
        self.norm1, self.norm2, self.norm3 = (nn.BatchNorm2d(n) for n in channels)
        same = before == after and stride == 1
        self.short = nn.Identity() if same else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)))
        return F.relu(self.norm3(self.conv3(y)) + self.short(x))


class WideResNet(nn.Module):
    """ResNet-50 or -101 with wide blocks (Zagoruyko and Komodakis 2016).

    Widened so that the parameters are those of table 6 of Zheng et al. 2022.
    """

    def __init__(self, layers: int, base: int, widen: int, classes: int = 1024) -> None:
        super().__init__()
        depths = {50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}[layers]
        self.stem = nn.Conv2d(3, base, 7, 2, 3, bias=False)
        blocks: list[nn.Module] = []
        before = base
        for level, depth in enumerate(depths):
            inner = base * 2**level
            after = 4 * base * 2**level
            for i in range(depth):
                blocks.append(Bottleneck(before, inner, after, 2 if level and not i else 1, widen))
                before = after
        self.blocks = nn.ModuleList(blocks)
        self.head = nn.Linear(before, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.stem(x)), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean((2, 3)))


def token_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the next token."""
    return F.cross_entropy(logits.flatten(0, 1), target.flatten())


@dataclass(frozen=True)
class Workload:
    """A model at a size.

    Attributes:
        name: Family and size.
        kind: ``gpt``, ``moe``, ``t5`` or ``wide_resnet``.
        batch: Samples of a step.
        sizes: Arguments of the model.
        sequence: Tokens per sample, or pixels per side.
        vocabulary: Tokens (or classes).
        half: Parameters in float16.
        explicit: Attention written out, as kernels of 2021 did (GPT and MoE).
        tied: The last layer's weights are the embedding's (GPT).
    """

    name: str
    kind: str
    batch: int
    sizes: tuple[int, ...]
    sequence: int = 1024
    vocabulary: int = 51200
    half: bool = True
    explicit: bool = False
    tied: bool = False

    def model(self) -> nn.Module:
        """Builds it."""
        extra = (self.vocabulary, self.sequence)
        if self.kind == "gpt":
            made: nn.Module = GPT(*self.sizes, *extra, explicit=self.explicit, tied=self.tied)
        elif self.kind == "moe":
            layers, width, heads, experts = self.sizes
            made = GPT(layers, width, heads, *extra, explicit=self.explicit, experts=experts)
        elif self.kind == "t5":
            made = T5(*self.sizes, *extra)
        else:
            made = WideResNet(*self.sizes, classes=self.vocabulary)
        return made.half() if self.half else made

    def example(self) -> tuple[torch.Tensor, ...]:
        """One global batch (of zeros that are never stored)."""
        if self.kind == "wide_resnet":
            image = torch.zeros(1, 3, self.sequence, self.sequence, dtype=torch.float32)
            labels = torch.zeros(1, dtype=torch.long)
            return image.expand(self.batch, -1, -1, -1), labels.expand(self.batch)
        tokens = torch.zeros(1, self.sequence, dtype=torch.long).expand(self.batch, -1)
        return (tokens, tokens, tokens) if self.kind == "t5" else (tokens, tokens)

    def capture(self) -> OpGraph:
        """Captures it on the meta device."""
        loss = F.cross_entropy if self.kind == "wide_resnet" else token_loss
        return capture(self.model, self.example(), loss)


def gpt(
    layers: int, width: int, heads: int, batch: int, name: str = "", **more: object
) -> Workload:
    """A GPT of any size."""
    label = name or f"gpt {layers} layers × {width}"
    make = partial(Workload, label, "gpt", batch, (layers, width, heads))
    return make(**more)  # type: ignore[arg-type]


ALPA_GPT = {
    name: gpt(layers, width, heads, 1024, f"GPT-{name}")
    for name, layers, width, heads in (
        ("350M", 24, 1024, 16), ("1.3B", 24, 2048, 32), ("2.6B", 32, 2560, 32),
        ("6.7B", 32, 4096, 32), ("15B", 48, 5120, 32), ("39B", 48, 8192, 64),
    )
}  # fmt: skip
ALPA_MOE = {
    name: Workload(f"MoE-{name}", "moe", 1024, (layers, width, heads, experts), vocabulary=32000)
    for name, layers, width, heads, experts in (
        ("380M", 8, 768, 16, 8), ("1.3B", 16, 768, 16, 16), ("2.4B", 16, 1024, 16, 16),
        ("10B", 16, 1536, 16, 32), ("27B", 16, 2048, 16, 48), ("70B", 32, 2048, 16, 64),
    )
}  # fmt: skip
ALPA_WIDE_RESNET = {
    name: Workload(
        f"Wide-ResNet-{name}", "wide_resnet", 1536, (layers, base, widen), 224, 1024, half=False
    )
    for name, layers, base, widen in (
        ("250M", 50, 160, 2), ("1B", 50, 320, 2), ("2B", 50, 448, 2),
        ("4B", 50, 640, 2), ("6.8B", 50, 320, 16), ("13B", 101, 320, 16),
    )
}  # fmt: skip
GPT_175B = gpt(96, 12288, 96, 1536, "GPT-175B", sequence=2048)
GPT_1T = gpt(128, 25600, 160, 3072, "GPT-1T", sequence=2048)
T5_11B = Workload("T5-11B", "t5", 2048, (24, 1024, 128, 65536, 128), 512, 32128)
VIRTUAL = {
    w.name: w for w in (ALPA_GPT["39B"], GPT_175B, ALPA_MOE["70B"], ALPA_WIDE_RESNET["13B"], T5_11B)
}
"""What is planned for on clusters that are described, not owned (`release/virtual.py`)."""
