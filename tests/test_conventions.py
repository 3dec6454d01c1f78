"""The house: which way imports run, how long functions, lines and files are, and what README says of them.

Each rule is a function that returns the violations. It is run on this repository, where it must find none,
and on a planted violation, which it must find.
"""

import ast
import graphlib
import re
import subprocess

import pytest
from conftest import ROOT

# Each imports only later ones. A file of a folder may have a place of its own: a run builds models.
ROOMS = """ttrl rewards support.run support.inputs rollout model report distributed support kernels
    grading""".split()
FOLDERS = "distributed grading kernels report support".split()
LONGEST_LINE, LONGEST_FUNCTION, MOST_IMPORTS = 110, 40, 15
LONGEST_FILES = {"ttrl.py": 360, "rollout.py": 330, "model.py": 250, "exercises/first_lesson.py": 160,
                 "README.md": 150, **{f"{folder}/*.py": 345 for folder in FOLDERS}}  # fmt: skip  # in lines


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


def imported_names(text):
    """The names that the imports at the head of a file define."""
    nodes = [node for node in ast.parse(text).body if isinstance(node, ast.Import | ast.ImportFrom)]
    return [alias.asname or alias.name for node in nodes for alias in node.names]


def wrong_reading(readme, root):
    """Rows of README's reading list that are off by over 3 % in lines, or in minutes of 16 lines."""
    rows = re.findall(r"^\| \d\. \[.*\]\((.*)\) \| (\d+) \| (\d+) \|", readme, re.MULTILINE)
    found = [] if rows else ["no reading list"]
    for name, lines, minutes in rows:
        path = root / name
        files = path.parent.glob("*.py") if path.name == "__init__.py" else [path]
        count = sum(len(file.read_text("utf-8").splitlines()) for file in files)
        if abs(int(lines) - count) > 0.03 * count or abs(int(minutes) - count / 16) > 3:
            found.append(f"{name} has {count} lines, {count / 16:.0f} minutes")
    return found


def undescribed(root, folders):
    """Folders whose __init__.py does not begin with one sentence about what they hold."""
    found = []
    for folder in folders:
        text = (root / folder / "__init__.py").read_text("utf-8")
        said = (ast.get_docstring(ast.parse(text)) or "").split("\n\n")[0]
        found += [] if re.fullmatch(r"[A-Z][^.]+\.", said, re.DOTALL) else [folder]
    return found


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
    assert [import_cycle(ROOT / folder) for folder in FOLDERS] == [[]] * len(FOLDERS)


@pytest.mark.parametrize("name", tracked("*.py", "*.sh", "*.md"))
def test_lines_and_functions_are_short(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert long_lines(text, tables=name.endswith(".md") and name != "README.md") == []
    assert not name.endswith(".py") or long_functions(text) == []


def test_files_are_short():
    assert long_files(ROOT) == []


def test_the_algorithm_imports_few_names():
    assert len(imported_names((ROOT / "ttrl.py").read_text(encoding="utf-8"))) <= MOST_IMPORTS


def test_the_reading_list_is_right():
    assert wrong_reading((ROOT / "README.md").read_text(encoding="utf-8"), ROOT) == []


def test_every_folder_says_what_it_holds():
    assert undescribed(ROOT, FOLDERS) == []


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
    (tmp_path / "support" / "words.py").write_text("\n" * 346)
    (tmp_path / "model.py").write_text("\n" * 250)
    assert long_files(tmp_path) == ["support/words.py: 346 lines, at most 345"]


def test_names_at_the_head_are_counted():
    text = "import a, b.c\nfrom d import (\n    e,\n    f as g,\n)\n\ndef h():\n    import i\n"
    assert imported_names(text) == ["a", "b.c", "e", "g"]


def test_a_wrong_reading_list_is_found(tmp_path):
    (tmp_path / "kernels").mkdir()
    for name, lines in (("model.py", 160), ("kernels/__init__.py", 1), ("kernels/a.py", 319)):
        (tmp_path / name).write_text("\n" * lines)
    row = "| {}. [it](model.py) | {} | {} | the model |\n"
    right = row.format(1, 160, 10) + "| 2. [all](kernels/__init__.py) | 320 | 20 | by hand |\n"
    assert wrong_reading(right, tmp_path) == []
    assert wrong_reading(row.format(1, 150, 10), tmp_path) == ["model.py has 160 lines, 10 minutes"]
    assert wrong_reading(row.format(1, 160, 6), tmp_path) == ["model.py has 160 lines, 10 minutes"]
    assert wrong_reading("| 1. [it](model.py) | 160 | ten |", tmp_path) == ["no reading list"]


@pytest.mark.parametrize("text", ["", '"""no capital letter."""', '"""Two. Sentences."""'])
def test_a_folder_without_its_sentence_is_found(tmp_path, text):
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(text)
    assert undescribed(tmp_path, ["kernels"]) == ["kernels"]


def test_a_wrong_tree_is_found():
    tree = "```\nls\n```\n\n```\nttrl.py  the algorithm\ndocs/, tests/  more\n         still more\n```\n"
    assert tree_differences(tree, ["ttrl.py", "docs/a.md", "tests/b.py", ".gitignore", "README.md"]) == []
    assert tree_differences(tree, ["ttrl.py", "docs/a.md", "new.py"]) == ["new.py", "tests"]
