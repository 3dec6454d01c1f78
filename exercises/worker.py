"""Run the tests of exercises one after the other in one process, in which torch is imported once.

check.py starts this file, writes jobs to its stdin, a line of JSON each, and reads a line back for each. A
job is {"exercise": name, "folder": of the student's files} or {"mutant": path of a diff or null, "tests":
file}, and "seconds" of CPU after which the system ends this process. An answer has "status", "passed",
"seconds" of CPU, and where a test failed also what `described` returns, and "hints".
"""

import importlib
import json
import os
import signal
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # the project instead of exercises/
import pytest

from exercises import hints, mutants, swap
from exercises.targets import EXERCISES, ROOT, student_file

OPTIONS = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]


class Collector:
    """A pytest plugin: how many tests passed, and what went wrong first."""

    def __init__(self, student):
        self.student, self.passed, self.first = str(student), 0, None

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed

    def pytest_exception_interact(self, node, call, report):
        self.first = self.first or self.described(node, call.excinfo)

    def described(self, node, excinfo):
        """What failed. line: the last one of the student's file; inside: it went wrong in that file."""
        error = excinfo.value
        lines = [entry.lineno + 1 for entry in excinfo.traceback if str(entry.path) == self.student]
        inside = bool(lines) and str(excinfo.traceback[-1].path) == self.student
        about = (getattr(getattr(node, "obj", None), "__doc__", None) or "").strip().split("\n")[0]
        text = str(error).strip() or type(error).__name__
        raised = type(error).__name__
        if cause := getattr(error, "__cause__", None):  # Triton's interpreter wraps what a kernel raises
            raised, text = type(cause).__name__, str(cause)
        return {"test": node.nodeid, "about": about, "raised": raised, "message": text.split("\n")[0][:300],
                "line": lines[-1] if lines else None, "inside": inside}  # fmt: skip


def outcome(code, collector):
    status = "passed" if code == 0 and collector.passed else "failed"
    result = {"status": status, "passed": collector.passed}
    if status == "passed":
        return result
    nothing = {"test": "", "about": "", "raised": "", "message": "no test ran", "line": None, "inside": False}
    return {**result, **(collector.first or nothing)}


def check_exercise(name, folder):
    """Run the tests of an exercise with the student's functions; where they fail, look for known mistakes."""
    exercise = EXERCISES[name]
    path = student_file(exercise, folder)
    os.environ.update(EXERCISES=name, EXERCISES_FOLDER=str(folder))
    swap.install()
    try:
        for function in exercise.functions:
            importlib.import_module(function.split(":")[0])
    except BaseException as error:
        return broken(error, path)
    collector = Collector(path)
    code = pytest.main([*OPTIONS, *exercise.tests], plugins=[collector])
    result = outcome(code, collector)
    if result["status"] == "failed":
        result["hints"] = hints.recognised(name)
    return result


def broken(error, path):
    """The student's file cannot even be imported."""
    lines, trace = [], error.__traceback__
    while trace:
        if trace.tb_frame.f_code.co_filename == str(path):
            lines.append(trace.tb_lineno)
        trace = trace.tb_next
    line = lines[-1] if lines else getattr(error, "lineno", None)
    return {
        "status": "broken",
        "raised": type(error).__name__,
        "message": str(error).split("\n")[0],
        "line": line,
    }


def check_tests(mutant, tests):
    """Run a file of tests on the project as it is, or with a planted bug."""
    if mutant:
        module, text = mutants.planted(Path(mutant))
        sys.meta_path.insert(0, swap.Replacing([module], lambda module: mutants.plant(module, text)))
    collector = Collector(tests)
    return outcome(pytest.main([*OPTIONS, str(tests)], plugins=[collector]), collector)


def forget(folder):
    """Undo a job: no finder of ours, and the next one imports the project and the student's files anew."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, swap.Replacing)]
    for name in ("EXERCISES", "EXERCISES_FOLDER"):
        os.environ.pop(name, None)
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is None or name.startswith(("exercises", "__main__")):
            continue
        if belongs(Path(file), ROOT) or belongs(Path(file), folder):
            del sys.modules[name]


def belongs(file, folder):
    """Does a file stand in a folder, but not in its .venv?"""
    return file.is_relative_to(folder) and not file.relative_to(folder).parts[0].startswith(".")


def main():
    """Answer jobs on the descriptor that was stdout; what tests and students print goes nowhere."""
    answers = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1), os.dup2(nowhere, 2)
    os.chdir(ROOT)
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        job, began = json.loads(line), time.process_time()
        signal.setitimer(signal.ITIMER_PROF, job["seconds"])  # SIGPROF ends the process, in C code too
        if "exercise" in job:
            folder = Path(job["folder"])
            result = check_exercise(job["exercise"], folder)
        else:
            folder = Path(job["tests"]).parent
            result = check_tests(job["mutant"], Path(job["tests"]))
        signal.setitimer(signal.ITIMER_PROF, 0)
        forget(folder)
        print(json.dumps({**result, "seconds": time.process_time() - began}), file=answers, flush=True)


if __name__ == "__main__":
    main()
