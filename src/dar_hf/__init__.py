"""D-AR, "Diffusion via Autoregressive Models" (ICLR 2026, arXiv 2505.23660), for Hugging Face.

Two generators, composed: `DARForCausalLM.stream_codes` yields groups of codes, `DARTokenizer.decode_stream` turns each
group into one denoising step and a preview, and `DARPipeline.stream` is their composition.

From a class to an image, read ``pipeline_dar`` (`DARPipeline.stream`), ``modeling_dar``
(`DARForCausalLM.stream_codes`) with ``sampling_dar`` (guidance), ``tokenizer_dar`` (`DARTokenizer.decode_stream`) with
``layers_dar``, and ``scheduling_dar``. The other files whose names end in ``_dar`` can wait: ``configuration_dar``,
``images_dar`` (reading images), ``labels_dar`` (class names), ``text_dar`` (prompts), ``checks_dar`` and
``weights_dar`` (what is refused), ``acceleration_dar`` (what only buys speed). They stand flat and import only
siblings, because a Hub repository that carries its own code needs each component as one file.

Importing this package registers the classes with transformers' Auto classes and diffusers' pipeline loader, without
which neither finds them, and adds what needs the rest of the package (`dar_hf.registration`). The garbage
collector pauses meanwhile (`dar_hf.utils.imports`).
"""

__version__ = "0.1.0"

from .utils.imports import garbage_collection_paused

with garbage_collection_paused():  # 4 s of processor time instead of 6
    from .configuration_dar import DARConfig
    from .modeling_dar import DARForCausalLM, DARModel
    from .pipeline_dar import DARPipeline, DARPipelineOutput
    from .registration import register
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

register()
