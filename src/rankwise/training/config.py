"""One YAML file, checked: the keys, dotted overrides, and the recipe that a configuration asks for.

Twenty-six keys and no more. What belongs to a method (its options, the axes, patterns of ranks) stands under `method`, because a
recipe's own function already knows and checks it.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from rankwise.errors import ConfigError, nearest
from rankwise.training.yaml_text import LONGEST, apply_override, copy_plain, parse_yaml

Task = Literal["completion", "chat", "text", "classification"]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TaskConfig(_Strict):
    """One task of a sequence: its name and its rows, as under `data`."""

    name: str = Field(min_length=1, description="what the task is called in tables and folders")
    data: "DataConfig" = Field(description="a path, or {train, eval}")
    filter: dict[str, Any] | None = Field(None, description="column -> value or list of values: only these rows")

    @field_validator("data", mode="before")
    @classmethod
    def _file(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str) else value


class DataConfig(_Strict):
    """Where the rows are: a file, a folder or a Hub name each; 'demo' is the bundled sample. `tasks` instead of the rest trains one data
    set after another."""

    train: str | None = Field(None, description="rows to train on")
    eval: str | None = Field(None, description="rows of the same task to evaluate on, before and after")
    general: str | None = Field(None, description="general text: how much is forgotten (causal tasks)")
    types: str | None = Field(None, description="column that says of which kind a row is, for methods that balance kinds")
    filter: dict[str, Any] | None = Field(None, description="column -> value or list of values: only these rows")
    tasks: tuple[TaskConfig, ...] | None = Field(None, description="a sequence of tasks, {name, data, filter} each")


class TrainConfig(_Strict):
    """How long, how fast and how precisely."""

    epochs: float = Field(2.0, gt=0, description="passes over the training rows")
    steps: int | None = Field(None, ge=1, description="optimizer steps; overrides epochs")
    lr: float | None = Field(None, gt=0, description="learning rate; default: the recipe's own")
    schedule: Literal["linear", "cosine", "constant"] = Field("linear", description="how the rate falls after the warmup")
    warmup: float = Field(0.0, ge=0, description="steps of warmup, or a share of all steps if below 1")
    batch_size: int = Field(8, ge=1, description="rows a forward")
    accumulate: int = Field(1, ge=1, description="forwards a step")
    max_length: int = Field(512, ge=2, description="tokens a row; longer rows are cut, which must be allowed")
    weight_decay: float = Field(0.0, ge=0, description="decoupled decay of what trains")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on a GPU that has it, else fp32")
    checkpointing: bool = Field(False, description="recompute activations in the backward to save memory")
    eval_every: int | None = Field(None, ge=1, description="steps between evaluations; default: before and after only")
    save_every: int = Field(100, ge=1, description="steps between checkpoints; one is written at the end in any case")
    from_scratch: bool = Field(False, description="pretrain: random weights of the seed; everything trains, so method: galore")
    loss_on: Literal["completion", "assistant", "last", "all"] = Field("completion", description="which tokens have a loss")


class Config(_Strict):
    """Everything that defines a run. Paths are relative to the working directory."""

    model: str = Field(description="a model folder; 'demo' and 'minilm' are models that come with the package and its test extra")
    task: Task = Field("completion", description="completion, chat, text or classification")
    data: DataConfig = Field(description="a path, or {train, eval, general, types, filter}, or {tasks: [...]}")
    method: dict[str, Any] = Field({"name": "lora"}, description="a recipe's name, or {name, its options, axes such as gain: dora}")
    rank: int | None = Field(None, ge=1, description="inner size of the factors; default: the recipe's own")
    alpha: float | None = Field(None, gt=0, description="numerator of the scaling; default: the recipe's own")
    dropout: float | None = Field(None, ge=0, lt=1, description="probability on the branch's input")
    targets: Any = Field(None, description="what is adapted: a pattern, a list, or {include, exclude, layers}; default: all-linear")
    allow: tuple[str, ...] = Field((), description="problems of the data to let pass, as the refusal names them")
    train: TrainConfig = Field(TrainConfig(), description="how to train")  # type: ignore[call-arg]
    output: str = Field("runs/run", description="folder of the run")
    seed: int = Field(0, ge=0, description="seed of factors, data order, dropout and a new head")

    @model_validator(mode="before")
    @classmethod
    def _tasks(cls, value: Any) -> Any:
        """`tasks:` at the top stands for data.tasks."""
        if isinstance(value, dict) and "tasks" in value and "data" not in value:
            value = {key: part for key, part in value.items() if key != "tasks"} | {"data": {"tasks": value["tasks"]}}
        return value

    @field_validator("method", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @field_validator("data", mode="before")
    @classmethod
    def _file(cls, value: Any) -> Any:
        return {"train": value} if isinstance(value, str) else value

    @field_validator("allow", mode="before")
    @classmethod
    def _list(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A configuration from a YAML file and dotted overrides such as 'train.lr=1e-3'.

    Raises:
        ConfigError: no such file, broken YAML (with its line), an unknown key (with the nearest one), a value of the wrong type.
    """
    path = Path(path)
    try:
        if path.is_file() and path.stat().st_size > 4 * LONGEST:  # bytes of the longest text
            raise ConfigError(f"{path} has {path.stat().st_size} bytes, too many for a configuration; is it the right file?")
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 ({error.reason}, byte {error.start}); save the file as UTF-8") from None
    except OSError as error:
        raise ConfigError(f"cannot read the configuration {path}: {error.strerror}") from None
    plain = parse_yaml(text, str(path))
    if not isinstance(plain, dict):
        raise ConfigError(f"{path} holds no keys; a configuration needs at least model and data")
    return make_config(plain, overrides, str(path))


def make_config(plain: Mapping[str, Any], overrides: Sequence[str] = (), where: str = "the configuration") -> Config:
    """A configuration from a mapping and overrides. Raises ConfigError as `load_config`."""
    merged = copy_plain(plain)
    for override in overrides:
        apply_override(merged, override)
    try:
        config = Config.model_validate(merged)
    except ValidationError as error:
        raise ConfigError(_first_problem(error, where)) from None
    _check_data(config.data, where)
    resolve(config)  # a method that cannot be built is refused here, before a model is loaded
    return config


def _check_data(data: DataConfig, where: str, parent: str = "data") -> None:
    """What the types alone do not say."""
    if data.tasks is None:
        if data.train is None:
            raise ConfigError(f"{where}: key '{parent}.train' is missing; add it, for example {parent}.train=...")
        return
    if parent != "data":
        raise ConfigError(f"{where}: {parent}.tasks: a task holds no tasks of its own; give its rows, {{train, eval}}")
    for key in ("train", "eval", "general", "filter"):
        if getattr(data, key) is not None:
            raise ConfigError(f"{where}: data.{key} beside data.tasks: each task names its own rows; move it into the tasks or take it out")
    if not data.tasks:
        raise ConfigError(f"{where}: data.tasks is empty; name at least one task, {{name: ..., data: ...}}")
    for index, task in enumerate(data.tasks):
        if task.name in [other.name for other in data.tasks[:index]]:
            raise ConfigError(f"{where}: data.tasks names two tasks {task.name!r}; a name is what tells them apart in the tables")
        for key in ("general", "types"):
            if getattr(task.data, key) is not None:
                raise ConfigError(f"{where}: data.tasks.{index}.data.{key} is not for a single task; types stand at data.types")
        if task.filter is not None and task.data.filter is not None:
            raise ConfigError(f"{where}: data.tasks.{index} has a filter twice; remove one")
        _check_data(task.data, where, f"data.tasks.{index}.data")


def task_folder(index: int, name: str) -> str:
    """Name of a task's folder within a run: its number and what of its name a file system takes."""
    return f"{index + 1:02d}-" + re.sub(r"[^\w.-]+", "-", name)[:60]


def task_configs(config: Config) -> dict[str, Config]:
    """Task name -> a configuration of that task alone, in their order; a run without tasks is one task without a name."""
    if config.data.tasks is None:
        return {"": config}
    found = {}
    for task in config.data.tasks:
        data = task.data.model_copy(update={"types": config.data.types, "filter": task.filter or task.data.filter})
        found[task.name] = config.model_copy(update={"data": data})
    return found


def keys() -> dict[str, str]:
    """Every key in dotted form -> what it is, in the order of the documentation."""
    found: dict[str, str] = {}
    for name, item in Config.model_fields.items():
        if name == "train":
            found.update({f"train.{key}": inner.description or "" for key, inner in TrainConfig.model_fields.items()})
        else:
            found[name] = item.description or ""
    return found


def _first_problem(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    name = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"{where}: unknown key {name!r}{_nearest_key(name)}"
    if first["type"] == "missing":
        return f"{where}: key {name!r} is missing; add it, for example {name}=..."
    message = first["msg"][0].lower() + first["msg"][1:]
    return f"{where}: {name}={first.get('input')!r} is not valid: {message}"


# What the same thing is called elsewhere.
_ELSEWHERE = {
    "r": "rank",
    "lora_r": "rank",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "target_modules": "targets",
    "base_model": "model",
    "model_name_or_path": "model",
    "dataset": "data",
    "datasets": "data.tasks",
    "output_dir": "output",
    "learning_rate": "train.lr",
    "num_train_epochs": "train.epochs",
    "max_steps": "train.steps",
    "per_device_train_batch_size": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulate",
    "gradient_checkpointing": "train.checkpointing",
    "max_seq_length": "train.max_length",
    "lr_scheduler_type": "train.schedule",
    "warmup_steps": "train.warmup",
}


def _nearest_key(name: str) -> str:
    import dataclasses

    from rankwise.recipe import Recipe

    known = ["train", *keys(), *(f"data.{key}" for key in DataConfig.model_fields)]
    last = name.rpartition(".")[2]
    if last in _ELSEWHERE:
        return f"; here it is called {_ELSEWHERE[last]!r}"
    # the right word under the wrong parent is the commonest slip
    misplaced = [key for key in known if key.rpartition(".")[2] == last]
    if misplaced:
        return f"; did you mean {misplaced[0]!r}?"
    if name in {item.name for item in dataclasses.fields(Recipe)}:
        return f"; this belongs to the method: write method.{name}"
    return nearest(name, known, 1) or nearest(last, known, 1) or f"; the keys are {', '.join(known)}"


def resolve(config: Config) -> Any:
    """The recipe of a configuration: the named function with its options, then rank, alpha, dropout, targets and seed.

    Raises:
        ConfigError: an unknown recipe or option. RecipeError: values that cannot be combined.
    """
    from rankwise.recipes import RECIPES, unknown

    options = dict(config.method)
    name = options.pop("name", "lora")
    if not isinstance(name, str) or name not in RECIPES:
        raise ConfigError(f"method={name!r} is unknown{unknown(str(name))}")
    given = {"rank": config.rank, "alpha": config.alpha, "dropout": config.dropout, "targets": config.targets}
    for key, value in given.items():
        if value is None:
            continue
        if key in options:
            raise ConfigError(f"{key}={value!r} and method.{key}={options[key]!r} say the same thing twice; remove one")
        options[key] = value
    options = _checked(RECIPES[name], name, options)
    recipe = RECIPES[name](**options, seed=config.seed)
    return _from_scratch(recipe, options) if config.train.from_scratch else recipe


def _from_scratch(recipe: Any, options: Mapping[str, Any]) -> Any:
    """The recipe for random weights: nothing of them is worth keeping."""
    import dataclasses

    if not recipe.schedule.rewrites_base:
        raise ConfigError(
            f"train.from_scratch=True with method {recipe.name!r} would leave random weights frozen; use method: galore, which trains them"
        )
    if "original" in options or "schedule" in options:
        return recipe
    return recipe.replace(schedule=dataclasses.replace(recipe.schedule, original="drop"))


def _checked(function: Any, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Options by the annotations of the recipe's function and of Recipe's fields; the axes and targets check themselves."""
    from typing import get_type_hints

    from pydantic import TypeAdapter

    from rankwise.recipe import AXES, Recipe

    own = {key: hint for key, hint in get_type_hints(function).items() if key not in ("fields", "return")}
    fields = {key: hint for key, hint in get_type_hints(Recipe).items() if key not in ("name", "seed", "lr", "lr_bracket")}
    checked: dict[str, Any] = {}
    for key, value in options.items():
        hint = own.get(key, fields.get(key))
        if hint is None:
            listed = _listed(own, fields)
            raise ConfigError(f"method {name!r} has no option {key!r}{nearest(key, [*own, *fields])} It takes {listed}")
        if key in AXES or key == "targets":
            checked[key] = value
            continue
        try:
            checked[key] = TypeAdapter(hint).validate_python(value)
        except ValidationError as error:
            message = error.errors()[0]["msg"]
            raise ConfigError(f"method.{key}={value!r} is not valid for {name!r}: {message[0].lower() + message[1:]}") from None
    return checked


def _listed(own: Iterable[str], fields: Iterable[str]) -> str:
    return f"{', '.join(own) or 'no options of its own'}; and of every recipe: {', '.join(fields)}"


def resolved(config: Config) -> Config:
    """The same run spelled out: paths absolute, the learning rate filled in. What is saved with a run and compared on resume."""
    recipe = resolve(config)

    def absolute(value: str | None) -> str | None:
        if value is None or not Path(value).expanduser().exists() or value in ("demo", "minilm"):
            return value
        return str(Path(value).expanduser().resolve())

    def rows(data: DataConfig) -> DataConfig:
        tasks = None if data.tasks is None else tuple(task.model_copy(update={"data": rows(task.data)}) for task in data.tasks)
        paths = {key: absolute(getattr(data, key)) for key in ("train", "eval", "general")}
        return data.model_copy(update=paths | {"tasks": tasks})

    data = rows(config.data)
    train = config.train.model_copy(update={"lr": recipe.lr if config.train.lr is None else config.train.lr})
    return config.model_copy(update={"model": absolute(config.model), "data": data, "train": train, "output": str(Path(config.output))})


def to_yaml(config: Config) -> str:
    """A configuration as YAML that `load_config` reads back."""
    import yaml

    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
