"""Statistics by several processes, each on its own part of the data, then training of the adapter by all of them.

    torchrun --nproc-per-node 2 examples/two_processes.py --output adapter

Model and data are random and made here, so it runs offline on a CPU in a few seconds. Started with python instead of
torchrun it does the same in one process.
"""

import argparse
import os
from pathlib import Path

import torch
from quickstart import make_batches, make_model
from torch import distributed
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

import lora_init


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("adapter"), help="adapter directory")
    output = parser.parse_args().output

    # As torchrun says; by itself one process. Statistics travel by gloo, also beside NCCL.
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29500"}.items():
        os.environ.setdefault(name, value)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()

    examples = [{name: row[0] for name, row in batch.items()} for batch in make_batches(192, seed=0)]
    sampler = DistributedSampler(examples, shuffle=True, seed=0)  # each process has examples of its own
    loader = DataLoader(examples, batch_size=8, sampler=sampler)

    # Every process calls it, and every process gets the same statistics.
    model = make_model()
    stats = lora_init.collect(model, loader, rank=4, progress=False)
    init = lora_init.build_adapter(stats, lora_init.allocate_ranks(stats, rank=4))
    if rank == 0:
        made = stats.provenance
        print(f"{distributed.get_world_size()} processes: {made.n_batches} batches, {made.n_samples} tokens")
        print(f"adapter written to {init.save_pretrained(output, overwrite=True)}")

    torch.manual_seed(0)
    parallel = DistributedDataParallel(init.apply(model))
    # A model of this size wants a higher rate than a real one, which trains at what `lora-init init` prints.
    optimizer = torch.optim.AdamW((p for p in parallel.parameters() if p.requires_grad), lr=2e-2)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        for batch in loader:
            loss = parallel(**batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0:
            print(f"epoch {epoch}: loss of the last batch here {float(loss):.3f}")
    del parallel  # before the group that it uses: after it, torch may wait for itself
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()
