"""exercises/: the project's own functions pass, wrong ones get a hint, a hand-out gives nothing away."""

import ast
import importlib
import json
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
from conftest import ROOT, SMALL, environment, lines_of, program
from wrong_solutions import CHANGED, WHOLE

from exercises import check, make, worker
from exercises.targets import EXERCISES, LEFT_OUT, TESTS, short_name, source_file, student_file


def solution(exercise):
    """A student's file with the project's own functions, and the names of their modules that they use."""
    imports, parts = set(), []
    for function in exercise.functions:
        module, qualified_name = function.split(":")
        text = (ROOT / source_file(function)).read_text("utf-8")
        node = make.find(ast.parse(text), function)
        used = {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
        used |= set(qualified_name.split(".")[:-1])  # the class of a method, which a student may look at
        used &= vars(importlib.import_module(module)).keys() - set(map(short_name, exercise.functions))
        imports |= {f"from {module} import {name}" for name in used}
        lines = text.splitlines()[node.lineno - 1 - len(node.decorator_list) : node.end_lineno]
        parts.append("\n".join(line[node.col_offset :] for line in lines))
    return "\n\n\n".join(["\n".join(sorted(imports)), *parts]) + "\n"


def wrong_solutions():
    """(exercise, name, text of the student's file, words) of each."""
    found = [(e, name, *wrong) for e, by_name in WHOLE.items() for name, wrong in by_name.items()]
    changes = [(e, name, *change) for e, by_name in CHANGED.items() for name, change in by_name.items()]
    for bug in check.bugs():
        exercises = [e.name for e in EXERCISES.values() if bug["function"] in e.functions]
        changes += [(e, bug["bug"], bug["old"], bug["new"], bug["hint"]) for e in exercises if "hint" in bug]
    for exercise, name, old, new, words in changes:
        right = solution(EXERCISES[exercise])
        assert right.count(old) == 1, f"{exercise}, {name}: {right.count(old)} times in the solution"
        found.append((exercise, name, right.replace(old, new), words))
    return found


WRONG = wrong_solutions()


def test_every_exercise_has_three_wrong_solutions():
    counts = [sum(wrong[0] == name for wrong in WRONG) for name in EXERCISES]
    assert min(counts) >= 3


@pytest.mark.parametrize("name, about, text, words", WRONG, ids=[f"{w[0]}-{w[1]}" for w in WRONG])
def test_a_wrong_solution_is_told_the_concept(name, about, text, words, tmp_path):
    student_file(EXERCISES[name], tmp_path).write_text(text)
    result = check.check(name, tmp_path)
    hint = result["text"].split("\n  -> ", 1)
    assert not result["passed"] and len(hint) == 2 and words in hint[1], result["text"]
    assert "Traceback" not in result["text"] and len(result["text"].splitlines()) <= 4


# ----------------------------------------------------------------------------------------------------------
# what else can be wrong with a student's file

RIGHT = """import grading


def vote(answers, kind="math"):
    classes = []
    for index, answer in enumerate(answers):
        same = [c for c in classes if answer and grading.same_answer(answers[c[0]], answer, kind)]
        if same:
            same[0].append(index)
        elif answer:
            classes.append([index])
    members = max(classes, key=len, default=[])
    return max((answers[i] for i in members), key=[answers[i] for i in members].count, default=None), classes
"""


@pytest.mark.parametrize(
    "text, words",
    [
        (RIGHT, "all of its tests pass"),
        ("def vote(answers:\n", "vote.py, line 1, is not valid Python"),
        ("def votes(answers):\n    pass\n", "vote.py defines no function vote"),
        ("def vote(answers):\n    pass\n", "vote takes (answers) and should take (answers, kind='math')"),
        ("import numbers_\n" + RIGHT, "vote.py, line 1, cannot be imported: ModuleNotFoundError"),
        (
            RIGHT.replace("classes = []", "classes = 1 / 0"),
            "vote.py, line 5, raises ZeroDivisionError: division by zero",
        ),
        (RIGHT.replace("classes = []", "raise NotImplementedError"), "is not written yet"),
        (RIGHT.replace("classes = []", "import os; os._exit(0)"), "the process ended before the tests did"),
        (RIGHT.replace("classes = []", "while True: pass"), "is there a loop that never ends?"),
    ],
)
def test_a_broken_file_is_one_sentence(text, words, tmp_path, monkeypatch):
    if "while" in text:
        monkeypatch.setattr(worker, "SECONDS", 5)
    student_file(EXERCISES["vote"], tmp_path).write_text(text)
    said = check.check("vote", tmp_path)["text"]
    assert words in said and len(said.splitlines()) == 1, said


def test_a_stub_has_signature_docstring_and_no_body():
    for exercise in EXERCISES.values():
        tree = ast.parse(check.stub(exercise))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        assert [node.name for node in functions] == [short_name(function) for function in exercise.functions]
        assert all(ast.get_docstring(node) and isinstance(node.body[-1], ast.Raise) for node in functions)
        assert all(len(node.body) == 2 for node in functions)


def run_check(*arguments, root=ROOT):
    line = [sys.executable, str(root / "exercises" / "check.py"), *map(str, arguments)]
    return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=900, cwd="/")


@pytest.mark.parametrize("arguments", [[], ["votes"], ["vote", "--all"], ["vote", "--folder", "/nowhere"]])
def test_a_command_without_sense_ends_with_2(arguments):
    done = run_check(*arguments)
    assert done.returncode == 2 and "check.py: error:" in done.stderr and "Traceback" not in done.stderr


def test_the_page_has_a_section_for_each_exercise():
    page = (ROOT / "exercises" / "README.md").read_text("utf-8")
    sections = re.findall(r"^## (\d) (\w+)\n\n(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    wanted = [(str(e.number), e.name) for e in EXERCISES.values()] + [("9", "tests")]
    assert [section[:2] for section in sections] == wanted
    for number, name, text in sections:
        assert re.findall(r"^\*\*([\w ]+)\.\*\*", text, re.MULTILINE) == PARTS
        idea, questions = text.split("\n\n")[0], text.split("**Questions.**")[1]
        assert len(idea.splitlines()) <= 5 and f"`python exercises/check.py {name}`" in text
        assert re.findall(r"^(\d)\. ", questions, re.MULTILINE) == ["1", "2"]
        assert re.search(rf"^\| {number} \| \[{name}\]\(#{number}-{name}\) \| \d+ \|", page, re.MULTILINE)


PARTS = ["Idea", "Formula", "By hand", "Yours", "Questions"]


@pytest.mark.parametrize("page", ["README.md", "teacher.md"])
def test_every_link_and_file_of_the_pages_exists(page):
    text = (ROOT / "exercises" / page).read_text("utf-8")
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if not target.startswith("http")]
    assert [target for target in links if not (ROOT / "exercises" / target).exists()] == []
    files = set(re.findall(r"(?<![\w/.])(?:\w+/)*\w+\.(?:py|sh)\b", text)) - {"run_autograder.sh"}
    written = {f"exercises/{name}.py" for name in [*EXERCISES, "test_student"]}
    places = [ROOT, ROOT / "exercises"]
    assert [f for f in files - written if not any((place / f).exists() for place in places)] == []


def test_a_missing_package_is_named_before_anything_else(monkeypatch, capsys):
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None if name == "hypothesis" else 1)
    with pytest.raises(SystemExit) as ended:
        check.main(["vote"])
    assert ended.value.code == 2 and 'pip install ".[test]"' in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------
# the hand-out


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hand_out") / "copy"
    make.main([str(folder)])
    return folder


def test_every_target_is_blanked_and_the_copy_compiles(copy):
    assert not (copy / ".git").exists() and not any((copy / name).exists() for name in LEFT_OUT)
    for path in copy.rglob("*.py"):
        compile(path.read_text("utf-8"), str(path), "exec")
    blanks = make.blanks(EXERCISES.values())
    for file, messages in blanks.items():
        before, after = (ast.parse((root / file).read_text("utf-8")) for root in (ROOT, copy))
        for name, message in messages.items():
            old, new = make.find(before, name), make.find(after, name)
            assert ast.unparse(new.args) == ast.unparse(old.args)
            assert ast.get_docstring(new) == ast.get_docstring(old)
            assert ast.unparse(new.body[-1]) == f"raise NotImplementedError({message!r})"
            assert len(new.body) <= 2
    twins = [file for file in blanks if file.endswith("_triton.py")]  # kernels, which show what torch does
    assert twins == ["kernels/sampler_triton.py", "kernels/logprob_triton.py"]
    for file in twins:
        tree = ast.parse((copy / file).read_text("utf-8"))
        functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
        kernels = [
            node for node in functions if "triton.jit" in "".join(map(ast.unparse, node.decorator_list))
        ]
        assert len(kernels) >= 2 and all(isinstance(node.body[-1], ast.Raise) for node in kernels)


def test_nothing_else_is_changed(copy):
    changed = set(make.blanks(EXERCISES.values()))
    for name in make.tracked_files():
        same = (copy / name).read_bytes() == (ROOT / name).read_bytes()
        assert same == (name not in changed), name


def leaks(folder):
    """The files of a hand-out with a line of a blanked body, over 40 characters long."""
    lines = set()
    for file, messages in make.blanks(EXERCISES.values()).items():
        text = (ROOT / file).read_text("utf-8")
        for name in messages:
            body = make.body_lines(make.find(ast.parse(text), name))
            lines |= {line.strip() for line in text.splitlines()[body.start : body.stop]}
    lines = {line.encode() for line in lines if len(line) > 40}
    assert len(lines) > 60
    files = [path for path in folder.rglob("*") if path.is_file()]
    leaking = [path for path in files if any(map(path.read_bytes().__contains__, lines))]
    return {str(path.relative_to(folder)) for path in leaking}


def test_no_long_line_of_a_blanked_body_is_left_anywhere(copy, tmp_path, monkeypatch):
    assert leaks(copy) == set()
    monkeypatch.setattr(make, "LEFT_OUT", ())
    make.main([str(tmp_path / "all")])
    assert {"exercises/mutants.json", "tests/wrong_solutions.py"} <= leaks(tmp_path / "all")


def test_only_some_exercises_are_blanked_on_request(tmp_path):
    make.main([str(tmp_path / "copy"), "vote"])
    assert (tmp_path / "copy/rollout.py").read_text() == (ROOT / "rollout.py").read_text()
    assert 'raise NotImplementedError("exercise 1: ' in (tmp_path / "copy/ttrl.py").read_text()


@pytest.mark.parametrize("arguments, words", [
    ([], "usage"), (["{full}"], "is not empty"), (["{new}", "votes"], "no exercise is named votes"),
])  # fmt: skip
def test_make_refuses_in_one_sentence(arguments, words, tmp_path, capsys):
    (tmp_path / "full" / "folder").mkdir(parents=True)
    with pytest.raises(SystemExit) as ended:
        make.main([each.format(full=tmp_path / "full", new=tmp_path / "new") for each in arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2 and words in said and said.startswith("make.py: ") and said.count("\n") == 1


def test_the_copy_fails_each_exercise_until_its_functions_are_there_and_needs_no_other_exercise(
    copy, tmp_path
):
    """In the copy all functions are missing but those of the one exercise that is checked."""
    for said in ("it is a stub now", "is not written yet"):
        done = run_check("--all", "--json", "--folder", tmp_path, root=copy)
        *eight, ninth = json.loads(done.stdout)["tests"]
        assert done.returncode == 1 and "needs the whole project" in ninth["output"]
        assert all(said in test["output"] and len(test["output"].splitlines()) == 1 for test in eight)
    for exercise in EXERCISES.values():
        student_file(exercise, tmp_path).write_text(solution(exercise))
    results = json.loads(run_check("--all", "--json", "--folder", tmp_path, root=copy).stdout)
    assert [test["status"] for test in results["tests"]] == ["passed"] * 8 + ["failed"], results
    assert results["score"] == 80 and results["execution_time"] < worker.SECONDS  # of all eight together


def failures_in(copy, tmp_path, *tests):
    """Run tests of the copy, where each failure has to name the missing exercise: counts (passed, failed)."""
    report = tmp_path / "report.xml"
    line = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *tests]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, cwd=copy)
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    wrong = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    assert done.returncode in (0, 1), done.stdout
    said = {case.get("name"): " ".join(part.text for part in case if part.text) for case in wrong}
    assert [name for name, text in said.items() if not re.search(r"exercise \d: python", text)] == []
    return len(cases) - len(wrong), len(wrong)


def test_the_copy_passes_what_it_does_not_blank(copy, tmp_path):
    files = ["test_config", "test_linear", "test_questions", "test_algorithm"]
    passed, failed = failures_in(copy, tmp_path, *(f"tests/{file}.py" for file in files))
    assert passed > 40 and failed > 40


@pytest.mark.long
def test_the_copy_passes_what_it_does_not_blank_long(copy, tmp_path):
    """Every file of tests, but those of the environment (installing, hub) and of what needs a GPU."""
    subprocess.run(["git", "init", "--quiet", copy], check=True)
    subprocess.run(["git", "-C", copy, "add", "--all"], check=True)
    others = {f"test_{name}.py" for name in ("install", "hub", "gpu", "fake_cuda", "flash_attention", "docs")}
    files = sorted(path.name for path in (copy / "tests").glob("test_*.py") if path.name not in others)
    options = ["-m", "not long", "--deselect", "tests/test_kernels.py::test_triton[kernels_compiled.py-0]"]
    passed, failed = failures_in(copy, tmp_path, *options, *(f"tests/{name}" for name in files))
    assert passed > 800 and failed > 100


# ----------------------------------------------------------------------------------------------------------
# swapped into the real program, and the ninth exercise

UNANIMOUS = """
from ttrl import Response  # of the program that is running

def vote(answers, kind="math"):
    return "25", [list(range(len(answers)))]
"""


def test_the_real_program_runs_with_a_students_function(few_questions, tmp_path, monkeypatch):
    monkeypatch.setenv("EXERCISES", "vote")
    monkeypatch.setenv("EXERCISES_FOLDER", str(tmp_path))
    student_file(EXERCISES["vote"], tmp_path).write_text(UNANIMOUS)
    program("--data", few_questions, "--out", tmp_path / "run", *SMALL, "--epochs", "1")
    steps = [line for line in lines_of(tmp_path / "run" / "metrics.jsonl") if "train/majority_ratio" in line]
    assert len(steps) == 2 and all(line["train/majority_ratio"] == 1 for line in steps)


def test_the_real_tests_run_with_a_students_function(tmp_path):
    student_file(EXERCISES["vote"], tmp_path).write_text(UNANIMOUS)
    inside = {**environment(), "EXERCISES": "vote", "EXERCISES_FOLDER": str(tmp_path)}
    options = ["-p", "exercises.swap", "-p", "no:cacheprovider", "-k", "test_vote"]
    line = [sys.executable, "-m", "pytest", *options, "tests/test_algorithm.py"]
    done = subprocess.run(line, env=inside, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "13 failed" in done.stdout, done.stdout


def test_swap_refuses_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("EXERCISES_FOLDER", str(tmp_path))
    for name, words in (("votes", "no exercise is named votes"), ("vote", "there is no exercises/vote.py")):
        line = [sys.executable, str(ROOT / "exercises" / "swap.py"), name, "ttrl.py", "--dry-run"]
        done = subprocess.run(line, env=environment(), capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1, done.stderr


def test_a_good_file_of_tests_catches_every_planted_bug(tmp_path):
    assert len(check.bugs()) >= 20
    shutil.copy(ROOT / "tests" / "mutant_killers.py", tmp_path / TESTS)
    result = check.check("tests", tmp_path)
    assert result["passed"] and result["score"] == check.POINTS, result["text"]
    assert result["seconds"] < worker.SECONDS


def test_a_bug_whose_text_has_changed_is_not_taken_for_a_caught_one(tmp_path, monkeypatch):
    monkeypatch.setattr(
        check, "bugs", lambda: [{"function": "ttrl:vote", "bug": "A.", "old": "?", "new": ""}]
    )
    (tmp_path / TESTS).write_text("def test_nothing():\n    pass\n")
    with pytest.raises(ValueError, match="occurs 0 times"):
        check.check("tests", tmp_path)


def test_tests_that_fail_on_the_real_functions_or_say_nothing_get_no_points(tmp_path, monkeypatch):
    text = "import ttrl\n\ndef test_vote():\n    assert ttrl.vote([{0}])[0] == '4'\n"
    (tmp_path / TESTS).write_text(text.format("'5'"))
    result = check.check("tests", tmp_path)
    assert result["score"] == 0 and "every test has to pass on the real functions" in result["text"]
    few = [bug for bug in check.bugs() if bug["function"] == "ttrl:vote"]
    monkeypatch.setattr(check, "bugs", lambda: few)
    (tmp_path / TESTS).write_text(text.format("'4', None"))
    result = check.check("tests", tmp_path)
    assert result["score"] == 0 and f"not caught:\n  {len(few)} in ttrl.vote" in result["text"]
