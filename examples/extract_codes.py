"""Encode a data set once, so that stage 2 trains on stored codes without running the tokenizer.

    accelerate launch examples/extract_codes.py --tokenizer outputs/tokenizer --dataset_name path/to/images \\
        --crop ten --output_dir outputs/codes
    accelerate launch examples/train.py ar --preset L --tokenizer outputs/tokenizer --codes outputs/codes \\
        --crop ten --output_dir outputs/pipeline

Processes share the work; the same command again continues where it was interrupted. --push_to_hub uploads the set.
"""

from collections.abc import Sequence

from transformers import HfArgumentParser

from dar_hf.training.extraction import ExtractArguments, extract_codes, push_codes
from dar_hf.utils.commands import FAILURE, CommandError, check_output, command
from dar_hf.utils.errors import one_line
from dar_hf.utils.processes import join_processes


@command("extract_codes.py")
def main(argv: Sequence[str] | None = None) -> None:
    args = HfArgumentParser(ExtractArguments, prog="extract_codes.py").parse_args_into_dataclasses(argv)[0]
    check_output(args.output_dir)
    accelerator = join_processes()
    stamp = extract_codes(args, accelerator)
    accelerator.print(f"{stamp['num_images']} images, {stamp['variants']} codes each: {args.output_dir}")
    if args.push_to_hub and accelerator.is_main_process:
        try:
            print(f"pushed to {push_codes(args)}")
        except Exception as error:  # also what the transport raises
            text = f"the set is in {args.output_dir}, but not on the Hub: {one_line(error)}"
            raise CommandError(text, FAILURE) from error
    accelerator.end_training()


if __name__ == "__main__":
    main()
