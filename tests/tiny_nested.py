"""The same of types that hold a language model among other things."""

from typing import Any

from tiny_models import CALLED, CASES, DELTA, EXPERTS, HIDDEN, LATENT, MULTIPLIED, TEXT

VISION: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
MROPE: dict[str, Any] = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}}
BLOCKS: dict[str, Any] = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
CLIP: dict[str, Any] = {**VISION, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}

HEARS: dict[str, Any] = {
    "d_model": 64,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 64,
    "num_mel_bins": 16,
}

NESTED_CASES: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": {**TEXT, "sliding_window": 16},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": {**TEXT, **CASES["gemma4_text"]},
        "vision_config": {**VISION, "num_key_value_heads": 2, "head_dim": 32, "global_head_dim": 32, "patch_size": 14},
        "audio_config": None,
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 32},
    },
    "qwen2_vl": {
        "text_config": MROPE,
        "vision_config": {"depth": 1, "embed_dim": 64, "num_heads": 2, "hidden_size": HIDDEN, "mlp_ratio": 1},
    },
    "internvl": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
        "image_seq_length": 1,
    },
    "llava": {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": CLIP},
    "llava_next": {"text_config": {**TEXT, "model_type": "mistral"}, "vision_config": CLIP},
    "llava_onevision": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**CLIP, "model_type": "siglip_vision_model"},
    },
    "idefics3": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
    },
    "smolvlm": {
        "text_config": {**TEXT, "model_type": "llama"},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
    },
    "lfm2_vl": {
        "text_config": {**TEXT, **CASES["lfm2"], "model_type": "lfm2"},
        "vision_config": {**VISION, "model_type": "siglip2_vision_model", "num_patches": 4, "patch_size": 14},
    },
    "glm4v": {"text_config": MROPE, "vision_config": {**BLOCKS, "out_hidden_size": HIDDEN}},
    "glm46v": {
        "text_config": {**MROPE, "model_type": "glm4v_text"},
        "vision_config": {**BLOCKS, "model_type": "glm4v_vision", "out_hidden_size": HIDDEN},
    },
    "aya_vision": {
        "text_config": {**TEXT, **CASES["cohere2"], "model_type": "cohere2"},
        "vision_config": {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False},
    },
    "qwen2_5_vl": {
        "text_config": MROPE,
        "vision_config": {**BLOCKS, "out_hidden_size": HIDDEN},
    },
    "qwen3_vl": {
        "text_config": MROPE,
        "vision_config": {**BLOCKS, "out_hidden_size": HIDDEN, "deepstack_visual_indexes": [0]},
    },
    "qwen3_vl_moe": {
        "text_config": {
            **TEXT,
            **EXPERTS,
            "moe_intermediate_size": 96,
            "mlp_only_layers": [0],
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4},
        },
        "vision_config": {**BLOCKS, "out_hidden_size": HIDDEN, "deepstack_visual_indexes": [0]},
    },
    "glm4v_moe": {
        "text_config": {
            **TEXT,
            **CALLED,
            "first_k_dense_replace": 1,
            "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4},
        },
        "vision_config": {**BLOCKS, "out_hidden_size": HIDDEN},
    },
    "qwen3_5": {
        "text_config": {**TEXT, **DELTA},
        "vision_config": {**BLOCKS, "out_hidden_size": HIDDEN},
    },
    "qwen3_5_moe": {
        "text_config": {**TEXT, **CASES["qwen3_5_moe_text"]},
        "vision_config": {**BLOCKS, "out_hidden_size": HIDDEN},
    },
    "llama4": {
        "text_config": {**TEXT, **CASES["llama4_text"]},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14, "vision_output_dim": 64, "projector_output_dim": 64},
    },
    "cohere2_vision": {
        "text_config": {**TEXT, **CASES["cohere2"], "model_type": "cohere2"},
        "vision_config": {**CLIP, "model_type": "siglip_vision_model"},
        "alignment_intermediate_size": 64,
    },
    "exaone4_5": {
        "text_config": {**TEXT, **CASES["exaone4"], "model_type": "exaone4"},
        "vision_config": {**BLOCKS, "num_key_value_heads": 1, "out_hidden_size": HIDDEN},
    },
    "glm_ocr": {"text_config": MROPE, "vision_config": {**BLOCKS, "out_hidden_size": HIDDEN}},
    "hunyuan_vl": {"text_config": MROPE, "vision_config": {**VISION, "out_hidden_size": HIDDEN, "max_vit_seq_len": 4}},
    "lighton_ocr": {
        "text_config": {**TEXT, "model_type": "qwen3"},
        "vision_config": {**VISION, "model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 32},
    },
    "llava_next_video": {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": CLIP},
    "ovis2": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14, "num_visual_indicator_tokens": 5, "vocab_size": 64},
    },
    "paddleocr_vl": {"text_config": MROPE, "vision_config": {**VISION, "image_size": 28, "patch_size": 14}},
    "qianfan_ocr": {
        "text_config": {**TEXT, "model_type": "qwen3"},
        "vision_config": {**VISION, "image_size": [28, 28], "patch_size": [14, 14]},
    },
    "video_llama_3": {"text_config": {**TEXT, "model_type": "qwen2"}, "vision_config": {**VISION, "patch_size": 14}},
    "got_ocr2": {
        "text_config": {**TEXT, "model_type": "qwen2"},
        "vision_config": {**VISION, "mlp_dim": 64, "output_channels": 64, "image_size": 28, "patch_size": 14},
    },
    "idefics2": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14},
        "perceiver_config": {"hidden_size": HIDDEN, "resampler_n_heads": 2, "resampler_head_dim": 32, "num_key_value_heads": 1},
    },
    "minicpmv4_6": {
        "text_config": {**TEXT, **DELTA, "model_type": "qwen3_5_text"},
        "vision_config": {**VISION, "image_size": 56, "patch_size": 14, "insert_layer_id": 0},
    },
    "gemma4_unified": {
        "text_config": {**TEXT, **CASES["gemma4_text"]},
        "vision_config": {"mm_embed_dim": 64, "output_proj_dims": 64, "mm_posemb_size": 16},
        "audio_config": {"audio_embed_dim": 64},
    },
    "qwen2_audio": {"text_config": {**TEXT, "model_type": "qwen2"}, "audio_config": HEARS},
    "voxtral": {
        "text_config": {**TEXT, "model_type": "llama"},
        "audio_config": {**VISION, "num_mel_bins": 16, "max_source_positions": 32},
    },
    "granite_speech": {
        "text_config": {**TEXT, **MULTIPLIED, "model_type": "granite"},
        "encoder_config": {"input_dim": 16, "num_layers": 1, "hidden_dim": 64, "num_heads": 2, "dim_head": 32, "output_dim": 8},
        "projector_config": {**VISION, "model_type": "blip_2_qformer", "encoder_hidden_size": 64},
        "has_lora_adapter": False,
    },
    "glmasr": {"text_config": {**TEXT, "model_type": "llama"}, "audio_config": {**VISION, "num_mel_bins": 16}},
    "qwen3_asr": {
        "text_config": {**TEXT, "model_type": "qwen3"},
        "audio_config": {**HEARS, "downsample_hidden_size": 16, "output_dim": 64},
    },
    "paligemma": {
        "text_config": {**TEXT, "model_type": "gemma"},
        "vision_config": {**CLIP, "model_type": "siglip_vision_model"},
        "projection_dim": HIDDEN,
        "hidden_size": HIDDEN,
    },
    "paligemma-2": {
        "text_config": {**TEXT, **CASES["gemma2"], "model_type": "gemma2"},
        "vision_config": {**CLIP, "model_type": "siglip_vision_model"},
        "projection_dim": HIDDEN,
        "hidden_size": HIDDEN,
    },
    "granite4_vision": {
        "text_config": {**TEXT, **MULTIPLIED},
        "vision_config": {**CLIP, "model_type": "siglip_vision_model"},
        "downsample_rate": "1/2",
        "deepstack_layer_map": [[0, 0]],
        "qformer_config": {**VISION, "model_type": "blip_2_qformer", "encoder_hidden_size": 64},
    },
    "muse_glimmer": {
        "text_config": {**TEXT, "sliding_window": 16, "final_logit_softcapping": 2.0},
        "vision_config": {**VISION, "patch_size": 14},
        "out_hidden_size": 64,
        "projector_hidden_size": 64,
    },
    "mistral3-latent": {
        "text_config": {**TEXT, **CALLED, **LATENT, "head_dim": 64, "first_k_dense_replace": 1, "model_type": "mistral4"},
        "vision_config": {**VISION, "model_type": "pixtral", "image_size": 28, "patch_size": 14, "head_dim": 32},
    },
}

THINKERS: dict[str, dict[str, Any]] = {
    "qwen2_5_omni_thinker": {
        "text_config": MROPE,
        "vision_config": {**BLOCKS, "out_hidden_size": HIDDEN},
        "audio_config": {**HEARS, "output_dim": HIDDEN},
        "vision_start_token_id": 60,
        "audio_start_token_id": 61,
    },
    "qwen3_omni_moe_thinker": {
        "text_config": {**MROPE, **EXPERTS},
        "vision_config": {**BLOCKS, "out_hidden_size": HIDDEN, "deepstack_visual_indexes": [0]},
        "audio_config": {**HEARS, "downsample_hidden_size": 16, "output_dim": HIDDEN},
        "vision_start_token_id": 60,
        "audio_start_token_id": 61,
    },
}
NESTED_CASES |= THINKERS
NESTED_CASES |= {
    name.removesuffix("_thinker"): {"thinker_config": case, "enable_audio_output": False} for name, case in THINKERS.items()
}
