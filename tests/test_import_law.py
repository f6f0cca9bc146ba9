"""Who may import whom, read from the sources, and from what a process has loaded."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import penstock

ROOT = Path(penstock.__file__).parent
MLX = ("mlx", "mlx_lm")
ENGINE = "penstock.engine"
COMPUTES = ("engine", "cache.store")
"""The packages that run in the engine's process alone."""

WITHOUT_MLX_OR_ASYNCIO = (
    "memory.*",
    "cache.tree",
    "cache.checkpoints",
    "cache.nodes",
    "cache.value",
    "cache.holdings",
    "cache.summary",
    "engine.scheduler",
    "engine.sequence",
    "engine.draws",
    "supervisor.machine",
    "supervisor.journal",
)


def modules() -> Iterator[tuple[str, Path]]:
    """Every module of the package as its name below `penstock`, and its file."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), path


def imports(source: str, package: str) -> set[str]:
    """All names a module imports, wherever in it, in full: `from a import b` counts as a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def forbidden(name: str, banned: tuple[str, ...]) -> bool:
    return any(name == each or name.startswith(each + ".") for each in banned)


def offences(applies: object, banned: tuple[str, ...]) -> list[str]:
    return [
        f"{module} imports {name}"
        for module, path in modules()
        if applies(module)  # type: ignore[operator]
        for name in sorted(imports(path.read_text(encoding="utf-8"), package_of(module, path)))
        if forbidden(name, banned)
    ]


def package_of(module: str, path: Path) -> str:
    full = f"penstock.{module}" if module else "penstock"
    return full if path.name == "__init__.py" else full.rpartition(".")[0]


def within(module: str, names: tuple[str, ...]) -> bool:
    return forbidden(module, names)


def test_the_reader_of_imports_sees_all_kinds() -> None:
    source = "import mlx.core as mx\ndef f():\n    from .. import engine\n    from penstock import cli\n"
    assert imports(source, "penstock.api") >= {"mlx.core", "penstock.engine", "penstock.cli"}


def test_only_the_engine_imports_mlx() -> None:
    assert not offences(lambda module: not within(module, COMPUTES), MLX)


def test_only_the_engine_imports_the_engine() -> None:
    assert not offences(lambda module: not within(module, COMPUTES), (ENGINE,))


def test_the_engine_imports_nothing_of_the_front() -> None:
    front = tuple(f"penstock.{name}" for name in ("api", "text", "supervisor", "front", "models"))
    assert not offences(lambda module: within(module, COMPUTES), front)


def test_what_decides_imports_neither_mlx_nor_asyncio() -> None:
    pure = tuple(name.removesuffix(".*") for name in WITHOUT_MLX_OR_ASYNCIO)
    assert not offences(lambda module: within(module, pure), (*MLX, "asyncio"))


def test_nothing_imports_the_command_line() -> None:
    assert not offences(lambda module: not within(module, ("cli",)), ("penstock.cli",))


def test_nothing_unpickles() -> None:
    assert not offences(lambda _: True, ("pickle", "marshal", "shelve", "dill", "cloudpickle"))


def test_a_process_with_all_of_the_front_has_not_loaded_mlx() -> None:
    names = [f"penstock.{module}" for module, _ in modules() if module and not within(module, COMPUTES)]
    code = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(*(name for name in sys.modules if name.partition('.')[0] in ('mlx', 'transformers', 'torch')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
