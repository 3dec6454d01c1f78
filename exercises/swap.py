"""Put a student's functions in the place of the project's, wherever the project's would be used.

    python exercises/swap.py vote,loss ttrl.py --seed 7   # the real program with a student's functions
    torchrun --nproc-per-node 2 exercises/swap.py vote ttrl.py
    EXERCISES=vote python -m pytest -p exercises.swap tests       # the real tests with them

A function is replaced right after its module has been executed and before anyone can import it from there, so
`from ttrl import vote` elsewhere gets the student's too. EXERCISES names exercises, behind commas, and
EXERCISES_FOLDER the folder of the student's files, by default this one. Both reach subprocesses, and
tests/conftest.py starts the real program through this file where EXERCISES is set.
"""

import ast
import importlib
import importlib.util
import os
import sys
import types
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project instead of exercises/
from exercises.targets import EXERCISES, ROOT, short_name, student_file


class Replacing:
    """Runs `finished(module)` after the execution of each of some modules: a finder for sys.meta_path."""

    def __init__(self, modules, finished):
        self.modules, self.finished, self.searching = set(modules), finished, False

    def find_spec(self, name, path=None, target=None):
        if name not in self.modules or self.searching:
            return None
        self.searching = True  # find_spec asks this finder again
        try:
            spec = importlib.util.find_spec(name)
        finally:
            self.searching = False
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            self.finished(module)

        spec.loader.exec_module = exec_module
        return spec


class Swap:
    """The swap of one exercise: the student's file is loaded once all its modules in use are executed."""

    def __init__(self, exercise, folder):
        self.exercise, self.path = exercise, student_file(exercise, folder)
        self.modules = {function.split(":")[0] for function in exercise.functions}
        self.executed, self.student = {}, None

    def finished(self, module, name=None):
        self.executed[name or module.__name__] = module
        if any(name in sys.modules and name not in self.executed for name in self.modules):
            return  # another one, which imports this one, is still being executed: it comes here too
        self.student = self.student or load(self.path)
        for function in self.exercise.functions:
            where, qualified_name = function.split(":")
            if where in self.executed:
                *owners, attribute = qualified_name.split(".")
                owner = self.executed[where]
                for part in owners:
                    owner = getattr(owner, part)
                setattr(owner, attribute, getattr(self.student, short_name(function)))


def load(path):
    """The student's file as a module."""
    name = f"student_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def chosen():
    """The exercises that EXERCISES names, and the folder of the student's files."""
    folder = Path(os.environ.get("EXERCISES_FOLDER") or ROOT / "exercises")
    names = [name for name in os.environ.get("EXERCISES", "").split(",") if name]
    return [EXERCISES[name] for name in names], folder


def install():
    """Swap the chosen exercises from here on: their finders, the first on sys.meta_path."""
    exercises, folder = chosen()
    swaps = [Swap(exercise, folder) for exercise in exercises]
    finders = [Replacing(swap.modules, swap.finished) for swap in swaps]
    sys.meta_path[:0] = finders
    return swaps, finders


def pytest_load_initial_conftests(early_config):
    """Pytest's first hook, before any test file or conftest is imported."""
    install()


def run_script(path, arguments):
    """Run a script as Python does, but swap what it defines itself before its `if __name__ == "__main__"`."""
    swaps, _ = install()
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    starts = [index for index, node in enumerate(tree.body) if is_main_guard(node)]
    cut = starts[0] if starts else len(tree.body)
    main = types.ModuleType("__main__")
    main.__file__ = str(path)
    sys.argv, sys.path[0] = [str(path), *arguments], str(path.parent)
    # A student's file may import from the script, which must not be executed a second time for that.
    sys.modules["__main__"] = sys.modules[path.stem] = main
    execute(main, tree.body[:cut], path)
    for swap in swaps:
        if path.stem in swap.modules and path.parent == ROOT:
            swap.finished(main, path.stem)
    execute(main, tree.body[cut:], path)


def is_main_guard(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def execute(module, statements, path):
    exec(compile(ast.Module(statements, type_ignores=[]), str(path), "exec"), module.__dict__)


def main():
    if len(sys.argv) < 3:
        raise SystemExit("usage: python exercises/swap.py NAME[,NAME...] SCRIPT [arguments of the script]")
    names, script, *arguments = sys.argv[1:]
    unknown = [name for name in names.split(",") if name not in EXERCISES]
    os.environ["EXERCISES"] = names
    missing = [] if unknown else [e.name for e in chosen()[0] if not student_file(e, chosen()[1]).exists()]
    if unknown or missing:
        what = f"no exercise is named {unknown[0]}" if unknown else f"there is no exercises/{missing[0]}.py"
        print(f"swap.py: {what}; exercises are {', '.join(EXERCISES)}", file=sys.stderr)
        raise SystemExit(2)
    run_script(Path(script).resolve(), arguments)


if __name__ == "__main__":
    main()
