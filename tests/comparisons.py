"""A tiny model, tiny data and the arguments of a comparison that takes seconds."""

import json
import random

from tests.cli.test_app import WORDS, save_model
from tests.conftest import tiny_bert, tiny_llama


def make_home(home, n_rows=120):
    """Write `llama`, `bert` and `rows.jsonl`: six words, three options of which the first word of the row is right."""
    save_model(tiny_llama(), home / "llama")
    save_model(tiny_bert(), home / "bert")
    rng = random.Random(0)
    rows = []
    for _ in range(n_rows):
        words = rng.sample(WORDS, 6)
        options = rng.sample([word for word in WORDS if word not in words], 2) + words[:1]
        rng.shuffle(options)
        right = options.index(words[0])
        rows.append(
            {
                "passage": " ".join(words),
                "options": "\n".join(f"{letter}. {option}" for letter, option in zip("ABC", options, strict=True)),
                "answer": f"{'ABC'[right]}. {words[0]}",
                "listed": options,
                "letter": "ABC"[right],
                "position": right,
                "first": min(words[0], "n")[0],
                "empty": "",
                "text": " ".join(words),
            }
        )
    (home / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return home


SMALL = dict(
    template="{passage}", completion=" {listed}", steps=6, batch_size=4, validation_samples=12, rank=2,
    learning_rates=(1e-3, 1e-2), seeds=2, statistics_batches=8, evaluation_points=[3],
)  # fmt: skip
