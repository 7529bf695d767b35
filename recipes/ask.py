"""Ask the model of the last run a question, as `scaling-fl generate` does, whose options may follow."""

import sys

from last_runs import last_runs

from scaling_fl.command.generate import main

if __name__ == "__main__":
    (run,) = last_runs(1)
    main(["--model", run.folder, *(f"--question={text}" for text in sys.argv[1:2]), *sys.argv[2:]])
