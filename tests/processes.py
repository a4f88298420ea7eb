"""Run a function of a test in several fresh processes of one gloo group, with a limit on the time."""

import datetime
import faulthandler
import importlib
import json
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
import uuid
from pathlib import Path

# A server that has imported what takes seconds, and has done nothing else, forks the processes. It has one thread: the
# allocator that pyarrow brings would start another.
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.processes_imports"])

# The first lines of a program that reads `lora_init` again: from a folder, or with what is installed there.
ANEW = """
import sys
for name in [name for name in sys.modules if name.partition(".")[0] == "lora_init"]:
    del sys.modules[name]
sys.path.insert(0, {folder!r})
"""


class Processes:
    """`size` processes that run `function(rank, size, folder, *arguments)`, which returns what JSON can hold.

    Named variables are put into their environment. With MASTER_PORT they are what torchrun's processes are: without a
    process group yet, but able to find each other.

    Attributes:
        running: The processes, by rank.
    """

    def __init__(self, function, size, folder, *arguments, **environment):
        self._folder = folder / f"{function.__name__}-{uuid.uuid4().hex[:8]}"
        self._folder.mkdir()
        environment.setdefault("MEET", f"tcp://localhost:{free_port()}")
        common = (function.__module__, function.__name__, self._folder, folder, size, arguments, environment)
        self.running = [FORKS.Process(target=_child, args=(*common, rank), daemon=True) for rank in range(size)]
        for process in self.running:
            process.start()

    def results(self, seconds=150):
        """Wait for all; return what they returned, None for those that were killed."""
        exits = self.wait(seconds)
        assert {*exits} <= {0, -9}, f"exits {exits}: {[*map(self.stderr, range(len(exits)))]}"
        return [self.result(rank) if code == 0 else None for rank, code in enumerate(exits)]

    def result(self, rank):
        """What a process has returned."""
        return json.loads((self._folder / f"{rank}.json").read_text())

    def wait(self, seconds=150):
        """Wait for all, and kill them if that takes longer; return the exit code of each."""
        deadline = time.monotonic() + seconds
        try:
            for process in self.running:
                process.join(max(0.1, deadline - time.monotonic()))
            hang = [rank for rank, process in enumerate(self.running) if process.is_alive()]
            assert not hang, f"ranks {hang} still run after {seconds} s: {[*map(self.stderr, hang)]}"
        finally:
            for process in self.running:
                process.kill()
        return [process.exitcode for process in self.running]

    def stderr(self, rank):
        """What a process has written to stderr."""
        return (self._folder / f"{rank}.err").read_text()


def free_port():
    """Find a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("localhost", 0))
        return str(one.getsockname()[1])


def run(function, size, folder, *arguments, seconds=150, **environment):
    """Run it in `size` processes; return what each returned."""
    return Processes(function, size, folder, *arguments, **environment).results(seconds)


def command_line(rank, size, folder, *words):
    """Exit code, stdout and stderr of `lora-init`, or of a script that is named first, in a process of its own."""
    import torch

    from lora_init import cli

    written = [folder / f"{rank}-{number}" for number in (1, 2)]
    for number, file in enumerate(written, 1):
        os.dup2(os.open(file, os.O_CREAT | os.O_TRUNC | os.O_WRONLY), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    words = [str(word).replace("RANK", str(rank)) for word in words]
    script = words.pop(0) if words[0].endswith(".py") else None
    sys.argv = [script or "lora-init", *words]
    code = 0
    try:
        runpy.run_path(script, run_name="__main__") if script else cli.main()
    except SystemExit as end:
        code = end.code or 0
    assert not torch.distributed.is_initialized()  # what a command has opened, it closes
    sys.stdout.flush(), sys.stderr.flush()
    return [code, *(file.read_text() for file in written)]


def _child(module, function, own, folder, size, arguments, environment, rank):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it runs in the background ignore it
    launched = "MASTER_PORT" in environment
    os.environ.update(environment)
    if launched:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost")
    os.dup2(os.open(Path(own, f"{rank}.err"), os.O_CREAT | os.O_WRONLY), sys.stderr.fileno())
    faulthandler.enable()  # where it crashes, if it does
    faulthandler.dump_traceback_later(120)  # where it hangs, if it does
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    if not launched:
        timeout = datetime.timedelta(seconds=float(os.environ.get("TIMEOUT", "120")))
        where = {"init_method": os.environ["MEET"], "rank": rank, "world_size": size, "timeout": timeout}
        torch.distributed.init_process_group("gloo", **where)
    found = getattr(importlib.import_module(module), function)(rank, size, folder, *arguments)
    Path(own, f"{rank}.json").write_text(json.dumps(found))
    # Without destroy_process_group: right after a collective, torch's own thread and this one can wait for each other.
    os._exit(0)
