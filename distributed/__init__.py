"""One model over many ranks: processes, DDP, shards, tensor-parallel sampling, checkpoints, memory."""
