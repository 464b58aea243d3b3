"""Llama and everything built like it: Mistral, Qwen2 (biases), Qwen3 (q/k norms), Gemma 1."""

from marlin_tools.families.family import Branch, Family

ATTENTION = Branch(pre="input_layernorm", body="self_attn", entry=("q_proj", "k_proj", "v_proj"), exit="o_proj", attends=True)
MLP = Branch(pre="post_attention_layernorm", body="mlp", entry=("gate_proj", "up_proj"), exit="down_proj")

FAMILY = Family(branches=(ATTENTION, MLP))
