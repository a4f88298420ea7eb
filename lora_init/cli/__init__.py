"""The command line `lora-init`. Thin: it reads arguments, calls the package, prints."""

from lora_init.cli.app import main

__all__ = ["main"]
