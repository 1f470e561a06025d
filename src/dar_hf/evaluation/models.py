"""The model that is evaluated: loaded, and described for the report."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HFValidationError

from ..pipeline_dar import DARPipeline
from ..scheduling_dar import FlowMatchAdamsBashforthScheduler
from ..tokenizer_dar import DARTokenizer
from ..utils.fingerprint import weights_fingerprint
from ..utils.loading import load, load_pipeline
from .arguments import EvaluationArguments

_PATTERNS = ["*.json", "tokenizer/*", "transformer/*", "scheduler/*", "text_tokenizer/*", "*.safetensors"]


@dataclass
class EvaluatedModel:
    """What is evaluated.

    Attributes:
        tokenizer, scheduler: of the pipeline, or alone.
        pipeline: None where the folder holds a tokenizer only.
        description: for the report.
    """

    tokenizer: DARTokenizer
    scheduler: FlowMatchAdamsBashforthScheduler
    pipeline: DARPipeline | None
    description: dict[str, Any]

    def windows(self, num_inference_steps: int | None) -> list[int]:
        """How many tokens each denoising step depends on."""
        steps = num_inference_steps or self.tokenizer.config.num_inference_steps
        return [stop for _, stop in self.tokenizer.step_windows(steps)]


def load_model(args: EvaluationArguments, device: torch.device) -> EvaluatedModel:
    """Load a pipeline or a tokenizer from a folder or the Hub.

    Raises:
        ValueError: where there is none, or one that is damaged or of another kind.
        OSError: where files of it are missing or damaged.
    """
    folder = Path(args.pipeline).expanduser()
    revision = None
    if not folder.exists():
        try:
            folder = Path(snapshot_download(args.pipeline, revision=args.revision, allow_patterns=_PATTERNS))
        except (OSError, HFValidationError) as error:
            raise ValueError(
                f"{args.pipeline} is neither a folder nor a repository that can be read: {error}"
            ) from error
        revision = folder.name  # snapshots are named after their commit
    elif args.revision:
        raise ValueError(f"{args.pipeline} is a folder here: revision={args.revision!r} is for the Hub.")
    dtype = getattr(torch, args.dtype)
    description: dict[str, Any] = {"name": args.pipeline, "revision": revision, "dtype": args.dtype}
    if (folder / "model_index.json").is_file():
        pipeline = load_pipeline(folder, dtype)
        pipeline.set_progress_bar_config(disable=True)
        description["transformer_hash"] = weights_fingerprint(pipeline.transformer.state_dict())
        pipeline.to(device)
        tokenizer = pipeline.tokenizer
        scheduler = pipeline.scheduler
    elif (folder / "config.json").is_file():  # of another model: loading refuses it
        pipeline = None
        tokenizer = load(DARTokenizer, folder, "tokenizer", dtype=dtype).to(device)
        scheduler = FlowMatchAdamsBashforthScheduler(shift=tokenizer.config.time_shift)
    else:
        raise ValueError(f"{folder} holds neither a pipeline (model_index.json) nor a DARTokenizer (config.json).")
    if args.solver_order is not None:
        scheduler = FlowMatchAdamsBashforthScheduler.from_config(scheduler.config, solver_order=args.solver_order)
        if pipeline is not None:
            pipeline.scheduler = scheduler
    description["tokenizer_hash"] = weights_fingerprint(tokenizer.state_dict())
    description["scheduler"] = {k: v for k, v in dict(scheduler.config).items() if not k.startswith("_")}
    return EvaluatedModel(tokenizer.eval(), scheduler, pipeline, description)
