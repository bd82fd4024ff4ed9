"""Convert a Llama to a ResFormer and to an SVFormer, train both briefly, and generate.

Runs offline, in under a minute, on a tiny random model of bytes: `python examples/convert_llama.py`
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, logging

from resformer_kernels.integrations.transformers import ResFormerCache, convert_to_resformer

TEXT = Path(__file__).read_bytes()
LENGTH = 96


def tiny_llama() -> Any:
    """A random Llama over bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation="resformer",
    )
    return LlamaForCausalLM(config)


def batch(generator: torch.Generator) -> Tensor:
    """Eight pieces of this file, (8, LENGTH) bytes."""
    text = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8).long()
    starts = torch.randint(0, len(text) - LENGTH, (8,), generator=generator)
    return torch.stack([text[start : start + LENGTH] for start in starts.tolist()])


def train(model: Any, steps: int) -> float:
    """Train with Adam on pieces of this file, with checkpointed layers; the last loss in nats."""
    model.train()
    model.gradient_checkpointing_enable()  # the default is non-reentrant, as it must be
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    generator = torch.Generator().manual_seed(0)
    loss = torch.tensor(float("nan"))
    for step in range(steps):
        ids = batch(generator)
        loss = model(ids, labels=ids, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 20 == 0 or step + 1 == steps:
            print(f"  step {step + 1:4d}  loss {loss.item():.3f}")
    model.gradient_checkpointing_disable()
    model.eval()
    return loss.item()


def complete(model: Any, prompt: bytes) -> tuple[str, int]:
    """The prompt with 40 greedy bytes appended, and the size of the cache in bytes."""
    ids = torch.tensor([list(prompt)])
    cache = ResFormerCache(model.config, max_seqlen=len(prompt) + 40)
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        past_key_values=cache,
        max_new_tokens=40,
        do_sample=False,
    )
    return bytes(out[0].tolist()).decode(errors="replace"), cache.nbytes


def main() -> None:
    """Convert, compare, train, save, load, generate."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=120, help="training steps of each model")
    steps = parser.parse_args().steps
    logging.set_verbosity_error()
    source = tiny_llama()

    print("ResFormer, starting from the Llama: lambda_v = 1, lambda_first = 0")
    resformer = convert_to_resformer(copy.deepcopy(source), lambda_v=1.0, lambda_first=0.0)
    ids = batch(torch.Generator().manual_seed(1))
    with torch.no_grad():
        same = torch.equal(source.eval()(ids).logits, resformer.eval()(ids).logits)
    print(f"  {type(resformer).__name__}, logits equal to the Llama's: {same}")
    train(resformer, steps)
    for name, value in resformer.named_parameters():
        if ".v_mix." in name:
            print(f"  {name} = {value.item():.3f}")

    print("SVFormer: every layer attends over the first layer's values")
    svformer = convert_to_resformer(copy.deepcopy(source), "svformer")
    train(svformer, steps)

    with tempfile.TemporaryDirectory() as folder:
        for model in (resformer, svformer):
            model.save_pretrained(folder)
            loaded = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="resformer")
            text, nbytes = complete(loaded.eval(), b"def ")
            print(f"{type(loaded).__name__}: {nbytes} bytes of cache\n  {text!r}")


if __name__ == "__main__":
    main()
