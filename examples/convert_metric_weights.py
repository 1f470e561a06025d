"""Convert the weights of measuring networks to safetensors; the files are read without running code in them.

python examples/convert_metric_weights.py inception pt_inception-2015-12-05-6726825d.pth inception.safetensors
python examples/convert_metric_weights.py lpips vgg16-397923af.pth vgg.pth lpips.safetensors
"""

import argparse
import sys

from dar_hf.metrics.inception import convert_inception
from dar_hf.metrics.lpips import convert_lpips
from dar_hf.metrics.weights import read_original, write_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="network", required=True)
    inception = commands.add_parser("inception", help="FID's Inception, of pytorch-fid or torch-fidelity")
    inception.add_argument("source")
    inception.add_argument("target")
    lpips = commands.add_parser("lpips", help="LPIPS v0.1: torchvision's VGG16 and the linear heads")
    lpips.add_argument("vgg16")
    lpips.add_argument("heads")
    lpips.add_argument("target")
    args = parser.parse_args()
    try:
        if args.network == "inception":
            state = convert_inception(read_original(args.source))
        else:
            state = convert_lpips(read_original(args.vgg16), read_original(args.heads))
        print(f"{args.target}: {len(state)} tensors, hash {write_weights(state, args.target)}")
    except (ValueError, OSError) as error:
        print(f"convert_metric_weights.py: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
