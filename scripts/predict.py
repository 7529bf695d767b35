"""Let a classifier label texts, as `scaling-fl predict` does."""

import sys

from scaling_fl.command.predict import main

if __name__ == "__main__":
    main(sys.argv[1:])
