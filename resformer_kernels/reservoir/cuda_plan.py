"""Whether the CUDA kernel's blocks can hold W and the states.

`csrc/reservoir/reservoir_blocks.h` has the same rule, and chooses the fastest split.
"""

from __future__ import annotations

_VECTOR = 4
_SPAN_BYTES = 24


def fits(
    groups: int,
    size: int,
    inputs: int,
    sequences: int,
    element_bytes: int,
    *,
    multiprocessors: int,
    block_bytes: int,
) -> bool:
    """Whether `groups` of `size` units with `inputs` (0: the drive itself) fit into one block per
    multiprocessor, each with `block_bytes` of shared memory."""

    def possible(whole: int, split: int) -> bool:
        each = _shares(size, split)
        parts = _shares(size, each)
        members = groups * parts if parts > 1 else _shares(groups, whole)
        if members > multiprocessors:
            return False
        teams = max(1, min(sequences, multiprocessors // members))
        together = max(1, _shares(sequences, teams))
        needed = _bytes(whole, whole * each, size, inputs, together, element_bytes)
        return needed <= block_bytes

    most = multiprocessors // groups
    return any(possible(whole, 1) for whole in _doubling(1, groups)) or any(
        possible(1, split) for split in _doubling(2, most)
    )


def _doubling(first: int, last: int) -> list[int]:
    """`first`, twice that, and so on up to `last`."""
    found = []
    while first < 2 * last:
        found.append(min(first, last))
        first *= 2
    return found


def _shares(of: int, by: int) -> int:
    return (of + by - 1) // by


def _bytes(whole: int, own: int, size: int, inputs: int, sequences: int, element_bytes: int) -> int:
    """Shared memory of a block with `own` units, of `whole` groups or a part of one."""
    padded, padded_inputs = _shares(size, _VECTOR) * _VECTOR, _shares(inputs, _VECTOR) * _VECTOR
    weights = own * (element_bytes * padded + 4 * padded_inputs + 8)
    of_a_sequence = 8 * (whole * padded + padded_inputs) + 20 * own + _SPAN_BYTES
    return weights + sequences * of_a_sequence
