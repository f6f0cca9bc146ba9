"""The engine process: the only one that computes with MLX.

Importing any module of this package first puts a bare `mlx_lm` parent in place (see `lean`), because
mlx-lm's own imports transformers, seconds of start-up that the engine has no use for.
"""

from penstock.engine.lean import bare_parent

bare_parent()
