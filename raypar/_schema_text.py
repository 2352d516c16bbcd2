"""A pydantic schema of sections in words: what a key takes, and what is wrong with a value."""

from __future__ import annotations

import types
import typing
from typing import Annotated, Any, Literal

import yaml
from annotated_types import Ge, Gt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from raypar.errors import did_you_mean


def problem(detail: Any, schema: type[BaseModel]) -> str:
    """One pydantic error as a sentence: the key, what is there, what is expected."""
    if detail["type"] == "value_error":
        return str(detail["ctx"]["error"])
    keys: list[str] = []
    section = schema
    info: FieldInfo | None = None
    loc = [str(part) for part in detail["loc"]]
    for part in loc:
        keys.append(part)
        found = section.model_fields.get(part)
        if found is None:
            break
        info = found
        nested = found.annotation
        if not (isinstance(nested, type) and issubclass(nested, BaseModel)):
            break
        section = nested
    path = ".".join(keys)
    if detail["type"] == "extra_forbidden":
        return _unknown(keys, section, schema)
    if detail["type"] == "missing":
        example = f", such as {info.examples[0]}" if info and info.examples else ""
        return f"{path} is missing{example}"
    wanted = "a mapping" if info is None else expected(info)
    near = did_you_mean(str(detail["input"]), [] if info is None else _words(info.annotation))
    near = near or _meant(detail["input"], wanted)
    return f"{path}: expected {wanted}; found {show(detail['input'])}{near and '.' + near}"


def _meant(found: Any, wanted: str) -> str:
    """What a value of the wrong kind was probably meant to be."""
    if not isinstance(found, str):
        return ""
    module, dot, name = found.rpartition(".")
    if "module:name" in wanted and ":" not in found and dot and module and name.isidentifier():
        return f" Write {module}:{name}"
    if "number" in wanted and found.lstrip("+-").isdigit():
        return f" Write {found} without quotes"
    return ""


def _words(annotation: Any) -> list[str]:
    """Texts that a field may hold."""
    if typing.get_origin(annotation) is Literal:
        return [str(value) for value in typing.get_args(annotation)]
    parts = typing.get_args(annotation)
    return [word for part in parts for word in _words(part)]


def _unknown(keys: list[str], section: type[BaseModel], schema: type[BaseModel]) -> str:
    """Names the nearest right key; a right name in the wrong section is told as such."""
    homes = [
        f"{section_name}.{keys[-1]}"
        for section_name, info in schema.model_fields.items()
        if keys[-1] in section_of(info).model_fields
    ]
    near = did_you_mean(keys[-1], section.model_fields)
    if near and len(keys) > 1:
        near = near.replace("'", f"'{'.'.join(keys[:-1])}.", 1)
    hint = f" Did you mean {homes[0]!r}?" if homes else near
    where = ".".join(keys[:-1]) or "a config"
    return (
        f"unknown key {'.'.join(keys)!r}.{hint} Keys of {where}: {', '.join(section.model_fields)}"
    )


def section_of(info: FieldInfo) -> type[BaseModel]:
    """The class of a field that is a section."""
    return typing.cast(type[BaseModel], info.annotation)


def expected(info: FieldInfo) -> str:
    """What a field takes, such as ``a whole number ≥ 1 or auto``."""
    text = _kind(info.annotation)
    return text + "".join(_bound(item) for item in info.metadata)


def _kind(annotation: Any) -> str:
    origin = typing.get_origin(annotation)
    if origin is Annotated:
        base, *extra = typing.get_args(annotation)
        return _kind(base) + "".join(_bound(item) for item in extra)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_kind(part) for part in typing.get_args(annotation))
    if origin is Literal:
        return " | ".join(str(value) for value in typing.get_args(annotation))
    if origin is list:
        return f"a list of {_kind(typing.get_args(annotation)[0])}"
    names = {
        bool: "true or false",
        int: "a whole number",
        float: "a number",
        str: "text",
        type(None): "null",
    }
    return names.get(annotation, "a mapping")


def _bound(item: Any) -> str:
    if isinstance(item, Ge):
        return f" ≥ {item.ge}"
    if isinstance(item, Gt):
        return f" > {item.gt}"
    if isinstance(item, FieldInfo):
        return "".join(_bound(inner) for inner in item.metadata)
    return " of the form module:name" if getattr(item, "pattern", None) else ""


def show(value: Any) -> str:
    """A value and its kind, as an error shows it."""
    kinds = {
        dict: "mapping",
        list: "list",
        str: "text",
        bool: "boolean",
        int: "whole number",
        float: "number",
    }
    if value is None:
        return "nothing"
    text = repr(value)
    short = text if len(text) < 60 else text[:57] + "..."
    return f"{short} ({kinds.get(type(value), type(value).__name__)})"


def inline(value: Any) -> str:
    """A value as YAML on one line."""
    text: str = yaml.safe_dump(value, default_flow_style=True, width=1000).strip()
    return text.removesuffix("\n...").strip()
