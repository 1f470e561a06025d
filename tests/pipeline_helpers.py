"""Small things that all tests of the pipeline use."""

import numpy as np
import PIL.Image
import torch

OUTPUT_TYPES = ["pil", "np", "pt", "codes", "latent"]
PIPELINE_FILES = {  # of one that draws classes
    "model_index.json",
    "tokenizer/config.json",
    "tokenizer/diffusion_pytorch_model.safetensors",
    "transformer/config.json",
    "transformer/generation_config.json",
    "transformer/model.safetensors",
    "scheduler/scheduler_config.json",
}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def pixels(sample):
    """Images in [-1, 1] as the pipeline returns them."""
    return (sample / 2 + 0.5).clamp(0, 1)


def picture(seed=0, size=(8, 8)):
    values = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    return PIL.Image.fromarray(values)


def tensor_of(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1


def same(one, two):
    """Equality of images of any output type."""
    if isinstance(one, list):
        return len(one) == len(two) and all(a.tobytes() == b.tobytes() for a, b in zip(one, two, strict=True))
    return np.array_equal(np.asarray(one), np.asarray(two))


def recorded(pipeline, *labels, **options):
    """Raw tensors of every step, as a callback sees them, and the result."""
    steps = []

    def callback(pipe, step, timestep, tensors):
        assert pipe is pipeline
        steps.append({"step": step, "timestep": timestep} | {k: v.clone() for k, v in tensors.items()})

    result = pipeline(*labels, output_type="pt", callback_on_step_end=callback, **options)
    return steps, result


def generated_codes(pipeline, labels, **options):
    return pipeline(labels, output_type="codes", **options).images
