"""Commands that plan, and tell of plans, without starting anything."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from raypar.cli._shared import (
    PATH,
    check_folder,
    check_writable,
    cluster_option,
    search_options,
    set_option,
    write_text,
    written_option,
)
from raypar.config import Config, load_config
from raypar.errors import ConfigError, PlanError

if TYPE_CHECKING:
    from raypar.search.rungs import Rung


@click.command()
@click.argument("config_file", metavar="CONFIG", type=PATH)
@click.option(
    "-o",
    "--output",
    metavar="PATH",
    type=PATH,
    help="Where to write it; default: plan.json, or ladder/.",
)
@written_option("--html", "Also write the plan and its search as a page.")
@written_option("--save-record", "Also write all that was looked at (JSON).")
@click.option("--force", is_flag=True, help="Write the plan also where it does not fit the memory.")
@click.option(
    "--ladder",
    "sizes",
    metavar="SIZES",
    help="Plan for every size of the cluster: 2..16, 2..16:2 or 2,4,8.",
)
@search_options
@set_option
@cluster_option
def plan(
    config_file: str,
    output: str | None,
    html: str | None,
    save_record: str | None,
    force: bool,
    sizes: str | None,
    overrides: tuple[str, ...],
    cluster_file: str | None,
) -> None:
    """Plan what CONFIG says, without training, and explain the plan.

    Ctrl-C ends the search with the best plan so far. With --ladder, a folder is written: a plan for
    every size of the cluster (whole nodes in their order, then a part of the next) and ladder.json.

    Where no plan fits the memory, or the one that was asked for does not, nothing is written, and
    the exit code is 1.
    """
    config = load_config(config_file, overrides)
    if sizes is not None:
        if force:
            raise ConfigError(
                "--force writes one plan that does not fit; a ladder tells which sizes have none: "
                "leave it out"
            )
        if html is not None or save_record is not None:
            raise ConfigError(
                "--html and --save-record tell of one plan: leave them out, or plan for one size "
                "with --set mesh.num_workers=N"
            )
        output = output or "ladder"
        check_folder(output, "--output")
        _plan_ladder(config, sizes, output, cluster_file)
        return
    output = output or "plan.json"
    check_writable(output, "--output")
    from raypar._launch import explained, found_of
    from raypar._search_view import SearchView, ended

    with SearchView() as view:
        (made, record), graph, cluster = found_of(config, cluster_file, view)
    told = explained(config, made, graph, cluster, virtual=cluster_file is not None)
    click.echo(told.text)
    for line in ended(record):
        click.echo(line)
    if told.lacking and not force:
        raise PlanError(
            f"the plan does not fit, and is not written to {output!r}: {'; '.join(told.lacking)}. "
            "--force writes it all the same"
        )
    try:
        made.save(output)
    except OSError as error:
        raise ConfigError(f"--output: cannot write {output!r}: {error.strerror}") from None
    click.echo(f"wrote {output}")
    if save_record is not None:
        write_text(save_record, record.to_json() + "\n", "--save-record")
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


@click.command()
@click.argument("file", metavar="PLAN.JSON|CONFIG", type=PATH)
@click.option(
    "--plan", "plan_file", metavar="FILE", type=PATH, help="Explain this plan (JSON) of CONFIG."
)
@click.option("--lists", is_flag=True, help="Also print every rank's instructions.")
@set_option
@cluster_option
def explain(
    file: str,
    plan_file: str | None,
    lists: bool,
    overrides: tuple[str, ...],
    cluster_file: str | None,
) -> None:
    """Explain a plan file, or the plan that CONFIG would get.

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
    click.echo(explained(config, *found, virtual=cluster_file is not None, lists=lists).text)


@click.command()
@click.argument("config_file", metavar="CONFIG", type=PATH)
@click.option("--plan", "plan_file", metavar="FILE", type=PATH, help="Simulate this plan (JSON).")
@set_option
@cluster_option
@click.option(
    "--cores",
    type=click.IntRange(min=1),
    metavar="N",
    help="Cores that the ranks of each CPU node share.",
)
@click.option("--cost", default="analytic", show_default=True, help="Cost model.")
@click.option("--gantt", is_flag=True, help="Draw who does what when.")
@written_option("--trace", "Write a Chrome trace, for ui.perfetto.dev.")
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
    """Tell step time and memory, without starting anything."""
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


@click.command()
@click.argument("config_file", metavar="CONFIG", type=PATH)
@click.option("--plan", "plan_file", metavar="FILE", type=PATH, help="Check this plan (JSON).")
@click.option("--steps", type=click.IntRange(min=1), default=1, show_default=True)
@set_option
def verify(config_file: str, plan_file: str | None, steps: int, overrides: tuple[str, ...]) -> None:
    """Check that a plan trains exactly like the unsplit model.

    Both run in this process. The first value that differs is named, and the exit code is then 1.
    The plan is the one that CONFIG would get, or --plan.
    """
    config = load_config(config_file, overrides)
    from raypar._launch import verify_config

    found = verify_config(config, plan_file, steps)
    click.echo(found or f"no value differs in {steps} step{'s' * (steps > 1)}")
    if found:
        click.get_current_context().exit(1)
