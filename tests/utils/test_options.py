"""Files of options."""

from dataclasses import dataclass

import pytest
from transformers.hf_argparser import HfArg, HfArgumentParser

from dar_hf.utils import options as options_module
from dar_hf.utils.options import current_names, read_options, renamed_option


@dataclass
class Options:
    precision: str = HfArg(default="auto", help="text")
    split: str | None = HfArg(default=None, help="text or nothing")
    steps: int = HfArg(default=1, help="whole number")
    limit: int | None = HfArg(default=None, help="whole number or nothing")
    rate: float = HfArg(default=0.1, help="number")
    flip: bool = HfArg(default=False, help="true or false")
    overrides: list[str] | None = HfArg(default=None, help="list of text")
    scale: list[float] | None = HfArg(default=None, help="list of numbers")


def read(tmp_path, text):
    (tmp_path / "options.yaml").write_text(text, encoding="utf-8")
    return read_options(tmp_path / "options.yaml", Options)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", {}),
        ("# nothing", {}),
        ("precision: no", {"precision": "no"}),
        ("precision: off", {"precision": "no"}),
        ("precision: false", {"precision": "no"}),
        ("precision: 'no'", {"precision": "no"}),
        ("precision: bf16", {"precision": "bf16"}),
        ("precision: '2024'", {"precision": "2024"}),
        ("split:", {"split": None}),
        ("split: test", {"split": "test"}),
        ("steps: 10_000", {"steps": 10_000}),
        ("steps: '7'", {"steps": 7}),
        ("limit: null", {"limit": None}),
        ("limit: 3", {"limit": 3}),
        ("rate: 1e-4", {"rate": 1e-4}),
        ("rate: 3", {"rate": 3.0}),
        ("rate: .inf", {"rate": float("inf")}),
        ("flip: yes", {"flip": True}),
        ("flip: off", {"flip": False}),
        ("flip: 'true'", {"flip": True}),
        ("flip: 1", {"flip": True}),
        ("overrides: [a=1, b=2]", {"overrides": ["a=1", "b=2"]}),
        ("overrides: []", {"overrides": []}),
        ("scale: [1.1, 8]", {"scale": [1.1, 8.0]}),
    ],
)
def test_values_of_each_type(tmp_path, text, expected):
    found = read(tmp_path, text)
    assert found == expected and [type(value) for value in found.values()] == [type(v) for v in expected.values()]


@pytest.mark.parametrize(
    "text, message",
    [
        ("precision: 16", "precision takes text, got 16: put it in quotes, '16'"),
        ("precision: true", "precision takes text, got True"),
        ("precision:", "precision takes text, got None"),
        ("precision: [no]", "precision takes text"),
        ("precision: {a: 1}", "precision takes text"),
        ("steps: x", "steps takes a whole number, got 'x'"),
        ("steps: 1.5", "steps takes a whole number, got 1.5"),
        ("steps: 1e3", "steps takes a whole number, got '1e3'"),
        ("steps: true", "steps takes a whole number, got True"),
        ("steps:", "steps takes a whole number, got None"),
        ("rate: x", "rate takes a number, got 'x'"),
        ("rate: no", "rate takes a number, got False"),
        ("rate: 2001-01-01", "rate takes a number"),
        ("flip: maybe", "flip takes true or false, got 'maybe'"),
        ("flip: 2", "flip takes true or false, got 2"),
        ("flip: 1.0", "flip takes true or false, got 1.0"),
        ("overrides: a=1", "overrides takes a list"),
        ("overrides: {a: 1}", "overrides takes a list"),
        ("overrides: [1]", "overrides takes text, got 1"),
        ("scale: 2.0", "scale takes a list"),
        ("scale: [a]", "scale takes a number, got 'a'"),
        ("step: 3", "unknown options in .*options.yaml: step"),
        ("1: 3\nx: 2", "unknown options in .*: 1, x"),
        ("steps: 1\nsteps: 2", "it gives steps more than once"),
        ("- steps", "must hold options by name, not a list"),
        ("steps", "must hold options by name, not a str"),
        ("steps: [", "cannot read options from"),
        ("steps: \x01", "cannot read options from"),
        ("steps: !!python/object/apply:os.getpid []", "cannot read options from"),
        ("? [1]\n: 2", "cannot read options from|unknown options"),
        ("? {a: 1}\n: 2", "cannot read options from"),
        ("[" * 5000, "cannot read options from"),
    ],
)
def test_values_of_other_types_are_refused_by_name(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, text)


def test_files_that_are_none(tmp_path):
    (tmp_path / "binary").write_bytes(b"\x89PNG\xff")
    for path, message in (
        (tmp_path / "none.yaml", "there is no file"),
        (tmp_path, "cannot read"),
        ("binary", "cannot"),
    ):
        with pytest.raises(ValueError, match=message):
            read_options(tmp_path / path, Options)


# Renamed options


@dataclass
class Renamed:
    new_name: int = renamed_option("old_name", default=1, help="number")


def parsed(*words):
    return HfArgumentParser(Renamed).parse_args_into_dataclasses(list(words))[0].new_name


@pytest.mark.parametrize("form", ["command line", "with an equals sign", "file", "preset"])
def test_the_former_name_of_an_option_is_taken_with_a_warning(tmp_path, form, caplog):
    options_module._warn_renamed.cache_clear()
    if form == "command line":
        found = {"new_name": parsed("--old_name", "7")}
    elif form == "with an equals sign":
        found = {"new_name": parsed("--old_name=7")}
    elif form == "file":
        (tmp_path / "options.yaml").write_text("old_name: 7")
        found = read_options(tmp_path / "options.yaml", Renamed)
    else:
        found = current_names({"old_name": 7}, Renamed)
    assert found == {"new_name": 7}
    assert "the option old_name is now called new_name" in caplog.text


def test_the_name_an_option_has_now_needs_no_warning(tmp_path, caplog):
    assert parsed("--new_name", "7") == parsed("--new-name", "7") == 7 and parsed() == 1
    assert current_names({"new_name": 7}, Renamed) == {"new_name": 7} and not caplog.text
