"""The fields of PEFT's adapter_config.json for LoRA, AdaLoRA and VeRA, their defaults, and which of them change what is computed."""

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

#: the types that are read here
DEFAULTS: dict[str, dict[str, Any]] = {"LORA": LORA_DEFAULTS, "ADALORA": ADALORA_DEFAULTS, "VERA": VERA_DEFAULTS}

_TARGETS = frozenset({"target_modules", "layers_to_transform", "layers_pattern", "modules_to_save"})

#: read, and taken over into the recipe or looked into below
READ: dict[str, frozenset[str]] = {
    "LORA": _TARGETS | {
        "exclude_modules", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "lora_dropout", "use_rslora", "use_dora",
        "init_lora_weights", "lora_bias", "trainable_token_indices", "bias", "ensure_weight_tying",
    },
    "ADALORA": _TARGETS | {
        "exclude_modules", "init_r", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "lora_alpha",
        "rank_pattern", "lora_dropout", "trainable_token_indices", "bias", "ensure_weight_tying",
    },
    "VERA": _TARGETS | {"r", "d_initial", "projection_prng_key", "save_projection", "vera_dropout", "bias"},
}  # fmt: skip

#: may have any value: what they say is known otherwise, or has no effect on a trained adapter
HARMLESS = frozenset({
    "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path", "revision", "task_type", "inference_mode", "fan_in_fan_out",
    "megatron_core", "qalora_group_size", "runtime_config", "init_weights",
    # what a start was made from; whether it moved the base is said by init_lora_weights
    "loftq_config", "eva_config", "corda_config", "lora_ga_config",
})  # fmt: skip

#: fields of LoRA that PEFT's AdaLoRA has and never looks at; total_step is for whoever runs the steps
UNUSED: dict[str, frozenset[str]] = {
    "ADALORA": frozenset({"r", "use_rslora", "alpha_pattern", "lora_bias", "init_lora_weights", "total_step"})
}

#: values of init_lora_weights that leave the base as it is
STARTS_KEEPING_THE_BASE = (True, False, None, "gaussian", "eva", "orthogonal", "mica")

#: values that move the base by a pair which follows from the base weight alone, so that PEFT's loader and this one can make it again
STARTS_MADE_AGAIN = ("pissa", "olora")

#: what to do about a field that has no counterpart here
MERGE = "merge it with PEFT (merge_and_unload) and use the merged model as the base"
CONVERT = "convert it with PEFT's save_pretrained(..., path_initial_model_for_weight_conversion=...), where it was trained"
REMEDIES = {
    "target_parameters": f"its adapters stand on parameters that no linear layer holds; {MERGE}",
    "ensure_weight_tying": MERGE,
}
REMEDY = f"{MERGE}, or train it again without"
