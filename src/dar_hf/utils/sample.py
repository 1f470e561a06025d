"""The small pipelines that come with the package, so that nobody has to train before seeing what this is."""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "assets"
SAMPLES = ("emoji", "mnist")  # the default first
# Drawn when no words are given: captions of the training split and, in the last three, names that it shows in the two
# other styles only. These were picked because they work: most such prompts do not
EMOJI_PROMPTS = [
    "noto red apple",
    "twemoji octopus",
    "fluent sunflower",
    "fluent pizza",
    "twemoji strawberry",
    "twemoji penguin",
    "twemoji hamburger",
    "fluent evergreen tree",
    "noto police officer",
    "twemoji man red hair",
]


def sample_pipeline(name: str = SAMPLES[0]) -> str:
    """Folder of a small trained pipeline that comes with the package.

    ``DARPipeline.from_pretrained(dar_hf.sample_pipeline())`` loads it, without a network. Its weights are stored in
    half precision and load, like those of every pipeline, in float32 unless ``dtype`` says otherwise.

    Args:
        name: "emoji", the default, draws emoji from text, 48x48 in colour. It was trained on Noto Emoji (Apache-2.0),
            Fluent Emoji (MIT) and Twemoji (CC BY 4.0, by Twitter and contributors). "mnist" draws handwritten
            digits, 32x32 grey, ten classes. It was trained on MNIST: the copy used is labelled MIT, the digits are
            commonly given as CC BY-SA 3.0.

    Raises:
        ValueError: for another name.
        FileNotFoundError: if this installation lacks it.
    """
    if name not in SAMPLES:
        raise ValueError(f"no sample pipeline {name!r}; there are {', '.join(SAMPLES)}.")
    folder = FOLDER / name
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"this installation of dar_hf comes without its sample pipeline: {folder} holds no model_index.json. "
            "Install the package again, or give a pipeline of your own."
        )
    return str(folder)
