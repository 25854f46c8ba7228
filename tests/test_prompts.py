"""Prompt ids of one side: what a plain call or the chat template gives, and spellings that stay text."""

from __future__ import annotations

import copy

import pytest
from tokenizers.processors import TemplateProcessing

import tokenizer_zoo
from vocabridge.errors import UserError
from vocabridge.prompts import PromptRenderer, render_prompt, spelled_control_token
from vocabridge.text import parse_row

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA2 = (
    "{% for message in messages %}{% if message.role == 'user' %}<s>[INST] {{ message.content }} [/INST]"
    "{% else %} {{ message.content }} </s>{% endif %}{% endfor %}"
)
THINKING = CHATML.replace(
    "{{ message.content }}",
    "{% if message.role == 'assistant' %}<think>\n\n</think>\n\n{% endif %}{{ message.content }}",
)


@pytest.fixture(scope="module")
def chatml_tokenizer():
    tokenizer = tokenizer_zoo.byte_level_bpe(control=("<|pad|>", "<|endoftext|>", "<|im_end|>", "<|im_start|>"))
    tokenizer.chat_template = CHATML
    return tokenizer


def row(prompt="Where is Paris?\n", response="In France."):
    return parse_row({"prompt": prompt, "output": response}, "f:1")


def with_bos_and_eos(tokenizer):
    """A copy whose plain call adds BOS in front and EOS behind."""
    tokenizer = copy.deepcopy(tokenizer)
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos} $A {eos}", special_tokens=[(bos, tokenizer.bos_token_id), (eos, tokenizer.eos_token_id)]
    )
    return tokenizer


# --- plain -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tiny_bpe_tokenizer", "tiny_sentencepiece_tokenizer"])
def test_plain_prompt_is_a_plain_call(name, request):
    tokenizer = request.getfixturevalue(name)
    assert (
        render_prompt(row("The capital of France\n"), "plain", tokenizer)
        == tokenizer("The capital of France\n")["input_ids"]
    )


@pytest.mark.parametrize("name", ["tiny_bpe_tokenizer", "tiny_sentencepiece_tokenizer"])
def test_plain_prompt_has_bos_but_no_eos(name, request):
    tokenizer = with_bos_and_eos(request.getfixturevalue(name))
    called = tokenizer("The capital of France\n")["input_ids"]
    assert (called[0], called[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert render_prompt(row("The capital of France\n"), "plain", tokenizer) == called[:-1]


@pytest.mark.parametrize("name", ["tiny_bpe_tokenizer", "tiny_sentencepiece_tokenizer"])
def test_control_spellings_in_a_plain_prompt_are_text(name, request):
    tokenizer = request.getfixturevalue(name)
    text = f"Say {tokenizer.eos_token} twice: {tokenizer.eos_token}{tokenizer.bos_token}\n"
    assert tokenizer.eos_token_id in tokenizer(text)["input_ids"]
    ids = render_prompt(row(text), "plain", tokenizer)
    assert not {tokenizer.eos_token_id, tokenizer.bos_token_id} & set(ids)
    assert tokenizer.decode(ids) == text


def test_empty_prompt_starts_from_bos_else_eos(tiny_bpe_tokenizer):
    tokenizer = copy.deepcopy(tiny_bpe_tokenizer)
    assert render_prompt(row(""), "plain", tokenizer) == [tokenizer.bos_token_id]
    tokenizer.bos_token = None
    assert render_prompt(row(""), "plain", tokenizer) == [tokenizer.eos_token_id]
    renderer = PromptRenderer(tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match=r"f:1: the prompt is empty.*neither a BOS nor an EOS token"):
        renderer(row(""))


def test_end_token_of_plain_is_eos(tiny_bpe_tokenizer):
    assert PromptRenderer(tiny_bpe_tokenizer).end_token_id == tiny_bpe_tokenizer.eos_token_id
    tokenizer = copy.deepcopy(tiny_bpe_tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        PromptRenderer(tokenizer)


# --- chat ------------------------------------------------------------------------------------------------------------


def test_chat_prompt_is_the_rendered_template(chatml_tokenizer):
    expected = "<|im_start|>user\nWhere is Paris?<|im_end|>\n<|im_start|>assistant\n"
    renderer = PromptRenderer(chatml_tokenizer, "chat")
    assert renderer(row("Where is Paris?")) == chatml_tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert renderer.response_lead == ""


def test_end_token_of_chat_is_what_the_template_writes(chatml_tokenizer):
    renderer = PromptRenderer(chatml_tokenizer, "chat")
    assert renderer.end_token_id == chatml_tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert renderer.end_token_id != chatml_tokenizer.eos_token_id


def test_end_token_is_the_first_of_several(chatml_tokenizer):
    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", " <|im_end|>\n<|endoftext|><|im_start|>")
    assert PromptRenderer(tokenizer, "chat").end_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_end_token_of_a_template_without_one_is_eos(chatml_tokenizer):
    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.chat_template = CHATML.replace("<|im_end|>", "")
    assert PromptRenderer(tokenizer, "chat").end_token_id == tokenizer.eos_token_id


def test_control_spellings_in_a_chat_are_text(chatml_tokenizer):
    text = "What does <|im_end|> do? And <|im_start|>system"
    ids = PromptRenderer(chatml_tokenizer, "chat")(row(text))
    controls = chatml_tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>"])
    assert [token_id for token_id in ids if token_id in controls] == [controls[0], controls[1], controls[0]]
    assert chatml_tokenizer.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"


def test_unigram_refuses_only_a_spelling_that_it_has(chatml_tokenizer):
    tokenizer = tokenizer_zoo.unigram()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}</s>{% endfor %}"
    renderer = PromptRenderer(tokenizer, "chat")
    assert renderer(row("Hello there"))
    with pytest.raises(UserError, match=r"f:1: the chat template of .* cannot render .*'</s>'"):
        renderer(row("What is </s>?"))


def test_space_before_the_answer_belongs_to_the_response(tiny_sentencepiece_tokenizer):
    tokenizer = copy.deepcopy(tiny_sentencepiece_tokenizer)
    tokenizer.chat_template = LLAMA2
    renderer = PromptRenderer(tokenizer, "chat")
    assert renderer.response_lead == " "
    assert renderer.end_token_id == tokenizer.eos_token_id
    assert tokenizer.decode(renderer(row("Hi"))) == "<s> [INST] Hi [/INST]"


def test_what_the_template_writes_before_the_answer_belongs_to_the_prompt(chatml_tokenizer):
    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.chat_template = THINKING
    renderer = PromptRenderer(tokenizer, "chat")
    assert tokenizer.decode(renderer(row("Hi"))).endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert renderer.response_lead == ""
    assert tokenizer.convert_ids_to_tokens(renderer.end_token_id) == "<|im_end|>"


def test_template_without_generation_prompt(chatml_tokenizer):
    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.chat_template = CHATML.split("{% if")[0]
    renderer = PromptRenderer(tokenizer, "chat")
    assert renderer(row("Hi")) == PromptRenderer(chatml_tokenizer, "chat")(row("Hi"))


def test_missing_or_failing_chat_template(tiny_bpe_tokenizer, chatml_tokenizer):
    with pytest.raises(UserError, match="has no chat template; use template 'plain'"):
        PromptRenderer(tiny_bpe_tokenizer, "chat")
    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.chat_template = "{{ messages[0]['nothing']['here'] }}"
    with pytest.raises(UserError, match="fails on a plain conversation"):
        PromptRenderer(tokenizer, "chat")
    tokenizer.chat_template = "{{ messages[0].content }}"
    with pytest.raises(UserError, match="does not write the assistant's content"):
        PromptRenderer(tokenizer, "chat")


def test_conversation_that_the_template_refuses(chatml_tokenizer):
    tokenizer = copy.deepcopy(chatml_tokenizer)
    tokenizer.chat_template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML
    )
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello")]
    example = parse_row({"messages": [{"role": role, "content": text} for role, text in turns]}, "chat.jsonl:7")
    with pytest.raises(UserError, match=r"chat.jsonl:7: .*System role not supported"):
        PromptRenderer(tokenizer, "chat")(example)


def test_spelled_control_token(tiny_bpe_tokenizer):
    assert spelled_control_token(tiny_bpe_tokenizer, "a <|endoftext|> b") == "<|endoftext|>"
    assert spelled_control_token(tiny_bpe_tokenizer, "a <endoftext> < b") is None
