"""exercises/: the project's own functions pass, wrong ones get a message, a hand-out gives nothing away."""

import ast
import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT, environment, program
from wrong_solutions import CHANGED, WHOLE

from exercises import check, hints, make, mutants
from exercises.targets import EXERCISES, LEFT_OUT, SECONDS, TESTS, short_name, source_file, student_file


def solution(exercise):
    """The text of a student's file that holds the project's own functions, and the imports that they need."""
    parts, imports = [], set()
    for function in exercise.functions:
        text = (ROOT / source_file(function)).read_text("utf-8")
        tree = ast.parse(text)
        node = make.find(tree, function.split(":")[1])
        used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        imports |= {line for top in tree.body for line in needed(top, function.split(":")[0], used)}
        lines = text.splitlines()[node.lineno - 1 - len(node.decorator_list) : node.end_lineno]
        parts.append("\n".join(line[node.col_offset :] for line in lines))
    own = {f" import {short_name(function)}" for function in exercise.functions}
    return "\n\n\n".join(["\n".join(sorted(line for line in imports if not line.endswith(tuple(own)))), *parts]) + "\n"


def needed(node, module, used):
    """Lines that import the names that a statement of a module binds, if they are used."""
    if isinstance(node, ast.Try):
        return [line for inner in node.body for line in needed(inner, module, used)]
    if isinstance(node, ast.Import):
        return [ast.unparse(node)] if {(a.asname or a.name).split(".")[0] for a in node.names} & used else []
    if isinstance(node, ast.ImportFrom):
        named = [a for a in node.names if (a.asname or a.name) in used]
        return [ast.unparse(ast.ImportFrom(node.module, [a], 0)) for a in named]
    bound = {node.name} if isinstance(node, (ast.FunctionDef, ast.ClassDef)) else set()
    if isinstance(node, ast.Assign):
        bound = {target.id for target in node.targets if isinstance(target, ast.Name)}
    return [f"from {module} import {name}" for name in sorted(bound & used)]


def wrong_solutions():
    """(exercise, name, text of the student's file, words) of each."""
    for exercise, wrong in WHOLE.items():
        for name, (text, words) in wrong.items():
            yield exercise, name, text, words
    for exercise, wrong in CHANGED.items():
        right = solution(EXERCISES[exercise])
        for name, (old, new, words) in wrong.items():
            assert right.count(old) == 1, f"{exercise}, {name}: {right.count(old)} times in the solution"
            yield exercise, name, right.replace(old, new), words


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    # What is promised is said in CPU-seconds, since this machine may be busy.
    worker = check.Worker(str(tmp_path_factory.mktemp("scratch")), seconds=10 * SECONDS)
    yield worker
    worker.stop()


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=lambda exercise: exercise.name)
def test_the_projects_own_functions_pass(exercise, worker, tmp_path):
    student_file(exercise, tmp_path).write_text(solution(exercise))
    result = check.check(exercise.name, tmp_path, worker)
    assert result["passed"], result["text"]
    assert result["seconds"] < SECONDS


WRONG = list(wrong_solutions())


def test_every_exercise_has_three_wrong_solutions():
    counts = [sum(wrong[0] == name for wrong in WRONG) for name in EXERCISES]
    assert min(counts) >= 3


@pytest.mark.parametrize("name, about, text, words", WRONG, ids=[f"{w[0]}-{w[1]}" for w in WRONG])
def test_a_wrong_solution_is_told_the_concept(name, about, text, words, worker, tmp_path):
    student_file(EXERCISES[name], tmp_path).write_text(text)
    result = check.check(name, tmp_path, worker)
    hint = result["text"].split("\n  -> ", 1)
    assert not result["passed"] and len(hint) == 2 and words in hint[1], result["text"]
    assert "Traceback" not in result["text"] and len(result["text"].splitlines()) <= 4
