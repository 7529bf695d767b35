"""Imported before anything reads these variables: the tests ask no hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
