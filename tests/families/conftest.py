"""Tiny models of every type that can be worked on, made from transformers' configuration classes; nothing in them is 0 or 1."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from marlin_tools.data.tokens import TokenSet

HIDDEN, HEADS, HEAD, INNER, VOCABULARY = 128, 4, 32, 128, 64

TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "num_key_value_heads": 2,
    "head_dim": HEAD,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 128,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
    "tie_word_embeddings": False,
}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": INNER}
CALLED: dict[str, Any] = {**EXPERTS, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 1.5}
LATENT: dict[str, Any] = {
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
MULTIPLIED: dict[str, Any] = {
    "residual_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "logits_scaling": 2.0,
    "attention_multiplier": 0.2,
}
DELTA: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
MAMBA: dict[str, Any] = {
    "mamba_n_heads": 8,
    "mamba_d_head": 32,
    "mamba_d_state": 32,
    "mamba_n_groups": 2,
    "mamba_chunk_size": 16,
    "mamba_proj_bias": True,
}
VISION: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
MROPE: dict[str, Any] = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e4}}
BLOCKS: dict[str, Any] = {"depth": 1, "hidden_size": 64, "intermediate_size": 64, "num_heads": 2}
CLIP: dict[str, Any] = {**VISION, "model_type": "clip_vision_model", "image_size": 28, "patch_size": 14}

CASES: dict[str, dict[str, Any]] = {
    "llama": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "mistral": {"sliding_window": 16},
    "ministral3": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"sliding_window": 16, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    "gemma3_text": {"sliding_window": 16},
    "gemma4_text": {
        "hidden_size_per_layer_input": 0,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 2,
        "global_head_dim": 64,
        "final_logit_softcapping": 2.0,
    },
    "seed_oss": {"attention_bias": True, "attention_out_bias": True},
    "smollm3": {"no_rope_layers": [1, 0]},
    "stablelm": {"use_qkv_bias": True},
    "olmo": {},
    "olmo2": {},
    "olmo3": {"sliding_window": 16},
    "exaone4": {"sliding_window": 16},
    "granite": MULTIPLIED,
    "granitemoehybrid": {
        **MULTIPLIED,
        **MAMBA,
        "shared_intermediate_size": INNER,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "layer_types": ["mamba", "attention"],
    },
    "bamba": {**MAMBA, "attn_layer_indices": [1], "mlp_bias": True, "attention_bias": True},
    "phi3": {"partial_rotary_factor": 0.5},
    "glm": {},
    "glm4": {},
    "cohere": {"logit_scale": 0.3},
    "cohere2": {"sliding_window": 16, "logit_scale": 0.3},
    "starcoder2": {"sliding_window": 16},
    "gpt_neox": {},
    "nemotron": {},
    "arcee": {},
    "helium": {},
    "hunyuan_v1_dense": {},
    "ernie4_5": {"use_bias": True},
    "cwm": {"sliding_window": 16},
    "apertus": {"attention_bias": True},
    "ministral": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "lfm2": {"layer_types": ["conv", "full_attention"], "conv_bias": True, "block_auto_adjust_ff_dim": False},
    "phi": {"partial_rotary_factor": 0.5, "qk_layernorm": True},
    "vaultgemma": {"sliding_window": 16, "attn_logit_softcapping": 1.0, "final_logit_softcapping": 2.0},
    "jais2": {"attention_bias": True, "mlp_bias": True},
    "hyperclovax": {
        "residual_multiplier": 0.3,
        "embedding_multiplier": 3.0,
        "logits_scaling": 0.5,
        "attention_multiplier": 0.2,
        "use_post_norm": True,
    },
    "youtu": {**LATENT, "q_lora_rank": None},
    "minicpm3": LATENT,
    "qwen3_5_text": DELTA,
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": INNER, "decoder_sparse_step": 1},
    "qwen3_moe": {**EXPERTS, "mlp_only_layers": [0]},
    "qwen3_next": {**EXPERTS, **DELTA, "shared_expert_intermediate_size": INNER},
    "qwen3_5_moe_text": {**EXPERTS, **DELTA, "shared_expert_intermediate_size": INNER},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16},
    "deepseek_v3": {
        "moe_intermediate_size": INNER,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 2,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        **LATENT,
    },
    "minimax_m2": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_num_shared_experts": 1,
        "moe_intermediate_size": INNER,
        "use_bias": True,
    },
    "deepseek_v2": {
        **CALLED,
        **LATENT,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "n_shared_experts": 1,
        "attention_bias": True,
    },
    "deepseek_v32": {
        **CALLED,
        **LATENT,
        "first_k_dense_replace": 1,
        "index_n_heads": 2,
        "index_head_dim": 64,
        "index_topk": 8,
    },
    "glm4_moe_lite": {**CALLED, **LATENT},
    "dots1": {**CALLED, "n_shared_experts": 1, "first_k_dense_replace": 1, "sliding_window": 16, "max_window_layers": 1},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 96, **MULTIPLIED},
    "granitemoeshared": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "intermediate_size": 96,
        "shared_intermediate_size": 64,
        **MULTIPLIED,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": [2, 3]},
    "phimoe": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 16,
        "attention_bias": True,
        "lm_head_bias": True,
    },
    "flex_olmo": {"num_experts": 4, "num_experts_per_tok": 2},
    "lfm2_moe": {
        **EXPERTS,
        "num_dense_layers": 1,
        "layer_types": ["full_attention", "conv"],
        "conv_bias": True,
        "routed_scaling_factor": 1.5,
    },
    "afmoe": {
        **EXPERTS,
        "num_shared_experts": 1,
        "num_dense_layers": 1,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "mup_enabled": True,
        "route_scale": 1.5,
    },
    "exaone_moe": {
        **CALLED,
        "num_shared_experts": 1,
        "sliding_window": 16,
        "layer_types": ["sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse"],
    },
    "solar_open": {**CALLED, "n_shared_experts": 1},
    "mimo_v2_flash": {
        **CALLED,
        "num_key_value_heads": 1,
        "v_head_dim": 64,
        "sliding_window": 16,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "glm4_moe": {**EXPERTS, "n_routed_experts": 4, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "llama4_text": {
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": INNER,
        "interleave_moe_layer_step": 2,
        "no_rope_layers": [1, 0],
        "attention_chunk_size": 16,
        "attn_temperature_tuning": True,
    },
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
    "llama4": {
        "text_config": {**TEXT, **CASES["llama4_text"]},
        "vision_config": {**VISION, "image_size": 28, "patch_size": 14, "vision_output_dim": 64, "projector_output_dim": 64},
    },
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test that asks for `model_type` runs for every type."""
    marked = [mark for mark in metafunc.definition.iter_markers("parametrize") if "model_type" in str(mark.args[0])]
    if "model_type" in metafunc.fixturenames and not marked:
        metafunc.parametrize("model_type", [*CASES, *NESTED_CASES])


def _eager(model_type: str) -> Any:
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    return AutoModelForImageTextToText if model_type in NESTED_CASES else AutoModelForCausalLM


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a tiny model of this type."""
    from transformers import AutoConfig

    folders: dict[str, Path] = {}

    def make(model_type: str) -> Path:
        if model_type not in folders:
            settings = NESTED_CASES.get(model_type) or {**TEXT, **CASES[model_type]}
            model = _eager(model_type).from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.float32)
            generator = torch.Generator().manual_seed(0)
            for tensor in model.state_dict().values():
                if tensor.is_floating_point():
                    noise = torch.randn(tensor.shape, generator=generator)
                    tensor.copy_(noise.mul_(0.1).add_(0.5) if tensor.ndim == 1 else noise.mul_(0.15))
            folders[model_type] = tmp_path_factory.mktemp(f"tiny-{model_type}-")
            model.half().save_pretrained(folders[model_type])
        return folders[model_type]

    return make


@pytest.fixture(scope="session")
def eager() -> Callable[[str, Path], torch.nn.Module]:
    """A model of this type as transformers loads it, computed in the plainest way."""

    def load(model_type: str, path: Path) -> torch.nn.Module:
        plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
        model = _eager(model_type).from_pretrained(path, dtype=torch.float32, **plain).eval()
        return torch.nn.Module.float(model)  # of a quantised model, what was dequantised too

    return load


@pytest.fixture(scope="session")
def tokens() -> TokenSet:
    """Three sequences, of two lengths."""
    generator = torch.Generator().manual_seed(0)
    sequences = tuple(torch.randint(2, VOCABULARY, (n,), generator=generator) for n in (40, 40, 23))
    return TokenSet(sequences, "test", False, 3)
