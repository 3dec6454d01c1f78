"""Conventions: which way imports run, how long functions, lines and files are, and README's tree.

Each rule is a function that returns the violations. It is run on this repository, where it must find none,
and on a planted violation, which it must find.
"""

import ast
import graphlib
import re
import subprocess

import pytest
from conftest import ROOT

# Each imports only later ones.
ROOMS = "ttrl rewards support.run rollout model report distributed support kernels grading".split()
LONGEST_LINE, LONGEST_FUNCTION = 110, 40
LONGEST_FILES = {"ttrl.py": 510, "model.py": 310, "support/*.py": 430, "README.md": 150}  # in lines


def imports(path):
    """Names of the modules that a file imports anywhere; `from support import words` gives support.words."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def upward_imports(root):
    """Imports of a room that stands earlier in ROOMS."""
    found = []
    for path in sorted(root.glob("*.py")) + sorted(root.glob("*/*.py")):
        position = floor(".".join(path.relative_to(root).with_suffix("").parts))
        if position is not None:
            named = [name for name in sorted(imports(path)) if floor(name) is not None]
            found += [f"{path.relative_to(root)} imports {name}" for name in named if floor(name) < position]
    return found


def floor(module):
    """The place in ROOMS of a module, or of a name in it, by the longest room that it belongs to; or None."""
    rooms = [room for room in ROOMS if f"{module}.".startswith(f"{room}.")]
    return ROOMS.index(max(rooms, key=len)) if rooms else None


def import_cycle(folder):
    """The modules of a cycle of imports inside a folder, its first one again at the end; or []."""
    files = {f"{folder.name}.{path.stem}": path for path in folder.glob("*.py")}
    modules = {module: {".".join(name.split(".")[:2]) for name in imports(files[module])} for module in files}
    graph = {module: imported & files.keys() for module, imported in modules.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def long_functions(text):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, functions)]
    return [node.name for node in nodes if node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION]


def long_lines(text, tables=False):
    """Numbers of the lines that are too long. With `tables`, the rows of a Markdown table may be."""
    lines = enumerate(text.splitlines(), 1)
    long = [(number, line) for number, line in lines if len(line) > LONGEST_LINE]
    return [number for number, line in long if not (tables and line.startswith("|"))]


def long_files(root):
    found = []
    for pattern, limit in LONGEST_FILES.items():
        lengths = {path: len(path.read_text("utf-8").splitlines()) for path in sorted(root.glob(pattern))}
        long = [path for path in lengths if lengths[path] > limit]
        found += [f"{path.relative_to(root)}: {lengths[path]} lines, at most {limit}" for path in long]
    return found


def tree_differences(readme, files):
    """Names that README's tree lacks or has too many, for tracked files. It may leave out itself and .files.

    The tree is the code block with a line that begins with ttrl.py. A line that is not indented begins with a
    path, or several behind commas; what they are follows after two spaces.
    """
    blocks = re.findall(r"^```\w*\n(.*?)^```", readme, re.MULTILINE | re.DOTALL)
    tree = next((block for block in blocks if re.search(r"^ttrl\.py\b", block, re.MULTILINE)), "")
    lines = [line for line in tree.splitlines() if line and not line.startswith(" ")]
    named = {name.strip("/") for line in lines for name in re.split(r" {2,}", line)[0].split(", ")}
    entries = {file.split("/")[0] for file in files}
    wanted = {entry for entry in entries if not entry.startswith(".") and entry != "README.md"}
    return sorted(wanted - named) + sorted(named - entries)


def tracked(*patterns):
    listed = subprocess.check_output(["git", "-C", ROOT, "ls-files", *patterns], text=True)
    return [name for name in listed.splitlines() if (ROOT / name).exists()]


def test_imports_run_one_way():
    assert upward_imports(ROOT) == []
    assert import_cycle(ROOT / "support") == [] == import_cycle(ROOT / "kernels")


@pytest.mark.parametrize("name", tracked("*.py", "*.sh", "*.md"))
def test_lines_and_functions_are_short(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert long_lines(text, tables=name.endswith(".md") and name != "README.md") == []
    assert not name.endswith(".py") or long_functions(text) == []


def test_files_are_short():
    assert long_files(ROOT) == []


def test_the_tree_in_the_readme_is_complete():
    assert tree_differences((ROOT / "README.md").read_text(encoding="utf-8"), tracked()) == []


@pytest.mark.parametrize("line", ["import ttrl", "from model import Block", "def f():\n    import rewards"])
def test_an_upward_import_is_found(tmp_path, line):
    (tmp_path / "support").mkdir()
    (tmp_path / "support" / "words.py").write_text(f"import math\n{line}\n")
    (tmp_path / "model.py").write_text("from support import words  # downward, and no violation\n")
    assert len(upward_imports(tmp_path)) == 1


def test_a_cycle_of_imports_is_found(tmp_path):
    folder = tmp_path / "kernels"
    folder.mkdir()
    texts = {"a": "from kernels import b", "b": "from kernels.c import f", "c": "import kernels.a"}
    for name, text in texts.items():
        (folder / f"{name}.py").write_text(text)
    assert sorted(set(import_cycle(folder))) == ["kernels.a", "kernels.b", "kernels.c"]


def test_what_is_too_long_is_found(tmp_path):
    short, long = "def short():\n" + "    pass\n" * 39, "    def long():\n" + "        pass\n" * 40
    assert long_functions(f"{short}class A:\n{long}") == ["long"]
    assert (
        long_lines("é" * 110 + "\n" + "x" * 111)
        == [2]
        == long_lines("|" * 111 + "\n" + "x" * 111, tables=True)
    )
    (tmp_path / "support").mkdir()
    (tmp_path / "support" / "words.py").write_text("\n" * 431)
    (tmp_path / "model.py").write_text("\n" * 310)
    assert long_files(tmp_path) == ["support/words.py: 431 lines, at most 430"]


def test_a_wrong_tree_is_found():
    tree = "```\nls\n```\n\n```\nttrl.py  the algorithm\ndocs/, tests/  more\n         still more\n```\n"
    assert tree_differences(tree, ["ttrl.py", "docs/a.md", "tests/b.py", ".gitignore", "README.md"]) == []
    assert tree_differences(tree, ["ttrl.py", "docs/a.md", "new.py"]) == ["new.py", "tests"]
