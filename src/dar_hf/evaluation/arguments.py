"""Options of both evaluations."""

from dataclasses import dataclass

from transformers.hf_argparser import HfArg

from ..utils.options import expand_path, reject_empty_texts

DTYPES = ("float32", "bfloat16", "float16")


@dataclass
class EvaluationArguments:
    """What both evaluations need."""

    pipeline: str = HfArg(default="", help="pipeline folder or Hub id; reconstruction takes a tokenizer's too")
    revision: str | None = HfArg(default=None, help="branch, tag or commit of a Hub id")
    output_dir: str = HfArg(
        default="outputs/evaluation", help="folder for report.json, grids of images, .npz files and shards"
    )
    overwrite_output_dir: bool = HfArg(default=False, help="start over in a folder that holds another evaluation")
    dataset_name: str | None = HfArg(
        default=None, help="reference images: digits, a folder, a parquet file or a Hub id"
    )
    dataset_config_name: str | None = HfArg(default=None, help="configuration of a Hub data set")
    split: str | None = HfArg(
        default=None, help="split of the reference images; default test, or all of a single file"
    )
    image_column: str = HfArg(default="image", help="column with the images")
    label_column: str | None = HfArg(
        default=None, help="column with the classes, for label agreement of the references"
    )
    max_corrupt_images: int = HfArg(
        default=100, help="stop when more than N images cannot be read; fewer are left out"
    )
    num_images: int | None = HfArg(
        default=None, help="number of images; default all references, or 50,000 generated ones"
    )
    features: str = HfArg(
        default="inception", help="inception, path/to/file.py:name, package.module:name or a transformers id"
    )
    features_weights: str | None = HfArg(
        default=None, help="safetensors file, folder or Hub repository for these features"
    )
    features_hash: str | None = HfArg(
        default=None, help="first 8 or more characters of the hash that these weights must have"
    )
    num_inference_steps: int | None = HfArg(default=None, help="denoising steps; default the tokenizer's")
    solver_order: int | None = HfArg(default=None, help="1 for Euler, 2 for Adams-Bashforth; default the pipeline's")
    prefixes: list[int] | None = HfArg(
        default=None, help="also measure previews of these numbers of tokens; default all there are"
    )
    seed: int = HfArg(default=0, help="seed of all samples; each has its own generator")
    dtype: str = HfArg(default="float32", help="of the model: float32, bfloat16 or float16")
    batch_size: int = HfArg(default=32, help="images per process and step")
    shard_size: int = HfArg(default=250, help="images per shard, the unit of work and of resuming")
    save_images: bool = HfArg(default=True, help="write the images as ADM .npz; without, statistics only")

    def __post_init__(self) -> None:
        if not self.pipeline:
            raise ValueError("pipeline is missing: a folder or a Hub id.")
        self.output_dir = expand_path(self.output_dir)
        reject_empty_texts(self)
        for name in ("num_images", "num_inference_steps", "batch_size", "shard_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}.")
        if self.solver_order not in (None, 1, 2):
            raise ValueError(f"solver_order must be 1 or 2, got {self.solver_order}.")
        for name in ("seed", "max_corrupt_images"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}.")


@dataclass
class ReconstructionArguments(EvaluationArguments):
    """Encode and decode real images, and compare with them."""

    lpips_weights: str | None = HfArg(default=None, help="safetensors file or Hub repository with LPIPS' weights")
    lpips_hash: str | None = HfArg(
        default=None, help="first 8 or more characters of the hash that these weights must have"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dataset_name is None:
            raise ValueError("dataset_name is missing: the images to reconstruct.")
        if self.lpips_hash and not self.lpips_weights:
            raise ValueError("lpips_hash needs lpips_weights.")


@dataclass
class GenerationArguments(EvaluationArguments):
    """Generate images, equally many of each class, and compare the set with a reference set."""

    reference: str | None = HfArg(
        default=None, help="reference .npz: images (arr_0), or statistics (mu, sigma), instead of a data set"
    )
    guidance_scale: list[float] | None = HfArg(
        default=None, help="one number, or two for a linear scale; default the pipeline's"
    )
    temperature: float = HfArg(default=1.0, help="temperature of the codes")
    top_k: int = HfArg(default=0, help="sample among the N most probable codes; 0 for all")
    top_p: float = HfArg(default=1.0, help="sample among the most probable codes that hold this share of probability")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.reference is None) == (self.dataset_name is None):
            raise ValueError("give either reference (an .npz) or dataset_name: what to compare the samples with.")
        if self.guidance_scale is not None and len(self.guidance_scale) not in (1, 2):
            raise ValueError(f"guidance_scale takes one number or two, got {len(self.guidance_scale)}.")
