"""Train by LLaMA-Factory, and start the adapter: python start.py llama_factory.yaml."""

from llamafactory.train.tuner import run_exp

from lora_init import StartCallback

if __name__ == "__main__":
    run_exp(callbacks=[StartCallback("eva", samples=512, learning_rate="measured")])
