"""Commands about checkpoints, and models that come and go through them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from raypar.errors import ConfigError

if TYPE_CHECKING:
    from raypar.train.checkpoint import Checkpoint


@click.group()
def checkpoint() -> None:
    """Look into checkpoints, check them, bring models in and out."""


def _checkpoint_at(where: str) -> Checkpoint:
    from raypar.train.resuming import checkpoint_at

    found = checkpoint_at(where, Path(where))
    assert found is not None
    return found


@checkpoint.command("inspect")
@click.argument("where", metavar="CHECKPOINT|RUN")
def checkpoint_inspect(where: str) -> None:
    """Tell what a checkpoint, or the newest of a run, holds."""
    click.echo(_checkpoint_at(where).describe())


@checkpoint.command("verify")
@click.argument("where", metavar="CHECKPOINT|RUN")
def checkpoint_verify(where: str) -> None:
    """Read all of a checkpoint and compare checksums.

    Of a run it is the newest one.
    """
    found = _checkpoint_at(where)
    problems = found.verify()
    for problem in problems:
        click.echo(problem, err=True)
    if problems:
        click.get_current_context().exit(1)
    click.echo(f"{found.path}: good, {found.bytes:,} bytes, step {found.step}")


@checkpoint.command("export")
@click.argument("where", metavar="CHECKPOINT|RUN")
@click.argument("output", metavar="OUT")
@click.option("--ema", is_flag=True, help="The averaged weights.")
@click.option(
    "--hf", "base", metavar="FOLDER", help="As a Hugging Face folder, with FOLDER's config."
)
@click.option("--hf-config", "config", metavar="FILE", help="As one, with this config.json.")
@click.option("--shard-size", metavar="SIZE", help="Of a file of such a folder; default: 5GB.")
def checkpoint_export(
    where: str, output: str, ema: bool, base: str | None, config: str | None, shard_size: str | None
) -> None:
    """Write the model of a checkpoint to OUT.

    OUT is a safetensors file, under the model's own names; with --hf or --hf-config it is a folder
    that transformers loads, with FOLDER's tokenizer.
    """
    from raypar.train.weights import save_hugging_face
    from raypar.train.weights.hugging_face import SHARD_BYTES, bytes_of
    from raypar.train.weights.weights import CheckpointWeights

    found = _checkpoint_at(where)
    if base is None and config is None:
        if shard_size is not None:
            raise ConfigError(
                "--shard-size is for a folder of several files, and one file is written: add --hf "
                "BASE_FOLDER or --hf-config config.json, or leave it out"
            )
        found.save_safetensors(output, average=ema)
        click.echo(f"wrote {output}")
        return
    size = SHARD_BYTES if shard_size is None else bytes_of(shard_size)
    weights = CheckpointWeights(found, average=ema)
    files = save_hugging_face(weights, output, base=base, config=config, shard_bytes=size)
    click.echo(f"wrote {output}: {', '.join(files)}")


@checkpoint.command("convert")
@click.argument("source", metavar="IN")
@click.argument("output", metavar="OUT")
def checkpoint_convert(source: str, output: str) -> None:
    """Make a checkpoint of weights, or copy one to another storage.

    IN is a safetensors file, a Hugging Face folder, a file of torch.save(model.state_dict()), a
    checkpoint, or a run, whose newest checkpoint it is. OUT is the folder or URL of the new
    checkpoint, for model.init_from; or, where it ends in .safetensors, a file of the weights alone.
    """
    from raypar.train.weights import copy_checkpoint, save_as_checkpoint, weights_at
    from raypar.train.weights.safetensors import save_safetensors
    from raypar.train.weights.weights import CheckpointWeights

    weights = weights_at(source, torch_files=True)
    if output.endswith(".safetensors"):
        save_safetensors(weights, output)
        click.echo(f"wrote {output}")
        return
    if isinstance(weights, CheckpointWeights):
        made = copy_checkpoint(weights.checkpoint, output)
    else:
        made = save_as_checkpoint(weights, output)
    click.echo(made.describe())
