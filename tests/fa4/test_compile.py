"""Every form that FlashAttention 4 is said to serve compiles, and what is refused does not."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from resformer_kernels import value_residual_attention, value_residual_attention_varlen
from resformer_kernels._core.hardware import MACHINE, Hardware
from resformer_kernels._core.select import prepare
from resformer_kernels.attention import flash_attn
from resformer_kernels.attention.flash_attn import four
from resformer_kernels.attention.op import BackwardCall
from resformer_kernels.attention.record import LEAVES, AttentionCall
from tests.attention.fake_flash_attn_4 import MODULE, SIGNATURES

# Its compiler warns of the package's own arguments.
pytestmark = pytest.mark.filterwarnings("ignore")


@dataclass(frozen=True)
class Form:
    """A call, as far as it decides what is compiled."""

    head_dim: int = 128
    value_dim: int = 0
    """0: head_dim."""
    causal: bool = True
    window: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    sinks: bool = False
    group: int = 1
    packed: bool = False
    sequences: int = 2
    length: int = 1024
    return_lse: bool = False
    dtype: torch.dtype = torch.bfloat16

    def call(self) -> AttentionCall:
        """The record, on tensors without memory that want gradients. The mix is not compiled."""

        def leaf(*shape: int, dtype: torch.dtype = self.dtype) -> torch.Tensor:
            return torch.empty(shape, dtype=dtype, device="cuda").requires_grad_()

        rows = (self.sequences * self.length,) if self.packed else (self.sequences, self.length)
        heads = 2 * self.group
        options: dict[str, Any] = {"backend": "flash_attn", "causal": self.causal}
        options |= {"window": self.window, "softcap": self.softcap}
        options["return_lse"] = self.return_lse
        options["sinks"] = leaf(heads, dtype=torch.float32) if self.sinks else None
        v = leaf(*rows, 2, self.value_dim or self.head_dim)
        function: Callable[..., Any] = value_residual_attention
        if self.packed:
            function = value_residual_attention_varlen
            offsets = torch.empty(self.sequences + 1, dtype=torch.int32, device="cuda")
            options |= {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
            options |= {"max_seqlen_q": self.length, "max_seqlen_k": self.length}
        q, k = leaf(*rows, heads, self.head_dim), leaf(*rows, 2, self.head_dim)
        call: AttentionCall = prepare(function, q, k, v, **options).call
        return call


PLAIN = Form()
D64, D256, DEEPSEEK = Form(64), Form(256), Form(192, 128)
SIZES = {9: (8, 72, 96, 192), 10: (8, 72, 96)}
PAIRS = ((8, 64), (8, 128), (64, 128), (72, 128), (128, 64), (256, 64), (256, 128))
"""Of capability 10 those that are no wider than 128."""
WIDEST = {9: 256, 10: 128}
BOTH = {
    "causal": PLAIN,
    "full": replace(PLAIN, causal=False),
    "float16": replace(PLAIN, dtype=torch.float16),
    "window": replace(PLAIN, window=(100, 0)),  # kernels of both sides are the same
    "window, left alone": replace(D64, causal=False, window=(100, -1)),
    "window, right alone": replace(D64, causal=False, window=(-1, 30)),
    "softcap": replace(PLAIN, softcap=20.0),
    "sinks and LSE": replace(PLAIN, sinks=True, return_lse=True),
    "group of 8": replace(PLAIN, group=8),
    "group of 3": replace(D64, group=3),
    "packed": replace(PLAIN, packed=True),
    "packed, 300 short sequences": replace(D64, packed=True, sequences=300, length=64),
    "packed, everything": replace(
        D64, packed=True, group=4, window=(50, 0), softcap=5.0, sinks=True, return_lse=True
    ),
    "one query block": replace(D64, length=64),
    "D64": D64,
    "D64, full": replace(D64, causal=False),
    "D256": D256,
    "D256, group of 4": replace(D256, group=4),
    "D256, packed, full": replace(D256, packed=True, causal=False),
    "D192 and 128": DEEPSEEK,
    "D192 and 128, packed, full": replace(DEEPSEEK, packed=True, causal=False),
}
ALONE = {
    9: {
        "D256, everything": replace(
            D256, packed=True, window=(50, 0), softcap=5.0, sinks=True, return_lse=True
        ),
    },
    10: {"grouped, values wider": Form(64, 128, group=2)},
}
REFUSED = {
    9: {
        "values of 256 beside keys of 64": (Form(64, 256), "Insufficient registers"),
        "values of 8 beside keys of 128": (Form(128, 8), "top-level shape equivalence"),
        "grouped, values wider": (Form(64, 128, group=2), "GQA backward requires head_dim"),
        "D12": (Form(12), "is not supported on SM90"),
        "D264": (Form(264), "is not supported on SM90"),
    },
    10: {
        "D136": (Form(136), "is not supported on SM100"),
        "values of 192": (Form(128, 192), "is not supported on SM100"),
        "D256, window": (replace(D256, window=(50, 0)), "does not support local attention"),
        "D256, sinks": (replace(D256, sinks=True), "does not support learnable_sink"),
        "D256, softcap": (replace(D256, softcap=5.0), "does not support softcap"),
        "D256, LSE": (replace(D256, return_lse=True), "does not support dlse"),
    },
}
"""With what the package or the assembler says."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """The forms of the capability that was asked for."""
    major = metafunc.config.getoption("--capability")
    if "served" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every")
        pairs = [pair for pair in PAIRS if max(pair) <= WIDEST[major]]
        sizes = range(8, WIDEST[major] + 1, 8) if every else SIZES[major]
        if every:
            pairs = [(a, b) for a in sizes for b in (64, 128) if a != b]
        forms = BOTH | ALONE[major] | {f"D{size}": Form(size) for size in sizes}
        forms |= {f"D{a} and {b}": Form(a, b) for a, b in pairs}
        metafunc.parametrize("served", forms.values(), ids=list(forms))
    if "refused" in metafunc.fixturenames:
        refused = REFUSED[major]
        metafunc.parametrize(("refused", "error"), refused.values(), ids=list(refused))


class Supposed(Hardware):
    """A GPU of that capability."""

    def __init__(self, major: int) -> None:
        super().__init__()
        self.major = major

    def capability(self, device: torch.device) -> tuple[int, int]:
        del device
        return self.major, 0

    def package(self, name: str, load: Callable[[str], Any]) -> str | tuple[str, ...]:
        """Of the packages, the one under test is there."""
        return MACHINE.package(name, load) if name == MODULE else "it is not installed"


@torch.no_grad()
def compile_both(call: AttentionCall) -> None:
    """Compile forward and the backward of every leaf."""
    out, lse, *_ = four.forward(call._replace(return_lse=True))
    mask = sum(1 << i for i, leaf in enumerate(call.leaves) if leaf is not None)
    d_lse = torch.empty_like(lse) if call.return_lse else None
    given = BackwardCall(torch.empty_like(out), d_lse, None, call, out, lse, None, mask)
    for name, leaf, gradient in zip(LEAVES, call.leaves, four.backward(given), strict=True):
        assert gradient.shape == ((0,) if leaf is None else leaf.shape), name


def caches() -> list[Any]:
    """The kernels that the package has compiled in this process, forward and backward."""
    module: Any = importlib.import_module(MODULE)
    return [module._flash_attn_fwd.compile_cache, module._flash_attn_bwd.compile_cache]


@pytest.mark.usefixtures("no_gpu")
def test_what_it_serves_compiles(major: int, served: Form) -> None:
    call = served.call()
    assert flash_attn.unsupported_reason(call, Supposed(major)) is None
    compile_both(call)
    assert all(cache.cache for cache in caches())


@pytest.mark.usefixtures("no_gpu")
def test_what_it_refuses_does_not_compile(major: int, refused: Form, error: str) -> None:
    call = refused.call()
    assert f"{MODULE}: it" in str(flash_attn.unsupported_reason(call, Supposed(major)))
    MACHINE.package(MODULE, four.load)
    for cache in caches():  # some are refused while a kernel is compiled, and not once it is there
        cache.clear()
    with pytest.raises(Exception, match=error):
        compile_both(call)


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_recorded_signature_is_the_package_s(name: str) -> None:
    parameters = inspect.signature(getattr(importlib.import_module(MODULE), name)).parameters
    found = (
        key if kind.default is kind.empty else f"{key}={kind.default!r}"
        for key, kind in parameters.items()
    )
    assert ", ".join(found) == SIGNATURES[name]
