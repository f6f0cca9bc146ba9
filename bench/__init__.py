"""Side-by-side measurements against mlx_lm.server and the raw model loop. Nothing here is installed."""
