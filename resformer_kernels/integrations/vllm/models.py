"""Llama and Qwen2 with a value residual, of vLLM's own layers."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM, LlamaModel
from vllm.model_executor.models.utils import extract_layer_index

from resformer_kernels.integrations.transformers.config import SVFORMER
from resformer_kernels.integrations.vllm.backend import refuse
from resformer_kernels.integrations.vllm.layers import SharedValueAttention, value_mix_of_rank
from resformer_kernels.integrations.vllm.pages import ValuePages
from resformer_kernels.nn.value_mix import ValueSources


class ValueResidualAttention(nn.Module):
    """Attention of Llama and Qwen2 over mixed values, or over the first layer's alone.

    Args:
        pages: the pages of values of an SVFormer's earlier layers, the first layer's first, to
            which a layer with values of its own adds its own. None for a ResFormer, whose V'
            vLLM's own backends cache with the keys.

    The others are those of vLLM's `LlamaAttention`.
    """

    def __init__(
        self,
        config: Any,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        max_position_embeddings: int = 8192,
        quant_config: Any = None,
        bias: bool = False,
        bias_o_proj: bool = False,
        cache_config: Any = None,
        prefix: str = "",
        attn_type: str = "decoder",
        *,
        pages: list[ValuePages] | None,
    ) -> None:
        super().__init__()
        refuse("attn_type", str(getattr(attn_type, "value", attn_type)), "decoder")
        layer, ranks = extract_layer_index(prefix), get_tensor_model_parallel_world_size()
        self.num_heads, self.num_kv_heads = num_heads // ranks, max(1, num_kv_heads // ranks)
        self.head_dim = getattr(config, "head_dim", None) or hidden_size // num_heads
        self.v_mix = value_mix_of_rank(config, layer)
        projects = self.v_mix.projects_values
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads if projects else 0)
        self.widths = [self.head_dim * count for count in heads]
        self.qkv_proj = QKVParallelLinear(
            hidden_size,
            self.head_dim,
            num_heads,
            num_kv_heads,
            # transformers' Qwen2 has these biases always, and no field of its config says so.
            bias=bias or "qwen2" in config.model_type,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
            v_head_size=self.head_dim if projects else 0,
        )
        self.o_proj = RowParallelLinear(
            num_heads * self.head_dim,
            hidden_size,
            bias=bias_o_proj,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.rotary_emb = get_rope(
            self.head_dim,
            max_position=max_position_embeddings,
            rope_parameters=config.rope_parameters,
        )
        self.keeps_values = layer == 0 or config.value_residual == "dense"
        kinds = getattr(config, "layer_types", None)
        slides = kinds is not None and kinds[layer] == "sliding_attention"
        options = {
            "num_kv_heads": self.num_kv_heads,
            "cache_config": cache_config,
            "quant_config": quant_config,
            "per_layer_sliding_window": config.sliding_window if slides else None,
            "prefix": f"{prefix}.attn",
        }
        self.attn = self._attention(pages, f"{prefix}.values", options)

    def _attention(
        self, pages: list[ValuePages] | None, name: str, options: dict[str, Any]
    ) -> Attention:
        """vLLM's attention; in an SVFormer over new pages called `name`, or the first layer's."""
        sizes = (self.num_heads, self.head_dim, self.head_dim**-0.5)
        if pages is None:
            return Attention(*sizes, **options)
        owns = self.v_mix.projects_values
        if owns:
            pages.append(ValuePages(name))
        values = pages[-1 if owns else 0]
        return SharedValueAttention(*sizes, **options, values=values, owns_values=owns)

    def forward(self, positions: Tensor, hidden_states: Tensor, earlier: list[Tensor]) -> Tensor:
        """Attend.

        Args:
            positions: (tokens,).
            hidden_states: (tokens, dim).
            earlier: values of earlier layers, (tokens, Hkv, D), the first layer's first. Those of
                this layer are appended where a later one needs them.

        Returns:
            (tokens, dim).
        """
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v = qkv.split(self.widths, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        own = v.unflatten(-1, (-1, self.head_dim)) if self.v_mix.projects_values else None
        mixed = self.v_mix(ValueSources(own, tuple(earlier), hidden_states, None))
        values = mixed.cached()
        # SVFormer's later layers give V1 to vLLM, which asks for values, and append none.
        values = mixed.v_first if values is None else values
        if self.keeps_values:
            earlier.append(values if own is None else own)
        out, _ = self.o_proj(self.attn(q, k, values.flatten(1)))
        return out


class ValueResidualLayer(LlamaDecoderLayer):
    """vLLM's layer of Llama, which passes values on."""

    def __init__(
        self,
        vllm_config: Any,
        prefix: str = "",
        config: Any = None,
        *,
        pages: list[ValuePages] | None,
    ) -> None:
        attention = partial(ValueResidualAttention, pages=pages)
        super().__init__(vllm_config, prefix, config, attn_layer_type=attention)

    def forward(
        self,
        positions: Tensor,
        hidden_states: Tensor,
        residual: Tensor | None,
        earlier: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """The layer's addition to the residual stream, and the stream, (tokens, dim) each."""
        if residual is None:
            residual, hidden_states = hidden_states, self.input_layernorm(hidden_states)
        else:
            hidden_states, residual = self.input_layernorm(hidden_states, residual)
        hidden_states = self.self_attn(positions, hidden_states, earlier)
        hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
        return self.mlp(hidden_states), residual


@support_torch_compile(
    dynamic_arg_dims={
        "input_ids": {0: "b"},
        "positions": {0: "b"},
        "intermediate_tensors": {0: "b"},
        "inputs_embeds": {0: "b"},
    },
)
class ValueResidualModel(LlamaModel):
    """vLLM's model of Llama, of layers that pass values on."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        shares = vllm_config.model_config.hf_config.value_residual == SVFORMER
        pages: list[ValuePages] | None = [] if shares else None
        layer = partial(ValueResidualLayer, pages=pages)
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=layer)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
    ) -> Any:
        """vLLM's, with a list in which layers leave values for later ones."""
        return super().forward(
            input_ids, positions, intermediate_tensors, inputs_embeds, earlier=[]
        )


class ResFormerForCausalLM(LlamaForCausalLM):
    """A ResFormer of Llama or Qwen2, in any variant of `convert_to_resformer`."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_config(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)

    def _init_model(self, vllm_config: Any, prefix: str = "", layer_type: Any = None) -> Any:
        del layer_type
        return ValueResidualModel(vllm_config=vllm_config, prefix=prefix)


class SVFormerForCausalLM(ResFormerForCausalLM):
    """An SVFormer of Llama or Qwen2: vLLM's cache holds K of every layer, and V once."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        check_shared_config(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)


def check_config(vllm_config: Any) -> None:
    """Raise ValueError where vLLM is asked for what no value-residual model is served with."""
    stages = vllm_config.parallel_config.pipeline_parallel_size
    if stages > 1:
        raise ValueError(
            "a value-residual model takes pipeline_parallel_size 1, because each layer reads the "
            f"first layer's values, got {stages}: use tensor_parallel_size"
        )
    if getattr(vllm_config.model_config.hf_config, "dual_chunk_attention_config", None):
        raise ValueError("a value-residual model takes no dual_chunk_attention_config")


def check_shared_config(vllm_config: Any) -> None:
    """Raise ValueError where vLLM is asked for what pages of keys alone do not serve."""
    if vllm_config.lora_config is not None:
        raise ValueError("an SVFormer takes no LoRA adapters: most of its layers have no v_proj")
    if vllm_config.kv_transfer_config is not None:
        raise ValueError(
            "an SVFormer takes no kv_transfer_config: connectors expect keys and values in a page"
        )
