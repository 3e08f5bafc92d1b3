"""Tiny shapes, one for every family: whoever decodes is tested with all of them."""

BASE = dict(
    vocab_size=97,
    hidden_size=36,
    intermediate_size=50,
    num_layers=2,
    num_heads=6,
    num_kv_heads=2,
    head_size=6,
    context=4096,
    initializer_range=0.2,
)
FAMILIES = {
    "llama": dict(tie_embeddings=True, qkv_bias=True, output_bias=True, mlp_bias=True),
    "mistral": dict(architecture="mistral", windows=(7, 7)),
    "mixtral": dict(
        architecture="mixtral",
        num_experts=5,
        experts_per_token=2,
        expert_size=26,
        windows=(None, 9),
    ),
    "qwen3": dict(architecture="qwen3", qk_norm=True),
    "qwen3_moe": dict(
        architecture="qwen3_moe",
        qk_norm=True,
        num_experts=9,
        experts_per_token=4,
        expert_size=12,
        normalize_router=False,
        dense_layers=(0,),
    ),
}
