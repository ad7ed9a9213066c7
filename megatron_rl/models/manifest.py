"""The sizes of a checkpoint's files, kept in it, so that one that has lost data is known before it is read."""

import json
import os
from pathlib import Path

MANIFEST = "manifest"


def write_manifest(folder: Path) -> None:
    """List all files of a folder that is complete, in `folder/manifest`."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    with (folder / MANIFEST).open("w") as file:
        json.dump(sizes, file)
        file.flush()
        os.fsync(file.fileno())


def damage(folder: Path) -> str | None:
    """What a folder has lost since its manifest was written, in words; None when nothing, or without a manifest."""
    try:
        sizes = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:  # an earlier version wrote it
        return None
    except ValueError:
        return f"its {MANIFEST} is cut off"
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size:,} of {size:,} bytes"
    return None
