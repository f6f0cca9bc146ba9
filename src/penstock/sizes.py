"""Amounts of bytes as people write and read them: one parser, one printer, used everywhere.

Written: `8G`, `8GB`, `512MB` are decimal, as in mlx_lm.server; `8GiB` is binary; a plain number is bytes;
`75%` is a share of a whole that the caller names. Printed: decimal gigabytes with one decimal,
or megabytes where those would say nothing.
"""

from __future__ import annotations

import os
import re
from decimal import Decimal

_SIZE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmgt]?)(i?)(b?)\s*", re.IGNORECASE | re.ASCII)
_SHARE = re.compile(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%\s*", re.ASCII)
_POWERS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str, *, whole: int | None = None) -> int:
    """Bytes in `text`. A percentage is of `whole` bytes. Raises ValueError, with a sentence, for the rest."""
    if share := _SHARE.fullmatch(text):
        percent = Decimal(share[1])
        if whole is None or percent > 100:
            raise ValueError(f"{text!r} is not a share of anything here")
        return int(whole * percent / 100)
    match = _SIZE.fullmatch(text)
    if match is None or (match[3] and not match[2]):
        raise ValueError(f"{text!r} is not a size such as 8G, 512MB, 8GiB or 75%")
    base = 1024 if match[3] else 1000
    return int(Decimal(match[1]) * base ** _POWERS[match[2].lower()])


def gigabytes(count: int) -> str:
    """`count` bytes as log lines, banners and errors print them: '1.5 GB', and '17.7 MB' below 100 MB."""
    return f"{count / 1e6:.1f} MB" if 0 < count < 1e8 else f"{count / 1e9:,.1f} GB"


def physical_memory() -> int:
    """Bytes of RAM of this machine; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
