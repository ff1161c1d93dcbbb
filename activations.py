"""What autograd keeps of a model's forward pass: counted by torch itself, without weights or data.

The model runs on fake tensors, which have a shape and a type and no memory, and a hook sees each
tensor that is saved for the backward pass. So every architecture is counted as it is: grouped
heads, width of the MLP, --amp. Here transformers makes the mask of packed rows (lm.py); rows that
are not packed need none, and keep up to a tenth less. Left out on purpose: the head and the loss
(`cost.py` has their formula), a model whose shapes depend on its data (a mixture of experts).

    python train.py --model gpt2 --dry-run
"""

import logging

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM

from lm import disable_dropout, fuse_activations

# Bytes of a Llama block for each token, layer and element of the hidden state, and under --amp.
LLAMA, LLAMA_AMP = 85, 58


class FakeModel:
    """A causal LM of this config, of fake tensors on the CPU."""

    def __init__(self, config):
        self.mode = FakeTensorMode()
        with self.mode:
            self.lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        disable_dropout(self.lm)  # as HybridModel does: a mask of dropout would be kept too
        fuse_activations(self.lm)
        self.lm.train()

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.lm.parameters())

    def kept(self, length: int, amp: torch.dtype | None) -> list[float] | None:
        """Bytes for each token of each tensor that is kept for the backward pass, in rows of
        `length` tokens; None where the shapes depend on the data."""
        # torch logs what it raises; the caller says it in one line.
        logging.getLogger("torch._subclasses.fake_tensor").setLevel(logging.CRITICAL)
        try:
            two, three = self._kept(2, length, amp), self._kept(3, length, amp)
        except RuntimeError:
            return None
        # What is there once, whatever the number of rows (low-precision weights, the tables of
        # rotary positions, masks), cancels out.
        return [(b - a) / length for a, b in zip(two, three, strict=True) if b > a]

    def _kept(self, rows: int, length: int, amp: torch.dtype | None) -> list[int]:
        """Bytes of each tensor that is kept, in the order in which they are saved."""
        weights = {p.untyped_storage()._cdata for p in self.lm.parameters()}
        seen = {}  # by storage: views of one tensor count once; holding it keeps its id unique

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in weights:
                seen[storage._cdata] = storage
            return tensor

        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with self.mode, hooks, torch.autocast("cpu", amp, enabled=amp is not None):
            ids = torch.zeros(rows, length, dtype=torch.long)  # (rows, length)
            self.lm.base_model(input_ids=ids, use_cache=False)
        return [storage.nbytes() for storage in seen.values()]
