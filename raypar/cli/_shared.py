"""What the commands share: options, and how errors end them."""

from __future__ import annotations

import functools
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
from click.shell_completion import CompletionItem

from raypar.errors import ConfigError, RayparError

# torch, Ray and what imports them are imported inside the commands: `raypar --help` is instant.


class Commands(click.Group):
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

    def main(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().main(*args, **kwargs)
        except SystemExit as end:
            session = sys.modules.get("raypar.train.session")
            if session is not None and session.exit_would_hang():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))
            raise


def _print_error(error: RayparError) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(stderr=True, highlight=False)
    block = Text(f"{type(error).__name__}: ", style="bold red")
    block.append(str(error), style="red")
    console.print(block, soft_wrap=True)


class _Path(click.Path):
    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":  # it would be taken for none that was given
            option = isinstance(param, click.Option)
            name = param.opts[0] if option and param else param and param.human_readable_name
            raise ConfigError(
                f"{name}: the path is empty, as of a shell variable that is not set; name a file "
                "or folder" + ", or leave the option out" * option
            )
        return super().convert(value, param, ctx)


PATH = _Path(readable=False)
"""A path or URL; shells complete it. What is wrong with it the command itself tells."""


def _keys(ctx: click.Context, param: click.Parameter, begun: str) -> list[CompletionItem]:
    """Keys of a config that go on as what was typed does."""
    from raypar.config import surface

    keys = (line.partition(":") for line in surface())
    return [
        CompletionItem(f"{key}=", help=takes.strip())
        for key, _, takes in keys
        if "." in key and key.startswith(begun)
    ]


set_option = click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="KEY=VALUE",
    shell_complete=_keys,
    help="Override one config key.",
)
cluster_option = click.option(
    "--cluster", "cluster_file", metavar="FILE", type=PATH, help="Plan for this cluster (YAML)."
)


_LONGEST = 255 - len(".01234567")
"""Of a file's name, where it is written under a longer one first."""


def check_writable(path: str, option: str) -> None:
    """Tells that a file cannot be written before the work is done, not after.

    Raises:
        ConfigError: It cannot; names the option.
    """
    file = Path(path)
    if "://" in path:
        known = "is a URL"
    elif os.path.isdir(file):
        known = "is a folder"
    elif not os.path.isdir(file.parent):
        known = f"is in {str(file.parent)!r}, which is no folder"
    elif not os.access(file if os.path.exists(file) else file.parent, os.W_OK):
        known = "cannot be written"
    elif len(os.fsencode(file.name)) > _LONGEST:
        known = f"has a name of more than {_LONGEST} bytes"
    else:
        return
    raise ConfigError(f"{option}: {path!r} {known}; name a file, such as out.json")


def check_folder(path: str, option: str) -> None:
    """Tells that a folder cannot be made, or be written to, before the work is done.

    Raises:
        ConfigError: It cannot; names the option.
    """
    if "://" in path:
        raise ConfigError(f"{option}: {path!r} is a URL; name a folder of this machine")
    there = next(p for p in (Path(path), *Path(path).absolute().parents) if os.path.exists(p))
    if not there.is_dir() or not os.access(there, os.W_OK):
        known = "cannot be written" if there.is_dir() else "is a file"
        raise ConfigError(
            f"{option}: folder {path!r} cannot be made, since {str(there)!r} {known}; name another"
        )


def _writable(ctx: click.Context, option: click.Parameter, path: str | None) -> str | None:
    if path is not None and path != "-":
        check_writable(path, option.opts[0])
    return path


def written_option(name: str, text: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """An option that names a file that the command writes; checked before it begins."""
    return click.option(name, metavar="FILE", type=PATH, callback=_writable, help=text)


output_option = click.option(
    "-o", "--output", metavar="FILE", type=PATH, help="Write it here instead of printing it."
)
json_option = click.option(
    "--json",
    "json_file",
    metavar="FILE",
    type=PATH,
    callback=_writable,
    help="Also write what is told as JSON; - for stdout.",
)


def search_options(command: Callable[..., None]) -> Callable[..., None]:
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
        click.option(
            "--storage", metavar="FILE", type=PATH, help="Journal: a search goes on from there."
        ),
        click.option("--no-cache", is_flag=True, help="Search, even if the plan is known."),
    ]
    return functools.reduce(lambda made, option: option(made), reversed(options), with_keys)


def write_text(path: str, text: str, option: str) -> None:
    """Writes a file that the user named.

    Raises:
        ConfigError: It cannot be written; names the option.
    """
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option}: cannot write {path!r}: {error.strerror}") from None


def write_json(path: str | None, value: Any) -> None:
    """Writes `value` where ``--json`` says, if it was given."""
    if path is None:
        return
    text = json.dumps(value, indent=1, default=str) + "\n"
    if path == "-":
        click.echo(text, nl=False)
        return
    write_text(path, text, "--json")
    click.echo(f"wrote {path}", err=True)


def print_or_write(value: Any, output: str | None) -> None:
    """Prints `value` as JSON, or writes it where ``--output`` says."""
    text = json.dumps(value, indent=1) + "\n"
    if output is None:
        click.echo(text, nl=False)
        return
    write_text(output, text, "--output")
    click.echo(f"wrote {output}")
