"""Commands about checkpoints, and models that come and go through them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from raypar.cli._shared import PATH, check_folder, check_writable
from raypar.errors import ConfigError

if TYPE_CHECKING:
    from raypar.train.checkpoint import Checkpoint


@click.group()
def checkpoint() -> None:
    """Look into checkpoints, check them, bring models in and out."""


def _checkpoint_at(where: str) -> Checkpoint:
    from raypar.train.resuming import checkpoint_at

    if Path(where).is_file():
        raise ConfigError(
            f"{where!r} is a file; give the folder of a checkpoint or of a run, such as runs/gpt. "
            f"Of a file of weights, raypar checkpoint convert {where} NEW makes a checkpoint"
        )
    found = checkpoint_at(where, Path(where))
    assert found is not None
    return found


@checkpoint.command("inspect")
@click.argument("where", metavar="CHECKPOINT|RUN", type=PATH)
def checkpoint_inspect(where: str) -> None:
    """Tell what a checkpoint, or the newest of a run, holds."""
    click.echo(_checkpoint_at(where).describe())


@checkpoint.command("verify")
@click.argument("where", metavar="CHECKPOINT|RUN", type=PATH)
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
@click.argument("where", metavar="CHECKPOINT|RUN", type=PATH)
@click.argument("output", metavar="OUT", type=PATH)
@click.option("--ema", is_flag=True, help="The averaged weights.")
@click.option(
    "--hf",
    "base",
    metavar="FOLDER",
    type=PATH,
    help="As a Hugging Face folder, with FOLDER's config.",
)
@click.option(
    "--hf-config", "config", metavar="FILE", type=PATH, help="As one, with this config.json."
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["safetensors", "hf", "dcp"]),
    help="Default: hf where --hf or --hf-config is given, else safetensors.",
)
@click.option("--shard-size", metavar="SIZE", help="Of a file of such a folder; default: 5GB.")
def checkpoint_export(
    where: str,
    output: str,
    ema: bool,
    base: str | None,
    config: str | None,
    form: str | None,
    shard_size: str | None,
) -> None:
    """Write the model of a checkpoint to OUT.

    OUT is a safetensors file, under the model's own names; with --hf or --hf-config it is a folder
    that transformers loads, with FOLDER's tokenizer; with --format dcp a folder that
    torch.distributed.checkpoint loads.
    """
    from raypar.train.weights import save_dcp, save_hugging_face
    from raypar.train.weights.hugging_face import SHARD_BYTES, bytes_of
    from raypar.train.weights.weights import CheckpointWeights

    plain = base is None and config is None
    form = form or ("safetensors" if plain else "hf")
    if form != "hf" and not plain:
        raise ConfigError(
            f"--hf and --hf-config make a folder of transformers, and --format is {form}: leave "
            "one of them out"
        )
    if form == "safetensors":
        check_writable(output, "OUT")
    else:
        check_folder(output, "OUT")
    found = _checkpoint_at(where)
    if form != "hf":
        if shard_size is not None:
            raise ConfigError(
                "--shard-size is for files of a Hugging Face folder: add --hf BASE_FOLDER or "
                "--hf-config config.json, or leave it out"
            )
        if form == "dcp":
            files = save_dcp(CheckpointWeights(found, average=ema), output)
            click.echo(f"wrote {output}: {len(files)} files")
            return
        found.save_safetensors(output, average=ema)
        click.echo(f"wrote {output}")
        return
    size = SHARD_BYTES if shard_size is None else bytes_of(shard_size)
    weights = CheckpointWeights(found, average=ema)
    files = save_hugging_face(weights, output, base=base, config=config, shard_bytes=size)
    click.echo(f"wrote {output}: {', '.join(files)}")


@checkpoint.command("convert")
@click.argument("source", metavar="IN", type=PATH)
@click.argument("output", metavar="OUT", type=PATH)
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
