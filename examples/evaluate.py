"""Measure a pipeline: what it reconstructs (rFID, PSNR, SSIM, LPIPS, codebook) or generates (gFID, sFID, IS, ...).

    accelerate launch examples/evaluate.py reconstruction --pipeline DIR --dataset_name path/to/images \\
        --features_weights inception.safetensors --output_dir outputs/reconstruction
    accelerate launch examples/evaluate.py generation --pipeline DIR --reference VIRTUAL_imagenet256_labeled.npz \\
        --features_weights inception.safetensors --output_dir outputs/generation

Leaves report.json, pictures, and the sets as ADM .npz files. An interrupted run goes on where it stopped when started
again. --help after the mode lists all options.
"""

import sys
from datetime import timedelta
from typing import NoReturn

from accelerate.utils import InitProcessGroupKwargs
from transformers import HfArgumentParser

from dar_hf.evaluation import (
    GenerationArguments,
    ReconstructionArguments,
    evaluate_generation,
    evaluate_reconstruction,
)
from dar_hf.evaluation.measure import table
from dar_hf.processes import join_processes

MODES = {
    "reconstruction": (ReconstructionArguments, evaluate_reconstruction),
    "generation": (GenerationArguments, evaluate_generation),
}


def fail(error: BaseException | str) -> NoReturn:
    """End with one line on stderr."""
    print(f"evaluate.py: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(2)


def main() -> None:
    mode, argv = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if mode in ("-h", "--help"):
        print(__doc__)
        return
    if mode not in MODES:
        fail(f"usage: evaluate.py {{{','.join(MODES)}}} [options]; --help after the mode lists them")
    arguments_class, evaluate = MODES[mode]
    try:
        args = HfArgumentParser(arguments_class, prog=f"evaluate.py {mode}").parse_args_into_dataclasses(argv)[0]
        # a process that has done its shards waits for the others, as long as they take
        accelerator = join_processes(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
        report = evaluate(args, accelerator)
    except (ValueError, OSError, ImportError) as error:
        fail(error)
    if report is not None:
        print(table(report["metrics"]))
        for warning in report["warnings"]:
            print(f"warning: {warning}")
        for name, reason in report["not_measured"].items():
            print(f"not measured: {name}: {reason}")
        print(f"{args.output_dir}/report.json, {report['seconds']} s")
    accelerator.end_training()


if __name__ == "__main__":
    main()
