"""Written by hand for speed or memory, each beside the plain torch code that it is tested against.

Read packing (which token attends to which), kv_cache, logprob and sampler, then linear, attention and
cuda_graph. The files *_triton.py are the same functions for a GPU, cpu/ for a CPU: skip them at first.
"""
