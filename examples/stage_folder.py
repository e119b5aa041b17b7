"""The folder of a picture drawn in stages, from which an interrupted run goes on.

It holds `run.json`, with the arguments and the number of finished stages, and the picture of every
finished stage. For the stage at hand it also holds what the UNet answered in each step, so that a
run that is started again repeats these steps without computing them. Every file is written
under another name first and then renamed: whatever is there under its own name is complete.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from PIL import Image
from safetensors.torch import load, save
from torch import Tensor, nn

# Pillow takes a picture of 16384 x 16384 for an attack; these are our own.
Image.MAX_IMAGE_PIXELS = None


class StageFolder:
    """The state of one run.

    Args:
        path: The folder; nothing is written before `begin`.
        arguments: What the pictures depend on, as JSON has it.

    Raises:
        SystemExit: With one line, if the folder holds another run or something else.

    Attributes:
        finished: The number of finished stages.
        stages: The number of all stages, None before `begin`.
    """

    def __init__(self, path: Path, arguments: dict[str, Any]) -> None:
        self.path = path
        self.arguments = arguments
        self.finished, self.stages = 0, None
        file = path / "run.json"
        if not file.exists():
            # All there can be of a run that was interrupted before this file was there.
            if path.exists() and not (path.is_dir() and set(path.iterdir()) <= {unfinished(file)}):
                raise SystemExit(f"{path} holds something else. Give another --output.")
            return
        try:
            state = json.loads(file.read_text())
            self.finished, self.stages = state.pop("stage"), state.pop("stages")
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise SystemExit(f"{file} is not the state of a run. Give another --output.") from error
        if state != arguments:
            names = sorted(state.keys() | arguments.keys())
            differ = [name for name in names if state.get(name) != arguments.get(name)]
            raise SystemExit(
                f"{path} holds a run with another {', '.join(differ)}. Give another --output, or "
                "delete the folder."
            )

    def begin(self, stages: int) -> None:
        """Makes the folder this run's, if it is not already."""
        self.stages = stages
        self.path.mkdir(parents=True, exist_ok=True)
        self._write_state()

    def picture_file(self, stage: int) -> Path:
        """Where the picture of a stage is; stages count from 1."""
        return self.path / f"stage_{stage}.png"

    def picture(self) -> Image.Image | None:
        """The picture of the last finished stage.

        Raises:
            SystemExit: With one line, if it is not there any more.
        """
        if not self.finished:
            return None
        file = self.picture_file(self.finished)
        try:
            return Image.open(file).convert("RGB")
        except OSError as error:
            raise SystemExit(f"{file} is missing or damaged. Delete {self.path}.") from error

    def finish(self, picture: Image.Image) -> None:
        """Writes the picture of the next stage, and then that it is finished."""
        stage = self.finished + 1
        write(self.picture_file(stage), lambda file: picture.save(file, "PNG"))
        self.finished = stage
        self._write_state()

    @contextmanager
    def remember(self, unet: nn.Module) -> Iterator[None]:
        """In the block, the UNet computes only those steps of the next stage that are not here.

        The pipeline itself runs from the stage's beginning, and so does its scheduler, whichever
        it is: with the same answers it comes to the same picture.
        """
        folder, numbers, own = self._steps(self.finished + 1), count(1), unet.__dict__
        folder.mkdir(exist_ok=True)
        hooked, compute = own.get("forward"), unet.forward

        def forward(sample: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor]:
            file = folder / f"{next(numbers):04d}.safetensors"
            if file.exists():
                return (load(file.read_bytes())["answer"].to(sample.device),)
            answer = compute(sample, *args, **kwargs)[0]
            data = save({"answer": answer.contiguous()})
            write(file, lambda file: file.write(data))
            return (answer,)

        unet.forward = forward
        try:
            yield
        finally:
            del unet.forward
            if hooked is not None:
                unet.forward = hooked

    def _steps(self, stage: int) -> Path:
        return self.path / f"stage_{stage}_steps"

    def _write_state(self) -> None:
        state = {**self.arguments, "stage": self.finished, "stages": self.stages}
        write(self.path / "run.json", lambda file: file.write(json.dumps(state, indent=1).encode()))
        # Here rather than in `finish`, in case an earlier run was interrupted before it.
        shutil.rmtree(self._steps(self.finished), ignore_errors=True)


def write(path: Path, save_to: Callable[[BinaryIO], Any]) -> None:
    """Writes a file so that, whenever this is interrupted, it is there in full or as it was."""
    with open(unfinished(path), "wb") as file:
        save_to(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished(path), path)


def unfinished(path: Path) -> Path:
    return path.with_name(f"{path.name}.unfinished")
