"""Serve an SVFormer and a Llama with vLLM's OpenAI server, in the same cache memory each.

Runs offline on a CPU, in about two minutes, on tiny random models: `make serve`, or, where
vLLM is installed, `python examples/serve_svformer.py`. Nothing listens but on this machine, and
nothing is left running.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, logging

from resformer_kernels.integrations.transformers import convert_to_resformer

HOST = "127.0.0.1"
LETTERS = 95
STREAMS = ("Once upon a time", "The cache holds K of every layer, and V")
START_SECONDS = 300
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
}


def letters() -> Any:
    """A tokenizer whose tokens are the printable letters of ASCII."""
    tokenizer = Tokenizer(models.BPE({chr(32 + i): i for i in range(LETTERS)}, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def save_models(folder: Path, layers: int) -> dict[str, Path]:
    """A random Llama and what it becomes as an SVFormer, as folders that vLLM serves."""
    logging.disable_progress_bar()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=LETTERS,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model: Any = LlamaForCausalLM(config).to(torch.bfloat16)
    folders = {"Llama": folder / "llama", "SVFormer": folder / "svformer"}
    model.save_pretrained(folders["Llama"])
    convert_to_resformer(model, "svformer").save_pretrained(folders["SVFormer"])
    for path in folders.values():
        letters().save_pretrained(path)
    return folders


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
    return port


def get(port: int, path: str) -> str | None:
    """What the server answers, or None where it does not."""
    connection = http.client.HTTPConnection(HOST, port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.read().decode() if response.status == 200 else None
    except OSError:
        return None
    finally:
        connection.close()


def wait_until_it_serves(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    """Wait for the server, and say every five seconds for how long."""
    start = said = time.monotonic()
    while get(port, "/health") is None:
        now = time.monotonic()
        if process.poll() is not None or now - start > START_SECONDS:
            raise SystemExit(f"vLLM did not start:\n{log.read_text()[-3000:]}")
        if now - said >= 5:
            said = now
            print(f"  starting vLLM, {now - start:.0f} s", flush=True)
        time.sleep(0.2)


@contextmanager
def server(model: Path, memory: int) -> Iterator[int]:
    """The port of a server of `model` with `memory` bytes of cache; it ends with the block."""
    port, log = free_port(), model.parent / f"{model.name}.log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--host", HOST]
    command += ["--port", str(port), "--model", str(model), "--served-model-name", "tiny"]
    command += ["--kv-cache-memory-bytes", str(memory), "--max-model-len", "2048"]
    command += ["--max-num-seqs", "16", "--enforce-eager", "--generation-config", "vllm"]
    environment = {**os.environ, **ENVIRONMENT}
    # It would replace the memory that the command names.
    environment.pop("VLLM_CPU_KVCACHE_SPACE", None)
    with log.open("wb") as out:
        # A session of its own, so that all its processes can be ended, and Ctrl-C comes here alone.
        process = subprocess.Popen(
            command,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_it_serves(process, port, log)
        yield port
    finally:
        end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a server and the processes that it started: politely, then not."""
    for number, seconds in ((signal.SIGTERM, 20), (signal.SIGKILL, 20)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def stream(port: int, prompt: str, tokens: int) -> tuple[int, str]:
    """Send a prompt and read the answer as it comes: tokens, and the text."""
    request = {
        "model": "tiny",
        "prompt": prompt,
        "max_tokens": tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    connection = http.client.HTTPConnection(HOST, port, timeout=300)
    connection.request(
        "POST", "/v1/completions", json.dumps(request), {"Content-Type": "application/json"}
    )
    count, text = 0, ""
    for line in connection.getresponse():
        data = line.decode().removeprefix("data: ").strip()
        if not data.startswith("{"):
            continue
        event = json.loads(data)
        if "error" in event:
            raise SystemExit(f"the server refused: {event['error']}")
        text += "".join(choice["text"] for choice in event["choices"])
        count = (event.get("usage") or {}).get("completion_tokens", count)
    connection.close()
    return count, text


def blocks(port: int) -> int:
    """Pages of the server's cache."""
    found = re.search(
        r'vllm:cache_config_info\{.*num_gpu_blocks="(\d+)"', get(port, "/metrics") or ""
    )
    if found is None:
        raise SystemExit("the server does not say how many blocks it has")
    return int(found[1])


def measure(name: str, model: Path, memory: int, tokens: int) -> tuple[int, float]:
    """Blocks, and tokens a second of all streams together, of a server of `model`."""
    print(f"{name}:", flush=True)
    with ThreadPoolExecutor(len(STREAMS)) as pool, server(model, memory) as port:
        stream(port, STREAMS[0], 4)  # the first request warms up
        print(f"  serving on {HOST}:{port}; {len(STREAMS)} streams", flush=True)
        start = time.monotonic()
        answers = list(pool.map(lambda prompt: stream(port, prompt, tokens), STREAMS))
        rate = sum(count for count, _ in answers) / (time.monotonic() - start)
        for prompt, (count, text) in zip(STREAMS, answers, strict=True):
            print(f"  {prompt!r} -> {text[:24]!r}..., {count} tokens")
        found = blocks(port)
    print(f"  {found} blocks, {rate:.0f} tokens/s", flush=True)
    return found, rate


def main(arguments: list[str] | None = None) -> None:
    """Serve both models in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8, help="of the models (default 8)")
    parser.add_argument("--memory", type=int, default=256, help="cache of each, MiB (default 256)")
    parser.add_argument("--tokens", type=int, default=256, help="of each stream (default 256)")
    options = parser.parse_args(arguments)
    # A signal to end is an exception like Ctrl-C, so that servers end with this process.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory() as folder:
        folders = save_models(Path(folder), options.layers)
        found = {
            name: measure(name, path, options.memory << 20, options.tokens)
            for name, path in folders.items()
        }
    print(
        f"\n{'':10}{'blocks':>8}{'tokens/s':>10}   of {options.memory} MiB, {options.layers} layers"
    )
    for name, (count, rate) in found.items():
        print(f"{name:10}{count:8}{rate:10.0f}")
    ratio = found["SVFormer"][0] / found["Llama"][0]
    print(f"SVFormer has {ratio:.2f} times the blocks; 2L / (L + 1) = ", end="")
    print(f"{2 * options.layers / (options.layers + 1):.2f}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("stopped")
