"""`python -m penstock.engine --socket-fd N --page-fd N`: started by the supervisor, never by hand."""

from penstock.engine.main import main

raise SystemExit(main())
