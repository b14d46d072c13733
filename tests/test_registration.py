"""Registration with pyiqa: any order, any number of times, and what happens when it cannot be done.

A toy pyiqa stands in for the real one, which takes seconds to import; `test_packaging.py` has the
real one. `-S` keeps Python's start-up files out, so that here `import pyiqa_qscorer` does the work.
"""

import inspect
import zipfile
from pathlib import Path

import pytest
from environments import REPOSITORY, answer, run_python, write_toy_pyiqa

OURS = ["qscorer", "qscorer-mini", "qscorer_4bit", "qscorer_8bit"]
ARCH = "pyiqa_qscorer.metric:QScorer"

both_ways_in = pytest.mark.parametrize("flags", [("-S",), ()], ids=["without start-up files", "as installed"])

REPORT = """
import dataclasses, json, sys
def report(**more):
    configs = sys.modules["pyiqa.default_model_configs"].DEFAULT_CONFIGS
    registry = sys.modules["pyiqa.utils.registry"].ARCH_REGISTRY
    finders = [f for f in sys.meta_path if getattr(f, "is_pyiqa_qscorer", False)]
    state = {}
    if "pyiqa_qscorer" in sys.modules:
        state = dataclasses.asdict(sys.modules["pyiqa_qscorer"].registration_state())
    print(json.dumps({"ours": sorted(n for n in configs if n != "toy"), "archs": registry._lazy_map,
                      "finders": len(finders), "state": state} | more))
"""


def run(code: str, toy: Path, *flags: str, **environment: str):
    return run_python(REPORT + inspect.cleandoc(code), *flags, path=(REPOSITORY, toy), **environment)


@pytest.fixture
def toy(tmp_path: Path) -> Path:
    return write_toy_pyiqa(tmp_path / "toy")


@both_ways_in
@pytest.mark.parametrize(
    "order",
    [
        "import pyiqa, pyiqa_qscorer",
        "import pyiqa_qscorer, pyiqa",
        "import pyiqa.utils.registry, pyiqa_qscorer.registry",
        "import pyiqa_qscorer, pyiqa; pyiqa_qscorer.register(); pyiqa_qscorer.register()",
        "import pyiqa_qscorer; pyiqa_qscorer.register(); import pyiqa; pyiqa_qscorer.register()",
    ],
)
def test_any_order_any_number_of_times(order: str, flags: tuple[str, ...], toy: Path) -> None:
    found = answer(run(f"{order}\nreport()", toy, *flags))
    assert (found["ours"], found["archs"], found["finders"]) == (OURS, {"QScorer": ARCH}, 1)
    state = found["state"]
    assert (state["hook_installed"], state["problem"], state["arch"]) == (True, None, ARCH)
    assert sorted(state["metrics"]) == OURS
    if flags:
        assert (state["started_by"], state["startup_file_ran"]) == ("import", False)


@both_ways_in
@pytest.mark.parametrize("removed", [("pyiqa",), ("pyiqa", "pyiqa_qscorer")], ids=["pyiqa", "both"])
def test_pyiqa_removed_and_imported_again(removed: tuple[str, ...], flags: tuple[str, ...], toy: Path) -> None:
    code = f"""
    {"import pyiqa_qscorer" if flags else ""}
    import pyiqa
    for _ in range(2):
        for name in [n for n in sys.modules if n.partition(".")[0] in {removed}]:
            del sys.modules[name]
        import pyiqa
    report()
    """
    found = answer(run(code, toy, *flags))
    assert (found["ours"], found["archs"], found["finders"]) == (OURS, {"QScorer": ARCH}, 1)
    assert found["state"]["problem"] is None


def test_behind_a_finder_that_answers_for_pyiqa_doctor_says_so(toy: Path) -> None:
    code = """
    import importlib.machinery, pyiqa_qscorer
    from pyiqa_qscorer.cli.doctor import registration_problems
    class Foreign:
        def find_spec(self, name, path=None, target=None):
            return importlib.machinery.PathFinder.find_spec(name, path) if name.startswith("pyiqa.") else None
    sys.meta_path.insert(0, Foreign())
    import pyiqa
    problems = registration_problems(pyiqa_qscorer.registration_state())
    before = pyiqa.list_models()
    pyiqa_qscorer.register()
    report(before=before, problems=problems, after=registration_problems(pyiqa_qscorer.registration_state()))
    """
    found = answer(run(code, toy))
    assert found["before"] == ["toy"] and found["after"] == []
    assert "pyiqa is imported but not extended" in found["problems"][0] and "register()" in found["problems"][0]
    assert found["ours"] == OURS


def test_state_before_pyiqa_is_imported_and_what_a_user_changed_in_our_entry_stays(toy: Path) -> None:
    code = """
    import pyiqa_qscorer
    before = pyiqa_qscorer.registration_state()
    import pyiqa.default_model_configs as table
    options = table.DEFAULT_CONFIGS["qscorer"]["metric_opts"]
    options["dtype"] = "float32"
    pyiqa_qscorer.register()
    report(before=dataclasses.asdict(before), dtype=options["dtype"],
           registered=[before.registered, pyiqa_qscorer.registration_state().registered])
    """
    found = answer(run(code, toy, "-S"))
    no, nothing = dict.fromkeys(("switched_off", "startup_file_ran", "pyiqa_imported"), False), {"arch": None}
    before = no | nothing | {"hook_installed": True, "metrics": [], "started_by": "import", "problem": None}
    assert found["before"] == before and (found["registered"], found["dtype"]) == ([False, True], "float32")


@both_ways_in
def test_off_switch_and_register_in_spite_of_it(flags: tuple[str, ...], toy: Path) -> None:
    code = """
    import pyiqa, pyiqa_qscorer
    from pyiqa_qscorer.host.registration import register_from_entry_point
    register_from_entry_point()
    off = dataclasses.asdict(pyiqa_qscorer.registration_state())
    listed = pyiqa.list_models()
    pyiqa_qscorer.register()
    report(off=off, listed=listed)
    """
    found = answer(run(code, toy, *flags, PYIQA_QSCORER_AUTOLOAD="0"))
    off = found["off"]
    assert found["listed"] == ["toy"]
    assert (off["switched_off"], off["hook_installed"], off["started_by"]) == (True, False, None)
    assert (found["ours"], found["archs"]) == (OURS, {"QScorer": ARCH})
    assert found["state"]["started_by"] == "register()"


def test_the_import_system_sees_nothing_unusual(toy: Path) -> None:
    """The wrapped loader acts as the real one, no module shows it, and reload works."""
    code = """
    import copy, importlib, importlib.util, inspect
    import pyiqa_qscorer
    from pyiqa_qscorer.host.registration import FINDER
    folder = [p for p in sys.path if p.endswith("toy")][0] + "/pyiqa"
    NAME = "pyiqa.default_model_configs"
    early = FINDER.find_spec(NAME, [folder])
    copy.copy(early.loader)
    seen = {
        "loader": ["DEFAULT_CONFIGS" in early.loader.get_source(NAME), early.loader.is_package(NAME),
                   early.loader.get_code(NAME) is not None, early.loader.get_resource_reader(NAME) is not None],
        "no such": hasattr(early.loader, "no_such_thing"),
        "others": FINDER.find_spec("pyiqa.api_helpers", [folder]),
        "still waiting": FINDER in sys.meta_path,
    }
    importlib.util.find_spec(NAME)  # imports pyiqa, as it does for any submodule
    spec = importlib.util.find_spec(NAME)
    table = sys.modules[NAME]
    seen["loaders"] = [type(x).__name__ for x in (spec.loader, table.__loader__)]
    seen["loaders"].append(type(table.__spec__.loader).__name__)
    seen["getsource"] = "DEFAULT_CONFIGS" in inspect.getsource(table)
    importlib.reload(table)
    seen["after reload"] = sorted(table.DEFAULT_CONFIGS)
    seen["pyiqa after reload"] = sys.modules["pyiqa"].list_models()
    report(seen=seen)
    """
    found = answer(run(code, toy, "-S"))
    assert found["seen"] == {
        **{"loader": [True, False, True, True], "no such": False, "others": None, "still waiting": True},
        **{"loaders": ["SourceFileLoader"] * 3, "getsource": True},
        **{"after reload": [*OURS, "toy"], "pyiqa after reload": [*OURS, "toy"]},
    }
    assert found["ours"] == OURS


def test_pyiqa_in_a_zip_file(tmp_path: Path, toy: Path) -> None:
    archive = tmp_path / "pyiqa.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for path in toy.rglob("*.py"):
            file.write(path, path.relative_to(toy))
    found = answer(run("import pyiqa_qscorer, pyiqa; report(file=pyiqa.__file__)", archive, "-S"))
    assert found["ours"] == OURS and archive.name in found["file"]


def test_without_pyiqa_nothing_breaks() -> None:
    code = """
    import json, pyiqa_qscorer
    pyiqa_qscorer.register()
    try:
        import pyiqa
    except ModuleNotFoundError as error:
        print(json.dumps([str(error), pyiqa_qscorer.registration_state().hook_installed]))
    """
    found = answer(run_python(code, "-S", path=(REPOSITORY,)))
    assert found == ["No module named 'pyiqa'", True]


def test_an_error_inside_pyiqa_is_pyiqas_and_the_next_try_works(toy: Path) -> None:
    table = toy / "pyiqa" / "default_model_configs.py"
    code = f"""
    import pathlib, sys
    sys.dont_write_bytecode = True
    table = pathlib.Path({str(table)!r})
    good = table.read_text()
    table.write_text("raise ValueError('of pyiqa')")
    import pyiqa_qscorer
    try:
        import pyiqa
    except ValueError as error:
        first = str(error)
    table.write_text(good)
    import pyiqa
    report(first=first)
    """
    found = answer(run(code, toy, "-S"))
    assert (found["first"], found["ours"]) == ("of pyiqa", OURS)


FOREIGN_ARCH = """
class ARCH_REGISTRY:
    class QScorer: ...
    _obj_map, _lazy_map = {"QScorer": QScorer}, {}
"""
BAD_PYIQAS = {
    "foreign metric": (
        {"default_model_configs.py": 'DEFAULT_CONFIGS = {"qscorer": {"metric_opts": {"type": "X"}}}'},
        "calls qscorer; left as it was",
        OURS,
    ),
    "foreign arch": (
        {"utils/registry.py": FOREIGN_ARCH},
        "already has 'QScorer', from 'pyiqa.utils.registry:ARCH_REGISTRY.QScorer'",
        OURS,
    ),
    "too old": ({"utils/registry.py": "class ARCH_REGISTRY: _lazy_map = {}"}, "needs pyiqa>=0.1.16", OURS),
    "other tables": ({"default_model_configs.py": "DEFAULT_CONFIGS = None"}, "AttributeError", []),
}


@both_ways_in
@pytest.mark.parametrize("kind", BAD_PYIQAS)
@pytest.mark.parametrize("order", ["pyiqa, pyiqa_qscorer", "pyiqa_qscorer, pyiqa"])
def test_failure_warns_with_the_reason_and_pyiqa_imports(kind, order, flags, tmp_path) -> None:
    changed, reason, ours = BAD_PYIQAS[kind]
    changed = {"api_helpers.py": "import pyiqa.default_model_configs, pyiqa.utils.registry"} | changed
    changed |= {"__init__.py": "from . import api_helpers"}
    toy = write_toy_pyiqa(tmp_path, changed)
    code = f"""
    import json, warnings
    with warnings.catch_warnings(record=True) as caught:
        import {order}
    try:
        pyiqa_qscorer.register()
        raised = None
    except Exception as error:
        raised = str(error)
    configs = pyiqa.default_model_configs.DEFAULT_CONFIGS or ()
    state = pyiqa_qscorer.registration_state()
    print(json.dumps({{
        "ours": sorted(n for n in configs if n != "toy"),
        "warnings": [(w.category.__name__, str(w.message)) for w in caught],
        "raised": raised, "problem": state.problem, "registered": state.registered,
        "waiting": state.hook_installed,
    }}))
    """
    found = answer(run_python(code, *flags, path=(REPOSITORY, toy)))
    assert found["ours"] == ours
    ((category, message),) = found["warnings"]
    assert category == "RuntimeWarning" and reason in message and "PYIQA_QSCORER_AUTOLOAD=0" in message
    assert message.startswith("pyiqa-qscorer could not add all its metrics to pyiqa: ")
    assert found["raised"] in found["problem"] and (found["registered"], found["waiting"]) == (False, True)


def test_threads_that_import_everything_at_once(toy: Path) -> None:
    code = """
    import threading
    sys.setswitchinterval(1e-6)
    start, errors = threading.Barrier(12), []
    def work(i):
        try:
            start.wait()
            if i % 3 == 0:
                import pyiqa
            elif i % 3 == 1:
                import pyiqa_qscorer
            else:
                from pyiqa_qscorer import register
                register()
                import pyiqa
        except Exception as error:
            errors.append(repr(error))
    threads = [threading.Thread(target=work, args=(i,)) for i in range(12)]
    [t.start() for t in threads], [t.join(60) for t in threads]
    report(errors=errors, alive=sum(t.is_alive() for t in threads))
    """
    for _ in range(5):
        found = answer(run(code, toy, "-S"))
        assert (found["errors"], found["alive"], found["finders"]) == ([], 0, 1)
        assert (found["ours"], found["archs"]) == (OURS, {"QScorer": ARCH})


def test_import_while_another_thread_runs_pyiqas_table(tmp_path: Path) -> None:
    slow = """
    import sys, time
    until = time.monotonic() + 20
    while "pyiqa_qscorer.host.registration" not in sys.modules and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(0.3)  # by now the other thread asks for this module
    DEFAULT_CONFIGS = {"toy": {"metric_mode": "NR"}}
    """
    toy = write_toy_pyiqa(tmp_path, {"default_model_configs.py": slow})
    code = """
    import importlib, threading, time
    other = threading.Thread(target=importlib.import_module, args=("pyiqa",))
    other.start()
    while "pyiqa.default_model_configs" not in sys.modules:
        time.sleep(0.001)
    early = not hasattr(sys.modules["pyiqa.default_model_configs"], "DEFAULT_CONFIGS")
    import pyiqa_qscorer
    other.join(60)
    report(early=early)
    """
    found = answer(run(code, toy, "-S"))
    assert (found["early"], found["state"]["problem"]) == (True, None)
    assert (found["ours"], found["archs"]) == (OURS, {"QScorer": ARCH})
