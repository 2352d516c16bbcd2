"""The `raypar` command."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import raypar
from raypar.config import Config, default_yaml, load_config
from raypar.errors import ConfigError, RayparError

if TYPE_CHECKING:
    from raypar.search.rungs import Rung
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


def _search_options(command: Callable[..., None]) -> Callable[..., None]:
    """Options that stand for keys of section ``search``; given as ``search_keys`` overrides."""

    @functools.wraps(command)
    def with_keys(no_cache: bool, **given: Any) -> None:
        keys = {name: given.pop(name) for name in ("trials", "budget_s", "sampler", "seed")}
        overrides = [f"search.{name}={value}" for name, value in keys.items() if value is not None]
        storage = given.pop("storage")
        if storage is not None:  # a path is no YAML
            overrides.append(f"search.storage={json.dumps(storage)}")
        if no_cache:
            overrides.append("search.cache=false")
        command(overrides=(*given.pop("overrides"), *overrides), **given)

    options = [
        click.option("--trials", metavar="N", help="Plans that the study looks at."),
        click.option("--budget", "budget_s", metavar="SECONDS", help="Seconds of search."),
        click.option("--sampler", metavar="NAME", help="tpe, gp, cmaes, nsga2 or random."),
        click.option("--seed", metavar="N", help="Seed of the sampler."),
        click.option("--storage", metavar="FILE", help="Journal: a search goes on from there."),
        click.option("--no-cache", is_flag=True, help="Search, even if the plan is known."),
    ]
    return functools.reduce(lambda made, option: option(made), reversed(options), with_keys)


@main.command()
@click.argument("config_file", metavar="CONFIG")
@click.option(
    "-o", "--output", metavar="PATH", help="Where to write it; default: plan.json, or ladder/."
)
@click.option("--html", metavar="FILE", help="Also write the plan and its search as a page.")
@click.option("--save-record", metavar="FILE", help="Also write all that was looked at (JSON).")
@click.option(
    "--ladder",
    "sizes",
    metavar="SIZES",
    help="Plan for every size of the cluster: 2..16, 2..16:2 or 2,4,8.",
)
@_search_options
@_set_option
@_cluster_option
def plan(
    config_file: str,
    output: str | None,
    html: str | None,
    save_record: str | None,
    sizes: str | None,
    overrides: tuple[str, ...],
    cluster_file: str | None,
) -> None:
    """Plan what CONFIG says, without training; write the plan and explain it.

    Ctrl-C ends the search with the best plan so far. With --ladder, a folder is written: a plan for
    every size of the cluster (whole nodes in their order, then a part of the next) and ladder.json.
    """
    config = load_config(config_file, overrides)
    if sizes is not None:
        if html is not None or save_record is not None:
            raise ConfigError(
                "--html and --save-record tell of one plan: leave them out, or plan for one size "
                "with --set mesh.num_workers=N"
            )
        _plan_ladder(config, sizes, output or "ladder", cluster_file)
        return
    from raypar._launch import explained, found_of
    from raypar._search_view import SearchView, ended

    output = output or "plan.json"
    with SearchView() as view:
        (made, record), graph, cluster = found_of(config, cluster_file, view)
    click.echo(explained(config, made, graph, cluster, virtual=cluster_file is not None))
    for line in ended(record):
        click.echo(line)
    try:
        made.save(output)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output!r}: {error.strerror}") from None
    click.echo(f"wrote {output}")
    if save_record is not None:
        try:
            Path(save_record).write_text(record.to_json() + "\n", encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--save-record: cannot write {save_record!r}: {error.strerror}"
            ) from None
        click.echo(f"wrote {save_record}")
    if html is not None:
        from raypar._html import write_page

        virtual = cluster_file is not None
        write_page(config, made, record, graph, cluster, html, virtual=virtual)
        click.echo(f"wrote {html}")


def _plan_ladder(config: Config, sizes: str, output: str, cluster_file: str | None) -> None:
    from raypar._launch import ladder_of
    from raypar._plan_text import duration

    def tell(rung: Rung) -> None:
        found = duration(rung.step_s) if rung.plan is not None else "no plan"
        click.echo(f"{rung.devices} devices: {found}, after {duration(rung.seconds)}", err=True)

    made = ladder_of(config, sizes, cluster_file, tell)
    click.echo(made.text())
    click.echo(f"{len(made.rungs)} sizes planned in {duration(made.seconds)}")
    click.echo(f"wrote {made.save(output)}")


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
