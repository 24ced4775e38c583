"""Low-rank fine-tuning in a plain torch loop, on the bundled base: python examples/plain_loop.py [STEPS]."""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import rankwise as rw
from rankwise.demo import base_folder, data_file

steps = int(sys.argv[1]) if len(sys.argv) > 1 else 50
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(base_folder())
model = AutoModelForCausalLM.from_pretrained(base_folder(), dtype=torch.float32)
rows = [json.loads(line) for line in data_file("train.jsonl").open()]
texts = [f"{row['prompt']}\n{row['completion']}{tokenizer.eos_token}" for row in rows]

recipe = rw.recipes.dora(rank=8)
print(rw.plan(model, recipe))
rw.adapt(model, recipe)
optimizer = rw.optimizer(model, lr=2e-3)
model.train()
for step in range(steps):
    batch = tokenizer(texts[4 * step % len(texts) :][:4], return_tensors="pt", padding=True, truncation=True, max_length=128)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss = model(**batch, labels=labels).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if step % 10 == 0 or step == steps - 1:
        print(f"step {step + 1}: loss {loss.item():.3f}")
print("saved to", rw.save(model, "runs/plain-loop"))
