"""Stands for Python in a job of submitit: a process that is forked from a server with all imports does the job."""

import os
import sys
from multiprocessing.connection import Client

if __name__ == "__main__":
    with Client(os.environ["FORKED_JOBS"]) as server:  # which ends the job if this ends
        server.send((sys.argv[sys.argv.index("-m") + 1 :], dict(os.environ)))
        sys.exit(server.recv())
