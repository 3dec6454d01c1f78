"""A model's name -> its folder: what is asked of the hub, and what a failure says. Nothing is downloaded."""

import errno
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
from conftest import ROOT, execute
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import filter_repo_objects
from parity import FIXED, assert_one_sentence, write_model

from support import hub
from support.hub import fetch_config, fetch_weights

PAPER = """Qwen/Qwen2.5-Math-1.5B Qwen/Qwen2.5-Math-7B Qwen/Qwen2.5-7B Qwen/Qwen2.5-32B Qwen/Qwen3-8B
    meta-llama/Llama-3.1-8B-Instruct meta-llama/Llama-3.2-3B-Instruct sail/Llama-3.2-3B-Oat-Zero
    mistralai/Mistral-Nemo-Instruct-2407 mistralai/Ministral-8B-Instruct-2410
    deepseek-ai/deepseek-math-7b-instruct deepseek-ai/DeepSeek-R1-Distill-Llama-8B
    Skywork/Skywork-OR1-Math-7B""".split()

both_steps = pytest.mark.parametrize("fetch", [fetch_config, fetch_weights])


@pytest.fixture
def asked(monkeypatch):
    """What the hub is asked for; nothing is downloaded."""
    calls = []

    def snapshot_download(repo, allow_patterns):
        calls.append((repo, allow_patterns))
        return "/downloaded"

    monkeypatch.setattr(hub, "snapshot_download", snapshot_download)
    return calls


@both_steps
@pytest.mark.parametrize("repo", PAPER)
def test_bare_names_of_the_papers_models(asked, repo, fetch):
    assert fetch(repo) == fetch(repo.split("/")[1]) == Path("/downloaded")
    assert [call[0] for call in asked] == [repo, repo]


CONFIG = """config.json generation_config.json tokenizer.json tokenizer_config.json tokenizer.model
    special_tokens_map.json added_tokens.json vocab.json merges.txt chat_template.jinja
    chat_template.json""".split()
WEIGHTS = ["model.safetensors", "model.safetensors.index.json", "model-00001-of-00005.safetensors"]
OTHERS = """consolidated.safetensors consolidated-00001-of-00002.safetensors params.json tekken.json README.md
    pytorch_model.bin pytorch_model-00001-of-00002.bin original/consolidated.00.pth original/params.json
    modeling_evil.py tf_model.h5 flax_model.msgpack onnx/model.onnx optimizer.pt""".split()


@pytest.mark.parametrize("fetch, wanted", [(fetch_config, CONFIG), (fetch_weights, CONFIG + WEIGHTS)])
def test_only_safetensors_and_tokenizer_are_downloaded(asked, fetch, wanted):
    """And the weights not before they are asked for: config and tokenizer are enough for the plan."""
    fetch("Mistral-Nemo-Instruct-2407")
    assert len(asked) == 1
    found = filter_repo_objects(CONFIG + WEIGHTS + OTHERS, allow_patterns=asked[0][1])
    assert sorted(found) == sorted(wanted)


@both_steps
def test_folders_come_first(tmp_path, monkeypatch, asked, fetch):
    (tmp_path / "Qwen2.5-Local").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("Qwen2.5-Local", "./Qwen2.5-Local", str(tmp_path / "Qwen2.5-Local"), "~/Qwen2.5-Local"):
        assert fetch(name).resolve() == (tmp_path / "Qwen2.5-Local").resolve()
    assert asked == []


@both_steps
@pytest.mark.parametrize(
    "name", ["", "./nowhere", "/no/where", "~/nowhere", "a/b/c", "unheard-of-7B", "x\0y", "n" * 5000]
)
def test_names_that_cannot_be_are_refused_without_asking(asked, name, fetch):
    with pytest.raises(FileNotFoundError):
        fetch(name)
    assert asked == []


@both_steps
def test_a_file_is_not_a_model(tmp_path, asked, fetch):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(FileNotFoundError) as caught:
        fetch(str(tmp_path / "model.safetensors"))
    assert_one_sentence(caught.value, tmp_path, "the folder with config.json")


def hub_error(kind, status):
    response = SimpleNamespace(headers={}, request=None, status_code=status)
    text = f"{status} Client Error.\n\nSomething went wrong.\nhttps://huggingface.co/api"
    return kind(text, response=response)


LICENCE = "accept its licence at https://huggingface.co/Qwen/Qwen9-1B and set HF_TOKEN"
RESUMES, NOT_WRITABLE = "rerun to resume", "cannot write to /cache; set HF_HOME"
HUB_FAILURES = {
    "gated": (hub_error(hub_errors.GatedRepoError, 403), LICENCE),
    "typo": (hub_error(hub_errors.RepositoryNotFoundError, 404), "check the spelling"),
    "bad token": (hub_error(hub_errors.HfHubHTTPError, 401), "check HF_TOKEN"),
    "server": (hub_error(hub_errors.HfHubHTTPError, 500), "rerun"),
    "no network": (
        hub_errors.LocalEntryNotFoundError("Cannot find\nan appropriate snapshot"),
        "cannot be reached",
    ),
    "offline": (hub_errors.OfflineModeIsEnabled("offline"), "cannot be reached"),
    "broken off": (hub_errors.HTTPError("peer closed connection\nwithout a word"), RESUMES),
    "connection reset": (ConnectionResetError(104, "Connection reset by peer"), RESUMES),
    "bad id": (hub_errors.HFValidationError("Repo id must be in the form 'repo_name'"), "owner/name"),
    "full disk": (OSError(errno.ENOSPC, "No space left on device"), "HF_HOME"),
    "full disk in hf_xet": (
        RuntimeError("Data processing error: I/O error: No space left on device (os error 28)"),
        "HF_HOME",
    ),
    "cache of somebody else": (PermissionError(errno.EACCES, "Permission denied", "/cache"), NOT_WRITABLE),
    "read-only cache": (OSError(errno.EROFS, "Read-only file system", "/cache"), NOT_WRITABLE),
    "read-only cache in hf_xet": (
        RuntimeError("Data processing error: I/O error: Permission denied (os error 13)"),
        f"cannot write to {constants.HF_HUB_CACHE}; set HF_HOME",
    ),
}


@both_steps
@pytest.mark.parametrize("failure", HUB_FAILURES)
def test_failed_downloads_say_what_to_do(monkeypatch, failure, fetch):
    error, words = HUB_FAILURES[failure]
    monkeypatch.setattr(hub, "snapshot_download", mock.Mock(side_effect=error))
    with pytest.raises(FileNotFoundError) as caught:
        fetch("Qwen9-1B")
    assert_one_sentence(caught.value, "Qwen/Qwen9-1B", words)


def test_real_cache_offline(tmp_path):
    """The real hub client in a process of its own: HF_HOME's cache is used, HF_HUB_OFFLINE obeyed."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "hub" / "models--Qwen--Qwen2.5-Cached"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    write_model(repo / "snapshots" / commit, FIXED | {"model_type": "qwen2"})
    program = """
from model import Transformer
from support.hub import fetch_config, fetch_weights
assert fetch_config("Qwen2.5-Cached") == fetch_weights("Qwen2.5-Cached")
print(Transformer.from_pretrained(fetch_weights("Qwen2.5-Cached")).config.layers)
for name in ("Qwen2.5-Absent", "not a/hub id"):
    try:
        fetch_weights(name)
    except FileNotFoundError as error:
        print(error)
"""
    ours = {"HF_HOME": tmp_path, "HF_HUB_OFFLINE": "1", "PYTHONPATH": ROOT}
    others = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGINGFACE"))}
    done = execute([sys.executable, "-c", program], env=others | ours)
    layers, absent, invalid = done.stdout.strip().splitlines()
    assert layers == "2"
    assert_one_sentence(absent, "Qwen/Qwen2.5-Absent", "cannot be reached")
    assert_one_sentence(invalid, "not a/hub id", "owner/name")
