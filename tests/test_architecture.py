"""The packages that each package may import. The docstring of each package lists the same packages."""

import ast
import re
import subprocess
import sys

import pytest

from helpers.paths import ROOT

SOURCE = ROOT / "src" / "tspo_trl"
EVERYTHING = {path.stem for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()} - {
    "__init__"
}
MAY_IMPORT = {
    "_version": set(),
    "support": set(),
    "scoring": {"support"},
    "retrieval": {"support"},
    "engines": {"support"},
    "rollout": {"_version", "support", "engines", "retrieval"},
    "credit": {"scoring"},
    "chance": {"scoring"},
    "rewards": {"scoring", "rollout"},
    "audit": {"credit", "chance", "scoring", "rollout", "retrieval"},
    "sharing": {"_version", "support", "rollout", "retrieval"},
    "agent": {"support", "engines", "rollout", "retrieval", "sharing"},
    "questions": {"scoring", "support"},
    "training": {
        *("_version", "support", "credit", "chance", "scoring", "rewards", "rollout"),
        *("engines", "retrieval", "sharing", "questions"),
    },
    "cold_start": {
        *("training", "agent", "credit", "scoring", "rollout"),
        *("retrieval", "sharing", "questions", "support"),
    },
    "evaluation": {
        *("_version", "support", "agent", "credit", "scoring", "rollout"),
        *("engines", "retrieval", "questions"),
    },
    "inspect": {"credit", "scoring", "rollout"},
    "memory": {"support", "engines", "rollout"},
    "demo": {"engines", "rollout", "retrieval", "scoring"},
    "commands": EVERYTHING - {"commands", "__main__"},
    "__main__": {"commands"},
}


def imports(path):
    """The packages that a module imports anywhere in its code. `root` is `tspo_trl` itself."""
    package = path.relative_to(SOURCE).parent.parts
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            elif (node.module or "").split(".")[0] == "tspo_trl":
                base = node.module.split(".")[1:]
            else:
                continue
            base = [part for part in base if part]
            # `from . import audit` imports a package; `from . import TSPOConfig` imports a name from the root
            names = [base[0]] if base else [a.name if a.name in EVERYTHING else "root" for a in node.names]
            found |= set(names)
        elif isinstance(node, ast.Import):
            names = [alias.name.split(".") for alias in node.names]
            found |= {[*name, "root"][1] for name in names if name[0] == "tspo_trl"}
    return found


def imports_by_package():
    packages = {}
    for path in SOURCE.rglob("*.py"):
        name = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        if name != "__init__":
            packages.setdefault(name, set()).update(imports(path) - {name})
    return packages


def test_each_package_imports_only_allowed_packages():
    packages = imports_by_package()
    assert set(packages) == set(MAY_IMPORT)
    assert {name: found - MAY_IMPORT[name] for name, found in packages.items() if found - MAY_IMPORT[name]} == {}


def test_trl_is_imported_only_where_it_is_extended_or_called():
    found = set()
    for path in SOURCE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(str(name).split(".")[0] == "trl" for name in names):
                found.add(path.relative_to(SOURCE).as_posix())
    packages = {name.partition("/")[0] for name in found - {"rollout/response_format.py", "engines/vllm.py"}}
    assert packages == {"training", "cold_start", "sharing", "memory", "commands"}
    assert {"rollout/response_format.py", "engines/vllm.py"} <= found


def test_the_protocol_of_tags_does_not_import_trl():
    code = "import sys, tspo_trl.rollout.protocols, tspo_trl.agent; print('trl' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split()[-1] == "False"


def test_the_table_has_no_cycle():
    left = {name: set(packages) for name, packages in MAY_IMPORT.items()}
    while left:
        free = [name for name, packages in left.items() if not packages & set(left)]
        assert free, f"a cycle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize(
    ("code", "found"),
    [
        ("from ..scoring import contains_answer", {"scoring"}),
        ("def f():\n    from ..rollout.log import read_rollouts", {"rollout"}),
        ("from .. import audit, TSPOConfig", {"audit", "root"}),
        ("import tspo_trl.engines.base", {"engines"}),
        ("import tspo_trl", {"root"}),
        ("from tspo_trl import TSPOConfig", {"root"}),
        ("from tspo_trl.demo.world import World", {"demo"}),
        ("from .other import thing", {"retrieval"}),
        ("import trl\nfrom datasets import Dataset", set()),
    ],
)
def test_imports_are_found_anywhere_in_a_module(tmp_path, monkeypatch, code, found):
    monkeypatch.setitem(globals(), "SOURCE", tmp_path)
    path = tmp_path / "retrieval" / "module.py"
    path.parent.mkdir()
    path.write_text(code)
    assert imports(path) == found


@pytest.mark.parametrize("package", sorted(path.parent.name for path in SOURCE.glob("*/__init__.py")))
def test_each_package_lists_its_allowed_imports(package):
    text = ast.get_docstring(ast.parse((SOURCE / package / "__init__.py").read_text(encoding="utf-8")))
    _, found, packages = text.partition("May import: ")
    assert found
    expected = EVERYTHING if "every package" in packages else {*re.findall(r"`(\w+)`", packages), "_version", package}
    assert MAY_IMPORT[package] | {"_version", "__main__", package} == expected | {"__main__"}
