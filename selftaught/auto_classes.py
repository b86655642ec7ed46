"""Registration of this package's model with the auto classes of transformers.

`import selftaught` imports neither transformers nor torch. The configuration of Quiet-STaR models
is registered when transformers' `AutoConfig` is imported: at once if that has happened, else by an
import hook. `AutoConfig`, `AutoModelForCausalLM` and `pipeline` then open such models.
"""

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

AUTO_CONFIG = "transformers.models.auto.configuration_auto"
"""The module that defines `AutoConfig`."""
REGISTERS = "selftaught.quiet.pretrained_config"
"""The module that registers the configuration when it is imported."""


class _RegisterAfter(Loader):
    """Loads a module with another loader, and then registers the configuration."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import_module(REGISTERS)


class _Finder(MetaPathFinder):
    """Finds the module that defines `AutoConfig`, and no other."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != AUTO_CONFIG:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _RegisterAfter(spec.loader)
        return spec


def register() -> None:
    """Register the configuration of Quiet-STaR models with transformers, now or when it is
    imported."""
    if AUTO_CONFIG in sys.modules:
        import_module(REGISTERS)
    elif not any(isinstance(one, _Finder) for one in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
