"""The page at `/` and what it loads: files beside this module, read once and served from memory.

What is not listed here is not served, so no path of a request ever reaches the file system. The files hold no
data, hence need no key; what they show comes from `/v1/status`, which does.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).parent
MEDIA = {
    ".css": b"text/css; charset=utf-8",
    ".html": b"text/html; charset=utf-8",
    ".js": b"text/javascript; charset=utf-8",
    ".svg": b"image/svg+xml",
}


class File(NamedTuple):
    """A file as it is answered."""

    body: bytes
    media: bytes
    etag: bytes


def _files() -> dict[str, File]:
    found = {}
    for entry in FOLDER.iterdir():
        if (media := MEDIA.get(entry.suffix)) is not None:
            body = entry.read_bytes()
            path = "/" if entry.name == "index.html" else f"/dashboard/{entry.name}"
            found[path] = File(body, media, b'"%s"' % hashlib.sha256(body).hexdigest()[:16].encode())
    return found


FILES = _files()
"""By the path of the URL."""
