"""Write the cards in this folder from `dar_hf.hub.model_card`, the presets and the reports.

    python model_cards/make.py

Cards of the paper's models hold the paper's figures; cards of models trained here hold those of a report in reports/.
"""

from pathlib import Path

import torch

from dar_hf import DARConfig, DARForCausalLM, DARPipeline, DARTokenizer, FlowMatchAdamsBashforthScheduler
from dar_hf.evaluation import eval_results, read_report
from dar_hf.hub import model_card, paper_results
from dar_hf.presets import get_preset

FOLDER = Path(__file__).resolve().parent

PAPER_NOTE = "Figures are the paper's (Gao and Shou, 2025). They were not measured with this package."
CONVERT = """The authors publish the weights with [showlab/D-AR](https://github.com/showlab/D-AR), as PyTorch files.
With the tokenizer's and the language model's file, this makes a pipeline (the tokenizer is in `DIR/tokenizer`):

```bash
python examples/convert_checkpoint.py --tokenizer T.pt --transformer A.pt --output_dir DIR
```"""
DIGITS_SEEDS = "Seeds and processors with other rounding move the PSNR by about 0.7 dB ([log](../examples/LOG.md))."


def empty_pipeline(tokenizer: str, transformer: str, **config: int) -> DARPipeline:
    """A pipeline of two presets' sizes, without weights."""
    preset = get_preset(transformer)
    with torch.device("meta"):
        decoder = DARTokenizer(**get_preset(tokenizer).tokenizer)
        model = DARForCausalLM(DARConfig(**preset.transformer | config))
        model.generation_config.guidance_scale = preset.ar_recipe["guidance_scale"]
        return DARPipeline(decoder, model, FlowMatchAdamsBashforthScheduler(shift=decoder.config.time_shift))


def paper_card(model: DARPipeline | DARTokenizer, size: str, title: str, summary: str) -> str:
    """The card of a model of the paper."""
    card = model_card(
        model,
        "DIR",
        title=title,
        summary=summary,
        facts={"trained on": "ImageNet (ILSVRC 2012), 1.28 million images, by the authors"},
        results=paper_results(size),
        results_note=PAPER_NOTE,
        sections={"Convert the released weights": CONVERT},
        datasets=["ILSVRC/imagenet-1k"],
    )
    return str(card)


def digits_card() -> str:
    """The card of the demo's model, with the figures of its report."""
    preset = get_preset("digits")
    report = read_report(FOLDER / "reports" / "digits.json")
    settings = report["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in report["versions"].items())
    note = (
        f"Measured by `examples/evaluate_digits.py` on the {report['data']['count']} test digits and "
        f"{settings['count']} generated ones (guidance {settings['guidance_scale']}, the saved default). "
        "The judge is a support-vector classifier trained on the real training digits; it reads "
        f"{settings['judge_accuracy_on_test_digits']:.3f} of the real test digits correctly. The codebook's figures "
        "are of the test digits."
    )
    card = model_card(
        empty_pipeline("digits", "digits", codebook_size=256, num_classes=10, num_image_tokens=16, tokens_per_group=4),
        "outputs/digits/pipeline",
        title="D-AR digits",
        summary="A class-conditional pipeline for 8×8 handwritten digits, small enough to train from scratch on two "
        "CPU cores in minutes. It shows the whole method; it is no benchmark.",
        facts={
            "data": "scikit-learn's digits: first 1,437 to train, other 360 to test",
            "made by": "`make demo` (preset `digits`, seed 0), 2026-11-23",
            "made with": versions,
            "machine": "2 CPU cores with AVX-512 bf16",
            "time": "6 min 51 s after installation: tokenizer 5 min 32 s, language model 55 s, the rest loading and "
            "evaluation",
        },
        results=eval_results(report),
        results_note=note,
        pictures={
            "Four previews of a digit of each class": "images/digits_previews.png",
            "Samples, one class a row": "images/digits_samples.png",
            "Test digits above their reconstructions": "images/digits_reconstructions.png",
            "Losses": "images/digits_loss.png",
        },
        recipe={"Tokenizer (stage 1)": preset.tokenizer_recipe, "Language model (stage 2)": preset.ar_recipe},
        sections={"Limits": DIGITS_SEEDS},
        tags=["class-conditional"],
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
        "digits.md": digits_card(),
    }


if __name__ == "__main__":
    for name, text in cards().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
