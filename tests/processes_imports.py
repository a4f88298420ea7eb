"""What the server of `processes.py` imports before it forks."""

import torch.distributed.fsdp
import transformers.models.llama.modeling_llama

import lora_init.adapter
import lora_init.cli
import lora_init.collection
import lora_init.data
import tests.conftest

__all__ = ["lora_init", "tests", "torch", "transformers"]
