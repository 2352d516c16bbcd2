"""The `raypar` command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import raypar
from raypar.config import Config, default_yaml, load_config
from raypar.errors import ConfigError, RayparError

if TYPE_CHECKING:
    from raypar.train.result import Result

# torch, Ray and what imports them are imported inside the commands: `raypar --help` is instant.


class _Commands(click.Group):
    """Ends every command with one clear message and an exit code instead of a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except RayparError as error:
            _print_error(error)
            ctx.exit(2 if isinstance(error, ConfigError) else 1)
        except KeyboardInterrupt:
            click.echo("stopped", err=True)
            ctx.exit(130)


def _print_error(error: RayparError) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    block = Text(f"{type(error).__name__}: ", style="bold red")
    block.append(str(error), style="red")
    console.print(block, soft_wrap=True)


_set_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override one config key."
)
_cluster_option = click.option(
    "--cluster", "cluster_file", metavar="FILE", help="Plan for this cluster (YAML)."
)


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(raypar.__version__, prog_name="raypar")
def main() -> None:
    """Pipeline- and data-parallel training of PyTorch models on Ray."""


@main.command()
@click.argument("config_file", metavar="CONFIG")
@_set_option
@click.option("--num-workers", type=click.IntRange(min=0), help="Same as --set mesh.num_workers=N.")
def train(config_file: str, overrides: tuple[str, ...], num_workers: int | None) -> None:
    """Train what CONFIG (a YAML file) says."""
    if num_workers is not None:
        overrides = (*overrides, f"mesh.num_workers={num_workers}")
    config = load_config(config_file, overrides)
    from raypar._launch import train_config

    _print_result(train_config(config))


@main.command()
@click.argument("config_file", metavar="CONFIG")
@click.option("-o", "--output", default="plan.json", show_default=True, help="Where to write it.")
@click.option("--html", metavar="FILE", help="Also write the plan and its search as a page.")
@_set_option
@_cluster_option
def plan(
    config_file: str,
    output: str,
    html: str | None,
    overrides: tuple[str, ...],
    cluster_file: str | None,
) -> None:
    """Plan what CONFIG says, without training; write the plan and explain it."""
    config = load_config(config_file, overrides)
    from raypar._launch import explained, found_of

    (made, record), graph, cluster = found_of(config, cluster_file)
    click.echo(explained(config, made, graph, cluster, virtual=cluster_file is not None))
    try:
        made.save(output)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output!r}: {error.strerror}") from None
    click.echo(f"wrote {output}")
    if html is not None:
        from raypar._html import write_page

        virtual = cluster_file is not None
        write_page(config, made, record, graph, cluster, html, virtual=virtual)
        click.echo(f"wrote {html}")


@main.command()
@click.argument("file", metavar="PLAN.JSON|CONFIG")
@click.option("--plan", "plan_file", metavar="FILE", help="Explain this plan (JSON) of CONFIG.")
@click.option("--lists", is_flag=True, help="Also print every rank's instructions.")
@_set_option
@_cluster_option
def explain(
    file: str,
    plan_file: str | None,
    lists: bool,
    overrides: tuple[str, ...],
    cluster_file: str | None,
) -> None:
    """Explain a plan file, or the plan that a config would get or is given.

    A plan file alone tells what it holds; with its CONFIG, time, memory and shardings are told too.
    """
    if Path(file).suffix == ".json":
        if overrides or cluster_file:
            raise ConfigError(
                f"{file} is a plan and holds its own choices: --set and --cluster go with a config"
            )
        if lists or plan_file:
            raise ConfigError(
                f"{file} is a plan; --lists and --plan need its model: "
                f"raypar explain CONFIG --plan {file} --lists"
            )
        from raypar.plan import Plan
        from raypar.report.explain import explain as explain_plan

        click.echo(explain_plan(Plan.load(file)))
        return
    config: Config = load_config(file, overrides)
    from raypar._launch import explained, plan_of

    found = plan_of(config, cluster_file, plan_file)
    click.echo(explained(config, *found, virtual=cluster_file is not None, lists=lists))


@main.command()
@click.argument("config_file", metavar="CONFIG")
@click.option("--plan", "plan_file", metavar="FILE", help="Simulate this plan (JSON).")
@_set_option
@_cluster_option
@click.option(
    "--cores",
    type=click.IntRange(min=1),
    metavar="N",
    help="Cores that the ranks of each CPU node share.",
)
@click.option("--cost", default="analytic", show_default=True, help="Cost model.")
@click.option("--gantt", is_flag=True, help="Draw who does what when.")
@click.option("--trace", metavar="FILE", help="Write a Chrome trace, for ui.perfetto.dev.")
def simulate(
    config_file: str,
    plan_file: str | None,
    overrides: tuple[str, ...],
    cluster_file: str | None,
    cores: int | None,
    cost: str,
    gantt: bool,
    trace: str | None,
) -> None:
    """Tell step time and memory of what CONFIG says, without starting anything."""
    config = load_config(config_file, overrides)
    from raypar._simulate import simulate_config
    from raypar.report.gantt import gantt as draw
    from raypar.report.simulation import over_limit, summary
    from raypar.report.trace import write_trace

    found = simulate_config(config, plan_file, cluster_file, cost=cost, cores=cores)
    click.echo(summary(found))
    if gantt:
        click.echo("\n" + draw(found))
    if trace is not None:
        write_trace(found, trace)
        click.echo(f"wrote {trace}")
    for line in over_limit(found):
        click.echo(f"out of memory: {line}", err=True)


@main.command()
@click.option("--address", metavar="HOST:PORT", help="Measure this Ray cluster.")
@click.option(
    "--local",
    "processes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Measure this machine with N processes; default: one per core.",
)
@click.option("--out", metavar="FILE", help="Also write the constants here (JSON).")
def probe(address: str | None, processes: int | None, out: str | None) -> None:
    """Measure the cluster and keep what the cost models need of it (under a minute)."""
    if address is not None and processes is not None:
        raise click.UsageError("give --address or --local, not both")
    from raypar.mesh.cluster import Cluster
    from raypar.mesh.probe import probe as measure
    from raypar.mesh.probe import save_calibration
    from raypar.report.calibration import calibration_text

    cluster = Cluster.local(processes) if address is None else Cluster.from_ray(address)
    found = measure(cluster, address=address)
    click.echo(calibration_text(found, cluster))
    click.echo(f"kept in {save_calibration(found)}")
    if out is not None:
        save_calibration(found, Path(out))


@main.command()
def config() -> None:
    """Print a complete config: every key, its default and its meaning."""
    click.echo(default_yaml(), nl=False)


@main.command()
def doctor() -> None:
    """Tell what is installed and seen here, what does not fit, and how to mend it."""
    from raypar import doctor as examination

    sys.exit(examination.main())


def _print_result(result: Result) -> None:
    metrics = result.metrics
    parts = [f"loss {metrics['loss']:.4f}"]
    if "tokens_per_s" in metrics:
        parts.append(f"{metrics['tokens_per_s']:,.0f} tokens/s")
    click.echo(f"done: {', '.join(parts)}")
    click.echo(f"files: {result.path}")


if __name__ == "__main__":
    main()
