"""`python -m tests.vllm.engine JOBS.json` serves each job and writes JOBS.answers."""

from __future__ import annotations

import gc
import json
import sys
import traceback
from pathlib import Path
from typing import Any

NOTHING: dict[str, Any] = {
    "tokens": [],
    "cached": [],
    "blocks": 0,
    "block_size": 0,
    "metrics": {},
    "error": "",
}


def serve(options: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Make an engine, let it generate for all prompts at once, several times."""
    from vllm import LLM, SamplingParams

    sampling = SamplingParams(
        temperature=0, max_tokens=given["new_tokens"], ignore_eos=True, detokenize=False
    )
    engine = LLM(**options)
    requests = [{"prompt_token_ids": prompt} for prompt in given["prompts"]]
    rounds = [engine.generate(requests, sampling, use_tqdm=False) for _ in range(given["rounds"])]
    cache = engine.llm_engine.vllm_config.cache_config
    return {
        "tokens": [[list(out.outputs[0].token_ids) for out in outs] for outs in rounds],
        "cached": [[out.num_cached_tokens for out in outs] for outs in rounds],
        "blocks": cache.num_gpu_blocks,
        "block_size": cache.block_size,
        "metrics": {
            metric.name: metric.value
            for metric in engine.get_metrics()
            if isinstance(getattr(metric, "value", None), int | float)
        },
        "error": "",
    }


def main(path: Path) -> None:
    """Serve the jobs in turn; an engine that could not be made answers with its traceback."""
    import vllm

    given = json.loads(path.read_text())
    if given["version"] is not None:
        vllm.__version__ = given["version"]
    answers = []
    for options in given["jobs"]:
        try:
            answers.append(serve(options, given))
        except Exception:  # noqa: BLE001
            answers.append({**NOTHING, "error": traceback.format_exc()})
        gc.collect()
    path.with_suffix(".answers").write_text(json.dumps(answers))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
