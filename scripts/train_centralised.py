"""Train on the data of all sites in one place, as `scaling-fl centralised` does: the baseline of a federated run."""

import sys

from scaling_fl.command.__main__ import main

if __name__ == "__main__":
    sys.argv.insert(1, "centralised")
    main()
