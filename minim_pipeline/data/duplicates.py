"""Image files that are the same: by the same path, or byte for byte under several names."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path


def file_keys(paths: Sequence[Path]) -> list[str]:
    """A key for each path, the same for the same content. Only files that share their size with another are read.

    Raises:
        OSError: a file is not there.
    """
    places = [path.resolve() for path in paths]
    distinct = list(dict.fromkeys(places))
    sizes = {path: path.stat().st_size for path in distinct}
    shared = Counter(sizes.values())

    def key(path: Path) -> str:
        if shared[sizes[path]] == 1:
            return str(path)
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:
        keys = dict(zip(distinct, pool.map(key, distinct), strict=True))
    return [keys[path] for path in places]
