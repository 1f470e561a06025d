"""All that transformers and diffusers are told about this package's classes, or that is patched for them.

Written for transformers 5.23 and diffusers 0.42; what depends on one of them says so. The patches are made here and
not in the model files, because these are copied into self-contained repositories, where they must work without this
package; there the libraries' own methods remain.
"""

import functools
import inspect
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import ConfigMixin
from diffusers.pipelines import pipeline_loading_utils
from diffusers.utils import TRANSFORMERS_COMPONENT_AUX_FILES
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from .configuration_dar import DARConfig
from .hub.advice import loading_error
from .hub.push import push_folder, push_to_hub
from .modeling_dar import DARForCausalLM, DARModel
from .pipeline_dar import DARPipeline
from .scheduling_dar import FlowMatchAdamsBashforthScheduler
from .tokenizer_dar import DARTokenizer
from .utils.files import damaged_weights, read_object, saved_class

CLASSES = (DARForCausalLM, DARPipeline, DARTokenizer, FlowMatchAdamsBashforthScheduler)
_OPTIONS_OF_PUSH = ("repo_id", "commit_message", "commit_description", "private", "token", "revision", "create_pr")
_OF_BITSANDBYTES = ("load_in_8bit", "load_in_4bit")  # options of old versions, which diffusers 0.42 ignores


def register() -> None:
    """Make both libraries find the package's classes, and give these what the libraries' own methods lack."""
    _register_with_transformers()
    _register_with_diffusers()
    for model_class in CLASSES:
        add_hub_methods(model_class)


def _register_with_transformers() -> None:
    AutoConfig.register("dar", DARConfig, exist_ok=True)
    AutoModel.register(DARConfig, DARModel, exist_ok=True)
    AutoModelForCausalLM.register(DARConfig, DARForCausalLM, exist_ok=True)


def _register_with_diffusers() -> None:
    # diffusers 0.42 loads pipeline components only from libraries it knows, by the name that model_index.json gives
    loadable = {model_class.__name__: ["save_pretrained", "from_pretrained"] for model_class in CLASSES}
    pipeline_loading_utils.LOADABLE_CLASSES["dar_hf"] = loadable
    pipeline_loading_utils.ALL_IMPORTABLE_CLASSES.update(loadable)
    # diffusers 0.42 downloads only weights and config.json of a component: the guidance saved with a model would be
    # lost
    TRANSFORMERS_COMPONENT_AUX_FILES.append("transformer/generation_config.json")
    # `DiffusionPipeline`, diffusers' `AutoModel` and a scheduler's `compatibles` look for the class by its name only
    # in diffusers itself (0.42)
    for model_class in (DARPipeline, DARTokenizer, FlowMatchAdamsBashforthScheduler):
        setattr(diffusers, model_class.__name__, model_class)


def add_hub_methods(model_class: Any) -> None:
    """Give a class uploads with a card (`push_to_hub`), and clear exceptions in loading, the Hub's own with advice.

    Classes of diffusers also refuse folders that hold another class: the loader of diffusers 0.42 only warns, and
    fills a model with random weights.
    """
    model_class.push_to_hub = push_to_hub
    model_class.save_pretrained = _pushing_save(model_class.save_pretrained)
    load = model_class.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        folder = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "")
        try:
            if issubclass(cls, PreTrainedModel):
                _check_configs(folder)
            elif ignored := [name for name in _OF_BITSANDBYTES if kwargs.get(name)]:
                raise ValueError(f"{cls.__name__} has no option {ignored[0]}: give a quantization_config.")
            return load(cls, pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:
            problem = loading_error(error, pretrained_model_name_or_path)
            if problem is error:
                problem = _clear(error, cls.__name__, pretrained_model_name_or_path, damaged_weights(folder))
            if problem is error:
                raise
        raise problem  # outside the handler: raised inside, it would be its own context's cause

    model_class.from_pretrained = classmethod(from_pretrained)
    if issubclass(model_class, ConfigMixin):

        def read_index(cls: Any, json_file: Any) -> dict:  # instead of diffusers' own, for every index
            return _own_index(cls, read_object(Path(json_file)), json_file)

        model_class._dict_from_json_file = classmethod(read_index)


def _pushing_save(save: Any) -> Any:
    """``save_pretrained`` whose ``push_to_hub=True`` uploads as `push_folder` does: nothing that is replaced stays."""
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, save_directory: Any, *args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(self, save_directory, *args, **kwargs)
        if not bound.arguments.get("push_to_hub"):
            return save(self, save_directory, *args, **kwargs)
        given = {name: value for name, value in bound.arguments.items() if name not in ("self", "kwargs")}
        given |= bound.arguments.get("kwargs", {}) | {"push_to_hub": False}
        options = {name: given.pop(name) for name in _OPTIONS_OF_PUSH if given.get(name) is not None}
        save(self, **given)
        if given.get("is_main_process", True):
            push_folder(save_directory, options.pop("repo_id", Path(save_directory).resolve().name), **options)

    return save_pretrained


def _check_configs(folder: Path) -> None:
    """Refuse damaged files: transformers 5.23 would take the defaults, and lose the saved guidance."""
    for path in (folder / CONFIG_NAME, folder / GENERATION_CONFIG_NAME):
        if path.is_file():
            read_object(path)


def _clear(error: Exception, class_name: str, name: Any, damage: str | None) -> Exception:
    """What to raise where a saved model could not be loaded: the error itself if it is clear, otherwise one that is.

    The libraries raise all kinds of exceptions where a file is damaged, and few of them name it: ``damage`` does.
    """
    if isinstance(error, (ImportError, MemoryError, torch.OutOfMemoryError)) or hasattr(error, "__notes__"):
        return error
    known = isinstance(error, (OSError, ValueError))
    if damage is None and known and (str(name) in str(error) or getattr(error, "errno", None) is not None):
        return error
    text = str(error) if known else f"{type(error).__name__}: {error}"
    kind = OSError if isinstance(error, OSError) else ValueError
    problem = kind(f"{name} cannot be loaded as a {class_name}: {damage or text}")
    problem.__cause__ = error
    return problem


def _own_index(cls: Any, index: dict, json_file: Any) -> dict:
    """An index of this package's classes, with the installed ones instead of a self-contained folder's own.

    Raises:
        ValueError: if it is none, or describes another class.
    """
    if saved_class(index) not in {base.__name__ for base in cls.__mro__}:
        raise ValueError(f"{json_file} describes a {saved_class(index)}, not a {cls.__name__}.")
    package = pipeline_loading_utils.LOADABLE_CLASSES["dar_hf"]
    ours = {
        name: ["dar_hf", entry[1]]
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] in package
    }
    kept = {name: entry for name, entry in index.items() if name != "auto_map"}  # the code does not go along
    return kept | ours | {"_class_name": saved_class(index)}
