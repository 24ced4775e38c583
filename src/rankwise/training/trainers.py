"""The glue to transformers' Trainer, shared by both trainers: what is saved, what is loaded, what is watched, what is written down.

Trainer brings the loop, accumulation, mixed precision, checkpointing and data order. From here come the optimizer with rankwise's hooks,
checkpoints that hold only what trains and appear in one rename, the guard against losses that are no numbers, and the metrics.
"""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

import rankwise as rw
from rankwise.checkpoint import load_trainable_state, trainable_state
from rankwise.checkpoint.atomic import write_folder
from rankwise.context import takes_context
from rankwise.errors import TrainingError
from rankwise.optim import Session
from rankwise.sites import AdaptedLinear, TrainedModule
from rankwise.training.config import Config
from rankwise.training.folder import TRAINER_STATE, RunFolder
from rankwise.training.metrics import Recorder

TRAINABLE = "trainable.safetensors"
SESSION = "session.json"
SESSION_TENSORS = "session.safetensors"


def arguments(config: Config, steps: int, run: RunFolder, device: torch.device, dtype: torch.dtype, evaluate: bool) -> dict[str, Any]:
    """Keyword arguments of TrainingArguments that say exactly what the configuration says, and switch everything else off."""
    train = config.train
    every = train.eval_every if evaluate else None
    return {
        "output_dir": str(run.checkpoints),
        "max_steps": steps,
        "per_device_train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.accumulate,
        "learning_rate": train.lr,
        "lr_scheduler_type": train.schedule if train.schedule != "constant" or not train.warmup else "constant_with_warmup",
        "warmup_steps": train.warmup,
        "max_grad_norm": 1.0,
        "weight_decay": train.weight_decay,
        "bf16": dtype is torch.bfloat16,
        "fp16": False,
        "gradient_checkpointing": train.checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,  # a loss that is no number stops the run instead of being averaged away
        "save_strategy": "steps",
        "save_steps": train.save_every,
        "eval_strategy": "steps" if every else "no",
        "eval_steps": every,
        "seed": config.seed,
        "data_seed": config.seed,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
        "remove_unused_columns": False,
        "report_to": [],
        "disable_tqdm": True,
    }


class StopOnSignal(TrainerCallback):
    """Finishes the step, saves and stops once `asked` is set: what the first Ctrl-C does."""

    def __init__(self) -> None:
        self.asked = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        if self.asked:
            control.should_save = control.should_training_stop = True
        return control


class RankwiseTrainer(Trainer):
    """Trainer over an adapted model, and the one for classification. `follow` must be called before `train`.

    State of its own: the run's folder, the recorder of metrics, the score used for evaluation, and the tokens of the step at hand.
    """

    run: RunFolder
    recorder: Recorder
    score: Callable[[], dict[str, float]]
    session: Session
    step_tokens: int = 0

    def follow(self, run: RunFolder, recorder: Recorder, score: Callable[[], dict[str, float]]) -> StopOnSignal:
        """Ties the trainer to a run; returns the callback that a signal handler sets."""
        self.run, self.recorder, self.score = run, recorder, score
        self.session = cast(Any, self.optimizer).rankwise_session
        self.remove_callback(PrinterCallback)
        stop = StopOnSignal()
        self.add_callback(stop)
        return stop

    # --- one step ----------------------------------------------------------------------------------------------------------------------

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        self.step_tokens += int(inputs["attention_mask"].sum())
        if not takes_context(cast(nn.Module, self.accelerator.unwrap_model(model))):
            inputs.pop("sample_types", None)  # a column of the data that this method has no use for
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not math.isfinite(float(loss)):
            raise self._diverged(f"the loss is {float(loss)}")
        return loss

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        norm = super()._clip_grad_norm(model)
        if norm is not None and not math.isfinite(float(norm)):
            raise self._diverged(f"the norm of the gradient is {float(norm)}")  # before the step: no parameter has seen it
        return norm

    def _diverged(self, what: str) -> TrainingError:
        kept = self.run.checkpoint()
        where = f"the last good checkpoint is {kept[0]}" if kept else "no checkpoint had been written yet"
        rate = self.args.learning_rate
        return TrainingError(
            f"{what} at step {self.state.global_step + 1}; {where}. Lower train.lr (now {rate:g}), add train.warmup, or look for broken "
            "rows; then train into another output"
        )

    # --- metrics -----------------------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        super().log(logs, start_time)
        if "loss" in logs:
            self.recorder.step(self.state.global_step, self.state.epoch, logs, self.step_tokens, self.session.report())
            self.step_tokens = 0

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict[str, float]:
        scores = self.score()
        self.recorder.evaluation(self.state.global_step, scores)
        metrics = {f"{metric_key_prefix}_{key}": value for key, value in scores.items()}
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # --- checkpoints -------------------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        step = self.state.global_step
        try:
            with write_folder(self.run.checkpoints / f"checkpoint-{step}") as folder:
                self._save(str(folder))
                self._save_optimizer_and_scheduler(str(folder))
                self._save_rng_state(str(folder))
                self.state.save_to_json(str(folder / TRAINER_STATE))
        except TrainingError:
            raise
        except Exception as error:  # torch, safetensors and the file system each raise their own kind when the disk is full
            kept = self.run.checkpoint()
            where = f"{kept[0]} is intact" if kept else "there is no earlier one"
            raise TrainingError(
                f"the checkpoint of step {step} could not be written: {error}; {where}. Free some space and give the same command again: "
                "the run goes on from the last checkpoint"
            ) from error
        self.run.drop_old_checkpoints()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        model = cast(nn.Module, self.accelerator.unwrap_model(self.model))
        state = {key: value.detach().contiguous().cpu() for key, value in trainable_state(model).items()}
        for key, value in state.items():
            if not bool(torch.isfinite(value).all()):
                raise self._diverged(f"{key} holds numbers that are not finite")
        rw.save(model, folder / "adapter")
        save_file(state, folder / TRAINABLE)
        (folder / SESSION).write_text(json.dumps(self.session.state()), encoding="utf-8")
        save_file({key: value.detach().contiguous().cpu() for key, value in self.session.tensors().items()}, folder / SESSION_TENSORS)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        folder = Path(resume_from_checkpoint)
        self.session.restore(json.loads((folder / SESSION).read_text(encoding="utf-8")))  # first: the shapes follow the ranks
        load_trainable_state(cast(nn.Module, model or self.model), load_file(folder / TRAINABLE))
        self.session.restore_tensors(load_file(folder / SESSION_TENSORS))


def classification_trainer(
    model: nn.Module, rows: Any, collator: Any, optimizer: torch.optim.Optimizer, arguments: dict[str, Any]
) -> RankwiseTrainer:
    """A trainer over rows of token ids and one class number each."""
    options = transformers.TrainingArguments(**arguments)
    options._n_gpu = min(options.n_gpu, 1)  # several visible GPUs must not turn into DataParallel
    trainer = RankwiseTrainer(
        model=model,
        args=options,
        data_collator=collator,
        train_dataset=rows,
        eval_dataset=rows if options.eval_strategy != "no" else None,  # only asked for; `evaluate` is ours
        optimizers=(optimizer, None),
    )
    # Trainer takes any forward with **kwargs for one that divides by the rows of all accumulated batches. Classifiers take the mean of
    # each batch, so without this an accumulated gradient would be too large by the number of batches.
    trainer.model_accepts_loss_kwargs = False
    return trainer


def plain_forward(model: Any) -> None:
    """Takes off the forwards that TRL and accelerate have put on the model object."""
    for name in ("forward", "_original_forward"):
        model.__dict__.pop(name, None)


def head_is_adapted(model: Any) -> bool:
    """Whether the output head has an adapter or trains: then its weight alone does not give the logits."""
    head = model.get_output_embeddings()
    return isinstance(head, AdaptedLinear | TrainedModule)
