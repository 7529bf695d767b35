"""Imported first: turns off access to the hub before a package reads the variable, and garbage collection meanwhile."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
gc.disable()  # until the tests begin
