"""Run ttrl.py as it is, and note what it does not report: argv[1] is a folder, the rest are flags of ttrl.py.

Each rank leaves rank-K.pt: the tokens of its first rollout in training and the gradient norm of every update.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import ttrl


def main(folder, flags):
    norms, first = [], []
    clip, generate = torch.nn.utils.clip_grad_norm_, ttrl.generate

    def recording_clip(*arguments, **options):
        norms.append(clip(*arguments, **options))
        return norms[-1]

    def recording_generate(*arguments, **options):
        rollout = generate(*arguments, **options)
        if options["stream"] == "train" and not first:
            pairs = zip(rollout.question.tolist(), rollout.sample.tolist(), strict=True)
            first.append({pair: rollout.response(row) for row, pair in enumerate(pairs)})
        return rollout

    torch.nn.utils.clip_grad_norm_, ttrl.generate = recording_clip, recording_generate
    ttrl.main(flags)
    seen = {"norms": torch.stack(norms), "first": first[0]}
    torch.save(seen, Path(folder) / f"rank-{torch.distributed.get_rank()}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
