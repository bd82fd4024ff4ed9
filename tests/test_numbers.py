"""Numbers of numpy and 0-d tensors where the public functions take a number: as Python's own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from resformer_kernels import (
    KVLayout,
    SharedValueCache,
    attention_with_kvcache,
    mix_value_embedding,
    mix_values,
    reservoir_scan,
    value_residual_attention,
    value_residual_attention_varlen,
)
from resformer_kernels.models import (
    LanguageModel,
    LanguageModelConfig,
    ReservoirClassifier,
    SentenceEncoder,
    byte_tokens,
    with_parameter_budget,
)
from resformer_kernels.tasks import (
    confusion,
    delays,
    lorenz,
    mackey_glass,
    mean_and_spread,
    narma10,
    sign_flip_probability,
    valid_steps,
)
from resformer_kernels.testing import AttentionCase, attention_inputs

Q = torch.randn(1, 5, 2, 8, generator=torch.Generator().manual_seed(0))
OFFSETS = torch.tensor([0, 5], dtype=torch.int32)
IDS = torch.tensor([[3, 1, 2, 0, 1]])
SMALL = LanguageModelConfig(vocab_size=16, dim=16, num_layers=2, num_heads=2, max_seqlen=32)

# A number as Python has it, to one of the same value.
Make = Callable[[Any], Any]


def numpy_number(x: float) -> Any:
    return np.int64(x) if isinstance(x, int) else np.float64(x)


def numpy_short(x: float) -> Any:
    return np.uint16(x) if isinstance(x, int) else np.float32(x)


def array(x: float) -> Any:
    return np.array(x)


def tensor(x: float) -> Any:
    return torch.tensor(x)


def sequence(x: list[int], n: Make) -> Any:
    """A list of numbers, or an array or a tensor of one axis."""
    return [n(i) for i in x] if n is numpy_number else tensor_like(x, n)


def tensor_like(x: list[int], n: Make) -> Any:
    return torch.tensor(x) if n is tensor else np.array(x)


def cached(n: Make, backend: str) -> Any:
    cache = torch.zeros(1, 9, 2, 8)
    return attention_with_kvcache(
        Q, cache, cache.clone(), Q, Q, cache_seqlens=n(2), window=sequence([2, 0], n),
        num_splits=n(2), scale=n(0.25), softcap=n(2.0), backend=backend,
    )  # fmt: skip


def packed(n: Make, backend: str) -> Any:
    return value_residual_attention_varlen(
        Q[0], Q[0], Q[0], cu_seqlens_q=OFFSETS, cu_seqlens_k=OFFSETS, max_seqlen_q=n(5),
        max_seqlen_k=n(6), window=sequence([2, 1], n), scale=n(-0.5), backend=backend,
    )  # fmt: skip


def reservoir(n: Make, backend: str) -> Any:
    return reservoir_scan(Q[0], torch.eye(8), leak=n(0.5), tolerance=n(0.25), backend=backend)


OPS: dict[str, Callable[[Make, str], Any]] = {
    "attention": lambda n, backend: value_residual_attention(
        Q, Q, Q, Q, n(0.5), n(2.0), scale=n(0.25), softcap=n(3.0), window=sequence([2, 1], n),
        backend=backend,
    ),
    "varlen": packed,
    "kvcache": cached,
    "mix": lambda n, backend: mix_values([Q, Q], [n(0.5), n(2.0)], backend=backend),
    "embedding": lambda n, backend: mix_value_embedding(
        Q, Q[0, :4], IDS, n(0.5), backend=backend
    ),
    "reservoir": reservoir,
}  # fmt: skip


def cache(n: Make) -> Any:
    layout = KVLayout.svformer(n(2))
    sizes = {"num_kv_heads": n(2), "head_dim": n(8), "value_head_dim": n(8)}
    held = SharedValueCache(layout, batch=n(3), max_seqlen=n(9), **sizes)
    paged = SharedValueCache(layout, num_pages=n(9), page_size=n(2), batch=n(1), **sizes)
    paged.free(n(0))
    paged.add(n(2))
    for made in (held, paged):
        first = sequence(list(made.sequences[:1]), n)
        made.append(n(0), Q, Q, sequences=first)
        made.append(n(1), Q, sequences=first)
        made.crop(n(3), sequences=first)
        made.crop(sequence([2], n), sequences=first)
        made.reorder(sequence([1, 0], n))
        made.free(sequence([made.sequences[0]], n))
    paged.fork(n(paged.sequences[0]))
    keys, values = held.read(n(0), sequences=sequence([0], n))
    return keys, values, held.sequences, held.lengths, paged.sequences, paged.lengths


def generated(n: Make) -> Any:
    torch.manual_seed(0)
    return LanguageModel(SMALL).generate(
        IDS, n(3), lengths=sequence([4], n), temperature=n(0.5), top_k=n(3), top_p=n(0.75),
        seed=n(3), stop_token=n(15), prefill_chunk=n(2),
    )  # fmt: skip


def classified(n: Make) -> Any:
    torch.manual_seed(0)
    sizes = {"features": n(8), "hidden": n(5), "extra_features": n(0)}
    model = ReservoirClassifier(n(3), encoder=torch.nn.Identity(), **sizes, dropout=n(0.5))
    return model.eval()(Q[0])


def encoded(n: Make) -> Any:
    torch.manual_seed(0)
    config = LanguageModelConfig(vocab_size=257, dim=16, num_layers=1, num_heads=2)
    return SentenceEncoder(config, n(3))(byte_tokens(["abc", "d"], n(2)))


REST: dict[str, Callable[[Make], Any]] = {
    "cache": cache,
    "generate": generated,
    "classifier": classified,
    "encoder": encoded,
    "budget": lambda n: with_parameter_budget(SMALL, n(20_000)).mlp_hidden,
    "narma10": lambda n: narma10(n(5), seed=n(2)),
    "mackey_glass": lambda n: mackey_glass(
        n(3), tau=n(17.0), seed=n(2), step=n(1.0), substeps=n(4), transient=n(2)
    ),
    "lorenz": lambda n: lorenz(n(3), step=n(0.5), substeps=n(40), seed=n(1), transient=n(2)),
    "delays": lambda n: delays(n(5), n(2), seed=n(1)),
    "confusion": lambda n: confusion(IDS[0], IDS[0], n(4)),
    "valid_steps": lambda n: valid_steps(Q[0, 0], Q[0, 1], threshold=n(0.5)),
    "mean_and_spread": lambda n: mean_and_spread([n(0.5), n(2.0)]),
    "sign flips": lambda n: sign_flip_probability([n(0.5), n(-2.0)]),
    "testing": lambda n: attention_inputs(AttentionCase(q_len=n(3), seed=n(2))).tensors["q"],
}


def python(x: Any) -> Any:
    return x


def assert_same(found: Any, expected: Any) -> None:
    for one, other in zip(tree_leaves(found), tree_leaves(expected), strict=True):
        assert type(one) is type(other)
        assert torch.equal(one, other) if isinstance(one, Tensor) else one == other


kinds = pytest.mark.parametrize("kind", [numpy_number, numpy_short, array, tensor])


@kinds
@pytest.mark.parametrize("op", OPS)
def test_ops(op: str, kind: Make, backend: str) -> None:
    assert_same(OPS[op](kind, backend), OPS[op](python, backend))


@kinds
@pytest.mark.parametrize("name", REST)
@pytest.mark.usefixtures("native")
def test_everything_else(name: str, kind: Make) -> None:
    assert_same(REST[name](kind), REST[name](python))


@pytest.mark.parametrize("kind", [numpy_number, numpy_short, array])
def test_coefficients_of_one_source_are_ignored(kind: Make, backend: str) -> None:
    expected = value_residual_attention(Q, Q, Q, backend=backend)
    found = value_residual_attention(Q, Q, Q, None, kind(0.5), kind(2), backend=backend)
    assert torch.equal(found, expected)


def test_sequences_of_coefficients(backend: str) -> None:
    expected = mix_values([Q, Q], [0.5, 2.0], backend=backend)
    array: Any = np.array([0.5, 2.0])
    assert torch.equal(mix_values([Q, Q], array, backend=backend), expected)
    learned = torch.tensor([0.5, 2.0], requires_grad=True)
    found = mix_values([Q, Q], learned, backend=backend)  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found.sum(), learned)
    torch.testing.assert_close(gradient, Q.sum().expand(2))


def test_a_leak_of_numpy(backend: str) -> None:
    leak: Any = np.linspace(0.1, 0.9, 8)
    found = reservoir_scan(Q[0], torch.eye(8), leak=leak, backend=backend)
    expected = reservoir_scan(Q[0], torch.eye(8), leak=torch.tensor(leak).float(), backend=backend)
    assert_same(found, expected)
    with pytest.raises(ValueError, match=r"leak must be a number, \(\) or \(8,\), got a tensor"):
        reservoir_scan(Q[0], torch.eye(8), leak=leak[:3])


def test_arrays_of_coefficients_are_refused_by_name() -> None:
    per_head: Any = np.array([[0.5], [2.0]])
    for name in ("lambda_v", "lambda_first"):
        with pytest.raises(TypeError, match=f"{name} must be a number or a tensor, got array"):
            value_residual_attention(Q, Q, Q, Q, **{name: per_head})
    with pytest.raises(TypeError, match="gate must be a number or a tensor, got array"):
        mix_value_embedding(Q, Q[0, :4], IDS, per_head)
    with pytest.raises(TypeError, match=r"coefficients\[0\] must be a number or a tensor"):
        mix_values([Q], [per_head])


@pytest.mark.parametrize("kind", [numpy_number, array, tensor])
def test_whole_graphs(kind: Make, native: str) -> None:
    """Of numbers made outside. The scale is a constant of the graph, which no tensor is."""

    def run(own: Any, first: Any, scale: Any, left: Any) -> Any:
        return value_residual_attention(
            Q, Q, Q, Q, own, first, scale=scale, window=(left, 1), backend=native
        )

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager")
    scale = 0.25 if kind is tensor else kind(0.25)
    found = compiled(kind(0.5), kind(2.0), scale, kind(2))
    torch.testing.assert_close(found, run(0.5, 2.0, 0.25, 2))
    torch.compiler.reset()
