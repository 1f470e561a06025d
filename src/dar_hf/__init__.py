"""D-AR, "Diffusion via Autoregressive Models" (ICLR 2026, arXiv 2505.23660), for Hugging Face.

Two generators, composed: `DARForCausalLM.stream_codes` yields groups of codes, `DARTokenizer.decode_stream` turns each
group into one denoising step and a preview, and `DARPipeline.stream` is their composition.

The five model files (``configuration_dar``, ``modeling_dar``, ``tokenizer_dar``, ``scheduling_dar``, ``pipeline_dar``)
and the files they share (``acceleration_dar``, ``images_dar``, ``weights_dar``) stand flat and import only siblings,
because a Hub repository that carries its own code needs each component as one file; what needs the rest of the package
is given to their classes here (`dar_hf.hub.connect`). Importing this package registers the classes with transformers'
Auto classes and diffusers' pipeline loader; without that neither finds them.
"""

__version__ = "0.1.0"

import diffusers
from diffusers.pipelines import pipeline_loading_utils
from diffusers.utils import TRANSFORMERS_COMPONENT_AUX_FILES
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_dar import DARConfig
from .hub import connect
from .modeling_dar import DARForCausalLM, DARModel
from .pipeline_dar import DARPipeline, DARPipelineOutput
from .scheduling_dar import FlowMatchAdamsBashforthScheduler
from .tokenizer_dar import DARPreview, DARTokenizer, DARTokenizerEncoderOutput, DARTokenizerOutput
from .utils.sample import sample_pipeline

__all__ = [
    "DARConfig",
    "DARForCausalLM",
    "DARModel",
    "DARPipeline",
    "DARPipelineOutput",
    "DARPreview",
    "DARTokenizer",
    "DARTokenizerEncoderOutput",
    "DARTokenizerOutput",
    "FlowMatchAdamsBashforthScheduler",
    "sample_pipeline",
]

AutoConfig.register("dar", DARConfig, exist_ok=True)
AutoModel.register(DARConfig, DARModel, exist_ok=True)
AutoModelForCausalLM.register(DARConfig, DARForCausalLM, exist_ok=True)

# diffusers 0.42 loads pipeline components only from libraries it knows, by the name that model_index.json gives
_LOADABLE = {
    name: ["save_pretrained", "from_pretrained"]
    for name in ("DARTokenizer", "DARForCausalLM", "FlowMatchAdamsBashforthScheduler", "DARPipeline")
}
pipeline_loading_utils.LOADABLE_CLASSES["dar_hf"] = _LOADABLE
pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(_LOADABLE)
# from the Hub it takes a component's weights and config.json only: the guidance saved with a model would be lost
TRANSFORMERS_COMPONENT_AUX_FILES.append("transformer/generation_config.json")

# uploads with a card, advice beside the Hub's errors, and the installed classes for self-contained folders
for _class in (DARForCausalLM, DARPipeline, DARTokenizer, FlowMatchAdamsBashforthScheduler):
    connect(_class)

# `DiffusionPipeline`, diffusers' `AutoModel` and a scheduler's `compatibles` look for the class by its name only there
for _class in (DARPipeline, DARTokenizer, FlowMatchAdamsBashforthScheduler):
    setattr(diffusers, _class.__name__, _class)
