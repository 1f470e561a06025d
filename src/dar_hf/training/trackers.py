"""Images for experiment trackers; numbers go through accelerate itself."""

from collections.abc import Iterable, Mapping

import numpy as np
from accelerate.tracking import GeneralTracker
from PIL import Image


def track_images(trackers: Iterable[GeneralTracker], images: Mapping[str, Image.Image], step: int) -> None:
    """Give images to the trackers that take them: tensorboard and wandb. The others have the numbers only."""
    for tracker in trackers:
        for name, image in images.items():
            if tracker.name == "tensorboard":
                pixels = np.asarray(image.convert("RGB"))
                tracker.log_images({f"validation/{name}": pixels[None]}, step=step, dataformats="NHWC")
            elif tracker.name == "wandb":
                tracker.log_images({f"validation/{name}": [image]}, step=step)
