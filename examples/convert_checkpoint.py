"""Convert checkpoints of the original D-AR code to a pipeline folder (or, given one file, to that model's folder).

    python examples/convert_checkpoint.py --tokenizer tokenizer.pt --transformer dar_l.pt --output_dir outputs/dar-l

Nothing in the files is executed. What a file does not contain comes from --config or name=value options.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dar_hf import DARPipeline, FlowMatchAdamsBashforthScheduler
from dar_hf.conversion import convert_tokenizer, convert_transformer
from dar_hf.hub import model_card
from dar_hf.presets import parse_options
from dar_hf.utils.commands import FAILURE, check_output, command, path_option, writing
from dar_hf.utils.files import new_folder
from dar_hf.utils.labels import imagenet_labels, read_labels
from dar_hf.utils.loading import check_weights

# options and the models without which they would have no effect
NEEDED = {
    "config": ["tokenizer"],
    "tokenizer_options": ["tokenizer"],
    "sampling": ["transformer"],
    "transformer_options": ["transformer"],
    "id2label": ["tokenizer", "transformer"],
}


def millions(module) -> float:
    if module is None:
        return 0.0
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


def build(args: argparse.Namespace):
    """The pipeline, or the one model there is."""
    tokenizer = transformer = None
    if args.tokenizer:
        options = {"config": args.config} | parse_options(args.tokenizer_options)
        tokenizer = convert_tokenizer(args.tokenizer, **options)
        head = millions(tokenizer.denoiser.repa_head)
        print(f"tokenizer: {millions(tokenizer) - head:.1f} M parameters + {head:.1f} M (REPA head, for training)")
    if args.transformer:
        options = {"sampling": args.sampling} | parse_options(args.transformer_options)
        if tokenizer is not None:
            config = tokenizer.config
            options = {"num_image_tokens": config.num_tokens, "tokens_per_group": config.tokens_per_group} | options
        transformer = convert_transformer(args.transformer, **options)
        print(f"transformer: {millions(transformer):.1f} M parameters")
    if tokenizer is None or transformer is None:
        return tokenizer or transformer
    num_classes = transformer.config.num_classes
    labels = None
    if args.id2label:
        labels = read_labels(args.id2label, num_classes)
    elif num_classes == 1000:
        labels = imagenet_labels()
    scheduler = FlowMatchAdamsBashforthScheduler(shift=tokenizer.config.time_shift)
    return DARPipeline(tokenizer, transformer, scheduler, id2label=labels)


@command("convert_checkpoint.py", FAILURE)
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", help="tokenizer checkpoint (.pt)")
    parser.add_argument("--transformer", help="language model checkpoint (.pt)")
    parser.add_argument(
        "--output_dir", type=path_option, required=True, help="folder to make; must not exist or be empty"
    )
    parser.add_argument(
        "--id2label",
        type=path_option,
        help="class names: JSON by id, or one name per line; default ImageNet's for 1,000 classes",
    )
    parser.add_argument("--config", type=path_option, help="YAML of the tokenizer's options in the original's names")
    parser.add_argument("--sampling", help="take the sampling of this preset (L, XL) instead of the model's own")
    parser.add_argument("--tokenizer_options", nargs="*", metavar="NAME=VALUE", help="options of DARTokenizer")
    parser.add_argument("--transformer_options", nargs="*", metavar="NAME=VALUE", help="options of DARConfig")
    args = parser.parse_args(argv)
    if not (args.tokenizer or args.transformer):
        parser.error("give --tokenizer, --transformer or both")
    for option, models in NEEDED.items():
        if getattr(args, option) and not all(getattr(args, model) for model in models):
            parser.error(f"--{option} needs --{' and --'.join(models)}")
    logging.basicConfig(stream=sys.stdout, format="%(message)s", level=logging.WARNING)
    logging.getLogger("dar_hf").setLevel(logging.INFO)  # says what was dropped
    for path in filter(None, (args.tokenizer, args.transformer)):
        check_weights(path)
    check_output(args.output_dir)
    with new_folder(args.output_dir) as folder:
        model = build(args)
        sources = ", ".join(f"`{Path(path).name}`" for path in (args.tokenizer, args.transformer) if path)
        card = model_card(
            model,
            str(args.output_dir),
            summary="Converted from a checkpoint of the original D-AR code (showlab/D-AR).",
            facts={"converted from": sources},
        )
        with writing(args.output_dir):
            model.save_pretrained(folder)
            card.save(folder / "README.md")
    print(f"saved {args.output_dir}")


if __name__ == "__main__":
    main()
