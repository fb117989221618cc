"""`python -m hf_hybrid` is `hf-hybrid`."""

import os
import sys

from .cli.commands import main


def run_and_exit() -> None:
    """Runs a command and ends this process with its exit code, in the way that is safe for one of several."""
    code = main()
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        from hf_hybrid.trainers.processes import exit_process

        exit_process(code)
    sys.exit(code)


if __name__ == "__main__":
    run_and_exit()
