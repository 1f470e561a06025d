"""Tiny models with random weights: every part takes part in the result, and everything runs in milliseconds."""

import torch
from torch import nn

from dar_hf import DARConfig, DARForCausalLM, DARPipeline, DARTokenizer, FlowMatchAdamsBashforthScheduler
from dar_hf.training.text import learn_text_tokenizer

TOKENIZER = {
    "sample_size": 8,
    "encoder_patch_size": 2,
    "encoder_dim": 64,
    "num_encoder_layers": 2,
    "decoder_dim": 64,
    "num_decoder_layers": 2,
    "codebook_size": 32,
    "num_tokens": 16,
    "num_groups": 4,
    "diffusion_dim": 64,
    "diffusion_patch_size": 2,
    "diffusion_depth": 2,
    "attention_head_dim": 32,
    "repa_layer": None,
    "max_num_tokens": 16,
}
TRANSFORMER = {
    "codebook_size": 32,
    "num_classes": 5,
    "num_image_tokens": 16,
    "tokens_per_group": 4,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def make_tokenizer(**options) -> DARTokenizer:
    """A tiny tokenizer, with other options where given."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = DARTokenizer(**TOKENIZER | options)
        model.reset_parameters(gate=1.0, modulation_std=0.1, output_std=0.1, post_quant_std=0.35)
        # nothing at a start value that hides a part: norms are not the identity, biases are not zero
        for module in model.modules():
            if isinstance(module, nn.LayerNorm):
                nn.init.normal_(module.weight, mean=1.0, std=0.2)
                nn.init.normal_(module.bias, std=0.2)
        for name, parameter in model.named_parameters():
            if name.endswith((".gate1", ".gate2")):
                nn.init.normal_(parameter, mean=1.0, std=0.2)
            elif name.endswith(("modulation.bias", "proj_out.bias")):
                nn.init.normal_(parameter, std=0.1)
    return model.eval()


def make_transformer(**options) -> DARForCausalLM:
    """A tiny language model, with other options where given."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model = DARForCausalLM(DARConfig(**TRANSFORMER | options))
        for name, parameter in model.named_parameters():
            if "norm" in name:
                nn.init.normal_(parameter, mean=1.0, std=0.2)
            elif "embed_tokens" in name:
                nn.init.normal_(parameter, std=1.0)
            else:
                nn.init.normal_(parameter, std=0.3 if "lm_head" in name else 0.2)
    return model.eval()


def make_text_transformer(**options) -> DARForCausalLM:
    """A tiny language model that draws from texts of up to six of forty tokens, with other options where given."""
    return make_transformer(**{"text_vocab_size": 40, "max_text_tokens": 6} | options)


def make_pipeline(tokenizer: DARTokenizer, transformer: DARForCausalLM) -> DARPipeline:
    """A pipeline of five classes that draws no progress bar."""
    labels = {0: "tench, Tinca tinca", 1: "goldfish", 2: "shark", 3: "ray", 4: "cock"}
    pipeline = DARPipeline(tokenizer, transformer, FlowMatchAdamsBashforthScheduler(), id2label=labels)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


CAPTIONS = ["noto red apple", "twemoji red apple", "noto green apple", "flat green book", "noto red book"]


def make_text_pipeline(tokenizer: DARTokenizer, **options) -> DARPipeline:
    """A pipeline that draws from texts of up to six tokens, and no progress bar."""
    text_tokenizer = learn_text_tokenizer(CAPTIONS * 2, 300)
    transformer = make_text_transformer(text_vocab_size=300, **options)
    scheduler = FlowMatchAdamsBashforthScheduler()
    pipeline = DARPipeline(tokenizer, transformer, scheduler, text_tokenizer=text_tokenizer)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
