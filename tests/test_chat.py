"""What the chat template writes is what is trained: one text for every phase, with its true end."""

from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer, ByT5Tokenizer

from chat import (
    control_words,
    cut_prompt,
    decode,
    encode_demonstration,
    encode_prompt,
    end_ids,
    split_dialogue,
    turn_end,
    unwritten,
)
from data import demonstration_batch
from dialogue import Episode, text_between
from engine import UserError
from sources import Example

SYSTEM = {"role": "system", "content": "Be kind."}
ASKED = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"city": "string"}}}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}

# Small copies of what real templates do, and what they write for ASKED and the answer "See you.":
# name -> special tokens (EOS first), template, the prompt, the answer as it is trained
CHATML = """{% if messages[0].role != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHATML_PROMPT = (
    "<|im_start|>system\nYou are helpful.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
    "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n"
    "<|im_start|>assistant\n"
)
QWEN3 = """{% for m in messages %}<|im_start|>{{ m.role }}
{% if m.role == 'assistant' %}{% set thought = m.reasoning_content or '' %}\
{% if loop.last %}<think>
{{ thought }}
</think>

{% endif %}{% for c in m.tool_calls or [] %}<tool_call>
{{ c.function | tojson }}
</tool_call>{% endfor %}{% endif %}{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""
QWEN3_PROMPT = CHATML_PROMPT.partition("<|im_end|>\n")[2]
TEMPLATES = {
    "llama3": (
        ["<|end_of_text|>", "<|begin|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
        "{% for m in messages %}{% if loop.first %}<|begin|>{% endif %}<|start_header_id|>"
        "{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n"
        "{% endif %}",
        "<|begin|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "See you.<|eot_id|>",
    ),
    "qwen2.5": (
        ["<|im_end|>", "<|im_start|>", "<|endoftext|>"],
        CHATML,
        CHATML_PROMPT,
        "See you.<|im_end|>",
    ),
    "smollm2, EOS of the base model": (
        ["<|endoftext|>", "<|im_end|>", "<|im_start|>"],
        CHATML,
        CHATML_PROMPT,
        "See you.<|im_end|>",
    ),
    "qwen3": (
        ["<|im_end|>", "<|im_start|>"],
        QWEN3,
        QWEN3_PROMPT,
        "<think>\n\n</think>\n\nSee you.<|im_end|>",
    ),
    "gemma2": (
        ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported')"
        " }}{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<start_of_turn>"
        "{{ 'model' if m.role == 'assistant' else m.role }}\n{{ m.content | trim }}<end_of_turn>\n"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
        "See you.<end_of_turn>",
    ),
    "gemma3, content in parts": (
        ["<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role"
        " }}\n{% for part in m.content %}{% if part.type == 'text' %}{{ part.text | trim }}"
        "{% endif %}{% endfor %}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
        "<start_of_turn>user\nBye<end_of_turn>\n<start_of_turn>model\n",
        "See you.<end_of_turn>",
    ),
    "phi3, which closes a dialogue with EOS too": (
        ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"],
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}",
        "<|user|>\nHi<|end|>\n<|assistant|>\nHello!<|end|>\n<|user|>\nBye<|end|>\n<|assistant|>\n",
        "See you.<|end|>",
    ),
    "deepseek": (
        ["<|end_of_sentence|>", "<|begin|>", "<|User|>", "<|Assistant|>"],
        "<|begin|>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% else %}<|Assistant|>{{ m.content }}<|end_of_sentence|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|Assistant|>{% endif %}",
        "<|begin|><|User|>Hi<|Assistant|>Hello!<|end_of_sentence|><|User|>Bye<|Assistant|>",
        "See you.<|end_of_sentence|>",
    ),
    "deepseek r1, which asks with more than it writes": (
        ["<|end_of_sentence|>", "<|begin|>", "<|User|>", "<|Assistant|>"],
        "<|begin|>{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
        "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}<|end_of_sentence|>"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}",
        "<|begin|><|User|>Hi<|Assistant|>Hello!<|end_of_sentence|><|User|>Bye<|Assistant|>",
        "See you.<|end_of_sentence|>",
    ),
    "gpt-oss, with channels": (
        ["<|return|>", "<|start|>", "<|message|>", "<|channel|>", "<|end|>"],
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
        "{% if m.thinking and loop.last %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|>"
        "<|start|>assistant{% endif %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
        "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|start|>user<|message|>Hi<|end|><|start|>assistant<|channel|>final<|message|>Hello!"
        "<|end|><|start|>user<|message|>Bye<|end|><|start|>assistant",
        "<|channel|>final<|message|>See you.<|return|>",
    ),
    "glm4.5, whose turns have no end": (
        ["<|endoftext|>", "[gMASK]", "<sop>", "<|user|>", "<|assistant|>"],
        "[gMASK]<sop>{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}"
        "<think></think>\n{% endif %}{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}",
        "[gMASK]<sop><|user|>\nHi<|assistant|>\n<think></think>\nHello!<|user|>\nBye<|assistant|>",
        "\n<think></think>\nSee you.<|endoftext|>",
    ),
    "cohere2, with two marks at an end": (
        ["<|END_OF_TURN|>", "<BOS>", "<|START_OF_TURN|>", "<|START|>", "<|END|>"],
        "<BOS>{% for m in messages %}<|START_OF_TURN|>{{ m.role }}:{% if m.role == 'assistant' %}"
        "<|START|>{{ m.content }}<|END|>{% else %}{{ m.content }}{% endif %}<|END_OF_TURN|>"
        "{% endfor %}{% if add_generation_prompt %}<|START_OF_TURN|>assistant:{% endif %}",
        "<BOS><|START_OF_TURN|>user:Hi<|END_OF_TURN|><|START_OF_TURN|>assistant:<|START|>Hello!"
        "<|END|><|END_OF_TURN|><|START_OF_TURN|>user:Bye<|END_OF_TURN|><|START_OF_TURN|>assistant:",
        "<|START|>See you.<|END|><|END_OF_TURN|>",
    ),
    "mistral, answers after a space": (
        ["</s>", "<s>", "[INST]", "[/INST]"],
        "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}",
        "<s>[INST] Hi [/INST] Hello!</s>[INST] Bye [/INST]",
        " See you.</s>",
    ),
}


@pytest.fixture
def with_template(tokenizer, tmp_path):
    """A tokenizer with the special tokens, EOS first, and the template of an entry of TEMPLATES."""

    def make(name="qwen2.5", template=None):
        special, written = TEMPLATES[name][:2]
        tokenizer.save_pretrained(tmp_path)
        copy = AutoTokenizer.from_pretrained(tmp_path)
        copy.add_special_tokens({"eos_token": special[0], "extra_special_tokens": special[1:]})
        copy.chat_template = template or written
        return copy

    return make


def texts(tokenizer, example, **options):
    prompt, answer = encode_demonstration(tokenizer, example, **options)
    return tokenizer.decode(prompt), tokenizer.decode(answer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_is_trained_is_what_the_template_writes(with_template, name):
    tokenizer, (_, _, prompt, answer) = with_template(name), TEMPLATES[name]
    example = Example("", "See you.", messages=ASKED)
    assert texts(tokenizer, example) == (prompt, answer)
    whole = [*ASKED, {"role": "assistant", "content": "See you."}]
    if "parts" in name:
        whole = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in whole]
    written = tokenizer.apply_chat_template(whole, tokenize=False)
    row = prompt + answer
    if "no end" in name:
        assert row == written + tokenizer.eos_token  # a complete answer has an end
    else:
        # Nothing is sampled after the end of a turn, so nothing after it is trained.
        assert (
            written.startswith(row)
            and not written[len(row) :].replace("<|endoftext|>", " ").strip()
        )
    asked = encode_prompt(tokenizer, Example("", "", messages=ASKED))
    assert tokenizer.decode(asked) == prompt, "PPO reads the same prompt, with or without a target"

    batch = demonstration_batch(tokenizer, [example], 1024)
    row_ids = batch.input_ids[0]
    assert tokenizer.decode(row_ids) == row
    assert tokenizer.decode(row_ids[batch.response_mask[0]]) == answer
    end = encode_demonstration(tokenizer, example)[1][-1]
    assert end in end_ids(tokenizer), "sampling stops where the trained answer ends"
    assert end_ids(tokenizer)[0] == tokenizer.eos_token_id


@pytest.mark.parametrize("name", [n for n in TEMPLATES if "r1" not in n])
def test_a_second_turn_goes_on_as_the_template_writes_it(with_template, name):
    """Prompt + sampled answer + what stands between = the prompt of the next turn."""
    tokenizer = with_template(name)
    prompt, answer = encode_demonstration(tokenizer, Example("", "See you.", messages=ASKED))
    messages = [*ASKED, {"role": "assistant", "content": "See you."}]
    episode = Episode(Example("", "", messages=ASKED), messages, prompt + answer, [])
    episode.truncated.append(False)
    between = text_between(tokenizer, episode, "Really?")
    row = tokenizer.decode(prompt + answer) + between
    expected = Example("", "", messages=[*messages, {"role": "user", "content": "Really?"}])
    expected = tokenizer.decode(encode_prompt(tokenizer, expected))
    # What a template writes in the last answer alone was sampled, and stays.
    if "<think>\n\n" not in expected:
        row = row.replace("<think>\n\n</think>\n\n", "")
    expected = expected.replace(
        "</think>\nSee you.<|user|>", "</think>\nSee you.<|endoftext|><|user|>"
    )
    if "gpt-oss" in name:  # the policy has sampled <|return|>
        expected = expected.replace("See you.<|end|>", "See you.<|return|>")
    assert row == expected


@pytest.mark.parametrize("reply", ["n", "end", "m", "|", "im_end", "\n"])
def test_a_short_reply_is_not_found_inside_the_end_of_the_turn(with_template, reply):
    tokenizer = with_template("qwen2.5")
    prompt, answer = encode_demonstration(tokenizer, Example("", "Sure.", messages=ASKED))
    messages = [*ASKED, {"role": "assistant", "content": "Sure."}]
    episode = Episode(Example("", "", messages=ASKED), messages, prompt + answer, [])
    episode.truncated.append(False)
    between = text_between(tokenizer, episode, reply)
    assert between == f"\n<|im_start|>user\n{reply}<|im_end|>\n<|im_start|>assistant\n"


def test_the_end_of_a_response_is_a_set_of_special_tokens(with_template):
    tokenizer = with_template("smollm2, EOS of the base model")
    eos, end, start = tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    )
    letter = tokenizer("a").input_ids[0]

    def lm(ids):
        return SimpleNamespace(generation_config=SimpleNamespace(eos_token_id=ids))

    assert end_ids(tokenizer) == end_ids(tokenizer, lm(None)) == [eos, end]
    assert end_ids(tokenizer, lm([start, end, letter])) == [eos, start, end], "a letter is no end"
    assert end_ids(tokenizer, lm(start)) == [eos, start, end]
    tokenizer.chat_template = None
    assert turn_end(tokenizer) is None and end_ids(tokenizer, lm(letter)) == [eos]


def test_template_arguments_reach_the_template(with_template):
    tokenizer = with_template("qwen3")
    example = Example("", "See you.", messages=ASKED, template_args={"enable_thinking": False})
    prompt, answer = texts(tokenizer, example)
    assert prompt == QWEN3_PROMPT + "<think>\n\n</think>\n\n" and answer == "See you.<|im_end|>"


def test_reasoning_goes_where_the_template_puts_it_or_is_named(with_template):
    reply = {"role": "assistant", "content": "See you.", "reasoning_content": "They leave."}
    example = Example("", "See you.", messages=ASKED, reply=reply)
    tokenizer = with_template("qwen3")
    assert texts(tokenizer, example)[1] == "<think>\nThey leave.\n</think>\n\nSee you.<|im_end|>"
    assert unwritten(tokenizer, example) == []
    assert unwritten(with_template("qwen2.5"), example) == ["reasoning_content"]
    inside = Example("", "<think>They leave.</think>See you.", messages=ASKED)
    r1 = with_template("deepseek r1, which asks with more than it writes")
    assert texts(r1, inside)[1] == "See you.<|end_of_sentence|>"
    assert unwritten(r1, inside) == ["<think>"]
    thought = {**reply, "thinking": "They leave.", "reasoning_content": None}
    channels = with_template("gpt-oss, with channels")
    assert texts(channels, Example("", "See you.", messages=ASKED, reply=thought))[1] == (
        "<|channel|>analysis<|message|>They leave.<|end|><|start|>assistant"
        "<|channel|>final<|message|>See you.<|return|>"
    )
    # A header that is already closed cannot be followed by a thought.
    closed = Example("", "x", messages=ASKED, reply=reply, template_args={"enable_thinking": False})
    with pytest.raises(UserError, match="another header than its prompt has"):
        encode_demonstration(tokenizer, closed)


def test_tool_calls_are_trained_as_the_template_writes_them_or_refused(with_template):
    reply = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    asked = [{"role": "user", "content": "Rain?"}]
    example = Example("", "call", messages=asked, reply=reply, template_args={"tools": [TOOL]})
    tokenizer = with_template("qwen3")
    assert texts(tokenizer, example)[1] == (
        '<think>\n\n</think>\n\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n'
        "</tool_call><|im_end|>"
    )
    assert unwritten(tokenizer, example) == ["tools"], "they are named where they are not written"
    result = [*asked, reply, {"role": "tool", "content": "RAINY-7"}]
    after = Example("", "It rains.", messages=result)
    assert "RAINY-7" in texts(tokenizer, after)[0]
    deaf = with_template(
        template=QWEN3.replace("for m in messages", "for m in messages if m.role != 'tool'")
    )
    with pytest.raises(UserError, match="does not write what a tool said"):
        encode_demonstration(deaf, after)
    with pytest.raises(UserError, match="does not write tool calls"):
        encode_demonstration(with_template("qwen2.5"), example)
    as_text = with_template(
        template="{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
        "{{ 'call ' + c.function.arguments }}{% endfor %}<|im_end|>{% endfor %}"
    )
    assert texts(as_text, example) == ("Rain?<|im_end|>", 'call {"city": "Oslo"}<|im_end|>')


@pytest.mark.parametrize(
    "template, reason",
    [
        ("{{ raise_exception('no dialogues') }}", "no dialogues"),
        ("{{ messages[0].content + 3 }}", "can only concatenate str"),
        ("{{ 1 // 0 }}", "integer division or modulo by zero"),
        ("{{ none.x.y }}", "has no attribute"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "does not write what the user said"),
        (
            "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}",
            "does not write the answer",
        ),
        (
            "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}",
            "writes the turns before an answer differently",
        ),
        ("{% for m in messages %}{{ m.content[:9] }}{% endfor %}", "does not write the answer as"),
    ],
)
def test_every_error_of_a_template_is_one_line_with_its_place(with_template, template, reason):
    tokenizer = with_template(template=template)
    example = Example("Bye", "Nothing but words", messages=ASKED, place="chat.jsonl:7")
    with pytest.raises(UserError) as caught:
        split_dialogue(tokenizer, example)
    message = str(caught.value)
    assert message.startswith("chat.jsonl:7: the model's chat template refuses the dialogue 'Bye'")
    assert reason in message and "\n" not in message


def test_a_question_and_its_answer_go_through_the_template_unless_raw(with_template):
    tokenizer = with_template("qwen3")
    example = Example("Name a fruit.", " A pear.", is_chat=True)
    prompt, answer = texts(tokenizer, example)
    assert prompt == "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n"
    assert answer == "<think>\n\n</think>\n\nA pear.<|im_end|>", "without the space of a text"
    raw = Example("Name a fruit.", " A pear.")
    assert texts(tokenizer, raw) == ("Name a fruit.", " A pear.<|im_end|>")


def test_control_tokens_in_the_words_of_the_data_are_found(with_template):
    tokenizer = with_template("qwen2.5")
    clean = Example("", "Nothing.", messages=ASKED)
    assert control_words(tokenizer, clean) == []
    assert control_words(tokenizer, Example("", "The <|im_end|> ends.", messages=ASKED)) == [
        "<|im_end|>"
    ]
    asked = [{"role": "user", "content": "<|im_start|>system"}]
    assert control_words(tokenizer, Example("", "", messages=asked)) == ["<|im_start|>"]


def test_a_prompt_is_cut_on_its_left_and_keeps_its_system_turn(with_template):
    tokenizer = with_template("qwen2.5")
    long = [SYSTEM, {"role": "user", "content": "one " * 40 + "last words"}]
    example = Example("", "Yes.", messages=long)
    whole = encode_prompt(tokenizer, example)
    head = tokenizer("<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\n").input_ids
    room = len(head) + 19
    cut = cut_prompt(tokenizer, example, whole, room)
    assert cut == head + whole[-19:] and len(cut) == room
    assert tokenizer.decode(cut).endswith("last words<|im_end|>\n<|im_start|>assistant\n")
    assert cut_prompt(tokenizer, example, whole, len(whole)) == whole
    # A system turn that would leave no room for anything else goes too.
    closing = tokenizer("<|im_end|>\n<|im_start|>assistant\n").input_ids
    room = len(head) + len(closing)
    assert cut_prompt(tokenizer, example, whole, room) == whole[-room:]
    assert cut_prompt(tokenizer, example, whole, room + 1) == head + whole[-len(closing) - 1 :]
    plain = Example("Tell me " + "more " * 30, "Yes.")
    ids = encode_prompt(tokenizer, plain)
    assert cut_prompt(tokenizer, plain, ids, 11) == ids[-11:]


def test_rows_are_cut_by_one_rule(with_template):
    tokenizer = with_template("qwen2.5")
    example = Example("", "so " * 50, messages=[SYSTEM, {"role": "user", "content": "why " * 30}])
    prompt, answer = encode_demonstration(tokenizer, example)
    batch = demonstration_batch(tokenizer, [example], 61, max_prompt_length=44)
    ids, mask = batch.input_ids[0], batch.response_mask[0]
    assert ids[~mask].tolist() == cut_prompt(tokenizer, example, prompt, 44)
    assert ids[mask].tolist() == answer[:17], "the answer loses its end, and gets no other"
    fits = demonstration_batch(tokenizer, [example], len(prompt) + len(answer), len(prompt))
    assert fits.input_ids[0].tolist() == prompt + answer
    # Without a length for the prompt, an answer that is too long takes half of the row.
    half = demonstration_batch(tokenizer, [example], 60)
    assert half.response_mask.sum() == 30 and len(half.input_ids[0]) == 60


def test_an_id_that_the_tokenizer_does_not_know_has_no_text(tokenizer):
    known = tokenizer("the plot").input_ids
    assert decode(tokenizer, [len(tokenizer) + 7, *known]) == "the plot"
    assert decode(tokenizer, [len(tokenizer) + 7]) == ""


def test_an_id_without_a_token_has_no_text_also_where_the_decoder_raises():
    """ByT5's decoder raises ValueError for an id beyond its bytes."""
    tokenizer = ByT5Tokenizer()
    ids = tokenizer("caf\u00e9", add_special_tokens=False).input_ids
    with pytest.raises(ValueError):
        tokenizer.decode([5000])
    assert decode(tokenizer, [5000, *ids[:3], 5000, *ids[3:], 9999]) == "caf\u00e9"
    assert decode(tokenizer, [5000]) == ""
