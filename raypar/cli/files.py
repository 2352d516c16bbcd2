"""Commands about files: configs, a run's folder, dashboards."""

from __future__ import annotations

from pathlib import Path

import click

from raypar.cli._shared import PATH, output_option, print_or_write, set_option
from raypar.config import default_yaml, json_schema, load_config


@click.group(invoke_without_command=True)
@click.pass_context
def config(ctx: click.Context) -> None:
    """Print, check or describe a config.

    Alone it prints every key, its default and its meaning.
    """
    if ctx.invoked_subcommand is None:
        click.echo(default_yaml(), nl=False)


@config.command("show")
@click.argument("config_file", metavar="CONFIG", type=PATH)
@set_option
def config_show(config_file: str, overrides: tuple[str, ...]) -> None:
    """Print CONFIG with every default, as raypar reads it."""
    click.echo(load_config(config_file, overrides).to_yaml(), nl=False)


@config.command("schema")
@output_option
def config_schema(output: str | None) -> None:
    """Print the JSON Schema of a config, for editors of YAML."""
    print_or_write(json_schema(), output)


@config.command("check")
@click.argument("config_file", metavar="CONFIG", type=PATH)
@set_option
def config_check(config_file: str, overrides: tuple[str, ...]) -> None:
    """Check CONFIG.

    Its keys are checked, and that what it names can be imported and called.
    """
    from raypar._targets import check_config

    found = load_config(config_file, overrides)
    check_config(found)
    click.echo(f"{config_file}: good")


@click.command()
@click.argument("run_folder", metavar="RUN", type=PATH)
@click.option(
    "-o", "--output", metavar="FILE", type=PATH, help="The page; default: RUN/report.html."
)
@click.option(
    "--trace", metavar="FILE", type=PATH, help="Also write a Chrome trace, for ui.perfetto.dev."
)
def report(run_folder: str, output: str | None, trace: str | None) -> None:
    """Write a run as one offline page.

    It shows the loss, steps as measured and as planned, memory and events.
    """
    from raypar.report.run import write_report, write_run_trace

    out = Path(output) if output is not None else Path(run_folder) / "report.html"
    write_report(Path(run_folder), out)
    click.echo(f"wrote {out}")
    if trace is not None:
        write_run_trace(Path(run_folder), Path(trace))
        click.echo(f"wrote {trace}")


@click.command()
@output_option
def dashboard(output: str | None) -> None:
    """Print a Grafana dashboard for runs with run.loggers: [ray]."""
    from raypar.train.dashboards import grafana_dashboard

    print_or_write(grafana_dashboard(), output)


@click.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the completion script of SHELL.

    For bash: raypar completion bash > ~/.local/share/bash-completion/completions/raypar
    """
    from click.shell_completion import get_completion_class

    from raypar.cli import main

    found = get_completion_class(shell)
    assert found is not None
    click.echo(found(main, {}, "raypar", "_RAYPAR_COMPLETE").source())
