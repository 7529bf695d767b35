"""Turn off access to the hub; imported first, before any package reads these variables."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
