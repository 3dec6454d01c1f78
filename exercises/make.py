"""A copy of the project to hand out, in which the bodies of the exercises' functions are missing.

    python exercises/make.py FOLDER                all exercises
    python exercises/make.py FOLDER vote loss      only these; the other functions stay as they are

Signatures, docstrings and doctests stay. The files that git tracks are copied, without .git, and nothing else
is changed, but for what targets.LEFT_OUT names: planted bugs and the solutions that tests keep.
"""

import ast
import shutil
import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project instead of exercises/
from exercises.targets import EXERCISES, LEFT_OUT, ROOT, source_file


def find(tree, qualified_name):
    """The node of a function, "KVCache.open_step" for a method."""
    node = tree
    for name in qualified_name.split("."):
        kinds = (ast.ClassDef, ast.FunctionDef)
        node = next((n for n in node.body if isinstance(n, kinds) and n.name == name), None)
        if node is None:
            raise ValueError(f"no function {qualified_name}: has it moved? exercises/targets.py names it")
    return node


def body_lines(node):
    """The body without the docstring, as the range of its lines, counted from 0."""
    body = node.body[1:] if ast.get_docstring(node) is not None else node.body
    signature_end = node.body[0].end_lineno if len(body) < len(node.body) else node.body[0].lineno - 1
    return range(signature_end, body[-1].end_lineno if body else signature_end)


def blank(text, messages):
    """Source text in which the bodies of functions raise instead: messages {qualified name: what is said}.

    >>> print(blank('def f(x):\\n    "Twice x."\\n    return 2 * x', {"f": "exercise 1"}))
    def f(x):
        "Twice x."
        raise NotImplementedError("exercise 1")
    """
    lines, tree = text.splitlines(), ast.parse(text)
    nodes = {find(tree, name): message for name, message in messages.items()}
    for node in sorted(nodes, key=lambda node: -node.lineno):  # from the end, so that line numbers stay true
        body = body_lines(node)
        indent = " " * (node.col_offset + 4)
        lines[body.start : body.stop] = [f'{indent}raise NotImplementedError("{nodes[node]}")']
    return "\n".join([*lines, ""] if text.endswith("\n") else lines)


def blanks(exercises):
    """{file: {qualified name: message}} of everything that a hand-out of these exercises blanks."""
    found = {}
    for exercise in exercises:
        said = f"exercise {exercise.number}: python exercises/check.py {exercise.name}"
        for function in (*exercise.functions, *exercise.blanked):
            found.setdefault(source_file(function), {})[function.split(":")[1]] = said
    return found


def tracked_files():
    """The files that git tracks and that a hand-out holds, as paths relative to the project."""
    try:
        listed = subprocess.check_output(["git", "-C", ROOT, "ls-files", "-z"], text=True)
    except (OSError, subprocess.CalledProcessError):
        raise ValueError(f"{ROOT} is no git repository, and a hand-out is made of what git tracks") from None
    hidden = [f"{name}/" for name in LEFT_OUT]
    names = [name for name in listed.split("\0") if name and not f"{name}/".startswith(tuple(hidden))]
    return [name for name in names if (ROOT / name).is_file()]


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
        unknown = [name for name in arguments[1:] if name not in EXERCISES]
        if unknown:
            raise ValueError(f"no exercise is named {unknown[0]}; there are {', '.join(EXERCISES)}")
        exercises = [EXERCISES[name] for name in arguments[1:] or EXERCISES]
        hand_out(Path(arguments[0]), exercises)
    except (ValueError, OSError) as error:
        print(f"make.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"{arguments[0]}: to hand out, with {len(exercises)} exercises blanked")


if __name__ == "__main__":
    main(sys.argv[1:])
