"""The documents keep their word: README.md, docs/*.md, CONTRIBUTING.md and tests/MISSION.md.

Every flag, metric, file, link, formula, picture, exercise, fork and command in them is checked.
The commands are run, shortened; hub models and hub datasets are replaced by small local ones.
"""

import argparse
import re
import shlex
import shutil
import subprocess
import sys

import datasets
import pytest
from conftest import FAST, ROOT
from script import Torchrun, run_script
from test_nodes import COMMANDS as two_machines
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

import compare
import evaluate
import report
from flags import make_parser
from prepare import ROLLOUT_FLAGS
from runs import read_rows
from train import ALGORITHMS, main

README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = {path.name: path.read_text(encoding="utf-8") for path in sorted(ROOT.glob("docs/*.md"))}
PAGES = [README, *DOCS.values()]
TEXT = "\n".join(PAGES)


def section(page: str, heading: str) -> str:
    """What stands under a heading of the second level."""
    return page.split(f"\n## {heading}\n", 1)[1].split("\n## ", 1)[0]


# ---- form: sizes and links


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.split()) <= 2600
    assert 150 <= len(README.splitlines()) <= 250
    assert max(map(len, README.splitlines())) <= 100
    assert README.count("](") >= 10


def is_table_or_diff(line: str) -> bool:
    return line.startswith(("|", "+ ", "- "))


@pytest.mark.parametrize("name", DOCS)
def test_a_document_says_what_it_is_for_and_has_narrow_lines(name):
    lines = DOCS[name].splitlines()
    assert lines[0].startswith("# ") and lines[2].startswith("This page ")
    assert not [line for line in lines if len(line) > 100 and not is_table_or_diff(line)]
    assert f"](docs/{name})" in README


def anchors(page: str) -> set[str]:
    """The anchors that GitHub makes of the headings of a page."""
    text = re.sub(r"```.*?```", "", page, flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "name", ["README.md", "CONTRIBUTING.md", "tests/MISSION.md", *(f"docs/{name}" for name in DOCS)]
)
def test_every_link_points_to_something(name):
    page = (ROOT / name).read_text(encoding="utf-8")
    page = re.sub(r"```.*?```|`[^`\n]+`", "", page, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)]+)\)", page):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target
    defined = set(re.findall(r"^\[(\w+)\]: https?://\S+$", page, re.MULTILINE))
    assert set(re.findall(r"\]\[(\w+)\]", page)) <= defined


# ---- content: flags, metrics, formulas


def flags_of_train() -> list[argparse.Action]:
    return [action for action in make_parser()._actions if action.dest != "help"]


def test_every_flag_is_used_and_explained():
    source = "".join(path.read_text(encoding="utf-8") for path in ROOT.glob("*.py"))
    given_on = {flag for entry in ALGORITHMS.values() for flag in entry.step_flags}
    given_on |= set(ROLLOUT_FLAGS)
    for action in flags_of_train():
        is_read = re.search(rf"\bargs\.{action.dest}\b", source) or action.dest in given_on
        assert is_read, f"--{action.dest} is never read"
        assert action.help and f"`{action.option_strings[0]}`" in TEXT, (
            f"{action.option_strings[0]} is not in the documents"
        )


def test_the_table_of_flags_has_every_flag_once_with_its_default():
    table = section(DOCS["flags-and-data.md"], "Flags")
    rows = re.findall(r"^\| `(--[\w-]+)` \| (\S+) \| .+ \|$", table, re.MULTILINE)
    defaults = {
        action.option_strings[0]: "-" if action.default is None else str(action.default)
        for action in flags_of_train()
    }
    assert len(rows) == len(defaults) and dict(rows) == defaults


@pytest.mark.slow
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
        "gate": ["--schedule", "gate", "--reward", f"{tmp_path}/r.py:f + sentiment"],
        "mix": ["--schedule", "mix"],
        "hints": ["--data", "sort", "--hints", 0.5],
        "dpo": ["--algorithm", "dpo"],
        "grpo": ["--algorithm", "grpo", "--group-size", 2, "--schedule", "mix"],
        "refs": refs,
        "taught": ["--model", tiny_folder, "--max-length", 40, "--teacher", tiny_folder]
        + ["--schedule", "mix"],
        "talk": ["--turns", 2, "--user-model", tiny_folder, "--max-length", 60],
    }
    (tmp_path / "r.py").write_text(
        "def f(completions, log_metric, **columns):\n"
        "    log_metric('letters', sum(map(len, completions)))\n"
        "    return [0.0] * len(completions)\n"
    )
    for name, flags in runs.items():
        main([*FAST, "--sft-warmup", "1", *map(str, flags), "--out", str(tmp_path / name)])
    rows = [row for name in runs for row in read_rows(tmp_path / name / "metrics.jsonl")]
    logged = {
        re.sub(r"(reward|reward_weight|reward_metric|ppo/kl)/.*", r"\1/<name>", name)
        for row in rows
        for name in row
    } - {"step", "phase"}
    as_ppo = {
        name
        for name in logged
        if name.startswith("grpo/") and name.replace("grpo/", "ppo/") in logged - {"ppo/sft_loss"}
    }
    glossary = section(DOCS["metrics.md"], "Glossary")
    documented = {
        name
        for cell in re.findall(r"^\| (`[^|]+) \|", glossary, re.MULTILINE)
        for name in re.findall(r"`([a-z_0-9/<>]+)`", cell)
    }
    assert logged - as_ppo == documented - {"grpo/<name>"}


@pytest.mark.parametrize("page, least", [(DOCS["equations.md"], 13), (README, 5)])
def test_every_formula_stands_in_the_file_that_is_named(page, least):
    table = page if page is not README else section(README, "The equations")
    rows = re.findall(
        r"^\| (?!what|---)(.+?) \| .* \| `([^`]+)` \| `(\w+\.py)` \|$", table, re.MULTILINE
    )
    assert len(rows) >= least and len(rows) == table.count("\n| ") - 1
    for what, line, file in rows:
        assert (ROOT / file).read_text(encoding="utf-8").count(line) == 1, what


def test_the_loop_in_twelve_lines_is_a_loop_that_trains():
    imports, preparation, loop = re.search(
        r"```python\n(from .*?)\n\n(.*?)\n\n(for .*?)```",
        section(README, "The loop in twelve lines"),
        re.DOTALL,
    ).groups()
    assert len(loop.splitlines()) == 12
    assert all(line.startswith("from ") for line in imports.splitlines())
    code = f"{imports}\n{preparation}\n{loop}"
    for long, short in (
        ("range(500)", "range(4)"),
        ("< 150", "< 2"),
        ('("reviews")', '("reviews", limit=100)'),
    ):
        assert code.count(long) == 1
        code = code.replace(long, short)
    exec(code, space := {})
    assert (
        space["step"] == 3
        and space["metrics"]["ppo/first_ratio_gap"] < 1e-5
        and space["reference"] is not None
    )


@pytest.mark.slow
def test_the_padding_exercise_is_caught_by_the_test_that_it_names(tmp_path):
    exercise = section(DOCS["exercises.md"], "Unmask the padding")
    diff = re.search(r"```diff\n(.*?)```", exercise, re.DOTALL).group(1)
    removed, added = (
        "".join(line[1:] + "\n" for line in diff.splitlines() if line[0] == sign) for sign in "-+"
    )
    for path in [*ROOT.glob("*.py"), ROOT / "tests/conftest.py", ROOT / "tests/test_data.py"]:
        (tmp_path / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(ROOT))
    source = (tmp_path / "data.py").read_text(encoding="utf-8")
    assert source.count(removed) == 1
    (tmp_path / "data.py").write_text(source.replace(removed, added), encoding="utf-8")
    command = re.search(r"`python (-m pytest -q tests/test_data.py)`", exercise).group(1)
    words = [*command.split(), "-k", "test_masks_come_from_lengths"]
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "FAILED tests/test_data.py::test_masks_come_from_lengths" in done.stdout
    ), done.stdout


def test_the_fork_in_the_documents_is_what_stands_in_train_py_and_in_flags_py():
    text = section(DOCS["extensions.md"], "A new algorithm")
    grpo, dpo, flags = (
        [line[1:] for line in diff.splitlines()]
        for diff in re.findall(r"```diff\n(.*?)```", text, re.DOTALL)[:3]
    )
    entry = re.search(r"```python\n(ALGORITHM = .*?)```", text, re.DOTALL).group(1)
    assert (ROOT / "dpo.py").read_text(encoding="utf-8").endswith(entry)
    assert "\n".join(flags) in (ROOT / "flags.py").read_text(encoding="utf-8")
    lines = (ROOT / "train.py").read_text(encoding="utf-8").splitlines()
    assert len(dpo) <= 10 and all(line in lines for line in dpo + grpo)
    for line in lines:  # and nothing about DPO stands elsewhere
        if re.search(r"dpo|args\.beta", line):
            assert line in dpo, line


# ---- the commands

BENCHMARKS = section(DOCS["results.md"], "Benchmarks")


def commands_of(text: str) -> list[str]:
    """Every command in a console block that starts with `python` or `torchrun`, but for the tests.

    A line that ends in a backslash goes on in the next one.
    """
    blocks = re.findall(r"```(?:bash|console)\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in re.sub(r"\s*\\\n\s*", " ", block).splitlines()]
    commands = [re.split(r"\s#\s", line)[0].strip() for line in lines]
    return [
        command
        for command in commands
        if command.startswith(("python ", "torchrun ")) and "pytest" not in command
    ]


def readme_commands() -> list[str]:
    """The commands of all pages, each once. The benchmarks need the hub and have their own test;
    those of two machines belong together, and tests/test_nodes.py runs them."""
    commands = dict.fromkeys(commands_of(TEXT.replace(BENCHMARKS, "")))
    return [command for command in commands if "--nnodes=" not in command]


def made_by(command: str) -> str | None:
    """The folder or file that a command leaves behind."""
    if "make_sums.py" in command:
        return "sums.jsonl"
    trains = " train.py" in command and "--resume" not in command and "--dry-run" not in command
    return re.search(r"--out (\S+)|$", command).group(1) or ("out" if trains else None)


def test_the_readmes_runs_do_not_get_in_each_others_way():
    commands = readme_commands()
    outs = [made_by(command) for command in commands if made_by(command)]
    assert len(commands) >= 15 and len(set(outs)) == len(outs)


def test_every_command_of_several_machines_is_one_of_the_pair_that_its_test_runs():
    assert [c for c in commands_of(TEXT) if "--nnodes=" in c] == two_machines and two_machines


@pytest.mark.parametrize("page", PAGES, ids=["README.md", *DOCS])
def test_a_command_stands_after_the_one_that_makes_what_it_needs(page):
    made = {made_by(command) for command in commands_of(README)} if page is not README else set()
    for command in commands_of(page):
        needed = re.findall(
            r"(?:[\s=\"'])(out[\w-]*|merged|reward|sums\.jsonl)(?=[/:\"'\s]|$)",
            re.sub(r"--out \S+", "", command),
        )
        assert set(needed) <= made, command
        assert all((ROOT / file).is_file() for file in re.findall(r"examples/[\w./]+", command))
        made.add(made_by(command))


@pytest.fixture(scope="module")
def readme_folder(tmp_path_factory, tiny_folder):
    """A fresh clone, as far as the commands see it, and a local model that is called gpt2."""
    folder = tmp_path_factory.mktemp("readme")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "examples", folder / "examples")
    shutil.copytree(tiny_folder, folder / "gpt2")
    chat_model = folder / "HuggingFaceTB" / "SmolLM2-135M-Instruct"
    shutil.copytree(tiny_folder, chat_model)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}<|endoftext|>{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    tokenizer.save_pretrained(chat_model)
    return folder


def shortened(comparison: list[str], jobs: int = 2) -> list[str]:
    """A command of compare.py, for one seed and two steps; what is appended goes to train.py."""
    cut = comparison.index("--") if "--" in comparison else len(comparison)
    flags = f"--seeds 1 --steps 2 --jobs {jobs}".split()
    for long, short in (("--steps", 2), ("--sft-warmup", 1)):  # in NAME=FLAGS, which is one word
        comparison = [re.sub(rf"{long} \d+", f"{long} {short}", word) for word in comparison]
    if "--untuned" not in comparison:
        flags += "--lrs 1e-3 --kl-coefs 0.1".split()
    return [*comparison[:cut], *flags, "--", *comparison[cut + 1 :]]


def train_here(children, command, environment, log):
    """A run of compare.py in this process."""
    main([*command[2:], "--device", "cpu"])
    return 0


@pytest.mark.slow
@pytest.mark.parametrize("command", readme_commands())
def test_a_readme_command_runs(readme_folder, command, monkeypatch):
    if "--deepspeed" in command:
        pytest.importorskip("deepspeed", reason="deepspeed is an optional package")
    if "compare.py" in command or "--plot" in command:
        pytest.importorskip("matplotlib", reason="matplotlib is an optional package")
    words = shlex.split(command.replace("--steps 800", "--steps 8"))[1:]
    if "train.py" in words and "--resume" not in words:
        warmup = ["--sft-warmup", "2"] if "--sft-warmup" in words else []
        words += [*FAST, *warmup, "--max-length", "32", "--batch-size", "8", "--overwrite"]
    if "compare.py" in words:
        words = [*shortened(words, jobs=1), *FAST[:2], *FAST[4:10], "--max-length", "40"]
        # Its runs as processes: tests/test_compare.py.
        monkeypatch.chdir(readme_folder)
        monkeypatch.setattr(compare.Children, "run", train_here)
        compare.main(words[1:])
        return
    if words[0] == "bench.py":
        words += "--texts 20 --rounds 1 --layers 1 --width 64 --vocab 64 --batch 2".split()
    if command.startswith("torchrun"):
        if sys.platform != "linux":
            pytest.skip("Torchrun is made of forks")
        words = ["--standalone", *words]
        status, said = Torchrun(words, readme_folder, readme_folder / "log").wait()
        assert status == 0 and "verdict:" in said, said[-2000:]
        return
    if words[0] in ("-c", "-m", "bench.py"):  # the last one starts processes
        done = subprocess.run(
            [sys.executable, *words], cwd=readme_folder, capture_output=True, text=True, timeout=120
        )
    else:
        done = run_script(words, readme_folder, "the plot was\n")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip()


def story(i: int) -> dict:
    return {"text": f"Once upon a time {i} small cats sat down. They were glad and warm."}


def line_of_a_book(i: int) -> dict:
    return {"text": "" if i % 2 else f" The plot was the {i}th of its kind . \n"}


def film(i: int) -> dict:
    text = f"I saw this film {i} times and the acting was warm and the plot was bold."
    return {"text": text, "label": i % 2}


def truth(i: int) -> dict:
    return {
        "type": "Adversarial",
        "category": "Films",
        "question": f"Is film {i} good?",
        "best_answer": "No one knows",
        "correct_answers": ["No one knows"],
        "incorrect_answers": ["It is good", "It is bad"],
        "source": "http://films",
    }


def grade_school(i: int) -> dict:
    return {
        "question": f"Ann has {i} films and buys 2 more. How many has she?",
        "answer": f"{i} + 2 = <<{i}+2={i + 2}>>{i + 2}\n#### {i + 2}",
    }


HUB = {  # id -> what its records look like there
    "roneneldan/TinyStories": story,
    "wikitext": line_of_a_book,
    "imdb": film,
    "truthful_qa": truth,
    "openai/gsm8k": grade_school,
}


@pytest.mark.slow
@pytest.mark.parametrize("command", commands_of(BENCHMARKS))
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

    def run_here(children, command, environment, log):
        tiny = (
            "--steps 2 --batch-size 4 --eval-size 2 --max-length 48 --max-new-tokens 4 --device cpu"
        )
        main([*command[2:], *tiny.split()])
        return 0

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", from_the_hub)
    monkeypatch.setattr(compare.Children, "run", run_here)
    monkeypatch.setattr(
        compare, "load_pyplot", lambda what: None
    )  # matplotlib is an optional package
    monkeypatch.setattr(report, "draw_pareto", lambda *given: None)
    monkeypatch.setattr(report, "draw_razor", lambda *given: None)
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
    program, *words = shlex.split(command)[1:]
    if program == "compare.py":
        compare.main(shortened(words, jobs=1))
        assert "| hybrid |" in capsys.readouterr().out
    else:
        evaluate.main(words)
        assert "perplexity " in capsys.readouterr().out


# ---- what the documents name

WRITTEN_BY_A_RUN = {
    "metrics.jsonl",
    "samples.jsonl",
    "skipped.jsonl",
    "config.json",
    "compare.json",
    "compare.md",
}


def test_every_row_of_the_mission_has_a_command_that_is_run_here_and_a_test_that_exists():
    table = (ROOT / "tests/MISSION.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| .* \| `(.+)` \| `(\w+\.py)::(\w+)` \|$", table, re.MULTILINE)
    assert len(rows) >= 21 and len(rows) == table.count("\n| ") - 1
    for command, file, test in rows:
        assert command in readme_commands(), command
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8"), test


def test_the_files_that_the_readme_names_exist():
    pages = TEXT + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    for name in set(re.findall(r"`((?:\w+/)?\w+\.(?:py|txt|md|jsonl|json))`", pages)):
        if name not in WRITTEN_BY_A_RUN:
            assert (ROOT / name).is_file(), name


def test_the_examples_are_tiny_and_every_one_is_used():
    for path in (ROOT / "examples").rglob("*"):
        name = path.relative_to(ROOT).as_posix()
        if path.is_file() and "__pycache__" not in name:
            most = 60_000 if name == "examples/chat/manners.jsonl" else 10_000
            assert name in TEXT and path.stat().st_size < most, name
    function = re.search(r"```python\n(def politeness.*?)```", DOCS["rewards.md"], re.DOTALL)
    assert function.group(1) in (ROOT / "examples/my_rewards.py").read_text(encoding="utf-8")


def test_the_pictures_are_there_and_small():
    shown = re.findall(r"!\[[^\]]+\]\((?:\.\./)?(images/\S+)\)", TEXT)
    assert len(shown) >= 3 and {ROOT / path for path in shown} == set((ROOT / "images").iterdir())
    assert all((ROOT / path).stat().st_size < 100_000 for path in shown)


def test_the_reading_order_table_lists_every_module():
    for path in ROOT.glob("*.py"):
        assert f"`{path.name}`" in TEXT or f"[{path.name}]({path.name})" in README, path.name
