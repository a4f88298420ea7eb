"""`python -m lora_init` is `lora-init`."""

from lora_init.cli.app import main

if __name__ == "__main__":
    main()
