"""Keeps what `evaluate.py` has drawn, so that an evaluation that was stopped can go on."""

import hashlib
import json
from pathlib import Path

import torch
from torch import Tensor


class PictureStore:
    """The pictures made so far in one folder, in files of one batch each.

    The folder's name is a hash of all that the pictures depend on, so that what was made with other
    weights or other settings is never taken up. The batch size may change from call to call.
    """

    def __init__(self, work: Path, name: str, settings: dict) -> None:
        text = json.dumps(settings, sort_keys=True, indent=1)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        self.folder = work / f"{name}_{digest}"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "settings.json").write_text(text)
        self.pictures: dict[int, Tensor] = {}
        self.seconds: dict[int, float] = {}
        for file in self.folder.glob("*.pt"):
            self._add(**torch.load(file, weights_only=True))

    def _add(self, indices: list[int], pictures: Tensor, seconds: float) -> None:
        self.pictures.update(zip(indices, pictures, strict=True))
        self.seconds.update(dict.fromkeys(indices, seconds / len(indices)))

    def save(self, indices: list[int], pictures: Tensor, seconds: float) -> None:
        """Keeps a batch, which took `seconds`."""
        file = self.folder / f"{indices[0]:05}_{len(indices)}.pt"
        # Renamed into place, so that being killed while writing leaves no half a file.
        batch = {"indices": indices, "pictures": pictures, "seconds": seconds}
        torch.save(batch, file.with_suffix(".part"))
        file.with_suffix(".part").replace(file)
        self._add(**batch)
