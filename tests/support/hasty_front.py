"""`penstock serve`, but silence is filled in quickly and clients that vanished are found out soon.

For tests that cannot wait for minutes: the real command line, front and engine; two numbers are others.
"""

from __future__ import annotations

import sys
from dataclasses import replace

COMMAND = (sys.executable, "-m", "tests.support.hasty_front")
KEEPALIVE = 0.2
VANISHED = 1


def main() -> int:
    from penstock import cli, front
    from penstock.api import service

    object.__setattr__(service.Service.__dataclass_fields__["timing"].default, "keepalive", KEEPALIVE)
    bounds = front.Bounds
    front.Bounds = lambda: replace(bounds(), vanished=VANISHED)  # type: ignore[assignment, misc]
    return int(cli.main(sys.argv[1:]) or 0)


if __name__ == "__main__":
    sys.exit(main())
