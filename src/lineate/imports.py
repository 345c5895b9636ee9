"""Runs something as soon as another library's module is imported, so that `import lineate` need not import that library."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as ever, and has `run` run after it."""

    def __init__(self, module: str, run: Callable[[], None]) -> None:
        self.module, self.run = module, run

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of that one module."""
        spec = importlib.machinery.PathFinder.find_spec(name, path, target) if name == self.module else None
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_run(module: ModuleType) -> None:
                execute(module)
                self.run()

            spec.loader.exec_module = execute_and_run  # type: ignore[method-assign]
        return spec


def when_imported(module: str, run: Callable[[], None]) -> None:
    """Call `run` after `module` is imported: now, if it has been."""
    if module in sys.modules:
        run()
    else:
        sys.meta_path.insert(0, _Finder(module, run))
