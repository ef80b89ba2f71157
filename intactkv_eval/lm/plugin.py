"""Makes lm_eval know the model name `intactkv`.

lm_eval 0.4.13 and 0.5.0.dev1 find no models outside their own tree, so a one-line .pth file calls `install` at every
start of Python. It only puts a finder in front of sys.meta_path, which waits for `lm_eval.models`, lets that module
load as always, and adds one lazy entry to its registry. A release that reads the entry point group `lm_eval.models` by
itself is left alone, and so is a name that is known already. INTACTKV_NO_HOOK=1, or removing the .pth file, does
without it (docs/releases.md). This file imports nothing until lm_eval is imported.

All of this happens inside another package's import, so nothing here raises: where anything is unlike what is expected,
it steps aside. `missing` then says why the name is not known, to whoever asks for it.
"""

import os
import sys

NAME = "intactkv"
TARGET = "intactkv_eval.lm.intactkv_lm:IntactKVLM"
OFF = "INTACTKV_NO_HOOK"
_WAITED_FOR = "lm_eval.models"


class _Finder:
    """Waits for one module, then steps aside. waits: it is not yet at work on it."""

    waits = True

    @classmethod
    def find_spec(cls, name, path=None, target=None):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN206
        """The module's own spec with a loader that registers afterwards; None for every other name.

        None too where anything fails: Python then asks the next finder, and the import goes on as without this one.
        """
        if name != _WAITED_FOR or not cls.waits:
            return None
        cls.waits = False  # it stays where it is: Python goes along sys.meta_path, and would miss the next finder
        try:
            return _watched(name)  # type: ignore[no-untyped-call]
        except Exception:  # noqa: BLE001  another package is being imported, and it must not fail by us
            return None


def _watched(name):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    from importlib.util import find_spec  # noqa: PLC0415  start-up must import nothing

    spec = find_spec(name)
    if spec is None or spec.loader is None or isinstance(spec.loader, type):
        return spec  # a loader that is a class is shared by all that it loads
    run = spec.loader.exec_module

    def exec_module(module):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
        run(module)
        uninstall()
        register(spec.origin)

    spec.loader.exec_module = exec_module  # type: ignore[method-assign]
    return spec


def install() -> None:
    """Wait for lm_eval, once; not at all where INTACTKV_NO_HOOK is set to anything but 0. Never raises."""
    try:
        if os.environ.get(OFF, "0") not in {"", "0"}:
            return
        if _WAITED_FOR not in sys.modules and not any(one is _Finder for one in sys.meta_path):
            _Finder.waits = True
            sys.meta_path.insert(0, _Finder)
    except Exception:  # noqa: BLE001  every start of Python passes here
        return


def uninstall() -> None:
    """Stop waiting. Never raises."""
    for place, one in enumerate(sys.meta_path):
        if one is _Finder:
            del sys.meta_path[place]
            return


def discovers(models: str | None) -> bool:
    """Whether lm_eval, whose models/__init__.py is the file `models`, asks for entry points and finds us by itself."""
    beside = os.path.dirname(os.path.dirname(models or ""))
    for file in (models or "", os.path.join(beside, "api", "registry.py")):
        try:
            with open(file, "rb") as opened:
                if b"entry_points(" in opened.read():
                    return True
        except OSError:
            continue
    return False


def register(models: str | None = None) -> None:
    """Add the model to lm_eval's registry unless something of that name is there. Never raises: see `missing`.

    models: lm_eval's models/__init__.py, which may find us by itself; None where the name is wanted now.
    """
    try:
        if models is not None and discovers(models):
            return
        from lm_eval.api.registry import model_registry  # noqa: PLC0415  start-up must import nothing

        if NAME not in model_registry:
            model_registry.register(NAME, target=TARGET)
    except Exception:  # noqa: BLE001  another package is being imported, and it must not fail by us
        return


def missing() -> str | None:
    """Why lm_eval does not know the model `intactkv`, for the one who asks for it; None where it does."""
    try:
        from lm_eval.api.registry import get_model  # noqa: PLC0415

        get_model(NAME)
    except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
        from importlib.metadata import version  # noqa: PLC0415

        return (
            f"lm_eval {version('lm_eval')} does not take the model {NAME} into its registry as earlier releases did "
            f"({type(error).__name__}: {error}); install a release that docs/releases.md lists, such as lm_eval==0.4.13"
        )
    return None
