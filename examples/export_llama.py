"""Write a D-AR language model as a plain Llama, for servers that run Llama.

    python examples/export_llama.py --model outputs/digits/pipeline/transformer --output_dir outputs/llama

A prompt is one token, codebook_size + class; the answer is the image's codes, for `DARTokenizer.decode`.
"""

import argparse
import sys

from dar_hf import DARForCausalLM
from dar_hf.conversion import to_llama
from dar_hf.files import new_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or Hub id of the language model")
    parser.add_argument("--subfolder", default="", help="where it is in there; transformer for a pipeline")
    parser.add_argument("--output_dir", required=True, help="folder to make; must not exist or be empty")
    args = parser.parse_args()
    try:
        with new_folder(args.output_dir) as folder:
            to_llama(DARForCausalLM.from_pretrained(args.model, subfolder=args.subfolder)).save_pretrained(folder)
    except (ValueError, OSError) as error:
        sys.exit(f"export_llama.py: {error}")
    print(f"saved {args.output_dir}")


if __name__ == "__main__":
    main()
