"""README.md and docs/: links, files, commands, the names to change, and the metrics of a real run."""

import importlib
import os
import re
import shlex
import subprocess
import sys

import pytest
from conftest import ROOT, SMALL, environment, lines_of, program

import ttrl
from support.config import configure, parse

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [
    (page, block) for page in PAGES for block in re.findall(r"```\n(.*?)```", page.read_text(), re.DOTALL)
]
COMMANDS = sorted({line.split("  #")[0].strip() for _, block in BLOCKS for line in block.splitlines()
                   if re.match(r"(bash|python|torchrun|pip) ", line)})  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    local = [target for target in targets if not target.startswith("http")]
    assert [target for target in local if not (page.parent / target).exists()] == []


def test_the_names_to_change_exist():
    table = (ROOT / "README.md").read_text().split("## If you want to change")[1].split("##")[0]
    names = re.findall(r"`((?:ttrl|support|kernels|model)\.[\w.]+)`", table)
    assert len(names) >= 12
    for name in names:
        module, attribute = name.rsplit(".", 1)
        assert hasattr(importlib.import_module(module), attribute), name


def test_commands_are_found():
    assert any("--nproc" in command for command in COMMANDS) and len(COMMANDS) >= 4


@pytest.mark.parametrize("command", [c for c in COMMANDS if "ttrl.py" in c or "train.sh" in c])
def test_the_flags_of_every_command_are_right(command):
    words = shlex.split(command)
    names = [index for index, word in enumerate(words) if word.endswith(("ttrl.py", "train.sh"))]
    flags = [word for word in words[names[0] + 1 :] if word not in ("MODEL",)]
    if "--nproc" in flags:
        del flags[flags.index("--nproc") : flags.index("--nproc") + 2]
    configure(parse(flags, ttrl.REWARDS))


def test_the_readmes_first_command_starts(tmp_path):
    """From another folder, with the environment that runs the tests."""
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    line = ["bash", str(ROOT / "train.sh"), "--dry-run", "--nproc", "1"]
    done = subprocess.run(
        line, env={**environment(), "PATH": path}, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0 and "model    tiny" in done.stdout, done.stderr


def test_every_metric_of_a_run_is_explained(few_questions, tmp_path):
    program("--data", few_questions, "--out", tmp_path / "run", *SMALL, "--kl", "0.01")
    page = (ROOT / "docs" / "metrics.md").read_text()
    explained = set(re.findall(r"`([^`]+)`", page))
    written = {
        name.split("/", 1)[1]
        for line in lines_of(tmp_path / "run" / "metrics.jsonl")
        for name in line
        if "/" in name
    }
    written = {re.sub(r"@(?!1$|1_se$|1 )\d+$", "@N", name).removesuffix("_se") for name in written}
    assert written - explained == set()
