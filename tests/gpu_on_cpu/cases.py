"""What runs on a GPU that is not there: small calls of every op, in the tiles that GPUs are given.

Each is held to float64 as the op's other tests are. Loops are a few steps longer than their
pipelines have stages.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from resformer_kernels.attention.triton.configs import VARIABLE as MIX
from resformer_kernels.testing import AttentionCase, compare_case
from resformer_kernels.testing.kvcache import KVCacheCase
from tests.kvcache.cases import check as check_kvcache
from tests.mix import cases as mix
from tests.reservoir import cases as reservoir
from tests.scan import cases as scan

_BF16, _F16, _F32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """A call of an op. `check()` makes it and raises AssertionError where a result is wrong."""

    op: str
    name: str
    check: Callable[[], None]
    environment: Mapping[str, str] = field(default_factory=dict)
    multiprocessors: int | None = None
    """Of the GPU; None: as many as it has."""
    quick: bool = False
    """Whether every test run has it."""

    @property
    def full_name(self) -> str:
        """Unique among all cases."""
        return f"{self.op}: {self.name}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _attend(case: AttentionCase) -> None:
    wrong = [str(row) for row in compare_case(case, backend="triton") if not row.ok]
    assert not wrong, f"{case}: {wrong}"


def _attention() -> Iterator[Case]:
    usual = AttentionCase(
        batch=1, heads=2, kv_heads=1, q_len=650, k_len=650, causal=True, return_lse=True
    )
    packed = dataclasses.replace(
        usual, lengths=((300, 300), (0, 40), (129, 260), (1, 7)), tail=4, lambda_v="token"
    )
    finished: dict[str, Any] = {"exclusive": "token_head", "out_gate": "token_head"}
    forms: tuple[tuple[str, AttentionCase], ...] = (
        ("causal", usual),
        ("full", dataclasses.replace(usual, causal=False, q_len=400, lambda_v="head")),
        ("window", dataclasses.replace(usual, window=(200, 0), heads=3)),
        ("packed", packed),
        ("softcap, sinks", dataclasses.replace(usual, softcap=20.0, sinks=True, q_len=400)),
        ("epilogue", dataclasses.replace(usual, **finished, lambda_v="token_head", q_len=400)),
        ("packed, epilogue", dataclasses.replace(packed, exclusive="head", out_gate="full")),
        ("mask", dataclasses.replace(usual, bias="mask", causal=False, q_len=300, k_len=300)),
        ("bias", dataclasses.replace(usual, bias="additive", q_len=300, k_len=300)),
        ("bias per key", dataclasses.replace(usual, bias="per_key", q_len=300, k_len=300)),
        ("mixed value", dataclasses.replace(usual, return_mixed_value=True, lambda_v="full")),
    )
    quick = ("causal D64 bfloat16, inline", "packed D64 bfloat16, prologue")
    for dim in (64, 128):
        for dtype in (_BF16, _F16, _F32):
            for name, form in forms:
                if dtype is _F16 and name not in ("causal", "epilogue", "bias"):
                    continue
                case = dataclasses.replace(form, dtype=dtype, head_dim=dim, value_dim=dim)
                for place in ("inline", "prologue"):
                    title = f"{name} D{dim} {_name(dtype)}, {place}"
                    if dtype is _F32:
                        # Tiles of 32 by 32.
                        case = _shorter(case)
                    yield Case(
                        "attention",
                        title,
                        partial(_attend, case),
                        environment={MIX: place},
                        quick=title in quick,
                    )
    odd = dataclasses.replace(usual, head_dim=80, value_dim=40, dtype=_BF16, q_len=300, k_len=300)
    yield Case("attention", "head dimensions 80 and 40", partial(_attend, odd))
    wide = dataclasses.replace(odd, head_dim=256, value_dim=256)
    yield Case("attention", "head dimension 256", partial(_attend, wide))


def _shorter(case: AttentionCase) -> AttentionCase:
    """A case for tiles of 32 rows and 32 keys."""
    lengths = case.lengths and ((70, 70), (0, 9), (33, 161), (1, 7))
    return dataclasses.replace(
        case, q_len=min(case.q_len, 170), k_len=min(case.k_len, 170), lengths=lengths
    )


def _kvcache() -> Iterator[Case]:
    decode = KVCacheCase(
        lengths=(700, 5), heads=8, kv_heads=2, head_dim=64, value_dim=64, return_lse=True
    )
    forms: tuple[tuple[str, KVCacheCase], ...] = (
        ("decode", dataclasses.replace(decode, num_splits=1)),
        ("splits", dataclasses.replace(decode, num_splits=3, sinks=True)),
        ("splits by the GPU", decode),
        ("deep heads", dataclasses.replace(decode, head_dim=128, value_dim=128)),
        ("pages of 16", dataclasses.replace(decode, page_size=16, num_splits=2)),
        ("pages of 256", dataclasses.replace(decode, page_size=256)),
        ("window, mask", dataclasses.replace(decode, window=(300, 0), mask="left")),
        ("prompts", dataclasses.replace(decode, lengths=(300, 40), q_len=70, new_tokens=70)),
        ("packed", dataclasses.replace(decode, q_len=9, new_tokens=9, page_size=16, packed=True)),
        ("packed, splits", dataclasses.replace(decode, q_len=2, packed=True, num_splits=3)),
        (
            "epilogue",
            dataclasses.replace(decode, exclusive="one", out_gate="token_head", num_splits=3),
        ),
    )
    stored = (None, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
    quick = ("splits bfloat16", "pages of 16 int8")
    for name, form in forms:
        for dtype in (_BF16, _F32):
            for quantised in stored if dtype is _BF16 else (None, torch.int8):
                case = dataclasses.replace(form, dtype=dtype, quantised=quantised)
                kinds = [x for x in (dtype, quantised) if x is not None]
                title = f"{name} {_name(kinds[-1])}"
                if len(kinds) == 2 and dtype is _F32:
                    title += " beside float32"
                yield Case(
                    *("kvcache", title, partial(check_kvcache, case, "triton")),
                    multiprocessors=8,
                    quick=title in quick,
                )


def _mix() -> Iterator[Case]:
    forms: dict[str, tuple[str, ...]] = {
        "numbers": ("float", "float"),
        "heads": ("head", "head"),
        "channels": ("channel", "dim"),
        "tokens": ("token", "token_head"),
        "elements": ("full", "full"),
        "sequences": ("sequence", "scalar"),
        "positions": ("position", "head"),
        "many": ("float", "scalar", "head", "full", "token") * 3,
    }
    quick = ("heads bfloat16", "embedding token_head bfloat16")
    for dtype in mix.DTYPES:
        for name, form in forms.items():
            case = mix.Case((2, 140), 3, 64, dtype, form)
            title = f"{name} {_name(dtype)}"
            check = partial(mix.check_budget, mix.values_call, case, "triton")
            yield Case("mix", title, check, quick=title in quick)
        for gate in ("float", "head", "channel", "token_head", "full"):
            case = mix.Case((2, 70), 3, 64, dtype, (gate,))
            title = f"embedding {gate} {_name(dtype)}"
            check = partial(mix.check_budget, mix.embedding_call, case, "triton")
            yield Case("mix", title, check, quick=title in quick)
        for gate in ("token_head", "head", "full"):
            case = mix.Case((2, 70), 3, 64, dtype, (gate,), wide_table=True)
            check = partial(mix.check_budget, mix.embedding_call, case, "triton")
            yield Case("mix", f"embedding {gate} {_name(dtype)}, wide table", check)
        ragged = mix.Case((2, 33), 3, 50, dtype, ("token_head", "head"), layout="heads_first")
        check = partial(mix.check_budget, mix.values_call, ragged, "triton")
        yield Case("mix", f"odd layout {_name(dtype)}", check)


def _scan() -> Iterator[Case]:
    forms: dict[str, dict[str, Any]] = {
        "short": {"length": 70},
        "look-back": {"batch": 1, "length": 700},
        "reverse": {"batch": 1, "length": 600, "reverse": True},
        "packed": {"lengths": (260, 0, 31, 333), "tail": 3},
        "packed, reverse": {"lengths": (40, 500, 1), "reverse": True},
        "constant gates": {"batch": 2, "length": 400, "constant": True},
    }
    quick = ("look-back float32", "packed complex64")
    for dtype in scan.DTYPES:
        for name, form in forms.items():
            case = scan.Case(dtype, 40, **form)
            title = f"{name} {_name(dtype)}"
            check = partial(scan.check_budget, case, "triton")
            yield Case("scan", title, check, quick=title in quick)


def _reservoir() -> Iterator[Case]:
    quick = ("dense chunked", "csr sequential")
    exact = {"tolerance": 0.0}
    for kind in reservoir.KINDS:
        for mode in ("sequential", "chunked"):
            options: dict[str, Any] = {"mode": mode, "options": exact if mode == "chunked" else {}}
            lengths = (50, 0, 3, 41) if kind in ("groups", "csr") else None
            case = reservoir.Case(kind, 72, batch=2, steps=70, lengths=lengths, **options)
            title = f"{kind} {mode}"
            check = partial(reservoir.check_budget, case, "triton")
            # Few multiprocessors: the blocks all have to be resident, and wait for one another.
            yield Case("reservoir", title, check, multiprocessors=6, quick=title in quick)
    narrow = reservoir.Case(units=140, batch=17, steps=5, narrow=True, inputs=33)
    check = partial(reservoir.check_budget, narrow, "triton")
    yield Case("reservoir", "narrow weights, sums in parts", check, multiprocessors=6)


def all_cases() -> dict[str, Case]:
    """Every case by its full name."""
    found = [*_attention(), *_kvcache(), *_mix(), *_scan(), *_reservoir()]
    by_name = {case.full_name: case for case in found}
    assert len(by_name) == len(found)
    return by_name
