"""The sandbox that chat templates run in: Jinja as `transformers` sets it up, and no way out of it.

A template is a program of the model's author, and a client's messages decide how often its loops turn. It
sees plain data and the functions here; attributes that lead to Python's insides are refused. Within `limited`
every turn of a loop and every call looks at the thread's clock; no text may pass MAX_RENDERED characters.
"""

from __future__ import annotations

import functools
import json
import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.utils
import jinja2.visitor
from jinja2.exceptions import SecurityError
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_RENDERED = 64 << 20
"""The most characters of a prompt; a body is at most half of it."""
SECONDS = 10.0
"""Processor time that a prompt may take to render."""


_SIZED = (str, list, tuple)


def _bounded(text: Any) -> Any:
    if isinstance(text, _SIZED) and len(text) > MAX_RENDERED:
        raise SecurityError("a text is too large")
    return text


def _bounding(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        return _bounded(function(*args, **kwargs))

    return bounded


class _Watched(jinja2.visitor.NodeTransformer):
    """Puts a call into every loop, so that each turn is seen, and a filter, whose results are, for `~`."""

    def visit_For(self, loop: jinja2.nodes.For) -> jinja2.nodes.Node:  # noqa: N802 - jinja2 calls it so
        self.generic_visit(loop)
        turn = jinja2.nodes.Call(jinja2.nodes.EnvironmentAttribute("turn"), [], [], None, None)
        loop.body.insert(0, jinja2.nodes.ExprStmt(turn).set_lineno(loop.lineno))
        return loop

    def visit_Concat(self, concat: jinja2.nodes.Concat) -> jinja2.nodes.Node:  # noqa: N802
        self.generic_visit(concat)
        parts = jinja2.nodes.List(concat.nodes)
        return jinja2.nodes.Filter(parts, "join", [], [], None, None).set_lineno(concat.lineno)


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox, with time and sizes bounded: `'a' * 10 ** 10` would be built before it is counted."""

    intercepted_binops = frozenset(["*", "**", "+", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self._clock = threading.local()
        self.filters = {name: _bounding(function) for name, function in self.filters.items()}

    @contextmanager
    def limited(self) -> Iterator[None]:
        """Inside, templates end with a SecurityError when this thread has worked for SECONDS."""
        self._clock.until = time.thread_time() + SECONDS
        try:
            yield
        finally:
            self._clock.until = math.inf

    def _parse(self, *source: Any) -> jinja2.nodes.Template:
        template: jinja2.nodes.Template = _Watched().visit(super()._parse(*source))
        return template

    def turn(self) -> None:
        """A loop turns."""

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """The text of a macro, or of a block that is set."""
        return str(_bounded("".join(parts)))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        if time.thread_time() > getattr(self._clock, "until", math.inf):
            raise SecurityError(f"it takes longer than {SECONDS:g} s")
        return _bounded(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "**" and abs(right) > 64:
            raise SecurityError("the exponent is too large")
        if operator == "*":
            sizes = [len(side) if isinstance(side, _SIZED) else side for side in (left, right)]
            if sizes != [left, right] and sizes[0] * sizes[1] > MAX_RENDERED:
                raise SecurityError("the product is too large")
        return _bounded(super().call_binop(context, operator, left, right))


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's text for training; here just its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` without names that begin with an underscore."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # a template may pass `self=`
        jinja2.utils.Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _refuse_hidden(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_hidden(name)
        super().__setitem__(name, value)


def _refuse_hidden(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace can't hold {name!r}")


class _Dict:
    """`dict(...)` without the type behind it."""

    def __call__(self, *args: Any, **kwargs: Any) -> dict[Any, Any]:
        return dict(*args, **kwargs)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment() -> Sandbox:
    """The environment that chat templates are written for."""
    sandbox = Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    sandbox.filters["tojson"] = _tojson
    sandbox.globals |= {
        "raise_exception": _raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return sandbox
