"""What Python's huggingface_hub finds in, or puts into, the cache of HF_HUB_CACHE; prints the snapshot's folder.

usage: hub_cache.py snapshot|file|offline-snapshot|offline-file OWNER/NAME
"""
import pathlib
import sys

from huggingface_hub import hf_hub_download, snapshot_download

FILES = ["README.md", "config.json", "tokenizer.json", "model.safetensors"]
how, repo = sys.argv[1:]
offline = how.startswith("offline-")
if how.endswith("snapshot"):
    folder = snapshot_download(repo, local_files_only=offline)
else:
    paths = [pathlib.Path(hf_hub_download(repo, file, local_files_only=offline)) for file in FILES]
    (folder,) = {path.parent for path in paths}
print(folder)
