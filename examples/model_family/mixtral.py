"""Two model families that the package does not list: Mistral, and Mixtral with its own names of keys and tensors."""

from megatron_rl.config.families import ModelFamily

MISTRAL = ModelFamily("MistralForCausalLM", "mistral", window="always", defaults={"sliding_window": 4096})
"""Computes what Llama computes, under the same names, but where `sliding_window` says what a position sees."""

MIXTRAL = ModelFamily(
    "MixtralForCausalLM",
    mixture=True,
    keys={"num_experts": "num_local_experts", "moe_intermediate_size": "intermediate_size"},
    defaults={"norm_topk_prob": True},
    tensors={
        ".mlp.": ".block_sparse_moe.",
        ".gate_proj.": ".w1.",
        ".up_proj.": ".w3.",
        ".down_proj.": ".w2.",
    },
)
"""A mixture of experts in every layer; the weights of a token's experts always add up to 1."""
