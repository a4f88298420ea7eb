"""Data-driven starts and rank budgets for LoRA adapters."""

from __future__ import annotations

from importlib import import_module as _import_module
from logging import getLogger as _getLogger
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# bitsandbytes warns when PEFT imports it, also where nothing is quantized, that one kernel for processors is missing.
_getLogger("bitsandbytes.backends.cpu.ops").addFilter(lambda record: "gemm_4bit_forward" not in str(record.msg))

if TYPE_CHECKING:  # for mypy and editors; `__getattr__` resolves these names on first use, so that no torch is imported
    from lora_init.adapters.adapter_init import AdapterInit as AdapterInit
    from lora_init.adapters.base_weights import correct_base as correct_base
    from lora_init.adapters.measured_rate import learning_rate as learning_rate
    from lora_init.adapters.peft_eva import get_eva_state_dict as get_eva_state_dict
    from lora_init.adapters.peft_eva import initialize_lora_eva_weights as initialize_lora_eva_weights
    from lora_init.building.build import build_adapter as build_adapter
    from lora_init.building.initialize import initialize as initialize
    from lora_init.building.quantized import QuantizationErrors as QuantizationErrors
    from lora_init.building.step_size import find_step_size as find_step_size
    from lora_init.collection.collect import Interrupted as Interrupted
    from lora_init.collection.collect import collect as collect
    from lora_init.collection.losses import mean_loss as mean_loss
    from lora_init.comparison.compare import Comparison as Comparison
    from lora_init.comparison.compare import compare as compare
    from lora_init.errors import LoraInitError as LoraInitError
    from lora_init.keep.dial import dial as dial
    from lora_init.keep.dialed import Dial as Dial
    from lora_init.keep.replay import replay as replay
    from lora_init.layers.targets import Target as Target
    from lora_init.layers.targets import find_targets as find_targets
    from lora_init.loading.batches import load_batches as load_batches
    from lora_init.planning.allocate import RankAllocation as RankAllocation
    from lora_init.planning.allocate import allocate_ranks as allocate_ranks
    from lora_init.planning.policies import Policy as Policy
    from lora_init.rates.learning_rate import LearningRate as LearningRate
    from lora_init.serving.export import Exported as Exported
    from lora_init.serving.export import export_adapter as export_adapter
    from lora_init.serving.fit import FitReport as FitReport
    from lora_init.serving.fit import check_fit as check_fit
    from lora_init.serving.intruders import Intruders as Intruders
    from lora_init.serving.intruders import intruder_dimensions as intruder_dimensions
    from lora_init.serving.verify import Verification as Verification
    from lora_init.serving.verify import verify as verify
    from lora_init.serving.watch import ServingCallback as ServingCallback
    from lora_init.serving.watch import ServingWatch as ServingWatch
    from lora_init.starts.starts import Start as Start
    from lora_init.statistics.gradient_spectrum import GradientSpectrum as GradientSpectrum
    from lora_init.statistics.incremental_svd import IncrementalSVD as IncrementalSVD
    from lora_init.statistics.spectrum import ExactPCA as ExactPCA
    from lora_init.statistics.spectrum import Spectrum as Spectrum
    from lora_init.statistics.spectrum import principal_angles as principal_angles
    from lora_init.statistics.statistics import Provenance as Provenance
    from lora_init.statistics.statistics import Statistics as Statistics
    from lora_init.training.axolotl import axolotl as axolotl
    from lora_init.training.callback import StartCallback as StartCallback
else:
    # The module that each public name is imported from on first use. A test compares the table with the imports above.
    _HOMES = {
        "AdapterInit": "lora_init.adapters.adapter_init",
        "correct_base": "lora_init.adapters.base_weights",
        "Intruders": "lora_init.serving.intruders",
        "intruder_dimensions": "lora_init.serving.intruders",
        "learning_rate": "lora_init.adapters.measured_rate",
        "get_eva_state_dict": "lora_init.adapters.peft_eva",
        "initialize_lora_eva_weights": "lora_init.adapters.peft_eva",
        "build_adapter": "lora_init.building.build",
        "initialize": "lora_init.building.initialize",
        "QuantizationErrors": "lora_init.building.quantized",
        "find_step_size": "lora_init.building.step_size",
        "Interrupted": "lora_init.collection.collect",
        "collect": "lora_init.collection.collect",
        "mean_loss": "lora_init.collection.losses",
        "Comparison": "lora_init.comparison.compare",
        "compare": "lora_init.comparison.compare",
        "LoraInitError": "lora_init.errors",
        "dial": "lora_init.keep.dial",
        "Dial": "lora_init.keep.dialed",
        "replay": "lora_init.keep.replay",
        "Target": "lora_init.layers.targets",
        "find_targets": "lora_init.layers.targets",
        "load_batches": "lora_init.loading.batches",
        "RankAllocation": "lora_init.planning.allocate",
        "allocate_ranks": "lora_init.planning.allocate",
        "Policy": "lora_init.planning.policies",
        "LearningRate": "lora_init.rates.learning_rate",
        "Exported": "lora_init.serving.export",
        "export_adapter": "lora_init.serving.export",
        "FitReport": "lora_init.serving.fit",
        "check_fit": "lora_init.serving.fit",
        "Verification": "lora_init.serving.verify",
        "verify": "lora_init.serving.verify",
        "ServingCallback": "lora_init.serving.watch",
        "ServingWatch": "lora_init.serving.watch",
        "Start": "lora_init.starts.starts",
        "GradientSpectrum": "lora_init.statistics.gradient_spectrum",
        "IncrementalSVD": "lora_init.statistics.incremental_svd",
        "ExactPCA": "lora_init.statistics.spectrum",
        "Spectrum": "lora_init.statistics.spectrum",
        "principal_angles": "lora_init.statistics.spectrum",
        "Provenance": "lora_init.statistics.statistics",
        "Statistics": "lora_init.statistics.statistics",
        "axolotl": "lora_init.training.axolotl",
        "StartCallback": "lora_init.training.callback",
    }
    __all__ = sorted(_HOMES)

    def __getattr__(name):
        # `hasattr(lora_init, ...)` and star imports rely on this kind of error.
        if name not in _HOMES:
            raise AttributeError(f"module 'lora_init' has no attribute {name!r}")
        return getattr(_import_module(_HOMES[name]), name)

    def __dir__():
        return [*__all__, "__version__"]  # completion in a shell shows what is public, before it is imported
