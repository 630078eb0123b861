__version__ = "0.1.0"

import logging, os

logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)  # while it is imported it warns of an optional kernel that nobody here misses
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch then asks Linux for large pages, looked up when it first makes a tensor; a billion weights are read a fifth faster
for _cache in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):  # compiled products that oneDNN and PyTorch keep: each takes about a megabyte, and by default a run of many lengths keeps a thousand
    os.environ.setdefault(_cache, "256")
