"""Run the tests of an exercise in a process of its own, and say in words why they fail.

Each process is forked from a server that has imported the libraries: it starts at once, imports the project
and the student's file anew, and leaves nothing behind.
"""

import importlib
import multiprocessing
import os
import signal
import sys
import time
import traceback
from unittest import mock

from exercises import swap
from exercises.targets import EXERCISES, ROOT, student_file

SECONDS = 60  # of CPU that one exercise, or one planted bug, may take
FORKS = multiprocessing.get_context("forkserver")
SLOW_TO_IMPORT = "torch.distributed.fsdp transformers.modeling_utils triton sympy mpmath pytest hypothesis"
FORKS.set_forkserver_preload(SLOW_TO_IMPORT.split())
ENVIRONMENT = dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1",
                   TRITON_INTERPRET="1", TRITON_DEFAULT_FP_FUSION="1", TTRL_C="0")  # fmt: skip


def run(job, *arguments):
    """Run a function of this module: (what is wrong, None if nothing is, and the seconds of CPU it took)."""
    answer, end = FORKS.Pipe(duplex=False)
    process = FORKS.Process(target=answered, args=(end, SECONDS, job, *arguments))
    with mock.patch.dict(os.environ, ENVIRONMENT):  # which the server keeps
        process.start()
    end.close()
    try:
        late = not answer.poll(10 * SECONDS)  # by the clock: it may sleep forever
        if not late:
            return answer.recv()
    except EOFError:
        process.join()
        late = process.exitcode == -signal.SIGPROF
    finally:
        process.kill()
        process.join()
    if late:
        return f"it did not end within {SECONDS} s: is there a loop that never ends?", SECONDS
    return "the process ended before the tests did: does the file call exit()?", 0


def answered(end, seconds, job, *arguments):
    """The process: do the job and send its answer, but stop after so many seconds of CPU, in C code too."""
    signal.setitimer(signal.ITIMER_PROF, seconds)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):  # what tests and students print
        os.dup2(nowhere, output)
    for name in ("PYTEST_ADDOPTS", "PYTEST_CURRENT_TEST"):
        os.environ.pop(name, None)
    os.chdir(ROOT)
    sys.dont_write_bytecode = True  # or an edit within the same second would go unnoticed
    import torch

    torch.set_num_threads(1)
    wrong = job(*arguments)
    signal.setitimer(signal.ITIMER_PROF, 0)
    end.send((wrong, time.process_time()))


def check_functions(name, folder):
    """Run the tests of an exercise with the student's functions. Where they fail, look for known mistakes."""
    exercise = EXERCISES[name]
    path = student_file(exercise, folder)
    try:
        swap.swap(exercise, folder)
    except BaseException as error:
        lines = [at.lineno for at in traceback.extract_tb(error.__traceback__) if at.filename == str(path)]
        line = lines[-1] if lines else getattr(error, "lineno", None)
        said = str(error).split("\n")[0]
        return f"{path.name}, line {line}, cannot be imported: {type(error).__name__}: {said}"
    wrong = first_failure(path, exercise.tests)
    if wrong is None:
        return None
    from exercises import hints  # which imports the project: not before the swap

    return "\n".join([wrong, *(f"  -> {hint}" for hint in hints.recognised(name))])


def check_tests(path, bug=None):
    """Run a file of tests on the project as it is, or with a planted bug: (module, its changed source)."""
    if bug:
        module = importlib.import_module(bug[0])
        exec(compile(bug[1], module.__file__, "exec"), vars(module))
    return first_failure(path, [str(path)])


def first_failure(path, tests):
    """None if tests pass, else in words what is wrong first, where a student's file is at `path`."""
    import pytest

    words = Words(path)
    options = ["-x", "-q", "--no-header", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    code = pytest.main([*options, *tests], plugins=[words])
    return None if code == 0 and words.passed else words.wrong or "no test ran"


class Words:
    """A pytest plugin: how many tests passed, and in words what went wrong first."""

    def __init__(self, path):
        self.path, self.passed, self.wrong = path, 0, None

    def pytest_runtest_logreport(self, report):
        self.passed += report.when == "call" and report.passed

    def pytest_exception_interact(self, node, call, report):
        self.wrong = self.wrong or self.in_words(node, call.excinfo)

    def in_words(self, node, excinfo):
        error = excinfo.value.__cause__ or excinfo.value  # Triton's interpreter wraps what a kernel raises
        raised, said = type(error).__name__, str(error).strip().split("\n")[0][:300]
        places = [(str(entry.path), entry.lineno + 1) for entry in excinfo.traceback]
        lines = [line for path, line in places if path == str(self.path)]
        test = node.name.removeprefix("test_").replace("_", " ")
        if raised == "NotImplementedError":
            return f"{self.path.name} is not written yet: a function still raises NotImplementedError"
        if raised != "AssertionError" and places[-1][0] == str(self.path):
            where = f"{self.path.name}, line {lines[-1]},"
            return f"{where} raises {raised}: {said or raised} (in the test: {test})"
        about = (getattr(getattr(node, "obj", None), "__doc__", None) or "").strip().split("\n")[0]
        about = f" ({about})" if about else ""
        return f"this test fails, {self.passed} passed before it: {test}{about}\n  {said or raised}"
