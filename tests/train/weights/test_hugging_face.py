"""Folders of Hugging Face: written for transformers, and begun from."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import save_file

import raypar as rp
from examples.models import gpt
from raypar._launch import train_config
from raypar.cli import main
from raypar.config import load_config
from raypar.errors import CheckpointError, ConfigError
from raypar.train.weights import save_hugging_face, weights_at
from raypar.train.weights.hugging_face import bytes_of

transformers = pytest.importorskip("transformers")

LLAMA = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32,
}  # fmt: skip
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
T5 = {
    "vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2,
    "decoder_start_token_id": 0,
}  # fmt: skip


def made(kind: str) -> Any:
    """A small model, with random weights."""
    if kind == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))
    if kind == "t5":
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**T5))
    config = transformers.LlamaConfig(**LLAMA, tie_word_embeddings=kind == "llama-tied")
    return transformers.LlamaForCausalLM(config)


def tokens() -> torch.Tensor:
    return torch.arange(24).reshape(2, 12) % 40


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        more = {"decoder_input_ids": tokens()} if model.config.model_type == "t5" else {}
        found: torch.Tensor = model.eval()(input_ids=tokens(), **more).logits
        return found


@pytest.fixture
def base(tmp_path: Path) -> Callable[[str], Path]:
    def make(kind: str) -> Path:
        torch.manual_seed(3)
        folder = tmp_path / "base"
        made(kind).save_pretrained(folder)
        (folder / "tokenizer.json").write_text("{}")
        (folder / "modeling_own.py").write_text("raise RuntimeError")
        return folder

    return make


def begun(kind: str, folder: Path, **changed: Any) -> rp.Result:
    """A step of training that begins with a folder's weights."""
    ids = tokens()
    arguments: dict[str, Any] = {
        "optimizer": lambda params: torch.optim.SGD(params, lr=0.1),
        "data": [{"input_ids": ids, "labels": ids}],
        "steps": 1,
        "init_from": folder,
        "scaling_config": rp.ScalingConfig(num_workers=0),
        "search_config": rp.SearchConfig(stages=2, microbatches=2),
        "run_config": rp.RunConfig(name="run", storage_path=folder.parent, log_every=0),
    }
    return rp.Trainer(functools.partial(made, kind), **{**arguments, **changed}).fit()


@pytest.mark.parametrize(
    "kind",
    [
        "llama-tied",
        pytest.param("gpt2", marks=pytest.mark.thorough),
        pytest.param("t5", marks=pytest.mark.thorough),
    ],
)
def test_transformers_loads_what_was_trained_from_its_folder(
    kind: str, base: Callable[[str], Path], tmp_path: Path
) -> None:
    folder, out = base(kind), tmp_path / "out"
    result = begun(kind, folder)
    assert result.checkpoint is not None
    alone = type(made(kind)).from_pretrained(folder).train()
    ran = CliRunner().invoke(
        main,
        ["checkpoint", "export", str(result.path), str(out), "--hf", str(folder),
         "--shard-size", "10KB"],
    )  # fmt: skip
    assert ran.exit_code == 0, ran.output
    loaded, info = type(alone).from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), info
    assert (out / "tokenizer.json").is_file()
    assert not (out / "modeling_own.py").exists()
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert weights_at(out).forms == weights_at(folder).forms
    trained = made(kind)
    trained.load_state_dict(result.checkpoint.state_dict())
    assert torch.equal(logits(loaded), logits(trained))
    if kind == "llama-tied":  # the others have dropout, whose masks a run draws for itself
        optimizer = torch.optim.SGD(alone.parameters(), lr=0.1)
        alone(input_ids=tokens(), labels=tokens()).loss.backward()
        optimizer.step()
        torch.testing.assert_close(logits(loaded), logits(alone), rtol=1e-4, atol=1e-5)


def test_what_transformers_loads_goes_through_files_and_back(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = base("gpt2")
    first = transformers.GPT2LMHeadModel.from_pretrained(folder)
    torch.save(first.state_dict(), tmp_path / "whole.pt")
    whole, run = str(tmp_path / "whole.pt"), CliRunner()
    steps = [
        ["convert", whole, str(tmp_path / "made")],
        ["verify", str(tmp_path / "made")],
        ["inspect", str(tmp_path / "made")],
        ["convert", str(tmp_path / "made"), str(tmp_path / "moved")],
        ["convert", str(folder), str(tmp_path / "other")],
        ["convert", str(folder), str(tmp_path / "other.safetensors")],
        ["export", str(tmp_path / "moved"), str(tmp_path / "one.safetensors")],
        ["export", str(tmp_path / "moved"), str(tmp_path / "hf"), "--hf-config",
         str(folder / "config.json")],
    ]  # fmt: skip
    for step in steps:
        ran = run.invoke(main, ["checkpoint", *step])
        assert ran.exit_code == 0, ran.output
    assert sorted(p.name for p in (tmp_path / "hf").iterdir()) == [
        "config.json", "model.safetensors",
    ]  # fmt: skip
    again = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    assert torch.equal(logits(again), logits(first))
    alone = weights_at(tmp_path / "one.safetensors")
    assert torch.equal(alone.read("lm_head.weight"), first.lm_head.weight)
    assert alone.names.keys() == first.state_dict().keys()
    assert "lm_head.weight" not in weights_at(tmp_path / "other.safetensors").names


def test_a_config_says_the_dtype_that_is_written(tmp_path: Path) -> None:
    model = made("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "base")
    assert json.loads((tmp_path / "base/config.json").read_text())["dtype"] == "bfloat16"
    result = begun("llama", tmp_path / "base", steps=1)
    assert result.checkpoint is not None
    save_hugging_face(weights_at(result.checkpoint), tmp_path / "out", base=tmp_path / "base")
    loaded = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.float32


def test_a_folder_of_another_model_is_refused_by_name(
    base: Callable[[str], Path], tmp_path: Path
) -> None:
    base("llama")
    other = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**LLAMA, "vocab_size": 41, "num_hidden_layers": 1})
    )
    torch.save(other.state_dict(), tmp_path / "other.pt")
    weights = weights_at(tmp_path / "other.pt", torch_files=True)
    with pytest.raises(CheckpointError, match=r"is \(40, 16\) there and \(41, 16\) here"):
        save_hugging_face(weights, tmp_path / "out", base=tmp_path / "base")
    with pytest.raises(CheckpointError, match="--hf BASE_FOLDER"):
        save_hugging_face(weights, tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"cannot read .*nowhere"):
        save_hugging_face(weights, tmp_path / "out", base=tmp_path / "nowhere")
    assert not (tmp_path / "out").exists()
    ran = CliRunner().invoke(main, ["checkpoint", "export", "x", "y", "--shard-size", "1GB"])
    assert ran.exit_code != 0


def test_a_config_says_what_a_run_begins_with(tmp_path: Path) -> None:
    model = gpt(layers=1, width=8, heads=2, seq_len=16)
    save_file(
        {n: p.detach() + 1.0 for n, p in model.named_parameters()}, tmp_path / "w.safetensors"
    )
    config = tmp_path / "run.yaml"
    config.write_text(
        "model: {target: 'examples.models:gpt', "
        "kwargs: {layers: 1, width: 8, heads: 2, seq_len: 16}, "
        f"init_from: {tmp_path}/w.safetensors}}\n"
        "data: {target: 'examples.data:stdlib_bytes', global_batch: 4, kwargs: {seq_len: 16}}\n"
        "mesh: {num_workers: 0}\nsearch: {planner: uniform, stages: 2}\n"
        "optimizer: {target: 'torch.optim:SGD', kwargs: {lr: 0.0}}\n"
        f"train: {{steps: 1}}\nrun: {{name: run, storage_path: {tmp_path}, log_every: 0}}\n"
    )
    result = train_config(load_config(config))
    assert result.checkpoint is not None
    for name, tensor in result.checkpoint.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name] + 1.0), name
    ran = CliRunner().invoke(main, ["train", str(config), "--set", "model.init_from=nowhere"])
    assert ran.exit_code == 1
    assert "there is no 'nowhere'" in ran.output


@pytest.mark.parametrize(
    ("text", "count"),
    [("5GB", 5_000_000_000), ("1.5MB", 1_500_000), ("7", 7), ("64 kb", 64_000), ("2K", 2000)],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert bytes_of(text) == count


@pytest.mark.parametrize("text", ["", "GB", "0", "-1GB", "5 elephants", "1e9"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="for example 5GB"):
        bytes_of(text)
