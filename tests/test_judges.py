"""Judges: tiny local models against Hugging Face's own forward."""

import json
import math
import types

import pytest
import torch
from conftest import build_lm
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

import reward_model
from data import Pair, load_pairs
from engine import UserError
from judges import perplexity
from rewards import build_reward

TEXTS = [
    "the plot was really clever",
    "dull .",
    "",
    "the music felt warm and the cast was funny and the finale remained superb .",
]
PROMPTS = ["the hero", "a", "", "the villain was very"]
TARGETS = ["the script was clever", "dull !", "something", "the music was warm"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tiny_folder):
    """Tiny classifiers of two architectures, with labels, and a causal LM.

    The tokenizer is the built-in task's, without a pad token."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    made = {"lm": str(tiny_folder)}
    bert = dict(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=64,
    )
    llama = dict(bert, num_key_value_heads=2)
    kinds = {
        "sentiment": ("bert", bert, {0: "NEGATIVE", 1: "POSITIVE"}, {}),
        "toxic": (
            "bert",
            bert,
            {0: "toxic", 1: "threat", 2: "insult"},
            dict(problem_type="multi_label_classification"),
        ),
        "nli": ("bert", bert, {0: "contradiction", 1: "neutral", 2: "entailment"}, {}),
        "scalar": ("llama", llama, {0: "LABEL_0"}, {}),
        "bleurt": ("bert", bert, {0: "LABEL_0"}, {}),
    }
    for name, (kind, sizes, labels, extra) in kinds.items():
        torch.manual_seed(len(made))
        config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes, **extra)
        config.id2label, config.label2id = labels, {label: i for i, label in labels.items()}
        model = AutoModelForSequenceClassification.from_config(config)
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.data.mul_(5)
        folder = tmp_path_factory.mktemp(name)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        made[name] = str(folder)
    return made


def one_by_one(folder, texts, pairs=None):
    """The oracle: each text alone, unpadded, through Hugging Face's own classifier. (N, C)"""
    model, tokenizer = (
        AutoModelForSequenceClassification.from_pretrained(folder).eval(),
        AutoTokenizer.from_pretrained(folder),
    )
    rows = []
    for i, text in enumerate(texts):
        ids = tokenizer(text, pairs[i] if pairs else None, return_tensors="pt")
        if ids["input_ids"].shape[1] == 0:
            ids = tokenizer(tokenizer.eos_token, return_tensors="pt")
        rows.append(model(**ids).logits[0].detach())
    return torch.stack(rows)


def score(expression, **columns):
    columns = {"target": TARGETS, **columns}
    return build_reward(expression)(PROMPTS, TEXTS, **columns)


def test_classifier(folders):
    logits = one_by_one(folders["sentiment"], TEXTS)
    for label in ('label="POSITIVE"', 'label="positive"', "label=1", ""):
        separator = ", " if label else ""
        torch.testing.assert_close(
            score(f'classifier("{folders["sentiment"]}"{separator}{label})'),
            logits.softmax(-1)[:, 1],
            atol=1e-5,
            rtol=0,
        )
    toxic = score(f'classifier("{folders["toxic"]}", label="threat")')
    torch.testing.assert_close(
        toxic, one_by_one(folders["toxic"], TEXTS).sigmoid()[:, 1], atol=1e-5, rtol=0
    )
    with pytest.raises(UserError, match="the model's labels are toxic, threat, insult"):
        score(f'classifier("{folders["toxic"]}", label="rude")')


def test_reward_model_reads_the_last_real_token_of_prompt_and_completion(folders):
    joined = [p + t for p, t in zip(PROMPTS, TEXTS)]
    torch.testing.assert_close(
        score(f'model("{folders["scalar"]}")'),
        one_by_one(folders["scalar"], joined)[:, 0],
        atol=1e-4,
        rtol=0,
    )
    with pytest.raises(UserError, match="has 2 classes, expected 1 score"):
        score(f'model("{folders["sentiment"]}")')


def test_padding_and_an_eos_in_the_text_do_not_move_the_last_token(folders):
    """pad == EOS here; Hugging Face would take a trailing EOS for padding."""
    from classifiers import load_judge, sequence_logits, tokenize

    model, tokenizer = load_judge(AutoModelForSequenceClassification, folders["scalar"], "cpu")
    ends_in_eos = tokenize(tokenizer, model, ["the plot<|endoftext|>"])
    alone = sequence_logits(model, **ends_in_eos)
    padded = tokenize(
        tokenizer, model, ["the plot<|endoftext|>", "the music felt warm and the cast was funny"]
    )
    torch.testing.assert_close(sequence_logits(model, **padded)[0], alone[0], atol=1e-5, rtol=0)
    left = {name: torch.cat([torch.zeros_like(x[:, :2]), x], dim=1) for name, x in padded.items()}
    hidden = model.base_model(
        **{k: v for k, v in left.items() if k != "token_type_ids"}
    ).last_hidden_state[:, -1]
    torch.testing.assert_close(
        sequence_logits(model, **left)[1], model.score(hidden[1]), atol=1e-5, rtol=0
    )


def test_nli_and_bleurt(folders):
    p = one_by_one(folders["nli"], TARGETS, TEXTS).softmax(-1)
    torch.testing.assert_close(
        score(f'nli("{folders["nli"]}")'), p[:, 2] - p[:, 0], atol=1e-5, rtol=0
    )
    torch.testing.assert_close(
        score(f'bleurt("{folders["bleurt"]}")'),
        one_by_one(folders["bleurt"], TARGETS, TEXTS)[:, 0],
        atol=1e-5,
        rtol=0,
    )
    with pytest.raises(
        UserError, match="expected labels entailment and contradiction, found NEGATIVE, POSITIVE"
    ):
        score(f'nli("{folders["sentiment"]}")')


def test_cosine_sts(folders):
    model, tokenizer = (
        AutoModel.from_pretrained(folders["sentiment"]).eval(),
        AutoTokenizer.from_pretrained(folders["sentiment"]),
    )

    def embed(text):
        ids = tokenizer(text or tokenizer.eos_token, return_tensors="pt")
        return model(**ids).last_hidden_state[0].mean(0)

    expected = torch.stack(
        [torch.cosine_similarity(embed(a), embed(b), dim=0) for a, b in zip(TEXTS, TARGETS)]
    )
    torch.testing.assert_close(
        score(f'cosine_sts("{folders["sentiment"]}")'), expected, atol=1e-5, rtol=0
    )


def test_gptscore_is_the_mean_log_probability_after_the_template(folders):
    lm, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folders["lm"]).eval(),
        AutoTokenizer.from_pretrained(folders["lm"]),
    )
    got = score(
        f'gptscore("{folders["lm"]}", template="about {{topic}}: {{prompt}}")', topic=list("abcd")
    )
    for i in (0, 1, 3):
        before, after = (
            tokenizer(f"about {'abcd'[i]}: {PROMPTS[i]}").input_ids,
            tokenizer(TEXTS[i]).input_ids,
        )
        loss = lm(
            input_ids=torch.tensor([before + after]),
            labels=torch.tensor([[-100] * len(before) + after]),
        ).loss
        assert got[i] == pytest.approx(-loss.item(), abs=1e-4)
    assert got[2] == pytest.approx(-math.log(len(tokenizer))), (
        "an empty completion scores like a guess"
    )
    with pytest.raises(UserError, match="asks for 'subject'"):
        score(f'gptscore("{folders["lm"]}", template="{{subject}}")')


def test_local_judge_gives_the_expected_grade_over_the_digits(folders):
    from judges import DEFAULT_RUBRIC, QUESTION

    lm, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folders["lm"]).eval(),
        AutoTokenizer.from_pretrained(folders["lm"]),
    )
    got = score(f'judge("{folders["lm"]}", top=3)')
    question = QUESTION.format(rubric=DEFAULT_RUBRIC, prompt=PROMPTS[0], completion=TEXTS[0], top=3)
    logits = lm(torch.tensor([tokenizer(question).input_ids[-64:]])).logits[0, -1]
    digits = [tokenizer(str(d)).input_ids[0] for d in (1, 2, 3)]
    expected = float((logits[digits].softmax(0) * torch.tensor([1.0, 2, 3])).sum())
    assert got[0] == pytest.approx((expected - 1) / 2, abs=1e-5) and ((got >= 0) & (got <= 1)).all()


def test_a_local_judge_does_not_think_before_the_digit(folders, tmp_path):
    """What a template that knows `enable_thinking` writes is what one with the words in it does."""
    scores = []
    for template in (
        "{% if enable_thinking is false %}<think></think>{% endif %}",
        "<think></think>",
    ):
        tokenizer = AutoTokenizer.from_pretrained(folders["lm"])
        tokenizer.chat_template = "{{ messages[0].content[:30] }} the plot" + template
        folder = tmp_path / str(len(scores))
        AutoModelForCausalLM.from_pretrained(folders["lm"]).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        scores.append(score(f'judge("{folder}", rubric="was dull")').tolist())
    assert scores[0] == scores[1]


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_perplexity_equals_hugging_faces_loss(architecture, tokenizer):
    lm = build_lm(architecture, vocab_size=len(tokenizer)).eval()
    texts, contexts = (
        ["the plot was dull .", "music", " the cast felt very warm and the script was flat ."],
        ["the plot", "a", ""],
    )
    for given in (contexts, None):
        for value, text, context in zip(
            perplexity(lm, tokenizer, texts, given, batch_size=2), texts, given or [""] * 3
        ):
            before = tokenizer(context).input_ids or [tokenizer.eos_token_id]
            ids = tokenizer(text).input_ids
            labels = torch.tensor([[-100] * len(before) + ids])
            loss = lm(input_ids=torch.tensor([before + ids]), labels=labels).loss
            assert math.log(value) == pytest.approx(loss.item(), abs=1e-4)


def test_perplexity_never_rewards_silence(tokenizer):
    lm = build_lm("llama", vocab_size=len(tokenizer))
    assert perplexity(lm, tokenizer, [""]) == [math.inf]
    reward = build_reward("perplexity", model=lm, tokenizer=tokenizer)
    scores = reward(["the plot", "the plot"], ["", " was dull ."])
    assert scores[0] == 0 and 0 < scores[1] <= 1


def test_the_judges_tokenizer_may_be_another_one(folders, shared):
    tokenizer = AutoTokenizer.from_pretrained(shared / "stories260K")
    assert len(tokenizer) != len(AutoTokenizer.from_pretrained(folders["lm"]))
    other = build_reward(f'gptscore("{shared}/stories260K")')(
        ["Once upon"] * 2, [" a time, there was a girl.", " qq zx ##!"]
    )
    assert other[0] > other[1] + 2


def test_judges_see_long_texts_and_odd_ones(folders):
    texts = ["", " ", "the plot " * 2000, "😀" * 50, "\u0000", "混合 текст"]
    for expression in (
        f'classifier("{folders["sentiment"]}")',
        f'model("{folders["scalar"]}")',
        f'nli("{folders["nli"]}")',
        f'gptscore("{folders["lm"]}")',
        f'judge("{folders["lm"]}", top=3)',
        f'cosine_sts("{folders["sentiment"]}")',
    ):
        scores = build_reward(expression)(["p"] * 6, texts, target=["t"] * 6)
        assert torch.isfinite(scores).all(), expression


@pytest.mark.parametrize(
    "name", ["classifier", "model", "nli", "bleurt", "cosine_sts", "gptscore", "judge"]
)
def test_a_judge_that_cannot_be_loaded_is_one_line(name):
    with pytest.raises(UserError) as caught:
        build_reward(f'{name}("no/such-model")')
    assert "no/such-model" in str(caught.value)


def test_comet_is_optional_and_maps_the_fields(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "comet", None)
    with pytest.raises(UserError, match="pip install unbabel-comet"):
        build_reward('comet("Unbabel/wmt22-comet-da")')

    class Model:
        def predict(self, data, batch_size, gpus):
            assert set(data[0]) == {"src", "mt", "ref"}
            return types.SimpleNamespace(scores=[float(len(row["mt"])) for row in data])

    fake = types.SimpleNamespace(
        download_model=lambda id: id, load_from_checkpoint=lambda path: Model()
    )
    monkeypatch.setitem(sys.modules, "comet", fake)
    assert score('comet("Unbabel/wmt22-comet-da")').tolist() == [float(len(text)) for text in TEXTS]


def test_a_causal_lm_is_no_classifier(folders):
    with pytest.raises(
        UserError, match=r"lacks 1 weight \(score.weight\) of .*: it was not trained for this use"
    ):
        build_reward(f'classifier("{folders["lm"]}")')


# ---- preferences and the reward model


def test_pairs_in_both_formats(tmp_path):
    lines = [
        {"prompt": "p", "chosen": " good", "rejected": " bad", "source": "x"},
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: hello there",
            "rejected": "\n\nHuman: hi\n\nAssistant: go away",
        },
        {
            "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: yes",
            "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: no",
        },
        {"prompt": "p", "chosen": "same", "rejected": "same"},
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, lines)))
    pairs = load_pairs(str(tmp_path / "pairs.jsonl"))
    assert pairs[0] == Pair("p", " good", " bad", {"source": "x"}) and len(pairs) == 3
    said = [{"role": "user", "content": "hi"}]
    prompt = "\n\nHuman: hi\n\nAssistant:"
    assert pairs[1] == Pair(prompt, " hello there", " go away", messages=said)
    assert pairs[2].prompt.endswith("Human: c\n\nAssistant:") and (
        pairs[2].chosen,
        pairs[2].rejected,
    ) == (" yes", " no")
    (tmp_path / "bad.jsonl").write_text(json.dumps({"chosen": "a", "rejected": "b"}))
    with pytest.raises(UserError, match=r"bad.jsonl:1: the record has no prompt"):
        load_pairs(str(tmp_path / "bad.jsonl"))


def test_reward_model_loss():
    same, apart = torch.tensor([1.5, -2.0]), torch.tensor([2.5, -2.0], requires_grad=True)
    assert reward_model.reward_model_loss(same, same).item() == pytest.approx(math.log(2))
    loss = reward_model.reward_model_loss(apart, same)
    assert loss.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(2)) / 2)
    loss.backward()
    assert (apart.grad < 0).all(), "raising the chosen score lowers the loss"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A reward model on pairs whose rule is easy: praise is preferred to blame."""
    from data import BLAME, PRAISE, make_reviews

    folder = tmp_path_factory.mktemp("preferences")
    rows = []
    for i, example in enumerate(make_reviews(600)):
        good, bad = (
            " ".join(
                words[(i + k) % len(words)] if w in PRAISE + BLAME else w
                for k, w in enumerate(example.target.split())
            )
            for words in (PRAISE, BLAME)
        )
        rows.append({"prompt": example.prompt, "chosen": " " + good, "rejected": " " + bad})
    (folder / "prefs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metrics = reward_model.main(
        ["--data", str(folder / "prefs.jsonl"), "--out", str(folder / "reward"), "--device", "cpu"]
    )
    return folder, metrics


@pytest.mark.slow
def test_an_easy_rule_is_learnt(trained):
    _, metrics = trained
    assert metrics["accuracy"] > 0.95 and metrics["pairs"] > 30


def test_the_saved_model_is_plain_calibrated_and_what_the_reward_reads(trained):
    folder, _ = trained
    model, report = AutoModelForSequenceClassification.from_pretrained(
        folder / "reward", output_loading_info=True
    )
    assert (
        not report["missing_keys"]
        and not report["unexpected_keys"]
        and model.config.num_labels == 1
    )
    pairs = load_pairs(str(folder / "prefs.jsonl"))
    reward = build_reward(f'model("{folder}/reward")')
    texts = [p.chosen for p in pairs] + [p.rejected for p in pairs]
    scores = reward([p.prompt for p in pairs] * 2, texts)
    assert scores.mean().abs() < 0.1 and scores.std() == pytest.approx(1, abs=0.1), (
        "calibrated on its own training responses"
    )
    raw = one_by_one(
        folder / "reward", [pairs[0].prompt + pairs[0].chosen, pairs[0].prompt + pairs[0].rejected]
    )[:, 0]
    expected = (raw - model.config.reward_mean) / model.config.reward_std
    torch.testing.assert_close(scores[[0, len(pairs)]], expected, atol=1e-4, rtol=0)


def test_pairs_with_one_prompt_are_split_all_the_same(tmp_path):
    rows = [
        {"prompt": "", "chosen": "a warm film", "rejected": f"a dull film {i}"} for i in range(60)
    ]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    metrics = reward_model.main(
        ["--data", str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "rm"), "--device", "cpu"]
    )
    assert 0 < metrics["pairs"] < 20, "a tenth or so is held out, not everything"


def test_the_head_starts_as_published():
    model, _ = reward_model.load_backbone("tiny", [Pair("a", "b c d", "e f g")] * 3, seed=0)
    assert (
        model.score.weight.std().item() == pytest.approx(193**-0.5, rel=0.2)
        and model.score.bias is None
    )


def test_reward_model_mistakes(trained, capsys):
    folder, _ = trained
    for argv, message in [
        (["--data", "nowhere.jsonl"], "does not exist"),
        (
            [
                "--data",
                str(folder / "prefs.jsonl"),
                "--model",
                "./nowhere",
                "--out",
                str(folder / "x"),
            ],
            "cannot be loaded as a classifier",
        ),
        (["--data", str(folder / "prefs.jsonl"), "--out", str(folder)], "already exists"),
    ]:
        with pytest.raises(SystemExit) as caught:
            reward_model.main(argv)
        assert caught.value.code == 2 and message in capsys.readouterr().err
