"""Each row of docs/migrating.md, run and compared with the codebase's own formula."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from resformer_kernels import compat, mix_value_embedding, mix_values, value_residual_attention
from resformer_kernels.compat import flash_attn, flash_attn_3

SECTION = (Path(__file__).resolve().parent.parent / "docs" / "migrating.md").read_text()
B, T, HKV, D, DV, VOCAB = 2, 7, 3, 8, 6, 11


def rows(columns: int) -> dict[str, list[str]]:
    """The rows of the table with this many columns, by codebase, without headings."""
    found = {}
    for line in SECTION.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == columns and "---" not in cells[0]:
            found[cells[0]] = cells[1:]
    found.pop("codebase", None)
    return found


def code(cell: str) -> str:
    matched = re.fullmatch(r"`(.+)`", cell)
    assert matched is not None, cell
    return matched[1]


def leaf(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


def rms_norm(x: Tensor) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],))


def names(heads: int) -> dict[str, Any]:
    """The names used in the tables, in float64, with `heads` query heads."""
    random = torch.Generator().manual_seed(0)
    shapes: dict[str, tuple[int, ...]] = {
        "q": (B, T, heads, D),
        "k": (B, T, HKV, D),
        **dict.fromkeys(("v", "v_first", "ve", "anchor"), (B, T, HKV, DV)),
        **dict.fromkeys(("l1", "l2"), ()),
        **dict.fromkeys(("mix", "gate"), (B, T, HKV, 1)),
        **dict.fromkeys(("s1", "s2"), (HKV, DV)),
        "a": (B, T, HKV, DV),
        "g": (B, T, heads, DV),
        "h": (B, T, heads, 1),
        "alpha": (heads, 1),
        "table": (VOCAB, HKV, DV),
    }
    found: dict[str, Any] = {name: leaf(random, *shape) for name, shape in shapes.items()}
    found["layers"] = [found["v_first"], leaf(random, B, T, HKV, DV), found["v"]]
    found["coefficients"] = [leaf(random) for _ in range(3)]
    found["token_ids"] = torch.randint(VOCAB, (B, T), generator=random)
    return found


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention by PyTorch, (B, T, H, D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)


def per_head(x: Tensor) -> Tensor:
    """Transpose (B, T, H, D) to the codebases' layout, (B, H, T, D)."""
    return x.transpose(1, 2)


Formula = Callable[[dict[str, Any]], Tensor]

# Values as the codebases compute them, in their layouts, for the first table.
VALUES: dict[str, Formula] = {
    "paper, Identity": lambda n: (n["v"] + n["v_first"]) / 2,
    "paper, Constant": lambda n: n["v"].add(n["v_first"], alpha=2.0),
    "paper, Learnable": lambda n: (
        torch.stack([n["v_first"], n["v"]])
        .mul(torch.stack([n["l1"], n["l2"]]).view(2, 1, 1, 1, 1))
        .sum(0)
    ),
    "paper, Sparse: the last layers": lambda n: n["v"].add(n["v_first"], alpha=5.0),
    "x-transformers": lambda n: per_head(
        torch.lerp(per_head(n["v_first"]), per_head(n["v"]), per_head(n["mix"]))
    ),
    "alphafold3-pytorch, titans-pytorch": lambda n: per_head(
        torch.lerp(per_head(n["v"]), per_head(n["v_first"]), per_head(n["mix"]))
    ),
    "nanochat, `v_first=ve`": lambda n: (
        n["v"] + (3 * n["gate"].squeeze(-1).sigmoid())[..., None] * n["ve"]
    ),
    "modded-nanogpt, `v_first=ve`": lambda n: n["v"] + 2 / (1 + (-n["gate"]).exp()) * n["ve"],
    "RWKV-7": lambda n: (
        n["v"].flatten(2)
        + (n["v_first"].flatten(2) - n["v"].flatten(2)) * n["a"].flatten(2).sigmoid()
    ).view_as(n["v"]),
    "ExoFormer, `v_first=rms_norm(anchor)`": lambda n: (
        torch.einsum("hd,bthd->bthd", n["s1"], rms_norm(n["anchor"]))
        + torch.einsum("hd,bthd->bthd", n["s2"], n["v"])
    ),
}

# The output of attention, for the second table.
OUTPUTS: dict[str, Formula] = {
    "paper, Dense": lambda n: attend(
        n["q"],
        n["k"],
        torch.einsum("l,lbthd->bthd", torch.stack(n["coefficients"]), torch.stack(n["layers"])),
    ),
    "paper, SVFormer": lambda n: attend(n["q"], n["k"], n["v_first"]),
    "nanochat, without the gather": lambda n: attend(
        n["q"],
        n["k"],
        n["v"]
        + 3
        * n["gate"].sigmoid()
        * functional.embedding(n["token_ids"], n["table"].flatten(1)).view_as(n["v"]),
    ),
    "NeuTRENO": lambda n: attend(n["q"], n["k"], n["v"]) + 0.4 * (n["v_first"] - n["v"]),
    "XSA, the paper": lambda n: without_own(attend(n["q"], n["k"], n["v"]), n["v"]),
    "modded-nanogpt's layer": lambda n: modded_nanogpt(n),
    "Qwen3-Next and other gated attention": lambda n: (
        attend(n["q"], n["k"], n["v"]) / (1 + (-n["g"]).exp())
    ),
}


def without_own(y: Tensor, v: Tensor, share: Tensor | float = 1.0) -> Tensor:
    """y without `share` of its projection onto v: by a projection matrix for each token."""
    unit = v / v.norm(dim=-1, keepdim=True)
    along = torch.einsum("bthi,bthj,bthj->bthi", unit, unit, y)
    return y - share * along


def modded_nanogpt(n: dict[str, Any]) -> Tensor:
    value = mixed_there(n)
    out = without_own(attend(n["q"], n["k"], value), value, n["alpha"].tanh())
    return torch.einsum("bthd,bthi->bthd", out, n["h"].sigmoid())


def mixed_there(n: dict[str, Any]) -> Tensor:
    return n["v"] + 2 * n["gate"].sigmoid() * n["ve"]


def evaluate(expression: str, namespace: dict[str, Any]) -> Any:
    scope = {
        **namespace,
        "rms_norm": rms_norm,
        "sigmoid": torch.sigmoid,
        "tanh": torch.tanh,
        "attend": lambda v: attend(namespace["q"], namespace["k"], v),
        "value_residual_attention": value_residual_attention,
        "mix_values": mix_values,
        "mix_value_embedding": mix_value_embedding,
    }
    return eval(expression, scope)


def assert_same(found: Tensor, expected: Tensor, namespace: dict[str, Any]) -> None:
    """Compare outputs and the gradients of all tensors, including coefficients."""
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    lists = (x if isinstance(x, list) else [x] for x in namespace.values())
    leaves = list({id(x): x for tensors in lists for x in tensors if x.requires_grad}.values())
    grad = torch.cos(torch.arange(expected.numel(), dtype=torch.float64)).view_as(expected)
    options: dict[str, Any] = {"materialize_grads": True, "retain_graph": True}
    ours = torch.autograd.grad(found, leaves, grad, allow_unused=True, **options)
    theirs = torch.autograd.grad(expected, leaves, grad, allow_unused=True, **options)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_every_line_has_a_formula() -> None:
    assert list(rows(5)) == list(VALUES)
    assert list(rows(3)) == list(OUTPUTS)


@pytest.mark.parametrize("codebase", rows(5))
def test_lambdas(codebase: str) -> None:
    values, lambda_v, lambda_first, form = rows(5)[codebase]
    n = names(2 * HKV)
    first = re.search(r"`v_first=(.+)`", codebase)
    coefficients = [evaluate(code(cell), n) for cell in (lambda_v, lambda_first)]
    out = value_residual_attention(
        n["q"],
        n["k"],
        n["v"],
        n["v_first"] if first is None else evaluate(first[1], n),
        *coefficients,
        causal=True,
    )
    own = VALUES[codebase](n)
    assert_same(evaluate(code(values), n), own, n)
    assert_same(out, attend(n["q"], n["k"], own), n)
    tensors = [x for x in coefficients if isinstance(x, Tensor)]
    if form == "float":
        assert not tensors
    else:
        expected = evaluate(code(form), {"B": B, "T": T, "Hkv": HKV, "Dv": DV})
        assert tensors
        assert all(x.shape == expected for x in tensors)


@pytest.mark.parametrize("codebase", rows(3))
def test_other_forms(codebase: str) -> None:
    theirs, ours = rows(3)[codebase]
    n = names(HKV)
    expected = OUTPUTS[codebase](n)
    value = mixed_there(n)
    scope = {
        **n,
        "y": attend(n["q"], n["k"], value),
        "vn": functional.normalize(value, dim=-1, eps=1e-4),
    }
    assert_same(evaluate(code(theirs), scope), expected, n)
    assert_same(evaluate(code(ours), scope), expected, n)


def test_imports() -> None:
    (block,) = re.findall(r"```python\n(.+?)```", SECTION, re.DOTALL)
    scope: dict[str, Any] = {}
    exec(block, scope)
    q = torch.randn(2, 4, 4, 8)
    assert scope["scaled_dot_product_attention"](q, q, q).shape == q.shape
    assert scope["flash_attn_func"](q, q, q).shape == q.shape
    assert scope["flash_attn_3"].flash_attn_func(q, q, q).shape == q.shape
    assert "flash_attn_varlen_func" in scope


X, ROWS = torch.ones(1, 2, 2, 8), torch.ones(2, 2, 8)
CU, TABLE = torch.tensor([0, 2], dtype=torch.int32), torch.zeros(1, 1, dtype=torch.int32)
PACKED: dict[str, Any] = {
    **dict.fromkeys(("cu_seqlens_q", "cu_seqlens_k"), CU),
    **dict.fromkeys(("max_seqlen_q", "max_seqlen_k"), 2),
}


def jagged(holes: bool = False) -> Tensor:
    lengths = torch.tensor([1]) if holes else None
    return torch.nested.nested_tensor_from_jagged(ROWS, CU.long(), lengths).transpose(1, 2)


def sdpa(x: Tensor, **options: Any) -> Any:
    return compat.scaled_dot_product_attention(x, x, x, **options)


def paged(**options: Any) -> Any:
    return flash_attn.flash_attn_varlen_func(ROWS, X, X, **PACKED, block_table=TABLE, **options)


def flash_3(**options: Any) -> Any:
    return flash_attn_3.flash_attn_func(X, X, X, **options)


# What the table of refusals says, in its order: (a word of its row, the call, what it names).
REFUSED: list[tuple[str, Callable[[], Any], str]] = [
    ("all", lambda: sdpa(X, dropout_p=0.1), "dropout_p"),
    ("all", lambda: flash_attn.flash_attn_func(X, X, X, 0.1), "dropout_p"),
    ("all", lambda: flash_attn.flash_attn_func(X, X, X, alibi_slopes=X), "alibi_slopes"),
    ("all", lambda: sdpa(torch.nested.nested_tensor([X[0], X[0]])), "nested"),
    ("all", lambda: sdpa(X.to_sparse()), "sparse"),
    ("PyTorch's", lambda: sdpa(jagged(), attn_mask=X), "attn_mask"),
    ("PyTorch's", lambda: sdpa(jagged(holes=True)), "holes"),
    ("FlashAttention 2's", lambda: paged(v_first=X), "v_first"),
    *(
        ("FlashAttention 3's", partial(flash_3, **{name: 1}), name)
        for name in ("qv", "q_descale", "k_descale", "v_descale", "attention_chunk")
    ),
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_is_refused_is_named() -> None:
    table = rows(2)
    table.pop("drop-in")
    assert list(table) == list(dict.fromkeys(row for row, _, _ in REFUSED))
    for row, call, named in REFUSED:
        assert named in table[row][0] or named == "dropout_p"
        with pytest.raises((NotImplementedError, TypeError, ValueError), match=named):
            call()
    assert torch.equal(flash_3(pack_gqa=True, sm_margin=4), flash_3())
