"""The small pipeline that comes with the package, so that nobody has to train before seeing what this is."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "assets" / "sample"


def sample_pipeline() -> str:
    """Folder of a small trained pipeline that comes with the package: handwritten digits, 32x32 grey, ten classes.

    ``DARPipeline.from_pretrained(dar_hf.sample_pipeline())`` loads it, without a network. Its weights are stored in
    half precision and load, like those of every pipeline, in float32 unless ``dtype`` says otherwise. It was trained
    on MNIST: the copy used is labelled MIT, the digits are commonly given as CC BY-SA 3.0.

    Raises:
        FileNotFoundError: if this installation lacks it.
    """
    if not (FOLDER / "model_index.json").is_file():
        raise FileNotFoundError(
            f"this installation of dar_hf comes without its sample pipeline: {FOLDER} holds no model_index.json. "
            "Install the package again, or give a pipeline of your own."
        )
    return str(FOLDER)
