"""Families that no test builds, by the reason."""

from __future__ import annotations

_REASONS: dict[str, str] = {
    "needs timm": "edgetam edgetam_vision_model fast_vlm gemma3n gemma3n_vision pe_audio_video "
    "pe_audio_video_encoder pe_video pe_video_encoder perception_lm timm_backbone timm_wrapper",
    "needs natten": "dinat",
    "needs detectron2": "layoutlmv2",
    "needs torchaudio": "higgs_audio_v2_tokenizer",
    "no model class of its own: a part of another family": "edgetam_mask_decoder "
    "edgetam_prompt_encoder edgetam_video_mask_decoder edgetam_video_prompt_encoder "
    "ernie4_5_vl_moe_vision gemma4_unified_audio gemma4_unified_vision idefics_perciever "
    "idefics_vision layoutxlm pp_chart2table_vision qwen2_vl_vision sam2_mask_decoder "
    "sam2_prompt_encoder sam2_video_mask_decoder sam2_video_prompt_encoder sam3_geometry_encoder "
    "sam3_lite_text_geometry_encoder sam3_tracker_mask_decoder sam3_tracker_prompt_encoder "
    "sam3_tracker_video_mask_decoder sam3_tracker_video_prompt_encoder sam_hq_mask_decoder "
    "sam_hq_prompt_encoder sam_mask_decoder sam_prompt_encoder sapiens2_head t5_gemma_module "
    "vibevoice_diffusion voxtral_realtime_text",
    "takes what other parts of its family make": "blt_local_decoder blt_local_encoder "
    "deepseek_ocr2_encoder dots3_note_audio_encoder gemma4_assistant gemma4_unified_assistant "
    "inkling_audio molmo2_adapter moshi_depth muse_glimmer_assistant pi0 qwen2_5_omni_dit "
    "sam3_detr_decoder sam3_detr_encoder sam3_lite_text_detr_decoder sam3_lite_text_detr_encoder "
    "sam3_lite_text_mask_decoder sam3_mask_decoder unlimited_ocr_vision_encoder",
    "its forward is that of its parts, each a family": "qwen2_5_omni qwen2_5_omni_token2wav "
    "fastspeech2_conformer_with_hifigan nougat qwen3_omni_moe rag",
    "takes a session of a video": "edgetam_video sam2_video sam3_tracker_video sam3_video",
    "takes questions and options prepared by its processor": "jev omdet-turbo",
    "no forward: an encoder and a decoder of codes": "chameleon_vqgan emu3_vqgan glm_image_vqmodel",
    "no attention, or none through transformers": "align_vision_model dinov3_convnext efficientnet "
    "fastspeech2_conformer_hifigan janus_vqgan pp_ocrv5_server_det pp_ocrv6_medium_det "
    "pp_ocrv6_small_det qwen2_5_omni_bigvgan speecht5_hifigan textnet univnet uvdoc xlstm "
    "vibevoice_acoustic_tokenizer_decoder vibevoice_acoustic_tokenizer_encoder",
    "too large beside its text model, which is a family": "align",
    "no tiny configuration found that its checks let pass": "clvp clvp_encoder efficientloftr "
    "esmfold2 florence_vision inkling2_vision inkling_vision phi4_multimodal_audio "
    "pp_doclayout_v2 pp_doclayout_v3 pp_ocrv5_mobile_rec superglue tvp",
}

NOT_BUILT = {name: reason for reason, names in _REASONS.items() for name in names.split()}
