"""Tiny models, tokenizers and paths that the tests share. All are built here, without a network."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"  # a hub look-up must fail at once, on a network too

from transformers import AutoConfig, AutoModelForCausalLM  # noqa: E402

from hybrid import HybridModel  # noqa: E402
from lm import build_tiny  # noqa: E402
from sources import make_reviews  # noqa: E402

SHARED = ROOT.parent / "shared" / "data"
REVIEWS = make_reviews(300)
# The flags of a run that takes seconds
FAST = (
    "--limit 60 --steps 6 --batch-size 4 --max-new-tokens 6 --eval-size 4 --eval-every 0 "
    "--device cpu --warmup-steps 0"
).split()

# model_type -> what its config needs to be tiny; the vocabulary is 61 and the width 32 everywhere
SMALL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)
ARCHITECTURES = {
    "gpt2": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64),
    "gpt_neo": dict(
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
        max_position_embeddings=64,
    ),
    "llama": SMALL,
    "gemma2": dict(SMALL, head_dim=8, final_logit_softcapping=5.0, sliding_window=64),
    "granite": dict(SMALL, logits_scaling=7.0, embedding_multiplier=3.0, residual_multiplier=0.5),
    "cohere": dict(SMALL, logit_scale=0.0625),
    "qwen2": SMALL,
    "mistral": SMALL,
    "phi": dict(SMALL, num_key_value_heads=4),
    "gpt_neox": dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    ),
    "opt": dict(
        hidden_size=32,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        word_embed_proj_dim=16,
    ),
    "bloom": dict(hidden_size=32, n_layer=2, n_head=4),
    "falcon": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False),
    "gptj": dict(n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    "gemma3_text": dict(SMALL, head_dim=8, final_logit_softcapping=5.0),
    "mamba": dict(hidden_size=32, num_hidden_layers=2, state_size=4),
    "lfm2": dict(SMALL, layer_types=["conv", "full_attention"], block_multiple_of=8),
    "minimax": dict(
        SMALL,
        head_dim=8,
        block_size=8,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["linear_attention", "full_attention"],
    ),
}


def build_lm(model_type: str, seed: int = 0, **changes) -> torch.nn.Module:
    """A random LM whose logits are far from uniform, so that a wrong mask or shift shows."""
    common = dict(vocab_size=61, pad_token_id=None, bos_token_id=1, eos_token_id=2)
    config = AutoConfig.for_model(model_type, **{**common, **ARCHITECTURES[model_type], **changes})
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4)
    return lm


def shaken(model: torch.nn.Module) -> torch.nn.Module:
    """A model with an adapter that matters: its B is no longer zero."""
    generator = torch.Generator().manual_seed(4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return model


@pytest.fixture(params=["gpt2", "llama"])
def model(request) -> HybridModel:
    """One model with learned positions, one with rotary ones: padding bugs hide in the second."""
    hybrid = HybridModel(build_lm(request.param))
    torch.manual_seed(1)
    torch.nn.init.normal_(hybrid.value_head.weight)
    return hybrid


@pytest.fixture(scope="session")
def tiny():
    """(LM, tokenizer) of the built-in task."""
    return build_tiny([example.prompt + example.target for example in REVIEWS])


@pytest.fixture(scope="session")
def tokenizer(tiny):
    return tiny[1]


@pytest.fixture(scope="session")
def tiny_folder(tiny, tmp_path_factory) -> Path:
    """A folder that `--model` may name: a random GPT-2 and the tokenizer of the built-in task."""
    folder = tmp_path_factory.mktemp("tiny-gpt2")
    config = AutoConfig.for_model(
        "gpt2",
        vocab_size=len(tiny[1]),
        bos_token_id=0,
        eos_token_id=0,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=64,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny[1].save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def padded_folder(tiny, tmp_path_factory) -> Path:
    """A model that embeds 165 rows more than its tokenizer has tokens, as Qwen and Pythia do."""
    folder = tmp_path_factory.mktemp("padded")
    ends = dict(bos_token_id=None, eos_token_id=tiny[1].eos_token_id, pad_token_id=None)
    config = AutoConfig.for_model("llama", vocab_size=len(tiny[1]) + 165, **SMALL, **ends)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tiny[1].save_pretrained(folder)
    return folder


@pytest.fixture
def shared() -> Path:
    """The folder with real models and data, for the tests that want it."""
    if not SHARED.is_dir():
        pytest.skip("no folder of real data beside the repository")
    return SHARED


def ragged_batch(seed: int = 0, rows: int = 8, vocab: int = 61):
    """Prompts and responses (lists of ids) of unequal lengths."""
    generator = torch.Generator().manual_seed(seed)

    def ids(low: int, high: int) -> list[int]:
        n = int(torch.randint(low, high, (1,), generator=generator))
        return torch.randint(3, vocab, (n,), generator=generator).tolist()

    return [ids(1, 9) for _ in range(rows)], [ids(1, 12) for _ in range(rows)]
