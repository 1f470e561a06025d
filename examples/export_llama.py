"""Write a D-AR language model as a plain Llama, for servers that run Llama.

    python examples/export_llama.py --model outputs/digits/pipeline/transformer --output_dir outputs/llama

A prompt is one token, codebook_size + class, as text <class_3> (or the class's name, where the model is part of a
pipeline that has names); the answer is the image's codes, <c12><c7>..., whose ids `DARTokenizer.decode` takes.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from dar_hf import DARForCausalLM, DARPipeline
from dar_hf.conversion import save_llama
from dar_hf.pipeline_dar import names_by_id
from dar_hf.utils.commands import FAILURE, check_output, command, path_option, writing
from dar_hf.utils.files import new_folder
from dar_hf.utils.loading import load


def class_names(model: str, subfolder: str, num_classes: int) -> dict[int, str]:
    """Class names of the pipeline that the language model is part of; none if it is alone."""
    folder = Path(model, subfolder).expanduser()
    if folder.is_dir():
        model = str(folder.resolve().parent)
        if not Path(model, "model_index.json").is_file():
            return {}
    elif not subfolder:
        return {}
    try:
        return names_by_id(DARPipeline.load_config(model).get("id2label") or {}, num_classes)
    except (OSError, ValueError) as error:  # of a pipeline that is damaged, or another one
        print(f"no class names: {error}")
        return {}


@command("export_llama.py", FAILURE)
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of the language model")
    parser.add_argument("--subfolder", default="", help="its subfolder; transformer in a pipeline")
    parser.add_argument(
        "--output_dir", type=path_option, required=True, help="folder to make; must not exist or be empty"
    )
    args = parser.parse_args(argv)
    check_output(args.output_dir)
    with new_folder(args.output_dir) as folder:
        model = load(DARForCausalLM, args.model, "language model", subfolder=args.subfolder)
        names = class_names(args.model, args.subfolder, model.config.num_classes)
        with writing(args.output_dir):
            save_llama(model, folder, names)
    print(f"saved {args.output_dir}")


if __name__ == "__main__":
    main()
