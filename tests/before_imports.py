"""What comes before all imports: no access to the hub, and no garbage collection of what packages bring."""

import gc
import os

os.environ["HF_HUB_OFFLINE"] = "1"
gc.disable()  # until the tests begin
