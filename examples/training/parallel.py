"""How a run is spread over ranks: FSDP2 x context parallel x tensor parallel.

The ranks form a mesh (data, context, tensor). Parameters are sharded over data x context, the
"shards"; the ranks of one tensor group share each layer, those of one context group each sequence.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import parallelize_module

from resformer_kernels.models import LanguageModel
from training import FlagError
from training.options import Options, check


@dataclass(frozen=True)
class Layout:
    """Where this rank stands."""

    rank: int
    world: int
    context: int
    tensor: int
    device: torch.device
    mesh: DeviceMesh | None
    """(data, context, tensor); None where there is one rank, which is sharded in no way."""
    shards: DeviceMesh | None
    """(data x context,), over which parameters are sharded and gradients are summed."""
    patience: timedelta
    """How long this rank waits for the others."""
    joined: bool
    """Whether this run made its process group, and ends it."""

    @property
    def data(self) -> int:
        """Ranks, or groups of them, with sequences of their own."""
        return self.world // (self.context * self.tensor)

    @property
    def shard_count(self) -> int:
        """Ranks that hold different tokens."""
        return self.data * self.context

    @property
    def data_rank(self) -> int:
        """Which sequences of a batch are this rank's."""
        return self.rank // (self.context * self.tensor)


def ranks() -> int:
    """Number of ranks: what torchrun says, or the process group that is there already."""
    if dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is rank 0, the one that talks."""
    if dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


def start(options: Options) -> Layout:
    """Join the other ranks. FlagError, naming the flag, where the flags do not fit them."""
    check(options, ranks())
    kind = options.device
    if kind == "auto":
        kind = "cuda" if torch.cuda.is_available() else "cpu"
    elif kind == "cuda" and not torch.cuda.is_available():
        raise FlagError("--device cuda: this torch finds no CUDA device")
    device = torch.device(kind)
    if kind == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    patience = timedelta(seconds=options.timeout)
    joins = not dist.is_initialized() and "RANK" in os.environ
    if joins:
        # gloo beside NCCL carries what checkpoints agree on, off the GPU.
        backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=patience)
    world, context, tensor = ranks(), options.context_parallel, options.tensor_parallel
    mesh = shards = None
    if world > 1:
        sizes = (world // (context * tensor), context, tensor)
        mesh = init_device_mesh(kind, sizes, mesh_dim_names=("data", "context", "tensor"))
        shards = mesh["data", "context"]._flatten("shards")
        # A group made for a mesh has torch's own timeout, half an hour on gloo.
        for group in (*mesh.get_all_groups(), shards.get_group()):
            _set_pg_timeout(patience, group)
    rank = dist.get_rank() if dist.is_initialized() else 0
    return Layout(rank, world, context, tensor, device, mesh, shards, patience, joins)


def finish(layout: Layout) -> None:
    """Wait for all ranks, and leave them."""
    barrier(layout)
    if layout.joined:
        dist.destroy_process_group()


def barrier(layout: Layout) -> None:
    """Wait for all ranks."""
    if layout.world > 1:
        dist.barrier()


def new_group(layout: Layout, backend: str) -> dist.ProcessGroup | None:
    """All ranks again, with connections of their own; None where there is one rank."""
    if layout.world == 1:
        return None
    return dist.new_group(backend=backend, timeout=layout.patience)


def spread(model: LanguageModel, layout: Layout, options: Options) -> None:
    """Shard a model over the ranks, in place. Every rank gives the same weights."""
    if layout.tensor > 1:
        from resformer_kernels.distributed import tensor_parallel_plan

        assert layout.mesh is not None
        mesh = layout.mesh["tensor"]
        # What it warns of, gathering along two axes in turn, happens once, for the stored model.
        logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)
        parallelize_module(model, mesh, tensor_parallel_plan(model, mesh))
    if options.compile:
        for block in model.blocks:
            block.compile()
    if layout.shards is None:
        model.to(layout.device)
        return
    policy = MixedPrecisionPolicy()
    if options.mixed_precision == "fsdp":
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    # The model changes none of its blocks' outputs, the values among them, in place.
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
    for block in model.blocks:
        fully_shard(block, mesh=layout.shards, mp_policy=policy)
    fully_shard(model, mesh=layout.shards, mp_policy=policy)


@contextmanager
def sequences(layout: Layout, length: int) -> Iterator[Callable[[Tensor], Tensor]]:
    """A context for forward and backward of sequences of `length` tokens, and a function that takes
    (B, length) to the part that this rank works on."""
    if layout.context == 1:
        yield lambda x: x
        return
    from resformer_kernels.distributed import context_parallel

    assert layout.mesh is not None
    with context_parallel(layout.mesh["context"], length=length, balanced=True) as sequence:
        yield lambda x: sequence.shard(x, 1)


def total(x: Tensor, layout: Layout) -> Tensor:
    """The sum of x over the ranks with different tokens."""
    if layout.shards is not None:
        dist.all_reduce(x, group=layout.shards.get_group())
    return x


def clip(parameters: Iterable[nn.Parameter], largest: float) -> Tensor:
    """Scale gradients so that their norm over all ranks is at most `largest`; the norm before, ().

    One sum over all ranks, so that every rank scales by the same bits.
    """
    held = [p for p in parameters if p.grad is not None]
    parts = []
    for p in held:
        grad, copies = p.grad, 1
        if isinstance(grad, DTensor):
            sizes = zip(grad.placements, grad.device_mesh.shape, strict=True)
            copies = math.prod(size for placement, size in sizes if placement.is_replicate())
            grad = grad.to_local()
        assert grad is not None
        parts.append(torch.linalg.vector_norm(grad).square() / copies)
    square = torch.stack(parts).sum()
    if dist.is_initialized():
        dist.all_reduce(square)
    norm = square.sqrt()
    nn.utils.clip_grads_with_norm_(held, largest, norm)
    return norm
