"""Does every private name of torch and Ray that raypar uses exist in those installed here?

    python release/gpu/names.py [--out DIR] [--torch FOLDER]

Reads `raypar/compat.py` and `compat_ray.py` without importing them: a name that is missing is told
with its line, where an import would end at the first. Each ``from torch… import name`` is looked
up, each chain like ``torch._C.DisableTorchFunction``, and each function that compat wraps around an
object of torch (an operator's schema, a fake mode, the mode of a trace) is called. `--torch` looks
at the sources in a folder instead (an unpacked wheel of any platform): then only what has a source
is checked, and the rest is listed as unknown. Ray's names are checked where Ray is installed.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from release.gpu import kit

COMPAT = tuple(kit.ROOT / "raypar" / name for name in ("compat.py", "compat_ray.py"))
LIBRARIES = ("torch", "ray")


class Use(NamedTuple):
    """A name of a library that compat mentions.

    Attributes:
        file: Where.
        line: Where in it.
        module: What it is imported from, or the library itself for a chain of attributes.
        name: The name, or the attributes joined by dots.
    """

    file: str
    line: int
    module: str
    name: str


def all_uses() -> list[Use]:
    """Every private name that raypar uses."""
    return [use for path in COMPAT for use in uses(path.read_text(), path.name)]


def uses(source: str, file: str) -> list[Use]:
    """Every import and every attribute chain of torch and Ray in a file's text."""
    tree = ast.parse(source)
    found: set[Use] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and _library(node.module) in LIBRARIES:
            found |= {Use(file, node.lineno, str(node.module), a.name) for a in node.names}
        elif isinstance(node, ast.Attribute):
            chain = _chain(node)
            if chain and chain[0] in LIBRARIES:
                found.add(Use(file, node.lineno, chain[0], ".".join(chain[1:])))
    longest = [u for u in found if not any(o != u and _begins(o, u) for o in found)]
    return sorted(longest)


def _begins(other: Use, use: Use) -> bool:
    """Whether `use` is the beginning of another chain on its line."""
    return (
        other.line == use.line
        and other.module == use.module
        and other.name.startswith(use.name + ".")
    )


def _library(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _chain(node: ast.expr) -> list[str]:
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute):
        inner = _chain(node.value)
        return [*inner, node.attr] if inner else []
    return []


# -- in an installed library ----------------------------------------------------------------


def missing_here(found: list[Use]) -> tuple[list[str], list[str]]:
    """(names that are missing, libraries that are not installed)."""
    absent = [n for n in LIBRARIES if importlib.util.find_spec(n) is None]
    wrong = []
    for use in found:
        if _library(use.module) in absent:
            continue
        try:
            _look_up(use)
        except (ImportError, AttributeError) as error:
            wrong.append(f"{use.file}:{use.line}: {use.module} has no {use.name}: {error}")
    return wrong, absent


def _look_up(use: Use) -> None:
    value: Any = importlib.import_module(use.module)
    at = use.module
    for part in use.name.split("."):
        try:
            value = getattr(value, part)
        except AttributeError:  # a module that nobody has imported yet
            value = importlib.import_module(f"{at}.{part}")
        at = f"{at}.{part}"


# -- in a folder of sources -----------------------------------------------------------------


def missing_in(folder: Path, found: list[Use]) -> tuple[list[str], list[str]]:
    """(names that no source defines, names whose source is compiled)."""
    wrong, unknown = [], []
    for use in found:
        if _library(use.module) != "torch":
            continue
        module, names = use.module, use.name.split(".")
        while names and (path := _source(folder, f"{module}.{names[0]}")) is not None:
            module, names = f"{module}.{names[0]}", names[1:]
        path = _source(folder, module)
        if path is None:
            unknown.append(f"{use.module}.{use.name}")
        elif names and names[0] not in _defined(folder, path):
            wrong.append(f"{use.file}:{use.line}: {path.relative_to(folder)} has no {names[0]}")
    return wrong, unknown


def _source(folder: Path, module: str) -> Path | None:
    base = folder.joinpath(*module.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py", base / "__init__.pyi"):
        if path.is_file():
            return path
    return None


def _defined(folder: Path, path: Path) -> set[str]:
    """Names that a source binds at any level; of star imports those of what they name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {(a.asname or a.name).partition(".")[0] for a in node.names}
            if isinstance(node, ast.ImportFrom) and any(a.name == "*" for a in node.names):
                other = None if node.level else _source(folder, node.module or "")
                found |= _defined(folder, other) if other is not None else set()
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


# -- what only objects have -----------------------------------------------------------------


def failing() -> list[str]:
    """Calls compat's functions on torch's own objects; returns what fails, one line each."""
    from raypar import compat

    return [
        f"{name}: {type(error).__name__}: {error}"
        for name, call in _trials(compat)
        if (error := _error_of(call)) is not None
    ]


def _error_of(call: Any) -> Exception | None:
    try:
        call()
    except Exception as error:
        return error
    return None


def _trials(compat: Any) -> Iterator[tuple[str, Any]]:
    import torch

    add, out = torch.ops.aten.add.Tensor, torch.ops.aten.add.out

    def expect(value: Any, wanted: Any) -> None:
        if value != wanted:
            raise ValueError(f"found {value!r}, expected {wanted!r}")

    def traced() -> None:
        def body(x: torch.Tensor) -> torch.Tensor:
            y = x + 1
            if compat.current_graph() is None or compat.traced_node(y) is None:
                raise ValueError("a trace does not know its own graph")
            with compat.outside_trace():
                torch.ones(1).item()
            return y

        compat.make_fx(body, tracing_mode="fake")(torch.ones(2))

    def fake() -> None:
        mode = compat.fake_mode()
        with mode:
            x = torch.empty(2, 3)
        with compat.forgetting_sizes(mode):
            pass
        made = compat.fake_around(mode, torch.empty(2, device="meta"), torch.device("cpu"))
        expect(isinstance(x, compat.FakeTensor) and isinstance(made, compat.FakeTensor), True)

    def hooked() -> None:
        x = torch.ones(1, requires_grad=True)
        expect(compat.has_gradient_hooks(x), False)
        x.register_hook(lambda g: g)
        expect(compat.has_gradient_hooks(x), True)

    def truncated() -> None:
        seen = []
        with compat.wrapped_truncated_normal(
            lambda before: lambda *a, **k: seen.append(1) or before(*a, **k)
        ):
            torch.nn.init.trunc_normal_(torch.empty(3))
        expect(seen, [1])

    def validated() -> None:
        with compat.set_validation(False):
            torch.distributions.Normal(0.0, 1.0)

    yield "schema_name", lambda: expect(compat.schema_name(add), "aten::add")
    yield "overload_name", lambda: expect(compat.overload_name(add), "Tensor")
    yield "is_mutable", lambda: expect(compat.is_mutable(torch.ops.aten.add_.Tensor), True)
    yield "argument_names", lambda: expect(compat.argument_names(add)[:2], ["self", "other"])
    yield "argument_defaults", lambda: expect(dict(compat.argument_defaults(add))["alpha"], 1)
    yield "form_without_out", lambda: expect(compat.form_without_out(out), add)
    yield "written_arguments", lambda: expect(compat.written_arguments(out), ["out"])
    yield "raw_callable", lambda: compat.raw_callable(add)(torch.ones(1), torch.ones(1))
    yield "storage_id", lambda: compat.storage_id(torch.ones(1))
    yield (
        "has_own_dispatch",
        lambda: expect(compat.has_own_dispatch(torch.nn.Parameter(torch.ones(1))), False),
    )
    yield "without_torch_function", lambda: compat.without_torch_function().__enter__
    yield "traces", traced
    yield "fake tensors", fake
    yield "hooks", hooked
    yield "truncated normal", truncated
    yield "set_validation", validated


def main() -> int:
    """Checks; returns the exit code."""
    parser = kit.parser(__doc__)
    parser.add_argument("--torch", type=Path, help="folder that holds torch/ as sources")
    options = parser.parse_args()
    found = all_uses()
    figures: dict[str, Any] = {"names": len(found)}
    if options.torch is not None:
        wrong, unknown = missing_in(options.torch, found)
        figures["unknown"] = unknown
        version = options.torch / "torch" / "version.py"
        print(
            f"sources of {version}: {version.read_text().split()[0:1] if version.exists() else ''}"
        )
        print(f"compiled, so not looked at: {', '.join(unknown) or 'none'}")
    else:
        wrong, absent = missing_here(found)
        figures["not_installed"] = absent
        print(f"not installed: {', '.join(absent) or 'none'}")
        if not wrong:
            wrong = failing()
    for line in wrong:
        print(line)
    print(f"{len(found)} names, {len(wrong)} missing")
    if options.torch is not None:
        return int(bool(wrong))
    figures["missing"] = wrong
    return kit.write(options, "names", figures, [kit.Target("missing names", len(wrong), "== 0")])


if __name__ == "__main__":
    sys.exit(main())
