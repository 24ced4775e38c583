"""The fields of PEFT's adapter_config.json for LoRA and VeRA, their defaults, and which of them change what an adapter computes."""

from typing import Any

_COMMON: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": False,
    "layers_pattern": None,
    "layers_to_transform": None,
    "modules_to_save": None,
    "peft_version": None,
    "revision": None,
    "target_modules": None,
    "task_type": None,
}

LORA_DEFAULTS: dict[str, Any] = _COMMON | {
    "peft_type": "LORA",
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "monteclora_config": None,
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "target_parameters": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}

VERA_DEFAULTS: dict[str, Any] = _COMMON | {
    "peft_type": "VERA",
    "d_initial": 0.1,
    "init_weights": True,
    "projection_prng_key": 0,
    "r": 256,
    "save_projection": True,
    "vera_dropout": 0.0,
}

ADALORA_DEFAULTS: dict[str, Any] = LORA_DEFAULTS | {
    "peft_type": "ADALORA",
    "beta1": 0.85,
    "beta2": 0.85,
    "deltaT": 1,
    "init_r": 12,
    "orth_reg_weight": 0.5,
    "rank_pattern": None,
    "target_r": 8,
    "tfinal": 0,
    "tinit": 0,
    "total_step": None,
}

#: read, and taken over into the recipe
READ: dict[str, frozenset[str]] = {
    "LORA": frozenset({
        "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "r", "lora_alpha", "rank_pattern",
        "alpha_pattern", "lora_dropout", "use_rslora", "use_dora", "init_lora_weights",
    }),
    "VERA": frozenset({
        "target_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "r", "d_initial", "projection_prng_key",
        "save_projection", "vera_dropout",
    }),
}  # fmt: skip

#: may have any value: what they say is known otherwise, or has no effect on a trained adapter
HARMLESS = frozenset({
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "fan_in_fan_out",
    "megatron_core", "qalora_group_size", "runtime_config", "loftq_config", "eva_config", "init_weights",
})  # fmt: skip

#: values of init_lora_weights that leave the base as it is
STARTS_KEEPING_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

#: what to do about a field that has no counterpart here
REMEDIES = {
    "bias": "train it again with bias='none', or merge it with PEFT and use the merged model as the base",
    "lora_bias": "merge it with PEFT (merge_and_unload) and use the merged model as the base",
    "trainable_token_indices": "merge it with PEFT (merge_and_unload) and use the merged model as the base",
}
REMEDY = "merge it with PEFT (merge_and_unload) and use the merged model as the base, or train it again without"
