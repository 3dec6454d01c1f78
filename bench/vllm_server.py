"""vLLM's engine behind stdin and stdout, a JSON line in and a JSON line out: what bench/rollout.py measures.

    ENVIRONMENT/bin/python bench/vllm_server.py '{"model": "tiny/model", "enforce_eager": true}'

It runs in vLLM's environment, so it imports nothing of ours. The argument holds the options of vllm.LLM. The
first line out is {"version"}; after that, for each line {"prompts", "samples", "new_tokens", "eos_ids",
"top_p"} one of {"lengths", "wall", "cpu"}: of the responses, in tokens, and in seconds.
"""

import json
import os
import sys
import time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever vLLM prints must not come between the answers

import vllm  # noqa: E402


def answer(**found):
    print(json.dumps(found), file=answers, flush=True)


def serve(engine, prompts, samples, new_tokens, eos_ids, top_p):
    """One case from an empty prefix cache: our sampler keeps nothing from call to call either."""
    engine.reset_prefix_cache()
    params = vllm.SamplingParams(
        n=samples,
        temperature=1.0,
        top_p=top_p,
        max_tokens=new_tokens,
        ignore_eos=not eos_ids,
        stop_token_ids=eos_ids,
        detokenize=False,
    )
    tokens = [{"prompt_token_ids": prompt} for prompt in prompts]
    wall, cpu = time.perf_counter(), time.process_time()
    results = engine.generate(tokens, params, use_tqdm=False)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    answer(lengths=[len(one.token_ids) for result in results for one in result.outputs], wall=wall, cpu=cpu)


if __name__ == "__main__":
    engine = vllm.LLM(**json.loads(sys.argv[1]))
    answer(version=vllm.__version__)
    for line in sys.stdin:
        serve(engine, **json.loads(line))
