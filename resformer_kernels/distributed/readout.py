"""The data of readouts, summed over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from resformer_kernels.distributed.transport import Ranks, ranks_of
from resformer_kernels.nn.ridge import Ridge, RidgeSums


@torch.no_grad()
def sum_readout(ridge: Ridge, mesh: Any) -> Ridge:
    """Give every rank's `nn.Ridge` the data of all: `solve` then fits as one process would that
    saw every row, with the same bits on every rank.

    Every rank calls it once, after its last `update`; called twice, it counts all rows as often as
    there are ranks. Ranks without data are fine. It sends about twice the sums' own size,
    2 N (N + m) numbers of float64, however many the ranks are.

    Args:
        ridge: a `Ridge` of the same sizes on every rank; changed in place.
        mesh: a DeviceMesh of one axis, or a ProcessGroup: the ranks.

    Returns:
        `ridge`, whose `count` is that of all ranks.

    Raises:
        TypeError: `ridge` is no `nn.Ridge`. ValueError, on every rank: sizes or `fit_intercept`
        differ between ranks, or the sums are not finite.
    """
    if not isinstance(ridge, Ridge):
        raise TypeError(f"ridge must be an nn.Ridge, got {type(ridge).__name__}")
    ranks, own = ranks_of(mesh), ridge.sums
    form = (ridge.in_features, ridge.out_features, int(ridge.fit_intercept))
    told = torch.tensor((*form, ridge.count, own is not None), device=ridge.weight.device)
    *forms, counts, seen = ranks.gather("sizes", told).T.tolist()
    every = list(zip(*forms, strict=True))
    if len(set(every)) > 1:
        raise ValueError(
            "ridge must have the same in_features, out_features and fit_intercept on every rank, "
            f"got {every}"
        )
    if not any(seen):
        return ridge
    if own is None:
        own = _nothing(ridge)
    means = ranks.gather("means", torch.cat((own.x_mean, own.y_mean)))
    # As `Ridge` merges batches (Chan, Golub and LeVeque, 1983), all at once: each rank moves its
    # products to the mean of all rows, which every rank finds in the order of the ranks.
    mean, total = torch.zeros_like(means[0]), 0
    for count, of_rank in zip(counts, means, strict=True):
        total += count
        mean = mean + (count / total if total else 0.0) * (of_rank - mean)
    moved = own.about(ridge.count, mean[: ridge.in_features], mean[ridge.in_features :])
    products = _summed(ranks, torch.cat((moved.gram, moved.cross), 1))
    gram, cross = products.split((ridge.in_features, ridge.out_features), 1)
    return ridge.hold(moved._replace(gram=gram.contiguous(), cross=cross.contiguous()), total)


def _nothing(ridge: Ridge) -> RidgeSums:
    n, m = ridge.in_features, ridge.out_features
    like = ridge.weight
    shapes = ((n, n), (n, m), (n,), (m,))
    return RidgeSums(*(like.new_zeros(shape, dtype=torch.float64) for shape in shapes))


def _summed(ranks: Ranks, x: Tensor) -> Tensor:
    """The sum over ranks: each sums a share of the rows, in the ranks' order, for all."""
    share = -(-x.shape[0] // ranks.count)
    padded = torch.cat((x, x.new_zeros(share * ranks.count - x.shape[0], x.shape[1])))
    part = ranks.scatter_sum("products", padded.unflatten(0, (ranks.count, share)))
    return ranks.gather("products", part).flatten(0, 1)[: x.shape[0]]
