"""A trained adapter in use: opened on its base, evaluated, asked to write, merged into a folder that other software loads."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rankwise.checkpoint.json_text import read_object
from rankwise.errors import CheckpointError, ConfigError
from rankwise.original import has_base
from rankwise.training.config import Config, make_config, task_configs
from rankwise.training.folder import config_of, run_of
from rankwise.training.models import Loaded, load_model, pick_device, pick_precision


@dataclass
class Opened:
    """An adapter on its base, with what is known of its training."""

    loaded: Loaded
    adapter: Path
    task: str
    labels: list[str] | None
    config: Config | None  # of the run, where the adapter lies in one

    @property
    def model(self) -> Any:
        """The adapted model, in evaluation mode."""
        return self.loaded.model


def adapter_folder(path: str | Path) -> Path:
    """The adapter that a path means: an adapter folder, or a run's folder with a finished adapter or at least a checkpoint.

    Raises:
        CheckpointError: nothing of the kind is there.
    """
    path = Path(path)
    if (path / "adapter_config.json").is_file():
        return path
    run = run_of(path)
    if run is not None:
        if run.adapter.is_dir():
            return run.adapter
        found = run.checkpoint()
        if found:
            return found[0] / "adapter"
        raise CheckpointError(f"the run {run.root} has no adapter yet; train it first: rankwise train {run / 'config.yaml'}")
    if not path.exists():
        raise CheckpointError(f"{path}: no such folder; give a run's folder or an adapter's")
    raise CheckpointError(f"{path} is neither a run nor an adapter: it holds no adapter_config.json")


def open_adapter(path: str | Path, base: str | None = None, dtype: torch.dtype | str | None = None) -> Opened:
    """Loads the base and puts the adapter on it.

    Args:
        path: a run's folder or an adapter's.
        base: the base model, where it is not the one that the training noted or lies elsewhere now.
        dtype: of the base's weights; None takes the run's precision, 'auto' the folder's own.

    Raises:
        CheckpointError, ConfigError: no adapter, no base, or a base that is another one.
    """
    import rankwise as rw

    folder = adapter_folder(path)
    run = run_of(folder)
    config = config_of(run) if run else None
    about = _about(folder, config)
    name = base or about["model"]
    if not name:
        raise ConfigError(f"the adapter in {folder} does not say which base it belongs to; give it with --model")
    if dtype is None:
        dtype = pick_precision(config.train.precision if config else "auto", pick_device())
    scratch = bool(about["from_scratch"])
    if scratch and dtype == "auto":
        dtype = pick_precision(config.train.precision if config else "fp32", pick_device())
    loaded = load_model(name, about["task"], about["labels"], dtype, config.seed if config else about["seed"] or 0, scratch)
    rw.load(loaded.model, folder, any_base=scratch)  # the file of a model from scratch holds everything that its start did not leave alone
    loaded.model.eval()
    return Opened(loaded, folder, about["task"], about["labels"], config)


def about_adapter(folder: Path) -> dict[str, Any]:
    """{'model', 'task', 'labels'} of an adapter, as its files or its run say; None where they do not."""
    run = run_of(folder)
    return _about(folder, config_of(run) if run else None)


def _about(folder: Path, config: Config | None) -> dict[str, Any]:
    """Base, task and classes: from training.json beside the adapter, else from the run, else from PEFT's own file."""
    about: dict[str, Any] = {"model": None, "task": "text", "labels": None, "from_scratch": None, "seed": None}
    for name, keys in (("adapter_config.json", {"base_model_name_or_path": "model"}), ("training.json", {key: key for key in about})):
        if (folder / name).is_file():
            stored = read_object(folder / name)
            about |= {mine: stored[theirs] for theirs, mine in keys.items() if stored.get(theirs)}
    for key, kind in {"model": str, "task": str, "labels": list, "seed": int}.items():
        if about[key] is not None and type(about[key]) is not kind:
            raise CheckpointError(
                f"the adapter in {folder} has {key}={about[key]!r}, which is no {kind.__name__}; give the base with --model"
            )
    if about["labels"] is not None and not all(isinstance(label, str) for label in about["labels"]):
        raise CheckpointError(f"the adapter in {folder} has labels={about['labels']!r}, which are no names of classes; write them as text")
    if config is not None:
        about |= {"model": config.model, "task": config.task, "from_scratch": config.train.from_scratch}
    return about


def evaluate(opened: Opened, data: str | None = None, general: str | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """(scores of the base, scores with the adapter) on the run's own rows, or on rows given here. No scores of a base that is gone.

    Raises:
        ConfigError: no rows are known. DataError: as in training.
    """
    import rankwise as rw
    from rankwise.training.prepare import prepare
    from rankwise.training.run import scorers

    config = _evaluation_config(opened, data, general)
    found: dict[str, Any] = {}
    for task, mine in task_configs(config).items():
        prepared = prepare(mine, opened.loaded.tokenizer, opened.labels)
        found |= {task or name: score for name, score in scorers(mine, prepared, opened.model).items()}
    if not found:
        raise ConfigError("the run names no rows to evaluate on; give them with --data")

    def scores() -> dict[str, Any]:
        return {name: score() for name, score in found.items()}

    if not has_base(opened.model):
        return {}, scores()
    with rw.disabled(opened.model):
        before = scores()
    return before, scores()


def _evaluation_config(opened: Opened, data: str | None, general: str | None) -> Config:
    if opened.config is None and data is None:
        raise ConfigError(f"{opened.adapter} lies in no run, so there are no rows to evaluate on; give them with --data")
    name = str(opened.loaded.folder)
    config = opened.config or make_config({"model": name, "task": opened.task, "data": str(data), "allow": ["cut", "no-end", "empty"]})
    if data is None and general is None:
        return config
    # the rows given take the place of the run's own; nothing is trained, so they stand for the training rows too
    rows = {"train": data or config.data.train, "eval": data or config.data.eval, "general": general}
    if config.data.tasks is not None:
        if data is None:
            raise ConfigError("--general needs --data where the run trained on several tasks; give the rows to evaluate on")
        rows |= {"tasks": None}
    return config.model_copy(update={"data": config.data.model_copy(update=rows)})


@torch.no_grad()
def generate(opened: Opened, prompt: str, tokens: int = 128, compare: bool = False) -> dict[str, str]:
    """What the model writes after a prompt, greedily: {'adapter': text}, and with `compare` {'base': text, 'adapter': text}.

    A tokenizer with a chat template gets the prompt as a user's message, as in training; except for adapters trained on plain text.
    """
    import rankwise as rw

    if opened.task == "classification":
        raise ConfigError("a classifier does not write text; use evaluate")
    written: dict[str, str] = {}
    if compare:
        with rw.disabled(opened.model):
            written["base"] = _write(opened, prompt, tokens)
    written["adapter"] = _write(opened, prompt, tokens)
    return written


def _write(opened: Opened, prompt: str, tokens: int) -> str:
    tokenizer, model = opened.loaded.tokenizer, opened.model
    if opened.task != "text" and getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    else:
        ids = _opened_ids(tokenizer, prompt)
    ids = ids.to(opened.loaded.device)  # (1, length)
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=_ends(tokenizer, model),
    )
    return tokenizer.decode(made[0, ids.shape[1] :], skip_special_tokens=True).strip()


def _opened_ids(tokenizer: Any, text: str) -> torch.Tensor:
    """Ids of a text with what the tokenizer puts before it, but no end token behind it. (1, length)"""
    ids = tokenizer(text)["input_ids"]
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return torch.tensor([ids])


def _ends(tokenizer: Any, model: Any) -> list[int]:
    """Every token that ends an answer: the tokenizer's, the generation config's, and the chat template's own."""
    stored = getattr(model.generation_config, "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(stored if isinstance(stored, list) else [stored])}
    if getattr(tokenizer, "chat_template", None):
        from rankwise.training.conversation import chat_format

        end = chat_format(tokenizer).end_token
        ends.add(tokenizer.convert_tokens_to_ids(end) if end else None)
    return sorted(end for end in ends if end is not None)


def merge(path: str | Path, output: str | Path, base: str | None = None, dtype: str | None = None) -> Mapping[str, Any]:
    """Writes base plus adapter as an ordinary model folder, and proves it: the folder is loaded again, every tensor of it is compared with
    what was saved, and its logits on prompts are compared with those of the adapted model.

    Tokenizer, chat template and generation config are the base's files, the adapter's own above them.

    Args:
        path: a run's folder or an adapter's.
        output: the new folder.
        base: as `open_adapter`.
        dtype: 'fp32', 'bf16' or 'fp16'; None keeps the base's own. The update is added in fp32 and the sum rounded once.

    Returns:
        {'folder', 'dtype', 'difference': largest difference of the logits over their largest magnitude, 'tolerance', 'proof'}.

    Raises:
        ConfigError: the output exists. CheckpointError: the reloaded model differs by more than rounding the weights explains, or is no
            nearer to the adapted model than the bare base.
    """
    import rankwise as rw
    from rankwise.checkpoint.atomic import write_folder
    from rankwise.checkpoint.card import card, facts, method_lines, put_card
    from rankwise.checkpoint.proof import logits_on, prove, tolerance_of
    from rankwise.checkpoint.servable import DTYPES
    from rankwise.training.carding import run_lines
    from rankwise.training.exporting import copy_tokenizer, proof_batches, refuse_existing

    output = Path(output)
    refuse_existing(output)
    opened = open_adapter(path, base, "auto" if dtype is None else torch.float32)
    model = opened.model
    record, about, batches = model.rankwise, facts(model), proof_batches(opened)
    trained = logits_on(model, batches)
    base_logits = _base_logits(opened, batches)
    rw.merge(model, keep_base=False)
    model.eval()
    if dtype is not None:
        model.to(DTYPES[dtype])
        model.config.dtype = DTYPES[dtype]
    kind = next(model.parameters()).dtype
    with write_folder(output) as folder:
        model.save_pretrained(folder)
        opened.loaded.tokenizer.save_pretrained(folder)
        for source in (opened.loaded.folder, opened.adapter):
            copy_tokenizer(source, folder)
        if (opened.loaded.folder / "generation_config.json").is_file():
            shutil.copy2(opened.loaded.folder / "generation_config.json", folder / "generation_config.json")
        again = load_model(str(folder), opened.task, opened.labels, "auto").model
        wanted, found = model.state_dict(), again.state_dict()
        if wanted.keys() != found.keys() or not all(torch.equal(tensor, wanted[name]) for name, tensor in found.items()):
            raise CheckpointError("the merged model does not load as it was saved; nothing was written")
        proof = prove(logits_on(again, batches), trained, base_logits, tolerance_of(kind), "the merged model")
        data, metrics = run_lines(run_of(opened.adapter))
        lines = [f"- {line}" for line in proof.text().splitlines()]
        method = method_lines(record.recipe, record.plan.sites)
        put_card(folder, card(about, "merged", method, record.fingerprint, record.recipe.name or "lora", data, metrics, lines))
    name = str(kind).removeprefix("torch.")
    return {"folder": output, "dtype": name, "difference": proof.difference.largest, "tolerance": proof.tolerance, "proof": proof}


def _base_logits(opened: Opened, batches: list[Any]) -> torch.Tensor:
    """The base's logits; from its folder where the training wrote over it."""
    import rankwise as rw
    from rankwise.checkpoint.proof import logits_on
    from rankwise.errors import TargetError

    try:
        with rw.disabled(opened.model):
            return logits_on(opened.model, batches)
    except TargetError:
        kind, about = next(opened.model.parameters()).dtype, _about(opened.adapter, opened.config)
        seed = opened.config.seed if opened.config else about["seed"] or 0
        base = load_model(str(opened.loaded.folder), opened.task, opened.labels, kind, seed, bool(about["from_scratch"]))
        return logits_on(base.model, batches)
