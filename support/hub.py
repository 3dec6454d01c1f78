"""From a model's name to its local folder, downloaded once from the Hugging Face hub into its cache.

There are two steps, so that an invalid run is refused before anything large is downloaded: config.json and
the tokenizer (`fetch_config`), then the weights (`fetch_weights`). If the name is a local folder, both return
it.
"""

import errno
import os
from pathlib import Path

from huggingface_hub import constants, snapshot_download
from huggingface_hub import errors as hub_errors

from support.untrusted import reason

OWNERS = {  # prefix of a bare model name -> its owner on the hub
    "Qwen": "Qwen", "Llama-3.2-3B-Oat-Zero": "sail", "Llama": "meta-llama", "Meta-Llama": "meta-llama",
    "Mistral": "mistralai", "Ministral": "mistralai", "DeepSeek": "deepseek-ai", "Skywork": "Skywork",
    "SmolLM": "HuggingFaceTB",
}  # fmt: skip
CONFIG_FILES = ["config.json", "generation_config.json"]
TOKENIZER_FILES = ["tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
                   "chat_template*"]  # fmt: skip
WEIGHT_FILES = ["model*.safetensors", "model.safetensors.index.json"]


def fetch_config(name):
    """The local folder of a model, with config.json and the tokenizer; its weights may be missing.

    A bare name gets its owner: Qwen2.5-Math-1.5B is Qwen/Qwen2.5-Math-1.5B. Raises FileNotFoundError with
    advice.
    """
    return local_folder(name) or download(repo_of(name), CONFIG_FILES + TOKENIZER_FILES)


def fetch_weights(name):
    """The complete local folder of a model. Raises FileNotFoundError with advice."""
    # All files: if the repository has changed since fetch_config, they go to another folder.
    return local_folder(name) or download(repo_of(name), CONFIG_FILES + TOKENIZER_FILES + WEIGHT_FILES)


def local_folder(name):
    """The folder `name` as a Path, or None if the name can only be on the hub."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return Path(path)
    if os.path.exists(path):
        raise FileNotFoundError(f"{name}: is a file; a model is the folder with config.json and the weights")
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise FileNotFoundError(f"{name}: no such folder")
    return None


def repo_of(name):
    """owner/name on the hub. Raises FileNotFoundError for a bare name whose owner we do not know."""
    if "/" in name:
        return name
    for start, owner in OWNERS.items():
        if name.lower().startswith(start.lower()):
            return f"{owner}/{name}"
    raise FileNotFoundError(f"{name}: neither a folder nor a model name with a known owner; give owner/name")


def download(repo, patterns):
    """The folder in the hub's cache with the files that match; resumes an interrupted download."""
    try:
        return Path(snapshot_download(repo, allow_patterns=patterns))
    except (OSError, RuntimeError, hub_errors.HTTPError, hub_errors.HFValidationError) as error:
        raise FileNotFoundError(f"{repo}: {download_advice(repo, error)}") from None


def download_advice(repo, error):
    """What to do about a failed download: errors of the hub, the network or the disk."""
    if isinstance(error, hub_errors.GatedRepoError):
        return f"gated; accept its licence at https://huggingface.co/{repo} and set HF_TOKEN"
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return "neither a folder here nor on the hub; check the spelling (or set HF_TOKEN if it is private)"
    if isinstance(error, hub_errors.HFValidationError):
        return "neither a folder here nor a hub id, which is owner/name"
    if isinstance(error, (hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled)):
        cause = "incomplete in the local cache, and the hub cannot be reached"
        return f"{cause}; download it elsewhere and give its folder"
    if getattr(getattr(error, "response", None), "status_code", None) in (401, 403):
        return f"the hub refuses access ({reason(error)}); check HF_TOKEN"
    return disk_advice(error) or f"the download failed ({reason(error)}); rerun to resume it"


def disk_advice(error):
    """What to do if the disk is to blame, else None. hf_xet reports disk errors as text in a RuntimeError."""
    code, text = getattr(error, "errno", None), str(error)
    if code == errno.ENOSPC or "No space left" in text:
        return "the disk is full; free some space or set HF_HOME to a larger disk, then rerun to resume"
    if code in (errno.EACCES, errno.EPERM, errno.EROFS) or "Permission denied" in text or "Read-only" in text:
        where = getattr(error, "filename", None) or constants.HF_HUB_CACHE
        return f"cannot write to {where}; set HF_HOME to a folder that you may write to"
    return None
