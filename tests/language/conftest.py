"""Only the environment of the language models has transformers: make test STACK=language."""

import os
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported

if find_spec("transformers") is None:
    collect_ignore_glob = ["test_*.py"]
