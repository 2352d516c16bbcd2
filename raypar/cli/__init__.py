"""The `raypar` command."""

from __future__ import annotations

import click

import raypar
from raypar.cli import checkpoints, clusters, files, planning, training
from raypar.cli._shared import Commands


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(raypar.__version__, prog_name="raypar")
def main() -> None:
    """Split a PyTorch model over the devices of a Ray cluster, and train it.

    CONFIG is a YAML file; `raypar config` prints all its keys. To begin with, raypar plan CONFIG
    tells how it would be split, raypar train CONFIG trains it, and raypar report runs/NAME shows
    the run.
    """


for _command in (
    clusters.doctor,
    clusters.probe,
    planning.plan,
    planning.explain,
    planning.simulate,
    planning.verify,
    training.train,
    training.resume,
    training.submit,
    training.bench,
    files.report,
    checkpoints.checkpoint,
    files.config,
    files.dashboard,
    files.completion,
):
    main.add_command(_command)


if __name__ == "__main__":
    main()
