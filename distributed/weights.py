"""Load, save and refresh the weights of a model, also where a rank holds only part of them."""

import torch

from distributed import parallel
from distributed.shards import local, rows_of_shard, shard_of, unshard
from support.pretrained import read_weights, write_model


def load(model, folder, dtype, device, shard=None):
    """Allocate a Transformer that was built on the meta device, and read its weights from `folder`.

    shard(model) shards its parameters and returns the device of the shards. Tensors are read one at a time
    and each rank keeps its part, so host memory never holds a second copy of the model. Raises
    FileNotFoundError or ValueError, naming the file and the tensor.
    """
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in type(model)(model.whole_config).named_parameters()}
    frequency, model.rope_frequency = model.rope_frequency, None  # keep it, and keep it in fp32
    model.to(dtype).to_empty(device=shard(model) if shard else device)
    model.rope_frequency = frequency.to(device)
    if model.config.tie_word_embeddings:
        model.lm_head.weight = model.embed_tokens.weight  # to_empty has untied them
    for name, tensor in read_weights(folder, model.whole_config, shapes):
        fill(model, name, tensor)
    return model


def save(model, folder):
    """Write config.json and fp32 safetensors to `folder`. Every rank has to call it if there are shards."""
    shapes = {name: p.shape for name, p in model.named_parameters()}
    write_model(folder, model.source, model.config, shapes, whole_parameters(model))


@torch.no_grad()
def fill(model, name, tensor):
    """Write this rank's part of a parameter, given the whole tensor."""
    parameter = model.get_parameter(name)
    tensor = parallel.rank_weight(model.whole_config, name, tensor, model.group)
    rows = rows_of_shard(len(tensor), *shard_of(parameter))
    local(parameter).copy_(tensor[rows])


def refresh(model, source):
    """Overwrite a model's weights in place with those of `source`, cast to the model's dtype."""
    for (name, own), other in zip(model.named_parameters(), source.parameters(), strict=True):
        fill(model, name, unshard(other.detach(), own.device, own.dtype))


def whole_parameters(model):
    """Yield (name, whole tensor) of every parameter. All ranks have to iterate if parameters are sharded."""
    for name, parameter in model.named_parameters():
        yield name, unshard(parameter.detach())
