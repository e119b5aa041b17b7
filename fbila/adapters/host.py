"""Importing a host library (diffusers, timm) that fbila works with but does not require."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def host(package: str) -> Iterator[None]:
    """Wraps the imports of a host library; a failure ends in one line on what to install.

    Args:
        package: Name of the library, which is also the name of fbila's extra for it.

    Raises:
        ImportError: From whatever the import raised, chained.
    """
    try:
        importlib.import_module(package)
        yield
    # A host that is installed but broken raises its own RuntimeError from its lazy imports.
    except (ImportError, RuntimeError) as error:
        absent = isinstance(error, ModuleNotFoundError) and error.name == package
        what = "is not installed" if absent else f"could not be imported ({error})"
        raise ImportError(f"{package} {what}. Run: pip install fbila[{package}]") from error
