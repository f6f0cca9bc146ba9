"""What must hold for every file of the repository."""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LONGEST_FILE = 450
LARGEST_PROMISE = 3_200
"""Lines of code, documentation apart, that who checks the memory promise reads in an afternoon: `PROMISE`."""
PROMISE = (
    "memory/*.py",
    "cache/*.py",
    *(f"engine/{name}.py" for name in ("accounts", "scheduler", "loop", "step", "sequence")),
    *(f"engine/{name}.py" for name in ("prompt_cache", "rows", "batch", "calibrate", "pace")),
)
LARGEST_PACKAGE = 13_300
"""The same of the whole package, with its clients' protocols, command line tools and benchmarks."""

# Put together here, so that this file does not hold what it looks for.
PATHS = re.compile("|".join(f"(?<![\\w.-])/{name}/" for name in ("work", "root", "home", "Users")))
REGISTRIES = ("py" + "pi.", "python" + "hosted", "npm" + "js.", "deb." + "debian", "registry." + "yarn")


def tracked() -> list[Path]:
    """The files under version control, or in a tree without it all that could be."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode == 0:
        return [path for name in listed.stdout.split("\0") if name and (path := ROOT / name).is_file()]
    hidden = {".venv", ".git", "__pycache__"}
    return [path for path in ROOT.rglob("*") if path.is_file() and not hidden & set(path.parts)]


def texts() -> list[tuple[str, str]]:
    found = []
    for path in tracked():
        try:
            found.append((str(path.relative_to(ROOT)), path.read_text(encoding="utf-8")))
        except UnicodeDecodeError:
            continue
    return found


TEXTS = texts()


def test_no_file_names_a_place_on_somebodys_machine() -> None:
    assert not [(name, match[0]) for name, text in TEXTS if (match := PATHS.search(text))]


def test_no_file_names_the_host_of_a_registry() -> None:
    assert not [(name, host) for name, text in TEXTS for host in REGISTRIES if host in text]


def test_source_files_are_short() -> None:
    lengths = {name: text.count("\n") for name, text in TEXTS if name.endswith(".py")}
    assert lengths
    assert not {name: lines for name, lines in lengths.items() if lines > LONGEST_FILE}


def code_lines(text: str) -> int:
    """Lines that hold code: neither blank, nor comment, nor docstring."""
    words: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            words.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    layout = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    held: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*layout, tokenize.ENDMARKER):
            held.update(range(token.start[0], token.end[0] + 1))
    return len(held - words)


def test_the_package_is_small() -> None:
    package = ROOT / "src" / "penstock"
    lines = {path: code_lines(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")}
    promise = {path for pattern in PROMISE for path in package.glob(pattern)}
    assert 0 < sum(lines[path] for path in promise) < LARGEST_PROMISE
    assert 0 < sum(lines.values()) < LARGEST_PACKAGE


def test_nothing_is_left_for_later() -> None:
    marks = re.compile(r"\b(TO" r"DO|FIX" r"ME|X" r"XX)\b")
    code = [(name, text) for name, text in TEXTS if name.endswith((".py", ".md", "Makefile"))]
    assert not [name for name, text in code if marks.search(text)]


@pytest.mark.parametrize("lock", sorted(path.name for path in ROOT.glob("requirements*.lock")))
def test_locks_have_hashes_and_no_addresses(lock: str) -> None:
    text = (ROOT / lock).read_text(encoding="utf-8")
    assert "://" not in text
    assert not re.search(r"^\s*-", text.replace("--hash", ""), re.MULTILINE)
    entries = re.split(r"(?m)^(?=[a-z0-9])", text)
    assert all("==" in entry and "--hash=sha256:" in entry for entry in entries if entry.strip())


def test_locks_serve_macs_and_linux_and_leave_the_back_end_open() -> None:
    base = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert re.search(r"^mlx-metal==.* sys_platform == 'darwin'", base, re.MULTILINE)
    assert "\nmlx-cpu==" not in base
    assert "\nmlx-cuda" not in base
    assert (ROOT / "requirements-cpu.lock").read_text(encoding="utf-8").startswith("mlx-cpu==")
    assert (ROOT / "requirements-cuda13.lock").read_text(encoding="utf-8").startswith("mlx-cuda-13==")
    versions = re.findall(r"^mlx(?:-metal)?==([\d.]+)", base, re.MULTILINE)
    assert len(set(versions)) == 1


PAGES = [name for name, _ in TEXTS if name.endswith(".md")]


@pytest.mark.parametrize("page", PAGES)
def test_links_of_the_documentation_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), target
    hosts = set(re.findall(r"https?://(\[[^\]]*\]|[^/:\s`'\")]+)", text))
    assert hosts <= {"127.0.0.1", "localhost"}


def test_nobody_is_told_to_install_penstock_from_an_index() -> None:
    install = re.compile(r"(pip3?|pipx|uv tool|uv pip) install (-\S+ )*['\"]?penstock")
    assert not [name for name, text in TEXTS if install.search(text)]
