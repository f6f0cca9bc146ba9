"""The licensed training text: the Python documentation's sources and the standard library's docstrings.

Owns which text is read, in which order, and which of it is held out. Reads three Debian packages of
one version (``PACKAGES``), unpacked into a folder, so that the text is the same on every machine.
Imports none of the code it reads: docstrings are taken from the syntax tree.
"""

import ast
import hashlib
import inspect
import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VERSION = "3.11.2-6+deb12u8"
PACKAGES = ("python3.11-doc", "libpython3.11-stdlib", "libpython3.11-minimal")
_DOCS = "usr/share/doc/python3.11/html/_sources"
_LIBRARY = "usr/lib/python3.11"
_HELD_OUT_OF = 20
_ASKED_ABOUT = [
    "argparse", "ast", "base64", "bisect", "calendar", "collections", "contextlib", "copy", "csv",
    "dataclasses", "datetime", "fnmatch", "fractions", "functools", "getpass", "glob", "gzip", "hashlib",
    "heapq", "inspect", "io", "json", "logging", "os", "os.path", "pathlib", "pickle", "platform", "pprint",
    "queue", "random", "re", "shlex", "shutil", "socket", "statistics", "string", "subprocess", "tempfile",
    "textwrap", "threading", "traceback", "types", "typing", "urllib.parse", "uuid", "warnings", "zipfile",
]  # fmt: skip
_SKIPPED = ("test/", "tests/", "idlelib/", "lib2to3/", "pydoc_data/", "__phello__")


@dataclass(frozen=True, slots=True)
class Document:
    """One file's text; ``held_out`` documents are never trained on."""

    name: str
    text: str
    held_out: bool


@dataclass(frozen=True, slots=True)
class Definition:
    """A documented object and the first sentence of its docstring."""

    name: str
    signature: str
    sentence: str


def fetch(folder: Path) -> None:
    """Download and unpack the pinned packages into ``folder`` (needs a Debian 12 apt and dpkg-deb)."""
    folder.mkdir(parents=True, exist_ok=True)
    for package in PACKAGES:
        subprocess.run(["apt-get", "download", "-q", f"{package}={VERSION}"], cwd=folder, check=True)
    for archive in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg-deb", "-x", archive.name, "."], cwd=folder, check=True)


def read(folder: Path) -> list[Document]:
    """All documents, in the order of their names: manual pages first, then modules' docstrings."""
    documents = []
    manual = folder / _DOCS
    for path in sorted(manual.rglob("*.rst.txt")):
        name = "doc/" + path.relative_to(manual).as_posix().removesuffix(".rst.txt")
        documents.append(_document(name, path.read_text(encoding="utf-8")))
    library = folder / _LIBRARY
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if name.startswith(_SKIPPED) or "/tests/" in name:
            continue
        if text := "\n\n".join(_entry(d) for d in _docstrings(path, name)):
            documents.append(_document("lib/" + name, text))
    if not documents:
        raise FileNotFoundError(f"no Python documentation under {folder}: run the 'fetch' step first")
    return documents


def definitions(folder: Path) -> list[Definition]:
    """Functions and classes of well-known training modules whose docstring opens with a short sentence."""
    found: dict[str, Definition] = {}
    library = folder / _LIBRARY
    for path in sorted(library.rglob("*.py")):
        name = path.relative_to(library).as_posix()
        if name.startswith(_SKIPPED) or "/tests/" in name or _is_held_out("lib/" + name):
            continue
        for qualified, signature, text in _docstrings(path, name):
            sentence = _first_sentence(text)
            if (
                sentence
                and signature
                and "._" not in qualified
                and qualified.rpartition(".")[0] in _ASKED_ABOUT
            ):
                found.setdefault(qualified, Definition(qualified, signature, sentence))
    return list(found.values())


def digest(documents: list[Document]) -> str:
    """SHA-256 over names, texts and split: two equal digests are the same corpus."""
    total = hashlib.sha256()
    for d in documents:
        total.update(f"{d.name}\0{int(d.held_out)}\0{d.text}\0".encode())
    return total.hexdigest()


def _document(name: str, text: str) -> Document:
    return Document(name, text.strip() + "\n", _is_held_out(name))


def _is_held_out(name: str) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") % _HELD_OUT_OF == 0


def _docstrings(path: Path, name: str) -> Iterator[tuple[str, str, str]]:
    """(qualified name, signature or '', docstring) of the module and everything documented in it."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError):
        return
    module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
    module = {"posixpath": "os.path", "_pydatetime": "datetime"}.get(module, module)
    if text := ast.get_docstring(tree):
        yield module, "", text
    yield from _members(tree, module)


def _members(node: ast.AST, prefix: str) -> Iterator[tuple[str, str, str]]:
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        qualified = f"{prefix}.{child.name}"
        if text := ast.get_docstring(child):
            signature = "class" if isinstance(child, ast.ClassDef) else f"({ast.unparse(child.args)})"
            yield qualified, signature, inspect.cleandoc(text)
        yield from _members(child, qualified)


def _entry(documented: tuple[str, str, str]) -> str:
    name, signature, text = documented
    body = "\n".join("    " + line if line else "" for line in text.splitlines())
    head = f"class {name}" if signature == "class" else f"{name}{signature}"
    return f"{head}\n{body}\n"


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.partition("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?])\s", paragraph)[0]
    if not 20 <= len(sentence) <= 110 or not sentence[0].isupper() or not sentence.isascii():
        return ""
    if re.search(r"[<>{}|*`\\]|:$|->|\(self", sentence):
        return ""
    return sentence if sentence.endswith((".", "!", "?")) else sentence + "."
