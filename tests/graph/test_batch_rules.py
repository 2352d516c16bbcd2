"""What the analysis claims of an op holds when the op runs on parts of the batch."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import raypar
from raypar.testing import models
from tests._tiers import THOROUGH
from tests.graph.claims import check_claims

B = 8


def _graph(op, *tensors, learned=False):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, *args):
            if learned:  # what depends on parameters cannot be counted ahead of the step
                args = [a * self.scale if a.is_floating_point() else a for a in args]
            out = op(*args)
            out = out[0] if isinstance(out, tuple | list) else out
            out = torch.view_as_real(out) if out.is_complex() else out.double()
            return out if out.dim() == 0 else out.sum()

    return raypar.capture(Model, tensors)


def _draw(*shapes):
    generator = torch.Generator().manual_seed(4)
    return [
        torch.randint(0, 4, s[1:], generator=generator)
        if s[0] == "int"
        else torch.randn(s, generator=generator)
        for s in shapes
    ]


X, V, M, K = (B, 6), (B, 3, 4), (B, 4, 4), ("int", B, 6)

EXACT = {
    "add": (lambda x, y: x + y, X, X),
    "broadcast": (lambda x, v: x[:, :3, None] * v, X, V),
    "sum": (lambda x: x.sum(0), X),
    "mean over size": (lambda x: x.sum() / x.shape[0], X),
    "size times": (lambda x: x.sum() * x.shape[0], X),
    "mean dims": (lambda v: v.mean((0, 2)), V),
    "sum and mean": (lambda x, y: x.sum() + y.mean(), X, X),
    "mean and sum": (lambda x, y: x.mean() - y.sum(), X, X),
    "penalty counted": (lambda x: (x.sum() + x.shape[0] * 3.0) / x.shape[0], X),
    "pick a loss": (lambda x: x.mean(0)[1] + x.mean(0).unbind(0)[2], X),
    "masked mean": (lambda x: (x * (x > 0)).sum() / (x > 0).sum(), X),
    "masked rows": (lambda x, k: x[k > 1].mean(), X, K),
    "others' count": (lambda x: x.sum() / (len(x) - (x[:, 0] > 0).sum()), X),
    "count as truth": (lambda x: x * (x[:, 0] > 9).sum().bool(), X),
    "where count": (lambda x: torch.where((x > 9).sum() > 0, x.mean(), x.mean() / 2), X),
    "view": (lambda v: v.view(-1, 12), V),
    "fold": (lambda v: v.reshape(-1, 4), V),
    "transpose": (lambda v: v.transpose(0, 1).reshape(3, -1), V),
    "heads": (lambda v: v.view(v.shape[0], 3, 2, 2).transpose(1, 2), V),
    "expand": (lambda x: x.unsqueeze(1).expand(-1, 3, -1), X),
    "repeat": (lambda x: x.repeat(3, 1), X),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, 0), X),
    "two views": (lambda x, y: (lambda z: z[: len(x)] - z[len(x) :])(torch.cat([x, y])), X, X),
    "chunks": (lambda x, y: torch.cat([x, y, x]).chunk(3)[1], X, X),
    "stack": (lambda x, y: torch.stack([x, y]).flatten(0, 1), X, X),
    "cat": (lambda x, y: torch.cat([x, y], 1), X, X),
    "softmax": (lambda v: v.softmax(-1), V),
    "cumsum": (lambda v: v.cumsum(1), V),
    "topk": (lambda x: x.topk(2).values, X),
    "sort": (lambda x: x.sort(1).indices, X),
    "argmax": (lambda v: v.argmax(1), V),
    "flip": (lambda v: v.flip(1), V),
    "roll": (lambda v: v.roll(1, 2), V),
    "matmul": (lambda v, m: v @ m, V, M),
    "gram": (lambda x: x.t() @ x, X),
    "linear": (lambda x: F.linear(x, torch.ones(5, 6)), X),
    "baddbmm": (lambda v, m: torch.baddbmm(v, v, m), V, M),
    "einsum": (lambda v, m: torch.einsum("btc,bcd->btd", v, m), V, M),
    "einsum dots": (lambda v: torch.einsum("...c,dc", v, torch.ones(5, 4)), V),
    "einsum sum": (lambda x, y: torch.einsum("bi,bi->", x, y), X, X),
    "gather": (lambda x, k: x.gather(1, k), X, K),
    "scatter": (lambda x, k: torch.zeros_like(x).scatter(1, k, x), X, K),
    "rows": (lambda x, k: x[torch.arange(len(x)), k[:, 0]], X, K),
    "index_put": (lambda x, k: x.index_put((torch.arange(len(x)), k[:, 0]), x[:, 1]), X, K),
    "mask fill": (lambda x: x.index_put((x > 0,), torch.tensor(2.0)), X),
    "one_hot": (lambda k: F.one_hot(k, 4), K),
    "table": (lambda k: torch.arange(5.0)[k], K),
    "embedding": (lambda k: F.embedding(k, torch.ones(5, 3)), K),
    "fft": (lambda v: torch.fft.rfft(v, dim=1), V),
    "complex": (lambda v: torch.view_as_complex(v.view(-1, 3, 2, 2)).abs(), V),
    "layer_norm": (lambda v: F.layer_norm(v, (4,)), V),
    "conv": (lambda v: F.conv1d(v, torch.ones(2, 3, 2)), V),
    "pool": (lambda v: F.max_pool1d(v, 2), V),
    "attention": (lambda v: F.scaled_dot_product_attention(v, v, v), V),
    "cross_entropy": (lambda x, k: F.cross_entropy(x, k[:, 0], ignore_index=2), X, K),
    "class weights": (lambda x, k: F.cross_entropy(x, k[:, 0], weight=torch.arange(6.0)), X, K),
    "smoothing": (lambda v, k: F.cross_entropy(v, k[:, :4] % 3, label_smoothing=0.1), V, K),
    "kl batchmean": (lambda x, y: F.kl_div(x, y.exp(), reduction="batchmean"), X, X),
    "triplet": (lambda x, y: F.triplet_margin_loss(x, y, x * y), X, X),
    "cosine": (lambda x, y: F.cosine_similarity(x, y).mean(), X, X),
    "multi margin": (lambda x, k: F.multi_margin_loss(x, k[:, 0]), X, K),
    "gaussian nll": (lambda x, y: F.gaussian_nll_loss(x, y, y.exp()), X, X),
    "dropout": (lambda v: F.dropout(v, 0.5), V),
    "dropout folded": (lambda v: F.dropout(v.transpose(0, 1).reshape(-1, 4), 0.5), V),
    "noise": (lambda x: x + torch.randn_like(x) + torch.randn(6), X),
}

MIXING = {
    "softmax over samples": (lambda x: x.softmax(0), X),
    "cumsum over samples": (lambda x: x.cumsum(0), X),
    "std over samples": (lambda x: x.std(0), X),
    "interleaved view": (lambda v: v.view(-1, 3, 2, 2).transpose(0, 1).reshape(-1, 12), V),
    "pairs": (lambda x: (x @ x.t()).exp(), X),
    "square of a mean": (lambda x: x.mean(0).square() * x.exp().mean(), X),
    "first sample": (lambda x: x[0] * 1.0, X),
    "roll samples": (lambda x: x.roll(1, 0), X),
    "positions": (lambda x: x * torch.arange(len(x))[:, None], X),
    "norm over all": (lambda x: x * x.max(), X),
    "renorm": (lambda x: torch.renorm(x, 2, 1, 1.0), X),
    "batch norm": (lambda v: F.batch_norm(v, None, None, training=True), V),
    "gradient by frequency": (
        lambda k: F.embedding(k, torch.ones(5, 3), scale_grad_by_freq=True), K
    ),
    "unequal views": (lambda x: torch.cat([x, x.repeat_interleave(2, 0)]).chunk(3)[0], X),
    "half a batch": (lambda x: x[: len(x) // 2], X),
}  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_a_claim_holds_on_parts(name):
    op, *shapes = EXACT[name]
    tensors = _draw(*shapes)
    graph = _graph(op, *tensors)
    assert graph.analysis.exact, graph.analysis.blockers
    for parts in (2, 4, 8) if THOROUGH else (2, 8):
        assert check_claims(graph, tuple(tensors), parts)


@pytest.mark.parametrize("name", MIXING)
def test_what_mixes_samples_is_not_claimed(name):
    op, *shapes = MIXING[name]
    tensors = _draw(*shapes)
    graph = _graph(op, *tensors, learned=True)
    assert not graph.analysis.exact
    assert check_claims(graph, tuple(tensors), 2) >= 0  # what is still claimed holds


# Models of the ops of others, which are tried.
REPEATED = {
    "gpt_dropout", "gpt_shared_mask", "lstm", "gru", "torch_encoder", "bert_own", "albert",
    "vit_drop_path", "two_losses", "autoencoder", "partly_frozen",
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(c, id=c.name, marks=[pytest.mark.thorough] * (c.name in REPEATED))
        for c in models.cases(hf=False)
        if not c.data_dependent
    ],
)
def test_every_claim_of_the_zoo_holds(case):
    batch = case.batch(seed=0)
    graph = raypar.capture(lambda: case.model_fn(seed=0), batch, case.loss_fn, case.batch_dims)
    assert check_claims(graph, batch, 2)


def test_a_buffer_that_is_read_and_updated_feels_microbatches():
    class Counter(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 6)
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x):
            self.count += 1
            return self.layer(x).mean() / self.count

    graph = raypar.capture(Counter, (torch.randn(X),))
    assert "count" in graph.analysis.blockers[0][1]
