"""Checkpoints of the paper's and nanochat's layouts, against forwards written out here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from resformer_kernels.models.checkpoints import from_nanochat, from_paper

LAYERS, DIM, HEADS, KV_HEADS, HIDDEN, VOCAB, LENGTH = 3, 32, 4, 2, 48, 50, 16
HEAD = DIM // HEADS

LLAMA = {
    "hidden_size": DIM,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "intermediate_size": HIDDEN,
    "vocab_size": VOCAB,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 1e-3,
    "rope_theta": 500.0,
    "hidden_act": "silu",
}
NANOCHAT = {
    "sequence_len": LENGTH,
    "vocab_size": VOCAB,
    "n_layer": LAYERS,
    "n_head": HEADS,
    "n_kv_head": KV_HEADS,
    "n_embd": DIM,
    "window_pattern": "SL",
}
TOKENS = torch.randint(VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(7))


def drawn(shapes: dict[str, tuple[int, ...]]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float, back: int) -> Tensor:
    """Causal attention over at most `back` keys before the query; tensors are (B, T, H, D)."""
    k, v = (x.repeat_interleave(q.shape[2] // x.shape[2], 2) for x in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    place = torch.arange(q.shape[1])
    apart = place[:, None] - place
    scores = scores.masked_fill((apart < 0) | (apart > back), -math.inf)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).flatten(2)


def angles(base: float) -> tuple[Tensor, Tensor]:
    turns = torch.arange(LENGTH)[:, None] * base ** (-torch.arange(0, HEAD, 2) / HEAD)
    return turns.cos()[:, None], turns.sin()[:, None]


def llama_state(values_in: range, keys_in: range = range(LAYERS)) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (VOCAB, DIM),
        "model.norm.weight": (DIM,),
        "lm_head.weight": (VOCAB, DIM),
    }
    for n in range(LAYERS):
        base = f"model.layers.{n}."
        shapes |= {
            base + "input_layernorm.weight": (DIM,),
            base + "post_attention_layernorm.weight": (DIM,),
            base + "self_attn.q_proj.weight": (HEADS * HEAD, DIM),
            base + "self_attn.o_proj.weight": (DIM, HEADS * HEAD),
            base + "mlp.gate_proj.weight": (HIDDEN, DIM),
            base + "mlp.up_proj.weight": (HIDDEN, DIM),
            base + "mlp.down_proj.weight": (DIM, HIDDEN),
        }
        for name, layers in (("k", keys_in), ("v", values_in)):
            if n in layers:
                shapes[base + f"self_attn.{name}_proj.weight"] = (KV_HEADS * HEAD, DIM)
    state = drawn(shapes)
    return {name: x * DIM**0.5 if "norm" in name else x for name, x in state.items()}


def llama(state: dict[str, Tensor], form: str) -> Tensor:
    """Logits as the paper's code computes them, or FusedKV-Lite's of middle layer 1."""

    def norm(x: Tensor, name: str) -> Tensor:
        return state[name] * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-3)

    def turn(x: Tensor) -> Tensor:
        cos, sin = (torch.cat([t, t], -1) for t in angles(500.0))
        one, other = x.chunk(2, -1)
        return x * cos + torch.cat([-other, one], -1) * sin

    x = state["model.embed_tokens.weight"][TOKENS]
    first = k = torch.empty(0)
    for n in range(LAYERS):
        w = {k.removeprefix(f"model.layers.{n}."): v for k, v in state.items()}
        h = norm(x, f"model.layers.{n}.input_layernorm.weight")

        def projected(name: str, h: Tensor = h, w: dict[str, Tensor] = w) -> Tensor:
            return F.linear(h, w[f"self_attn.{name}_proj.weight"]).unflatten(2, (-1, HEAD))

        q, v = turn(projected("q")), first
        shares_keys = form == "fused-kv-lite" and n > 1
        if not shares_keys:
            k = turn(projected("k"))
        if n == 0 or not (shares_keys or form == "svformer"):
            v = projected("v")
        if n == 0:
            first = v
        elif form == "identity":
            v = 0.5 * first + 0.5 * v
        out = attend(q, k, v, HEAD**-0.5, LENGTH)
        x = x + F.linear(out, w["self_attn.o_proj.weight"])
        h = norm(x, f"model.layers.{n}.post_attention_layernorm.weight")
        gate, up = (F.linear(h, w[f"mlp.{p}_proj.weight"]) for p in ("gate", "up"))
        x = x + F.linear(F.silu(gate) * up, w["mlp.down_proj.weight"])
    return F.linear(norm(x, "model.norm.weight"), state["lm_head.weight"])


@pytest.mark.parametrize("form", ["transformer", "identity", "svformer"])
@torch.no_grad()
def test_the_papers_models_give_their_logits(form: str) -> None:
    state = llama_state(range(1 if form == "svformer" else LAYERS))
    model = from_paper(state, LLAMA, variant="transformer" if form == "transformer" else None)
    assert model.config.variant == form
    assert not model.training
    torch.testing.assert_close(model(TOKENS), llama(state, form), atol=2e-5, rtol=1e-4)
    generated = model.generate(TOKENS[:, :8], 4)
    again = torch.cat([TOKENS[:, :8], generated.tokens[:, :3]], 1)
    assert torch.equal(model(again)[:, -4:].argmax(-1), generated.tokens)


@torch.no_grad()
def test_a_fused_kv_lite_gives_its_logits() -> None:
    state = llama_state(range(2), range(2))
    model = from_paper(state, LLAMA, variant="fused-kv-lite", middle_layer=1)
    expected = llama(state, "fused-kv-lite")
    torch.testing.assert_close(model(TOKENS), expected, atol=2e-5, rtol=1e-4)
    with pytest.raises(ValueError, match=r"does not hold a fused-kv-lite of 3 layers: missing .*"):
        from_paper(state, LLAMA, variant="fused-kv-lite", middle_layer=2)


@torch.no_grad()
def test_wrapped_and_tied_states_load() -> None:
    state = llama_state(range(LAYERS))
    plain = from_paper(state, LLAMA)(TOKENS)
    wrapped = {f"module._orig_mod.{name}": x for name, x in state.items()}
    wrapped["module._orig_mod.model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(HEAD // 2)
    config = {**LLAMA, "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"}}
    assert torch.equal(from_paper(wrapped, config)(TOKENS), plain)
    head = state.pop("lm_head.weight")
    tied = from_paper(state, {**LLAMA, "tie_word_embeddings": True})
    assert torch.equal(tied.head.weight, state["model.embed_tokens.weight"])
    assert not torch.equal(tied.head.weight, head)


def nanochat_state(values: bool = True, scales: bool = True, padded: int = 64) -> dict[str, Tensor]:
    shapes: dict[str, tuple[int, ...]] = {
        "transformer.wte.weight": (padded, DIM),
        "lm_head.weight": (padded, DIM),
    }
    for n in range(LAYERS):
        base = f"transformer.h.{n}."
        shapes |= {
            base + "attn.c_q.weight": (DIM, DIM),
            base + "attn.c_k.weight": (KV_HEADS * HEAD, DIM),
            base + "attn.c_v.weight": (KV_HEADS * HEAD, DIM),
            base + "attn.c_proj.weight": (DIM, DIM),
            base + "mlp.c_fc.weight": (4 * DIM, DIM),
            base + "mlp.c_proj.weight": (DIM, 4 * DIM),
        }
        if values and n % 2 == (LAYERS - 1) % 2:
            shapes[base + "attn.ve_gate.weight"] = (KV_HEADS, 12)
            shapes[f"value_embeds.{n}.weight"] = (padded, KV_HEADS * HEAD)
    if scales:
        shapes |= {"resid_lambdas": (LAYERS,), "x0_lambdas": (LAYERS,)}
    return drawn(shapes)


def nanochat(state: dict[str, Tensor], gain: float, reach: float, base: float, back: int) -> Tensor:
    """Logits as nanochat's code computes them."""

    def norm(x: Tensor) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],))

    def turn(x: Tensor) -> Tensor:
        cos, sin = angles(base)
        one, other = x.chunk(2, -1)
        return norm(torch.cat([one * cos + other * sin, other * cos - one * sin], -1)) * gain

    x = embedded = norm(state["transformer.wte.weight"][TOKENS])
    for n in range(LAYERS):
        w = {k.removeprefix(f"transformer.h.{n}."): v for k, v in state.items()}
        if "resid_lambdas" in state:
            x = state["resid_lambdas"][n] * x + state["x0_lambdas"][n] * embedded
        h = norm(x)
        q, k, v = (F.linear(h, w[f"attn.c_{p}.weight"]).unflatten(2, (-1, HEAD)) for p in "qkv")
        if "attn.ve_gate.weight" in w:
            gate = reach * torch.sigmoid(F.linear(h[..., :12], w["attn.ve_gate.weight"]))
            v = v + gate[..., None] * state[f"value_embeds.{n}.weight"][TOKENS].view_as(v)
        short = n % 2 == 0 and n < LAYERS - 1
        out = attend(turn(q), turn(k), v, HEAD**-0.5, back if short else LENGTH)
        x = x + F.linear(out, w["attn.c_proj.weight"])
        hidden = F.relu(F.linear(norm(x), w["mlp.c_fc.weight"])).square()
        x = x + F.linear(hidden, w["mlp.c_proj.weight"])
    logits = F.linear(norm(x), state["lm_head.weight"])[..., :VOCAB]
    return 15 * torch.tanh(logits / 15)


@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("scales", [False, True])
@torch.no_grad()
def test_nanochats_models_give_their_logits(values: bool, scales: bool) -> None:
    state = nanochat_state(values, scales)
    model = from_nanochat(state, NANOCHAT)
    expected = nanochat(state, 1.0, 2.0, 10_000.0, LENGTH // 2)
    torch.testing.assert_close(model(TOKENS), expected, atol=3e-5, rtol=1e-4)
    later: dict[str, Any] = {"rope_base": 100.0, "qk_gain": 1.2, "gate_range": 3.0}
    model = from_nanochat(state, NANOCHAT, short_window=3, **later)
    expected = nanochat(state, 1.2, 3.0, 100.0, 3)
    torch.testing.assert_close(model(TOKENS), expected, atol=3e-5, rtol=1e-4)
    cache = model.new_cache(2)
    pieces = [model.logits(model.hidden(x, cache)) for x in TOKENS.split([9, 1, 1, 5], 1)]
    torch.testing.assert_close(torch.cat(pieces, 1), expected, atol=3e-5, rtol=1e-4)


def test_weights_without_a_counterpart_are_named() -> None:
    state = nanochat_state()
    state |= {"smear_gate.weight": torch.ones(1, 24), "backout_lambda": torch.ones(1)}
    with pytest.raises(ValueError, match=r"counterpart backout_lambda, smear_gate\.weight"):
        from_nanochat(state, NANOCHAT)
    paper = llama_state(range(LAYERS))
    del paper["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(ValueError, match=r"missing blocks\.1\.mlp\.up_proj\.weight; .* none"):
        from_paper(paper, LLAMA)
    paper = llama_state(range(LAYERS))
    paper["model.norm.weight"] = torch.ones(DIM + 1)
    with pytest.raises(ValueError, match=r"state: norm.weight must be \(32,\), got \(33,\)"):
        from_paper(paper, LLAMA)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_act": "gelu"}, "config: hidden_act must be 'silu', got 'gelu'"),
        ({"attention_bias": True}, "config: attention_bias must be False, got True"),
        ({"rope_scaling": {"type": "linear"}}, "config: rope_type must be 'default', got 'linear'"),
    ],
)
def test_configs_that_do_not_map_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        from_paper(llama_state(range(LAYERS)), {**LLAMA, **changes})


def test_fields_can_be_changed() -> None:
    model = from_paper(llama_state(range(LAYERS)), LLAMA, max_seqlen=99, backend="reference")
    assert (model.config.max_seqlen, model.config.backend) == (99, "reference")
