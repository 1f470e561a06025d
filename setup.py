"""Package definition.

Every lower bound and the newest releases are tested (`make test-versions`); constraints.txt holds the versions that
everything else is tested with.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="dar-hf",
    version="0.1.0",
    description="D-AR (Diffusion via Autoregressive Models) as a Hugging Face package",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    license_files=["LICENSE", "NOTICE", "licenses/Apache-2.0.txt"],
    keywords=["image generation", "autoregressive", "diffusion", "flow matching", "tokenizer", "diffusers"],
    project_urls={
        "Paper": "https://arxiv.org/abs/2505.23660",
        "Original code": "https://github.com/showlab/D-AR",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    package_dir={"": "src"},
    packages=find_packages("src"),
    # the mark of a typed package, class names, the template of cards, small trained pipelines and their credits
    package_data={"dar_hf": ["py.typed", "assets/*", "assets/*/*", "assets/*/*/*"]},
    entry_points={"console_scripts": ["dar-hf = dar_hf.__main__:main"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "transformers>=5.17,<6",  # v5 configurations (rope_parameters, strict dataclasses)
        "diffusers>=0.42,<0.43",  # registers with the loader's own tables, which change between minor versions
        "datasets>=5.0",
        "accelerate>=1.10",
        "huggingface-hub>=1.32",  # transformers 5.17 takes none of 2.x
        "safetensors>=0.8",
        "evaluate>=0.4.5",
        "pillow>=11",
    ],
    extras_require={
        "train": ["matplotlib>=3.9"],  # loss curves
        "demo": ["matplotlib>=3.9", "scikit-learn>=1.5"],  # digits and the classifier that judges them
        "peft": ["peft>=0.17"],  # LoRA of the language model
        "int8": ["torchao>=0.18"],  # weight-only quantisation of the language model
        "deepspeed": ["deepspeed>=0.19"],  # ZeRO of the language model, on Linux
        "app": ["gradio>=6.31,<7"],  # the page; it takes pillow < 13, so constraints.txt holds 12
        "serve": ["ray[serve]>=2.60", "prometheus-client>=0.22"],  # dar-hf serve
        "emoji": ["resvg-py>=0.5"],  # renders the drawings of examples/emoji_dataset.py
        "dev": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "mypy>=1.14",
            "matplotlib>=3.9",
            "scikit-learn>=1.5",
            "peft>=0.17",
            "scikit-image>=0.25",  # an independent SSIM
            "gradio>=6.31,<7",
            "resvg-py>=0.5",
            "selenium>=4.30",  # drives the page, where there is a Chromium
            "prometheus-client>=0.22",  # the server without Ray, and the client it is for
            "openai>=2",
        ],
    },
)
