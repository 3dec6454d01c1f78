"""Several nodes: two agents of torchrun on one machine, each at a loopback address of its own."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, environment, lines_of, program
from safetensors.torch import load_file

from distributed import ranks

NODES = {"a": "127.0.0.1", "b": "127.0.0.2"}  # sorted by address, so ranks begin on a


def processes_of(agent):
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(agent.pid)], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def lose(agent, how=signal.SIGKILL):
    """End or stop an agent and its processes without a word, as a node that is lost."""
    for pid in [*processes_of(agent), agent.pid]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, how)


@pytest.fixture(scope="module")
def start():
    """start(line, node) runs a command line on a node. What still runs in the end is killed."""
    started = []

    def start(line, node, cwd="/"):
        path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
        inside = {**environment(), "NODE": node, "PATH": path}
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        started.append(subprocess.Popen(list(map(str, line)), env=inside, cwd=cwd, **pipes))
        return started[-1]

    yield start
    for agent in started:
        lose(agent)
        agent.communicate()


def end(*agents, code=0):
    """Wait for the agents: all that they printed. Each has to exit with `code`."""
    printed = [agent.communicate(timeout=900) for agent in agents]
    for agent, (out, err) in zip(agents, printed, strict=True):
        assert agent.returncode == code, f"exit {agent.returncode}\n{out}\n{err}"
    return "".join(out + err for out, err in printed)


def endpoint(node="a"):
    """An address of the node that nobody listens at."""
    with socket.socket() as probe:
        probe.bind((NODES[node], 0))
        return f"{NODES[node]}:{probe.getsockname()[1]}"


def torchrun(node, meet, script, *arguments, processes=1):
    options = f"--nnodes 2 --nproc-per-node {processes} --rdzv-backend c10d --rdzv-endpoint {meet}"
    line = f"-m torch.distributed.run {options} --local-addr {NODES[node]}".split()
    return [sys.executable, *line, ROOT / script, *arguments]


def train(node, meet, *arguments):
    """The command line of docs/gpu.md, for a node of one process."""
    options = f"--nnodes 2 --nproc 1 --rdzv-endpoint {meet} --local-addr {NODES[node]} --max-restarts 3"
    return ["bash", ROOT / "train.sh", *options.split(), *arguments]


# ----------------------------------------------------------------------------------------------------------
# what the ranks agree on


@pytest.fixture(scope="module")
def noted(start, tmp_path_factory):
    """(folder, what nodes_run.py notes of each of four ranks on two nodes)."""
    folder, meet = tmp_path_factory.mktemp("nodes"), endpoint()
    end(*[start(torchrun(node, meet, "tests/nodes_run.py", folder, processes=2), node) for node in NODES])
    return folder, [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(4)]


def test_the_first_rank_of_each_node_fetches(noted):
    folder, ranks = noted
    assert [rank["found"] for rank in ranks] == ["a", "a", "b", "b"]  # the file of its own node
    assert [(folder / node / "log").read_text() for node in NODES] == ["0\n", "0\n"]


def test_every_group_of_a_mesh_waits_as_long_as_all_ranks_do(noted):
    hours = ranks.TIMEOUT.total_seconds()
    for number, rank in enumerate(noted[1]):
        row, column = divmod(number, 2)
        assert rank["grid"] == [[column, column + 2], [2 * row, 2 * row + 1]]
        assert rank["line"] == [[number], [0, 1, 2, 3]]
        assert rank["seconds of grid"] == rank["seconds of line"] == [hours, hours] and hours > 3600


def test_what_the_nodes_do_not_share_is_refused_on_every_rank(noted):
    folder, ranks = noted
    where = folder / "b" / "out"
    for rank in ranks:
        assert rank["same flags"] is None and rank["seen late"] is None
        assert re.match("rank 2: node .* has other flags than ", rank["other flags"])
        assert rank["not shared"].startswith(f"rank 2: {where} on node ") and "share" in rank["not shared"]
        assert "rank 3" not in rank["not shared"] + rank["other flags"]  # a sentence for each node is enough
    assert list((folder / "runs" / "out").iterdir()) == [] == list((folder / "a" / "out").iterdir())


def test_ranks_on_several_nodes_meet_on_the_interface_that_leads_to_rank_0(monkeypatch):
    table = Path("/proc/net/route")
    routes = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
    defaults = [name for name, destination, *_ in routes if destination == "00000000"]
    if not defaults:
        pytest.skip("no route leads out of this machine")
    loopback = socket.if_nameindex()[0][1]
    settings = {"RANK": "1", "LOCAL_WORLD_SIZE": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "192.0.1.1",
                "MASTER_PORT": "1"}  # fmt: skip
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    assert ranks.network_interface() in defaults and loopback not in defaults
    for address in NODES.values():
        monkeypatch.setenv("MASTER_ADDR", address)
        assert ranks.network_interface() == loopback
    monkeypatch.setenv("WORLD_SIZE", "1")  # a single node does not look the name up
    monkeypatch.setenv("MASTER_ADDR", "nowhere.invalid")
    assert ranks.network_interface() == loopback


# ----------------------------------------------------------------------------------------------------------
# the real program


@pytest.fixture(scope="module")
def undisturbed(few_questions, tmp_path_factory):
    """A run of two processes on one node."""
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    program("--data", few_questions, "--out", out, *SMALL, ranks=2)
    return out


def assert_same(out, undisturbed):
    """The runs ended with the same weights, bit by bit, which moved, and no step was made twice."""
    trained, wanted = (load_file(run / "model" / "model.safetensors") for run in (out, undisturbed))
    base = load_file(ROOT / "tiny" / "model" / "model.safetensors")
    assert trained.keys() == wanted.keys() and all(trained[name].equal(wanted[name]) for name in wanted)
    assert max((trained[name] - base[name]).abs().max().item() for name in base) > 1e-3
    steps = [line["step"] for line in lines_of(out / "metrics.jsonl")]
    assert steps == [0, 1, 2, 3, 4] == [line["step"] for line in lines_of(undisturbed / "metrics.jsonl")]
    assert {path.name for path in out.iterdir()} == {path.name for path in undisturbed.iterdir()}


def test_two_nodes_are_one(start, undisturbed, few_questions, tmp_path):
    meet, arguments = endpoint(), ["--data", few_questions, "--out", tmp_path / "run", *SMALL]
    printed = end(*[start(torchrun(node, meet, "ttrl.py", *arguments), node) for node in NODES])
    assert printed.count("ranks    2 on cpu") == 1 and "resume" not in printed
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("other", ["folder", "flag"])
def test_a_node_with_another_folder_or_command_is_refused(start, few_questions, tmp_path, other):
    meet, agents = endpoint(), []
    for node in NODES:
        (tmp_path / node).mkdir()
        out = "run" if other == "folder" else tmp_path / "run"
        flags = ["--data", few_questions, "--out", out, *SMALL]
        flags += ["--seed", 1] if other == "flag" and node == "b" else []
        line = torchrun(node, meet, "tests/nodes_run.py", tmp_path, *flags)
        agents.append(start(line, node, cwd=tmp_path / node))
    printed = end(*agents, code=1)
    [said] = [line for line in printed.splitlines() if line.startswith("ttrl.py: ")]
    words = f"{tmp_path}/b/run on node" if other == "folder" else "has other flags than the node of rank 0"
    assert said.startswith("ttrl.py: rank 1: ") and words in said
    assert not list(tmp_path.rglob("*.jsonl"))


def test_rank_0_alone_decides_what_is_resumed(start, few_questions, tmp_path):
    """The other node does not see the checkpoint's folder yet when it looks for one."""
    out = tmp_path / "run"
    flags = ["--data", few_questions, "--out", out, *SMALL, "--max-minutes", 0.001]
    program(*flags, ranks=2)
    meet = endpoint()
    lines = {node: torchrun(node, meet, "tests/nodes_run.py", tmp_path, *flags) for node in NODES}
    printed = end(*[start(lines[node], node) for node in NODES])
    assert printed.count("resume   from step 1\n") == 1 and "after step 2 of 4" in printed
    assert [line["step"] for line in lines_of(out / "metrics.jsonl")] == [0, 1]  # 2 is not evaluated yet


@pytest.mark.parametrize("given, said", [
    ("--nnodes=0", "--nnodes is the number of nodes, 1 or more, not 0"),
    ("--max-restarts few", "--max-restarts is a number, 0 or more, not few"),
    ("--nnodes 2", "--nnodes 2 needs --rdzv-endpoint HOST:PORT"),
    ("--nnodes 2 --rdzv-endpoint=nowhere.invalid:1", "nowhere.invalid cannot be reached"),
])  # fmt: skip
def test_train_refuses_nodes_that_cannot_meet(start, given, said):
    printed = end(start(["bash", ROOT / "train.sh", "--nproc", "1", *given.split()], "a"), code=2)
    assert printed.startswith("train.sh: ") and said in printed and printed.count("\n") == 1


def test_train_plans_for_the_ranks_of_all_nodes(start):
    line = train("a", endpoint(), "--dry-run")
    assert "ranks    2 on cpu" in end(start(line, "a"))


# ----------------------------------------------------------------------------------------------------------
# what is lost comes back


@pytest.fixture
def begin(start, few_questions, tmp_path):
    """begin(host) starts a run on both nodes whose rendezvous is at `host`, and waits for a checkpoint.

    It returns the agent of each node, and a function that starts a node again by the same command.
    """
    out = tmp_path / "run"

    def wait_for(condition, agents):
        deadline = time.monotonic() + 600
        while not condition():
            assert time.monotonic() < deadline and all(agent.poll() is None for agent in agents.values())
            time.sleep(0.02)

    def begin(host):
        meet = endpoint(host)
        lines = {node: train(node, meet, "--data", few_questions, "--out", out, *SMALL) for node in NODES}
        agents = {host: start(lines[host], host)}
        # all nodes are one machine here: the first agent that could listen at the address would be the host
        wait_for(lambda: listens(meet), agents)
        agents |= {node: start(lines[node], node) for node in NODES if node != host}
        wait_for(lambda: list(out.glob("checkpoint/step-00000[1-3]")), agents)
        return agents, lambda node: start(lines[node], node)

    return begin


def listens(meet):
    address, port = meet.split(":")
    try:
        socket.create_connection((address, int(port)), timeout=5).close()
    except ConnectionRefusedError:
        return False
    return True


def assert_resumed(agents, tmp_path, undisturbed):
    assert "resume   from step " in end(*agents)
    assert_same(tmp_path / "run", undisturbed)


@pytest.mark.long
@pytest.mark.parametrize("node", NODES)
def test_a_lost_process_is_started_again(begin, undisturbed, tmp_path, node):
    agents, _ = begin("a")
    [worker] = processes_of(agents[node])
    os.kill(worker, signal.SIGKILL)
    assert_resumed(agents.values(), tmp_path, undisturbed)


LOST = [("a", signal.SIGKILL), ("b", signal.SIGKILL), ("b", signal.SIGSTOP)]


@pytest.mark.long
@pytest.mark.parametrize("lost, how", LOST, ids=str)
def test_a_lost_node_comes_back_by_the_same_command(begin, undisturbed, tmp_path, lost, how):
    """The rendezvous is at the other node, which waits for it. A node that stopped is not heard of again."""
    [other] = NODES.keys() - {lost}
    agents, again = begin(other)
    lose(agents[lost], how)
    assert_resumed([agents[other], again(lost)], tmp_path, undisturbed)


@pytest.mark.long
def test_without_the_node_of_the_rendezvous_all_end_and_go_on(begin, undisturbed, tmp_path):
    agents, again = begin("a")
    lose(agents["a"])
    end(agents["b"], code=1)
    assert_resumed([again(node) for node in NODES], tmp_path, undisturbed)
