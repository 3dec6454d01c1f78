"""Check what a student wrote, and say in words what is wrong.

    python exercises/check.py vote             exercises/vote.py; writes a stub there if there is none
    python exercises/check.py tests            exercise 9: exercises/test_student.py against planted bugs
    python exercises/check.py --all            every exercise
    python exercises/check.py --all --json     results.json of Gradescope, on stdout
    ... --folder FOLDER                        the student's files are there, not in exercises/

The tests are the project's own. Exit code: 0 if all is right, 1 if not, 2 if the command is wrong.
"""

import argparse
import ast
import importlib.util
import json
import sys
from collections import Counter
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project instead of exercises/
from exercises import make, worker
from exercises.targets import EXERCISES, MUTANTS, ROOT, TESTS, short_name, source_file, student_file

POINTS = 10  # of an exercise

# ----------------------------------------------------------------------------------------------------------
# the student's file


def signature_and_docstring(function):
    """The source of a function up to the end of its docstring, from the project's own file, unindented."""
    text = (ROOT / source_file(function)).read_text(encoding="utf-8")
    node = make.find(ast.parse(text), function)
    first = min([node, *node.decorator_list], key=lambda each: each.lineno).lineno - 1
    lines = text.splitlines()[first : make.body_lines(node).start]
    return "\n".join(line[node.col_offset :] for line in lines)


def stub(exercise):
    """What a student begins with."""
    files = sorted({source_file(function) for function in exercise.functions})
    head = f'''"""Exercise {exercise.number}, {exercise.name}: write the functions of {" and ".join(files)}.

The page: exercises/README.md. The check: python exercises/check.py {exercise.name}
"""

import torch'''
    if exercise.needs == "triton":
        head += "\nimport triton\nfrom triton import language as tl"
    body = "\n    raise NotImplementedError  # yours"
    functions = [signature_and_docstring(function) + body for function in exercise.functions]
    return "\n\n\n".join([head, *functions]) + "\n"


def complaint(exercise, path):
    """What is wrong with a student's file at first sight, None if nothing is."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        return f"{path.name}, line {error.lineno}, is not valid Python: {error.msg}"
    except (OSError, ValueError) as error:
        return f"{path.name} cannot be read as text: {error}"
    written = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for function in exercise.functions:
        name = short_name(function)
        if name not in written:
            return f"{path.name} defines no function {name}"
        wanted = parameters(ast.parse(signature_and_docstring(function)).body[0])
        if parameters(written[name]) != wanted:
            return f"{name} takes ({parameters(written[name])}) and should take ({wanted})"
    return None


def parameters(node):
    """The parameters of a function as text, without annotations and without what divides them (/ and *)."""
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return ", ".join(part for part in ast.unparse(node.args).split(", ") if part not in ("*", "/"))


# ----------------------------------------------------------------------------------------------------------
# the checks


def check(name, folder):
    """Check one exercise: {"name", "passed", "score", "text", "seconds" of CPU}."""
    folder = Path(folder).resolve()
    if name == "tests":
        number, (score, text, seconds) = len(EXERCISES) + 1, check_tests(folder / TESTS)
    else:
        number, (text, seconds) = EXERCISES[name].number, check_exercise(EXERCISES[name], folder)
        score, text = (0, text) if text else (POINTS, "all of its tests pass")
    return {"name": f"{number} {name}", "passed": score == POINTS, "score": score,
            "text": text, "seconds": seconds}  # fmt: skip


def check_exercise(exercise, folder):
    """(what is wrong, None if all tests pass; the seconds of CPU)."""
    path = student_file(exercise, folder)
    if not path.exists():
        path.write_text(stub(exercise), encoding="utf-8")
        return f"{path.name} did not exist: it is a stub now; write its functions and check again", 0
    if exercise.needs and importlib.util.find_spec(exercise.needs) is None:
        return f"it needs {exercise.needs}, which is not installed: it exists for Linux only (WSL, Colab)", 0
    wrong = complaint(exercise, path)
    return (wrong, 0) if wrong else worker.run(worker.check_functions, exercise.name, folder)


def check_tests(path):
    """(score, text, seconds) of a file of tests: the share of the planted bugs that make one of them fail."""
    if not (ROOT / MUTANTS).exists():
        return 0, "exercise 9 needs the whole project: a hand-out has neither the functions nor the bugs", 0
    if not path.exists():
        path.write_text('"""Exercise 9: tests that pass, but fail where a bug is planted."""\n', "utf-8")
        return 0, f"{path.name} did not exist: it is an empty file now; write tests and check again", 0
    wrong, seconds = worker.run(worker.check_tests, path)
    if wrong:
        return 0, f"every test has to pass on the real functions, but {wrong}", seconds
    planted, alive = bugs(), Counter()
    for bug in planted:
        wrong, took = worker.run(worker.check_tests, path, with_bug(bug))
        alive[bug["function"].replace(":", ".")] += wrong is None
        seconds += took
    caught = len(planted) - alive.total()
    survivors = "".join(f"\n  {count} in {name}" for name, count in sorted(alive.items()) if count)
    text = f"{caught} of {len(planted)} planted bugs are caught" + (survivors and f"; not caught:{survivors}")
    return round(POINTS * caught / len(planted), 1), text, seconds


def bugs():
    """The planted bugs of exercise 9: in the file of "function", the text "old" becomes "new"."""
    return json.loads((ROOT / MUTANTS).read_text(encoding="utf-8"))


def with_bug(bug):
    """(module, its source text with the bug in it)."""
    text = (ROOT / source_file(bug["function"])).read_text(encoding="utf-8")
    if text.count(bug["old"]) != 1:
        raise ValueError(f"{bug['bug']} Its text occurs {text.count(bug['old'])} times: {bug['old']}")
    return bug["function"].split(":")[0], text.replace(bug["old"], bug["new"])


# ----------------------------------------------------------------------------------------------------------
# the command


def gradescope(results):
    """results.json of Gradescope: https://gradescope-autograders.readthedocs.io/en/latest/specs/"""
    tests = [
        {"name": r["name"], "score": r["score"], "max_score": POINTS,
         "status": "passed" if r["passed"] else "failed", "output": r["text"]}
        for r in results
    ]  # fmt: skip
    total = sum(r["score"] for r in results)
    return {"score": total, "execution_time": round(sum(r["seconds"] for r in results), 1), "tests": tests}


def parse(argv):
    parser = argparse.ArgumentParser(prog="check.py", allow_abbrev=False, description=__doc__.split("\n")[0])
    parser.add_argument("name", nargs="?", choices=[*EXERCISES, "tests"], help="the exercise")
    parser.add_argument("--all", action="store_true", help="every exercise")
    parser.add_argument("--json", action="store_true", help="print results.json of Gradescope")
    parser.add_argument(
        "--folder", type=Path, default=ROOT / "exercises", help="where the student's files are"
    )
    args = parser.parse_args(argv)
    if (args.name is None) != args.all:
        parser.error("name one exercise, or --all")
    if not args.folder.is_dir():
        parser.error(f"there is no folder {args.folder}")
    missing = [name for name in ("torch", "pytest", "hypothesis") if importlib.util.find_spec(name) is None]
    if missing:
        parser.error(f'{missing[0]} is not installed for {sys.executable}: pip install ".[test]"')
    return args


def main(argv=None):
    args = parse(argv)
    results = []
    for name in [*EXERCISES, "tests"] if args.all else [args.name]:
        results.append(check(name, args.folder))
        if not args.json:
            mark = "right" if results[-1]["passed"] else "not right yet"
            print(f"exercise {results[-1]['name']}: {mark}: {results[-1]['text']}", flush=True)
    if args.json:
        print(json.dumps(gradescope(results), indent=1))
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
