"""The YAML form of a cluster: checked by pydantic, turned into plain values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from raypar.errors import ClusterError, did_you_mean
from raypar.mesh.devices import DEVICES, DTYPES, DeviceKind, Link

_UNITS = {
    "": 1,
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
_SIZE = re.compile(r"\s*([0-9.]+(?:e[+-]?[0-9]+)?)\s*([a-z]*)\s*(?:/s)?\s*", re.IGNORECASE)


def _size(value: Any) -> Any:
    """Bytes from a number or from text such as ``80 GB``, ``64GiB`` or ``50GB/s``."""
    if not isinstance(value, str):
        return value
    match = _SIZE.fullmatch(value)
    unit = match.group(2).upper() if match else None
    if match is None or unit not in _UNITS:
        raise ValueError(f"{value!r} is no size; write bytes, or a number with a unit: '80 GB'")
    return float(match.group(1)) * _UNITS[unit]


def _count_bytes(value: Any) -> Any:
    value = _size(value)
    if isinstance(value, float) and not abs(value) <= _MOST_BYTES:
        raise ValueError(f"at most {_MOST_BYTES} bytes")
    return round(value) if isinstance(value, float) else value


_MOST_BYTES = 1 << 60
_MOST_DEVICES = 1 << 17  # of a whole cluster: what is made for each of them must fit into memory
_Bytes = Annotated[int, BeforeValidator(_count_bytes), Field(gt=0, le=_MOST_BYTES)]
_Rate = Annotated[float, BeforeValidator(_size), Field(gt=0, allow_inf_nan=False)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class LinkForm(_Strict):
    """A link: bytes per second in one direction, seconds of latency."""

    bandwidth: _Rate
    latency: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    name: str = ""

    def value(self) -> Link:
        return Link(self.bandwidth, self.latency, self.name)


class KindForm(_Strict):
    """A device kind that the built-in table lacks."""

    vendor: str = "nvidia"
    flops: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = Field(min_length=1)
    memory: Annotated[int, BeforeValidator(_count_bytes), Field(ge=0, le=_MOST_BYTES)]
    bandwidth: _Rate
    inside: LinkForm
    host: LinkForm
    across: LinkForm
    source: str = "cluster file"

    def value(self, name: str, where: str) -> DeviceKind:
        for dtype in self.flops:
            if dtype not in DTYPES:
                raise ClusterError(
                    f"{where}: device_kinds.{name}.flops.{dtype}: unknown dtype; known are "
                    f"{', '.join(DTYPES)}.{did_you_mean(dtype, DTYPES)}"
                )
        if self.memory == 0 and self.vendor != "cpu":
            raise ClusterError(
                f"{where}: device_kinds.{name}.memory: 0 is for vendor 'cpu' alone; "
                "write the bytes of one device, for example '80 GB'"
            )
        return DeviceKind(
            name=name,
            vendor=self.vendor,
            flops=dict(self.flops),
            memory=self.memory,
            bandwidth=self.bandwidth,
            inside=self.inside.value(),
            host=self.host.value(),
            across=self.across.value(),
            source=self.source,
        )


class NodeForm(_Strict):
    """One node, or `count` equal ones; `speed` is the share of its kind's rates that it reaches."""

    device: str
    devices: int = Field(gt=0)
    host_memory: _Bytes
    name: str = ""
    id: str = ""
    count: int = Field(default=1, gt=0)
    speed: float = Field(default=1.0, gt=0, le=1)
    inside: LinkForm | None = None
    across: LinkForm | None = None


class ClusterForm(_Strict):
    """The whole file."""

    nodes: list[NodeForm] = Field(min_length=1)
    name: str = "cluster"
    device_kinds: dict[str, KindForm] = Field(default_factory=dict)

    def kinds(self, where: str) -> dict[str, DeviceKind]:
        """The file's own device kinds, by name.

        Raises:
            ClusterError: One is called like a row of the built-in table, or names a wrong dtype.
        """
        for name in self.device_kinds:
            if name in DEVICES:
                raise ClusterError(
                    f"{where}: device_kinds.{name}: the built-in table has a {name}; call yours "
                    f"otherwise, for example '{name}-own'"
                )
        return {name: form.value(name, where) for name, form in self.device_kinds.items()}


_KEYS: dict[str, tuple[str, ...]] = {
    "": tuple(ClusterForm.model_fields),
    "nodes": tuple(NodeForm.model_fields),
    "device_kinds": tuple(KindForm.model_fields),
    "link": tuple(LinkForm.model_fields),
}


_EXAMPLES = {
    "nodes": "nodes: [{device: A100-80, devices: 8, host_memory: 512 GB}]",
    "device": "device: A100-80",
    "devices": "devices: 8",
    "host_memory": "host_memory: 512 GB (the node's main memory)",
    "bandwidth": "bandwidth: 12.5 GB/s",
    "memory": "memory: 80 GB",
}
"""What is written for keys that are needed."""


def parse(raw: Any, where: str) -> ClusterForm:
    """Checks `raw`, the content of a cluster file.

    Raises:
        ClusterError: Something is wrong; every fault is one line that names its key.
    """
    if not isinstance(raw, Mapping):
        raise ClusterError(
            f"{where}: expected a mapping with the key 'nodes', found {type(raw).__name__}"
        )
    try:
        form = ClusterForm.model_validate(raw)
    except ValidationError as error:
        lines = [_line(item) for item in error.errors()]
    else:
        total = sum(node.devices * node.count for node in form.nodes)
        if total <= _MOST_DEVICES:
            return form
        lines = [f"nodes: {total:,} devices in all (devices × count); at most {_MOST_DEVICES:,}"]
    raise ClusterError(f"{where} is not a valid cluster:\n  " + "\n  ".join(lines))


def _line(item: Any) -> str:
    loc = tuple(item["loc"])
    key = _dotted(loc)
    kind, found = item["type"], item["input"]
    if kind == "extra_forbidden":
        valid = _valid_keys(loc)
        return (
            f"{key}: unknown key; known are {', '.join(valid)}.{did_you_mean(str(loc[-1]), valid)}"
        )
    if kind == "missing":
        example = _EXAMPLES.get(str(loc[-1]))
        return f"{key}: this key is missing" + (f", such as {example}" if example else "")
    told = item["msg"].removeprefix("Value error, ")
    return f"{key}: {told[0].lower()}{told[1:]}, found {found!r:.200}"


def _dotted(loc: tuple[str | int, ...]) -> str:
    text = ""
    for part in loc:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def _valid_keys(loc: tuple[str | int, ...]) -> tuple[str, ...]:
    if len(loc) == 1:
        return _KEYS[""]
    parent = loc[-2]
    if parent in ("inside", "across", "host"):
        return _KEYS["link"]
    return _KEYS[str(loc[0])]
