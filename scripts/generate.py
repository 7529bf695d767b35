"""Let a language model answer questions, as `scaling-fl generate` does."""

import sys

from scaling_fl.command.generate import main

if __name__ == "__main__":
    main(sys.argv[1:])
