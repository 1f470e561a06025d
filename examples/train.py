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
from dar_hf.training import ARArguments, ARStage, TokenizerArguments, TokenizerStage, make_accelerator, train
from dar_hf.training.resuming import ResumeError
from dar_hf.training.run_folder import claim_output_dir
from dar_hf.training.stopping import StoppedError
from dar_hf.utils.commands import FAILURE, CommandError, check_output, command, ending_with
from dar_hf.utils.memory import keep_freed_memory
from dar_hf.utils.options import current_names, read_options

STAGES = {"tokenizer": (TokenizerArguments, TokenizerStage), "ar": (ARArguments, ARStage)}


def parse(stage: str, argv: list[str]) -> TokenizerArguments | ARArguments:
    """Arguments of a stage: defaults, then the preset's recipe, then the file, then the command line.

    Parsed twice: once to learn the preset, whose recipe then becomes the defaults.
    """
    options_class, _ = STAGES[stage]
    first = HfArgumentParser(options_class, add_help=False)
    first.add_argument("--config", default=None)
    first.set_defaults(preset=None)  # to tell whether the command line names one
    known, _ = first.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])
    from_file = {}
    if known.config is not None:
        from_file = read_options(known.config, options_class)
    preset = get_preset(known.preset or from_file.get("preset", options_class.preset))
    recipes = {"tokenizer": preset.tokenizer_recipe, "ar": preset.ar_recipe}

    parser = HfArgumentParser(options_class, prog=f"train.py {stage}")
    parser.add_argument("--config", help="YAML file with options")
    parser.set_defaults(**current_names(recipes[stage], options_class) | from_file)
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
    if accelerator.device.type == "cpu":
        keep_freed_memory()
    _, stage_class = STAGES[stage_name]
    # the main process claims the folder, and the others wait: what stops it must stop the run before anything slow
    if accelerator.is_main_process:
        claim_output_dir(args, stage_class.saved_class)
    accelerator.wait_for_everyone()
    stage = stage_class.build(args, accelerator.device)
    try:
        # what goes wrong from here on is a failure (1) and no mistake in the options (2), other than a checkpoint that
        # does not fit them; a run that is asked to end has an exit code of its own
        with ending_with(FAILURE, keep=(ResumeError, StoppedError)):
            train(stage, args, accelerator)
    except StoppedError as error:
        raise CommandError(str(error), 128 + error.signal_number) from error


if __name__ == "__main__":
    main()
