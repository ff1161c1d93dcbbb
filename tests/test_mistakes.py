"""Everything a user can get wrong, in one table: exit status 2, one line that says what to do,
before any training."""

import json
import shutil

import pytest
import torch
from conftest import build_lm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import train
from train import main


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_folder):
    """A folder with every kind of broken model, data and reward that the table names."""
    root = tmp_path_factory.mktemp("mistakes")

    def model(name, **changes):
        shutil.copytree(tiny_folder, root / name)
        return root / name

    model("good")
    model("trained/final")
    (root / "empty").mkdir()
    (model("no_config") / "config.json").unlink()
    (model("bad_config") / "config.json").write_text("{")
    (model("no_weights") / "model.safetensors").unlink()
    cut = model("cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:2000])
    (model("garbage") / "model.safetensors").write_bytes(b"\x00" * 5000)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (root / "good" / file).exists() and shutil.copy(root / "good" / file, root / file)
    no_tokenizer = model("no_tokenizer")
    for path in no_tokenizer.glob("tokenizer*"):
        path.unlink()
    lm = AutoModelForCausalLM.from_pretrained(tiny_folder)
    lm.resize_token_embeddings(50)
    lm.save_pretrained(model("small_vocab"))
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(model("no_eos"))
    AutoConfig.for_model("vit").save_pretrained(model("vision"))
    config = AutoConfig.for_model(
        "t5", vocab_size=64, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2
    )
    config.save_pretrained(model("encoder_decoder"))
    build_lm("gpt2", n_positions=8, vocab_size=len(tokenizer)).save_pretrained(model("short"))
    half = json.loads((root / "good" / "config.json").read_text())
    half["n_layer"] = 3
    (model("missing_layer") / "config.json").write_text(json.dumps(half))

    def data(name, content):
        (root / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    for name, config in (
        ("zero3", {"stage": 3}),
        ("zero", {"stage": 2}),
        ("zero_fp16", {"stage": 1}),
    ):
        more = {"fp16": {"enabled": True}} if name == "zero_fp16" else {}
        data(f"{name}.json", json.dumps({"zero_optimization": config, **more}))
    data("zero0.json", "{}")
    data("zero_odd.json", '{"zero_optimization": 2}')
    data("good.jsonl", '{"prompt": "a b", "target": "c d"}\n' * 5)
    data("empty.jsonl", "")
    data("blank.jsonl", "\n\n")
    data("broken.jsonl", '{"prompt": "p", "target": "t"}\n{"prompt": \n')
    data("list.jsonl", '{"prompt": "p", "target": "t"}\n[]\n')
    data("latin.txt", "one two\nun café\n".encode("latin-1"))
    data("binary.txt", bytes(range(256)))
    data("no_target.jsonl", '{"prompt": "p"}\n')
    data("no_prompt.jsonl", '{"target": "p"}\n')
    data("typo.jsonl", '{"prompt": "p", "compeltion": "t"}\n')
    data("number.jsonl", '{"prompt": "p", "target": 5}\n')
    data("empty_target.jsonl", '{"prompt": "p", "target": "t"}\n{"prompt": "p", "target": "  "}\n')
    data("role.jsonl", '{"messages": [{"role": "alien", "content": "x"}]}\n')
    data("no_assistant.jsonl", '{"messages": [{"role": "system", "content": "x"}]}\n')
    data("messages_text.jsonl", '{"messages": "x"}\n')
    data("content.jsonl", '{"messages": [{"role": "assistant", "content": 3}]}\n')
    data("one_word.txt", "word\nother\n")
    data("ragged.csv", "prompt,target\na,b\nc,d,e,f\n")
    data("header.csv", "prompt,target\n")
    data("table.xlsx", b"PK")
    data("not.parquet", b"PAR1 nothing")
    data("prefs.jsonl", '{"prompt": "p", "chosen": "a b", "rejected": "c"}\n')
    data("pairs.jsonl", '{"prompt": "p", "chosen": "a b"}\n')
    data("same.jsonl", '{"prompt": "p", "chosen": "a", "rejected": "a"}\n')
    data(
        "r.py",
        "def boom(**k): raise RuntimeError('no')\n"
        "def short(completions, **k): return [1.0]\n"
        "def nan(completions, **k): return [float('nan')] * len(completions)\n",
    )
    data(
        "r2.py",
        "def text(completions, **k): return ['x'] * len(completions)\n"
        "def none(completions, **k): return None\nnumber = 3\n",
    )
    data("syntax.py", "def f(:\n")
    data("file", "x")
    (root / "used").mkdir()
    data("used/config.json", "{}")
    (root / "trl").mkdir()
    (root / "trl" / "checkpoint-500").mkdir()
    return root


MISTAKES = [
    # models
    ("--model no/such", "could not be fetched from the Hugging Face hub"),
    ("--model ./nowhere", "expected a Hugging Face model folder"),
    ("--model {root}/empty", "expected a Hugging Face model folder"),
    ("--model {root}/no_config", "expected a Hugging Face model folder"),
    ("--model {root}/bad_config", "cannot be read as a causal LM"),
    ("--model {root}/no_weights", "cannot be read as a causal LM"),
    ("--model {root}/cut", "cannot be read as a causal LM"),
    ("--model {root}/garbage", "cannot be read as a causal LM"),
    ("--model {root}/vision", "cannot be read as a causal LM"),
    ("--model {root}/encoder_decoder", "cannot be read as a causal LM"),
    ("--model {root}/missing_layer", "lacks"),
    ("--model {root}/no_tokenizer", "has no tokenizer"),
    ("--model {root}/trained", "trained is a run folder; its model is in"),
    ("--model {root}/small_vocab", "the model embeds only 50"),
    ("--model {root}/no_eos", "has no EOS token"),
    ("--model {root}/good --max-length 65", "beyond the model's context of 64"),
    ("--model {root}/short", "leaves no room for a prompt in --max-length 8"),
    ("--ref-model no/such", "--ref-model no/such is no local folder"),
    ("--ref-model {root}/good", "another vocabulary"),
    ("--model {root}/good --ref-model {root}/short --max-length 40", "has a context of 8 tokens"),
    # data
    ("--data nowhere.jsonl", "nowhere.jsonl does not exist"),
    ("--data no/such", "could not be fetched from the Hugging Face hub"),
    ("--data {root}", "is a folder"),
    ("--data {root}/empty.jsonl", "is empty"),
    ("--data {root}/blank.jsonl", "is empty"),
    ("--data {root}/broken.jsonl", "broken.jsonl:2: not valid JSON"),
    ("--data {root}/list.jsonl", "list.jsonl:2: expected a JSON object"),
    ("--data {root}/latin.txt", "latin.txt:2: byte 0xe9"),
    ("--data {root}/latin.txt --encoding klingon", "not an encoding that Python knows"),
    ("--data {root}/binary.txt", "is not utf-8"),
    ("--data {root}/no_target.jsonl", "has no target to learn from"),
    ("--data {root}/no_prompt.jsonl", "no_prompt.jsonl:1: no prompt field"),
    ("--data {root}/good.jsonl --prompt-field title", "no prompt field: looked for title"),
    ("--data {root}/good.jsonl --target-field body", "no target field: looked for body"),
    ("--data {root}/number.jsonl", "number.jsonl:1: field 'target' must be a string, found int"),
    ("--data {root}/empty_target.jsonl --strict", "empty_target.jsonl:2: field 'target' is empty"),
    ("--data {root}/role.jsonl", "role.jsonl:1: unknown role 'alien'"),
    ("--data {root}/no_assistant.jsonl", "no_assistant.jsonl:1: 'messages' has no user turn"),
    ("--data {root}/messages_text.jsonl", "must be a list of {{role, content}}"),
    ("--data {root}/content.jsonl", "field 'content' must be a string"),
    ("--data {root}/one_word.txt", "one_word.txt:1: the text has fewer than two words"),
    ("--data {root}/ragged.csv", "ragged.csv:3: 4 cells, but the header names 2 columns"),
    ("--data {root}/nothing*.jsonl", "matches no file"),
    ("--data {root}/typo.jsonl", "did you mean --target-field compeltion?"),
    ("--template-args [1]", "--template-args: expected a JSON object"),
    ("--data {root}/header.csv", "holds no record that can be used"),
    ("--data {root}/table.xlsx", "unknown ending"),
    ("--data {root}/not.parquet", "not.parquet cannot be read"),
    # numbers
    ("--steps 0", "--steps: expected a whole number at least 1, found '0'"),
    ("--steps -5", "--steps: expected a whole number at least 1"),
    ("--steps 1.5", "--steps: expected a whole number"),
    ("--batch-size zero", "--batch-size: expected a whole number"),
    ("--micro-batch-size 0", "--micro-batch-size"),
    ("--micro-batch-size 2 --grad-accum 2", "say the same in two ways"),
    ("--deepspeed {root}/none.json", "is no JSON file"),
    ("--deepspeed {root}/zero3.json", "ZeRO-3 splits the weights"),
    ("--deepspeed {root}/zero0.json", "or 2, found stage None"),
    ("--deepspeed {root}/zero_fp16.json", "fp16 is set by train.py's flags"),
    ("--deepspeed {root}/zero.json", "start with torchrun --nproc_per_node=2"),
    (
        "--deepspeed {root}/zero.json --optimizer muon",
        "goes with --optimizer adamw, adam or sgd only",
    ),
    ("--deepspeed {root}/zero.json --amp fp16", "goes with --amp bf16 or no"),
    ("--deepspeed {root}/zero_odd.json", "or 2, found stage None"),
    ("--algorithm dpo --kl-coef 0.3", "--kl-coef belongs to ppo and grpo and does nothing here"),
    ("--beta 0.3", "--beta belongs to dpo and does nothing here"),
    ("--preference-data {root}/good.jsonl", "--preference-data belongs to dpo"),
    ("--threshold 0.3", "--threshold belongs to gate and buffer"),
    ("--algorithm grpo --group-size 4 --whiten-rewards", "--whiten-rewards belongs to ppo"),
    ("--algorithm grpo --group-size 3", "expected a divisor of --batch-size"),
    ("--algorithm dpo --preference-data {root}/none.jsonl", "none.jsonl does not exist"),
    ("--algorithm dpo --schedule mix", "samples nothing"),
    ("--schedule gate --ppo-ratio 0.3", "follows the scores, not --ppo-ratio"),
    ("--turn-rewards", "are for dialogues"),
    ("--turns 2 --user-model {root}/good --reward self_play(bleu)", "it needs --turn-rewards"),
    ("--ref-model a={root}/good:1.2.3", "expected a number above 0"),
    (
        "--ref-model a={root}/good --ref-model a={root}/good --model {root}/good --max-length 40",
        "a name of its own",
    ),
    (
        "--ref-model a={root}/good --ref-model b={root}/good --ref-refresh 2",
        "not a mixture of several",
    ),
    ("--dry-run --model {root}/no_config", "has no config that can be read"),
    ("--max-new-tokens 0", "--max-new-tokens"),
    ("--max-length 1", "--max-length: expected a whole number at least 2"),
    ("--limit 0", "--limit"),
    ("--lr 0", "--lr: expected a number above 0"),
    ("--lr nan", "--lr: expected a number above 0, found 'nan'"),
    ("--lr inf", "--lr: expected a number above 0, found 'inf'"),
    ("--lr -1e-3", "--lr"),
    ("--temperature 0", "--temperature: expected a number at least 0.01"),
    ("--kl-coef -1", "--kl-coef: expected a number at least 0"),
    ("--kl-target 0", "--kl-target: expected a number above 0"),
    ("--kl-target 6 --kl-coef 0", "--kl-target needs a --kl-coef above 0"),
    ("--kl-target 6 --kl-horizon 1", "--kl-horizon of at least the batch"),
    ("--gamma 1.1", "--gamma: expected a number at least 0 and at most 1"),
    ("--lam -0.1", "--lam"),
    ("--cliprange 0", "--cliprange"),
    ("--vf-coef nan", "--vf-coef"),
    ("--ppo-ratio 2", "--ppo-ratio: expected a number at least 0 and at most 1"),
    ("--ppo-ratio half", "--ppo-ratio"),
    ("--ppo-ratio 0:0.5:1", "--ppo-ratio: expected a number or start:end"),
    ("--sft-warmup 5 --steps 5", "--sft-warmup 5 leaves no PPO step"),
    ("--max-new-tokens 32 --max-length 32", "leaves no room for a prompt"),
    ("--seed -1", "--seed"),
    ("--seed 99999999999999999999", "--seed"),
    ("--keep 0", "--keep"),
    # rewards
    ("--reward blue", "cannot read 'blue'; known are bleu"),
    ("--reward sentimnt", "did you mean sentiment?"),
    ("--reward bleu+", "is not an expression"),
    ("--reward bleu/2", "cannot read 'bleu / 2'"),
    ("--reward length(target=-3)", "expected a number above 0"),
    ("--reward length(size=3)", "cannot read 'length(size=3)'"),
    ("--reward mixture(bleu)", "at least two rewards"),
    ("--reward clip(bleu)", "cannot read 'clip(bleu)'"),
    ("--reward {root}/none.py:f", "there is no file"),
    ("--reward {root}/r.py:absent", "no function of that name"),
    ("--reward {root}/r2.py:number", "no function of that name"),
    ("--reward {root}/syntax.py:f", "importing the file raised SyntaxError"),
    ("--reward {root}/r.py:boom", "reward 'boom' raised RuntimeError: no"),
    ("--reward {root}/r.py:short", "reward 'short' must return a list of 2 floats"),
    ("--reward {root}/r.py:nan", "reward 'nan' gave nan, not a finite number"),
    ("--reward {root}/r2.py:text", "reward 'text' gave 'x', not a finite number"),
    ("--reward {root}/r2.py:none", "it returned NoneType"),
    ("--reward truthful", "needs the fields correct_answers and incorrect_answers"),
    ("--reward classifier('no/such')", "reward model no/such cannot be loaded"),
    ("--reward sentiment(lexicon='no.txt')", "no.txt cannot be read"),
    ("--reward bleu --mixture-data {root}/prefs.jsonl", "and --reward 'bleu' has none"),
    (
        "--reward mixture(self_play(length),length) --mixture-data {root}/prefs.jsonl",
        "does not go with self_play",
    ),
    (
        "--turns 2 --user-model {root}/good --max-new-tokens 64 --max-length 200",
        "no room for a dialogue",
    ),
    (
        "--reward mixture(bleu,length) --mixture-data {root}/pairs.jsonl",
        "pairs.jsonl:1: a preference pair has 'chosen' and 'rejected', the record has prompt",
    ),
    (
        "--reward mixture(bleu,length) --mixture-data {root}/same.jsonl",
        "same.jsonl:1: 'chosen' and 'rejected' are the same",
    ),
    # run folders, devices, choices
    ("--out {root}/file", "cannot be written"),
    ("--out {root}/file/below", "cannot be written"),
    ("--out /proc/run", "cannot be written"),
    ("--out {root}/used", "already holds a run (config.json)"),
    ("--out {root}/trl", "already holds a run (checkpoint-500)"),
    ("--resume {root}/empty", "nothing to resume there"),
    ("--resume nowhere", "nothing to resume there"),
    ("--device cuda:9", "--device cuda:9 cannot be used here"),
    ("--device tpu", "--device tpu cannot be used here"),
    ("--optimizer adamax", "invalid choice: 'adamax'"),
    ("--scheduler step", "invalid choice: 'step'"),
    ("--kl-estimator k4", "invalid choice: 'k4'"),
    ("--log disk", "invalid choice: 'disk'"),
    ("--modle tiny", "unrecognized arguments: --modle tiny"),
    ("--steps", "expected one argument"),
]


def test_the_table_is_long_enough():
    assert len(MISTAKES) >= 60 and len({flags for flags, _ in MISTAKES}) == len(MISTAKES)


@pytest.mark.parametrize(
    "flags, message", MISTAKES, ids=[flags.replace("/", ":") for flags, _ in MISTAKES]
)
def test_a_mistake_is_one_line_and_stops_before_training(
    place, tmp_path, capsys, monkeypatch, flags, message
):
    monkeypatch.setattr(train, "sft_step", lambda *a, **k: pytest.fail("training began"))
    monkeypatch.chdir(tmp_path)
    words = flags.format(root=place).split(" ")
    before = sorted(str(path) for path in place.rglob("*"))
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        main([*([] if "--resume" in words else ["--out", "run"]), "--limit", "20", *words])
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert caught.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), error
    assert message.format() in lines[0], lines[0]
    assert not (tmp_path / "run").exists() and before == sorted(
        str(path) for path in place.rglob("*")
    ), "nothing is written"


def test_half_weights_are_no_mistake(place, tmp_path):
    """Weights saved in half precision are read in full."""
    lm = AutoModelForCausalLM.from_pretrained(place / "good", dtype=torch.float16)
    shutil.copytree(place / "good", tmp_path / "half")
    lm.save_pretrained(tmp_path / "half")
    main(
        (
            f"--model {tmp_path}/half --limit 20 --steps 2 --batch-size 2 "
            f"--max-new-tokens 4 --eval-size 2 --device cpu --out {tmp_path}/run"
        ).split()
    )
