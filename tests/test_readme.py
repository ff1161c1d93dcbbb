"""The README keeps its word: every flag, metric, file, formula, number of a schedule, exercise, fork, mission and command in it is checked here."""

import argparse
import json
import re
import shlex
import shutil
import subprocess
import sys
from types import SimpleNamespace

import datasets
import pytest
from conftest import FAST, ROOT
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import compare
import evaluate
from runs import read_rows
from train import main, parse_args

README = (ROOT / "README.md").read_text(encoding="utf-8")


def flags_of_train() -> list[argparse.Action]:
    seen = []
    original = argparse.ArgumentParser.parse_args
    argparse.ArgumentParser.parse_args = lambda self, argv=None: (
        seen.extend(self._actions) or original(self, argv)
    )
    try:
        parse_args([])
    finally:
        argparse.ArgumentParser.parse_args = original
    return [action for action in seen if action.dest != "help"]


def test_every_flag_is_used_and_explained():
    source = "".join((ROOT / name).read_text() for name in ("train.py", "dpo.py", "data.py"))
    for action in flags_of_train():
        assert re.search(rf"\bargs\.{action.dest}\b", source), f"--{action.dest} is never read"
        assert action.help and f"`{action.option_strings[0]}`" in README, (
            f"{action.option_strings[0]} is not in the README"
        )


def test_every_logged_metric_is_in_the_glossary_and_no_other(tmp_path, tiny_folder):
    refs = [
        "--model",
        tiny_folder,
        "--max-length",
        40,
        "--ref-model",
        f"a={tiny_folder}",
        "--ref-model",
        f"b={tiny_folder}",
    ]
    runs = {
        "mixture": ["--reward", "sentiment + mixture(length, repetition)"],
        "self": ["--reward", "self_play(length)", "--schedule", "buffer"],
        "gate": ["--schedule", "gate"],
        "mix": ["--schedule", "mix"],
        "dpo": ["--algorithm", "dpo"],
        "grpo": ["--algorithm", "grpo", "--group-size", 2, "--schedule", "mix"],
        "refs": refs,
        "talk": ["--turns", 2, "--user-model", tiny_folder, "--max-length", 60],
    }
    for name, flags in runs.items():
        main([*FAST, "--sft-warmup", "1", *map(str, flags), "--out", str(tmp_path / name)])
    rows = [row for name in runs for row in read_rows(tmp_path / name / "metrics.jsonl")]
    logged = {
        re.sub(r"(reward|reward_weight|ppo/kl)/.*", r"\1/<name>", name)
        for row in rows
        for name in row
    } - {"step", "phase"}
    as_ppo = {
        name
        for name in logged
        if name.startswith("grpo/") and name.replace("grpo/", "ppo/") in logged - {"ppo/sft_loss"}
    }
    glossary = README.split("## Metrics", 1)[1].split("\n## ", 1)[0]
    documented = {
        name
        for cell in re.findall(r"^\| (`[^|]+) \|", glossary, re.MULTILINE)
        for name in re.findall(r"`([a-z_0-9/<>]+)`", cell)
    }
    assert logged - as_ppo == documented - {"grpo/<name>"}


def test_every_formula_stands_in_the_file_that_is_named():
    table = README.split("## The equations", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(
        r"^\| (?!what|---)(.+?) \| .* \| `([^`]+)` \| `(\w+\.py)` \|$", table, re.MULTILINE
    )
    assert len(rows) >= 13 and len(rows) == table.count("\n| ") - 1
    for what, line, file in rows:
        assert (ROOT / file).read_text().count(line) == 1, what


def test_the_loop_in_twelve_lines_is_a_loop_that_trains():
    imports, loop = re.search(
        r"## The loop in twelve lines\n\n```python\n(.*?)\n\n(.*?)```", README, re.DOTALL
    ).groups()
    assert len(loop.splitlines()) == 12 and all(
        line.startswith("from ") for line in imports.splitlines()
    )
    for long, short in (
        ("range(700)", "range(4)"),
        ("< 210", "< 2"),
        ('("reviews")', '("reviews", limit=100)'),
    ):
        assert loop.count(long) == 1
        loop = loop.replace(long, short)
    exec(f"{imports}\n{loop}", space := {})
    assert (
        space["step"] == 3
        and space["metrics"]["ppo/first_ratio_gap"] < 1e-5
        and space["reference"] is not None
    )


def test_the_padding_exercise_is_caught_by_the_test_that_it_names(tmp_path):
    exercise = README.split("**Unmask the padding.**", 1)[1].split("\n## ", 1)[0]
    diff = re.search(r"```diff\n(.*?)```", exercise, re.DOTALL).group(1)
    removed, added = (
        "".join(line[1:] + "\n" for line in diff.splitlines() if line[0] == sign) for sign in "-+"
    )
    for path in [*ROOT.glob("*.py"), ROOT / "tests/conftest.py", ROOT / "tests/test_data.py"]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    source = (tmp_path / "data.py").read_text()
    assert source.count(removed) == 1
    (tmp_path / "data.py").write_text(source.replace(removed, added))
    command = re.search(r"`python (-m pytest -q tests/test_data.py)`", exercise).group(1)
    done = subprocess.run(
        [sys.executable, *command.split()], cwd=tmp_path, capture_output=True, text=True
    )
    assert (
        done.returncode == 1
        and "FAILED tests/test_data.py::test_masks_come_from_lengths" in done.stdout
    ), done.stdout


def test_the_fork_in_the_readme_is_what_stands_in_train_py():
    fork, sampling = (
        [line[1:] for line in diff.splitlines()]
        for diff in re.findall(
            r"```diff\n(.*?)```", README.split("**A new algorithm**", 1)[1], re.DOTALL
        )
    )
    lines = (ROOT / "train.py").read_text().splitlines()
    assert len(fork) <= 10 and all(line in lines for line in fork + sampling)
    for line in lines:  # and nothing about DPO stands elsewhere
        if re.search(r"dpo|preference_|args\.beta|pair_stream", line) and not re.search(
            r"mixture", line
        ):
            assert line in fork, line


BENCHMARKS = README.split("## Benchmarks", 1)[1].split("\n## ", 1)[0]


def readme_commands(text: str = README.replace(BENCHMARKS, "")) -> list[str]:
    """Every line that starts with `python` in a console block, but for the test command itself. The benchmarks need the hub, and have a test of their own."""
    blocks = re.findall(r"```(?:bash|console)\n(.*?)```", text, re.DOTALL)
    lines = [re.split(r"\s#\s", line)[0].strip() for block in blocks for line in block.splitlines()]
    return [
        line for line in lines if line.startswith(("python ", "torchrun ")) and "pytest" not in line
    ]


def test_the_readmes_runs_do_not_get_in_each_others_way():
    commands = readme_commands()
    outs = [
        re.search(r"--out (\S+)|$", command).group(1) or "out"
        for command in commands
        if " train.py" in command and "--resume" not in command and "--dry-run" not in command
    ]
    assert len(commands) >= 15 and len(set(outs)) == len(outs)


@pytest.fixture(scope="module")
def readme_folder(tmp_path_factory, tiny_folder):
    """What the commands refer to: the code, a run, a model called gpt2, data files."""
    folder = tmp_path_factory.mktemp("readme")
    for path in ROOT.glob("*.py"):
        (folder / path.name).symlink_to(path)
    (folder / "gpt2").symlink_to(tiny_folder)
    (folder / "questions.jsonl").write_text(
        "".join(json.dumps({"turns": [f"Question {i}?", "And then?"]}) + "\n" for i in range(9))
    )
    (folder / "zero.json").write_text('{"zero_optimization": {"stage": 2}}')
    (folder / "my_rewards.py").write_text(
        re.search(r"```python\n(# my_rewards\.py\n.*?)```", README, re.DOTALL).group(1)
    )
    (folder / "my_data.jsonl").write_text(
        "".join(
            json.dumps({"prompt": f"Question {i}?", "target": f"Answer {i}."}) + "\n"
            for i in range(9)
        )
    )
    scored = {"prompt": "p", "completion": "the cat sat", "target": "the cat sat down"}
    (folder / "scored.jsonl").write_text(json.dumps(scored) + "\n")
    pairs = [{"prompt": f"q{i}", "chosen": "a good answer", "rejected": "bad"} for i in range(9)]
    (folder / "prefs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "reviews.txt").write_bytes("un café noir sans sucre\n".encode("latin-1") * 9)
    return folder


def shortened(comparison: list[str], jobs: int = 2) -> list[str]:
    """Flags of compare.py, for one seed and two steps; what is appended goes to train.py."""
    ours, theirs = (
        (comparison[: comparison.index("--")], comparison[comparison.index("--") :])
        if "--" in comparison
        else (comparison, ["--"])
    )
    return [*ours, *f"--seeds 1 --steps 2 --lrs 1e-3 --kl-coefs 0.1 --jobs {jobs}".split(), *theirs]


@pytest.mark.parametrize("command", readme_commands())
def test_a_readme_command_runs(readme_folder, command):
    if "--deepspeed" in command:
        pytest.importorskip("deepspeed", reason="deepspeed is an optional package")
    launcher = (
        [] if command.startswith("python") else ["-m", "torch.distributed.run", "--standalone"]
    )
    words = [
        sys.executable,
        *launcher,
        *shlex.split(command.replace("--steps 800", "--steps 8"))[1:],
    ]
    if "train.py" in words and "--resume" not in words:
        words += [*FAST, "--max-length", "32", "--batch-size", "8", "--overwrite"]
    if "compare.py" in words:
        pytest.importorskip("matplotlib", reason="matplotlib is an optional package")
        words = [*shortened(words), *FAST[:2], *FAST[4:10], "--max-length", "40"]
    if words[1] == "bench.py":
        words += [
            "--texts",
            "20",
            "--rounds",
            "1",
            *"--layers 1 --width 64 --vocab 64 --batch 2".split(),
        ]
    done = subprocess.run(
        words,
        cwd=readme_folder,
        capture_output=True,
        text=True,
        input="the plot was\n",
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


HUB = {  # id -> what its records look like there
    "roneneldan/TinyStories": lambda i: {"text": f"Once upon a time {i} small cats sat down. They were glad and warm."},
    "wikitext": lambda i: {"text": "" if i % 2 else f" The plot was the {i}th of its kind . \n"},
    "imdb": lambda i: {"text": f"I saw this film {i} times and the acting was warm and the plot was bold.", "label": i % 2},
    "truthful_qa": lambda i: {
        "type": "Adversarial", "category": "Films", "question": f"Is film {i} good?", "best_answer": "No one knows", "correct_answers": ["No one knows"],
        "incorrect_answers": ["It is good", "It is bad"], "source": "http://films",
    },
    "openai/gsm8k": lambda i: {"question": f"Ann has {i} films and buys 2 more. How many has she?", "answer": f"{i} + 2 = <<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}"},
}  # fmt: skip


@pytest.mark.parametrize("command", readme_commands(BENCHMARKS))
def test_a_benchmark_runs_on_records_like_those_of_the_hub(
    command, tmp_path, tiny_folder, monkeypatch, capsys
):
    def from_the_hub(name, config=None, split="train", streaming=False):
        assert (config, split) in {
            "wikitext": [("wikitext-2-raw-v1", "test")],
            "truthful_qa": [("generation", "validation")],
            "openai/gsm8k": [("main", "train")],
        }.get(name, [(None, "train")])
        return datasets.Dataset.from_list([HUB[name](i) for i in range(40)])

    def run_here(command, **options):
        main(
            [
                *command[2:],
                *"--steps 2 --batch-size 4 --eval-size 2 --max-length 48 --max-new-tokens 4 --device cpu".split(),
            ]
        )
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", from_the_hub)
    monkeypatch.setattr(compare, "subprocess", SimpleNamespace(run=run_here))
    monkeypatch.setattr(
        compare, "load_pyplot", lambda what: None
    )  # matplotlib is an optional package
    monkeypatch.setattr(compare, "pareto", lambda results, path: None)
    for name in ("gpt2", "roneneldan/TinyStories-1M"):
        shutil.copytree(tiny_folder, tmp_path / name)
    classifier = AutoConfig.for_model(
        "distilbert",
        vocab_size=1000,
        dim=16,
        hidden_dim=16,
        n_layers=1,
        n_heads=2,
        id2label={0: "NEGATIVE", 1: "POSITIVE"},
    )
    AutoModelForSequenceClassification.from_config(classifier).save_pretrained(
        tmp_path / "lvwerra/distilbert-imdb"
    )
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "lvwerra/distilbert-imdb")
    file, *words = shlex.split(command)[1:]
    if file == "compare.py":
        compare.main(shortened(words, jobs=1))
        assert "| hybrid |" in capsys.readouterr().out
    else:
        evaluate.main(words)
        assert "perplexity " in capsys.readouterr().out


def test_every_row_of_the_mission_has_a_command_that_is_run_here_and_a_test_that_exists():
    table = README.split("## The mission, row by row", 1)[1].split("\n## ", 1)[0]
    rows = re.findall(r"^\| .* \| `(.+)` \| `(\w+\.py)::(\w+)` \|$", table, re.MULTILINE)
    assert len(rows) >= 21 and len(rows) == table.count("\n| ") - 1
    for command, file, test in rows:
        assert command in readme_commands(), command
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(), test


def test_the_files_that_the_readme_names_exist():
    for name in set(re.findall(r"`((?:tests/)?\w+\.(?:py|txt|md))`", README)) - {"my_rewards.py"}:
        assert (ROOT / name).is_file(), name


def test_the_pictures_are_there_and_small():
    shown = re.findall(r"!\[[^\]]+\]\((images/\S+)\)", README)
    assert len(shown) >= 3 and {ROOT / path for path in shown} == set((ROOT / "images").iterdir())
    assert all((ROOT / path).stat().st_size < 100_000 for path in shown)


def test_the_reading_order_table_lists_every_module():
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in README, path.name
