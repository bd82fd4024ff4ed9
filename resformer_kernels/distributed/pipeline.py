"""Pipeline parallelism: the layers of a `LanguageModel` in stages, one a rank.

A stage hands on the residual stream and the values that later layers read, V₁ among them, as plain
tensors; their gradients come back the same way. A stage is an ordinary module for
`torch.distributed.pipelining`:

    stage = pipeline_stage(model, rank, ranks)
    schedule = ScheduleGPipe(PipelineStage(stage, rank, ranks, device), microbatches, loss_fn=loss)
    schedule.step(token_ids=token_ids, target=targets)  # on every rank
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn

from resformer_kernels._core.checks import check_ids, describe, integer
from resformer_kernels.models import LanguageModel
from resformer_kernels.models.language_model import capped, run_block


class LanguageModelStage(nn.Module):
    """Some consecutive layers of a model, with its embedding before the first and its head after
    the last. It holds the model's own modules under their names in the model, so that checkpoints
    of all stages together are a checkpoint of the model. Made by `pipeline_stage`."""

    def __init__(self, model: LanguageModel, layers: range) -> None:
        super().__init__()
        self.config = model.config
        self.layers = layers
        self.is_first = layers.start == 0
        self.is_last = layers.stop == model.config.num_layers
        if self.is_first:
            self.embedding = model.embedding
        self.rotary = model.rotary
        self.blocks = nn.ModuleDict({str(layer): model.blocks[layer] for layer in layers})
        if self.is_last:
            self.norm, self.head = model.norm, model.head

    def forward(self, *received: Tensor, token_ids: Tensor) -> Tensor | tuple[Tensor, ...]:
        """Run the stage's layers.

        Args:
            received: what the stage before returned; nothing in the first.
            token_ids: (B, T) integers below vocab_size, the same in every stage.

        Returns:
            In the last stage the logits, (B, T, vocab_size). In others the residual stream
            (B, T, dim); the values that later layers read, each (B, T, Hkv, D); and in
            "fused-kv-lite", after its middle layer, the keys (B, T, Hkv, D).

        Raises:
            ValueError: token_ids is not (B, T), or longer than max_seqlen.
        """
        check_ids(token_ids, "(B, T)")
        x, earlier, keys = self._before(received, token_ids)
        rotary = self.rotary.on(token_ids.device)(token_ids.shape[1])
        for name, block in self.blocks.items():
            x, earlier, keys = run_block(
                self.config, int(name), block, x, rotary, token_ids, earlier, keys
            )
        if self.is_last:
            return capped(self.head(self.norm(x)), self.config.logit_softcap)
        return x, *earlier, *(() if keys is None else (keys,))

    def _before(
        self, received: tuple[Tensor, ...], token_ids: Tensor
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """The stream, earlier values and keys before this stage's layers."""
        if self.is_first:
            x = self.embedding(token_ids)
            if self.config.embedding_norm:
                x = nn.functional.rms_norm(x, (self.config.dim,))
            return x, (), None
        x, *others = received
        has_keys = self.layers.start > self.config.resolved_middle_layer
        return x, tuple(others[:-1] if has_keys else others), others[-1] if has_keys else None


def pipeline_stage(
    model: LanguageModel, stage: int, stages: int, *, first_layers: list[int] | None = None
) -> LanguageModelStage:
    """The part of a model that one rank of a pipeline runs.

    Args:
        model: the whole model, on the meta device if it is too large; its modules are shared.
        stage: which part, from 0.
        stages: number of parts.
        first_layers: the first layer of each part, from 0; None: parts as even as possible, the
            earlier ones larger.

    Raises:
        ValueError: stage or stages is out of range, first_layers does not start at 0 and grow, or
            the model has `stream_scales`, whose parameters hold numbers of every layer.
    """
    layers = model.config.num_layers
    stages = integer("stages", stages, 1)
    if first_layers is None:
        whole, rest = divmod(layers, stages)
        first_layers = [n * whole + min(n, rest) for n in range(stages)]
    bounds = [*(integer("first_layers", layer) for layer in first_layers), layers]
    if len(bounds) != stages + 1 or bounds[0] or any(a >= b for a, b in pairwise(bounds)):
        raise ValueError(
            f"first_layers must be {stages} layers of {layers}, growing from 0, got "
            f"{describe(first_layers)}"
        )
    if not 0 <= integer("stage", stage) < stages:
        raise ValueError(f"stage must lie in [0, {stages - 1}], got {stage}")
    if model.config.stream_scales:
        raise ValueError("stream_scales must be False in a pipeline, got True")
    return LanguageModelStage(model, range(bounds[stage], bounds[stage + 1]))
