"""Writes the API reference: every public name of raypar, from its docstring and annotations.

    python -m docs.build_api api.md

A public name is one that ``__all__`` of a module in `MODULES` holds, or, in one that has no
``__all__``, what is defined there under a name without an underscore in front; and every public
method of a public class.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MODULES = {
    "raypar": "What users call.",
    "raypar.train.callbacks": "What is told of a run while it goes on.",
    "raypar.train.checkpoint": "Checkpoints.",
    "raypar.mesh.cluster": "Clusters, as data.",
    "raypar.graph.opgraph": "Captured models.",
    "raypar.plan": "The parts of a plan.",
    "raypar.fit": "Whether a plan fits a graph and a cluster.",
    "raypar.search.plan": "Searches, and what they looked at.",
    "raypar.search.planners.base": "Planners, and how one is registered.",
    "raypar.search.simulate": "A step before it runs.",
    "raypar.schedules.base": "Schedules, and how one is registered.",
    "raypar.comm.group": "What a communication backend offers.",
    "raypar.jobs.submit": "Runs as Ray jobs.",
    "raypar.tune": "Sweeps over runs.",
    "raypar.testing": "Checks for your own models, planners, schedules and backends.",
}
"""The modules that users and third parties import from, with a line on each."""

_LINE = 70
"""Characters of a signature that stay on one line."""


@dataclass(frozen=True)
class Entry:
    """One public name.

    Attributes:
        name: With its module, and its class where it is a method.
        kind: ``class``, ``function``, ``method``, ``property`` or ``value``.
        signature: Arguments and result as they are annotated; empty for values.
        doc: Its docstring.
        untyped: Arguments without an annotation, and ``return`` where that lacks one.
    """

    name: str
    kind: str
    signature: str
    doc: str
    untyped: tuple[str, ...] = ()


def entries() -> Iterator[Entry]:
    """All public names, module by module; one that several modules offer is told once."""
    seen: set[int] = set()
    for module_name in MODULES:
        module = importlib.import_module(module_name)
        for name in public_names(module):
            value = getattr(module, name)
            if id(value) in seen and (inspect.isclass(value) or inspect.isroutine(value)):
                continue
            seen.add(id(value))
            yield from _entry(f"{module_name}.{name}", value)


def public_names(module: Any) -> list[str]:
    """Names of a module that others may use."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return [name for name in listed if not name.startswith("__")]
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def _entry(name: str, value: Any) -> Iterator[Entry]:
    if name == "raypar.plan":  # a module that can be called: the function behind it
        value = importlib.import_module("raypar.search.plan").plan
    if inspect.isclass(value):
        error = issubclass(value, BaseException)
        given = not error and "__init__" in vars(value)
        untyped = _untyped(value.__init__, result=False) if given else ()
        yield Entry(name, "class", "" if error else _signature(value), _doc(value), untyped)
        fields = {f.name for f in dataclasses.fields(value)} if _is_data(value) else set()
        for own, member in vars(value).items():
            if not own.startswith("_") and own not in fields:
                yield from _member(f"{name}.{own}", member)
    elif inspect.isroutine(value):
        yield Entry(name, "function", _signature(value), _doc(value), _untyped(value))
    else:
        yield Entry(name, "value", "", "")


def _member(name: str, member: Any) -> Iterator[Entry]:
    if isinstance(member, property):
        assert member.fget is not None
        yield Entry(name, "property", "", _doc(member.fget), _untyped(member.fget))
        return
    if isinstance(member, classmethod | staticmethod):
        member = member.__func__
    if inspect.isfunction(member):
        yield Entry(name, "method", _signature(member), _doc(member), _untyped(member))


def _is_data(value: type) -> bool:
    return dataclasses.is_dataclass(value)


def _doc(value: Any) -> str:
    """Its own docstring; that of a dataclass is none if Python made it."""
    found = inspect.cleandoc(vars(value).get("__doc__") or value.__doc__ or "")
    return "" if found.startswith(f"{getattr(value, '__name__', '')}(") else found


def _signature(value: Any) -> str:
    """Arguments and result, an argument a line where one line is too short for them."""
    try:
        found = inspect.signature(value)
    except (TypeError, ValueError):
        return ""
    parts: list[str] = []
    starred = False
    for p in found.parameters.values():
        if p.kind is p.KEYWORD_ONLY and not starred:
            parts.append("*")
        starred = starred or p.kind in (p.KEYWORD_ONLY, p.VAR_POSITIONAL)
        stars = {p.VAR_POSITIONAL: "*", p.VAR_KEYWORD: "**"}.get(p.kind, "")
        typed = "" if p.annotation is p.empty else f": {_type_text(p.annotation)}"
        given = "" if p.default is p.empty else f" = {_default_text(p.default)}"
        parts.append(f"{stars}{p.name}{typed}{given}")
    result = found.return_annotation
    arrow = "" if inspect.isclass(value) or result is found.empty else f" -> {_type_text(result)}"
    line = f"({', '.join(parts)}){arrow}"
    return line if len(line) <= _LINE else "(\n    " + ",\n    ".join(parts) + f",\n){arrow}"


def _type_text(annotation: Any) -> str:
    return annotation if isinstance(annotation, str) else inspect.formatannotation(annotation)


def _default_text(default: Any) -> str:
    """As it is written; what has no such form (a factory, an object) is left open."""
    text = repr(default)
    return "..." if text.startswith("<") else text


def _untyped(function: Any, *, result: bool = True) -> tuple[str, ...]:
    signature = inspect.signature(function)
    bare = [
        name
        for name, p in signature.parameters.items()
        if p.annotation is p.empty and name not in ("self", "cls")
    ]
    if result and signature.return_annotation is signature.empty:
        bare.append("return")
    return tuple(bare)


def to_markdown() -> str:
    """The whole reference as one page."""
    lines = ["# API reference", ""]
    module = ""
    for entry in entries():
        home = max((m for m in MODULES if entry.name.startswith(f"{m}.")), key=len)
        if entry.kind in ("class", "function", "value"):
            home = max((m for m in MODULES if entry.name.rpartition(".")[0] == m), key=len)
            if home != module:
                module = home
                lines += [f"## `{module}`", "", MODULES[module], ""]
        short = entry.name.removeprefix(f"{module}.")
        level = "###" if entry.kind in ("class", "function", "value") else "####"
        lines += [f"{level} `{short}`", ""]
        if entry.signature:
            lines += ["```python", f"{short}{entry.signature}", "```", ""]
        if entry.doc:
            lines += [_as_markdown(entry.doc), ""]
    return "\n".join(lines)


def _as_markdown(doc: str) -> str:
    """A Google-style docstring with its sections as lists."""
    out: list[str] = []
    listing = False
    for line in doc.splitlines():
        if re.fullmatch(r"(Args|Attributes|Returns|Yields|Raises|Note|Example):", line):
            out += [f"**{line[:-1]}**", ""]
            listing = line[:-1] in ("Args", "Attributes", "Raises")
        elif listing and (item := re.match(r" {4}([\w*]+): (.*)", line)):
            out.append(f"- `{item[1]}`: {item[2]}")
        elif listing and line.startswith("        "):
            out.append(f"  {line.strip()}")
        else:
            listing = listing and not line
            out.append(line.removeprefix("    ") if line.startswith("    ") else line)
    return "\n".join(out)


if __name__ == "__main__":
    Path(sys.argv[1] if len(sys.argv) > 1 else "api.md").write_text(to_markdown(), "utf-8")
