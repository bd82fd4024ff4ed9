"""Arguments that the names of a forward's parameters do not tell, by family or (family, class)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.families.inputs import (
    BATCH,
    FRAMES,
    LENGTH,
    LONGER,
    SAMPLES,
    SHORTER,
    find,
    ids,
    noise,
    padding,
    positioned,
)


def _series(config: Any) -> dict[str, Any]:
    """Past and future values of a probabilistic forecaster, with their covariates."""
    past = config.context_length + max(config.lags_sequence)
    return {
        "past_values": noise(BATCH, past),
        "past_time_features": noise(BATCH, past, config.num_time_features),
        "past_observed_mask": torch.ones(BATCH, past),
        "future_values": noise(BATCH, config.prediction_length, seed=1),
        "future_time_features": noise(BATCH, config.prediction_length, config.num_time_features),
    }


def _video(frames: int, size: int = 64) -> Tensor:
    return noise(BATCH, frames, 3, size, size)


def _queried(config: Any) -> dict[str, Any]:
    """An image's learned queries, in the place of as many tokens."""
    text = ids(LENGTH)
    video = getattr(config, "video_token_index", None)
    count, frames = config.num_query_tokens, 1 if video is None else 2
    tokens = torch.full((BATCH, count * frames), video or config.image_token_index)
    shape = (BATCH, 3, 64, 64) if video is None else (BATCH, frames, 3, 64, 64)
    return {
        "pixel_values": noise(*shape),
        "qformer_input_ids": ids(5, seed=2),
        "input_ids": torch.cat([tokens, text], 1),
    }


def _mel(config: Any, channels: bool = False, time_first: bool = True) -> Tensor:
    bins = find(config, "num_mel_bins", "feature_size", "input_feat_size", default=16)
    shape = (FRAMES, bins) if time_first else (bins, FRAMES)
    return noise(BATCH, *([1] if channels else []), *shape)


def _codec(_: Any) -> dict[str, Any]:
    """Ten frames of 320 samples, and their spectrogram."""
    return {
        "input_values": noise(BATCH, 1, 3200),
        "input_features": noise(BATCH, 10, 16),
        "padding_mask": None,
    }


def _protein(_: Any) -> dict[str, Any]:
    return {
        "input_ids": ids(LENGTH),
        "protein_input_ids": ids(LONGER, seed=1),
        "protein_attention_mask": padding(LONGER, "right"),
    }


def _ragged(config: Any) -> dict[str, Any]:
    """Two recordings of different lengths, one after the other."""
    lengths = torch.tensor([FRAMES, FRAMES - 10])
    return {
        "input_features": noise(config.num_mel_bins, int(lengths.sum())),
        "feature_lens": lengths,
    }


def _native(config: Any) -> dict[str, Any]:
    """Two images in one row of patches."""
    return {
        "pixel_values": noise(1, 3, config.patch_size, 32 * config.patch_size),
        "target_sizes": torch.tensor([[4, 4]] * BATCH),
    }


def _patch_rows(config: Any) -> Tensor:
    """Rows of pix2struct: a patch's row and column, both from one, and its pixels."""
    places = torch.arange(6)
    rows = torch.stack([places // 3 + 1, places % 3 + 1], 1).float().expand(BATCH, -1, -1)
    return torch.cat([rows, noise(BATCH, 6, find(config, "patch_embed_hidden_size"))], 2)


def _grid(config: Any, per_patch: int) -> dict[str, Any]:
    del config
    return {
        "pixel_values": noise(32, per_patch),
        "grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
    }


ARGUMENTS: dict[Any, Any] = {
    "audio-spectrogram-transformer": lambda c: {
        "input_values": noise(BATCH, c.max_length, c.num_mel_bins)
    },
    "autoformer": _series,
    "informer": _series,
    "time_series_transformer": _series,
    "blip-2": _queried,
    "instructblip": _queried,
    "instructblipvideo": _queried,
    "voxtral_realtime": lambda _: {"input_ids": ids(8), "input_features": noise(BATCH, 16, FRAMES)},
    "pe_audio_encoder": lambda _: {"input_values": noise(BATCH, 1, 8 * SAMPLES)},
    "pe_audio": lambda _: {"input_ids": ids(LENGTH), "input_values": noise(BATCH, 1, 8 * SAMPLES)},
    "musicgen": lambda _: {
        "input_ids": ids(LENGTH),
        "decoder_input_ids": ids(SHORTER, seed=1, batch=4 * BATCH),
    },
    "musicgen_melody": lambda _: {
        "input_ids": ids(LENGTH),
        "input_features": noise(BATCH, 5, 12),
        "decoder_input_ids": ids(SHORTER, seed=1, batch=4 * BATCH),
    },
    "vibevoice_acoustic_tokenizer": lambda _: {"input_values": noise(BATCH, 1, 3200)},
    "pi0": lambda c: {
        "input_ids": ids(LENGTH),
        "action_embeds": noise(BATCH, 4, c.dit_config.hidden_size),
    },
    "blip_2_qformer": lambda c: {
        "query_embeds": noise(BATCH, 6, c.hidden_size),
        "encoder_hidden_states": noise(BATCH, 9, c.encoder_hidden_size, seed=1),
    },
    "instructblip_qformer": lambda c: {
        "input_ids": ids(LENGTH),
        "query_embeds": noise(BATCH, 6, c.hidden_size),
        "encoder_hidden_states": noise(BATCH, 9, c.encoder_hidden_size, seed=1),
    },
    "bert, cross-attention": lambda c: {
        "input_ids": ids(LENGTH),
        "encoder_hidden_states": noise(BATCH, LONGER, c.hidden_size),
        "encoder_attention_mask": padding(LONGER, "right"),
    },
    "blt": lambda _: {"input_ids": ids(LENGTH), "use_cache": False},
    "clap": lambda c: {
        "input_ids": ids(LENGTH),
        "input_features": _mel(c, channels=True),
        "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool),
    },
    "clap_audio_model": lambda c: {
        "input_features": _mel(c, channels=True),
        "is_longer": torch.zeros(BATCH, 1, dtype=torch.bool),
    },
    "decision_transformer": lambda c: {
        "states": noise(BATCH, LENGTH, c.state_dim),
        "actions": noise(BATCH, LENGTH, c.act_dim),
        "rewards": noise(BATCH, LENGTH, 1),
        "returns_to_go": noise(BATCH, LENGTH, 1),
        "timesteps": torch.arange(LENGTH).expand(BATCH, -1),
        "attention_mask": torch.ones(BATCH, LENGTH),
    },
    "audioflamingo3_encoder": lambda c: {
        "input_features": _mel(c, time_first=False),
        "input_features_mask": torch.ones(BATCH, FRAMES, dtype=torch.long),
    },
    "qwen3_asr_encoder": lambda c: {
        "input_features": noise(BATCH, c.num_mel_bins, 2 * c.n_window),
        "input_features_mask": torch.ones(BATCH, 2 * c.n_window, dtype=torch.long),
    },
    "qwen2_5_omni_audio_encoder": _ragged,
    "qwen3_omni_moe_audio_encoder": _ragged,
    "bridgetower_vision_model": lambda _: {"image": noise(BATCH, 3, 64, 64)},
    "dia_decoder": lambda c: {
        "input_ids": torch.stack([ids(LENGTH, seed=i) for i in range(c.num_channels)], -1),
        "position_ids": torch.arange(LENGTH).expand(BATCH, -1),
        "encoder_hidden_states": noise(BATCH, LONGER, c.cross_hidden_size),
    },
    "paddleocr_vl_vision": lambda c: {
        "pixel_values": noise(1, 32, 3, c.patch_size, c.patch_size),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
        "grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
    },
    "mllama_vision_model": lambda c: {
        "pixel_values": noise(BATCH, 1, c.max_num_tiles, 3, 64, 64),
        "aspect_ratio_ids": torch.ones(BATCH, 1, dtype=torch.long),
        "aspect_ratio_mask": torch.ones(BATCH, 1, c.max_num_tiles, dtype=torch.long),
    },
    "granite_speech_encoder": lambda c: {"hidden_states": noise(BATCH, 20, c.input_dim)},
    "granite_speech_plus_encoder": lambda c: {"hidden_states": noise(BATCH, 20, c.input_dim)},
    "phi4_multimodal_audio": lambda c: {
        "hidden_states": noise(BATCH, FRAMES, c.input_size),
        "mask": None,
    },
    "molmo2_vision": lambda c: {"pixel_values": noise(BATCH, 16, 3 * c.patch_size**2)},
    "idefics2_perceiver": lambda c: {
        "context": noise(BATCH, 9, c.hidden_size),
        "attention_mask": padding(9, "right").bool(),
    },
    "depth_pro": lambda _: {"pixel_values": noise(BATCH, 3, 128, 128)},
    "evolla": _protein,
    "EvollaModel": _protein,
    ("bark", "BarkFineModel"): lambda c: {
        "codebook_idx": 2,
        "input_ids": torch.stack([ids(LENGTH, seed=i) for i in range(c.n_codes_total)], -1),
    },
    "kosmos_2_5_vision_model": lambda c: {"flattened_patches": _patch_rows(c)},
    "minicpm_ocr_vision": _native,
    "minicpmv4_6_vision": _native,
    "minicpmv4_7_vision": _native,
    "fun_asr_nano_encoder": lambda c: {
        "input_features": noise(BATCH, FRAMES, c.num_mel_bins * c.num_stacked_frames),
        "input_features_mask": torch.ones(BATCH, FRAMES, dtype=torch.long),
    },
    "gemma3n_audio": lambda c: {
        "audio_mel": _mel(c),
        "audio_mel_mask": torch.zeros(BATCH, FRAMES, dtype=torch.bool),
    },
    "gemma4_audio": lambda _: {"input_features": noise(BATCH, FRAMES, 128)},
    "gemma4_vision": lambda c: positioned(c.patch_size, "pixel_position_ids"),
    "idefics": lambda _: {
        "input_ids": ids(LENGTH),
        "pixel_values": noise(BATCH, 1, 3, 64, 64),
        "image_attention_mask": torch.ones(BATCH, LENGTH, 1, dtype=torch.long),
    },
    "kosmos-2": lambda c: {
        "input_ids": ids(LENGTH),
        "pixel_values": noise(BATCH, 3, 64, 64),
        "image_embeds_position_mask": (torch.arange(LENGTH) < c.latent_query_num)
        .long()
        .expand(BATCH, -1),
    },
    "lightglue": lambda _: {"pixel_values": noise(BATCH, 2, 3, 64, 64)},
    "superglue": lambda _: {"pixel_values": noise(BATCH, 2, 3, 64, 64)},
    "efficientloftr": lambda _: {"pixel_values": noise(BATCH, 2, 3, 64, 64)},
    "lxmert": lambda c: {
        "input_ids": ids(LENGTH),
        "visual_feats": noise(BATCH, 5, c.visual_feat_dim),
        "visual_pos": noise(BATCH, 5, c.visual_pos_dim, seed=1),
    },
    "mimi_decoder": lambda c: {"latents": noise(BATCH, c.hidden_size, 6)},
    "pocket_tts_audio_tokenizer_decoder": lambda c: {"latents": noise(BATCH, c.hidden_size, 6)},
    "muse_spark_audio": lambda _: {"input_values": noise(BATCH, 3840)},
    "muse_glimmer_vision": lambda c: _grid(c, 3 * c.patch_temporal * c.patch_size**2),
    "muse_spark_vision": lambda c: _grid(c, 3 * c.patch_temporal * c.patch_size**2),
    "muse_glimmer_assistant": lambda c: {
        "noise_embeds": noise(BATCH, 4, c.hidden_size),
        "context_hidden_states": noise(BATCH, LENGTH, 5 * c.hidden_size, seed=1),
    },
    "nemotron3_5_transcribe_asr_audio": lambda c: {"input_features": _mel(c)},
    "nemotron3_diarization_audio": lambda c: {"input_features": _mel(c)},
    "nemotron3_diarization": lambda c: {"input_features": _mel(c)},
    "oneformer": lambda c: {
        "pixel_values": noise(BATCH, 3, 64, 64),
        "task_inputs": ids(c.task_seq_len),
    },
    "patchtst": lambda c: {
        "past_values": noise(BATCH, c.context_length, c.num_input_channels),
        "past_observed_mask": torch.ones(BATCH, c.context_length, c.num_input_channels),
    },
    "patchtsmixer": lambda c: {"past_values": noise(BATCH, c.context_length, c.num_input_channels)},
    "perceiver": lambda c: {"inputs": noise(BATCH, LENGTH, c.d_model)},
    ("perceiver", "PerceiverForMaskedLM"): lambda _: {"input_ids": ids(LENGTH)},
    ("perceiver", "PerceiverForImageClassificationLearned"): lambda c: {
        "inputs": noise(BATCH, 3, c.image_size, c.image_size)
    },
    "pix2struct": lambda c: {
        "flattened_patches": _patch_rows(c),
        "decoder_input_ids": ids(SHORTER, seed=1),
    },
    "pix2struct_vision_model": lambda c: {"flattened_patches": _patch_rows(c)},
    "seggpt": lambda _: {
        "pixel_values": noise(BATCH, 3, 64, 64),
        "prompt_pixel_values": noise(BATCH, 3, 64, 64, seed=1),
        "prompt_masks": noise(BATCH, 3, 64, 64, seed=2),
    },
    "siglip2_vision_model": lambda c: {
        "pixel_values": noise(BATCH, 16, 3 * c.patch_size**2),
        "pixel_attention_mask": (torch.arange(16) < torch.tensor([[16], [12]])).long(),
        "spatial_shapes": torch.tensor([[4, 4], [4, 3]]),
    },
    "siglip2": lambda c: {
        "input_ids": ids(LENGTH),
        **ARGUMENTS["siglip2_vision_model"](c.vision_config),
    },
    "speech-encoder-decoder": lambda _: {
        "input_values": noise(BATCH, SAMPLES),
        "decoder_input_ids": ids(SHORTER, seed=1),
    },
    "speecht5": lambda c: {
        "input_values": noise(BATCH, LENGTH, c.hidden_size),
        "decoder_input_values": noise(BATCH, SHORTER, c.hidden_size, seed=1),
    },
    ("speecht5", "SpeechT5ForTextToSpeech"): lambda c: {
        "input_ids": ids(LENGTH),
        "decoder_input_values": noise(BATCH, SHORTER, c.num_mel_bins, seed=1),
    },
    ("speecht5", "SpeechT5ForSpeechToText"): lambda _: {
        "input_values": noise(BATCH, SAMPLES),
        "decoder_input_ids": ids(SHORTER, seed=1),
    },
    "t5gemma2_decoder": lambda c: {
        "input_ids": ids(LENGTH),
        "encoder_hidden_states": noise(BATCH, LONGER, c.hidden_size),
    },
    "timesfm": lambda c: {
        "past_values": noise(BATCH, c.context_length),
        "past_values_padding": torch.zeros(BATCH, c.context_length, dtype=torch.long),
        "freq": torch.zeros(BATCH, 1, dtype=torch.long),
    },
    "timesfm2_5": lambda c: {
        "past_values": noise(BATCH, c.context_length),
        "past_values_padding": torch.zeros(BATCH, c.context_length, dtype=torch.long),
    },
    "timesformer": lambda c: {"pixel_values": _video(c.num_frames)},
    "videomae": lambda c: {"pixel_values": _video(c.num_frames)},
    "vivit": lambda c: {"pixel_values": _video(c.num_frames)},
    "xclip_vision_model": lambda c: {"pixel_values": noise(2 * c.num_frames, 3, 64, 64)},
    "xcodec2": _codec,
    "neucodec": _codec,
    "pp_ocrv5_mobile_rec": lambda _: {"pixel_values": noise(BATCH, 3, 48, 160)},
    "xclip": lambda c: {
        "input_ids": ids(LENGTH),
        "pixel_values": _video(c.vision_config.num_frames),
    },
    "tvp": lambda c: {"input_ids": ids(LENGTH), "pixel_values": _video(c.num_frames)},
    "video_llama_3_vision": lambda c: {
        **_grid(c, 3 * c.patch_size**2),
        "merge_sizes": torch.tensor([1] * BATCH),
    },
    "inkling2_vision": lambda c: {
        "pixel_values": noise(32, 3 * find(c, "temporal_patch_size", default=1) * c.patch_size**2),
        "image_grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
    },
    "kimi_k25_vision": lambda c: {
        "pixel_values": noise(32, 3, c.patch_size, c.patch_size),
        "grid_thw": torch.tensor([[1, 4, 4]] * BATCH),
    },
}


def given(model: Any, family: str) -> dict[str, Any] | None:
    """The arguments of a family's model; None where their names tell."""
    found = ARGUMENTS.get((family, type(model).__name__), ARGUMENTS.get(family))
    return None if found is None else found(model.config)
