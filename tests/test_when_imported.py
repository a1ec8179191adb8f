"""Something is done once a module is imported: not when one only asks whether it could be, and once."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from importlib.util import find_spec

import pytest

from compressible.runtime.when_imported import when_imported


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "lately_written.py").write_text("value = 3\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield "lately_written"
    sys.modules.pop("lately_written", None)


def test_asking_for_a_module_is_no_import_of_it(module):
    seen = []
    when_imported(module, lambda: seen.append(sys.modules[module].value))
    for _ in range(2):
        assert find_spec(module) is not None and seen == []
    assert import_module(module).value == 3 and seen == [3]


def test_it_is_done_once_and_leaves_no_finder(module):
    seen, before = [], list(sys.meta_path)
    when_imported(module, lambda: seen.append(1))
    import_module(module)
    del sys.modules[module]
    import_module(module)
    assert seen == [1] and sys.meta_path == before


def test_what_is_imported_already_is_followed_at_once(module):
    import_module(module)
    seen = []
    when_imported(module, lambda: seen.append(1))
    assert seen == [1]


def test_a_blocked_module_is_waited_for(module, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    seen = []
    when_imported(module, lambda: seen.append(1))
    with pytest.raises(ModuleNotFoundError):
        import_module(module)
    assert find_spec(module) is None and seen == []
    monkeypatch.delitem(sys.modules, module)
    assert import_module(module).value == 3 and seen == [1]


def test_the_library_is_imported_where_peft_is_blocked():
    code = "import sys; sys.modules['peft'] = None; import compressible as cd; print(cd.spectra.effective_rank)"
    done = subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0 and "effective_rank" in done.stdout, done.stderr


def test_a_module_that_is_not_there_is_not_found(module):
    when_imported("never_written", lambda: pytest.fail("followed"))
    assert find_spec("never_written") is None
    with pytest.raises(ModuleNotFoundError):
        import_module("never_written")
