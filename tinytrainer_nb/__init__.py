__version__ = "0.1.0"

import logging

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # while it is imported it warns of an optional kernel that nobody here misses
