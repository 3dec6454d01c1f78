"""Put a student's functions in the place of the project's, wherever the project uses them.

    python exercises/swap.py vote,loss ttrl.py --seed 7   # the real program with a student's functions
    torchrun --nproc-per-node 2 exercises/swap.py vote ttrl.py
    EXERCISES=vote python -m pytest -p exercises.swap tests       # the real tests with them

EXERCISES names exercises, separated by commas, and EXERCISES_FOLDER the folder of the student's files, by
default this one. Subprocesses inherit both, and tests/conftest.py starts the real program through this file
where EXERCISES is set.
"""

import ast
import functools
import importlib
import importlib.util
import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project instead of exercises/
from exercises.targets import EXERCISES, ROOT, short_name, student_file


def swap(exercise, folder):
    """Replace the functions of an exercise by those of the student's file, which may import the project."""
    os.environ["TTRL_C"] = "0"  # Python samples with the student's functions, C would not
    modules = [importlib.import_module(function.split(":")[0]) for function in exercise.functions]
    student = load(student_file(exercise, folder))
    for function, module in zip(exercise.functions, modules, strict=True):
        *owners, name = function.split(":")[1].split(".")
        owner = functools.reduce(getattr, owners, module)  # the module, or a class in it
        old, new = getattr(owner, name), getattr(student, short_name(function))
        setattr(owner, name, new)
        for other in set(sys.modules.values()) - {student}:  # that imported the function by its name
            for key in [key for key, value in vars(other).items() if value is old]:
                setattr(other, key, new)


def load(path):
    """The student's file as a module."""
    name = f"student_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def chosen():
    """The names in EXERCISES, and the folder of the student's files."""
    names = [name for name in os.environ.get("EXERCISES", "").split(",") if name]
    return names, os.environ.get("EXERCISES_FOLDER") or ROOT / "exercises"


def pytest_load_initial_conftests():
    """Pytest's first hook, before any test file or conftest is imported."""
    names, folder = chosen()
    for name in names:
        swap(EXERCISES[name], folder)


def run_script(path, arguments):
    """Run a script as a module, then what it does in `if __name__ == "__main__"`."""
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    script = importlib.import_module(path.stem)
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'":
            exec(compile(ast.Module(node.body, type_ignores=[]), str(path), "exec"), vars(script))


def main():
    if len(sys.argv) < 3:
        raise SystemExit("usage: python exercises/swap.py NAME[,NAME...] SCRIPT [arguments of the script]")
    os.environ["EXERCISES"], script, *arguments = sys.argv[1:]
    names, folder = chosen()
    wrong = [f"no exercise is named {name}" for name in names if name not in EXERCISES]
    wrong = wrong or [
        f"there is no exercises/{name}.py"
        for name in names
        if not student_file(EXERCISES[name], folder).exists()
    ]
    if wrong:
        print(f"swap.py: {wrong[0]}; the exercises are {', '.join(EXERCISES)}", file=sys.stderr)
        raise SystemExit(2)
    pytest_load_initial_conftests()
    run_script(Path(script).resolve(), arguments)


if __name__ == "__main__":
    main()
