"""YAML as configurations and cluster files use it."""

from __future__ import annotations

import re
from collections.abc import Hashable
from typing import Any

import yaml

from raypar.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with two traps closed: ``1e-3`` is a number, and a repeated key is an error."""

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


class _Dumper(yaml.SafeDumper):
    """Quotes the texts that the loader would take for numbers."""


_SCIENTIFIC = re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$")
for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver("tag:yaml.org,2002:float", _SCIENTIFIC, list("-+.0123456789"))


def parse_yaml(text: str, where: str) -> Any:
    """Reads YAML text.

    Raises:
        ConfigError: It is not YAML, or repeats a key; names `where`, the line and the column.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        at = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise ConfigError(f"{where}{at}: not valid YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None


def dump_yaml(value: Any) -> str:
    """YAML text of plain values; `parse_yaml` gives them back."""
    text: str = yaml.dump(value, Dumper=_Dumper, sort_keys=False, default_flow_style=False)
    return text
