"""Chat templates in the styles that models are shipped with, written for the tests, and tiny tokenizers to go with them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

LINES = [
    "The quick brown fox jumps over the lazy dog.",
    "A package that reads mail from a server and shows it on the screen.\n\nIt is small.",
    "What is 12 plus 30? It's 42, naïve as it sounds / über 1000 words.",
    "user assistant system model [INST] [/INST] start end of turn",
]

CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

DEFAULT_SYSTEM = (
    """\
{%- if messages[0]['role'] != 'system' -%}{{- '<|im_start|>system\\nBe of help.<|im_end|>\\n' -}}{%- endif -%}
"""
    + CHATML
)

LLAMA3 = """\
{{- bos_token -}}
{%- for message in messages -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}"""

LLAMA2 = """\
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\\n' + messages[0]['content'] | trim + '\\n<</SYS>>\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- for message in turns -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('roles must alternate') -}}{%- endif -%}
{%- if message['role'] == 'user' -%}
{{- bos_token + '[INST] ' + (system if loop.first else '') + message['content'] | trim + ' [/INST]' -}}
{%- else -%}{{- ' ' + message['content'] | trim + ' ' + eos_token -}}{%- endif -%}
{%- endfor -%}"""

GEMMA = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}
{{- '<start_of_turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\\n' -}}
{{- message['content'] | trim + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}"""

# the system prompt stands in the last question, so an earlier turn is rewritten by a later one
MISTRAL = """\
{%- if messages[0]['role'] == 'system' -%}{%- set system = messages[0]['content'] | trim + '\\n\\n' -%}{%- set turns = messages[1:] -%}
{%- else -%}{%- set system = '' -%}{%- set turns = messages -%}{%- endif -%}
{%- set last = namespace(user=-1) -%}
{%- for message in turns -%}{%- if message['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{{- bos_token -}}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{- '[INST] ' + (system if loop.index0 == last.user else '') + message['content'] + '[/INST]' -}}
{%- else -%}{{- ' ' + message['content'] | trim + eos_token -}}{%- endif -%}
{%- endfor -%}"""

# thinking is kept behind the last question only
THINKING = """\
{%- set last = namespace(user=-1) -%}
{%- for message in messages -%}{%- if message['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if message['role'] == 'assistant' and loop.index0 < last.user and '</think>' in content -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}
{{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""

# two ends: of the turn, and of the text behind the last one
TWO_ENDS = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"""

# the style of the bundled base
BARE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' + message['content'] -}}
{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""


@dataclass(frozen=True)
class Style:
    """One template: its special tokens, and what the model has to write for an assistant's content."""

    template: str
    special: tuple[str, ...]
    eos: str
    answer: Callable[[str], str]
    bos: str | None = None
    system: bool = True
    sentencepiece: bool = False


IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
STYLES = {
    "chatml": Style(CHATML, IM, "<|im_end|>", lambda text: f"{text}<|im_end|>"),
    "default-system": Style(DEFAULT_SYSTEM, IM, "<|im_end|>", lambda text: f"{text}<|im_end|>"),
    "llama3": Style(
        LLAMA3,
        ("<|begin|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        "<|end_of_text|>",
        lambda text: f"{text.strip()}<|eot_id|>",
        bos="<|begin|>",
    ),
    "llama2": Style(LLAMA2, ("<s>", "</s>"), "</s>", lambda text: f" {text.strip()} </s>", bos="<s>"),
    "gemma": Style(
        GEMMA,
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        "<eos>",
        lambda text: f"{text.strip()}<end_of_turn>",
        bos="<bos>",
        system=False,
    ),
    "mistral": Style(MISTRAL, ("<s>", "</s>"), "</s>", lambda text: f" {text.strip()}</s>", bos="<s>"),
    "thinking": Style(THINKING, IM, "<|im_end|>", lambda text: f"{text}<|im_end|>"),
    "two-ends": Style(
        TWO_ENDS, ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|endoftext|>", lambda text: f"{text}<|end|>"
    ),
    "bare": Style(BARE, ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"), "<|end|>", lambda text: f"{text}<|end|>"),
}


@cache
def byte_tokenizer(
    special: tuple[str, ...], eos: str | None, bos: str | None = None, template: str | None = None
) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens: what GPT-2, Llama 3 and Qwen use, in small."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES * 3, trainers.BpeTrainer(vocab_size=400, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, chat_template=template)


@cache
def sentencepiece_tokenizer(special: tuple[str, ...], eos: str, bos: str, template: str | None = None) -> PreTrainedTokenizerFast:
    """BPE over '▁' with a blank put before the text, as Llama 2 and Mistral have it, in small."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # as there, a token has a blank at its beginning only
    characters = sorted(set("".join(LINES)) | set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n§"))
    tokenizer.train_from_iterator(
        LINES * 3,
        trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>", *special], initial_alphabet=characters, show_progress=False),
    )
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, bos_token=bos, unk_token="<unk>", chat_template=template)


def tokenizer_of(name: str) -> PreTrainedTokenizerFast:
    style = STYLES[name]
    return byte_tokenizer(style.special, style.eos, style.bos, style.template)
