"""Libraries that some data needs and that are not installed with the package: loaded here, on first use, by name.

A library that is missing is a message with what to install, not a traceback. Knows no data; called by the loaders.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

PACKAGES = {
    "PIL": "pillow",
    "skimage": "scikit-image",
    "sklearn": "scikit-learn",
    "soundfile": "soundfile",
}
"""Package that brings a module, by the module's first name."""


def load_extra(module: str, purpose: str) -> ModuleType:
    """Import an optional library.

    Args:
        module: dotted name of what is imported.
        purpose: what it is needed for, as the start of a sentence.

    Raises:
        ValueError: it is not installed, or cannot be imported.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = PACKAGES[module.partition(".")[0]]
        raise ValueError(
            f"{purpose} needs {package}, which cannot be imported here ({error}); {_how_to_install(package)}"
        ) from error


def fault_of(module: str) -> str | None:
    """What is missing to import an optional library and how to install it; None if it is there. Imports nothing."""
    if importlib.util.find_spec(module) is not None:
        return None
    package = PACKAGES[module]
    return f"needs {package}, which is not installed here; {_how_to_install(package)}"


def _how_to_install(package: str) -> str:
    return f"install it with: pip install {package} (or this package with its extra: pip install '.[jobs]')"
