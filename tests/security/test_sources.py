"""What the package's own code never does: run text, unpickle, trust by default, hash in place of ids."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import penstock

ROOT = Path(penstock.__file__).parent
RUNS_TEXT = {"eval", "exec", "compile", "__import__", "system", "popen", "getoutput"}
UNPICKLES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "torch", "yaml"}


def nodes() -> Iterator[tuple[str, ast.AST]]:
    for path in sorted(ROOT.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            yield str(path.relative_to(ROOT)), node


def name_of(called: ast.expr) -> str:
    return (
        called.attr
        if isinstance(called, ast.Attribute)
        else called.id
        if isinstance(called, ast.Name)
        else ""
    )


CALLS = [(file, node) for file, node in nodes() if isinstance(node, ast.Call)]


def test_no_text_is_run_as_code() -> None:
    """Two names that do something else: of a pattern, and of MLX's arrays."""
    found = [
        (file, ast.unparse(call.func))
        for file, call in CALLS
        if name_of(call.func) in RUNS_TEXT and ast.unparse(call.func) not in ("re.compile", "mx.eval")
    ]
    assert not found


def test_nothing_is_unpickled_and_no_file_can_ask_for_it() -> None:
    """[CVE-2026-3059, CVE-2026-3060, CVE-2026-3989, CVE-2025-10164]"""
    imported = [
        (file, alias.name)
        for file, node in nodes()
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if {alias.name.partition(".")[0], (getattr(node, "module", None) or "").partition(".")[0]} & UNPICKLES
    ]
    allowed = [
        (file, word.arg)
        for file, call in CALLS
        for word in call.keywords
        if word.arg in ("allow_pickle", "Loader")
    ]
    assert not imported
    assert not allowed


def test_no_shell_reads_a_command() -> None:
    assert not [file for file, call in CALLS for word in call.keywords if word.arg == "shell"]


def test_a_models_code_runs_only_where_the_operator_said_so() -> None:
    """`trust_remote_code` is passed on as it was set, or is false [CVE-2026-5817]."""
    words = [
        (file, word) for file, call in CALLS for word in call.keywords if word.arg == "trust_remote_code"
    ]
    assert words
    assert not [
        file for file, word in words if isinstance(word.value, ast.Constant) and word.value.value is not False
    ]


def test_the_prompt_cache_knows_ids_and_no_hashes_of_them() -> None:
    hashes = {"hash", "sha256", "md5", "blake2b", "xxh64", "crc32"}
    assert not [file for file, call in CALLS if file.startswith("cache/") and name_of(call.func) in hashes]


def test_no_http_client_is_loaded_by_what_answers_requests() -> None:
    """The API has no means to fetch: what it has not got it cannot be talked into."""
    clients = {"urllib.request", "httpx", "requests", "aiohttp", "http.client", "huggingface_hub"}
    found = [
        (file, alias.name)
        for file, node in nodes()
        if file.startswith(("api/", "text/")) and isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
        if {alias.name, getattr(node, "module", None)} & clients
    ]
    assert not found
