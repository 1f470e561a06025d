import gc
import sys

import pytest

from dar_hf.utils.imports import garbage_collection_paused


@pytest.fixture
def frozen(monkeypatch):
    """How often `gc.freeze` was called: not truly, since it would keep this process's garbage."""
    calls = []
    monkeypatch.setattr(gc, "freeze", lambda: calls.append(gc.isenabled()))
    yield calls
    gc.enable()


def test_the_collector_pauses_and_goes_on(frozen):
    with garbage_collection_paused():
        assert not gc.isenabled()
    assert gc.isenabled() and not frozen  # torch is here: there may be models that somebody deletes later


def test_it_goes_on_after_an_import_that_fails(frozen):
    with pytest.raises(ImportError), garbage_collection_paused():
        raise ImportError
    assert gc.isenabled()


def test_a_collector_that_was_off_stays_off(frozen, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    gc.disable()
    with garbage_collection_paused():
        pass
    assert not gc.isenabled() and not frozen


def test_before_torch_all_that_is_imported_is_exempt(frozen, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch")
    with garbage_collection_paused():
        pass
    assert gc.isenabled() and frozen == [False]
