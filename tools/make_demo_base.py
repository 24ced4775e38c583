"""Train the tiny base model that ships with rankwise (`src/rankwise/demo/base/`).

A byte-level BPE tokenizer and a Llama-architecture model of under four million parameters are trained from scratch on
Debian package descriptions, without the sections `games` and `science`: those stay unseen, so that fine-tuning on them
has something to teach. Every row is read in two forms that alternate between epochs: as plain text, and as a chat in
the wording of `prompt_text` in make_demo_data.py. The demo's own task asks for another form of the answer.

    python tools/make_demo_base.py --descriptions ../shared/data/debian-descriptions.jsonl.gz
    python tools/make_demo_base.py --descriptions ... --steps 20 --out build/smoke      # a smoke run

Training computes in bf16 with fp32 master weights (autocast) and saves a checkpoint now and then in --work; the same
command started again continues from it. The folder written at the end holds ordinary Hugging Face files.
"""

from __future__ import annotations

import argparse
import bisect
import copy
import ctypes
import json
import math
import os
import shutil
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from make_demo_data import UNSEEN_SECTIONS, Row, plain_text, prompt_text, read_rows
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = 4096
MAX_LENGTH = 512
PAD, END = "<|pad|>", "<|end|>"
ROLES = ("system", "user", "assistant")
SPECIAL = (PAD, END, *(f"<|{role}|>" for role in ROLES))  # the first entries of the vocabulary, in this order
PAD_ID, END_ID = SPECIAL.index(PAD), SPECIAL.index(END)
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['role'] not in ['system', 'user', 'assistant'] -%}
        {{- raise_exception('unknown role ' + message['role'] + ': use system, user or assistant') -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' + message['content'] -}}
    {%- if message['role'] == 'assistant' -%}
        {{- eos_token -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


# --- text and tokens ---------------------------------------------------------------------------------------------


def split_rows(rows: list[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Training rows, test rows of the seen sections, test rows of the unseen sections.

    Training rows whose long description also stands in a test row or in an unseen section are dropped: the splits are
    by source package, but a few packages share their text word for word.
    """
    seen = [row for row in rows if row["section"] not in UNSEEN_SECTIONS]
    unseen = [row for row in rows if row["section"] in UNSEEN_SECTIONS]
    withheld = {row["long"] for row in unseen} | {row["long"] for row in seen if row["split"] == "test"}
    train = [row for row in seen if row["split"] == "train" and row["long"] not in withheld]
    return train, [r for r in seen if r["split"] == "test"], [r for r in unseen if r["split"] == "test"]


def train_tokenizer(rows: list[Row]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any text round-trips exactly, no unknown token, no prefix space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for row in rows for text in (prompt_text(row), plain_text(row))), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        extra_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[np.ndarray]:
    return [np.asarray(ids, dtype=np.int64) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]


def render_chats(tokenizer: PreTrainedTokenizerFast, rows: list[Row]) -> list[str]:
    chats = [[{"role": "user", "content": prompt_text(row)}, {"role": "assistant", "content": row["long"]}] for row in rows]
    return [str(text) for text in tokenizer.apply_chat_template(chats, tokenize=False)]


def pack(documents: list[np.ndarray], length: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Whole documents packed into rows of `length` tokens (best fit, longest first); only longer ones are cut."""
    pieces = [doc[start : start + length] for doc in documents for start in range(0, len(doc), length)]
    room: list[tuple[int, int]] = []  # (free tokens, index into bins), sorted
    bins: list[list[np.ndarray]] = []
    for piece in sorted(pieces, key=len, reverse=True):
        at = bisect.bisect_left(room, (len(piece), -1))
        if at == len(room):
            bins.append([piece])
            free, index = length - len(piece), len(bins) - 1
        else:
            free, index = room.pop(at)
            bins[index].append(piece)
            free -= len(piece)
        bisect.insort(room, (free, index))
    packed = []
    for content in bins:
        row = np.full(length, PAD_ID, dtype=np.int16)  # the vocabulary fits
        filled = np.concatenate([content[i] for i in rng.permutation(len(content))])
        row[: len(filled)] = filled
        packed.append(row)
    return [packed[i] for i in rng.permutation(len(packed))]


def make_batches(plain: list[np.ndarray], chats: list[np.ndarray], args: argparse.Namespace) -> list[np.ndarray]:
    """Every batch of the run, in order: (batch, 256) at first, (batch / 2, 512) for the last --long-share of it.

    Each epoch reads every row once, half of the rows as plain text and half as chats, and the next epoch the other way
    round. The number of batches is --steps, or what --epochs epochs need.
    """
    rng = np.random.default_rng(args.seed)
    form = rng.integers(0, 2, len(plain))
    tokens = args.batch * args.length
    batches: list[np.ndarray] = []
    total = args.steps
    if total is None:
        total = round(args.epochs * sum(len(doc) for doc in (*plain, *chats)) / 2 / (tokens * 0.98))  # 2% for padding
    long_from = round(total * (1 - args.long_share))
    for length, until in ((args.length, long_from), (MAX_LENGTH, total)):
        count = tokens // length
        while len(batches) < until:
            form = 1 - form
            documents = [chat if chosen else text for text, chat, chosen in zip(plain, chats, form, strict=True)]
            documents = [documents[i] for i in rng.permutation(len(documents))]
            groups = [documents[at : at + 2000] for at in range(0, len(documents), 2000)]
            rows = [row for group in groups for row in pack(group, length, rng)]
            batches += [np.stack(rows[at : at + count]) for at in range(0, len(rows) - count + 1, count)]
        del batches[until:]
    return batches


# --- training ----------------------------------------------------------------------------------------------------


def make_model(vocabulary: int, args: argparse.Namespace) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=args.hidden,
        intermediate_size=args.ff,
        num_hidden_layers=args.layers,
        num_attention_heads=args.hidden // args.head,
        num_key_value_heads=args.hidden // args.head,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
    )
    torch.manual_seed(args.seed)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID, do_sample=False, repetition_penalty=1.3)
    return model


def make_optimizer(model: LlamaForCausalLM, args: argparse.Namespace) -> torch.optim.AdamW:
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": args.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.95), fused=True)


def rate(step: int, total: int, args: argparse.Namespace) -> float:
    """Linear warm-up, then a cosine down to 2% of the peak."""
    warm = min(args.warmup, max(1, total // 10))
    if step < warm:
        return args.lr * (step + 1) / warm
    return args.lr * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - warm))))


@torch.no_grad()
def score(model: LlamaForCausalLM, documents: list[np.ndarray], first: list[int]) -> tuple[float, int]:
    """Summed negative log-likelihood (nats) and number of the tokens from `first` on; those before are context."""
    order = sorted(range(len(documents)), key=lambda i: len(documents[i]))
    nll, tokens = 0.0, 0
    for at in range(0, len(order), 16):
        chosen = order[at : at + 16]
        width = max(len(documents[i]) for i in chosen)
        ids = torch.full((len(chosen), width), PAD_ID)
        labels = torch.full((len(chosen), width), -100)
        for k, i in enumerate(chosen):
            row = torch.from_numpy(documents[i])
            ids[k, : len(row)] = row
            labels[k, first[i] : len(row)] = row[first[i] :]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=next(model.parameters()).dtype == torch.float32):
            logits = model(input_ids=ids).logits
        targets = labels[:, 1:].flatten()
        nll += F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), targets, ignore_index=-100, reduction="sum").item()
        tokens += int((targets != -100).sum())
    return nll, tokens


def train(
    model: LlamaForCausalLM, batches: list[np.ndarray], held_out: list[np.ndarray], args: argparse.Namespace
) -> tuple[list[dict[str, float]], float]:
    """Train in place; returns the log and the seconds spent, both carried over a resume.

    A run may be continued with another --epochs: the learning rate then follows the schedule of the new length.
    """
    optimizer = make_optimizer(model, args)
    checkpoint = args.work / "checkpoint.pt"
    shape = {key: getattr(args, key) for key in ("hidden", "layers", "ff", "head", "batch", "length", "lr", "seed")}
    log: list[dict[str, float]] = []
    start, spent = 0, 0.0
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["shape"] != shape:
            raise SystemExit(f"{checkpoint} is of another run, {saved['shape']}: remove it or choose another --work")
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start, spent, log = saved["step"], saved["seconds"], saved["log"]
        print(f"resumed at step {start}", flush=True)
    began = time.monotonic() - spent
    total, losses, tokens = len(batches), [], 0
    window = time.monotonic()
    for step in range(start, total):
        ids = torch.from_numpy(batches[step].astype(np.int64))
        labels = ids.masked_fill(ids == PAD_ID, -100)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, total, args)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
        tokens += ids.numel()
        done = step + 1
        if done % args.log_every == 0 or done == total:
            now = float(f"{rate(step, total, args):.3g}")
            entry = {"step": done, "loss": round(sum(losses) / len(losses), 4), "lr": now}
            speed = tokens / (time.monotonic() - window)
            if done % args.eval_every == 0 or done == total:
                model.eval()
                nll, count = score(model, held_out, [1] * len(held_out))
                entry["held_out_loss"] = round(nll / count, 4)
                model.train()
            log.append(entry)
            print(f"{entry} {speed:.0f} tokens/s {(time.monotonic() - began) / 60:.1f} min", flush=True)
            losses, tokens, window = [], 0, time.monotonic()
        if done % args.eval_every == 0 or done == total:
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "shape": shape}
            args.work.mkdir(parents=True, exist_ok=True)
            partial = checkpoint.with_suffix(".partial")
            torch.save(state | {"step": done, "seconds": time.monotonic() - began, "log": log}, partial)
            os.replace(partial, checkpoint)
    return log, time.monotonic() - began


# --- what is written ---------------------------------------------------------------------------------------------

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The demo base model of rankwise

A Llama-architecture language model with {parameters:,} parameters, trained from scratch so that rankwise can be tried
offline on a CPU. It writes text that looks like Debian package descriptions; it knows nothing else, and what it says
about a package is invented. It is for demonstrations and tests only.

- architecture: `LlamaForCausalLM`, {args.layers} layers, hidden {args.hidden}, feed-forward {args.ff}, {heads} heads
- parameters: {parameters:,}, embeddings tied, stored in bf16
- tokenizer: byte-level BPE, {vocabulary} entries; `{pad}` pads, `{end}` ends a document and an assistant's turn
- longest input: {max_length} tokens

## Data

The English descriptions of Debian packages from the package index of Debian bookworm main ({rows:,} rows of the
training split). They originate from the Debian project and its package maintainers, and each description is under the
licence of its package. The sections {unseen} were left out, tokenizer included, and so was every row whose
description also stands, word for word, in the test split or in one of those sections.

Every row was read in two forms, in turn: as plain text (short line, full stop, long description, `{end}`), and as a
chat:

    {chat}

The weights are under the Apache License 2.0; for the data see above.

## Training

{steps:,} steps of {tokens:,} tokens ({seen_tokens:.1f} million tokens, about {epochs:.1f} epochs) in sequences of
{args.length} tokens, the last {args.long_share:.0%} of the steps in sequences of {max_length}. AdamW (betas 0.9 and
0.95, weight decay {args.weight_decay}), peak learning rate {args.lr}, {args.warmup} steps of warm-up, then a cosine;
gradients clipped at 1.0; bf16 computation with fp32 master weights; seed {args.seed}. It took {minutes:.0f} minutes on
{args.threads} CPU cores.

The training loss went from {first[loss]:.2f} (mean of the first {first[step]} steps) to {last[loss]:.2f}, the held-out
loss to {last[held_out_loss]:.2f}. All of it is in `training_log.jsonl`, where `held_out_loss` is the loss on {held_out}
plain texts of the test split. Made by `tools/make_demo_base.py`.

## Held-out results

On the test split, with the final bf16 weights. "Plain text" scores the whole text after one `{end}`; "completion"
scores the assistant's message given the user's. The final `{end}` is scored too; texts are cut at {max_length} tokens.

| test set | form | texts | perplexity per token | bits per byte |
|---|---|---|---|---|
{results}
"""


def evaluate(tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM, sets: dict[str, list[Row]]) -> list[str]:
    """The lines of the card's table of results."""
    lines = []
    for name, rows in sets.items():
        plain = encode(tokenizer, [END + plain_text(row) + END for row in rows])
        chats = encode(tokenizer, render_chats(tokenizer, rows))
        answers = encode(tokenizer, [row["long"] + END for row in rows])
        starts = [len(chat) - len(answer) for chat, answer in zip(chats, answers, strict=True)]
        for form, documents, first in (("plain text", plain, [1] * len(plain)), ("completion", chats, starts)):
            documents = [ids[:MAX_LENGTH] for ids in documents]
            nll, tokens = score(model, documents, first)
            scored = [tokenizer.decode(ids[at:], skip_special_tokens=True) for ids, at in zip(documents, first, strict=True)]
            bits = nll / math.log(2) / len("".join(str(text) for text in scored).encode())
            lines.append(f"| {name} | {form} | {len(rows):,} | {math.exp(nll / tokens):.2f} | {bits:.3f} |")
            print(lines[-1], flush=True)
    return lines


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model in bf16 and the tokenizer, such that transformers 4 reads the tokenizer too."""
    copy.deepcopy(model).bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("backend", None)
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = config.pop("extra_special_tokens")
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    for file in folder.iterdir():
        file.chmod(0o644)  # safetensors creates its file for the owner alone


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parent.parent
    add = parser.add_argument
    add("--descriptions", type=Path, required=True, help="debian-descriptions.jsonl.gz")
    add("--out", type=Path, default=root / "src/rankwise/demo/base", help="the model folder to write")
    add("--work", type=Path, default=root / "build/demo_base", help="where the checkpoint is kept")
    add("--steps", type=int, help="number of steps, instead of --epochs")
    add("--epochs", type=float, default=5.0)
    add("--hidden", type=int, default=192)
    add("--layers", type=int, default=6)
    add("--ff", type=int, default=512)
    add("--head", type=int, default=32, help="size of one attention head")
    add("--batch", type=int, default=16, help="sequences in a batch while they have --length tokens")
    add("--length", type=int, default=256)
    add("--long-share", type=float, default=0.15, help=f"share of the steps, the last, on {MAX_LENGTH}-token sequences")
    add("--lr", type=float, default=3e-3)
    add("--warmup", type=int, default=150)
    add("--weight-decay", type=float, default=0.1)
    add("--seed", type=int, default=0)
    add("--threads", type=int, default=2)
    add("--log-every", type=int, default=50)
    add("--eval-every", type=int, default=250, help="held-out loss and checkpoint; a multiple of --log-every")
    return parser.parse_args()


def keep_freed_memory() -> None:
    """Tell glibc to reuse big blocks instead of returning them: logits are allocated and freed at every step."""
    try:
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block of its own mapping
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
    except (OSError, AttributeError):  # another C library: slower, not wrong
        pass


def main() -> None:
    args = parse_arguments()
    keep_freed_memory()
    torch.set_num_threads(args.threads)
    train_rows, test_seen, test_unseen = split_rows(read_rows(args.descriptions))
    tokenizer = train_tokenizer(train_rows)
    plain = encode(tokenizer, [plain_text(row) + END for row in train_rows])
    chats = encode(tokenizer, render_chats(tokenizer, train_rows))
    batches = make_batches(plain, chats, args)
    epoch_tokens = sum(len(doc) for doc in (*plain, *chats)) / 2
    model = make_model(len(tokenizer), args)
    parameters = sum(p.numel() for p in model.parameters())
    filled = sum(int((batch != PAD_ID).sum()) for batch in batches)
    print(
        f"{len(train_rows)} rows, {epoch_tokens / 1e6:.2f}M tokens an epoch; {parameters:,} parameters; "
        f"{len(batches)} steps, {filled / sum(batch.size for batch in batches):.1%} of the positions filled",
        flush=True,
    )
    picked = np.random.default_rng(args.seed).permutation(len(test_seen))[:256]
    held_out = encode(tokenizer, [END + plain_text(test_seen[i]) + END for i in picked])
    log, seconds = train(model, batches, held_out, args)

    partial = args.out.with_name(args.out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    save(model, tokenizer, partial)
    model = LlamaForCausalLM.from_pretrained(partial, dtype=torch.bfloat16).eval()  # measure what ships
    tokenizer = AutoTokenizer.from_pretrained(partial)
    unseen = " and ".join(f"`{section}`" for section in UNSEEN_SECTIONS)
    results = evaluate(tokenizer, model, {"seen sections": test_seen, unseen: test_unseen})
    card = CARD.format(
        **{"args": args, "pad": PAD, "end": END, "max_length": MAX_LENGTH, "unseen": unseen, "parameters": parameters},
        **{"heads": args.hidden // args.head, "vocabulary": len(tokenizer), "rows": len(train_rows)},
        **{"steps": len(batches), "tokens": batches[0].size, "seen_tokens": filled / 1e6, "minutes": seconds / 60},
        **{"epochs": filled / epoch_tokens, "first": log[0], "last": log[-1], "held_out": len(held_out)},
        results="\n".join(results),
        chat=f"<|user|>{prompt_text({'package': 'NAME', 'section': 'SECTION', 'short': 'SHORT LINE'})}<|assistant|>LONG DESCRIPTION{END}",
    )
    (partial / "README.md").write_text(card, encoding="utf-8")
    lines = "".join(json.dumps(entry) + "\n" for entry in log)
    (partial / "training_log.jsonl").write_text(lines, encoding="utf-8")
    shutil.rmtree(args.out, ignore_errors=True)
    os.replace(partial, args.out)
    print(
        f"wrote {args.out}: {sum(file.stat().st_size for file in args.out.iterdir()) / 1e6:.2f} MB in "
        f"{seconds / 60:.1f} minutes of training"
    )


if __name__ == "__main__":
    main()
