"""Batch rules of layers: norms, convolutions, pooling, attention, embeddings, RNNs, losses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import fx

from raypar.graph.batch_rules import (
    Batch,
    Const,
    Mixed,
    Mixing,
    Ramp,
    Reduced,
    States,
    aligned,
    every_output,
    flat_outer,
    only_batch,
    or_const,
    register,
)

if TYPE_CHECKING:
    from raypar.graph.batch import Call

_NONE, _MEAN, _SUM = 0, 1, 2


def _weights_const(call: Call, *names: str) -> None:
    for name in names:
        if isinstance(call.args.get(name), fx.Node) and only_batch(call, call.args[name]):
            raise Mixing(f"the {name} of {call.name} comes from the batch")


@register("layer_norm", "rms_norm", "native_layer_norm")
def layer_norm(call: Call) -> States:
    value = call.args["input"]
    state = only_batch(call, value)
    _weights_const(call, "weight", "bias")
    width = len(call.args["normalized_shape"])
    if state is None or state.dim >= len(call.shape(value)) - width:
        raise Mixing(f"{call.name} normalises over the batch dim")
    return every_output(call, state)


@register(
    "group_norm",
    "instance_norm",
    "pixel_shuffle",
    "pixel_unshuffle",
    "channel_shuffle",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "adaptive_avg_pool1d",
    "adaptive_avg_pool2d",
    "adaptive_avg_pool3d",
    "adaptive_max_pool1d",
    "adaptive_max_pool2d",
    "adaptive_max_pool3d",
    "max_pool2d_with_indices",
    "upsample_nearest1d",
    "upsample_nearest2d",
    "upsample_nearest3d",
    "upsample_bilinear2d",
    "upsample_linear1d",
    "upsample_bicubic2d",
    "upsample_trilinear3d",
    "im2col",
    "col2im",
    "reflection_pad1d",
    "reflection_pad2d",
    "replication_pad1d",
    "replication_pad2d",
    "_upsample_nearest_exact2d",
    "local_response_norm",
    "max_pool1d_with_indices",
    "_adaptive_avg_pool2d",
    "_upsample_bilinear2d_aa",
    "_upsample_bicubic2d_aa",
)
def images(call: Call) -> States:
    """Layers that treat dim 0 as samples and never look across it."""
    names = [n for n, v in call.args.items() if isinstance(v, fx.Node)]
    state = only_batch(call, call.args[names[0]])
    _weights_const(call, *names[1:])
    if state is None or state.dim != 0:
        raise Mixing(f"{call.name} works along the batch dim")
    return every_output(call, state)


@register("batch_norm", "_native_batch_norm_legit_functional")
def batch_norm(call: Call) -> States:
    if call.args["training"]:
        raise Mixing("batch norm in training uses statistics of the batch")
    return images(call)


@register(
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "convolution",
    "conv_tbc",
)
def convolution(call: Call) -> States:
    if call.name == "conv_tbc":
        raise Mixing("conv_tbc has no declared batch rule")
    value = call.args["input"]
    state = only_batch(call, value)
    _weights_const(call, "weight", "bias")
    if (
        state is None
        or state.dim != 0
        or len(call.shape(value)) != len(call.shape(call.args["weight"]))
    ):
        raise Mixing(f"{call.name} works along the batch dim")
    return state


@register("grid_sampler", "affine_grid_generator")
def grid(call: Call) -> States:
    states = [only_batch(call, v) for v in call.tensors()]
    if any(s is None or s.dim for s in states):
        raise Mixing(f"{call.name} meets values with and without samples")
    return or_const(states[0])


@register("scaled_dot_product_attention")
def attention(call: Call) -> States:
    args = call.args
    q, k, v = args["query"], args["key"], args["value"]
    ndim = len(call.out.shape)
    tensors = [q, k, v] + ([args["attn_mask"]] if args["attn_mask"] is not None else [])
    state = aligned(call, tensors, ndim)
    if state is None or state.dim >= ndim - 2:
        raise Mixing("attention runs over the batch dim")
    if args["enable_gqa"] and state.dim >= ndim - 3 and ndim > 3:
        raise Mixing("grouped-query attention over the batch dim")
    return state


@register("embedding")
def embedding(call: Call) -> States:
    _weights_const(call, "weight")
    if call.args["scale_grad_by_freq"]:
        raise Mixing("scale_grad_by_freq divides gradients by counts of the whole batch")
    return or_const(only_batch(call, call.args["indices"]))


@register("embedding_bag", "_embedding_bag")
def embedding_bag(call: Call) -> States:
    """Bags of one width, as F.embedding_bag makes of a two-dim input."""
    args = call.args
    indices, offsets = args["indices"], args["offsets"]
    _weights_const(call, "weight")
    if args["scale_grad_by_freq"]:
        raise Mixing("scale_grad_by_freq divides gradients by counts of the whole batch")
    state = only_batch(call, indices)
    ramp = call.state(offsets) if isinstance(offsets, fx.Node) else None
    if state is None or not isinstance(ramp, Ramp):
        raise Mixing("embedding_bag with ragged bags has no batch rule")
    per_sample = args.get("per_sample_weights")
    if isinstance(per_sample, fx.Node) and only_batch(call, per_sample) != state:
        raise Mixing("embedding_bag's weights do not follow its indices")
    rows = call.shape(indices)[0]
    if flat_outer(call.shape(indices), state) != 1 or rows % ramp.step:
        raise Mixing("embedding_bag's bags do not lie sample by sample")
    bookkeeping = Mixed(call.node.meta["id"], "embedding_bag's bookkeeping outputs")
    return tuple(Batch(0) if i == 0 else bookkeeping for i in range(len(call.out)))


@register("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(call: Call) -> States:
    args = call.args
    if "batch_sizes" in args:
        raise Mixing(f"{call.name} over packed sequences has no batch rule")
    state = only_batch(call, args["input"])
    expected = 0 if args["batch_first"] else 1
    if state is None or state.dim != expected or state.outer != 1:
        raise Mixing(f"{call.name} runs over the batch dim")
    hidden = args["hx"] if isinstance(args["hx"], (list, tuple)) else [args["hx"]]
    for value in hidden:
        found = only_batch(call, value)
        if found is None or found.dim != 1:
            raise Mixing(f"{call.name}'s first hidden state has no samples")
    return tuple(state if i == 0 else Batch(1) for i in range(len(call.out)))


@register("gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(call: Call) -> States:
    """One time step: input and hidden state hold one row per sample."""
    hidden = call.args["hx"]
    states = [call.args["input"], *(hidden if isinstance(hidden, (list, tuple)) else [hidden])]
    if any(only_batch(call, v) != Batch(0) for v in states):
        raise Mixing(f"{call.name} meets values with and without samples")
    _weights_const(call, "w_ih", "w_hh", "b_ih", "b_hh")
    return every_output(call, Batch(0))


@register("bilinear")
def bilinear(call: Call) -> States:
    ndim = len(call.out.shape)
    state = aligned(call, [call.args["input1"], call.args["input2"]], ndim)
    _weights_const(call, "weight", "bias")
    if state is None or state.dim == ndim - 1:
        raise Mixing("bilinear sums over the batch dim")
    return state


@register(
    "cross_entropy_loss",
    "nll_loss",
    "nll_loss_nd",
    "nll_loss2d",
    "mse_loss",
    "l1_loss",
    "smooth_l1_loss",
    "huber_loss",
    "binary_cross_entropy",
    "binary_cross_entropy_with_logits",
    "kl_div",
    "soft_margin_loss",
    "gaussian_nll_loss",
    "poisson_nll_loss",
    "margin_ranking_loss",
    "hinge_embedding_loss",
    "multilabel_soft_margin_loss",
)
def loss(call: Call) -> States:
    args = call.args
    first, target = call.tensors()[:2]
    _weights_const(call, *(["weight"] if call.name.startswith(("cross", "nll")) else []))
    by_class = call.name.startswith(("cross", "nll"))
    state = only_batch(call, first)
    other = only_batch(call, target)
    if state is None or other is None:
        raise Mixing(f"{call.name} meets values with and without samples")
    ndim = len(call.shape(first))
    if by_class:
        classes = 1 if ndim > 1 else 0
        if state.dim == classes:
            raise Mixing(f"{call.name} runs over the batch dim")
        same = len(call.shape(target)) == ndim
        expected = state if same or state.dim < classes else Batch(state.dim - 1, state.outer)
        if other != expected:
            raise Mixing(f"{call.name} meets samples along different dims")
    else:
        aligned(call, call.tensors(), ndim)
        expected = state
    reduction = args.get("reduction", _MEAN)
    if reduction == _NONE:
        return expected
    return Reduced(-1 if reduction == _MEAN else 0)


@register("cosine_similarity", "pairwise_distance")
def pairs(call: Call) -> States:
    ndim = max(len(call.shape(v)) for v in call.tensors())
    state = aligned(call, call.tensors(), ndim)
    dim = call.args["dim"] % ndim if call.name == "cosine_similarity" else ndim - 1
    if state is None or state.dim == dim:
        raise Mixing(f"{call.name} runs over the batch dim")
    if call.args.get("keepdim"):
        return state
    return Batch(state.dim - (dim < state.dim), state.outer)


@register("cdist", "_cdist_forward")
def distances(call: Call) -> States:
    """All pairs of rows within one sample."""
    ndim = len(call.out.shape)
    state = aligned(call, call.tensors(), ndim)
    if state is None or state.dim >= ndim - 2:
        raise Mixing(f"{call.name} pairs every sample with every other")
    return state


@register(
    "triplet_margin_loss", "cosine_embedding_loss", "multi_margin_loss", "multilabel_margin_loss"
)
def row_losses(call: Call) -> States:
    """Losses of one number per row of their inputs, the samples in dim 0."""
    _weights_const(call, *(["weight"] if "weight" in call.args else []))
    values = [v for n, v in call.args.items() if isinstance(v, fx.Node) and n != "weight"]
    states = {only_batch(call, v) for v in values}
    if len(states) != 1 or any(len(call.shape(v)) not in (1, 2) for v in values):
        raise Mixing(f"{call.name} meets values with and without samples")
    state = states.pop()
    if state is None or state.dim != 0 or len(call.shape(values[0])) != 2:
        raise Mixing(f"{call.name} works along the batch dim")
    reduction = call.args.get("reduction", _MEAN)
    return state if reduction == _NONE else Reduced(-1 if reduction == _MEAN else 0)


@register("_weight_norm", "_weight_norm_interface")
def weight_norm(call: Call) -> States:
    return Const()
