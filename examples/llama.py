"""Fine-tuning of a Hugging Face Llama, from a small random checkpoint: nothing is downloaded.

python -m examples.llama runs/tiny-llama        # writes the checkpoint
raypar train examples/llama.yaml                # fine-tunes it over two stages
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import raypar as rp
from examples.data import stdlib_bytes

SEQ_LEN = 64


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise rp.ConfigError(
            "examples.llama needs transformers, which is not installed: pip install 'raypar[hf]'"
        ) from None
    transformers.utils.logging.disable_progress_bar()
    return transformers


def write_checkpoint(folder: str | Path) -> None:
    """Writes a Hugging Face folder: a byte-level Llama of two layers with random weights.

    Args:
        folder: Gets ``config.json`` and ``model.safetensors``.

    Raises:
        ConfigError: transformers is not installed.
    """
    tf = _transformers()
    torch.manual_seed(0)
    config = tf.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=SEQ_LEN,
        use_cache=False,
    )  # fmt: skip
    tf.LlamaForCausalLM(config).save_pretrained(folder)


def llama(folder: str) -> torch.nn.Module:
    """The model of a Hugging Face folder, without its weights: `model.init_from` reads those.

    So no process has to hold the whole model: each rank reads just the slices that it trains.

    Raises:
        ConfigError: There is no such folder, or transformers is not installed.
    """
    if not (Path(folder) / "config.json").is_file():
        raise rp.ConfigError(
            f"model.kwargs.folder is {folder!r}, which holds no Hugging Face model: make a small "
            f"one with `python -m examples.llama {folder}`"
        )
    tf = _transformers()
    config = tf.AutoConfig.from_pretrained(folder)
    config.use_cache = False
    model: torch.nn.Module = tf.AutoModelForCausalLM.from_config(config)
    return model.train()


def prompts(global_batch: int, seq_len: int = SEQ_LEN) -> Iterator[dict[str, Tensor]]:
    """Endless batches of source text as bytes; Llama itself shifts the labels by one."""
    for tokens, _ in stdlib_bytes(global_batch, seq_len):
        yield {"input_ids": tokens, "labels": tokens}


if __name__ == "__main__":
    write_checkpoint(sys.argv[1] if len(sys.argv) > 1 else "runs/tiny-llama")
