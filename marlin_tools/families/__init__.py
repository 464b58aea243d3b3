"""Model families as pure data: where the blocks are, and which linears read the same tensor.

A decoder block is a chain of residual branches, each `h + post(exit(body(pre(h))))`. The `entry` linears read `pre(h)`; `body`
is the module that holds them and, up to but not including `exit`, turns `pre(h)` into what `exit` reads. That is all the stream
needs to stage a block; attention, rotary embeddings, masks, q/k norms and embedding scales stay in transformers' own modules.

Names here are those of transformers' modules; `layout.py` says which tensor of a checkpoint each of them is. One file per
family, named by the `model_type` of config.json; `ALIASES` names types that are built the same way.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from marlin_tools.checkpoint.contract import text_config
from marlin_tools.errors import ModelError, near

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Experts:
    """The feed-forward networks of a mixture of experts, of which every token goes through a few.

    path         the module that holds them, relative to the branch's body
    shared       the network that every token goes through, likewise; None if there is none
    together     what they call the tensors that hold gate and up, and down, of all experts, relative to the branch's body
    transposed   such a tensor is [E, K, N], not [E, N, K]; None if both are found, which its shape tells
    interleaved  in such a tensor, rows of gate and up take turns
    gated        each is three linears; without a gate it is two, and each expert has tensors of its own
    """

    path: str = "experts"
    shared: str | None = None
    together: tuple[str, str] = ("experts.gate_up_proj", "experts.down_proj")
    transposed: bool | None = False
    interleaved: bool = False
    gated: bool = True

    @property
    def entry(self) -> tuple[str, ...]:
        """The linears of an expert that read the tokens."""
        return ("gate_proj", "up_proj") if self.gated else ("up_proj",)


@dataclass(frozen=True)
class Branch:
    """One residual branch of a block; all names are relative to the block, linears to the body.

    pre       the norm before the body; None if there is none
    post      the norm after it, before the output joins the residual stream
    inner     linears between entry and exit, each of which reads a tensor of its own
    into      the number of the block by which what the body reads is multiplied
    out       the number of the block by which what the branch puts out is multiplied
    attends   the body is called as attention is
    apart     sequence by sequence: transformers' own code for it takes more room for many than there is
    beside    it reads what the branch before it read, not what that put out: "always", or if this key of config.json says so
    instead   a block has it in the place of the branch before it, or of one before that which is `instead` as well
    experts   the body is a mixture of experts; `entry` and `exit` are then empty
    optional  a model may have it or not
    """

    pre: str | None
    body: str
    entry: tuple[str, ...] = ()
    exit: str = ""
    post: str | None = None
    inner: tuple[str, ...] = ()
    into: str | None = None
    out: str | None = None
    attends: bool = False
    apart: bool = False
    beside: str | None = None
    instead: bool = False
    experts: Experts | None = None
    optional: bool = False

    def steps(self, experts: int = 0) -> tuple[tuple[tuple[str, ...], ...], ...]:
        """Its linears, relative to the body, as they are solved: step by step, in each the groups that read one tensor."""
        if self.experts is None:
            inner = (tuple((name,) for name in self.inner),) if self.inner else ()
            return (self.entry,), *inner, ((self.exit,),)
        bodies = [f"{self.experts.path}.{number}" for number in range(experts)]
        bodies = [*([self.experts.shared] if self.experts.shared else []), *bodies]
        entries = tuple(tuple(f"{body}.{name}" for name in self.experts.entry) for body in bodies)
        return entries, tuple((f"{body}.down_proj",) for body in bodies)

    def linears(self, experts: int = 0) -> tuple[str, ...]:
        """The same without their order, relative to the block."""
        return tuple(f"{self.body}.{name}" for step in self.steps(experts) for group in step for name in group)


@dataclass(frozen=True)
class Family:
    """How a kind of model is built. `decoder` is the module that maps token ids to hidden states.

    renames   pairs (module, tensor): how names in a checkpoint differ from those of the modules, part by part
    called    parts of a block that checkpoints store, each with what vLLM calls its module, if that is another name
    plain     a part of a block whose linears vLLM takes in 16 bits only
    multiple  the number of a block's module that scales what joins the residual stream
    enlarges  `logits_scaling` of config.json multiplies the logits, which it otherwise divides
    scalar    a stored number of each block by which its output is multiplied
    lacks     parts of a block that others of this type have and that cannot be worked on
    needs     parts that each block must have: one without takes what another has computed
    unset     keys of config.json by which blocks of others of this type use what another has computed: zero here
    stored    what tensors of the decoder begin with, if that is not `decoder`
    pairs     a block puts out two things, of which the first is the residual stream
    """

    branches: tuple[Branch, ...]
    decoder: str = "model"
    embedding: str = "embed_tokens"
    blocks: str = "layers"
    norm: str = "norm"
    head: str = "lm_head"
    renames: tuple[tuple[str, str], ...] = ()
    called: tuple[tuple[str, str], ...] = ()
    plain: str | None = None
    multiple: str | None = None
    enlarges: bool = False
    scalar: str | None = None
    lacks: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    unset: tuple[str, ...] = ()
    stored: str | None = None
    pairs: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        """All linears of a block that can be quantised, in solving order, relative to it; no alternatives, no experts."""
        return tuple(name for slot in self.slots() for name in slot[0].linears())

    def slots(self) -> list[tuple[Branch, ...]]:
        """The branches of a block, in order, each with what may stand in its place."""
        slots: list[list[Branch]] = []
        for branch in self.branches:
            if branch.instead:
                slots[-1].append(branch)
            else:
                slots.append([branch])
        return [tuple(slot) for slot in slots]

    def chosen(self, present: Callable[[str], bool]) -> tuple[Branch, ...]:
        """The branches of a block in which these modules are present; where none is whole, the first is missed by name."""

        def whole(branch: Branch) -> bool:
            if (experts := branch.experts) is None:
                return all(present(name) for name in branch.linears())
            anyhow = any(present(f"{branch.body}.{name}") for name in (experts.path, experts.together[0]))
            return anyhow and (experts.shared is None or present(f"{branch.body}.{experts.shared}"))

        found = (next((b for b in slot if whole(b)), None if slot[0].optional else slot[0]) for slot in self.slots())
        return tuple(branch for branch in found if branch is not None)

    def head_numbers(self, config: "PreTrainedConfig") -> tuple[float, float | None]:
        """What a model multiplies the product of its head with, and what caps it; as transformers does it.

        The head of a larger model leaves out both; a few types have them nonetheless.
        """
        text = config.get_text_config()
        cap, scaling = getattr(text, "final_logit_softcapping", None), float(getattr(text, "logits_scaling", 1.0))
        if text is not config:
            own = {"granite4_vision": 1 / scaling, "muse_glimmer": float(getattr(text, "output_multiplier", 1.0))}
            capped = config.model_type in {"gemma4", "gemma4_unified", "muse_glimmer"}
            return own.get(config.model_type, 1.0), cap if capped else None
        factor = float(getattr(text, "logit_scale", 1.0)) * float(getattr(text, "lm_head_multiplier", 1.0))
        return factor * (scaling if self.enlarges else 1 / scaling), cap

    def served(self, linear: str) -> str:
        """What vLLM calls a linear of this name in a checkpoint."""
        for stored, module in self.called:
            linear = linear.replace(f".{stored}.", f".{module}." if module else ".")
        return linear

    def block_prefix(self, index: int) -> str:
        """What the names of a block's tensors start with."""
        return f"{self.stored or self.decoder}.{self.blocks}.{index}."


ALIASES = {
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

NESTED = {
    "aya_vision": ("cohere2", "model.language_model"),
    "cohere2_vision": ("cohere2", "model.language_model"),
    "exaone4_5": ("exaone4", "model.language_model"),
    "gemma3": ("gemma3_text", "model.language_model"),
    "gemma4": ("gemma4_text", "model.language_model"),
    "gemma4_unified": ("gemma4_unified_text", "model.language_model"),
    "glm46v": ("glm4v_text", "model.language_model"),
    "glm4v": ("glm4v_text", "model.language_model"),
    "glm4v_moe": ("glm4v_moe_text", "model.language_model"),
    "glm_ocr": ("glm_ocr_text", "model.language_model"),
    "glmasr": ("llama", "model.language_model"),
    "got_ocr2": ("qwen2", "model.language_model"),
    "granite4_vision": ("llama", "model.language_model"),
    "granite_speech": ("granite", "model.language_model"),
    "hunyuan_vl": ("hunyuan_vl_text", "model.language_model"),
    "idefics2": ("mistral", "model.text_model"),
    "idefics3": ("llama", "model.text_model"),
    "internvl": ("qwen2", "model.language_model"),
    "lfm2_vl": ("lfm2", "model.language_model"),
    "lighton_ocr": ("qwen3", "model.language_model"),
    "llama4": ("llama4_text", "language_model.model"),
    "llava": ("llama", "model.language_model"),
    "llava_next": ("llama", "model.language_model"),
    "llava_next_video": ("llama", "model.language_model"),
    "llava_onevision": ("qwen2", "model.language_model"),
    "minicpmv4_6": ("qwen3_5_text", "model.language_model"),
    "mistral3": ("mistral", "model.language_model"),
    "muse_glimmer": ("muse_glimmer_text", "model.language_model"),
    "ovis2": ("qwen2", "model.language_model"),
    "paddleocr_vl": ("paddleocr_vl_text", "model.language_model"),
    "paligemma": ("gemma", "model.language_model"),
    "qianfan_ocr": ("qwen3", "model.language_model"),
    "qwen2_5_omni": ("qwen2_5_omni_text", "model"),
    "qwen2_5_omni_thinker": ("qwen2_5_omni_text", "model"),
    "qwen2_5_vl": ("qwen2_5_vl_text", "model.language_model"),
    "qwen2_audio": ("qwen2", "model.language_model"),
    "qwen2_vl": ("qwen2_vl_text", "model.language_model"),
    "qwen3_5": ("qwen3_5_text", "model.language_model"),
    "qwen3_5_moe": ("qwen3_5_moe_text", "model.language_model"),
    "qwen3_asr": ("qwen3", "model.language_model"),
    "qwen3_omni_moe": ("qwen3_omni_moe_text", "model"),
    "qwen3_omni_moe_thinker": ("qwen3_omni_moe_text", "model"),
    "qwen3_vl": ("qwen3_vl_text", "model.language_model"),
    "qwen3_vl_moe": ("qwen3_vl_moe_text", "model.language_model"),
    "smolvlm": ("llama", "model.text_model"),
    "video_llama_3": ("qwen2", "model.language_model"),
    "voxtral": ("llama", "model.language_model"),
}
"""Types that hold a language model among other things: its own type if config.json does not say, and its module."""


def turns_by_length(config: "PreTrainedConfig") -> bool:
    """Whether the angles of a position depend on how long the text is."""
    turns: dict[str, Any] = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    every = [turns, *(each for each in turns.values() if isinstance(each, dict))]  # or of each kind of block
    return any(each.get("rope_type") in {"dynamic", "longrope"} for each in every)


def known_types() -> list[str]:
    """All model types that can be worked on."""
    return sorted({*FAMILIES, *ALIASES, *NESTED})


def find_family(config: dict[str, Any]) -> Family:
    """The family of a config.json, or a refusal that says why."""
    model_type, decoder = str(config.get("model_type")), None
    if model_type in NESTED:
        usual, decoder = NESTED[model_type]
        text = text_config(config)
        model_type = usual if text is config else str(text.get("model_type") or usual)
    name = ALIASES.get(model_type, model_type)
    if name in FAMILIES:
        family: Family = importlib.import_module(f"marlin_tools.families.{name}").FAMILY
        return family if decoder is None else replace(family, decoder=decoder)
    inside = text_config(config).get("model_type")
    holds = f", which holds a language model of type `{inside}`" if inside != config.get("model_type") else ""
    raise ModelError(
        f"unknown model type `{config.get('model_type')}`{holds}",
        hint=near(model_type, known_types(), f"types that work: {', '.join(known_types())}"),
    )


def known_family(config: dict[str, Any]) -> Family | None:
    """The family of a config.json, or None where `find_family` refuses."""
    try:
        return find_family(config)
    except ModelError:
        return None
