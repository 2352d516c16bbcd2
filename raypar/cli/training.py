"""Commands that train."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from raypar.cli._shared import PATH, json_option, set_option, write_json
from raypar.config import load_config

if TYPE_CHECKING:
    from raypar.train.result import Result


workers_option = click.option(
    "--num-workers", type=click.IntRange(min=0), help="Same as --set mesh.num_workers=N."
)


def _workers(number: int | None) -> tuple[str, ...]:
    return () if number is None else (f"mesh.num_workers={number}",)


@click.command()
@click.argument("config_file", metavar="CONFIG", type=PATH)
@set_option
@workers_option
@click.option("--resume", "go_on", is_flag=True, help="Go on from run.name's newest checkpoint.")
@json_option
def train(
    config_file: str,
    overrides: tuple[str, ...],
    num_workers: int | None,
    go_on: bool,
    json_file: str | None,
) -> None:
    """Train what CONFIG (a YAML file) says.

    Ctrl-C and SIGTERM end the run after the step under way, with a checkpoint.
    """
    config = load_config(config_file, (*overrides, *_workers(num_workers)))
    from raypar._launch import train_config

    _tell(train_config(config, resume=go_on), json_file)


@click.command()
@click.argument("run_folder", metavar="RUN", type=PATH)
@set_option
@workers_option
@click.option(
    "--checkpoint", metavar="PATH", type=PATH, help="Go on from here; default: the newest of RUN."
)
@json_option
def resume(
    run_folder: str,
    overrides: tuple[str, ...],
    num_workers: int | None,
    checkpoint: str | None,
    json_file: str | None,
) -> None:
    """Go on with a run from its newest checkpoint.

    RUN is the run's folder; its config.resolved.yaml says what is trained. Other devices are
    planned for anew: raypar resume runs/gpt --num-workers 4 --set train.steps=400
    """
    from raypar._launch import resume_run

    changed = (*overrides, *_workers(num_workers))
    _tell(resume_run(run_folder, changed, checkpoint), json_file)


@click.command()
@click.argument("config_file", metavar="CONFIG", type=PATH)
@set_option
@click.option("--address", metavar="URL", help="The cluster's dashboard, such as http://head:8265.")
@click.option(
    "--working-dir",
    default=".",
    show_default=True,
    metavar="DIR",
    type=PATH,
    help="Folder to send along.",
)
@click.option("--no-wait", is_flag=True, help="Do not follow the job.")
@click.option("--ship-raypar", is_flag=True, help="Send raypar along, for nodes that lack it.")
@click.option("--pip", multiple=True, metavar="PACKAGE", help="Have the cluster install this.")
@click.option("--env", multiple=True, metavar="NAME=VALUE", help="Environment of the job.")
@click.option("--resume", "go_on", is_flag=True, help="Go on from run.name's newest checkpoint.")
def submit(
    config_file: str,
    overrides: tuple[str, ...],
    address: str | None,
    working_dir: str,
    no_wait: bool,
    ship_raypar: bool,
    pip: tuple[str, ...],
    env: tuple[str, ...],
    go_on: bool,
) -> None:
    """Train CONFIG as a job of a Ray cluster, and follow it.

    It is `ray job submit -- raypar train CONFIG` with the settings that make it smooth. Ctrl-C
    stops the job; the exit code is that of the training.
    """
    config = load_config(config_file, overrides)  # what is wrong is told before anything is sent
    from raypar.errors import ConfigError
    from raypar.jobs.submit import Submission, check_kept
    from raypar.jobs.submit import submit as submit_job

    note = check_kept(config, resume=go_on)
    if note is not None:
        click.echo(note, err=True)

    pairs = [item.partition("=") for item in env]
    if any(not equals for _, equals, _ in pairs):
        raise ConfigError(f"--env takes NAME=VALUE; got {', '.join(env)}")
    job = Submission(
        config_file=config_file,
        overrides=overrides,
        working_dir=working_dir,
        ship_raypar=ship_raypar,
        pip=pip,
        env_vars={name: value for name, _, value in pairs},
        resume=go_on,
    )
    code = submit_job(job, address, wait=not no_wait, say=click.echo)
    click.get_current_context().exit(code)


@click.command()
@click.argument("config_file", metavar="CONFIG", type=PATH)
@set_option
@click.option("--plan", "plan_file", metavar="FILE", type=PATH, help="Time this plan (JSON).")
@workers_option
@click.option("--steps", type=click.IntRange(min=3), default=12, show_default=True)
@json_option
def bench(
    config_file: str,
    overrides: tuple[str, ...],
    plan_file: str | None,
    num_workers: int | None,
    steps: int,
    json_file: str | None,
) -> None:
    """Time some steps of a plan, measured beside predicted.

    The plan is the one that CONFIG would get, or --plan. It is told where the time goes, too.
    """
    config = load_config(config_file, (*overrides, *_workers(num_workers)))
    from raypar._bench import bench_config, bench_text

    found = bench_config(config, plan_file, steps)
    click.echo(bench_text(found))
    write_json(json_file, found)


def _tell(result: Result, json_file: str | None) -> None:
    metrics = result.metrics
    if "loss" not in metrics:
        click.echo("done: nothing was left to do")
    else:
        parts = [f"loss {metrics['loss']:.4f}"]
        if "tokens_per_s" in metrics:
            parts.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
        if "stopped" in metrics:
            parts.append(f"ended early: {metrics['stopped']}")
        click.echo(f"done: {', '.join(parts)}")
    click.echo(f"files: {result.path}")
    write_json(json_file, json.loads(json.dumps(metrics)))
