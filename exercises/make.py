"""A copy of the project to hand out, in which the bodies of the exercises' functions are missing.

    python exercises/make.py FOLDER                all exercises
    python exercises/make.py FOLDER vote loss      only these; the other functions stay as they are

Signatures, docstrings and doctests stay. The copy has the files that git tracks, without .git and without
those in targets.LEFT_OUT: planted bugs, and the solutions that tests keep.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project instead of exercises/
from exercises.targets import EXERCISES, LEFT_OUT, ROOT, source_file


def find(tree, function):
    """The node of a function: "f", "Class.f" or "module:Class.f"."""
    node = tree
    for name in function.split(":")[-1].split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        node = next((n for n in node.body if isinstance(n, kinds) and n.name == name), None)
        if node is None:
            raise ValueError(f"no function {function}: has it moved? exercises/targets.py names it")
    return node


def body_lines(node):
    """The lines of a function's body without its docstring, as a range that counts from 0."""
    has_docstring = ast.get_docstring(node) is not None
    start = node.body[0].end_lineno if has_docstring else node.body[0].lineno - 1
    return range(start, node.end_lineno)


def blank(text, messages):
    """Source text in which functions raise instead of doing their work: messages {function: message}.

    >>> print(blank('def f(x):\\n    "Twice x."\\n    return 2 * x', {"f": "exercise 1"}))
    def f(x):
        "Twice x."
        raise NotImplementedError("exercise 1")
    """
    lines, tree = text.splitlines(), ast.parse(text)
    nodes = {find(tree, function): message for function, message in messages.items()}
    for node in sorted(
        nodes, key=lambda node: -node.lineno
    ):  # from the end: the lines above keep their numbers
        body = body_lines(node)
        indent = " " * (node.col_offset + 4)
        lines[body.start : body.stop] = [f'{indent}raise NotImplementedError("{nodes[node]}")']
    return "\n".join([*lines, ""] if text.endswith("\n") else lines)


def blanks(exercises):
    """{file: {function: message}} of everything that a hand-out of these exercises blanks."""
    found = {}
    for exercise in exercises:
        message = f"exercise {exercise.number}: python exercises/check.py {exercise.name}"
        for function in exercise.blanked:
            found.setdefault(source_file(function), {})[function] = message
    return found


def tracked_files():
    """The files that git tracks and that a hand-out contains, as paths relative to the project."""
    try:
        listed = subprocess.check_output(["git", "-C", ROOT, "ls-files", "-z"], text=True)
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(f"{ROOT} is not a git repository, and a hand-out is what git tracks") from None
    return [name for name in listed.split("\0") if name not in LEFT_OUT and (ROOT / name).is_file()]


def hand_out(folder, exercises):
    """Write the copy."""
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name a folder that does not exist yet")
    changes = blanks(exercises)
    for name in tracked_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)
        if name in changes:
            target.write_text(blank((ROOT / name).read_text(encoding="utf-8"), changes[name]), "utf-8")


def main(arguments):
    try:
        if not arguments or arguments[0].startswith("-"):
            raise ValueError("usage: python exercises/make.py FOLDER [EXERCISE ...]")
        folder, *names = arguments
        unknown = [name for name in names if name not in EXERCISES]
        if unknown:
            raise ValueError(f"no exercise is named {unknown[0]}; the exercises are {', '.join(EXERCISES)}")
        hand_out(Path(folder), [EXERCISES[name] for name in names or EXERCISES])
    except (ValueError, OSError) as error:
        print(f"make.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{folder}: a copy to hand out, with {len(names or EXERCISES)} exercises blanked")


if __name__ == "__main__":
    main(sys.argv[1:])
