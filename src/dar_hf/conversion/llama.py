"""The language model as a plain ``LlamaForCausalLM``, for servers that know Llama and nothing else."""

import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from ..modeling_dar import DARForCausalLM
from .reading import fill, without_weights

# a Llama has no use for these; everything else in our configuration is Llama's own
_NOT_LLAMA = ("resid_dropout", "ffn_dropout", "token_dropout", "class_dropout")
_WRITTEN_ANEW = ("architectures", "model_type", "dtype", "auto_map", "transformers_version", "_from_model_config")


def to_llama(model: DARForCausalLM) -> LlamaForCausalLM:
    """A copy of the model with one vocabulary for input and output: codes, then classes, then the null class.

    A prompt is one class token, ``[codebook_size + class]``; ``codebook_size``, ``num_classes``,
    ``num_image_tokens`` and ``tokens_per_group`` stay in the configuration for clients. The generation configuration
    suppresses classes as output and stops after one image. It knows no guidance: a server that wants it runs the
    null class beside the class.

    The head's rows of the classes hold the mean of its rows of the codes: their score is then the mean score of the
    codes and never the largest, so that a server that ignores ``suppress_tokens`` decodes greedily all the same.

    Returns:
        float32 on the CPU, whatever the model was.
    """
    config, dropped = model.config, _NOT_LLAMA + _WRITTEN_ANEW
    options = {name: value for name, value in config.to_dict().items() if name not in dropped}
    llama = without_weights(lambda: LlamaForCausalLM(LlamaConfig(**options)))
    tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    head = tensors["lm_head.weight"].float()
    others = head.mean(dim=0, keepdim=True).expand(config.vocab_size - config.codebook_size, -1)
    tensors["lm_head.weight"] = torch.cat([head, others])
    fill(llama, tensors.items())
    sampling = model.generation_config
    options = {"do_sample": sampling.do_sample, "temperature": sampling.temperature}
    if sampling.do_sample:  # unset means no limit here, and 50 codes in stock `generate`
        options |= {"top_k": sampling.top_k or 0, "top_p": 1.0 if sampling.top_p is None else sampling.top_p}
    llama.generation_config = GenerationConfig(
        **options,
        suppress_tokens=list(range(config.codebook_size, config.vocab_size)),
        max_new_tokens=config.num_image_tokens,
    )
    return llama
