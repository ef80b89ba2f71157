"""Makes lm_eval know the model name `intactkv`.

lm_eval 0.4.13 and 0.5.0.dev1 find no models outside their own tree, so a one-line .pth file calls `install` at every
start of Python. It only puts a finder in front of sys.meta_path, which waits for `lm_eval.models`, lets that module
load as always, and adds one lazy entry to its registry. A release that reads the entry point group `lm_eval.models` by
itself is left alone, and so is a name that is known already. INTACTKV_HOOK=off, or removing the .pth file, does without
it (docs/releases.md). This file imports nothing until lm_eval is imported.
"""

import os
import sys

NAME = "intactkv"
TARGET = "intactkv_eval.harness.lm:IntactKVLM"
_WAITED_FOR = "lm_eval.models"


class _Finder:
    """Waits for one module, then steps aside."""

    @staticmethod
    def find_spec(name, path=None, target=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN205
        """The module's own spec with a loader that registers afterwards; None for every other name."""
        if name != _WAITED_FOR:
            return None
        uninstall()
        from importlib.util import find_spec  # noqa: PLC0415  start-up must import nothing

        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
                run(module)
                if not discovers(spec.origin):
                    register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Wait for lm_eval, once; not at all where INTACTKV_HOOK is off."""
    if os.environ.get("INTACTKV_HOOK", "").lower() in {"off", "0", "false"}:
        return
    if _Finder not in sys.meta_path and _WAITED_FOR not in sys.modules:
        sys.meta_path.insert(0, _Finder)  # type: ignore[arg-type]


def uninstall() -> None:
    """Stop waiting."""
    if _Finder in sys.meta_path:
        sys.meta_path.remove(_Finder)  # type: ignore[arg-type]


def discovers(models: str | None) -> bool:
    """Whether lm_eval, whose models/__init__.py is the file `models`, asks for entry points and finds us by itself."""
    beside = os.path.dirname(os.path.dirname(models or ""))
    for file in (models or "", os.path.join(beside, "api", "registry.py")):
        try:
            with open(file, encoding="utf-8") as opened:
                if "entry_points(" in opened.read():
                    return True
        except OSError:
            continue
    return False


def register() -> None:
    """Add the model to lm_eval's registry unless something of that name is there."""
    from lm_eval.api.registry import model_registry  # noqa: PLC0415  start-up must import nothing

    if NAME not in model_registry:
        model_registry.register(NAME, target=TARGET)
