"""The small bundled model, so that everything can be tried with no hub and no download.

Owns nothing but the model's place; how it was made is in tools/demo_model/README.md.
"""

from pathlib import Path

BANNER = "demo model: 4M parameters, for trying the server, not for answers"
"""What the server says at start when it serves this model."""


def model_path() -> Path:
    """The bundled model's directory, in the layout that mlx-lm loads."""
    return Path(__file__).resolve().parent / "model"
