"""Hugging Face models from tiny configurations (extra ``hf``); nothing is downloaded."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from raypar.errors import ConfigError
from raypar.testing.models._batches import (
    IGNORE,
    SEQ_LEN,
    VOCAB,
    integers,
    lengths,
    masked_language,
    padding_mask,
)
from raypar.testing.models._case import register


def _transformers() -> Any:
    """Imports transformers, offline, when the first of its models is built.

    Raises:
        ConfigError: It is not installed.
    """
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers
    except ImportError:
        raise ConfigError(
            "Hugging Face models need transformers, which is not installed: "
            "pip install 'raypar[hf]'"
        ) from None
    return transformers


def _causal(g: torch.Generator, batch: int) -> dict[str, torch.Tensor]:
    mask = padding_mask(lengths(g, batch, SEQ_LEN), SEQ_LEN)
    tokens = integers(g, batch, SEQ_LEN, low=1)
    labels = tokens.masked_fill(~mask, IGNORE)
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}


def _masked(g: torch.Generator, batch: int) -> dict[str, torch.Tensor]:
    tokens, mask, labels = masked_language(g, batch)
    return {"input_ids": tokens, "attention_mask": mask.long(), "labels": labels}


def _seq2seq(g: torch.Generator, batch: int) -> dict[str, torch.Tensor]:
    inputs = _causal(g, batch)
    kept = padding_mask(lengths(g, batch, 10), 10)
    return {**inputs, "labels": integers(g, batch, 10, low=1).masked_fill(~kept, IGNORE)}


@register(_causal, hf=True, reduction="count", fp32_ops=True)
def hf_gpt2() -> nn.Module:
    """GPT-2 with two layers, dropout off."""
    tf = _transformers()
    config = tf.GPT2Config(
        vocab_size=VOCAB, n_positions=16, n_embd=32, n_layer=2, n_head=4, use_cache=False,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = tf.GPT2LMHeadModel(config).train()
    model.loss_type = "ForCausalLM"  # what it falls back to, with a warning, for its class's name
    return model  # type: ignore[no-any-return]


@register(_causal, hf=True, reduction="count", fp32_ops=True)
def hf_llama() -> nn.Module:
    """Llama with two layers and grouped-query attention (two key-value heads)."""
    tf = _transformers()
    config = tf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    return tf.LlamaForCausalLM(config).train()


@register(_seq2seq, hf=True, reduction="count", fp32_ops=True)
def hf_t5() -> nn.Module:
    """T5 with two layers a side, dropout off."""
    tf = _transformers()
    config = tf.T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        relative_attention_num_buckets=8, dropout_rate=0.0, use_cache=False,
        decoder_start_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return tf.T5ForConditionalGeneration(config).train()


@register(_masked, hf=True, reduction="count")
def hf_bert() -> nn.Module:
    """BERT for masked language modelling, two layers, dropout off."""
    tf = _transformers()
    config = tf.BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=16,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return tf.BertForMaskedLM(config).train()


@register(_causal, hf=True, reduction="count", fp32_ops=True)
def hf_mixtral() -> nn.Module:
    """Mixtral with two layers of four experts, computed as batched matrix products."""
    tf = _transformers()
    config = tf.MixtralConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
        max_position_embeddings=16, use_cache=False,
    )  # fmt: skip
    config._experts_implementation = "batched_mm"
    return tf.MixtralForCausalLM(config).train()
