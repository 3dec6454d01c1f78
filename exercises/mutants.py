"""The planted bugs of the ninth exercise: each is a diff in mutants/ whose first line says what is wrong.

A diff is applied by its text, not by its line numbers: the lines that it takes away, with the lines around
them, have to stand in the file exactly once. So it survives changes elsewhere in the file.
"""

import re

from exercises.targets import MUTANTS, ROOT


def diffs():
    return sorted((ROOT / MUTANTS).glob("*.diff"))


def parsed(text):
    """(file, [(old lines, new lines)] of each hunk) of a unified diff.

    >>> parsed('A tie.\\n--- a/ttrl.py\\n+++ b/ttrl.py\\n@@ -1,2 +1,2 @@ def vote():\\n a\\n-b\\n+c\\n')
    ('ttrl.py', [('a\\nb\\n', 'a\\nc\\n')])
    """
    head, *hunks = text.split("\n@@ ")
    file = next(line for line in head.split("\n") if line.startswith("+++ b/")).removeprefix("+++ b/")
    pairs = []
    for hunk in hunks:
        lines = [line for line in hunk.split("\n")[1:] if line]
        old = [line[1:] for line in lines if line[0] in " -"]
        new = [line[1:] for line in lines if line[0] in " +"]
        pairs.append(("\n".join([*old, ""]), "\n".join([*new, ""])))
    return file, pairs


def planted(path):
    """(module, its source text with the bug in it)."""
    file, hunks = parsed(path.read_text(encoding="utf-8"))
    text = (ROOT / file).read_text(encoding="utf-8")
    for old, new in hunks:
        if text.count(old) != 1:
            raise ValueError(f"{path.name} does not apply: its lines stand {text.count(old)} times in {file}")
        text = text.replace(old, new)
    return file.removesuffix(".py").replace("/", "."), text


def plant(module, text):
    """Execute the changed source in a module that has just been executed as it is."""
    exec(compile(text, module.__file__, "exec"), module.__dict__)


def function_of(path):
    """The function or class that a diff changes, as "ttrl.vote": its first @@ line names it."""
    text = path.read_text(encoding="utf-8")
    name = re.search(r"^@@ .* @@ (?:def|class) (\w+)", text, re.MULTILINE)[1]
    return f"{parsed(text)[0].removesuffix('.py').replace('/', '.')}.{name}"
