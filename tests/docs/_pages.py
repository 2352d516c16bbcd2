"""Tutorials as data: their code blocks, and how each is run.

A comment in front of a block says what is special about it; readers do not see it:

- ``<!-- file: NAME -->``: the block is what the reader saves under that name.
- ``<!-- shown -->``: what a command prints.
- ``<!-- not run here: WHY -->``: not run by `run_page`.
"""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from raypar.cli import main

_BLOCK = re.compile(
    r"(?:<!-- (?P<note>.*?) -->\n)?```(?P<kind>\w+)\n(?P<text>.*?)^```$", re.M | re.S
)


@dataclass(frozen=True)
class Block:
    """One fenced block.

    Attributes:
        kind: Its language.
        text: What is in it.
        note: The comment in front of it, or empty.
        line: Line of the page on which it begins.
    """

    kind: str
    text: str
    note: str
    line: int


def blocks_of(page: Path) -> list[Block]:
    """The fenced blocks of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(m["kind"], m["text"], m["note"] or "", text[: m.start("text")].count("\n") + 1)
        for m in _BLOCK.finditer(text)
    ]


def commands_of(block: Block) -> list[str]:
    """The commands of a shell block, one for each line that does not go on."""
    joined = block.text.replace("\\\n", " ")
    lines = (line.partition(" #")[0].strip() for line in joined.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def run_page(page: Path) -> None:
    """Does what a reader of the page does, in the working directory.

    Raises:
        AssertionError: A command fails.
        Exception: What Python code raises, with the page's own line numbers.
    """
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks_of(page):
        what, _, value = block.note.partition(": ")
        if what == "file":
            Path(value).write_text(block.text, encoding="utf-8")
        elif what in ("shown", "not run here"):
            continue
        elif block.kind == "python":
            padded = "\n" * (block.line - 1) + block.text
            exec(compile(padded, str(page), "exec"), names)
        elif block.kind == "bash":
            for command in commands_of(block):
                run_command(command)
        else:
            raise AssertionError(f"{page.name}:{block.line}: nothing is known of {block.kind}")


def run_command(command: str) -> None:
    """Runs one command; raypar's in this process, which saves the import of torch."""
    program, *words = shlex.split(command)
    if program == "raypar":
        done = CliRunner().invoke(main, words)
        if done.exit_code:
            raise AssertionError(f"{command}: exit code {done.exit_code}\n{done.output}") from (
                done.exception
            )
    elif program == "python" and words[0] == "-m" and words[1] == "pytest":
        # In this process: torch is there already.
        code = pytest.main([*words[2:], "-p", "no:cacheprovider", "--rootdir", "."])
        assert code == 0, f"{command}: exit code {int(code)}"
    elif program == "python" and words[0] == "-m":
        before, sys.argv = sys.argv, words[1:]
        try:
            runpy.run_module(words[1], run_name="__main__")
        finally:
            sys.argv = before
    else:
        raise AssertionError(f"{command!r} is not a command that pages use")
