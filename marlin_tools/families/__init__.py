"""Model types: which can be worked on, and how each is built.

A `model_type` of config.json is in one of three tables. FAMILIES are those with a file of their own here, named like the type;
BUILT_LIKE are those that are built like one of them; NESTED are those that hold a language model beside what sees or hears.

Read next: `family.py`, what a family is; then one, say `llama.py`. A new family is one file and one line here.
"""

import importlib
from dataclasses import replace
from typing import Any, NamedTuple

from marlin_tools.checkpoint.contract import text_config
from marlin_tools.errors import ModelError, near
from marlin_tools.families.family import Family

BUILT_LIKE = {
    "arcee": "nemotron",
    "cohere": "cohere2",
    "cwm": "llama",
    "deepseek_v2": "deepseek_v3",
    "deepseek_v32": "deepseek_v3",
    "dots1": "qwen2_moe",
    "ernie4_5": "llama",
    "exaone4": "olmo2",
    "exaone4_5_text": "olmo2",
    "gemma": "llama",
    "gemma3_text": "gemma2",
    "gemma4_unified_text": "gemma4_text",
    "glm4_moe": "qwen2_moe",
    "glm4_moe_lite": "deepseek_v3",
    "glm4v_moe_text": "qwen2_moe",
    "glm4v_text": "glm4",
    "glm_ocr_text": "glm4",
    "granite4_vision_text": "granite",
    "granite_swa": "granite",
    "helium": "llama",
    "hunyuan_v1_dense": "llama",
    "hunyuan_vl_text": "llama",
    "jais2": "nemotron",
    "mellum": "qwen2_moe",
    "minimax_m2": "mixtral",
    "ministral": "llama",
    "ministral3": "llama",
    "mistral": "llama",
    "mistral4": "deepseek_v3",
    "olmo": "llama",
    "olmo3": "olmo2",
    "olmoe": "qwen2_moe",
    "paddleocr_vl_text": "llama",
    "qwen2": "llama",
    "qwen2_5_vl_text": "llama",
    "qwen2_5_omni_text": "llama",
    "qwen2_vl_text": "llama",
    "qwen3": "llama",
    "qwen3_5_moe_text": "qwen2_moe",
    "qwen3_moe": "qwen2_moe",
    "qwen3_next": "qwen2_moe",
    "qwen3_omni_moe_text": "qwen2_moe",
    "qwen3_vl_text": "llama",
    "seed_oss": "llama",
    "smollm3": "llama",
    "solar_open": "qwen2_moe",
}
FAMILIES = (
    "afmoe",
    "apertus",
    "axk1",
    "bamba",
    "cohere2",
    "cohere2_moe",
    "deepseek_v3",
    "ernie4_5_moe",
    "exaone_moe",
    "falcon_h1",
    "flex_olmo",
    "gemma2",
    "gemma4_text",
    "glm",
    "glm4",
    "glm_moe_dsa",
    "gpt_neox",
    "gpt_oss",
    "granite",
    "granitemoe",
    "granitemoe_swa",
    "granitemoehybrid",
    "granitemoeshared",
    "hunyuan_v1_moe",
    "hy_v3",
    "hyperclovax",
    "jamba",
    "laguna",
    "lfm2",
    "lfm2_moe",
    "llama",
    "llama4_text",
    "mimo_v2_flash",
    "minicpm3",
    "mixtral",
    "muse_glimmer_text",
    "nemotron",
    "nemotron_h",
    "olmo2",
    "phi",
    "phi3",
    "phimoe",
    "qwen2_moe",
    "qwen3_5_text",
    "qwen3_vl_moe_text",
    "stablelm",
    "starcoder2",
    "vaultgemma",
    "youtu",
)


class Nested(NamedTuple):
    """A model that holds a language model among other things.

    language  the type of the language model if config.json does not say
    decoder   its module
    head      the logits are scaled and capped as those of the language model alone are
    eager     as in `Family`
    """

    language: str
    decoder: str = "model.language_model"
    head: bool = False
    eager: bool = False


NESTED = {
    "aya_vision": Nested("cohere2"),
    "cohere2_vision": Nested("cohere2"),
    "exaone4_5": Nested("exaone4"),
    "gemma3": Nested("gemma3_text"),
    "gemma4": Nested("gemma4_text", head=True),
    "gemma4_unified": Nested("gemma4_unified_text", head=True),
    "glm46v": Nested("glm4v_text"),
    "glm4v": Nested("glm4v_text"),
    "glm4v_moe": Nested("glm4v_moe_text"),
    "glm_ocr": Nested("glm_ocr_text"),
    "glmasr": Nested("llama"),
    "got_ocr2": Nested("qwen2"),
    "granite4_vision": Nested("llama", head=True),
    "granite_speech": Nested("granite"),
    "hunyuan_vl": Nested("hunyuan_vl_text"),
    "idefics2": Nested("mistral", "model.text_model"),
    "idefics3": Nested("llama", "model.text_model"),
    "internvl": Nested("qwen2"),
    "lfm2_vl": Nested("lfm2"),
    "lighton_ocr": Nested("qwen3"),
    "llama4": Nested("llama4_text", "language_model.model"),
    "llava": Nested("llama"),
    "llava_next": Nested("llama"),
    "llava_next_video": Nested("llama"),
    "llava_onevision": Nested("qwen2"),
    "minicpmv4_6": Nested("qwen3_5_text"),
    "mistral3": Nested("mistral"),
    "muse_glimmer": Nested("muse_glimmer_text", head=True),
    "ovis2": Nested("qwen2"),
    "paddleocr_vl": Nested("paddleocr_vl_text"),
    "paligemma": Nested("gemma", eager=True),
    "qianfan_ocr": Nested("qwen3"),
    "qwen2_5_omni": Nested("qwen2_5_omni_text", "model"),
    "qwen2_5_omni_thinker": Nested("qwen2_5_omni_text", "model"),
    "qwen2_5_vl": Nested("qwen2_5_vl_text"),
    "qwen2_audio": Nested("qwen2"),
    "qwen2_vl": Nested("qwen2_vl_text"),
    "qwen3_5": Nested("qwen3_5_text"),
    "qwen3_5_moe": Nested("qwen3_5_moe_text"),
    "qwen3_asr": Nested("qwen3"),
    "qwen3_omni_moe": Nested("qwen3_omni_moe_text", "model"),
    "qwen3_omni_moe_thinker": Nested("qwen3_omni_moe_text", "model"),
    "qwen3_vl": Nested("qwen3_vl_text"),
    "qwen3_vl_moe": Nested("qwen3_vl_moe_text"),
    "smolvlm": Nested("llama", "model.text_model"),
    "video_llama_3": Nested("qwen2"),
    "voxtral": Nested("llama"),
}


WHICH = "docs/models.md names the types that work"
"""What to tell whose model is of another."""


def known_types() -> list[str]:
    """All model types that can be worked on."""
    return sorted({*FAMILIES, *BUILT_LIKE, *NESTED})


def find_family(config: dict[str, Any]) -> Family:
    """The family of a config.json, or a refusal that says why."""
    model_type = str(config.get("model_type"))
    if (nested := NESTED.get(model_type)) is not None:
        text = text_config(config)
        model_type = nested.language if text is config else str(text.get("model_type") or nested.language)
    name = BUILT_LIKE.get(model_type, model_type)
    if name in FAMILIES:
        family: Family = importlib.import_module(f"marlin_tools.families.{name}").FAMILY
        return family if nested is None else _within(family, nested)
    inside = text_config(config).get("model_type")
    holds = f", which holds a language model of type `{inside}`" if inside != config.get("model_type") else ""
    raise ModelError(
        f"unknown model type `{config.get('model_type')}`{holds}",
        hint=near(model_type, known_types(), WHICH),
    )


def _within(family: Family, nested: Nested) -> Family:
    family = replace(family, decoder=nested.decoder, eager=nested.eager)
    return family if nested.head else replace(family, logits_times=None, logits_over=None, logits_capped=False)


def known_family(config: dict[str, Any]) -> Family | None:
    """The family of a config.json, or None where `find_family` refuses."""
    try:
        return find_family(config)
    except ModelError:
        return None
