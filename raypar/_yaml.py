"""YAML as configurations and cluster files use it: plain values, of bounded size."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from raypar.errors import ConfigError

_MOST_CHARACTERS = 1 << 20
_MOST_VALUES = 100_000


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two traps closed: ``1e-3`` is a number, and a repeated key is an error."""

    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _check_size(node)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, Hashable) and key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice", key_node.start_mark
                )
            if isinstance(key, Hashable):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _check_size(root: yaml.Node) -> None:
    """Refuses anchors and aliases that write out as far more than was typed, or without end.

    Raises:
        ConstructorError: At the node that is too much.
    """
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()
    stack: list[tuple[yaml.Node, bool]] = [(root, False)]
    while stack:
        node, seen = stack.pop()
        if id(node) in sizes:
            continue
        parts = _parts(node)
        if seen:
            open_nodes.discard(id(node))
            sizes[id(node)] = 1 + sum(sizes[id(part)] for part in parts)
            if sizes[id(node)] > _MOST_VALUES:
                why = f"more than {_MOST_VALUES:,} values, with aliases written out"
                raise yaml.constructor.ConstructorError(None, None, why, node.start_mark)
            continue
        if id(node) in open_nodes:
            continue
        open_nodes.add(id(node))
        stack.append((node, True))
        for part in parts:
            if id(part) in open_nodes:
                why = "it contains itself"
                raise yaml.constructor.ConstructorError(None, None, why, part.start_mark)
            stack.append((part, False))


def _parts(node: yaml.Node) -> list[yaml.Node]:
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, yaml.SequenceNode) else []


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that the loader would take for numbers."""


_SCIENTIFIC = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """Reads YAML text.

    Raises:
        ConfigError: It is not YAML, repeats a key, or is far too large; names `where`, the line and
            the column.
    """
    if len(text) > _MOST_CHARACTERS:
        raise ConfigError(
            f"{where}: {len(text):,} characters of YAML; at most {_MOST_CHARACTERS:,} are read. "
            "Data does not belong into it: name a file"
        )
    try:
        return _apart(yaml.load(text, Loader=_Loader))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"{where}{at}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    except RecursionError:
        raise ConfigError(f"{where}: not valid YAML: nested far too deeply") from None
    except (ValueError, TypeError, AttributeError, LookupError, OverflowError) as error:
        # What a tag makes of a text that it does not suit: a 13th month, !!int of a word.
        raise ConfigError(f"{where}: not valid YAML: a value of a wrong form ({error})") from None


def _apart(value: Any) -> Any:
    """The value with every alias a copy: who changes one place changes no other."""
    if isinstance(value, dict):
        return {key: _apart(item) for key, item in value.items()}
    return [_apart(item) for item in value] if isinstance(value, list) else value


def dump_yaml(value: Any) -> str:
    """YAML text of plain values; `parse_yaml` gives them back."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False)
    return text
