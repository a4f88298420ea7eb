"""Which tests need more than the oldest versions that the package works with."""

from importlib.metadata import version

import pytest
from packaging.version import Version


def older(library, release):
    return Version(version(library)) < Version(release)


OLD_TRANSFORMERS = older("transformers", "5.0")
OLD_PEFT = older("peft", "0.19")
# transformers fuses experts since 5.0, and PEFT has A and B on their sides of all of them since 0.19.1.
NO_FUSED_EXPERTS = OLD_TRANSFORMERS or older("peft", "0.19.1")
needs_experts_by_peft = pytest.mark.skipif(NO_FUSED_EXPERTS, reason="fused experts: transformers 5.0 and PEFT 0.19.1")
OLD_DATASETS = older("datasets", "4.1")  # reads no NaN in a JSON column of texts
# It takes a model without a config, but none whose config is None.
NO_CONFIG = {} if OLD_PEFT else None
needs_intruders = pytest.mark.skipif(OLD_PEFT, reason="PEFT reduces intruder dimensions since 0.19")
needs_fsdp_on_cpu = pytest.mark.skipif(older("torch", "2.7"), reason="torch 2.6 cannot run FSDP2 on a CPU")
needs_torchrun = pytest.mark.skipif(
    "debian" in version("torch"), reason="torchrun needs libuv, Debian's torch has none"
)


def needs_fused_experts():
    if OLD_TRANSFORMERS:
        pytest.skip("transformers fuses experts since 5.0")
