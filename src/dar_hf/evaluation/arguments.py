"""Options of both evaluations."""

from dataclasses import dataclass, field
from typing import Any

DTYPES = ("float32", "bfloat16", "float16")


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class EvaluationArguments:
    """What both evaluations need."""

    pipeline: str = _option("", "pipeline folder or Hub id; reconstruction takes a tokenizer's too")
    revision: str | None = _option(None, "branch, tag or commit of a Hub id")
    output_dir: str = _option("outputs/evaluation", "folder for report.json, pictures, .npz files and shards")
    overwrite_output_dir: bool = _option(False, "start over in a folder that holds another evaluation")
    dataset_name: str | None = _option(None, "reference images: digits, a folder, a parquet file or a Hub id")
    dataset_config_name: str | None = _option(None, "configuration of a Hub data set")
    split: str = _option("test", "split of the reference images")
    image_column: str = _option("image", "column with the images")
    label_column: str | None = _option(None, "column with the classes, for label agreement of the references")
    num_images: int | None = _option(None, "how many images; default all references, or 50,000 generated ones")
    features: str = _option("inception", "inception, path/to/file.py:name, package.module:name or a transformers id")
    features_weights: str | None = _option(None, "safetensors file, folder or Hub repository for these features")
    features_hash: str | None = _option(None, "first 8 or more characters of the hash that these weights must have")
    num_inference_steps: int | None = _option(None, "denoising steps; default the tokenizer's")
    solver_order: int | None = _option(None, "1 for Euler, 2 for Adams-Bashforth; default the pipeline's")
    prefixes: list[int] | None = _option(
        None, "also measure previews of these numbers of tokens; default all there are"
    )
    seed: int = _option(0, "seed of all samples; each has its own generator")
    dtype: str = _option("float32", "of the model: float32, bfloat16 or float16")
    batch_size: int = _option(32, "images a process handles at once")
    shard_size: int = _option(250, "images of a shard, the unit of work and of resuming")
    save_images: bool = _option(True, "write the images as ADM .npz; without, statistics only")

    def __post_init__(self) -> None:
        if not self.pipeline:
            raise ValueError("pipeline is missing: a folder or a Hub id.")
        for name in ("num_images", "num_inference_steps", "batch_size", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.solver_order not in (None, 1, 2):
            raise ValueError(f"solver_order must be 1 or 2, got {self.solver_order}.")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")


@dataclass
class ReconstructionArguments(EvaluationArguments):
    """Encode and decode real images, and compare with them."""

    lpips_weights: str | None = _option(None, "safetensors file or Hub repository with LPIPS' weights")
    lpips_hash: str | None = _option(None, "first 8 or more characters of the hash that these weights must have")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_name is None:
            raise ValueError("dataset_name is missing: the images to reconstruct.")
        if self.lpips_hash and not self.lpips_weights:
            raise ValueError("lpips_hash needs lpips_weights.")


@dataclass
class GenerationArguments(EvaluationArguments):
    """Generate images, equally many of each class, and compare the set with a reference set."""

    reference: str | None = _option(
        None, "reference .npz: images (arr_0), or statistics (mu, sigma), instead of a data set"
    )
    guidance_scale: list[float] | None = _option(None, "one number, or two for a linear scale; default the pipeline's")
    temperature: float = _option(1.0, "temperature of the codes")
    top_k: int = _option(0, "sample among so many codes; 0 for all")
    top_p: float = _option(1.0, "sample among the codes that hold this share of probability")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.reference is None) == (self.dataset_name is None):
            raise ValueError("give either reference (an .npz) or dataset_name: what to compare the samples with.")
        if self.guidance_scale is not None and len(self.guidance_scale) not in (1, 2):
            raise ValueError(f"guidance_scale takes one number or two, got {len(self.guidance_scale)}.")
