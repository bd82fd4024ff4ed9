"""What known faults of Triton's compilers mean for the kernels here: refused, avoided, or told of.

A compiler is refused where its fault is in what every kernel with a matrix product does. Where a
fault needs a form that kernels can do without, they do without it: `compile-check` fails on a
kernel that has it, whichever version is installed. Where kernels cannot do without the form, and
none is known to have gone wrong on that GPU, `explain` tells of it.
"""

from __future__ import annotations

from typing import NamedTuple

from torch.torch_version import TorchVersion


class Fault(NamedTuple):
    """Versions of Triton that compile something wrongly."""

    issue: str
    """Where it is described."""
    capabilities: tuple[tuple[int, int], ...]
    """Compute capabilities of the GPUs that it shows on."""
    since: str
    """The oldest version that is known to have it."""
    before: str | None
    """The oldest newer version without it; None where none is known."""
    wrong: str
    """What goes wrong."""
    avoided: bool = False
    """Whether the kernels avoid it."""
    told: bool = False
    """Whether `explain` tells of it; versions are refused where it is neither told nor avoided."""

    def has(self, version: TorchVersion, capability: tuple[int, int]) -> bool:
        """Whether a version shows it on a GPU."""
        mended = self.before is not None and version >= self.before
        return capability in self.capabilities and version >= self.since and not mended


REUSED_EARLY = Fault(
    "triton-lang/triton 11047",
    ((9, 0),),
    "3.6",
    "3.9",
    "shared memory may be written while another warp group still multiplies with it",
    avoided=True,
)
TRANSPOSED_PRODUCT = Fault(
    "fla-org/flash-linear-attention 640",
    ((9, 0),),
    "3.4",
    None,
    "a product whose operand is the transpose of another product is wrong",
    avoided=True,
)
NARROW_ON_HOPPER = Fault(
    "triton-lang/triton 11366",
    ((9, 0),),
    "3.7",
    None,
    "products 32 wide in programs of four warps read shared memory out of bounds",
    avoided=True,
)
NARROW_ON_BLACKWELL = Fault(
    "triton-lang/triton 9871",
    ((10, 0), (10, 3)),
    "3.6",
    "3.7",
    "pipelined products at most 32 wide in programs of four warps differ from run to run",
    avoided=True,
)
UNFENCED_COPIES = Fault(
    "triton-lang/triton 10537",
    ((9, 0), (10, 0)),
    "3.6",
    "3.7.1",
    "products read what cp.async copied without the fence between proxies that PTX asks for; no "
    "wrong result is known on 9.0, nor of 3.6 on 10.0",
    told=True,
)
FAULTS = (
    REUSED_EARLY,
    TRANSPOSED_PRODUCT,
    NARROW_ON_HOPPER,
    NARROW_ON_BLACKWELL,
    UNFENCED_COPIES,
    Fault(
        "pytorch/pytorch 181248",
        ((10, 0),),
        "3.7",
        "3.7.1",
        "products may read what cp.async copied too early",
    ),
    Fault(
        "triton-lang/triton 10821",
        ((10, 3),),
        "3.6",
        "3.9",
        "two products into one accumulator are wrong",
    ),
    Fault(
        "triton-lang/triton 10590",
        ((10, 3),),
        "3.6",
        "3.7.1",
        "results of products differ from run to run",
    ),
)


def refusal(version: str, capability: tuple[int, int]) -> str | None:
    """Why a version of Triton is not used on a GPU of a compute capability; None if it may be."""
    for fault in FAULTS:
        if not fault.avoided and not fault.told and fault.has(TorchVersion(version), capability):
            found = ".".join(str(part) for part in capability)
            return (
                f"Triton {version} compiles wrongly for compute capability {found} "
                f"({fault.wrong}: {fault.issue}); {fault.before or 'none'} is the oldest known to "
                "do without"
            )
    return None


def notes(version: str, capability: tuple[int, int]) -> list[str]:
    """What `explain` says of a version of Triton on a GPU of a compute capability."""
    return [
        f"Triton {version}: {fault.wrong} ({fault.issue}; mended in {fault.before})"
        for fault in FAULTS
        if fault.told and fault.has(TorchVersion(version), capability)
    ]
