"""Traffic as agents make it: profiles (pure), a client that plays them against any server, and a report."""
