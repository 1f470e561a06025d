"""Pictures for experiment trackers; figures go through accelerate itself."""

from collections.abc import Iterable, Mapping

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image


def track_pictures(trackers: Iterable[GeneralTracker], pictures: Mapping[str, Image.Image], step: int) -> None:
    """Show pictures to the trackers that take them: tensorboard and wandb. The others have the figures alone."""
    for tracker in trackers:
        for name, picture in pictures.items():
            if tracker.name == "tensorboard":
                pixels = np.asarray(picture.convert("RGB"))
                tracker.log_images({f"validation/{name}": pixels[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({f"validation/{name}": [picture]}, step=step)
