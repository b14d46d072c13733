"""Checkpoints from the Hugging Face Hub: plan first (sizes, free disk), then fetch and verify.

`plan` asks the Hub what is missing and moves no weights; `download` checks the disk for all plans
together before the first byte. The files end up in the usual Hub cache (`HF_HOME`, `HF_HUB_CACHE`
or `cache_dir`), where every other tool finds them.
`HF_ENDPOINT`, `HF_HUB_OFFLINE` and `HF_TOKEN` work as in all programs that use `huggingface_hub`.

Bytes are moved by huggingface_hub's `http_get`, and its `hf_hub_download` files them in the cache.
Since 1.18 the latter starts an interrupted file from zero (and Xet transfers always did), so the
partial file is kept by us, as `<hash>.incomplete`, where older versions kept it. Its danger, two
writers on a file system without locks, is met by checking the hash before a file enters the cache.

The files import downwards only: `transfer`, `plan`, `failures`, `cache`, `files`, `arguments`.
"""

from __future__ import annotations

from .cache import free_bytes
from .files import DownloadPlan, HubFile, weight_files
from .plan import plan
from .transfer import download

__all__ = [
    "DownloadPlan",
    "HubFile",
    "download",
    "free_bytes",
    "plan",
    "weight_files",
]
