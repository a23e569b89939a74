"""A bundle is data: nothing that serving imports of ours can be made to run code by a file."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

OURS = ("features", "candidate_gen", "ranking", "serving")
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "joblib", "dill", "shelve", "marshal"}
FORBIDDEN_CALLS = {("torch", "load"), ("export", "load"), ("jit", "load")}


def complaints(source: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names if alias.name.split(".")[0] in FORBIDDEN_MODULES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_MODULES:
            found.append(str(node.module))
        elif isinstance(node, ast.Attribute):
            owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
            if (owner, node.attr) in FORBIDDEN_CALLS:
                found.append(f"{owner}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle" and getattr(node.value, "value", True):
            found.append("allow_pickle")
    return found


def test_no_module_that_serving_imports_can_unpickle():
    for module in ("serving.server", "serving.web"):
        importlib.import_module(module)
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] in OURS]
    files = [Path(module.__file__) for module in modules if module.__file__]
    assert {"feed.py", "search.py", "infer.py", "artifacts.py", "web.py"} <= {file.name for file in files}
    assert {str(file): found for file in files if (found := complaints(file.read_text()))} == {}


def test_the_check_finds_what_it_looks_for():
    bad = "import pickle\nfrom joblib import load\ntorch.load(x)\nnp.load(f, allow_pickle=True)\ntorch.export.load(x)"
    assert sorted(complaints(bad)) == ["allow_pickle", "export.load", "joblib", "pickle", "torch.load"]
    assert complaints("np.load(f, allow_pickle=False)") == []
