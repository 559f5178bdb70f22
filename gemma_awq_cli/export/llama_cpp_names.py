"""What llama.cpp calls the architectures and tensors of Gemma. Source: llama.cpp `src/llama-arch.cpp`."""

from collections.abc import Mapping

# The model_type of a language model -> llama.cpp's name of the architecture.
ARCHITECTURES: Mapping[str, str] = {
    "gemma": "gemma",
    "gemma2": "gemma2",
    "gemma3_text": "gemma3",
    "gemma3n_text": "gemma3n",
    "gemma4_text": "gemma4",
    "gemma4_unified_text": "gemma4",
}
LINEARS: Mapping[str, str] = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# An RMSNorm's slot in the forward -> its name.
NORMS: Mapping[str, str] = {
    "input_norm": "attn_norm",
    "attention_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "post_mlp_norm": "post_ffw_norm",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "per_layer_norm": "post_norm",
    "laurel_norm": "laurel_post_norm",
    "router_norm": "altup_router_norm",
    "dense_norm": "post_ffw_norm_1",
    "experts_norm": "pre_ffw_norm_2",
    "post_experts_norm": "post_ffw_norm_2",
}
# Other tensors of a layer, by their full names.
KEPT: Mapping[str, str] = {
    "layer_scalar": "layer_output_scale.weight",
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "router.proj.weight": "ffn_gate_inp.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "altup.correct_output_scale": "altup_correct_scale.weight",
    "altup.correction_coefs.weight": "altup_correct_coef.weight",
    "altup.prediction_coefs.weight": "altup_predict_coef.weight",
    "altup.modality_router.weight": "altup_router.weight",
    "laurel.linear_left.weight": "laurel_l.weight",
    "laurel.linear_right.weight": "laurel_r.weight",
}
# Matrices that llama.cpp's converter stores as float32 too.
FLOAT32 = ("ffn_gate_inp.weight", "altup_correct_coef.weight", "altup_predict_coef.weight")
EMBEDDING, HEAD, FINAL_NORM = "token_embd.weight", "output.weight", "output_norm.weight"
PER_LAYER_TABLE = "per_layer_token_embd.weight"
PER_LAYER_PROJECTION = "per_layer_model_proj.weight"
PER_LAYER_NORM = "per_layer_proj_norm.weight"
ALTUP_PROJECTIONS, ALTUP_UNEMBED = "altup_proj.weight", "altup_unembd_proj.weight"
ROPE_FACTORS = "rope_freqs.weight"
GATE_UP_EXPERTS, DOWN_EXPERTS = "ffn_gate_up_exps.weight", "ffn_down_exps.weight"
