# SPDX-License-Identifier: Apache-2.0
"""Text to pixels, fast: kernels, models and pipelines for text-to-image.

The subpackages load when first used::

    import t2p_fast

    indices = t2p_fast.ops.vq_nearest(x, codebook)
"""

import importlib
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_SUBMODULES = (
    "checkpoints",
    "data",
    "interop",
    "memory",
    "metrics",
    "models",
    "nn",
    "ops",
    "pipelines",
    "reference",
    "schedulers",
    "training",
)

__all__ = ["__version__", *_SUBMODULES]


def __getattr__(name: str) -> ModuleType:
    if name in _SUBMODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_SUBMODULES})


def build_info() -> dict[str, Any]:
    """What the compiled module was built with and what it chose on this machine."""
    from t2p_fast._library import _C

    return _C.build_info()
