"""Train the runs of a grid of settings, as `scaling-fl sweep` does."""

import sys

from scaling_fl.command.sweep import main

if __name__ == "__main__":
    main(sys.argv[1:])
