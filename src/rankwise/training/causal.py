"""Causal language models through TRL's SFT trainer, fed with token ids and labels that were made here."""

from typing import Any

import torch
from transformers import Trainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from rankwise.training.trainers import RankwiseTrainer, head_is_adapted


class CausalTrainer(RankwiseTrainer, SFTTrainer):
    """SFTTrainer whose dataset is left as it is: no second tokenization, no masking, no template."""

    def __init__(self, **options: Any) -> None:
        SFTTrainer.__init__(self, **options)

    def compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None) -> Any:
        # TRL multiplies by the head's weight itself, past any adapter on the head; then the model's own logits must be used
        if head_is_adapted(self.accelerator.unwrap_model(model)):
            inputs = {**inputs, "use_cache": False}
            return Trainer.compute_loss(self, model, inputs, return_outputs, num_items_in_batch)
        return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)


def causal_trainer(
    model: Any, tokenizer: Any, dataset: Any, collator: Any, optimizer: torch.optim.Optimizer, arguments: dict[str, Any]
) -> CausalTrainer:
    """A trainer over a `datasets.Dataset` of token ids and labels."""
    options = SFTConfig(
        **arguments,
        max_length=None,
        packing=False,
        completion_only_loss=False,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    options._n_gpu = min(options.n_gpu, 1)  # several visible GPUs must not turn into DataParallel
    return CausalTrainer(
        model=model,
        args=options,
        data_collator=collator,
        train_dataset=dataset,
        eval_dataset=dataset.select(range(1)) if options.eval_strategy != "no" else None,  # only asked for; `evaluate` is ours
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
