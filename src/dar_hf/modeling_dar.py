"""The D-AR language model: transformers' Llama over image codes, with batched classifier-free guidance.

What stands before the codes is the prompt: one token of a class, or a fixed number of tokens of a text.

The layers are Llama's own (the original is LlamaGen's Llama). Ours are three dropouts, the split vocabulary, guidance
in one doubled forward pass, and `stream_codes`, which yields every group of codes as soon as it is complete.
"""

import inspect
import itertools
import math
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessorList
from transformers import initialization as init
from transformers.cache_utils import Cache, StaticCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaDecoderLayer,
    LlamaModel,
    LlamaPreTrainedModel,
    LlamaRotaryEmbedding,
)
from transformers.utils.generic import ModelOutput, can_return_tuple

from .acceleration_dar import FilledCacheLayer, accelerated
from .checks_dar import Generators, check_generators, check_integer
from .configuration_dar import DARConfig
from .sampling_dar import (
    ClassifierFreeGuidance,
    FiniteLogits,
    GeneratorSampling,
    GuidanceScale,
    apply_guidance,
    check_finite,
    guidance_schedule,
    sample_index,
    sampling_warpers,
)
from .weights_dar import check_finite_weights, replacing_earlier_save, some_of

NextLogits: TypeAlias = Callable[[torch.LongTensor], torch.Tensor]

# what transformers calls the cache: past_key_values up to version 5.23
CACHE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"


# models in which streams run, with how many and the parts whose training mode comes back after the last one
_EVALUATING: dict[nn.Module, tuple[int, list[nn.Module]]] = {}
_EVALUATING_LOCK = threading.Lock()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode for one group of codes, and not while the stream waits: training may go on meanwhile.

    It switches off dropout, and gradient checkpointing, which drops the cache. Counted, since several streams may use
    one model; the private copies of `accelerated` have a mode of their own.
    """
    with _EVALUATING_LOCK:
        count, training = _EVALUATING.get(module, (0, []))
        if count == 0:
            training = [part for part in module.modules() if part.training]
        for part in training:
            part.training = False
        _EVALUATING[module] = count + 1, training
    try:
        yield
    finally:
        with _EVALUATING_LOCK:
            count, training = _EVALUATING.pop(module)
            if count > 1:
                _EVALUATING[module] = count - 1, training
            else:
                for part in training:
                    part.training = True


class DARRotaryEmbedding(LlamaRotaryEmbedding):
    """Llama's, with frequencies that stay float32 when the model is cast, as when it is loaded in half precision."""

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        def move_only(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move_only, recurse)


class DARDecoderLayer(LlamaDecoderLayer):
    """Llama's layer, with dropout after the attention's output projection and after the mlp."""

    def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        config = self.self_attn.config
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + F.dropout(attended, config.resid_dropout, self.training)
        output = self.mlp(self.post_attention_layernorm(hidden_states))
        return hidden_states + F.dropout(output, config.ffn_dropout, self.training)


class DARPreTrainedModel(LlamaPreTrainedModel):
    config: DARConfig
    config_class = DARConfig
    _no_split_modules = ["DARDecoderLayer"]
    _can_record_outputs = {"hidden_states": DARDecoderLayer, "attentions": LlamaAttention}

    save_pretrained = replacing_earlier_save(LlamaPreTrainedModel.save_pretrained)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        output_loading_info: bool = False,
        ignore_mismatched_sizes: bool = False,
        **kwargs: Any,
    ) -> Any:
        """transformers' own, which by itself starts missing weights anew and leaves out unknown ones, with a note.

        Raises:
            ValueError: for weights that are not those of the configuration, or not finite, naming them.
        """
        model, info = super().from_pretrained(
            pretrained_model_name_or_path,
            *args,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            **kwargs,
        )
        mismatched = [f"{name} {tuple(saved)} for {tuple(own)}" for name, saved, own in info["mismatched_keys"]]
        problems = {
            "they lack": info["missing_keys"],
            "they hold unknown": info["unexpected_keys"],
            "they have other shapes of": [] if ignore_mismatched_sizes else mismatched,
        }
        texts = [f"{verb} {some_of(sorted(names))}" for verb, names in problems.items() if names]
        if texts:
            raise ValueError(
                f"the weights in {pretrained_model_name_or_path} are not those of its configuration: "
                f"{'; '.join(texts)}. They are incomplete, or of another model."
            )
        check_finite_weights(pretrained_model_name_or_path, model)
        return (model, info) if output_loading_info else model

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> None:
        """Refused: the vocabulary is laid out by the codebook and the classes."""
        raise ValueError(
            "the vocabulary of a D-AR model is its codebook and classes and cannot be resized; "
            "make a new DARConfig with other codebook_size, num_classes or text_vocab_size."
        )


class DARModel(DARPreTrainedModel, LlamaModel):
    """The Llama body. Training mode drops classes or texts (`class_dropout`) and embeddings (`token_dropout`)."""

    _keys_to_ignore_on_load_unexpected = [r"^lm_head\."]

    def __init__(self, config: DARConfig):
        super().__init__(config)
        # ours have no state of their own, so Llama's need not be built a second time
        for layer in self.layers:
            layer.__class__ = DARDecoderLayer
        self.rotary_emb.__class__ = DARRotaryEmbedding

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool | None = None,
        drop_class: torch.Tensor | None = None,
        cache: Any = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Llama's forward. ``drop_class (B,)`` bool: whose prompt becomes null tokens; drawn in training if None."""
        if input_ids is not None:
            if drop_class is None and self.training and self.config.class_dropout > 0:
                drop_class = torch.rand(len(input_ids), device=input_ids.device) < self.config.class_dropout
            if drop_class is not None:
                input_ids = torch.where(drop_class[:, None], self.to_unconditional(input_ids), input_ids)
            if inputs_embeds is None:
                inputs_embeds = self.embed_tokens(input_ids)
                input_ids = None
        if inputs_embeds is not None:
            inputs_embeds = F.dropout(inputs_embeds, self.config.token_dropout, self.training)
        # what the cache is called depends on transformers' version and on the way of generating
        caches = {"past_key_values": past_key_values, "cache": cache}
        kwargs.update({name: given for name, given in caches.items() if given is not None})
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )

    def to_unconditional(self, input_ids: torch.LongTensor) -> torch.LongTensor:
        """The same tokens with every token of a class or text replaced by the null token."""
        return torch.where(input_ids >= self.config.codebook_size, self.config.null_token_id, input_ids)


class DARForCausalLM(DARPreTrainedModel, GenerationMixin):
    """Predicts the codes of an image from its class or text. See `DARConfig` for the vocabulary and the sequence.

    ``labels`` work as for any causal language model (shifted inside; class and text are never targets).
    """

    _tied_weights_keys = None
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _pp_plan = {"lm_head": (["hidden_states"], ["logits"])}

    compile_decoding: bool = False
    """Run the steps of `stream_codes` through ``torch.compile`` (on GPUs as CUDA graphs), over a static cache that is
    kept between calls. Compiled once for each batch size. On CPUs packed weights are faster."""

    pack_weights: bool = True
    """Let `stream_codes` lay the weights of large models out for the processor, on CPUs. Steps are up to half again as
    fast; while codes stream, a second copy of the weights is in memory, which streams that run at once share."""

    def __init__(self, config: DARConfig):
        super().__init__(config)
        self.model = DARModel(config)
        self.vocab_size = config.codebook_size
        self._compiled_forward: Callable | None = None
        self._static_caches: dict[tuple, StaticCache] = {}
        self.lm_head = nn.Linear(config.hidden_size, config.codebook_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is self.lm_head:
            init.zeros_(module.weight)  # the first prediction is uniform, as in LlamaGen

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        drop_class: torch.Tensor | None = None,
        cache: Any = None,
        shift_labels: torch.LongTensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits ``(B, L, codebook_size)`` of the code after each position, and the loss if labels are given.

        ``shift_labels (B, L)`` are the codes after each position instead, as sequence parallelism gives them.
        """
        outputs: BaseModelOutputWithPast = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            drop_class=drop_class,
            cache=cache,
            **kwargs,
        )
        hidden_states = outputs.last_hidden_state
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden_states[:, kept, :])
        loss = None
        if labels is not None or shift_labels is not None:
            labels = self._without_text(labels)
            shift_labels = self._without_text(shift_labels)
            loss = self.loss_function(
                logits=logits,
                labels=labels,
                vocab_size=self.config.codebook_size,
                shift_labels=None if shift_labels is None else shift_labels.contiguous(),  # it may be a slice
                **kwargs,
            )
        others = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return CausalLMOutputWithPast(loss=loss, logits=logits, **others)

    def _without_text(self, labels: torch.LongTensor | None) -> torch.LongTensor | None:
        """Labels of which the loss leaves out the text."""
        if labels is None or not self.config.text_vocab_size:
            return labels
        return labels.masked_fill(labels >= self.config.codebook_size, -100)

    # transformers' generate, with batched guidance and the caller's generator

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *,
        generator: Generators = None,
        **kwargs: Any,
    ) -> torch.Tensor | ModelOutput:
        """transformers' ``generate`` over ``input_ids`` that begin with a class token, or the tokens of a text.

        Args:
            guidance_scale: a number, or a pair (start, end) for a scale linear over the image tokens; both halves
                run in one doubled pass. Missing, the generation configuration's.
            generator: source of the samples, one or one per returned sequence; the global one is left untouched.

        Raises:
            ValueError: for guidance with beam search, assisted decoding or input embeddings, or scales of the wrong
                form.
        """
        for name in ("guidance", "generator"):  # of the model that this one assists
            kwargs.pop(name, None)
        base = generation_config if generation_config is not None else self.generation_config
        scale = kwargs.pop("guidance_scale", None)
        scale = scale if scale is not None else base.guidance_scale
        guidance = guidance_schedule(scale, self.config.num_image_tokens)
        if guidance:
            self._check_guided(base, kwargs)
        # defaults of the paper where nobody says otherwise: one whole image, from the whole distribution
        lengths = [kwargs.get(name, getattr(base, name)) for name in ("max_new_tokens", "max_length")]
        if lengths == [None, None]:
            kwargs["max_length"] = self.config.num_image_tokens + self.config.prompt_length
        if kwargs.get("do_sample", base.do_sample) and base.top_k is None:
            kwargs.setdefault("top_k", 0)
        # what a named cache may bring is kept with the model: compiled calls, buffers
        named_cache = kwargs.get("cache_implementation", base.cache_implementation)
        model = self if named_cache else accelerated(self)
        return GenerationMixin.generate(
            model, inputs, generation_config, guidance=guidance, generator=generator, guidance_scale=1.0, **kwargs
        )

    def init_continuous_batching(
        self, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Any:
        """transformers' own, of which `generate_batch` and servers make use.

        Raises:
            ValueError: for guidance, whose doubled rows it does not know.
        """
        base = self.generation_config if generation_config is None else generation_config
        self._check_unguided(base.guidance_scale)
        return super().init_continuous_batching(generation_config, *args, **kwargs)

    def generate_batch(self, inputs: list[list[int]], *args: Any, **kwargs: Any) -> dict:
        """transformers' own, by continuous batching.

        Raises:
            ValueError: for guidance, whose doubled rows it does not know.
        """
        self._check_unguided(kwargs.pop("guidance_scale", None))
        return super().generate_batch(inputs, *args, **kwargs)

    def _check_unguided(self, scale: GuidanceScale) -> None:
        if guidance_schedule(scale, self.config.num_image_tokens) is not None:
            raise ValueError(
                f"continuous batching (generate_batch) does not support guidance, and guidance_scale is {scale}: use "
                "generate or stream_codes, or give a GenerationConfig with guidance_scale=1.0."
            )

    def compute_transition_scores(
        self, sequences: torch.Tensor, scores: tuple[torch.Tensor, ...], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """transformers' own, which expects scores ``(rows, codebook_size)`` of the whole input vocabulary."""
        others = self.config.vocab_size - self.config.codebook_size  # classes or text, which are never generated
        scores = tuple(F.pad(score, (0, others), value=-math.inf) for score in scores)
        return super().compute_transition_scores(sequences, scores, *args, **kwargs)

    @staticmethod
    def _check_guided(base: GenerationConfig, options: dict) -> None:
        """Refuse the ways of decoding that do not know the doubled rows."""
        given = {
            "num_beams > 1": (options.get("num_beams") or base.num_beams or 1) > 1,
            "assistant_model": options.get("assistant_model") is not None,
            "assistant_early_exit": options.get("assistant_early_exit", base.assistant_early_exit),
            "prompt_lookup_num_tokens": options.get("prompt_lookup_num_tokens", base.prompt_lookup_num_tokens),
            "inputs_embeds": options.get("inputs_embeds") is not None,
        }
        for name, is_given in given.items():
            if is_given:
                raise ValueError(
                    f"guidance_scale with {name} is not supported: sample or decode greedily from input_ids."
                )

    def _get_logits_processor(
        self, generation_config: GenerationConfig, *args: Any, model_kwargs: dict | None = None, **kwargs: Any
    ) -> LogitsProcessorList:
        processors = super()._get_logits_processor(generation_config, *args, model_kwargs=model_kwargs, **kwargs)
        processors.insert(0, FiniteLogits(self))
        options = model_kwargs or {}
        if options.get("guidance") is not None:
            processors.insert(0, ClassifierFreeGuidance(options["guidance"], self.config.codebook_size))
        if options.get("generator") is not None and generation_config.do_sample:
            processors.append(GeneratorSampling(options["generator"]))
            generation_config.do_sample = False  # sampled already; argmax draws nothing from the global generator
        return processors

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        guidance: list[float] | None = None,
        generator: Generators = None,
        **kwargs: Any,
    ) -> dict:
        if guidance is not None:
            input_ids = torch.cat([input_ids, self.model.to_unconditional(input_ids)])
            attention_mask = None if attention_mask is None else torch.cat([attention_mask] * 2)
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = torch.cat([kwargs["position_ids"]] * 2)
        return super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        )

    # The stream of codes that the pipeline composes with the tokenizer's

    def stream_codes(
        self,
        class_labels: torch.LongTensor | Sequence[int] | int | None = None,
        *,
        guidance_scale: GuidanceScale = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        generator: Generators = None,
        prefix_codes: torch.LongTensor | None = None,
        num_tokens: int | None = None,
        group_size: int | None = None,
        text_ids: Sequence[Sequence[int]] | None = None,
        negative_text_ids: Sequence[Sequence[int]] | None = None,
    ) -> Iterator[torch.LongTensor]:
        """Generate codes and yield each group ``(B, group_size)`` as soon as it is complete.

        Every code is one forward pass over a key-value cache, without dropout whatever mode the model is in; the
        prefix is never computed again.

        Args:
            class_labels: one label per image, in [0, num_classes); of class models.
            guidance_scale: a number or a pair (start, end), linear over the image's tokens; None takes the generation
                configuration's, 1.0 switches it off.
            temperature: divides the logits; 0 takes the most probable code.
            top_k, top_p: 0 and 1.0 keep the whole distribution.
            generator: one, or one per image.
            prefix_codes: ``(B or 1, n)`` codes to start from; they come back first in the stream.
            num_tokens: stop after this many codes, prefix included; default the whole image.
            group_size: codes per yield; default the configuration's. The last group may be shorter.
            text_ids: the text tokenizer's ids of one text per image, of any length up to max_text_tokens; of text
                models.
            negative_text_ids: what guidance leads away from, in place of no text: one for all images, or one each.

        Raises:
            ValueError: for labels, texts, codes or sampling options out of range, before anything is generated; and
                where logits are not finite, which on GPUs is looked at after the last code only.
        """
        config = self.config
        if num_tokens is None:
            num_tokens = config.num_image_tokens
        if group_size is None:
            group_size = config.tokens_per_group
        if guidance_scale is None:
            guidance_scale = self.generation_config.guidance_scale
        num_tokens = check_integer("num_tokens", num_tokens, least=None)
        group_size = check_integer("group_size", group_size, least=None)
        if not 1 <= num_tokens <= config.num_image_tokens:
            raise ValueError(f"num_tokens must lie in [1, {config.num_image_tokens}], got {num_tokens}.")
        if group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {group_size}.")
        start = self._prompt_tokens(class_labels, text_ids)
        batch_size = len(start)
        unconditional = self.model.to_unconditional(start)
        if negative_text_ids is not None:
            unconditional = self._negative_tokens(negative_text_ids, batch_size)
        check_generators(generator, batch_size)
        if prefix_codes is not None:
            prefix_codes = self.check_prefix(prefix_codes, batch_size, num_tokens)
            start = torch.cat([start, prefix_codes], dim=1)
            unconditional = torch.cat([unconditional, prefix_codes], dim=1)
        schedule = guidance_schedule(guidance_scale, config.num_image_tokens)
        warpers = sampling_warpers(temperature, top_k, top_p)
        return self._stream_groups(start, unconditional, schedule, warpers, generator, num_tokens, group_size)

    def _prompt_tokens(self, class_labels: Any, text_ids: Any) -> torch.LongTensor:
        """The tokens ``(B, prompt_length)`` before the codes, of class labels or of the ids of texts."""
        config = self.config
        if config.text_vocab_size:
            if class_labels is not None or text_ids is None:
                raise ValueError("this model draws from text: give text_ids, and no class labels.")
            rows = [config.text_token_ids(ids) for ids in text_ids]
        else:
            if text_ids is not None or class_labels is None:
                raise ValueError("this model draws from class labels: give class_labels, and no text.")
            if isinstance(class_labels, torch.Tensor):
                class_labels = class_labels.reshape(-1).tolist()
            single = isinstance(class_labels, (str, bytes)) or not isinstance(class_labels, Iterable)
            labels: list[Any] = [class_labels] if single else list(class_labels)
            rows = [[config.class_token_id(label)] for label in labels]
        if not rows:
            name = "text_ids" if config.text_vocab_size else "class_labels"
            raise ValueError(f"{name} is empty: nothing to generate.")
        return torch.tensor(rows, device=self._input_device)

    def _negative_tokens(self, text_ids: Any, batch_size: int) -> torch.LongTensor:
        """The tokens of the texts that guidance leads away from, one row for each image."""
        rows = [self.config.text_token_ids(ids) for ids in text_ids]
        if len(rows) not in (1, batch_size):
            raise ValueError(f"got {len(rows)} negative texts for {batch_size} images: give one, or one for each.")
        return torch.tensor(rows, device=self._input_device).expand(batch_size, -1)

    def check_sampling(self, guidance_scale: GuidanceScale, temperature: float, top_k: int, top_p: float) -> None:
        """Raises ValueError for sampling options that `stream_codes` would refuse."""
        guidance_schedule(guidance_scale, self.config.num_image_tokens)
        sampling_warpers(temperature, top_k, top_p)

    def check_prefix(
        self, codes: torch.Tensor, batch_size: int, num_tokens: int, repeats: int = 1
    ) -> torch.LongTensor:
        """The prefix ``(batch_size, n)`` on this model's device.

        One row is repeated for the whole batch; ``batch_size / repeats`` rows are repeated ``repeats`` times each.

        Raises:
            ValueError: that says what is wrong with it.
        """
        try:
            codes = torch.as_tensor(codes)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"prefix_codes must be a tensor of integers, got {type(codes).__name__}.") from error
        whole = not (codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool)
        if whole:
            codes = codes.to(self._input_device, torch.long)  # torch has no minimum of most unsigned types
        if codes.ndim == 2 and len(codes) * repeats == batch_size:
            codes = codes.repeat_interleave(repeats, dim=0)
        if codes.ndim != 2 or not whole or len(codes) not in (1, batch_size):
            raise ValueError(
                f"prefix_codes must be integers of shape (1 or {batch_size // repeats}, n), got {codes.dtype} of "
                f"{tuple(codes.shape)}."
            )
        if codes.shape[1] > num_tokens:
            raise ValueError(f"a prefix of {codes.shape[1]} codes is longer than the {num_tokens} to generate.")
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.config.codebook_size):
            raise ValueError(f"prefix_codes must lie in [0, {self.config.codebook_size}).")
        return codes.expand(batch_size, -1)

    @property
    def _input_device(self) -> torch.device:
        """Where inputs go: offloaded layer by layer, the model itself is nowhere and takes them from the CPU."""
        return torch.device("cpu") if self.device.type == "meta" else self.device

    @torch.no_grad()
    def _stream_groups(
        self,
        start: torch.LongTensor,
        unconditional: torch.LongTensor,
        schedule: list[float] | None,
        warpers: LogitsProcessorList | None,
        generator: Generators,
        num_tokens: int,
        group_size: int,
    ) -> Iterator[torch.LongTensor]:
        """``start`` is prompt and prefix of each row, ``unconditional`` the same for the other half of guidance.

        ``warpers`` None decodes greedily.
        """
        codes = start[:, self.config.prompt_length :]
        inputs = start
        if schedule is not None:
            inputs = torch.cat([start, unconditional])
        yielded = 0
        extremes: list[torch.Tensor] = []  # NaN and infinity show in minimum and maximum: two numbers per step
        with self._decoding(len(inputs), num_tokens) as (model, next_logits):
            while yielded < num_tokens:
                stop = min(yielded + group_size, num_tokens)
                with evaluating(model):
                    while codes.shape[1] < stop:
                        logits = next_logits(inputs)
                        codes = codes.to(logits.device)  # under offloading the model is elsewhere until it is called
                        if schedule is not None:
                            logits = apply_guidance(logits, schedule[codes.shape[1]])
                        extremes.extend(logits.aminmax())
                        if warpers is None:
                            inputs = logits.argmax(dim=-1, keepdim=True)
                        else:
                            inputs = sample_index(warpers(None, logits), generator)[:, None]
                        codes = torch.cat([codes, inputs], dim=1)
                        if schedule is not None:
                            inputs = torch.cat([inputs, inputs])
                if codes.device.type == "cpu" or stop == num_tokens:  # a GPU is waited for at the end only
                    check_finite(extremes, self)
                    extremes.clear()
                yield codes[:, yielded:stop]
                yielded = stop

    @contextmanager
    def _decoding(self, rows: int, num_tokens: int) -> Iterator[tuple[nn.Module, NextLogits]]:
        """The model that decodes, and the function that gives its next logits over a cache of its own."""
        if not self.compile_decoding:
            # attention and its cache are float32 on CPUs, where bf16 makes them no faster
            model = accelerated(self, pack=self.pack_weights, float32_outputs=("q_proj", "k_proj", "v_proj"))
            length = self.config.prompt_length + num_tokens - 1  # the last code is not put in
            cache = Cache(layers=[FilledCacheLayer(length) for _ in self.model.layers])
            yield model, lambda inputs: _next_logits(model, inputs, cache)
            return
        if self._compiled_forward is None:
            mode = "reduce-overhead" if self.device.type == "cuda" else "default"
            self._compiled_forward = torch.compile(self.forward, mode=mode, fullgraph=True, dynamic=False)
        key = (rows, self.device, self.dtype)
        cache = self._static_caches.pop(key, None)  # taken out: two streams must not share one
        if cache is None:
            cache = StaticCache(
                config=self.config, max_cache_len=self.config.prompt_length + self.config.num_image_tokens - 1
            )
        cache.reset()

        # the prefill, over prompt and prefix, has a different shape; do not compile it
        forwards = itertools.chain([self], itertools.repeat(self._compiled_forward))

        def next_logits(inputs: torch.LongTensor) -> torch.Tensor:
            return _next_logits(next(forwards), inputs, cache)

        try:
            yield self, next_logits
        finally:
            self._static_caches = {key: cache}  # only the latest: each batch size needs one, and they would add up

    def __getstate__(self) -> dict[str, Any]:
        # a copy must not call the forward pass of the model that it was copied from
        return {**vars(self), "_compiled_forward": None, "_static_caches": {}}


def _next_logits(forward: Callable, inputs: torch.LongTensor, cache: Cache) -> torch.Tensor:
    """float32 logits ``(rows, codebook_size)`` after ``inputs (rows, L)``, which follow the tokens in the cache."""
    logits = forward(inputs, **{CACHE: cache}, use_cache=True, logits_to_keep=1).logits
    return logits[:, -1].float()
