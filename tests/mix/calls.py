"""Calls of the ops of `mix_values` in a namespace, correct and wrong: (op, arguments)."""

from __future__ import annotations

from typing import Any

import torch

Calls = list[tuple[Any, tuple[Any, ...]]]


def values_calls(ops: Any) -> Calls:
    a, b = torch.randn(2, 5, 2, 4), torch.randn(2, 5, 2, 4)
    head, none = torch.randn(1, 1, 2, 1), torch.empty(0)
    return [
        (ops.mix_values_forward, ([a, b], [head, none], [1.0, 0.5])),
        (ops.mix_values_backward, (a, [b, none], [head, none], [1.0, 0.5], [1, 0, 1, 0])),
    ]


def wrong_values_calls(ops: Any) -> Calls:
    v, gate, none = torch.randn(2, 6, 2, 4), torch.randn(2, 6, 2, 1), torch.empty(0)
    forward, backward = ops.mix_values_forward, ops.mix_values_backward
    return [
        (forward, ([], [], [])),
        (forward, ([v], [], [1.0])),
        (forward, ([v, v[:, :3]], [none, none], [1.0, 1.0])),
        (forward, ([v, v.bfloat16()], [none, none], [1.0, 1.0])),
        (forward, ([v[..., ::2]], [none], [1.0])),
        (forward, ([v.double()], [none], [1.0])),
        (forward, ([v[0, 0]], [none], [1.0])),
        (forward, ([v], [gate[:, :3]], [1.0])),
        (forward, ([v], [gate[0]], [1.0])),
        (forward, ([v], [gate.half()], [1.0])),
        (backward, (v, [v], [gate], [1.0], [1])),
        (backward, (v, [none], [gate], [1.0], [1, 1])),
        (backward, (v, [v], [none], [1.0], [1, 1])),
    ]
