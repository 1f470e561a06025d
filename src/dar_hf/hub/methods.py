"""What the Hub's libraries lack, given to the package's classes.

Done here and not in the model files, because these are copied into self-contained repositories, where they must work
without this package; there the libraries' own methods remain.
"""

import functools
from typing import Any

from diffusers import ConfigMixin
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES

from ..files import saved_class
from .advice import loading_error
from .push import push_to_hub


def connect(model_class: Any) -> None:
    """Give a class uploads with a card (`push_to_hub`), and the Hub's own exceptions, with advice, in loading.

    Classes of diffusers also refuse folders that hold another class: their loader warns only, and fills a model with
    random weights.
    """
    model_class.push_to_hub = push_to_hub
    load = model_class.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return load(cls, pretrained_model_name_or_path, *args, **kwargs)
        except Exception as error:
            problem = loading_error(error, pretrained_model_name_or_path)
            if problem is error:
                raise
        raise problem  # outside the handler: raised inside, it would be its own context's cause

    model_class.from_pretrained = classmethod(from_pretrained)
    if issubclass(model_class, ConfigMixin):
        read = model_class._dict_from_json_file.__func__  # diffusers' reader of every index and configuration

        def read_index(cls: Any, json_file: Any) -> dict:
            return _own_index(cls, read(cls, json_file), json_file)

        model_class._dict_from_json_file = classmethod(read_index)


def _own_index(cls: Any, index: dict, json_file: Any) -> dict:
    """An index of this package's classes, with the installed ones in the place of a self-contained folder's own.

    Raises:
        ValueError: if it describes another class.
    """
    if saved_class(index) not in {base.__name__ for base in cls.__mro__}:
        raise ValueError(f"{json_file} describes a {saved_class(index)}, not a {cls.__name__}.")
    package = LOADABLE_CLASSES["dar_hf"]
    ours = {
        name: ["dar_hf", entry[1]]
        for name, entry in index.items()
        if isinstance(entry, list) and len(entry) == 2 and entry[1] in package
    }
    kept = {name: entry for name, entry in index.items() if name != "auto_map"}  # the code does not go along
    return kept | ours | {"_class_name": saved_class(index)}
