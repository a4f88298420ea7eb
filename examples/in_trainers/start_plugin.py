"""Register the callback that starts the adapter, for ms_swift.yaml."""

from swift.callbacks import callbacks_map

from lora_init import StartCallback

callbacks_map["lora_init"] = lambda args, trainer: StartCallback("eva", samples=512, learning_rate="measured")
