"""Numbers of numpy and 0-d tensors where modules take numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from resformer_kernels.models import (
    LanguageModelConfig,
    ReservoirClassifier,
    SentenceEncoder,
    byte_tokens,
    with_parameter_budget,
)
from resformer_kernels.nn import (
    AttentionReadout,
    Reservoir,
    ReservoirMemory,
    RotaryEmbedding,
    ValueResidualAttention,
    stability_report,
)

X = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


def memory(i: Any, f: Any) -> Tensor:
    module = ReservoirMemory(
        Reservoir(i(10), i(8)),
        i(4),
        readout="attention",
        query_dim=i(8),
        window=i(3),
        heads=i(2),
        dropout=f(0.0),
        streams=i(1),
    )
    mlp = ReservoirMemory(Reservoir(i(10), i(8)), i(4), hidden=i(6))
    return torch.cat((module(X), mlp(X)))


def attention(i: Any, f: Any) -> Tensor:
    module = ValueResidualAttention(
        i(8), i(2), i(1), head_dim=i(4), window=(i(2), i(0)), scale=f(0.5)
    )
    return module(X, X[..., :4].unflatten(2, (1, 4)))[0]


def classifier(i: Any, f: Any) -> Tensor:
    module = ReservoirClassifier(
        i(2),
        encoder=nn.Identity(),
        features=i(8),
        hidden=i(16),
        extra_features=i(0),
        dropout=f(0.0),
        input_dropout=f(0.0),
    )
    return module(X)


def encoder(i: Any, f: Any) -> Tensor:
    config = LanguageModelConfig(dim=i(16), num_heads=i(2), vocab_size=i(257), rope_base=f(100.0))
    config = with_parameter_budget(config, i(20_000))
    return SentenceEncoder(config, i(3))(byte_tokens(["a sentence"], i(6)))


CALLS: dict[str, Callable[[Any, Any], Tensor]] = {
    "memory": memory,
    "attention": attention,
    "classifier": classifier,
    "encoder": encoder,
    "readout": lambda i, _: AttentionReadout(i(8), i(8), i(4), window=i(1), heads=i(2))(X, X),
    "rotary": lambda i, f: torch.cat(RotaryEmbedding(i(8), i(9), base=f(100.0))(i(3), i(2))),
    "after": lambda i, _: torch.cat(RotaryEmbedding(i(8), i(9)).after([i(1), i(3)], i(2))),
    "stability": lambda i, _: stability_report(Reservoir(i(30), i(1)), seed=i(3)).eigenvalues.abs(),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize(
    ("integer", "real"),
    [
        (np.int64, np.float32),
        (np.int32, np.float64),
        (np.array, np.array),
        (torch.tensor, torch.tensor),
    ],
    ids=["numpy 64", "numpy 32", "arrays", "tensors"],
)
def test_every_number_is_taken(name: str, integer: Any, real: Any) -> None:
    torch.manual_seed(0)
    expected = CALLS[name](int, float)
    torch.manual_seed(0)
    torch.testing.assert_close(CALLS[name](integer, real), expected)
