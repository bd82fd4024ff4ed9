"""What the names of fields and arguments do not tell, by family."""

from __future__ import annotations

from typing import Any


def rotary(sections: list[int]) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections}


NECK: dict[str, Any] = {"num_hidden_layers": 4, "out_indices": [1, 2, 3, 4]}
WIDTHS = {"encoder_in_channels": [16, 32, 64], "decoder_in_channels": [64, 64, 64]}
TIMES = {
    "prediction_length": 4,
    "num_time_features": 2,
    "context_length": 8,
    "lags_sequence": [1, 2, 3],
}
UNGROUPED = {"num_key_value_heads": 4}
MIMI = {
    "upsample_groups": 64,
    "num_filters": 8,
    "codebook_dim": 64,
    "codebook_size": 64,
    "vector_quantization_hidden_dimension": 64,
    "num_quantizers": 4,
    **UNGROUPED,
}
SHARED = {"num_hidden_layers": 4, "num_kv_shared_layers": 2}
SWA = ["sliding_attention", "full_attention"]
ASSISTANT = {
    "text_config": {
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": 0,
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 2,
        "layer_types": SWA,
    },
    "num_centroids": 8,
    "centroid_intermediate_top_k": 2,
}

EVOLLA = {
    "protein_encoder_config": {
        "vocab_size": 96,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 96,
        "max_position_embeddings": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.3,
    }
}
CODEC = {"encoder_hidden_size": 8, "quantization_dim": 128, **UNGROUPED}
MILD: dict[str, Any] = {"init_std": 0.05, "backbone_config": {"initializer_range": 0.05}}
VOCABULARY = {
    "vocabulary_map": {"<image>": 64, **{f"IMGIMG{x}Z": 65 + i for i, x in enumerate("ABCDEFGH")}}
}

CONFIGS: dict[str, dict[str, Any]] = {
    "informer": TIMES,
    "time_series_transformer": TIMES,
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_state": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {
        "layer_types": ["linear_attention", "full_attention"],
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
    },
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "hybrid"],
        "num_hidden_layers": 3,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"],
        "num_hidden_layers": 2,
        "n_mamba_heads": 8,
    },
    "mamba2": {"num_heads": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}
    },
    "cosmos3_edge_text": {"rope_parameters": rotary([4, 2, 2])},
    "paddleocr_vl_text": {"rope_parameters": rotary([4, 2, 2])},
    "ernie4_5_vl_moe_text": {"rope_parameters": rotary([3, 3, 2])},
    "csm": {"codec_config": MIMI, "num_codebooks": 4},
    "csm_depth_decoder_model": {"num_codebooks": 4},
    "mimi": MIMI,
    "mimi_encoder": MIMI,
    "mimi_decoder": MIMI,
    "pocket_tts_audio_tokenizer": {"upsample_groups": 64, "num_filters": 8, **UNGROUPED},
    "pocket_tts_audio_tokenizer_encoder": {"upsample_groups": 64, "num_filters": 8, **UNGROUPED},
    "pocket_tts_audio_tokenizer_decoder": {"upsample_groups": 64, "num_filters": 8, **UNGROUPED},
    "cvt": {"embed_dim": [16, 48, 96], "depth": [1, 2, 3]},
    "d_fine": {**WIDTHS, "encoder_in_channels": [32, 64, 128]},
    "deimv2": {**WIDTHS, "encoder_in_channels": [32, 64, 128]},
    "pp_doclayout_v3": {**WIDTHS, "encoder_in_channels": [32, 64, 128]},
    "pp_doclayout_v4": {**WIDTHS, "encoder_in_channels": [32, 64, 128]},
    "rt_detr": WIDTHS,
    "rt_detr_v2": WIDTHS,
    "vitmatte": {"fusion_hidden_sizes": [32, 16, 8, 8]},
    "pp_doclayout_v2": {"encoder_layers": 3, **WIDTHS, "encoder_in_channels": [32, 64, 128]},
    "depth_pro": {
        "image_model_config": {"image_size": 32, "patch_size": 8},
        "patch_model_config": {"image_size": 32, "patch_size": 8},
        "fov_model_config": {"image_size": 32, "patch_size": 8},
        "patch_size": 32,
        "intermediate_hook_ids": [1, 0],
        "intermediate_feature_dims": [32, 32],
        "scaled_images_feature_dims": [32, 32, 32],
    },
    "depth_anything": {"backbone_config": NECK},
    "prompt_depth_anything": {"backbone_config": NECK},
    "tipsv2_dpt": {"backbone_config": NECK},
    "esmc": UNGROUPED,
    "esmfold2": {"esmc_config": UNGROUPED},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma3n_text": {
        **SHARED,
        "layer_types": SWA + SWA,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "intermediate_size": [96] * 4,
        "laurel_rank": 8,
    },
    "gemma4_text": {**SHARED, "layer_types": SWA + SWA},
    "gemma4_assistant": ASSISTANT,
    "gemma4_unified_assistant": ASSISTANT,
    "glm5_next_text": {"head_dim": 0, "index_topk": 4, "index_kpool": 2},
    "gradium_phonon_tts": {"flow_head_config": {"condition_dim": 64}},
    "pocket_tts": {"flow_head_config": {"condition_dim": 64}},
    "granite_speech5_encoder": UNGROUPED,
    "lilt": {"hidden_size": 96},
    "dots1": {"num_local_experts": 4, "n_shared_experts": 1},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "chameleon": VOCABULARY,
    "emu3": {**VOCABULARY, "vq_config": {"codebook_size": 64}},
    "oneformer": {"task_seq_len": 7, "text_encoder_width": 64, "text_encoder_n_ctx": 2},
    "timesfm": {"context_length": 64, "patch_length": 16, "horizon_length": 16},
    "timesfm2_5": {"context_length": 64, "patch_length": 16, "horizon_length": 16},
    "kosmos-2": {"latent_query_num": 6},
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32},
    "levit": {"hidden_sizes": [32, 64, 96], "num_attention_heads": [2, 4, 6], "depths": [2, 2, 2]},
    "mobilevit": {"hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 12, 16, 16, 20, 64]},
    "molmo2": {
        "adapter_config": {"vision_feature_layer": [1, 0]},
    },
    "moonshine_streaming": {"num_key_value_heads": 4, "encoder_config": UNGROUPED},
    "muse_spark_audio": {"num_hidden_layers": 4},
    "nemotron3_5_transcribe_word_timestamp": UNGROUPED,
    "patchtst": {"patch_length": 4, "patch_stride": 4, "do_mask_input": False},
    "perceiver": {"d_latents": 64, "image_size": 16, "train_size": [16, 16], "num_frames": 2},
    "pvt": {"image_size": 64, "patch_sizes": [4, 2, 2, 2]},
    "qwen3_omni_moe": {"talker_config": {"text_config": {"shared_expert_intermediate_size": 96}}},
    "reformer": {
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [16, 48],
        "attn_layers": ["local", "lsh"],
        "local_attn_chunk_length": 4,
        "lsh_attn_chunk_length": 4,
        "num_buckets": 2,
        "attention_head_size": 16,
    },
    "sam_vision_model": {"output_channels": 64, "num_pos_feats": 32},
    "sam_hq_vision_model": {"output_channels": 64, "num_pos_feats": 32},
    "siglip2_vision_model": {"num_patches": 16},
    "timesformer": {"num_frames": 2},
    "videomae": {"num_frames": 4},
    "vivit": {"num_frames": 4, "tubelet_size": [2, 16, 16]},
    "xclip_vision_model": {"num_frames": 2},
    "tvp": {"max_img_size": 64, "visual_prompt_size": 8, "num_frames": 2},
    "voxtral_realtime": {"audio_length_per_tok": 4},
    "wav2vec2-bert": {"feature_projection_input_dim": 16, "vocab_size": 32},
    "xlstm": {"embedding_dim": 64, "num_blocks": 2, "chunk_size": 8},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1, "sliding_window": 4},
    "autoformer": {**TIMES, "label_length": 2},
    "blip-2": {"image_token_index": 90},
    "instructblip": {"image_token_index": 90},
    "instructblipvideo": {"video_token_index": 90},
    "clap_audio_model": {
        "spec_size": 128,
        "num_mel_bins": 64,
        "aff_block_r": 1,
        "hidden_size": 512,
    },
    "dac": {"encoder_hidden_size": 8},
    "xcodec2": CODEC,
    "neucodec": CODEC,
    "pe_audio_encoder": {"dac_config": {"encoder_hidden_size": 8}},
    "vibevoice_acoustic_tokenizer": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2},
    "vibevoice_acoustic_tokenizer_decoder": {"num_filters": 2},
    "deepseek_ocr2_sam_vision_model": {"downsample_channels": [32, 64], "output_channels": 16},
    "unlimited_ocr_sam_vision_model": {"downsample_channels": [32, 64], "output_channels": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mask2former": {"feature_strides": [4, 8, 16, 32]},
    "nemotron3_5_transcribe_asr_audio": UNGROUPED,
    "nemotron3_diarization_audio": UNGROUPED,
    "nemotron3_diarization": {"head_config": UNGROUPED},
    "qwen4_exp_text": {
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 4,
        "indexer_compress_ratio": 2,
    },
    "rf_detr": {
        "init_std": 0.05,
        "backbone_config": {"model_type": "rf_detr_dinov2", "initializer_range": 0.05},
    },
    "seggpt": {"image_size": [128, 64]},
    "sam3_tracker": {"vision_config": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]}},
    "sam2_hiera_det_model": {
        "image_size": [64, 64],
        "hidden_size": 16,
        "embed_dim_per_stage": [16, 32, 64, 128],
        "num_attention_heads_per_stage": [1, 2, 4, 8],
        "blocks_per_stage": [1, 1, 2, 1],
        "global_attention_blocks": [3],
        "window_size_per_stage": [2, 2, 2, 2],
    },
    "sam2_vision_model": {
        "backbone_channel_list": [128, 64, 32, 16],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
    },
    "vitpose_backbone": {"image_size": [64, 64], "patch_size": [16, 16], "num_experts": 1},
    "zoedepth": {"backbone_config": {**NECK, "out_features": None}, "bottleneck_features": 64},
    "chmv2": {"neck_hidden_sizes": [16, 32, 64, 64]},
    "t5gemma2_text": {"dropout_rate": 0.0},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "dots3_note_text": {
        "head_dim": 32,
        "index_topk": 4,
        "shared_experts_intermediate_size": 96,
        "sliding_window": 4,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_kv_lora_rank": 16,
        "swa_q_lora_rank": 16,
        "swa_head_dim": 32,
        "swa_qk_nope_head_dim": 16,
        "swa_qk_rope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "nemotron_asr_streaming_encoder": {"sliding_window": 8, "default_num_lookahead_tokens": 1},
    "unlimited_ocr_text": UNGROUPED,
    "lw_detr": {"projector_scale_factors": [1.0], **MILD},
    "minimax_m3_vl_text": {
        "index_block_size": 2,
        "index_topk_blocks": 2,
        "index_n_heads": 2,
        "layer_types": ["full_attention", "minimax_m3_sparse"],
    },
    "hgnet_v2": {
        "stem_channels": [3, 8, 16],
        "stage_in_channels": [16, 16, 32, 64],
        "stage_mid_channels": [16, 16, 16, 16],
        "stage_out_channels": [16, 32, 64, 128],
        "stage_numb_of_layers": [1, 1, 1, 1],
        "depths": [1, 1, 1, 1],
        "hidden_sizes": [16, 32, 64, 128],
    },
    "phi4_multimodal_audio": {"nemo_conv_channels": 64, "ext_pw_out_channel": 64},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192},
    "molmo2_vision": {"image_size": [64, 64], "num_position_embeddings": 16},
    "evolla": EVOLLA,
    "EvollaModel": EVOLLA,
    "pix2struct_text_model": {"initializer_range": 0.3},
    "t5gemma2_decoder": {"dropout_rate": 0.0},
    "mobilebert": {"initializer_range": 0.02},
    "moshi": {"num_codebooks": 4},
    "moshi_depth": {"num_codebooks": 4},
    "sam3_lite_text_text_model": {"num_hidden_layers": 4},
    "qwen2_5_omni_thinker": {"vision_start_token_id": 80},
    "qwen3_omni_moe_thinker": {"vision_start_token_id": 80},
    "qwen3_omni_moe_talker_text": {"shared_expert_intermediate_size": 96},
    "llama4_vision_model": {
        "intermediate_size": 256,
        "vision_output_dim": 64,
        "projector_input_dim": 64,
        "projector_output_dim": 64,
    },
    "aria": {"projector_patch_to_query_dict": {16: 6}},
    "gemma4": {"vision_config": {}},
    "llava_next": {"image_grid_pinpoints": [[64, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[64, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[64, 64]]},
    "granite4_vision": {
        "image_grid_pinpoints": [[64, 64]],
        "spatial_target_layers": [0, 1],
        "deepstack_layer_map": [[0, 0]],
        "downsample_rate": "1/2",
    },
}

CLASSES: dict[str, tuple[str, ...]] = {
    "bark": (
        "BarkSemanticModel semantic_config",
        "BarkCoarseModel coarse_acoustics_config",
        "BarkFineModel fine_acoustics_config",
    ),
    "musicgen": ("MusicgenForConditionalGeneration",),
    "musicgen_melody": ("MusicgenMelodyForConditionalGeneration",),
}
"""Classes where the mappings name none that can run alone, with the part of the configuration that
is theirs."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, is_causal=False": ("llama", {"is_causal": False}),
    "gemma2, is_causal=False": ("gemma2", {"is_causal": False}),
    "gemma3_text, bidirectional": ("gemma3_text", {"use_bidirectional_attention": True}),
    "gemma4_text, bidirectional": ("gemma4_text", {"use_bidirectional_attention": "all"}),
    "bert, decoder": ("bert", {"is_decoder": True}),
    "bert, cross-attention": ("bert", {"is_decoder": True, "add_cross_attention": True}),
}
"""Families again, with other values."""
