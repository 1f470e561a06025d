"""Importing torch, transformers and diffusers without the garbage collector, which took a third of the time."""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def garbage_collection_paused() -> Iterator[None]:
    """Pause the garbage collector for imports: they make half a million objects that stay as long as the process.

    Where torch was not imported before, the process holds no models yet, and all that is in memory afterwards is
    exempt from later collections (`gc.freeze`), also from those when the interpreter ends. Otherwise nothing is
    exempt: a model that somebody deletes must be collected as before.
    """
    collecting = gc.isenabled()
    no_models_yet = "torch" not in sys.modules
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            if no_models_yet:
                gc.freeze()
            gc.enable()
