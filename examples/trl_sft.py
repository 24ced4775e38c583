"""Low-rank fine-tuning with TRL's SFT trainer, on the bundled base: python examples/trl_sft.py [STEPS]."""

import sys

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import rankwise as rw
from rankwise.demo import base_folder, data_file

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50
tokenizer = AutoTokenizer.from_pretrained(base_folder())
model = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32)
rows = Dataset.from_json(str(data_file("train.jsonl")))  # prompt and completion: TRL puts the loss on the completion

rw.adapt(model, rw.recipes.pissa(rank=8))
config = SFTConfig(
    "runs/trl-sft",
    max_steps=steps,
    max_length=128,
    per_device_train_batch_size=4,
    logging_steps=10,
    save_strategy="no",
    bf16=False,
    report_to=[],
)
trainer = SFTTrainer(model, config, train_dataset=rows, processing_class=tokenizer, optimizers=(rw.optimizer(model, lr=5e-4), None))
trainer.train()
print("saved to", rw.save(model, "runs/trl-sft"))
