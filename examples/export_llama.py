"""Write a D-AR language model as a plain Llama, for servers that run Llama.

    python examples/export_llama.py --model outputs/digits/pipeline/transformer --output_dir outputs/llama

A prompt is one token, codebook_size + class; the answer is the image's codes, for `DARTokenizer.decode`.
"""

import argparse
from collections.abc import Sequence

from dar_hf import DARForCausalLM
from dar_hf.commands import FAILURE, check_output, command, writing
from dar_hf.conversion import to_llama
from dar_hf.files import new_folder
from dar_hf.loading import load


@command("export_llama.py", FAILURE)
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of the language model")
    parser.add_argument("--subfolder", default="", help="where it is in there; transformer for a pipeline")
    parser.add_argument("--output_dir", required=True, help="folder to make; must not exist or be empty")
    args = parser.parse_args(argv)
    check_output(args.output_dir)
    with new_folder(args.output_dir) as folder:
        model = to_llama(load(DARForCausalLM, args.model, "language model", subfolder=args.subfolder))
        with writing(args.output_dir):
            model.save_pretrained(folder)
    print(f"saved {args.output_dir}")


if __name__ == "__main__":
    main()
