"""What cached things are worth: tokens saved × likelihood ÷ bytes, as functions of nodes. Changes nothing.

    tail of a leaf   its last segment; with states, all that the leaf's last checkpoint needs and others don't
    adopted cover    a row's buffers: all that only they hold
    checkpoint       the way from the one before it, if a request comes back to just here

Interiors need no score: they can't go before what hangs below them. What may not be dropped scores None.
"""

from __future__ import annotations

from penstock.cache.nodes import Checkpoint, Cover, Node, up

REWIND = 1 / 8
"""How likely a request comes back to a checkpoint that deeper ones have overtaken, against going on."""


def likelihood(hits: int, age: float, branches: int = 0) -> float:
    """How likely something is wanted soon, up to a common factor.

    `age`: requests served since it was last wanted. The times between the turns of a session have a heavy
    tail: the longer it has been silent, the longer it will be. Hence 1 ÷ age, which sets a session in use
    above an abandoned one at every scale and needs no constant. A session that has had n turns goes on with
    (n + 1) ÷ (n + 2) (Laplace's rule), so the many that end after their first come below. Every way in which
    a prefix was ever continued is a source of requests of its own: their rates add.
    """
    return (1 + hits) / (2 + hits) * max(1, branches) / (1 + age)


def worth(node: Node, what: Checkpoint | Cover | None, stateful: bool, now: float) -> float | None:
    """Worth per byte of a node's checkpoint, of an adopted cover that ends in it, or (None) of its tail."""
    if isinstance(what, Checkpoint):
        return _checkpoint(node, what, now)
    found = _tail(node, stateful) if what is None else _cover(what, stateful)
    return found and found * likelihood(node.hits, now - node.used, node.branches)


def is_read(cover: Cover) -> bool:
    """Whether a pin may be reading from a cover's buffers."""
    return any(node.pinned > node.packed and cover.length > node.packed for node in cover.path())


def previous(node: Node, position: int) -> int:
    """Position of the last checkpoint before `position` on the path that ends in `node`; 0 if none."""
    found = (above.deepest(position - 1) for above in up(node))
    return next((kept.position for kept in found if kept is not None), 0)


def _tail(node: Node, stateful: bool) -> float | None:
    segment = node.segments[-1] if node.segments else None
    if segment is None or segment.start < node.pinned:
        return None
    saved, size = node.end - node.available(without=segment), segment.size
    if stateful and saved:
        last = node.deepest(node.end)
        if last is None or segment.start >= last.position:
            return 0.0
        base = previous(node, last.position)
        saved, size = last.position - base, last.size + sum(s.size for s in node.segments if s.end > base)
    return saved / max(1, size)


def _cover(cover: Cover, stateful: bool) -> float | None:
    base, beneath = cover.length, None
    for node in cover.path():
        rest = node.available(without=cover)
        if rest < node.end:
            if any(child is not beneath for child in node.children.values()):
                return None
            base = rest
        beneath = node
    saved = cover.length - base
    if stateful and saved:
        saved = previous(cover.node, cover.length + 1) - previous(cover.node, base + 1)
    return None if is_read(cover) else saved / max(1, cover.size)


def _checkpoint(node: Node, kept: Checkpoint, now: float) -> float | None:
    if any(pin.checkpoint is kept for pin in node.pins):
        return None
    chance = likelihood(kept.hits, now - kept.used)
    if node.children or node.deepest(node.end) is not kept:
        chance *= max(0, kept.hits - 1) + kept.anchor + REWIND
    return (kept.position - previous(node, kept.position)) * chance / max(1, kept.size)
