"""Tensor parallelism by transformers' plans: what becomes of a mix of values.

The plan of a family shards the projections by heads, so that attention gets this rank's values, as
plain tensors. Its rule for `v_mix` is the style below. The first layer's values are passed on as
this rank's, and never communicated.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES, TensorParallelLayer

from resformer_kernels.nn import ValueMix

STYLE = "resformer_v_mix"
"""The name of the style in plans."""


class _MixParallel(TensorParallelLayer):
    """Makes DTensors of a mix's coefficients: sharded where each is a KV head's, else replicated.

    The mix reads this rank's part beside this rank's values. Where all heads share a coefficient
    its gradient is the sum over the ranks' heads.
    """

    def shard_param(self, module: nn.Module, param: str, mesh: Any) -> None:
        # Not at the top: a torch without distributed has no such module.
        from torch.distributed.tensor import Replicate, Shard, distribute_tensor

        assert isinstance(module, ValueMix)
        axis, parameter = module.head_axis(param), module.get_parameter(param)
        placement = Replicate() if axis is None else Shard(axis)
        # Every rank has the same coefficients: none, before a checkpoint is read, or the initial.
        placed = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
        setattr(module, param, nn.Parameter(placed, requires_grad=parameter.requires_grad))

    def install_forward(self, module: nn.Module, mesh: Any) -> nn.Module:
        del mesh
        return module


ALL_PARALLEL_STYLES.register(STYLE, _MixParallel())


def with_mixes(plan: dict[str, str] | None, attention_name: str) -> dict[str, str] | None:
    """A family's plan of tensor parallelism with the rule for its mixes; None where it has none."""
    return plan and {**plan, f"layers.*.{attention_name}.v_mix": STYLE}


def distribute_mixes(model: Any) -> None:
    """Plan for the new mixes of a converted model, and apply the plan where the model is
    tensor-parallel already."""
    for part in (model.base_model, model):
        part.init_parallel_plans()
    if (getattr(model, "_tp_size", None) or 1) == 1:
        return
    mesh = model._device_mesh
    mesh = mesh["tp"] if mesh.ndim > 1 else mesh
    for module in model.modules():
        if isinstance(module, ValueMix):
            for name, _ in list(module.named_parameters(recurse=False)):
                ALL_PARALLEL_STYLES[STYLE].shard_param(module, name, mesh)
