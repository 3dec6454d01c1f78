"""A model's name -> its local folder: fetched from the Hugging Face hub once, then found in its cache."""

import errno
import os
from pathlib import Path

from huggingface_hub import errors as hub_errors
from huggingface_hub import snapshot_download

from support.pretrained import one_line

OWNERS = {  # how a bare model name starts -> who publishes it on the hub
    "Qwen": "Qwen", "Llama-3.2-3B-Oat-Zero": "sail", "Llama": "meta-llama", "Meta-Llama": "meta-llama",
    "Mistral": "mistralai", "Ministral": "mistralai", "DeepSeek": "deepseek-ai", "Skywork": "Skywork",
    "SmolLM": "HuggingFaceTB",
}  # fmt: skip
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                   "chat_template*"]  # fmt: skip
FILES = ["config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"]


def resolve(name):
    """The local folder of a model: `name` itself, or that of a hub id, downloaded at the first call.

    A bare name gets its owner: Qwen2.5-Math-1.5B is Qwen/Qwen2.5-Math-1.5B. Raises FileNotFoundError with
    what to do.
    """
    folder = os.path.expanduser(name)
    if os.path.isdir(folder):
        return Path(folder)
    if os.path.exists(folder):
        raise FileNotFoundError(
            f"{name}: a file; a model is the folder that holds config.json and the weights"
        )
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such folder")
    repo = name if "/" in name else f"{owner_of(name)}/{name}"
    try:
        return Path(
            snapshot_download(repo, allow_patterns=FILES + TOKENIZER_FILES)
        )  # resumes a broken download
    except (OSError, RuntimeError, hub_errors.HTTPError, hub_errors.HFValidationError) as error:
        raise FileNotFoundError(f"{repo}: {download_advice(repo, error)}") from None


def owner_of(name):
    """Who publishes the model of a bare name."""
    for start, owner in OWNERS.items():
        if name.lower().startswith(start.lower()):
            return owner
    raise FileNotFoundError(
        f"{name}: neither a folder nor a model name whose owner is known; give owner/name"
    )


def download_advice(repo, error):
    """What to do about a failed download, by its error: the hub's own, the network's or the disk's."""
    if isinstance(error, hub_errors.GatedRepoError):
        return f"gated; accept its licence at https://huggingface.co/{repo} and set HF_TOKEN"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return "neither a folder here nor on the hub; check the spelling (or set HF_TOKEN if it is private)"
    if isinstance(error, hub_errors.HFValidationError):
        return "neither a folder here nor a hub id, which is owner/name"
    if isinstance(error, (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled)):
        return (
            "not complete in the local cache, and the hub cannot be reached; download it elsewhere "
            "and give its folder"
        )
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return f"the hub refuses access ({one_line(error)}); check HF_TOKEN"
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return "the disk is full; free some space or set HF_HOME to a larger disk, then run again: it resumes"
    return f"the download broke off ({one_line(error)}); run again: it resumes"
