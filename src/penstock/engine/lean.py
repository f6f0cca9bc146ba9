"""mlx-lm without transformers: its model code starts in under a second instead of three to five.

Owns the two stand-ins that keep `import mlx_lm.models...` and `import mlx_lm.utils` light: a bare parent
package (mlx-lm's own `__init__` imports transformers through its generate module) and, only while
`mlx_lm.utils` is imported, an empty `mlx_lm.tokenizer_utils`.
Refuses to touch an mlx-lm that is already imported. Invariant: where a stand-in doesn't fit, the plain
import is used, which is slower and otherwise the same.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType

_PARENT = "mlx_lm"
_TOKENIZERS = "mlx_lm.tokenizer_utils"


def bare_parent() -> None:
    """Put a bare `mlx_lm` package into `sys.modules`, whose submodules import as usual. Imports nothing."""
    if _PARENT in sys.modules:
        return
    spec = importlib.util.find_spec(_PARENT)
    if spec is None or spec.submodule_search_locations is None:
        return
    parent = ModuleType(_PARENT)
    parent.__spec__ = spec
    parent.__path__ = list(spec.submodule_search_locations)
    sys.modules[_PARENT] = parent


def utils() -> ModuleType:
    """The module `mlx_lm.utils`, imported without transformers where that works.

    Raises ImportError if mlx-lm can't be imported at all.
    """
    if "mlx_lm.utils" in sys.modules or _TOKENIZERS in sys.modules:
        return importlib.import_module("mlx_lm.utils")
    bare_parent()
    stand_in = ModuleType(_TOKENIZERS)
    stand_in.TokenizerWrapper = type("TokenizerWrapper", (), {})  # type: ignore[attr-defined]
    stand_in.load = None  # type: ignore[attr-defined]
    sys.modules[_TOKENIZERS] = stand_in
    try:
        return importlib.import_module("mlx_lm.utils")
    except ImportError:
        pass
    finally:
        del sys.modules[_TOKENIZERS]
    return importlib.import_module("mlx_lm.utils")
