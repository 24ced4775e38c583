"""Low-rank fine-tuning with transformers' Trainer, on the bundled base: python examples/hf_trainer.py [STEPS]."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling, Trainer, TrainingArguments

import rankwise as rw
from rankwise.demo import base_folder, data_file

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50
tokenizer = AutoTokenizer.from_pretrained(base_folder())
model = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32)
rows = [json.loads(line) for line in data_file("train.jsonl").open()]
texts = [f"{row['prompt']}\n{row['completion']}{tokenizer.eos_token}" for row in rows]

rw.adapt(model, rw.recipes.lora_plus(rank=8))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        "runs/hf-trainer", max_steps=steps, per_device_train_batch_size=4, logging_steps=10, save_strategy="no", report_to=[]
    ),
    train_dataset=[tokenizer(text, truncation=True, max_length=128) for text in texts],
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    optimizers=(rw.optimizer(model, lr=5e-4), None),  # the one line: groups by role, and the hooks of rules and schedules
)
trainer.train()
print("saved to", rw.save(model, "runs/hf-trainer"))
