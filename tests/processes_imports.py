"""What the server of `processes.py` imports before it forks."""

import torch.distributed.fsdp
import transformers.models.llama.modeling_llama

import lora_init.building.build
import lora_init.cli
import lora_init.collection.collect
import lora_init.comparison.compare
import lora_init.loading.batches
import tests.comparison.made
import tests.conftest

__all__ = ["lora_init", "tests", "torch", "transformers"]
