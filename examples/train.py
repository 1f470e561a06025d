"""Train a D-AR tokenizer (stage 1) or language model (stage 2).

    accelerate launch examples/train.py tokenizer --preset digits --output_dir outputs/tokenizer
    accelerate launch examples/train.py ar --preset digits --tokenizer outputs/tokenizer --output_dir outputs/pipeline

Every option of a preset can be changed on the command line or in a file given by --config; the command line wins.
--help after the stage lists all options.
"""

import sys
from collections.abc import Sequence

from transformers import HfArgumentParser

from dar_hf.presets import get_preset
from dar_hf.training import ARArguments, TokenizerArguments, train
from dar_hf.training.build import build_ar_stage, build_tokenizer_stage
from dar_hf.training.loop import ResumeError, StoppedError, make_accelerator
from dar_hf.training.run_folder import claim_output_dir
from dar_hf.utils.commands import FAILURE, CommandError, check_output, command, ending_with
from dar_hf.utils.options import read_options

STAGES = {"tokenizer": TokenizerArguments, "ar": ARArguments}


def parse(stage: str, argv: list[str]) -> TokenizerArguments | ARArguments:
    """Arguments of a stage: defaults, then the preset's recipe, then the file, then the command line."""
    first = HfArgumentParser(STAGES[stage], add_help=False)
    first.add_argument("--config", default=None)
    first.set_defaults(preset=None)  # to tell whether the command line names one
    known, _ = first.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])
    from_file = read_options(known.config, STAGES[stage]) if known.config is not None else {}
    preset = get_preset(known.preset or from_file.get("preset", STAGES[stage].preset))

    parser = HfArgumentParser(STAGES[stage], prog=f"train.py {stage}")
    parser.add_argument("--config", help="YAML file with options")
    recipe = preset.tokenizer_recipe if stage == "tokenizer" else preset.ar_recipe
    parser.set_defaults(**recipe | from_file)
    return parser.parse_args_into_dataclasses(argv)[0]


@command("train.py")
def main(argv: Sequence[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else list(argv)
    stage_name = words[0] if words else ""
    if stage_name in ("-h", "--help"):
        print(__doc__)
        return
    if stage_name not in STAGES:
        raise CommandError(f"usage: train.py {{{','.join(STAGES)}}} [options]; --help after the stage lists them")
    args = parse(stage_name, words[1:])
    check_output(args.output_dir)
    accelerator = make_accelerator(args)
    with accelerator.main_process_first():
        claim_output_dir(args, "DARTokenizer" if stage_name == "tokenizer" else "DARPipeline")
    stage = build_tokenizer_stage(args) if stage_name == "tokenizer" else build_ar_stage(args, accelerator.device)
    try:
        with ending_with(FAILURE, keep=(ResumeError, StoppedError)):
            train(stage, args, accelerator)
    except StoppedError as error:
        raise CommandError(str(error), 128 + error.signal_number) from error


if __name__ == "__main__":
    main()
