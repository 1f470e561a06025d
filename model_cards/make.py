"""Write the cards in this folder from `dar_hf.hub.model_card`, the presets and the reports.

    python model_cards/make.py

Cards of the paper's models hold the paper's metrics. Cards of models trained here hold those of a report: every file
in reports/, which `examples/evaluate_digits.py` or `evaluate_emoji.py` wrote, gives a card of its name.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult

from dar_hf import (
    DARConfig,
    DARForCausalLM,
    DARPipeline,
    DARTokenizer,
    FlowMatchAdamsBashforthScheduler,
    sample_pipeline,
)
from dar_hf.evaluation import eval_results, read_report
from dar_hf.hub import empty_model, model_card
from dar_hf.metrics import TASKS, metric_name
from dar_hf.presets import get_preset
from dar_hf.utils.sample import SAMPLES

FOLDER = Path(__file__).resolve().parent
CREDITS = FOLDER.parent / "src" / "dar_hf" / "assets" / "CREDITS.md"

PAPER_NAME = "D-AR, ICLR 2026, arXiv 2505.23660"
PAPER_URL = "https://arxiv.org/abs/2505.23660"
IMAGENET = ("ILSVRC/imagenet-1k", "ImageNet 256×256")
SAMPLED = ("fid", "inception_score", "precision", "recall")

# the paper's tables: rFID by denoising steps; FID, IS, precision and recall by guidance; FID of previews
PAPER_RESULTS: dict[str, list[tuple[str, dict[str, Any], dict[str, float]]]] = {
    "v1": [
        ("reconstruction", {"num_inference_steps": steps}, {"fid": rfid})
        for steps, rfid in (
            ("4, Euler", 2.35),
            ("8, Euler", 1.58),
            ("8, Adams-Bashforth", 1.52),  # the default
            ("12, Euler", 1.73),
            ("16, Euler", 1.93),
        )
    ],
    "L": [
        ("generation", {"guidance_scale": guidance}, dict(zip(SAMPLED, values, strict=True)))
        for guidance, values in (
            ("none", (7.43, 117.6, 0.71, 0.63)),
            ("1.5", (3.50, 245.2, 0.83, 0.54)),
            ("1.1 → 8", (2.44, 263.0, 0.78, 0.61)),
        )
    ]
    + [
        ("generation", {"num_tokens": tokens}, {"fid": fid})
        for tokens, fid in ((64, 7.38), (128, 3.94), (192, 2.93), (256, 2.44))
    ],
    "XL": [
        ("generation", {"guidance_scale": guidance}, dict(zip(SAMPLED, values, strict=True)))
        for guidance, values in (
            ("none", (5.11, 145.8, 0.73, 0.64)),
            ("1.5", (3.39, 276.4, 0.84, 0.55)),
            ("1.1 → 10", (2.09, 298.4, 0.79, 0.62)),
        )
    ],
}

PAPER_NOTE = "The metrics are the paper's (Gao and Shou, ICLR 2026). They were not measured with this package."
# what else there is to say about the metrics of one size
NOTES = {
    "L": "The paper's FID of 2.44 is at a guidance of 1.1 → 8, the default here. The sampling script that was "
    "released with the weights takes 1.2 → 8, at which others measured 2.63: to compare with those values, sample "
    "with `guidance_scale=(1.2, 8.0)`."
}
CONVERT = """The authors publish the weights with [showlab/D-AR](https://github.com/showlab/D-AR), as PyTorch files.
With the tokenizer's and the language model's file, this makes a pipeline (the tokenizer is in `DIR/tokenizer`):

```bash
python examples/convert_checkpoint.py --tokenizer T.pt --transformer A.pt --output_dir DIR
```"""
MNIST_COMMANDS = """The digits are MNIST's, enlarged from 28×28 to 32×32 pixels. `path/to/mnist` is any copy that
`datasets` reads, with the columns `image` and `label` and the splits `train` and `test`.

```bash
DATA="--preset mnist --dataset_name path/to/mnist"
python examples/train.py tokenizer $DATA --output_dir outputs/mnist/tokenizer
python examples/train.py ar $DATA --tokenizer outputs/mnist/tokenizer --output_dir outputs/mnist/pipeline
python examples/train.py ar --preset mnist-distilled --tokenizer outputs/mnist/tokenizer \\
    --init_from outputs/mnist/pipeline --output_dir outputs/mnist/distilled
python examples/make_sample.py --pipeline outputs/mnist/distilled --name mnist
python examples/evaluate_digits.py --pipeline src/dar_hf/assets/mnist --dataset_name path/to/mnist \\
    --num_images 1000 --output_dir outputs/mnist
```"""
MNIST_LIMITS = (
    "The last group says next to nothing: its step loses 0.1 dB. Strokes are a little softer than real ones."
)
EMOJI_COMMANDS = """`path/to/emoji` is the data set that `emoji_dataset.py` makes of the published drawings.

```bash
python examples/emoji_dataset.py --output_dir path/to/emoji
DATA="--preset emoji --dataset_name path/to/emoji"
python examples/train.py tokenizer $DATA --output_dir outputs/emoji/tokenizer
python examples/train.py ar $DATA --tokenizer outputs/emoji/tokenizer --output_dir outputs/emoji/pipeline
python examples/make_sample.py --pipeline outputs/emoji/pipeline --name emoji
python examples/emoji_judge.py --dataset_name path/to/emoji --output_dir outputs/emoji/judge
python examples/evaluate_emoji.py --pipeline src/dar_hf/assets/emoji --dataset_name path/to/emoji \\
    --judge outputs/emoji/judge --output_dir outputs/emoji
```"""
EMOJI_LIMITS = (
    "The model mostly reproduces its training drawings. Given a name that it has seen in two styles and asked for the "
    "third, it comes nearest to the right drawing, among 186, in 30 % of cases. A style classifier accepts 73 % of "
    "these images (and 74 % of reconstructions), but only 39 % are nearer to the drawing in the requested style than "
    "to the same name's other two (33 % by chance). Names that it has never seen become something else. A prompt is a "
    "style and a name in the words of the captions: `a red apple` still gives an apple, `apple` does not. Edges are "
    "soft and letters illegible: the tokenizer reconstructs at 20 dB PSNR. A large vision-language model that was "
    "told nothing named 10 of 20 drawings of training captions within three guesses, and 3 of 20 of validation "
    "captions."
)


def credits_of(name: str) -> str:
    """What the package says about the images that one of its models was trained on."""
    text = CREDITS.read_text(encoding="utf-8")
    return text.split(f"\n## {name}\n")[1].split("\n## ")[0].strip()


SAMPLE_USE = """It comes with the package:

```python
import dar_hf

pipe = dar_hf.DARPipeline.from_pretrained(dar_hf.sample_pipeline("{name}"))
images = pipe({subject}).images
```"""

DIGITS_NOTE = (
    "Measured by `examples/evaluate_digits.py` on the {data[count]:,} test digits and {settings[count]:,} "
    "generated ones (guidance {settings[guidance_scale]}, the saved default). The judge is a support-vector "
    "classifier trained on the real training digits; it reads {settings[judge_accuracy_on_test_digits]:.3f} of "
    "the real test digits correctly. The codebook's metrics are of the test digits."
)
EMOJI_NOTE = (
    "Measured by `examples/evaluate_emoji.py` with guidance {settings[guidance_scale]} (the saved default; compared "
    "with others on 200 training captions that are not judged). One image is drawn for each of "
    "{settings[training_captions]} training captions and for each of the {settings[validation_captions]} validation "
    "captions, whose names training shows in the two other styles only. For each image the judge, which learned from "
    "real training drawings only, finds the nearest real drawing: among {settings[training_captions]} for training "
    "captions and among {settings[validation_captions]} for validation captions, so the two shares are not "
    "comparable. Style is measured in two ways: by a classifier that is right on "
    "{settings[judge_style_accuracy_on_real_drawings]:.3f} of the real validation drawings, and, for names with one "
    "drawing in each style, by which of the three is nearest (chance 0.333). Recipe and judge were chosen on these "
    "validation drawings, so their metrics are slightly optimistic."
)

DIGITS_PICTURES = {
    "previews": "Previews of a digit of each class, one row per step",
    "samples": "Samples, one class per row",
    "reconstructions": "Test digits above their reconstructions",
    "loss": "Losses",
}
EMOJI_PICTURES = {
    "samples": "Real drawings above those drawn from their captions: two rows of training captions, then two of "
    "validation captions",
    "previews": "Previews of five training captions and five validation captions, one row per step",
    "reconstructions": "Validation drawings above their reconstructions",
    "loss": "Losses",
}

STAGES = ("Tokenizer (stage 1)", "Language model (stage 2)")
DISTILLATION = "Guidance in one pass"
# what a report does not say of a model trained here
TRAINED: dict[str, dict[str, Any]] = {
    "digits": {
        "title": "D-AR digits",
        "summary": "A class-conditional pipeline for 8×8 handwritten digits, small enough to train from scratch on "
        "two CPU cores in minutes. It shows the whole method; it is no benchmark.",
        "facts": {
            "data": "scikit-learn's digits: first 1,437 to train, other 360 to test",
            "made by": "`make demo` (preset `digits`, seed 0), 2026-11-29",
            "machine": "2 cores of an AMD EPYC (Zen 4, AVX-512 bf16)",
            "time": "3 min 58 s: tokenizer 2 min 47 s, language model 59 s, evaluation 12 s",
        },
        "sections": {
            "Limits": "Groups 6 and 7 add little, and the last step loses 0.4 dB. Seeds and processors with other "
            "rounding move the PSNR by about 0.5 dB ([experiments](../docs/experiments.md))."
        },
        "note": DIGITS_NOTE,
        "pictures": DIGITS_PICTURES,
        "tags": ["class-conditional"],
        "license": "mit",
    },
    "emoji": {
        "title": "D-AR emoji",
        "summary": "Draws emoji from text, 48×48 in colour, trained from scratch on CPU cores. It comes with the "
        "package, in half precision, and shows what the method does; it is no benchmark.",
        "facts": {
            "data": "5,900 drawings of three published sets, with captions such as `noto red apple`; 186 to validate, "
            "whose names training shows in the two other styles only; 121 to test",
            "made by": "the commands below (seed 0), 2026-11-29 and 30",
            "machine": "an AMD EPYC (Zen 4, AVX-512 bf16): one core for the tokenizer, two for the language model",
            "time": "tokenizer 74 min, language model 91 min",
            "weights": "float16 in the package; they load in float32 unless `dtype` says otherwise",
        },
        "sections": {
            "Quick start": SAMPLE_USE.format(name="emoji", subject='prompt="noto red apple"'),
            "How it was made": EMOJI_COMMANDS,
            "Licences and credits": credits_of("emoji"),
            "Limits": EMOJI_LIMITS,
        },
        "note": EMOJI_NOTE,
        "pictures": EMOJI_PICTURES,
        "tags": ["text-to-image"],
        "license": ["apache-2.0", "mit", "cc-by-4.0"],
    },
    "mnist": {
        "title": "D-AR MNIST",
        "summary": "A class-conditional pipeline for 32×32 handwritten digits, trained from scratch on CPU cores. "
        "It comes with the package, in half precision, and shows what the method does; it is no benchmark. A guidance "
        "of 1.5 was distilled into its language model, so it needs only one pass per code.",
        "facts": {
            "data": "MNIST: 60,000 to train, other 10,000 to test. The copy used is labelled MIT (rasbt/mnist-pngs); "
            "the digits, by Yann LeCun and Corinna Cortes, are commonly given as CC BY-SA 3.0",
            "made by": "the commands below (seed 0), 2026-11-29 and 30",
            "machine": "one core of an AMD EPYC (Zen 4, AVX-512 bf16), the other one busy with other work",
            "time": "tokenizer 60 min, language model 43 min, distillation 6 min (in float32)",
            "weights": "float16 in the package; they load in float32 unless `dtype` says otherwise",
        },
        "sections": {
            "Quick start": SAMPLE_USE.format(name="mnist", subject='"7"'),
            "How it was made": MNIST_COMMANDS,
            "Limits": MNIST_LIMITS,
        },
        "note": DIGITS_NOTE,
        "pictures": DIGITS_PICTURES | {"loss": "Losses, before the distillation"},
        "distilled": "mnist-distilled",
        "tags": ["class-conditional"],
        "license": "mit",
    },
}


def empty_pipeline(tokenizer: str, transformer: str, **config: int) -> DARPipeline:
    """A pipeline of two presets' sizes, without weights."""
    preset = get_preset(transformer)
    with torch.device("meta"):
        decoder = DARTokenizer(**get_preset(tokenizer).tokenizer)
        model = DARForCausalLM(DARConfig(**preset.transformer | config))
        model.generation_config.guidance_scale = preset.ar_recipe["guidance_scale"]
        order = preset.ar_recipe.get("solver_order", 2)
        solver = FlowMatchAdamsBashforthScheduler(shift=decoder.config.time_shift, solver_order=order)
        return DARPipeline(decoder, model, solver)


def paper_results(name: str) -> list[EvalResult]:
    """The paper's own metrics of a released model, marked as the paper's.

    Args:
        name: v1 (the tokenizer), L or XL.

    Raises:
        ValueError: for another name.
    """
    if name not in PAPER_RESULTS:
        raise ValueError(f"no metrics of {name!r} here; there are {', '.join(PAPER_RESULTS)}.")
    return [
        EvalResult(
            task_type=TASKS[task][0],
            task_name=TASKS[task][1],
            dataset_type=IMAGENET[0],
            dataset_name=IMAGENET[1],
            metric_type=kind,
            metric_value=value,
            metric_name=metric_name(kind, task),
            metric_args=settings,
            source_name=PAPER_NAME,
            source_url=PAPER_URL,
        )
        for task, settings, metrics in PAPER_RESULTS[name]
        for kind, value in metrics.items()
    ]


def paper_card(model: DARPipeline | DARTokenizer, size: str, title: str, summary: str) -> str:
    """The card of a model of the paper."""
    note = PAPER_NOTE
    if size in NOTES:
        note += f"\n\n{NOTES[size]}"
    card = model_card(
        model,
        "DIR",
        title=title,
        summary=summary,
        facts={"trained on": "ImageNet (ILSVRC 2012), 1.28 million images, by the authors"},
        results=paper_results(size),
        results_note=note,
        sections={"Convert the released weights": CONVERT},
        datasets=["ILSVRC/imagenet-1k"],
    )
    return str(card)


def digits_pipeline(name: str) -> DARPipeline:
    """A pipeline of ten classes of a preset's sizes, without weights."""
    sizes = get_preset(name).tokenizer
    return empty_pipeline(
        name,
        name,
        codebook_size=sizes["codebook_size"],
        num_classes=10,
        num_image_tokens=sizes["num_tokens"],
        tokens_per_group=sizes["num_tokens"] // sizes["num_groups"],
    )


def trained_card(name: str) -> str:
    """The card of a model trained here: its preset, the metrics of its report, its pictures in images/."""
    preset = get_preset(name)
    report = read_report(FOLDER / "reports" / f"{name}.json")
    about = TRAINED[name]
    model = empty_model(sample_pipeline(name)) if name in SAMPLES else digits_pipeline(name)
    recipe = {STAGES[0]: preset.tokenizer_recipe, STAGES[1]: preset.ar_recipe}
    if "distilled" in about:
        recipe[DISTILLATION] = get_preset(about["distilled"]).ar_recipe
    versions = ", ".join(f"{package} {version}" for package, version in report["versions"].items())
    card = model_card(
        model,
        f"outputs/{name}/pipeline",
        title=about["title"],
        summary=about["summary"],
        facts=about["facts"] | {"made with": versions},
        results=eval_results(report),
        results_note=about["note"].format(data=report["data"], settings=report["settings"]),
        pictures={text: f"images/{name}_{picture}.png" for picture, text in about["pictures"].items()},
        recipe=recipe,
        sections=about["sections"],
        tags=about["tags"],
        license=about["license"],
    )
    return str(card)


def cards() -> dict[str, str]:
    """Every card by its file's name."""
    with torch.device("meta"):
        tokenizer = DARTokenizer()
    pipeline = "The {0} language model of the paper with its tokenizer: class-conditional ImageNet at 256×256. Every "
    pipeline += "finished group of 32 tokens gives the next denoising step and a preview."
    return {
        "dar-tokenizer-v1.md": paper_card(
            tokenizer,
            "v1",
            "D-AR tokenizer v1",
            "The sequential diffusion tokenizer of the paper: an image becomes 256 tokens in 8 groups, and each group "
            "conditions one denoising step of a flow-matching decoder on pixels.",
        ),
        "dar-l.md": paper_card(empty_pipeline("v1", "L"), "L", "D-AR-L", pipeline.format("L")),
        "dar-xl.md": paper_card(empty_pipeline("v1", "XL"), "XL", "D-AR-XL", pipeline.format("XL")),
        **{f"{report.stem}.md": trained_card(report.stem) for report in sorted((FOLDER / "reports").glob("*.json"))},
    }


if __name__ == "__main__":
    for name, text in cards().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
