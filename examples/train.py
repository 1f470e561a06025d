"""Train a D-AR tokenizer (stage 1) or language model (stage 2).

    accelerate launch examples/train.py tokenizer --preset digits --output_dir outputs/tokenizer
    accelerate launch examples/train.py ar --preset digits --tokenizer outputs/tokenizer --output_dir outputs/pipeline

Every option of a preset can be changed on the command line or in a file given by --config; the command line wins.
--help after the stage lists all options.
"""

import sys
from typing import NoReturn

import yaml
from transformers import HfArgumentParser

from dar_hf.data import DataError
from dar_hf.presets import get_preset
from dar_hf.training import ARArguments, TokenizerArguments, train
from dar_hf.training.build import build_ar_stage, build_tokenizer_stage
from dar_hf.training.checkpoints import SaveError
from dar_hf.training.loop import (
    NonFiniteLossError,
    PushError,
    ResumeError,
    StoppedError,
    claim_output_dir,
    make_accelerator,
)

STAGES = {"tokenizer": TokenizerArguments, "ar": ARArguments}


def parse(stage: str, argv: list[str]) -> TokenizerArguments | ARArguments:
    """Arguments of a stage: defaults, then the preset's recipe, then the file, then the command line."""
    first = HfArgumentParser(STAGES[stage], add_help=False)
    first.add_argument("--config", default=None)
    known, _ = first.parse_known_args([arg for arg in argv if arg not in ("-h", "--help")])
    from_file: dict = {}
    if known.config:
        with open(known.config) as file:
            from_file = yaml.safe_load(file) or {}
        if not isinstance(from_file, dict):
            raise ValueError(f"{known.config} must hold options by name, not a {type(from_file).__name__}.")
    given = "--preset" in argv or any(arg.startswith("--preset=") for arg in argv)
    preset = get_preset(known.preset if given else from_file.get("preset", known.preset))

    parser = HfArgumentParser(STAGES[stage], prog=f"train.py {stage}")
    parser.add_argument("--config", help="YAML file with options")
    defaults = (preset.tokenizer_recipe if stage == "tokenizer" else preset.ar_recipe) | from_file
    unknown = set(defaults) - set(STAGES[stage].__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown options in {known.config}: {', '.join(sorted(unknown))}.")
    parser.set_defaults(**defaults)
    return parser.parse_args_into_dataclasses(argv)[0]


def fail(error: BaseException | str, code: int) -> NoReturn:
    """End with one line on stderr."""
    print(f"train.py: {' '.join(str(error).split())}", file=sys.stderr)
    sys.exit(code)


def main() -> None:
    stage_name, argv = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("", [])
    if stage_name in ("-h", "--help"):
        print(__doc__)
        return
    if stage_name not in STAGES:
        fail(f"usage: train.py {{{','.join(STAGES)}}} [options]; --help after the stage lists them", 2)
    try:
        args = parse(stage_name, argv)
        accelerator = make_accelerator(args)
        with accelerator.main_process_first():
            claim_output_dir(args, "DARTokenizer" if stage_name == "tokenizer" else "DARPipeline")
        stage = build_tokenizer_stage(args) if stage_name == "tokenizer" else build_ar_stage(args, accelerator.device)
    except (ValueError, TypeError, OSError, ImportError, yaml.YAMLError) as error:
        fail(error, 2)
    try:
        train(stage, args, accelerator)
    except ResumeError as error:
        fail(error, 2)
    except StoppedError as error:
        fail(error, 128 + error.signal_number)
    except (NonFiniteLossError, PushError, SaveError, DataError, OSError) as error:
        fail(error, 1)


if __name__ == "__main__":
    main()
