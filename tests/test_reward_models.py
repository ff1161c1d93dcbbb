"""Reward models by their chat template, as a pair or as text, and sentence embeddings.

The oracle is Hugging Face's own forward, on one unpadded row of ids that is made here by hand.
"""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from huggingface_hub.errors import EntryNotFoundError
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

import embeddings
import reward_model
from classifiers import Scorer, load_judge
from data import load_pairs
from embeddings import pool
from engine import UserError
from rewards import build_reward

# It writes BOS, a header for each turn, and <|end|> after each: nothing follows the last one.
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' and not loop.first %}{{ raise_exception('system: late') }}{% endif %}"
    "{{ '<|' + m.role + '|>' + m.content + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
PROMPTS = ["the hero was", "a film ?", "the villain"]
ANSWERS = ["clever .", "dull and long , the music felt very warm .", ""]
SIZES = dict(
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=24,
    max_position_embeddings=64,
)


@pytest.fixture(autouse=True)
def no_bars():
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def says(role, content):
    return {"role": role, "content": content}


def save(folder, kind, tokenizer, config=None, labels=1, auto=AutoModelForSequenceClassification):
    """A random model whose scores lie far apart, and a tokenizer, in one folder."""
    torch.manual_seed(len(kind))
    sizes = dict(SIZES, vocab_size=len(tokenizer), num_labels=labels, pad_token_id=None)
    model = auto.from_config(AutoConfig.for_model(kind, **{**sizes, **(config or {})}))
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(6)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def chat_tokenizer(tiny_folder):
    """It puts BOS before every text, as Llama's does, and its template writes one too."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokens = ["<s>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
    tokenizer.add_special_tokens({"bos_token": "<s>", "additional_special_tokens": tokens[1:]})
    bos = ("<s>", tokenizer.bos_token_id)
    processor = TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[bos])
    tokenizer.backend_tokenizer.post_processor = processor
    tokenizer.chat_template = TEMPLATE
    return tokenizer


@pytest.fixture
def pair_tokenizer(tiny_folder):
    """[CLS] a [SEP] b [SEP] with types 0 and 1, as BERT's; no chat template."""
    backend = AutoTokenizer.from_pretrained(tiny_folder).backend_tokenizer
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("[CLS]", "[SEP]")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0", pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1", special_tokens=ids
    )
    return tokenizer


def alone(folder, rows, types=None):
    """Hugging Face's score of each row of ids, one by one, without padding. (N,)"""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    scores = []
    for i, row in enumerate(rows):
        more = {"token_type_ids": torch.tensor([types[i]])} if types else {}
        scores.append(model(input_ids=torch.tensor([row]), **more).logits[0, 0].detach())
    return torch.stack(scores)


def ids_of(tokenizer, messages):
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    return tokenizer(text, add_special_tokens=False).input_ids


def close(a, b):
    torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


# ---- the chat template


@pytest.mark.parametrize("pad", [None, "<|endoftext|>", "<|end|>"])
def test_a_model_with_a_template_scores_what_the_template_writes(
    tmp_path, chat_tokenizer, pad, capsys
):
    """With BOS once, up to the end of the turn. Where the config calls that end its pad token,
    Hugging Face reads the token before it; so does everybody who trained such a model."""
    pad_id = pad and chat_tokenizer.convert_tokens_to_ids(pad)
    folder = save(tmp_path, "llama", chat_tokenizer, dict(pad_token_id=pad_id))
    reward = build_reward(f'model("{folder}")')
    note = f'note: model("{folder}") reads prompts and answers through its chat template\n'
    assert capsys.readouterr() == ("", note)
    rows = [
        ids_of(chat_tokenizer, [says("user", p), says("assistant", a)])
        for p, a in zip(PROMPTS, ANSWERS)
    ]
    bos, end = chat_tokenizer.convert_tokens_to_ids(["<s>", "<|end|>"])
    assert all(row.count(bos) == 1 and row[0] == bos and row[-1] == end for row in rows)
    expected = alone(folder, rows)
    close(reward(PROMPTS, ANSWERS), expected)
    assert (alone(folder, [[bos, *row] for row in rows]) - expected).abs().max() > 0.01
    assert (alone(folder, [row[:-1] for row in rows]) - expected).abs().max() > 0.01 or pad


def test_a_dialogue_is_scored_with_its_system_turn_and_all_its_turns(tmp_path, chat_tokenizer):
    folder = save(tmp_path, "llama", chat_tokenizer)
    before = [says("system", "be warm"), says("user", "a film ?"), says("assistant", "which ?")]
    before = [[*before, says("user", "the hero")], None]
    after = [
        [says("assistant", "clever ."), says("user", "why ?"), says("assistant", "music .")],
        [says("assistant", "dull .")],
    ]
    texts = ["User:\nas text\n\nAssistant:\n", "the cast"], ["joined", "dull ."]
    reward = build_reward(f'model("{folder}")')
    whole = [[*before[0], *after[0]], [says("user", "the cast"), *after[1]]]
    got = reward(*texts, prompt_messages=before, completion_messages=after)
    close(got, alone(folder, [ids_of(chat_tokenizer, messages) for messages in whole]))
    single = [*before[0], says("assistant", "joined")], [says("user", "the cast"), *after[1]]
    got = reward(*texts, prompt_messages=before)
    close(got, alone(folder, [ids_of(chat_tokenizer, messages) for messages in single]))


def test_a_template_that_refuses_is_one_line_that_names_the_model(tmp_path, chat_tokenizer):
    folder = save(tmp_path / "a", "llama", chat_tokenizer)
    reward = build_reward(f'model("{folder}")')
    turns = [says("user", "a"), says("system", "b"), says("user", "c")]
    message = r'model\(".*/a"\): its chat template refuses the dialogue .*: system: late'
    with pytest.raises(UserError, match=message):
        reward(["a"], ["b"], prompt_messages=[turns])
    for template, message in [
        ("{{ raise_exception('never') }}", "refuses a question: never"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "not write the"),
    ]:
        chat_tokenizer.chat_template = template
        with pytest.raises(UserError, match=message):
            build_reward(f'model("{save(tmp_path / "b", "llama", chat_tokenizer)}")')


def test_a_long_dialogue_loses_its_beginning_but_bos(tmp_path, chat_tokenizer):
    folder = save(tmp_path, "llama", chat_tokenizer)
    prompt = " ".join(f"the hero {n}" for n in range(60))
    row = ids_of(chat_tokenizer, [says("user", prompt), says("assistant", "clever .")])
    assert len(row) > 100
    got = build_reward(f'model("{folder}")')([prompt, "a"], ["clever .", "dull"])
    close(got[:1], alone(folder, [row[:1] + row[-63:]]))


# ---- a pair, a text


def test_an_encoder_without_a_template_reads_a_pair_of_texts(tmp_path, pair_tokenizer, capsys):
    folder = save(tmp_path, "bert", pair_tokenizer)
    # In lists: transformers takes an empty second text that stands alone for none at all.
    inputs = pair_tokenizer(PROMPTS, ANSWERS)
    expected = alone(folder, inputs["input_ids"], inputs["token_type_ids"])
    assert all(1 in types for types in inputs["token_type_ids"])
    close(build_reward(f'model("{folder}")')(PROMPTS, ANSWERS), expected)
    assert "as a pair of texts (pair=False: as one text)" in capsys.readouterr().err
    reward = build_reward(f'model("{folder}", pair=True)')
    close(reward(PROMPTS, ANSWERS), expected)
    assert capsys.readouterr().err.endswith("reads prompts and answers as a pair of texts\n")
    one_question = [[says("user", prompt)] for prompt in PROMPTS]
    rendered = [f"User:\n{prompt}\n\nAssistant:\n" for prompt in PROMPTS]
    close(reward(rendered, ANSWERS, prompt_messages=one_question), expected)
    together = alone(folder, [pair_tokenizer(p + a).input_ids for p, a in zip(PROMPTS, ANSWERS)])
    close(build_reward(f'model("{folder}", pair=False)')(PROMPTS, ANSWERS), together)
    assert (together - expected).abs().max() > 0.01
    with pytest.raises(UserError, match="pair is True or False, found 'yes'"):
        build_reward(f'model("{folder}", pair="yes")')


def test_a_dialogue_for_a_pair_is_the_plain_text_of_its_turns(tmp_path, pair_tokenizer):
    folder = save(tmp_path, "bert", pair_tokenizer)
    before = [says("system", "be warm"), says("user", "a film ?")]
    after = [says("assistant", "dull ."), says("user", "no !"), says("assistant", "warm .")]
    got = build_reward(f'model("{folder}")')(
        ["p"], ["c"], prompt_messages=[before], completion_messages=[after]
    )
    question = "System:\nbe warm\n\nUser:\na film ?"
    inputs = pair_tokenizer(question, "dull .\n\nUser:\nno !\n\nAssistant:\nwarm .")
    close(got, alone(folder, [inputs["input_ids"]], [inputs["token_type_ids"]]))


def test_a_decoder_without_a_template_reads_one_text(tmp_path, pair_tokenizer, capsys):
    """Its tokenizer could separate two texts; nobody trains a decoder so."""
    folder = save(tmp_path, "llama", pair_tokenizer)
    rows = [pair_tokenizer(p + a).input_ids for p, a in zip(PROMPTS, ANSWERS)]
    reward = build_reward(f'model("{folder}")')
    close(reward(PROMPTS, ANSWERS), alone(folder, rows))
    assert capsys.readouterr().err.endswith("reads prompts and answers as one text\n")


def test_the_config_says_how_a_model_was_trained(tmp_path, chat_tokenizer, pair_tokenizer):
    chat, rows = says("user", PROMPTS[0]), []
    rows.append(ids_of(chat_tokenizer, [chat, says("assistant", ANSWERS[0])]))
    rows.append(chat_tokenizer(PROMPTS[0] + ANSWERS[0]).input_ids)
    for row, config in [
        (rows[0], {}),
        (rows[0], dict(reward_input="chat", reward_mean=0.5)),
        (rows[1], dict(reward_input="text")),
        (rows[1], dict(reward_mean=0.5)),  # of the reward_model.py that knew one text only
    ]:
        folder = save(tmp_path, "llama", chat_tokenizer, config)
        got = build_reward(f'model("{folder}")')(PROMPTS[:1], ANSWERS[:1])
        close(got, alone(folder, [row]) - config.get("reward_mean", 0))
    folder = save(tmp_path, "bert", pair_tokenizer, dict(reward_mean=0.0))
    got = build_reward(f'model("{folder}")')(PROMPTS[:1], ANSWERS[:1])
    close(got, alone(folder, [pair_tokenizer(PROMPTS[0] + ANSWERS[0]).input_ids]))
    (tmp_path / "chat_template.jinja").unlink()
    for form, message in [("chat", "but it has no chat template"), ("x", "'x'; known are chat")]:
        folder = save(tmp_path, "bert", pair_tokenizer, dict(reward_input=form))
        with pytest.raises(UserError, match=message):
            build_reward(f'model("{folder}")')


def test_an_opponent_is_not_scored_by_our_messages(monkeypatch):
    """self_play asks the reward about other texts; completions as messages are our texts."""
    import self_play

    monkeypatch.setattr(self_play.SelfPlay, "__init__", lambda self, context: None)
    monkeypatch.setattr(self_play.SelfPlay, "answers", lambda self, p, learn: ["theirs"] * len(p))
    monkeypatch.setattr(self_play.SelfPlay, "__call__", lambda self, ours, theirs: ours - theirs)

    def length(prompts, completions, **columns):
        return [float(len(messages[0]["content"])) for messages in completions]

    length.wants_messages = True
    monkeypatch.setitem(build_reward.__globals__["REWARDS"], "chars", (lambda context: length, ""))
    reward = build_reward("self_play(chars)")
    ours = [[says("assistant", "a longer one")]]
    assert reward(["p"], ["a longer one"], completion_messages=ours).tolist() == [6.0]


# ---- reward_model.py


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


def spy(monkeypatch):
    """The texts that scorers read, in order."""
    texts, read = [], Scorer.text

    def text(self, *both):
        texts.append(read(self, *both))
        return texts[-1]

    monkeypatch.setattr(Scorer, "text", text)
    return texts


def train(tmp_path, source, *flags):
    argv = ["--data", source, "--out", str(tmp_path / "rm"), "--device", "cpu", "--epochs", "1"]
    return reward_model.main([*argv, *flags])


def test_it_trains_on_the_texts_that_the_saved_model_scores(
    tmp_path, chat_tokenizer, monkeypatch, capsys
):
    backbone = save(tmp_path / "chat", "llama", chat_tokenizer, labels=2)
    system, words = says("system", "be warm"), ["warm", "dull", "long", "clever"]
    records = []
    for i in range(12):
        asked = [system, says("user", f"film {i} ?")] if i % 2 else [says("user", f"film {i} ?")]
        good, bad = f"it is {words[i % 4]} .", f"no {words[i % 3]} {i}"
        sides = [[*asked, says("assistant", text)] for text in (good, bad)]
        records.append({"prompt": f"film {i} ?", "chosen": sides[0], "rejected": sides[1]})
        if i % 2:
            del records[-1]["prompt"]
    source = write(tmp_path / "pairs.jsonl", records)
    texts = spy(monkeypatch)
    train(tmp_path, source, "--model", backbone, "--batch-size", "3")
    expected = {
        chat_tokenizer.apply_chat_template(record[side], tokenize=False)
        for record in records
        for side in ("chosen", "rejected")
    }
    assert set(texts) == expected and len(expected) == 24
    printed = capsys.readouterr()
    said = f"--model {backbone} reads prompts and responses through its chat template\n"
    assert printed.out.startswith(said) and printed.out.count("\n") == 2
    assert "note" not in printed.err
    texts.clear()
    pairs = load_pairs(source)
    folder = f"{tmp_path}/rm"
    reward = build_reward(f'model("{folder}")')
    messages = [pair.messages for pair in pairs]
    answers = [pair.chosen for pair in pairs]
    got = reward([pair.prompt for pair in pairs], answers, prompt_messages=messages)
    assert set(texts) == {t for t in expected if " is " in t}
    config = AutoConfig.from_pretrained(folder)
    assert config.reward_input == "chat"
    rows = [chat_tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    close(got, (alone(folder, rows) - config.reward_mean) / config.reward_std)


def test_no_prompt_is_read_twice(tmp_path, chat_tokenizer, tiny_folder, monkeypatch, capsys):
    """Pairs whose responses repeat the prompt, with a template and without one."""
    records = []
    for i in range(8):
        prompt = f"\n\nHuman: film {i} ?\n\nAssistant:"
        sides = {"chosen": f"{prompt} warm", "rejected": f"{prompt} dull"}
        records.append({"prompt": prompt, **sides})
    source = write(tmp_path / "pairs.jsonl", records)
    texts = spy(monkeypatch)
    train(tmp_path, source, "--model", save(tmp_path / "chat", "llama", chat_tokenizer))
    written = "<s><|user|>film {} ?<|end|><|assistant|>{}<|end|>"
    assert set(texts) == {written.format(i, word) for i in range(8) for word in ("warm", "dull")}
    assert "in 8 of 8 pairs" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "rm")
    texts.clear()
    train(tmp_path, source)
    assert set(texts) == {record[side] for record in records for side in ("chosen", "rejected")}
    assert capsys.readouterr().out.startswith("--model tiny reads prompts and responses as one")
    assert AutoConfig.from_pretrained(tmp_path / "rm").reward_input == "text"


def test_an_encoder_is_trained_on_one_text_and_scored_so(tmp_path, pair_tokenizer):
    records = [{"prompt": f"film {i} ?", "chosen": " warm", "rejected": " dull"} for i in range(6)]
    source = write(tmp_path / "pairs.jsonl", records)
    train(tmp_path, source, "--model", save(tmp_path / "bert", "bert", pair_tokenizer))
    config = AutoConfig.from_pretrained(tmp_path / "rm")
    assert config.reward_input == "text"
    got = build_reward(f'model("{tmp_path}/rm")')(["film 1 ?"], [" warm"])
    raw = alone(tmp_path / "rm", [pair_tokenizer("film 1 ? warm").input_ids])
    close(got, (raw - config.reward_mean) / config.reward_std)


def test_pairs_that_the_template_refuses_are_left_out_and_counted(tmp_path, chat_tokenizer, capsys):
    late = [says("user", "a film"), says("system", "late"), says("user", "well ?")]
    good, bad = says("assistant", "warm"), says("assistant", "dull")
    records = [{"prompt": f"film {i} ?", "chosen": "warm", "rejected": "dull"} for i in range(5)]
    refused = {"chosen": [*late, good], "rejected": [*late, bad]}
    backbone = save(tmp_path / "chat", "llama", chat_tokenizer)
    source = write(tmp_path / "a.jsonl", [*records, refused])
    train(tmp_path, source, "--model", backbone)
    assert f"1 of 6 examples are left out: late (first: {source}:6)" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "rm")
    source = write(tmp_path / "b.jsonl", [refused])
    with pytest.raises(SystemExit):
        train(tmp_path, source, "--model", backbone)
    error = capsys.readouterr().err
    assert f"{source}:1: --model {backbone}: its chat template refuses the dialogue" in error


def test_a_small_spread_is_kept_and_no_spread_is_1(tmp_path, monkeypatch):
    records = [{"prompt": f"film {i} ?", "chosen": " warm", "rejected": " dull"} for i in range(6)]
    source = write(tmp_path / "pairs.jsonl", records)
    monkeypatch.setattr(reward_model, "fit", lambda *arguments: None)
    for factor, expected in [(1e-9, 3e-9), (0.0, 1.0)]:

        def scores_of(scorer, pairs, factor=factor):
            n = len(pairs)
            return torch.full((n,), 5 * factor), torch.full((n,), -factor)

        monkeypatch.setattr(reward_model, "scores_of", scores_of)
        train(tmp_path, source)
        config = AutoConfig.from_pretrained(tmp_path / "rm")
        assert config.reward_std == pytest.approx(expected, rel=1e-6)
        assert config.reward_mean == pytest.approx(2 * factor, rel=1e-6)
        shutil.rmtree(tmp_path / "rm")


def test_a_mixture_is_fitted_to_the_messages_of_pairs(tmp_path, chat_tokenizer, monkeypatch):
    folder = save(tmp_path / "chat", "llama", chat_tokenizer)
    prompt = "\n\nHuman: film ?\n\nAssistant:"
    records = [{"prompt": prompt, "chosen": f" warm {i}", "rejected": " dull"} for i in range(3)]
    pairs = load_pairs(write(tmp_path / "pairs.jsonl", records))
    texts = spy(monkeypatch)
    build_reward(f'mixture(model("{folder}"), length)', mixture_pairs=pairs)
    answers = ["warm 0", "warm 1", "warm 2", "dull", "dull", "dull"]
    assert texts == [f"<s><|user|>film ?<|end|><|assistant|>{a}<|end|>" for a in answers]


# ---- sentence embeddings


def by_hand(folder, text, modes=("mean",), limit=64, transformer=""):
    """The embedding of one text: its first tokens with [CLS] and [SEP], alone, in doubles."""
    model = AutoModel.from_pretrained(Path(folder) / transformer).eval()
    tokenizer = AutoTokenizer.from_pretrained(Path(folder) / transformer)
    words = tokenizer(text, add_special_tokens=False).input_ids[: limit - 2]
    ids = [tokenizer.cls_token_id, *words, tokenizer.sep_token_id]
    hidden = model(input_ids=torch.tensor([ids])).last_hidden_state[0].detach().double()
    n = len(ids)
    ways = {
        "mean": hidden.sum(0) / n,
        "cls": hidden[0],
        "max": hidden.max(0).values,
        "lasttoken": hidden[n - 1],
        "mean_sqrt_len_tokens": hidden.sum(0) / math.sqrt(n),
        "weightedmean": sum(i * h for i, h in enumerate(hidden, 1)) / (n * (n + 1) / 2),
    }
    return torch.cat([ways[mode] for mode in modes])


def cosines(a, b, embed):
    rows = [torch.cosine_similarity(embed(x), embed(y), dim=0) for x, y in zip(a, b)]
    return torch.stack(rows).float()


LONG = " ".join(f"the plot {n} was dull" for n in range(70))
TEXTS = ["the plot was clever", "dull .", "", LONG + " warm", "The Music FELT warm"]
TARGETS = ["a warm film", LONG, "something", LONG, "the cast"]


def sts(folder, texts=TEXTS, targets=TARGETS):
    return build_reward(f'cosine_sts("{folder}")')(["p"] * len(texts), texts, target=targets)


@pytest.fixture
def encoder(tmp_path, pair_tokenizer):
    return Path(save(tmp_path / "encoder", "bert", pair_tokenizer, auto=AutoModel))


def put(folder, path, value):
    (folder / path).parent.mkdir(parents=True, exist_ok=True)
    (folder / path).write_text(json.dumps(value))


def modules(*steps, transformer=""):
    types = [kind if "." in kind else f"sentence_transformers.models.{kind}" for kind in steps]
    paths = [f"{i}_{kind}" for i, kind in enumerate(steps)]
    paths[0] = transformer
    return [
        {"idx": i, "name": str(i), "path": p, "type": t}
        for i, (p, t) in enumerate(zip(paths, types))
    ]


@pytest.mark.parametrize("old", [True, False])
@pytest.mark.parametrize(
    "modes",
    [
        ("mean",),
        ("cls",),
        ("max",),
        ("lasttoken",),
        ("mean_sqrt_len_tokens",),
        ("weightedmean",),
        ("cls", "max", "mean_sqrt_len_tokens"),
    ],
)
def test_cosine_sts_pools_as_the_folder_says(encoder, modes, old):
    switches = {
        f"pooling_mode_{name}": any(name.startswith(mode) for mode in modes)
        for name in ("cls_token", "max_tokens", "weightedmean_tokens", "lasttoken")
    }
    switches["pooling_mode_mean_tokens"] = "mean" in modes
    switches["pooling_mode_mean_sqrt_len_tokens"] = "mean_sqrt_len_tokens" in modes
    new = {"pooling_mode": modes[0] if len(modes) == 1 else list(modes)}
    put(encoder, "1_Pooling/config.json", switches if old else new)
    if old:
        put(encoder, "modules.json", modules("Transformer", "Pooling", "Normalize"))
    expected = cosines(TEXTS, TARGETS, lambda text: by_hand(encoder, text, modes))
    close(sts(encoder), expected)
    if modes != ("mean",):
        mean = cosines(TEXTS, TARGETS, lambda text: by_hand(encoder, text))
        # The square root of the length is a factor, which no cosine sees.
        assert (mean - expected).abs().max() > 0.01 or modes == ("mean_sqrt_len_tokens",)


def test_pooling_by_numbers():
    hidden = torch.tensor([[[3.0, -7.0], [-5.0, 2.0], [99.0, 99.0]], [[1.5, 4.0]] * 3])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    got = pool(hidden, mask, ("cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean"))
    root = 2**0.5
    expected = [3, -7, 3, 2, -1, -2.5, -2 / root, -5 / root, (3 - 10) / 3, (-7 + 4) / 3]
    torch.testing.assert_close(got[0], torch.tensor(expected))
    assert pool(hidden, mask, ("lasttoken",)).tolist() == [[-5.0, 2.0], [1.5, 4.0]]


def test_cosine_sts_cuts_at_max_seq_length_on_the_right(encoder):
    put(encoder, "modules.json", modules("Transformer", "Pooling"))
    put(encoder, "sentence_bert_config.json", {"max_seq_length": 11, "do_lower_case": True})
    got = sts(encoder)
    close(got, cosines(TEXTS, TARGETS, lambda text: by_hand(encoder, text.lower(), limit=11)))
    assert got[3] == pytest.approx(1, abs=1e-5), "both begin alike, and the rest is cut"
    wrong = cosines(TEXTS, TARGETS, lambda text: by_hand(encoder, text, limit=11))
    assert (wrong - got)[4].abs() > 1e-3, "lower case matters here"


def test_cosine_sts_of_other_encoders_is_the_mean_of_all_that_fits(encoder):
    close(sts(encoder), cosines(TEXTS, TARGETS, lambda text: by_hand(encoder, text)))


def test_cosine_sts_reads_a_transformer_in_a_folder_of_its_own(tmp_path, pair_tokenizer):
    inner = "0_Transformer"
    save(tmp_path / inner, "bert", pair_tokenizer, auto=AutoModel)
    put(tmp_path, "modules.json", modules("Transformer", "Pooling", transformer=inner))
    put(tmp_path, f"{inner}/sentence_roberta_config.json", {"max_seq_length": 9})
    put(tmp_path, "1_Pooling/config.json", {"pooling_mode_cls_token": True})

    def embed(text):
        return by_hand(tmp_path, text, ("cls",), limit=9, transformer=inner)

    close(sts(tmp_path), cosines(TEXTS, TARGETS, embed))


def test_cosine_sts_of_roberta_counts_its_positions_from_2(tmp_path, pair_tokenizer):
    config = dict(pad_token_id=1, max_position_embeddings=40)
    save(tmp_path, "roberta", pair_tokenizer, config, auto=AutoModel)
    close(sts(tmp_path), cosines(TEXTS, TARGETS, lambda text: by_hand(tmp_path, text, limit=38)))


@pytest.mark.parametrize(
    "path, value, message",
    [
        ("modules.json", modules("Transformer", "Pooling", "Dense"), "Transformer, Pooling, Dense"),
        ("modules.json", modules("Transformer"), "has the modules Transformer;"),
        ("modules.json", modules("Transformer", "Normalize", "Pooling"), "has the modules"),
        ("modules.json", modules("custom_st.Transformer", "Pooling"), "has the modules"),
        ("1_Pooling/config.json", {"pooling_mode": ["mean", "median"]}, "pooling mean, median"),
        ("config_sentence_transformers.json", {"default_prompt_name": "query"}, "prompt 'query'"),
        ("sentence_bert_config.json", {"transformer_task": "fill-mask"}, "to 'fill-mask'"),
        ("sentence_bert_config.json", {"config_args": {"x": 1}}, "sets config_args"),
        ("sentence_bert_config.json", {"modality_config": {"text": {"method": "f"}}}, "embeds"),
    ],
)
def test_cosine_sts_refuses_what_it_does_not_compute(encoder, path, value, message):
    put(encoder, "modules.json", modules("Transformer", "Pooling"))
    put(encoder, path, value)
    with pytest.raises(UserError, match=message) as caught:
        sts(encoder)
    assert str(encoder) in str(caught.value) and "\n" not in str(caught.value)


def test_cosine_sts_cannot_guess_what_it_cannot_look_up():
    with pytest.raises(UserError, match="modules.json cannot be looked up .*a downloaded folder"):
        sts("somebody/some-encoder")


def test_what_the_hub_does_not_have_is_absent(monkeypatch):
    """Absent by the cache, or by the hub itself; a name that is not cached is looked up."""

    def download(name, path):
        raise EntryNotFoundError(f"{name} has no {path}")

    monkeypatch.setattr(embeddings, "hf_hub_download", download)
    for known in (object(), None):
        monkeypatch.setattr(embeddings, "try_to_load_from_cache", lambda *_, known=known: known)
        assert embeddings._read_json("somebody/some-encoder", "modules.json") is None


def test_cosine_sts_of_a_real_encoder():
    """all-MiniLM-L6-v2: at most 256 tokens with [CLS] and [SEP], then the mean."""
    folder = Path(os.environ.get("MINILM", ROOT / "models" / "minilm"))
    if not folder.is_dir():
        pytest.skip("no folder of all-MiniLM-L6-v2: name one in the variable MINILM")
    texts = ["The cat sits outside.", "A man plays the guitar.", LONG * 3 + " the end", "", "naïve"]
    targets = ["A dog plays in the garden.", "Someone makes music.", LONG * 3, "nothing", LONG]
    got = sts(folder, texts, targets)
    expected = cosines(texts, targets, lambda text: by_hand(folder, text, limit=256))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


def test_the_tokenizer_of_a_reward_model_may_lack_a_pad_token(tmp_path, chat_tokenizer):
    folder = save(tmp_path, "llama", chat_tokenizer)
    _, tokenizer = load_judge(AutoModelForSequenceClassification, folder, "cpu")
    assert chat_tokenizer.pad_token is None and tokenizer.pad_token == tokenizer.eos_token
