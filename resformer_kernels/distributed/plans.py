"""Tensor parallelism for the language model: each rank has its part of the heads of every layer.

Inside an attention layer tensors are plain and hold this rank's heads, so that the kernels run as
on one device. The first layer's values travel to later layers as this rank's part of them and are
never communicated. A block communicates twice forward, the sums of its attention's and of its MLP's
output, and twice backward, the sums of the gradients of their inputs; where it learns coefficients
that all heads share, their gradients are summed too, a few numbers each.

Every parameter becomes a DTensor on the mesh, those that all ranks use whole included: one
optimizer then serves all of them, and the ranks start from the same values.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
from torch.distributed.tensor.parallel.style import ParallelStyle

from resformer_kernels._core.checks import describe
from resformer_kernels.models import LanguageModel
from resformer_kernels.nn import ValueMix, ValueResidualAttention


def tensor_parallel_plan(
    model: LanguageModel, mesh: DeviceMesh | None = None, *, loss_parallel: bool = False
) -> dict[str, ParallelStyle]:
    """The plan by which `torch.distributed.tensor.parallel.parallelize_module` splits a model.

        plan = tensor_parallel_plan(model, mesh)
        parallelize_module(model, mesh, plan)

    Query heads, KV heads and the hidden channels of the MLP are dealt out in equal parts, a
    parameter that belongs to heads with them; the embedding and the head are split by vocabulary,
    in any parts. The parameters that all heads share are replicated, and their gradients are those
    of one device. Ranks take the same tokens and return the same logits. `model.generate` works on
    all ranks together, from caches that hold each rank's heads.

    For data parallelism as well apply the plan first, with one dimension of a mesh, and then
    `fully_shard` with the other. A model on the meta device is split before it has memory.

    Args:
        model: a `LanguageModel` whose parameters are not distributed yet.
        mesh: the mesh that the plan is for, of one dimension. It is only compared with the model's
            sizes, here and not in the middle of `parallelize_module`; None: there.
        loss_parallel: leave logits split by vocabulary, as DTensors. The loss is then computed and
            run backward inside `torch.distributed.tensor.parallel.loss_parallel()`, which spares
            the exchange and the memory of whole logits, and is a DTensor. Not for `generate`.

    Returns:
        Styles by the names of modules, "" for the model itself.

    Raises:
        TypeError: model is no LanguageModel, or mesh is no DeviceMesh.
        ValueError: the mesh has several dimensions, or more ranks than divide num_heads,
            num_kv_heads or mlp_hidden; or a parameter is distributed already.
    """
    if not isinstance(model, LanguageModel):
        hint = "; make the plan of the model itself" if isinstance(model, nn.Module) else ""
        raise TypeError(f"model must be a LanguageModel, got {type(model).__name__}{hint}")
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"model must not be distributed yet, but {name} is a {type(parameter).__name__}: "
                "apply the plan first, then fully_shard"
            )
    if mesh is not None:
        _check_mesh(model, mesh)
    plan: dict[str, ParallelStyle] = {
        "": _Whole(model),
        "embedding": _Embedding(input_layouts=Replicate(), output_layouts=Replicate()),
        "norm": _ReplicatedNorm(),
        "head": (
            ColwiseParallel(use_local_output=False)
            if loss_parallel
            else ColwiseParallel(output_layouts=Replicate())
        ),
    }
    for index, block in enumerate(model.blocks):
        plan |= {f"blocks.{index}.{name}": style for name, style in _block_plan(block).items()}
    return plan


def _block_plan(block: Any) -> dict[str, ParallelStyle]:
    attention = block.attention
    plan: dict[str, ParallelStyle] = {
        "attention_norm": _ReplicatedNorm(),
        "attention": _LocalHeads(attention),
        "mlp_norm": _ReplicatedNorm(),
        "mlp": _SharedInput(),
    }
    for name, module in block.named_modules():
        if not isinstance(module, nn.Linear):
            continue
        into_stream = name.endswith(("o_proj", "down_proj"))
        plan[name] = RowwiseParallel() if into_stream else ColwiseParallel()
    if placed := _mix_placements(attention.v_mix):
        plan["attention.v_mix"] = _Parameters(placed)
    if hasattr(attention.epilogue, "alpha"):
        plan["attention.epilogue"] = _Parameters({"alpha": Shard(0)})
    return plan


def _mix_placements(v_mix: ValueMix) -> dict[str, Placement]:
    """How a mix's own parameters are placed, which it uses beside this rank's values."""
    axes = {name: v_mix.head_axis(name) for name, _ in v_mix.named_parameters(recurse=False)}
    return {n: Replicate() if axis is None else Shard(axis) for n, axis in axes.items()}


def _check_mesh(model: LanguageModel, mesh: DeviceMesh) -> None:
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {describe(mesh)}")
    if mesh.ndim != 1:
        raise ValueError(
            f"mesh must have one dimension, got {mesh.ndim}: take the one of tensor parallelism, "
            "such as mesh['tp']"
        )
    config, ranks = model.config, mesh.size()
    sizes = {
        "num_heads": config.num_heads,
        "num_kv_heads": config.resolved_kv_heads,
        "mlp_hidden": config.resolved_mlp_hidden,
    }
    for name, size in sizes.items():
        if size % ranks:
            raise ValueError(
                f"{name} must be a multiple of the mesh's {ranks} ranks, got {size}: each takes an "
                "equal part"
            )


def _distribute(
    module: nn.Module,
    placements: Mapping[str, Placement],
    mesh: DeviceMesh,
    src_data_rank: int | None,
) -> None:
    """Make DTensors of the parameters of a module that are named."""
    for name, placement in placements.items():
        parameter = module.get_parameter(name)
        placed = distribute_tensor(parameter, mesh, [placement], src_data_rank=src_data_rank)
        setattr(module, name, nn.Parameter(placed, requires_grad=parameter.requires_grad))


def _replicated(x: Any, mesh: DeviceMesh) -> Any:
    """x, the same on every rank, as a DTensor. Its gradient is summed over the ranks where they
    have parts of it."""
    return x if isinstance(x, DTensor) else DTensor.from_local(x, mesh, [Replicate()])


def _share_input(mesh: DeviceMesh, module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    del module
    return _replicated(inputs[0], mesh), *inputs[1:]


def _to_local(module: nn.Module, inputs: tuple[Any, ...], output: DTensor) -> Tensor:
    del module, inputs
    return output.to_local()


class _Parameters(ParallelStyle):
    """Makes DTensors of a module's own parameters. Its forward reads them by `local_parameter`."""

    def __init__(self, placements: Mapping[str, Placement]) -> None:
        super().__init__()
        self.placements = placements

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, self.placements, device_mesh, self.src_data_rank)
        return module


class _Whole(_Parameters):
    """The model: its own parameters, which scale the residual stream."""

    def __init__(self, model: LanguageModel) -> None:
        own = [name for name, _ in model.named_parameters(recurse=False)]
        super().__init__(dict.fromkeys(own, Replicate()))

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, LanguageModel)
        _check_mesh(module, device_mesh)
        return super()._apply(module, device_mesh)


class _ReplicatedNorm(ParallelStyle):
    """A norm that every rank computes, of a plain tensor, with a replicated weight."""

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        _distribute(module, {"weight": Replicate()}, device_mesh, self.src_data_rank)
        module.register_forward_pre_hook(partial(_share_input, device_mesh))
        module.register_forward_hook(_to_local)
        return module


class _SharedInput(ParallelStyle):
    """A module whose projections read one DTensor, its first input.

    The gradient of that is then summed over the ranks once, not once for every projection.
    """

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        module.register_forward_pre_hook(partial(_share_input, device_mesh))
        return module


class _Embedding(RowwiseParallel):
    """An embedding whose rows are dealt out to ranks; its output is whole on each of them."""

    @staticmethod
    def _prepare_output_fn(
        output_layouts: tuple[Placement, ...],
        use_local_output: bool,
        mod: nn.Module,
        outputs: DTensor,
        device_mesh: DeviceMesh,
    ) -> Tensor:
        del output_layouts, use_local_output, mod, device_mesh
        # Waited for: a compiled block that is given a tensor on its way takes that apart, and its
        # gradient misses the way back through the sum.
        return outputs.full_tensor()


class _LocalHeads(_SharedInput):
    """An attention layer: one input for its projections, and this rank's number of heads."""

    def __init__(self, attention: ValueResidualAttention) -> None:
        super().__init__()
        self.heads = attention.num_heads, attention.num_kv_heads

    def _apply(self, module: nn.Module, device_mesh: DeviceMesh) -> nn.Module:
        assert isinstance(module, ValueResidualAttention)
        module.num_heads, module.num_kv_heads = (n // device_mesh.size() for n in self.heads)
        return super()._apply(module, device_mesh)
