"""Batches, heads and sequences that are split across ranks, on torch.distributed."""

from resformer_kernels.distributed import sharding
from resformer_kernels.distributed.context import ShardedSequence, context_parallel
from resformer_kernels.distributed.pipeline import pipeline_stage
from resformer_kernels.distributed.plans import tensor_parallel_plan
from resformer_kernels.distributed.readout import sum_readout
from resformer_kernels.distributed.transport import Traffic, traffic

__all__ = [
    "ShardedSequence",
    "Traffic",
    "context_parallel",
    "pipeline_stage",
    "sum_readout",
    "tensor_parallel_plan",
    "traffic",
]

# Once every op is there.
sharding.register()
