"""Measure a pipeline: what it reconstructs (rFID, PSNR, SSIM, LPIPS, codebook) or generates (gFID, sFID, IS, ...).

    accelerate launch examples/measure.py reconstruction --pipeline DIR --dataset_name path/to/images \\
        --features_weights inception.safetensors --output_dir outputs/reconstruction
    accelerate launch examples/measure.py generation --pipeline DIR --reference VIRTUAL_imagenet256_labeled.npz \\
        --features_weights inception.safetensors --output_dir outputs/generation

Leaves report.json, grids of images, and the sets as ADM .npz files. An interrupted run continues where it stopped when
started again. --help after the mode lists all options.
"""

import sys
from collections.abc import Sequence
from datetime import timedelta

from accelerate.utils import InitProcessGroupKwargs
from transformers import HfArgumentParser

from dar_hf.evaluation import (
    GenerationArguments,
    ReconstructionArguments,
    evaluate_generation,
    evaluate_reconstruction,
)
from dar_hf.evaluation.measure import table
from dar_hf.utils.commands import CommandError, check_output, command
from dar_hf.utils.processes import join_processes

MODES = {
    "reconstruction": (ReconstructionArguments, evaluate_reconstruction),
    "generation": (GenerationArguments, evaluate_generation),
}


@command("measure.py")
def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    mode = words[0] if words else ""
    if mode in ("-h", "--help"):
        print(__doc__)
        return
    if mode not in MODES:
        raise CommandError(f"usage: measure.py {{{','.join(MODES)}}} [options]; --help after the mode lists them")
    arguments_class, evaluate = MODES[mode]
    args = HfArgumentParser(arguments_class, prog=f"measure.py {mode}").parse_args_into_dataclasses(words[1:])[0]
    check_output(args.output_dir)
    # a process that has done its shards waits for the others, as long as they take
    accelerator = join_processes(kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=7))])
    report = evaluate(args, accelerator)
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
