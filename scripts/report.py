"""Write the report of one or several runs, as `scaling-fl report` does."""

import sys

from scaling_fl.command.report import main

if __name__ == "__main__":
    main(sys.argv[1:])
