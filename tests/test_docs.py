"""README.md and docs/: links, files, commands, the names to change, and the metrics of a real run."""

import dataclasses
import doctest
import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, environment, lines_of, program

import ttrl
from support.config import Config, configure, flag_name, parse

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [block for page in PAGES for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)]
COMMANDS = sorted({line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines()
                   if re.match(r"(bash|python|torchrun|pip) ", line)})  # fmt: skip
RUN_FILES = set("""config.json metrics.jsonl rollouts.jsonl votes.jsonl curves.png report.html summary.json
    checkpoint model .lock .owner""".split())  # fmt: skip
TRAIN_FLAGS = {"--nproc", "--nnodes", "--rdzv-endpoint", "--local-addr", "--max-restarts"}
FIRST_CARD_FLAGS = {"--seconds", "--until", "--from", "--retry-failed", "--dry", "--deadline"}
OTHER_FLAGS = set("""--no-offload --no-checkpointing --nproc-per-node --rdzv-backend --help
    --no-build-isolation --cases --models --tasks --rewards --seeds --check --what""".split())  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    local = [target for target in targets if not target.startswith("http")]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_names_to_change_exist():
    table = (ROOT / "README.md").read_text().split("## If you want to change")[1].split("##")[0]
    names = re.findall(r"`((?:ttrl|grading|report|support|kernels|model)\.[\w.]+)`", table)
    assert len(names) >= 12
    for name in names:
        module, attribute = name.rsplit(".", 1)
        assert hasattr(importlib.import_module(module), attribute), name


@pytest.mark.parametrize("bench", sorted(path.name for path in (ROOT / "bench").glob("*.py")))
def test_every_bench_says_what_it_does(bench):
    """With all that it imports."""
    if "parse_args()" in (ROOT / "bench" / bench).read_text():
        line = [sys.executable, ROOT / "bench" / bench, "--help"]
        shown = subprocess.run(line, capture_output=True, text=True)
        assert shown.returncode == 0 and "--" in shown.stdout, shown.stderr


def test_commands_are_found():
    assert any("--nproc" in command for command in COMMANDS) and len(COMMANDS) >= 4


@pytest.mark.parametrize("command", [c for c in COMMANDS if "ttrl.py" in c or "train.sh" in c])
def test_the_flags_of_every_command_are_right(command):
    words = shlex.split(command)
    names = [index for index, word in enumerate(words) if word.endswith(("ttrl.py", "train.sh"))]
    flags = [word for word in words[names[0] + 1 :] if word not in ("MODEL",)]
    for name in TRAIN_FLAGS.intersection(flags):
        del flags[flags.index(name) : flags.index(name) + 2]
    configure(parse(flags, ttrl.REWARDS))


def test_the_readmes_first_command_starts(tmp_path):
    """From another folder, with the environment that runs the tests."""
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    line = ["bash", str(ROOT / "train.sh"), "--dry-run", "--nproc", "1"]
    env = {**environment(), "PATH": path}
    done = subprocess.run(line, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "model    tiny" in done.stdout, done.stderr


def code(page):
    """What stands in backticks on a page, with line breaks as spaces; code blocks are left out."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return [" ".join(text.split()) for text in re.findall(r"`([^`]+)`", prose)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_file_and_flag_that_a_page_names_exists(page):
    words = [word.strip(",;:()") for text in code(page) for word in text.split()]
    files = {word for word in words if re.fullmatch(r"[\w./-]+\.(py|sh|md|png|toml|txt)", word)} - RUN_FILES
    assert [name for name in files if not ((ROOT / name).exists() or (page.parent / name).exists())] == []
    flags = set(re.findall(r"--[a-z][a-z-]*", page.read_text(encoding="utf-8")))
    known = {flag_name(field.name) for field in dataclasses.fields(Config)}
    assert flags - known - TRAIN_FLAGS - FIRST_CARD_FLAGS - OTHER_FLAGS == set()


def test_the_six_steps_name_functions():
    steps = (ROOT / "README.md").read_text().split("## One step")[1].split("\n## ")[0]
    names = re.findall(r"`([a-z_]+)`", steps)
    assert len(names) >= 8 and [name for name in names if not hasattr(ttrl, name)] == []


def test_the_python_prompt_of_the_readme(monkeypatch):
    monkeypatch.chdir(ROOT)
    block = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    test = doctest.DocTestParser().get_doctest(block, {}, "README.md", "README.md", 0)
    result = doctest.DocTestRunner().run(test)
    assert result.attempted >= 10 and result.failed == 0


def test_the_picture_of_a_step_can_be_drawn(tmp_path):
    done = program("--out", tmp_path / "step.png", script="docs/one_step.py")
    assert "32 of 64 samples agree on 29" in done.stdout and (tmp_path / "step.png").stat().st_size > 20_000


def test_the_metrics_and_files_of_a_run_are_explained(few_questions, tmp_path):
    out = tmp_path / "run"
    program("--data", few_questions, "--out", out, *SMALL, "--kl", "0.01")
    table, files = (ROOT / "docs" / "metrics.md").read_text().split("## Files")
    cells = [line.split("|")[1] for line in table.splitlines() if line.startswith("|")]
    explained = {name.removesuffix("_se") for cell in cells for name in re.findall(r"`([^`]+)`", cell)} - {""}
    names = {name for line in lines_of(out / "metrics.jsonl") for name in line} - {"step", "epoch"}
    written = {name.split("/", 1)[1].removesuffix("_se") for name in names}
    written = {re.sub(r"@(?!1$|1 )\d+$", "@N", name) for name in written}
    assert written == explained
    assert {path.name for path in out.iterdir()} == RUN_FILES
    named = {name.strip("/") for name in re.findall(r"`([\w./]+)`", files)}
    assert named >= RUN_FILES
