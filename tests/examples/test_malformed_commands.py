"""Malformed command lines, option files, folders and files: each must end with one clear line.

Every case is classed as a clear error (exit code 1 or 2, and one line of the command's or of argparse's that says what
is wrong), another exception (a traceback), or silently accepted (exit code 0). The last two must not occur.
"""

import importlib.util
import io
import json
import shlex
import shutil
import socket
import sys
from pathlib import Path

import datasets
import diffusers
import pytest
import torch
import transformers
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file, save_file
from scripts import load_script

import dar_hf.__main__
from dar_hf import DARConfig, DARForCausalLM, DARPipeline, DARTokenizer, FlowMatchAdamsBashforthScheduler
from dar_hf.presets import get_preset

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BENCHMARKS = ROOT / "benchmarks"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
TINY = (
    "--preset digits --dataset_name digits --mixed_precision no --max_train_steps 1 --unquantized_steps 0 "
    "--model_overrides encoder_dim=32 "
    "decoder_dim=32 diffusion_dim=32 attention_head_dim=16 num_encoder_layers=1 num_decoder_layers=1 diffusion_depth=1"
)
AR = "train ar --preset digits --dataset_name digits --mixed_precision no --tokenizer {w}/pipe/tokenizer"
RECONSTRUCTION = "measure reconstruction --dataset_name digits --features {w}/features.py:load"
REFERENCE = "measure generation --pipeline {w}/pipe --features {w}/features.py:load --reference"
GENERATION = "measure generation --dataset_name digits --features {w}/features.py:load --num_images 4"

# what is given, and what the line must say
CASES: dict[str, list[tuple[str, str]]] = {
    "train": [
        ("train", "usage: train.py"),
        ("train tokeniser", "usage: train.py"),
        ("train tokenizer --presett digits", "--presett"),
        ("train tokenizer --preset", "--preset"),
        ("train tokenizer --preset huge", "unknown preset 'huge'"),
        ("train tokenizer --preset L --dataset_name digits", "has no tokenizer"),
        (f"train tokenizer {TINY} --seed x", "--seed"),
        (f"train tokenizer {TINY} --seed -1", "seed must not be negative"),
        (f"train tokenizer {TINY} --train_batch_size 0", "train_batch_size must be at least 1"),
        (f"train tokenizer {TINY} --learning_rate nan", "learning_rate"),
        (f"train tokenizer {TINY} --flip maybe", "--flip"),
        (f"train tokenizer {TINY} --crop half", "crop"),
        (f"train tokenizer {TINY} --mixed_precision fp8", "mixed_precision must be"),
        (f"train tokenizer {TINY} --dataset_name {{w}}/none", "none"),
        (f"train tokenizer {TINY} --dataset_name {{w}}/empty", "empty"),
        (f"train tokenizer {TINY} --train_split dev", "dev"),
        (f"train tokenizer {TINY} --image_column picture", "picture"),
        (f"train tokenizer {TINY} --output_dir {{w}}/file", "file"),
        (f"train tokenizer {TINY} --output_dir ''", "a path is empty"),
        (f"train tokenizer {TINY} --output_dir {{w}}/file/run", "not a folder"),
        (f"train tokenizer {TINY} --output_dir {{w}}/full", "No space left"),
        (f"train tokenizer {TINY} --output_dir {{w}}/readonly/run", "Read-only"),
        (f"train tokenizer {TINY} --output_dir {{w}}/pipe", "holds a DARPipeline, not a DARTokenizer"),
        (f"train tokenizer {TINY} --output_dir {{w}}/badjson/tokenizer", "Expecting property name"),
        (f"train tokenizer {TINY} --resume_from_checkpoint latest-one", "latest-one"),
        (f"train tokenizer {TINY} --init_from {{w}}/none", "there is no such folder"),
        (f"train tokenizer {TINY} --init_from {{w}}/pointer", "init_from"),
        (f"train tokenizer {TINY} --init_from {{w}}/cut", "cut off"),
        (f"train tokenizer {TINY} --init_from {{w}}/pipe/transformer", "init_from"),
        (f"train tokenizer {TINY} encoder_dmi=3", "encoder_dmi"),
        (f"train tokenizer {TINY} encoder_dim", "name=value"),
        (f"train tokenizer {TINY} encoder_dim=big", "DARTokenizer"),
        (f"train tokenizer {TINY} encoder_dim=-32", "DARTokenizer"),
        (f"train tokenizer {TINY} num_tokens=0", "num_tokens"),
        (f"train tokenizer {TINY} sample_size=None", "DARTokenizer"),
        (f"train tokenizer {TINY} decoder_dim=[3]", "DARTokenizer"),
        ("train tokenizer --preset digits --dataset_name digits --perceptual_weight 1", "LPIPS needs"),
        (f"train tokenizer {TINY} --push_steps 3", "push_to_hub"),
        (f"train tokenizer {TINY} --report_to nobody", "nobody"),
        (f"train tokenizer {TINY} --config {{w}}/none.yaml", "none.yaml"),
        (f"train tokenizer {TINY} --config ''", "cannot read options"),
        (f"train tokenizer {TINY} --resume_from_checkpoint ''", "resume_from_checkpoint is empty"),
        (f"train tokenizer {TINY} --config {{w}}", "cannot read options"),
        (f"train tokenizer {TINY} --config {{w}}/pixel.png", "pixel.png"),
    ],
    "train ar": [
        ("train ar --preset digits --dataset_name digits", "stage 2 needs --tokenizer"),
        ("train ar --preset L --tokenizer {w}/pipe/tokenizer", "dataset_name is missing"),
        (f"{AR} --preset v1", "no language model"),
        (f"{AR} --tokenizer {{w}}/none", "no tokenizer at"),
        (f"{AR} --tokenizer {{w}}/pipe", "tokenizer"),
        (f"{AR} --tokenizer {{w}}/pipe/transformer", "tokenizer"),
        (f"{AR} --tokenizer {{w}}/pointer/tokenizer", "git-lfs pointer"),
        (f"{AR} --tokenizer {{w}}/cut/tokenizer", "cut off"),
        (f"{AR} --tokenizer {{w}}/badjson/tokenizer", "config.json"),
        (f"{AR} --tokenizer {{w}}/badtype/tokenizer", "cannot load the tokenizer"),
        (f"{AR} --model_overrides codebook_size=99", "the tokenizer has 32"),
        (f"{AR} --model_overrides num_image_tokens=99", "the tokenizer has 16"),
        (f"{AR} --model_overrides num_classes=3", "the data set has 10 classes"),
        (f"{AR} --model_overrides vocab_size=3", "vocab_size"),
        (f"{AR} --model_overrides return_dict=False", "return_dict"),
        (f"{AR} --model_overrides hidden_act=magic", "magic"),
        (f"{AR} --model_overrides num_key_value_heads=3", "must divide"),
        (f"{AR} --model_overrides head_dim=3", "must be even"),
        (f"{AR} --model_overrides hidden_size=33", "hidden size"),
        (f"{AR} --model_overrides resid_dropout=2.0", "resid_dropout"),
        (f"{AR} --model_overrides num_hidden_layers=few", "num_hidden_layers"),
        (f"{AR} --model_overrides rope_parameters=3", "rope"),
        (f"{AR} --guidance_scale 1 2 3", "guidance_scale"),
        (f"{AR} --guidance_scale -1", "guidance_scale"),
        (f"{AR} --solver_order 3", "solver_order"),
        (f"{AR} --lora_rank 2", "--init_from"),
        (f"{AR} --new_classes mean", "--init_from"),
        (f"{AR} --new_classes median --init_from {{w}}/pipe", "null, mean or fresh"),
        (f"{AR} --init_from {{w}}/pipe", "--new_classes"),
        (f"{AR} --init_from {{w}}/none", "init_from"),
        (f"{AR} --init_from {{w}}/cut", "cut off"),
        (f"{AR} --init_from {{w}}/pipe --model_overrides hidden_size=64", "only dropouts can change"),
        (f"{AR} --codes {{w}}/none", "no finished set of codes"),
        (f"{AR} --codes ''", "codes is empty"),
        (f"{AR} --init_from ''", "init_from is empty"),
        (f"{AR} --codes {{w}}/empty --cache_codes", "exclude each other"),
        (f"{AR} --label_column kind", "kind"),
        (f"{AR} --output_dir {{w}}/file", "file"),
    ],
    "option files": [
        ("train tokenizer --config {w}/yaml/syntax.yaml", "syntax.yaml"),
        ("train tokenizer --config {w}/yaml/list.yaml", "options by name"),
        ("train tokenizer --config {w}/yaml/word.yaml", "options by name"),
        ("train tokenizer --config {w}/yaml/unknown.yaml", "learning_rat"),
        ("train tokenizer --config {w}/yaml/number_name.yaml", "1"),
        ("train tokenizer --config {w}/yaml/twice.yaml", "seed more than once"),
        ("train tokenizer --config {w}/yaml/tag.yaml", "tag.yaml"),
        ("train tokenizer --config {w}/yaml/precision_yes.yaml", "mixed_precision"),
        ("train tokenizer --config {w}/yaml/text_number.yaml", "output_dir takes text, got 2024: put it in quotes"),
        ("train tokenizer --config {w}/yaml/number_text.yaml", "max_train_steps takes a whole number, got 'many'"),
        ("train tokenizer --config {w}/yaml/whole_half.yaml", "max_train_steps takes a whole number, got 1.5"),
        ("train tokenizer --config {w}/yaml/float_word.yaml", "learning_rate takes a number, got 'fast'"),
        ("train tokenizer --config {w}/yaml/float_bool.yaml", "learning_rate takes a number, got True"),
        ("train tokenizer --config {w}/yaml/bool_word.yaml", "flip takes true or false, got 'maybe'"),
        ("train tokenizer --config {w}/yaml/null.yaml", "seed takes a whole number, got None"),
        ("train tokenizer --config {w}/yaml/no_list.yaml", "model_overrides takes a list"),
        ("train tokenizer --config {w}/yaml/list_items.yaml", "model_overrides takes text, got 3"),
        ("train tokenizer --config {w}/yaml/preset_list.yaml", "preset takes text"),
        ("train ar --config {w}/yaml/one_scale.yaml", "guidance_scale takes a list"),
        ("train tokenizer --config {w}/yaml/nested.yaml", "options"),
    ],
    "extract_codes": [
        ("extract_codes", "--tokenizer is missing"),
        ("extract_codes --tokenizer {w}/pipe/tokenizer", "--dataset_name is missing"),
        ("extract_codes --tokenizer {w}/none --dataset_name digits", "no tokenizer at"),
        ("extract_codes --tokenizer {w}/pointer/tokenizer --dataset_name digits", "git-lfs pointer"),
        ("extract_codes --tokenizer {w}/cut/tokenizer --dataset_name digits", "cut off"),
        ("extract_codes --tokenizer {w}/pipe/tokenizer --dataset_name {w}/none", "none"),
        ("extract_codes --tokenizer {w}/pipe/tokenizer --dataset_name digits --crop random", "crop"),
        ("extract_codes --tokenizer {w}/pipe/tokenizer --dataset_name digits --batch_size 0", "batch_size"),
        ("extract_codes --tokenizer {w}/pipe/tokenizer --dataset_name digits --output_dir {w}/pipe", "no codes"),
        ("extract_codes --tokenizer {w}/pipe/tokenizer --dataset_name digits --output_dir {w}/file", "not a folder"),
        ("extract_codes --tokenizer {w}/pipe/tokenizer --dataset_name digits --output_dir {w}/full", "No space left"),
        ("extract_codes --tokenizer x --dataset_name digits --shard_sise 3", "shard_sise"),
        ("extract_codes --tokenizer x --dataset_name digits --output_dir ''", "a path is empty"),
    ],
    "generate": [
        ("generate", "--pipeline"),
        ("generate --pipeline", "--pipeline"),
        ("generate --pipeline /nowhere", "there is no such folder"),
        ("generate --pipeline ''", "no pipeline is named"),
        ("generate --pipeline ~nobody-here/pipe", "home directory"),
        ("generate --pipeline {w}/pipe --output_dir ''", "a path is empty"),
        ("generate --pipeline {w}/pipe/tokenizer", "cannot load the pipeline"),
        ("generate --pipeline {w}/file", "it is a file"),
        ("generate --pipeline {w}/empty", "cannot load the pipeline"),
        ("generate --pipeline {w}/pointer", "git-lfs pointer"),
        ("generate --pipeline {w}/cut", "cut off"),
        ("generate --pipeline {w}/badjson", "config.json"),
        ("generate --pipeline {w}/badtype", "cannot load the pipeline"),
        ("generate --pipeline {w}/binary", "config.json"),
        ("generate --pipeline {w}/mismatch", "disagree"),
        ("generate --pipeline {w}/incomplete", "cannot load the pipeline"),
        ("generate --pipeline {w}/wrongshape", "cannot load the pipeline"),
        ("generate --pipeline someone/nothing", "neither as a folder nor on the Hub"),
        ("generate --pipeline 'a b'", "no pipeline at 'a b'"),
        ("generate --pipeline {w}/pipe --device gpu", "'gpu' is no device"),
        ("generate --pipeline {w}/pipe --device cuda:99", "cuda:99"),
        ("generate --pipeline {w}/pipe --device meta", "meta"),
        ("generate --pipeline {w}/pipe --dtype int8", "--dtype"),
        ("generate --pipeline {w}/pipe --seed x", "--seed"),
        ("generate --pipeline {w}/pipe --seed 99999999999999999999", "--seed"),
        ("generate --pipeline {w}/pipe --class_labels whale", "whale"),
        ("generate --pipeline {w}/pipe --class_labels 5", "class"),
        ("generate --pipeline {w}/pipe --class_labels -1", "-1"),
        ("generate --pipeline {w}/pipe --temperature -1", "temperature"),
        ("generate --pipeline {w}/pipe --temperature nan", "temperature"),
        ("generate --pipeline {w}/pipe --top_k -3", "top_k"),
        ("generate --pipeline {w}/pipe --top_p 0", "top_p"),
        ("generate --pipeline {w}/pipe --guidance_scale 1 2 3", "guidance_scale"),
        ("generate --pipeline {w}/pipe --num_tokens 0", "num_tokens"),
        ("generate --pipeline {w}/pipe --num_inference_steps 0", "num_inference_steps"),
        ("generate --pipeline {w}/pipe --num_images_per_prompt 0", "num_images_per_prompt"),
        ("generate --pipeline {w}/pipe --strength 0.5", "strength"),
        ("generate --pipeline {w}/pipe --layout_tokens 3", "layout_image"),
        ("generate --pipeline {w}/pipe --layout_image {w}/none.png --layout_tokens 3", "none.png"),
        ("generate --pipeline {w}/pipe --layout_image {w}/file --layout_tokens 3", "file"),
        ("generate --pipeline {w}/pipe --image {w}/half.png --strength 0.5", "half.png"),
        ("generate --pipeline {w}/pipe --image {w} --strength 0.5", "directory"),
        ("generate --pipeline {w}/pipe --previews film", "--previews"),
        ("generate --pipeline {w}/pipe --output_dir {w}/file", "not a folder"),
        ("generate --pipeline {w}/pipe --output_dir {w}/full", "No space left"),
        ("generate --pipeline {w}/pipe --output_dir {w}/readonly", "Read-only"),
        ("generate --pipeline {w}/pipe --output_dir /proc/out", "/proc"),
    ],
    "reconstruct": [
        ("reconstruct --pipeline {w}/pipe", "--images"),
        ("reconstruct --pipeline {w}/pipe --images {w}/pixel.png --dataset_name digits", "not allowed"),
        ("reconstruct --pipeline {w}/none --images {w}/pixel.png", "there is no such folder"),
        ("reconstruct --pipeline {w}/pipe --images {w}/none.png", "none.png"),
        ("reconstruct --pipeline {w}/pipe --images {w}/half.png", "half.png"),
        ("reconstruct --pipeline {w}/pipe --images {w}/file", "file"),
        ("reconstruct --pipeline {w}/pipe --dataset_name {w}/none", "none"),
        ("reconstruct --pipeline {w}/pipe --dataset_name digits --split dev", "dev"),
        ("reconstruct --pipeline {w}/pipe --dataset_name digits --num_images 0", "--num_images"),
        ("reconstruct --pipeline {w}/pipe --dataset_name digits --num_tokens 99", "num_tokens"),
        ("reconstruct --pipeline {w}/pipe --dataset_name digits --height 0", "height"),
        ("reconstruct --pipeline {w}/pipe --dataset_name digits --width -8", "width"),
        ("reconstruct --pipeline {w}/pipe --dataset_name digits --device cuda:99", "cuda:99"),
        ("reconstruct --pipeline {w}/pipe --dataset_name digits --output {w}/empty", "is a folder"),
        ("reconstruct --pipeline {w}/pipe --dataset_name digits --output /dev/full", "no regular file"),
        ("reconstruct --pipeline {w}/pipe --dataset_name digits --output {w}/file/x.png", "not a folder"),
        ("reconstruct --pipeline {w}/pipe --dataset_name digits --output {w}/full/x.png", "No space left"),
    ],
    "explain": [
        ("explain --pipeline {w}/pipe", "--images"),
        ("explain --pipeline {w}/pipe --images {w}/pixel.png", "expected 2 arguments"),
        ("explain --pipeline {w}/pipe --images {w}/pixel.png {w}/pixel.png --dataset_name digits", "not allowed"),
        ("explain --pipeline {w}/none --images {w}/pixel.png {w}/pixel.png", "there is no such folder"),
        ("explain --pipeline {w}/pipe --images {w}/pixel.png {w}/none.png", "none.png"),
        ("explain --pipeline {w}/pipe --images {w}/half.png {w}/pixel.png", "half.png"),
        ("explain --pipeline {w}/pipe --dataset_name {w}/none", "none"),
        ("explain --pipeline {w}/pipe --dataset_name digits --split dev", "dev"),
        ("explain --pipeline {w}/pipe --dataset_name digits --num_images 0", "--num_images"),
        ("explain --pipeline {w}/pipe --dataset_name digits --num_images 1", "two images are needed"),
        ("explain --pipeline {w}/pipe --dataset_name digits --num_inference_steps 0", "num_inference_steps"),
        ("explain --pipeline {w}/pipe --dataset_name digits --height 0", "height"),
        ("explain --pipeline {w}/pipe --dataset_name digits --width 12", "image size"),
        ("explain --pipeline {w}/pipe --dataset_name digits --output {w}/empty", "is a folder"),
        ("explain --pipeline {w}/pipe --dataset_name digits --output {w}/full/x.png", "No space left"),
    ],
    "measure": [
        ("measure", "usage: measure.py"),
        ("measure evaluate", "usage: measure.py"),
        ("measure generation", "pipeline is missing"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/none", "none"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/pointer", "git-lfs pointer"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/cut", "cut off"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/badjson", "config.json"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/empty", "neither a pipeline"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/pipe --dtype int8", "dtype"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/pipe --num_images 1", "need 2 images"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/pipe --prefixes 3", "prefixes must be among"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/pipe --features_hash 12", "wrong weights"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/pipe --lpips_weights {{w}}/none.safetensors", "no such file"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/pipe --lpips_weights {{w}}/pointer.safetensors", "pointer.safetensors"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/pipe --output_dir {{w}}/file", "not a folder"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/pipe --output_dir ''", "a path is empty"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/pipe --output_dir {{w}}/full", "No space left"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/pipe --split dev", "dev"),
        ("measure reconstruction --pipeline {w}/pipe --dataset_name digits", "weights"),
        (f"{RECONSTRUCTION} --pipeline {{w}}/pipe --lpips_weights ''", "lpips_weights is empty"),
        ("measure reconstruction --pipeline {w}/pipe --dataset_name digits --features {w}/none.py:f", "none.py"),
        ("measure reconstruction --pipeline {w}/pipe --dataset_name digits --features {w}/features.py:f", "import"),
        (f"{GENERATION} --pipeline {{w}}/pipe/tokenizer", "holds a tokenizer only"),
        (f"{GENERATION} --pipeline {{w}}/pipe --temperature -1", "temperature"),
        (f"{GENERATION} --pipeline {{w}}/pipe --guidance_scale 1 2 3", "guidance_scale"),
        (f"{GENERATION} --pipeline {{w}}/pipe --num_inference_steps 0", "num_inference_steps"),
        (
            "measure generation --pipeline {w}/pipe --features {w}/features.py:load --reference {w}/none.npz",
            "none.npz",
        ),
        (f"{REFERENCE} {{w}}/file", "file"),
        (f"{REFERENCE} {{w}}/bad.npz", "bad.npz"),
    ],
    "convert": [
        ("convert_checkpoint --output_dir {w}/new", "give --tokenizer, --transformer or both"),
        ("convert_checkpoint --tokenizer {w}/none.pt --output_dir {w}/new", "no checkpoint at"),
        ("convert_checkpoint --tokenizer {w}/file --output_dir {w}/new", "file"),
        ("convert_checkpoint --tokenizer {w}/pointer.pt --output_dir {w}/new", "git-lfs pointer"),
        ("convert_checkpoint --tokenizer {w}/pointer.safetensors --output_dir {w}/new", "git-lfs pointer"),
        ("convert_checkpoint --tokenizer {w}/cut.safetensors --output_dir {w}/new", "cut off"),
        ("convert_checkpoint --tokenizer {w}/empty --output_dir {w}/new", "no checkpoint at"),
        ("convert_checkpoint --tokenizer {w}/other.pt --output_dir {w}/new", "other.pt"),
        ("convert_checkpoint --transformer {w}/other.pt --output_dir {w}/new", "other.pt"),
        ("convert_checkpoint --transformer {w}/other.pt --config {w}/file --output_dir {w}/new", "--config needs"),
        ("convert_checkpoint --tokenizer {w}/other.pt --sampling L --output_dir {w}/new", "--sampling needs"),
        ("convert_checkpoint --tokenizer {w}/other.pt --output_dir {w}/pipe", "not an empty folder"),
        ("convert_checkpoint --tokenizer {w}/other.pt --output_dir {w}/file", "not a folder"),
        ("convert_checkpoint --tokenizer {w}/other.pt --output_dir ''", "a path is empty"),
        ("convert_checkpoint --tokenizer {w}/other.pt --output_dir {w}/file/new", "file"),
        ("convert_metric_weights", "network"),
        ("convert_metric_weights vgg a b", "invalid choice"),
        ("convert_metric_weights inception {w}/none.pth {w}/new", "no such file"),
        ("convert_metric_weights inception {w}/file {w}/new", "file"),
        ("convert_metric_weights inception {w}/pointer.pt {w}/new", "git-lfs pointer"),
        ("convert_metric_weights inception {w}/cut.safetensors {w}/new", "cut off"),
        ("convert_metric_weights inception {w}/other.pt {w}/new", "wrong weights"),
        ("convert_metric_weights inception {w}/other.pt {w}/empty", "is a folder"),
        ("convert_metric_weights lpips {w}/other.pt {w}/other.pt {w}/full/new", "No space left"),
        ("convert_metric_weights lpips {w}/other.pt {w}/other.pt {w}/new", "weights"),
        ("export_llama --model {w}/none --output_dir {w}/new", "there is no such folder"),
        ("export_llama --model {w}/pipe/transformer --output_dir ''", "a path is empty"),
        ("export_llama --model {w}/pipe --output_dir {w}/new", "{w}/pipe"),
        ("export_llama --model {w}/pipe --subfolder tokenizer --output_dir {w}/new", "holds a DARTokenizer"),
        ("export_llama --model {w}/pipe/transformer --subfolder x --output_dir {w}/new", "config.json"),
        ("export_llama --model {w}/pointer/transformer --output_dir {w}/new", "git-lfs pointer"),
        ("export_llama --model {w}/cut/transformer --output_dir {w}/new", "cut off"),
        ("export_llama --model {w}/badtype/transformer --output_dir {w}/new", "cannot load"),
        ("export_llama --model {w}/pipe/transformer --output_dir {w}/pipe", "not an empty folder"),
        ("export_llama --model {w}/pipe/transformer --output_dir {w}/full/new", "No space left"),
    ],
    "others": [
        ("make_sample", "--pipeline"),
        ("make_sample --pipeline {w}/none --output_dir {w}/new", "No such file"),
        ("make_sample --pipeline {w}/pipe/tokenizer --output_dir {w}/new", "No such file"),
        ("make_sample --pipeline {w}/pointer --output_dir {w}/new", "git-lfs pointer"),
        ("make_sample --pipeline {w}/cut --output_dir {w}/new", "cut off"),
        ("make_sample --pipeline {w}/badjson --output_dir {w}/new", "config.json"),
        ("make_sample --pipeline {w}/badtype --output_dir {w}/new", "cannot load the pipeline"),
        ("make_sample --pipeline {w}/pipe --output_dir {w}/file", "not a folder"),
        ("make_sample --pipeline {w}/pipe --output_dir {w}/full/new", "No space left"),
        ("push_to_hub {w}/pipe", "repo_id"),
        ("push_to_hub {w}/none user/x", "no folder at"),
        ("push_to_hub {w}/empty user/x", "holds no model"),
        ("push_to_hub {w}/pointer user/x", "git-lfs pointer"),
        ("push_to_hub {w}/cut user/x", "damaged or incomplete"),
        ("push_to_hub {w}/incomplete user/x", "it lacks weights in tokenizer"),
        ("push_to_hub {w}/badjson/tokenizer user/x", "Expecting property name"),
        ("push_to_hub {w}/pipe user/x --report {w}/none.json", "none.json"),
        ("push_to_hub {w}/pipe user/x --report {w}/file", "file"),
        ("push_to_hub {w}/pipe 'user/x y'", "user/x y"),
        ("push_to_hub {w}/pipe user/x", "user/x"),
        ("quickstart --layout_tokens 0 --output_dir {w}/new", "--layout_tokens"),
        ("quickstart --output_dir {w}/full", "No space left"),
        ("dar_hf --model {w}/none", "there is no such folder"),
        ("dar_hf --model ''", "no pipeline is named"),
        ("dar_hf --model {w}/cut", "cut off"),
        ("dar_hf --model {w}/pipe --output {w}/empty", "is a folder"),
        ("dar_hf --model {w}/pipe --output {w}/full/x.png", "No space left"),
        ("dar_hf --model {w}/pipe --output {w}/x.png --seed 1.5", "--seed"),
        ("dar_hf 'a red apple' --pipeline {w}/pipe", "draws from classes: unknown class name 'a red"),
        ("dar_hf 0 99999 --pipeline {w}/pipe", "got 99999"),
        ("dar_hf '' --pipeline {w}/pipe", "unknown class name ''"),
        ("dar_hf 3 --pipeline {w}/none", "there is no such folder"),
        ("evaluate_digits --pipeline {w}/none --output_dir {w}/new", "there is no such folder"),
        ("evaluate_digits --pipeline {w}/pipe --output_dir {w}/new", "10 classes"),
        ("evaluate_digits --pipeline {w}/pipe --num_images 3 --output_dir {w}/new", "--num_images"),
        ("evaluate_digits --pipeline {w}/pipe --dataset_name {w}/none --output_dir {w}/new", "no such file"),
        ("evaluate_digits --pipeline {w}/pipe --output_dir {w}/file", "not a folder"),
        ("small_features --steps 1 --size 12 --output_dir {w}/new", "8, 16, 32"),
        ("emoji_judge --steps 0", "--steps"),
        ("emoji_judge --steps 1 --dataset_name {w}/none --output_dir {w}/new", "no such file"),
        ("evaluate_emoji --pipeline {w}/none --output_dir {w}/new", "there is no such folder"),
        ("evaluate_emoji --pipeline {w}/pipe --judge {w}/none --output_dir {w}/new", "no such file"),
        ("evaluate_emoji --num_captions 0 --output_dir {w}/new", "--num_captions"),
        ("make_sample --pipeline {w}/pipe", "--name --output_dir is required"),
        ("make_sample --pipeline {w}/pipe --name cats", "invalid choice: 'cats'"),
        ("small_features --steps 0", "--steps"),
        ("small_features --seed x", "--seed"),
        ("small_features --steps 1 --output_dir {w}/file", "not a folder"),
        ("small_features --steps 1 --output_dir {w}/full", "No space left"),
        ("speed --preset huge", "--preset"),
        ("speed --device gpu", "no device"),
        ("speed --device cuda:99", "cuda:99"),
        ("speed --batch_sizes 0", "--batch_sizes"),
        ("speed --repeats 0", "--repeats"),
        ("speed --parts all", "--parts"),
        ("speed --json {w}/empty", "is a folder"),
        ("app --model {w}/none", "there is no such folder"),
        ("app --model ''", "no pipeline is named"),
        ("app --model {w}/pointer", "git-lfs pointer"),
        ("app --port 99999", "--port"),
        ("app --device gpu", "no device"),
    ],
}
TOKENIZER = get_preset("digits").tokenizer | {
    "in_channels": 3, "encoder_dim": 32, "decoder_dim": 32, "diffusion_dim": 32, "attention_head_dim": 16,
    "num_encoder_layers": 1, "num_decoder_layers": 1, "diffusion_depth": 1, "codebook_size": 32, "num_groups": 4,
}  # fmt: skip
TRANSFORMER = {
    "codebook_size": 32, "num_classes": 5, "num_image_tokens": 16, "tokens_per_group": 4, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip
YAML = {
    "syntax": "a: [1",
    "list": "- preset",
    "word": "digits",
    "unknown": "learning_rat: 1",
    "number_name": "1: 2",
    "twice": "seed: 1\nseed: 2",
    "tag": "seed: !!python/object/apply:os.getpid []",
    "precision_yes": "preset: digits\nmixed_precision: yes please",
    "text_number": "output_dir: 2024",
    "number_text": "max_train_steps: many",
    "whole_half": "max_train_steps: 1.5",
    "float_word": "learning_rate: fast",
    "float_bool": "learning_rate: true",
    "bool_word": "flip: maybe",
    "null": "seed:",
    "no_list": "model_overrides: encoder_dim=3",
    "list_items": "model_overrides: [3]",
    "preset_list": "preset: [digits]",
    "one_scale": "guidance_scale: 2.0",
    "nested": "[" * 3000,
}
FEATURES = """
import torch


class Features(torch.nn.Module):
    def forward(self, images):
        return images.float().mean(dim=(2, 3)) @ torch.eye(3, 4)


def load(weights):
    return Features()
"""


def damaged(source, target, change):
    """A copy of a pipeline folder in which ``change`` is applied to the weights of both models."""
    shutil.copytree(source, target)
    for path in target.rglob("*.safetensors"):
        path.write_bytes(change(path.read_bytes()))


def changed(source, target, name, content):
    shutil.copytree(source, target)
    path = target / name
    if isinstance(content, dict):
        content = json.dumps(json.loads(path.read_text()) | content).encode()
    path.write_bytes(content)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with everything that the cases name."""
    root = tmp_path_factory.mktemp("world")
    tokenizer, transformer = DARTokenizer(**TOKENIZER), DARForCausalLM(DARConfig(**TRANSFORMER))
    pipe = root / "pipe"
    DARPipeline(tokenizer, transformer, FlowMatchAdamsBashforthScheduler()).save_pretrained(pipe)
    damaged(pipe, root / "pointer", lambda content: POINTER)
    damaged(pipe, root / "cut", lambda content: content[:-100])
    shutil.copytree(pipe, root / "badjson")
    for path in (root / "badjson").rglob("config.json"):
        path.write_text("{")
    changed(pipe, root / "badtype", "tokenizer/config.json", {"num_tokens": "many"})
    changed(pipe, root / "mismatch", "tokenizer/config.json", {"num_tokens": 8, "max_num_tokens": 16})
    changed(root / "badtype", root / "badtype2", "transformer/config.json", {"hidden_act": "magic"})
    shutil.rmtree(root / "badtype")
    (root / "badtype2").rename(root / "badtype")
    changed(pipe, root / "binary", "transformer/config.json", b"\xff\xfe\x00")
    changed(pipe, root / "wrongshape", "transformer/config.json", {"hidden_size": 128})
    shutil.copytree(pipe, root / "incomplete")
    (root / "incomplete" / "tokenizer" / "diffusion_pytorch_model.safetensors").unlink()
    for name in ("empty", "full", "readonly", "yaml"):
        (root / name).mkdir()
    (root / "file").write_text("no folder")
    for name, text in YAML.items():
        (root / "yaml" / f"{name}.yaml").write_text(text + "\n")
    Image.new("L", (8, 8), 100).save(root / "pixel.png")
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).save(buffer, "PNG")
    (root / "half.png").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (root / "bad.npz").write_bytes(b"PK\x03\x04" + b"x" * 100)
    (root / "features.py").write_text(FEATURES)
    torch.save({"a": torch.zeros(1)}, root / "other.pt")
    for name in ("pointer.pt", "pointer.safetensors"):
        (root / name).write_bytes(POINTER)
    save_file({"a": torch.zeros(100)}, root / "whole.safetensors")
    assert load_file(root / "whole.safetensors")
    (root / "cut.safetensors").write_bytes((root / "whole.safetensors").read_bytes()[:-50])
    return root


@pytest.fixture(scope="module")
def mains():
    """The main function of each command."""
    found = {"dar_hf": dar_hf.__main__.main}
    siblings = [str(BENCHMARKS), str(EXAMPLES)]  # which speed.py and evaluate_emoji.py import
    sys.path[:0] = siblings
    for path in (*EXAMPLES.glob("*.py"), BENCHMARKS / "speed.py"):
        if path.stem == "app" and importlib.util.find_spec("gradio") is None:
            continue
        found[path.stem] = load_script(path).main
    for folder in siblings:
        sys.path.remove(folder)
    return found


@pytest.fixture(autouse=True)
def quiet(world, tmp_path, monkeypatch):
    """No progress bars, network or caches; folders that are full and read-only, as far as Python can tell."""
    real = dar_hf.utils.commands.tempfile.TemporaryFile

    def temporary_file(*args, dir=None, **kwargs):
        for name, number, text in (("full", 28, "No space left on device"), ("readonly", 30, "Read-only file system")):
            if dir is not None and Path(dir).is_relative_to(world / name):
                raise OSError(number, text, str(dir))
        return real(*args, dir=dir, **kwargs)

    monkeypatch.setattr(dar_hf.utils.commands.tempfile, "TemporaryFile", temporary_file)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    datasets.utils.disable_progress_bars()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    AcceleratorState._reset_state(True)
    yield
    AcceleratorState._reset_state(True)
    datasets.utils.enable_progress_bars()
    diffusers.utils.logging.enable_progress_bar()
    transformers.utils.logging.enable_progress_bar()


def outcome(main, name, argv, capsys, monkeypatch):
    """What a command line came to, and the line that it ended with."""
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *argv])
    prefixes = {"dar_hf": "dar-hf: error: "}
    capsys.readouterr()
    try:
        main(argv)
    except SystemExit as error:
        said = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
        mine = [line for line in said if line.startswith(prefixes.get(name, f"{name}.py: "))]
        usage = [line for line in said if line.startswith(f"{name}.py") and ": error: " in line]
        clear = error.code in (1, 2) and (len(mine) == 1 or len(usage) == 1) and "Traceback" not in " ".join(said)
        return ("clear" if clear else f"unclear, code {error.code}: {said}"), (said or [""])[-1]
    except BaseException as error:
        return f"other exception: {type(error).__name__}: {error}", ""
    return "silently accepted", ""


def test_there_are_enough_cases():
    lines = [line for cases in CASES.values() for line, _ in cases]
    assert len(lines) >= 120 and len(set(lines)) == len(lines)


@pytest.mark.parametrize("line, message", [case for cases in CASES.values() for case in cases])
def test_it_ends_with_one_clear_line(world, mains, capsys, monkeypatch, line, message):
    name, *argv = shlex.split(line.format(w=world))
    if name not in mains:
        pytest.skip("needs gradio")
    if name in ("train", "generate", "extract_codes", "measure") and not any("output_dir" in word for word in argv):
        argv += ["--output_dir", "run"] if argv else []
    found, last = outcome(mains[name], name, argv, capsys, monkeypatch)
    assert found == "clear", last
    assert message.format(w=world) in last


def test_a_port_that_is_taken(world, mains, capsys, monkeypatch):
    pytest.importorskip("gradio")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        argv = ["--model", str(world / "pipe"), "--host", "127.0.0.1", "--port", port]
        found, last = outcome(mains["app"], "app", argv, capsys, monkeypatch)
    assert found == "clear" and port in last


def test_every_command_can_be_interrupted(world, mains, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(DARPipeline, "from_pretrained", interrupt)
    monkeypatch.setattr(DARTokenizer, "from_pretrained", interrupt)
    for line in (
        "generate --pipeline {w}/pipe",
        "reconstruct --pipeline {w}/pipe --dataset_name digits",
        "explain --pipeline {w}/pipe --dataset_name digits",
        "measure reconstruction --pipeline {w}/pipe --dataset_name digits",
        "evaluate_digits --pipeline {w}/pipe",
        "extract_codes --tokenizer {w}/pipe/tokenizer --dataset_name digits",
        "train ar --preset digits --tokenizer {w}/pipe/tokenizer",
        "quickstart",
        "dar_hf",
    ):
        AcceleratorState._reset_state(True)
        name, *argv = line.format(w=world).split()
        monkeypatch.setattr(sys, "argv", [name, *argv])
        with pytest.raises(SystemExit) as ended:
            mains[name](argv)
        said = capsys.readouterr().err.splitlines()
        assert ended.value.code == 130 and len(said) == 1 and said[0].endswith(": interrupted."), said
