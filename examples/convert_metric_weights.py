"""Convert the weights of measuring networks to safetensors; the files are read without running code in them.

python examples/convert_metric_weights.py inception pt_inception-2015-12-05-6726825d.pth inception.safetensors
python examples/convert_metric_weights.py lpips vgg16-397923af.pth vgg.pth lpips.safetensors
"""

import argparse
from collections.abc import Sequence

from dar_hf.metrics.inception import convert_inception
from dar_hf.metrics.lpips import convert_lpips
from dar_hf.metrics.weights import read_original, write_weights
from dar_hf.utils.commands import check_output, command, path_option, writing
from dar_hf.utils.loading import check_weights


@command("convert_metric_weights.py")
def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="network", required=True)
    inception = commands.add_parser("inception", help="FID's Inception, of pytorch-fid or torch-fidelity")
    inception.add_argument("source")
    inception.add_argument("target", type=path_option)
    lpips = commands.add_parser("lpips", help="LPIPS v0.1: torchvision's VGG16 and the linear heads")
    lpips.add_argument("vgg16")
    lpips.add_argument("heads")
    lpips.add_argument("target", type=path_option)
    args = parser.parse_args(argv)
    check_output(args.target, folder=False)
    sources = [args.source] if args.network == "inception" else [args.vgg16, args.heads]
    for source in sources:
        check_weights(source)
    convert = convert_inception if args.network == "inception" else convert_lpips
    state = convert(*map(read_original, sources))
    with writing(args.target):
        digest = write_weights(state, args.target)
    print(f"{args.target}: {len(state)} tensors, hash {digest}")


if __name__ == "__main__":
    main()
