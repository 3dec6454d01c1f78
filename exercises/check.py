"""Check what a student wrote, and say in words what is wrong.

    python exercises/check.py vote             exercises/vote.py; writes a stub there if there is none
    python exercises/check.py tests            exercise 9: exercises/test_student.py against planted bugs
    python exercises/check.py --all            every exercise
    python exercises/check.py --all --json     results.json of Gradescope, on stdout
    ... --folder FOLDER                        the student's files are there, not in exercises/

The tests are the project's own. Exit code: 0 if all is right, 1 if not, 2 if the command makes no sense.
"""

import argparse
import ast
import importlib.util
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project instead of exercises/
from exercises import make, mutants
from exercises.targets import EXERCISES, ROOT, SECONDS, TESTS, short_name, source_file, student_file

POINTS = 10  # of an exercise

# ----------------------------------------------------------------------------------------------------------
# the student's file


def signature_and_docstring(function):
    """The source of a function up to the end of its docstring, from the project's own file, unindented."""
    text = (ROOT / source_file(function)).read_text(encoding="utf-8")
    node = make.find(ast.parse(text), function.split(":")[1])
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)]) - 1
    lines = text.splitlines()[first : make.body_lines(node).start]
    return "\n".join(line[node.col_offset :] for line in lines)


def stub(exercise):
    """What a student begins with."""
    files = sorted({source_file(function) for function in exercise.functions})
    head = f'"""Exercise {exercise.number}, {exercise.name}: write the functions of {" and ".join(files)}.'
    how = f'The page: exercises/README.md. The check: python exercises/check.py {exercise.name}\n"""'
    imports = ["import torch"]
    if exercise.needs == "triton":
        imports += ["import triton", "from triton import language as tl"]
    body = "    raise NotImplementedError  # yours"
    functions = [f"{signature_and_docstring(function)}\n{body}" for function in exercise.functions]
    return "\n\n\n".join([f"{head}\n\n{how}\n\n" + "\n".join(imports), *functions]) + "\n"


def complaint(exercise, path):
    """What is wrong with a student's file at first sight, None if nothing is."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except SyntaxError as error:
        return f"{path.name}, line {error.lineno}, is no Python: {error.msg}"
    except (OSError, UnicodeDecodeError, ValueError) as error:
        return f"{path.name} cannot be read as text: {error}"
    written = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    for function in exercise.functions:
        name = short_name(function)
        if name not in written:
            return f"{path.name} defines no function {name}"
        wanted = parameters(ast.parse(signature_and_docstring(function)).body[0])
        taken = parameters(written[name])
        if taken != wanted:
            return f"{name} takes ({', '.join(taken)}) and should take ({', '.join(wanted)})"
    return None


def parameters(node):
    """The names of a function's parameters, those with defaults as "name=default"."""
    arguments = node.args
    positional = [*arguments.posonlyargs, *arguments.args]
    defaults = [None] * (len(positional) - len(arguments.defaults)) + arguments.defaults
    pairs = [
        *zip(positional, defaults, strict=True),
        *zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True),
    ]
    return [each.arg if default is None else f"{each.arg}={ast.unparse(default)}" for each, default in pairs]


# ----------------------------------------------------------------------------------------------------------
# the worker: jobs one by one, each with its limit of CPU time


class Worker:
    """worker.py as a subprocess, started when it is needed and anew after a job that did not end."""

    def __init__(self, scratch, seconds=SECONDS):
        self.scratch, self.seconds, self.process = scratch, seconds, None
        self.cpu_seconds = 0.0  # of all jobs

    def run(self, job):
        if self.process is None:
            self.start()
        self.process.stdin.write(json.dumps({**job, "seconds": self.seconds}) + "\n")
        self.process.stdin.flush()
        try:
            line = self.lines.get(timeout=10 * self.seconds)  # by the clock: it may wait for ever
        except queue.Empty:
            line = None
        if line:
            result = json.loads(line)
            self.cpu_seconds += result["seconds"]
            return result
        code = self.process.wait() if line == "" else None
        self.stop()
        return {"status": "timeout" if code in (None, -signal.SIGPROF) else "died"}

    def start(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false",
                       "HF_HUB_OFFLINE": "1", "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1",
                       "TRITON_CACHE_DIR": self.scratch, "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
        environment.pop("PYTEST_ADDOPTS", None), environment.pop("PYTEST_CURRENT_TEST", None)
        line = [sys.executable, str(ROOT / "exercises" / "worker.py")]
        self.process = subprocess.Popen(line, env=environment,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)  # fmt: skip
        self.lines = queue.Queue()
        threading.Thread(target=self.read, args=(self.process, self.lines), daemon=True).start()
        self.lines.get(timeout=600)  # it says that it is ready: importing torch is not the student's time

    def read(self, process, lines):
        for line in process.stdout:
            lines.put(line)
        lines.put("")  # it has ended

    def stop(self):
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None


# ----------------------------------------------------------------------------------------------------------
# the checks, in words


def check(name, folder, worker):
    """Check one exercise: {"name", "passed", "score", "text", "seconds" of CPU}."""
    began = worker.cpu_seconds
    if name == "tests":
        score, text = check_tests(Path(folder) / TESTS, worker)
        number = len(EXERCISES) + 1
    else:
        exercise = EXERCISES[name]
        number = exercise.number
        text = check_exercise(exercise, folder, worker)
        score = POINTS if text is None else 0
    passed = score == POINTS
    return {"name": f"{number} {name}", "passed": passed, "score": score,
            "text": text or "all of its tests pass", "seconds": worker.cpu_seconds - began}  # fmt: skip


def check_exercise(exercise, folder, worker):
    """None if all tests pass, else what is wrong."""
    path = student_file(exercise, folder)
    if not path.exists():
        path.write_text(stub(exercise), encoding="utf-8")
        return f"{path.name} did not exist: a stub is there now, write the body and check again"
    if exercise.needs and importlib.util.find_spec(exercise.needs) is None:
        return (
            f"it needs {exercise.needs}, which is not installed and exists for Linux only (WSL and Colab too)"
        )
    wrong = complaint(exercise, path)
    if wrong:
        return wrong
    result = worker.run({"exercise": exercise.name, "folder": str(path.parent.resolve())})
    return None if result["status"] == "passed" else in_words(result, path)


def in_words(result, path):
    """Why a check failed, a sentence or a few."""
    status, where = result["status"], f"{path.name}, line {result.get('line')},"
    if status == "timeout":
        return f"it did not end within {SECONDS} s: is there a loop that never ends?"
    if status == "died":
        return "the process ended before the tests did: does the file call exit()?"
    if status == "broken":
        return f"{where} cannot be imported: {result['raised']}: {result['message']}"
    test = result["test"].split("::")[-1].removeprefix("test_").replace("_", " ")
    if result["raised"] == "NotImplementedError":
        return f"{path.name} is not written yet: a function still raises NotImplementedError"
    if result["inside"] and result["raised"] != "AssertionError":
        said = f"{where} raises {result['raised']}: {result['message']} (in the test: {test})"
    else:
        about = f" ({result['about']})" if result["about"] else ""
        said = f"this test fails, {result['passed']} passed before it: {test}{about}\n  {result['message']}"
    return "\n".join([said, *(f"  -> {hint}" for hint in result.get("hints", []))])


def check_tests(path, worker):
    """(score, text) of a student's file of tests: the share of the planted bugs that make a test fail."""
    if not (ROOT / mutants.MUTANTS).exists():
        return (
            0,
            "exercise 9 needs the whole project: a hand-out holds neither the functions nor the planted bugs",
        )
    if not path.exists():
        path.write_text(
            '"""Exercise 9: tests that pass, and fail where a bug is planted."""\n', encoding="utf-8"
        )
        return 0, f"{path.name} did not exist: an empty one is there now, write tests and check again"
    job = {"mutant": None, "tests": str(path.resolve())}
    result = worker.run(job)
    if result["status"] != "passed":
        why = in_words(result, path)
        return 0, f"on the real functions every test has to pass, but {why}"
    outcomes = {diff: worker.run({**job, "mutant": str(diff)})["status"] for diff in mutants.diffs()}
    alive = [mutants.function_of(diff) for diff, status in outcomes.items() if status == "passed"]
    score = round(POINTS * (1 - len(alive) / len(outcomes)), 1)
    survivors = "".join(f"\n  {alive.count(name)} in {name}" for name in sorted(set(alive)))
    killed = f"{len(outcomes) - len(alive)} of {len(outcomes)} planted bugs are caught"
    return score, killed + (f"; not caught:{survivors}" if alive else "")


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
    names = [*EXERCISES, "tests"] if args.all else [args.name]
    results = []
    with tempfile.TemporaryDirectory() as scratch:
        worker = Worker(scratch)
        try:
            for name in names:
                results.append(check(name, args.folder, worker))
                if not args.json:
                    mark = "right" if results[-1]["passed"] else "not right yet"
                    print(f"exercise {results[-1]['name']}: {mark}: {results[-1]['text']}", flush=True)
        finally:
            worker.stop()
    if args.json:
        print(json.dumps(gradescope(results), indent=1))
    return 0 if all(result["passed"] for result in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
