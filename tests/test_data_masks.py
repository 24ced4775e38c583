"""The loss is on the assistant's tokens and their end token, and on nothing else, whatever the chat template does."""

import copy

import pytest
from chat_templates import CHATML, IM, STYLES, THINKING, byte_tokenizer, sentencepiece_tokenizer, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from rankwise.errors import DataError
from rankwise.training.encoded import IGNORED, Encoded, check_encoded
from rankwise.training.preview import runs
from rankwise.training.rows import Rows
from rankwise.training.shapes import recognise
from rankwise.training.tokenize import encode_rows


def encoded(rows, tokenizer, max_length=None, loss_on="completion", **options) -> Encoded:
    made = Rows(rows, "data.jsonl", list(range(1, len(rows) + 1)))
    return encode_rows(made, recognise(made, "causal-lm"), tokenizer, max_length, loss_on, **options)


def conversation(*turns: tuple[str, str]):
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def supervised(made: Encoded, tokenizer) -> list[str]:
    found = []
    for ids, labels in zip(made.input_ids, made.labels, strict=True):
        assert all(label in (IGNORED, token) for token, label in zip(ids, labels, strict=True))
        found += [text for text, loss in runs(ids, labels, tokenizer) if loss]
    return found


TEXT = st.text(alphabet="abz A.,'\n\t 019é漢🙂?!", min_size=1, max_size=24)
ANSWER = TEXT.filter(str.strip)


@st.composite
def conversations(draw, system: bool):
    turns = [("system", draw(TEXT))] if system and draw(st.booleans()) else []
    for _ in range(draw(st.integers(1, 3))):
        turns += [("user", "§" + draw(TEXT)), ("assistant", draw(ANSWER))]
    if draw(st.booleans()) and draw(st.booleans()):
        turns.append(("user", "§" + draw(TEXT)))
    return conversation(*turns)


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_supervised_text_is_the_answers(name, data):
    """Decoded, the supervised runs are the assistant's contents as the template writes them, each with its end token, each once."""
    style, tokenizer = STYLES[name], tokenizer_of(name)
    row = data.draw(conversations(style.system))
    made = encoded([row], tokenizer)
    answers = [turn["content"] for turn in row["messages"] if turn["role"] == "assistant"]
    assert supervised(made, tokenizer) == [style.answer(text) for text in answers]
    assert "§" not in "".join(supervised(made, tokenizer))
    assert made.report.no_end == made.report.empty == made.report.cut == 0
    assert made.report.rows == 1
    assert made.report.supervised == sum(label != IGNORED for labels in made.labels for label in labels)
    check_encoded(made)


@pytest.mark.parametrize("name", STYLES)
@settings(max_examples=20, deadline=None)
@given(data=st.data())
def test_prompt_ids_are_those_of_generation(name, data):
    """Up to the first answer of every sequence, the ids are what the tokenizer gives for the prompt alone: what a server will send."""
    style, tokenizer = STYLES[name], tokenizer_of(name)
    row = data.draw(conversations(style.system))
    made = encoded([row], tokenizer)
    answered = [index for index, turn in enumerate(row["messages"]) if turn["role"] == "assistant"]
    turn = 0
    for ids, labels in zip(made.input_ids, made.labels, strict=True):
        first = next(at for at, label in enumerate(labels) if label != IGNORED)
        asked = tokenizer.apply_chat_template(row["messages"][: answered[turn]], tokenize=False, add_generation_prompt=True)
        assert ids[:first] == tokenizer(asked, add_special_tokens=False)["input_ids"]
        turn += len([text for text, loss in runs(ids, labels, tokenizer) if loss])
    assert turn == len(answered)
    # 'two-ends' ends the text behind the last answer only; 'mistral' moves the system prompt to a question that nobody answers
    if len(made) == 1 and name != "two-ends" and row["messages"][-1]["role"] == "assistant":
        assert tokenizer.decode(made.input_ids[0]) == tokenizer.apply_chat_template(row["messages"], tokenize=False)


def test_thinking_is_learnt_where_it_is_written():
    tokenizer = tokenizer_of("thinking")
    row = conversation(
        ("user", "one"), ("assistant", "<think>\nhm\n</think>\n\nA"), ("user", "two"), ("assistant", "<think>\noh\n</think>\n\nB")
    )
    made = encoded([row], tokenizer)
    assert made.lines == [1, 1]
    texts = [tokenizer.decode(ids) for ids in made.input_ids]
    assert texts[0] == "<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n<think>\nhm\n</think>\n\nA<|im_end|>"
    assert "hm" not in texts[1]  # the template dropped it, and so will the server
    assert supervised(made, tokenizer) == ["<think>\nhm\n</think>\n\nA<|im_end|>", "<think>\noh\n</think>\n\nB<|im_end|>"]
    assert any("rewrites earlier turns: 1 rows" in note for note in made.report.notes)
    assert (made.report.rows, made.report.sequences) == (1, 2)


def test_loss_on():
    tokenizer = tokenizer_of("chatml")
    row = conversation(("user", "a"), ("assistant", "B"), ("user", "c"), ("assistant", "D"))
    split = {"prompt": row["messages"][:3], "completion": row["messages"][3:]}
    both, last = ["B<|im_end|>", "D<|im_end|>"], ["D<|im_end|>"]
    assert supervised(encoded([row], tokenizer, loss_on="completion"), tokenizer) == both
    assert supervised(encoded([row], tokenizer, loss_on="assistant"), tokenizer) == both
    assert supervised(encoded([row], tokenizer, loss_on="last"), tokenizer) == last
    assert supervised(encoded([split], tokenizer, loss_on="completion"), tokenizer) == last
    assert supervised(encoded([split], tokenizer, loss_on="assistant"), tokenizer) == both
    for name in STYLES:
        every = encoded([row], tokenizer_of(name), loss_on="all")
        assert every.labels == every.input_ids
        check_encoded(every)
    with pytest.raises(DataError, match="'al'; did you mean 'all'"):
        encoded([row], tokenizer, loss_on="al")


# --- templates that give no right mask -------------------------------------------------------------------------------


def chat(template: str, special: tuple[str, ...] = IM):
    return byte_tokenizer(special, "<|im_end|>", None, template)


def test_prompt_that_the_answer_does_not_follow():
    """The generation prompt opens a thought that a written answer does not have."""
    template = CHATML.replace("'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n<think>\\n'")
    with pytest.raises(DataError, match=r"no mask would be right.*<think>.*prompt and completion strings"):
        encoded([conversation(("user", "a"), ("assistant", "b"))], chat(template))


def test_template_without_generation_prompt():
    template = CHATML[: CHATML.index("{%- if add_generation_prompt")]
    with pytest.raises(DataError, match=r"ignores add_generation_prompt but writes '<\|im_start\|>assistant\\n'"):
        encoded([conversation(("user", "a"), ("assistant", "b"))], chat(template))


def test_template_that_loses_answers():
    template = CHATML.replace("message['content'] +", "(message['content'] if message['role'] == 'user' else '') +")
    with pytest.raises(DataError, match="does not write the assistant's content"):
        encoded([conversation(("user", "a"), ("assistant", "b"))], chat(template))
    short = CHATML.replace("message['content'] +", "(message['content'] if message['content'] != 'lost' else '') +")
    with pytest.raises(DataError, match=r"data.jsonl, line 2: the chat template writes nothing of message 2"):
        encoded([conversation(("user", "a"), ("assistant", "b")), conversation(("user", "a"), ("assistant", "lost"))], chat(short))


def test_template_that_refuses_roles():
    rows = [conversation(("user", "a"), ("assistant", "b")), conversation(("system", "s"), ("user", "a"), ("assistant", "b"))]
    with pytest.raises(DataError, match=r"data.jsonl, line 2: .*refuses a conversation of system, user: no system role"):
        encoded(rows, tokenizer_of("gemma"))
    with pytest.raises(DataError, match=r"line 1: .*refuses a conversation of nothing before its first assistant message"):
        encoded([conversation(("assistant", "hi"), ("user", "a"), ("assistant", "b"))], tokenizer_of("llama2"))


def test_opening_words_of_the_assistant():
    """ChatML asks for an answer to nothing without complaint, so a greeting is an answer like any other."""
    tokenizer = tokenizer_of("chatml")
    made = encoded([conversation(("assistant", "hi"), ("user", "a"), ("assistant", "b"))], tokenizer)
    assert supervised(made, tokenizer) == ["hi<|im_end|>", "b<|im_end|>"]


def test_template_without_end_token():
    template = CHATML.replace(" + '<|im_end|>' + '\\n'", " + '\\n'")
    made = encoded([conversation(("user", "a"), ("assistant", "b"))] * 7, chat(template))
    assert made.report.no_end == 7
    with pytest.raises(DataError, match=r"7 of 7 rows have an answer without an end token.*lines 1, 2, 3, 4, 5, \.\.\..*'no-end' to allow"):
        check_encoded(made)
    assert check_encoded(made, {"no-end"}) is made


def test_template_options_and_header():
    """A template that answers with an empty thought: the model learns to write it, unless an option makes it part of the prompt."""
    template = CHATML.replace(
        "'<|im_start|>assistant\\n'", "'<|im_start|>assistant\\n' + ('<think></think>' if thinking is false else '')"
    ).replace("message['content'] +", "('<think></think>' if message['role'] == 'assistant' else '') + message['content'] +")
    row = conversation(("user", "a"), ("assistant", "b"))
    made = encoded([row], chat(template))
    assert supervised(made, chat(template)) == ["<think></think>b<|im_end|>"]
    assert any("'<think></think>' before an answer" in note for note in made.report.notes)
    made = encoded([row], chat(template), template_options={"thinking": False})
    assert supervised(made, chat(template)) == ["b<|im_end|>"]


def test_end_token_that_is_not_the_tokenizers():
    made = encoded([conversation(("user", "a"), ("assistant", "b"))], tokenizer_of("llama3"))
    assert any("'<|eot_id|>'" in note and "'<|end_of_text|>'" in note for note in made.report.notes)
    assert made.report.no_end == 0


def test_added_token_before_the_end():
    """'</answer>' is an added token too, but no end: what is learnt has to go on to '<|im_end|>'."""
    template = CHATML.replace("message['content'] +", "message['content'] + ('</answer>' if message['role'] == 'assistant' else '') +")
    base = chat(template)
    tokenizer = type(base)(tokenizer_object=base._tokenizer, eos_token="<|im_end|>", chat_template=template)
    tokenizer.add_tokens(["</answer>"])
    made = encoded([conversation(("user", "a"), ("assistant", "b"))], tokenizer)
    assert supervised(made, tokenizer) == ["b</answer><|im_end|>"]


def test_tools_and_text_parts():
    template = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] -}}
{%- for call in message.tool_calls or [] -%}{{- 'CALL ' + call['name'] -}}{%- endfor -%}
{{- '<|im_end|>' + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"""
    row = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "weather"}, {"type": "text", "text": "?"}]},
            {"role": "assistant", "content": None, "tool_calls": [{"name": "look"}]},
            {"role": "tool", "content": "rain"},
            {"role": "assistant", "content": "Rain."},
        ]
    }
    made = encoded([row], chat(template))
    assert supervised(made, chat(template)) == ["CALL look<|im_end|>", "Rain.<|im_end|>"]


# --- without a template ----------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(prompt=TEXT, completion=TEXT)
def test_verbatim_rows_keep_the_border(prompt, completion):
    """Prompt ids are the prompt's own, nothing merges over the border, and the end token follows."""
    tokenizer = byte_tokenizer(("<eos>",), "<eos>")
    made = encoded([{"prompt": prompt, "completion": completion}], tokenizer)
    asked = tokenizer(prompt)["input_ids"]
    assert made.input_ids[0][: len(asked)] == asked
    assert made.labels[0][: len(asked)] == [IGNORED] * len(asked)
    assert supervised(made, tokenizer) == [completion + "<eos>"]
    whole = encoded([{"prompt": prompt, "completion": completion}], tokenizer, loss_on="all")
    assert whole.input_ids == made.input_ids == whole.labels


def test_border_that_would_merge():
    """' quick' is one token of this vocabulary, and must not be, with the blank in the prompt."""
    tokenizer = byte_tokenizer(("<eos>",), "<eos>")
    joined, asked = tokenizer("The quick")["input_ids"], tokenizer("The ")["input_ids"]
    assert joined[: len(asked)] != asked  # the case is real
    made = encoded([{"prompt": "The ", "completion": "quick"}], tokenizer)
    assert made.input_ids[0][: len(asked)] == asked
    assert supervised(made, tokenizer) == ["quick<eos>"]


@pytest.mark.parametrize(("prompt", "completion"), [("Say:", " the dog"), ("Say: ", "the dog"), ("Say:\n", "dog"), ("a", "b"), ("1", "2")])
def test_sentencepiece_gets_no_blank_in_the_middle(prompt, completion):
    tokenizer = sentencepiece_tokenizer(("<s>", "</s>"), "</s>", "<s>")
    assert tokenizer.decode(tokenizer("dog")["input_ids"]) == " dog"  # alone, a text gets a blank
    made = encoded([{"prompt": prompt, "completion": completion}], tokenizer)
    assert supervised(made, tokenizer) == [completion + "</s>"]
    assert made.input_ids[0][: len(tokenizer(prompt)["input_ids"])] == tokenizer(prompt)["input_ids"]


@pytest.mark.parametrize("name", ["llama2", "mistral"])
def test_sentencepiece_conversations(name):
    style = STYLES[name]
    tokenizer = sentencepiece_tokenizer(("<s>", "</s>"), "</s>", "<s>", style.template)
    row = conversation(("user", "quick"), ("assistant", "brown fox"), ("user", "dog"), ("assistant", "1000 words"))
    made = encoded([row], tokenizer)
    assert supervised(made, tokenizer) == [style.answer("brown fox"), style.answer("1000 words")]
    asked = tokenizer.apply_chat_template(row["messages"][:3], tokenize=False, add_generation_prompt=True)
    ids = tokenizer(asked, add_special_tokens=False)["input_ids"]
    assert made.input_ids[0][: len(ids)] == ids


def test_beginning_of_text_token():
    """A tokenizer that begins a text with a token of its own does so here, once, and without a loss unless it is asked for."""
    plain = byte_tokenizer(("<bos>", "<eos>"), "<eos>", "<bos>")
    inner = copy.deepcopy(plain._tokenizer)
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", plain.bos_token_id)])
    tokenizer = type(plain)(tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>")
    made = encoded([{"prompt": "The ", "completion": "dog"}, {"prompt": "", "completion": "dog"}], tokenizer)
    assert [tokenizer.decode(ids) for ids in made.input_ids] == ["<bos>The dog<eos>", "<bos>dog<eos>"]
    assert supervised(made, tokenizer) == ["dog<eos>", "dog<eos>"]
    made = encoded([{"text": "The dog"}], tokenizer)
    assert tokenizer.decode(made.input_ids[0]) == "<bos>The dog<eos>"


def test_plain_text_and_alpaca():
    tokenizer = byte_tokenizer(("<eos>",), "<eos>")
    made = encoded([{"text": "The dog"}, {"text": "ends itself<eos>"}], tokenizer)
    assert supervised(made, tokenizer) == ["The dog<eos>", "ends itself<eos>"]
    assert made.labels == made.input_ids
    made = encoded([{"instruction": "Add", "input": "1 2", "output": "3"}, {"instruction": "Sing", "input": "", "output": "la"}], tokenizer)
    assert [tokenizer.decode(ids) for ids in made.input_ids] == ["Add\n\n1 2\n\n3<eos>", "Sing\n\nla<eos>"]
    assert supervised(made, tokenizer) == ["3<eos>", "la<eos>"]


def test_template_choice():
    row = {"prompt": "a", "completion": "b"}
    tokenizer, bare = tokenizer_of("chatml"), byte_tokenizer(("<eos>",), "<eos>")
    assert tokenizer.decode(encoded([row], tokenizer).input_ids[0]).startswith("<|im_start|>user\na<|im_end|>")
    assert tokenizer.decode(encoded([row], tokenizer, template="none").input_ids[0]) == "ab<|im_end|>"
    with pytest.raises(DataError, match="template is 'chat', but the tokenizer has no chat template"):
        encoded([row], bare, template="chat")
    with pytest.raises(DataError, match="line 1: a conversation needs a chat template"):
        encoded([conversation(("user", "a"), ("assistant", "b"))], bare)
    markup = encoded([{"prompt": "<|im_start|>user\na<|im_end|>", "completion": "b"}], tokenizer)
    assert any("1 rows hold a special token" in note for note in markup.report.notes)


def test_thinking_template_is_not_chatml():
    """The property tests would say nothing about rewriting if this template did not rewrite."""
    assert THINKING != CHATML
    made = encoded([conversation(("system", "s"), *[("user", "a"), ("assistant", "b")] * 2)], tokenizer_of("mistral"))
    assert len(made) == 2  # the system prompt moved to the second question
