"""`python -m bench`: the benchmark of the servers."""

import sys

from bench.serve import main

sys.exit(main())
