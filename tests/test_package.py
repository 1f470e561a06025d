"""What an installation of the package says of itself."""

import re
from importlib import resources
from importlib.metadata import metadata, requires, version
from pathlib import Path

from packaging.requirements import Requirement

import dar_hf

ROOT = Path(__file__).parents[1]
ORDER = ["utils", "data", "metrics", "evaluation", "hub", "training"]


def test_the_description_is_the_readme():
    found = metadata("dar-hf")
    assert found["Description-Content-Type"] == "text/markdown"
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert found.get_payload().strip().splitlines()[0] == readme.splitlines()[0]  # the rest may be edited since


def test_links_and_classifiers():
    found = metadata("dar-hf")
    links = dict(link.split(", ") for link in found.get_all("Project-URL"))
    assert links["Paper"].endswith("2505.23660") and links["Original code"].endswith("showlab/D-AR")
    assert "Typing :: Typed" in found.get_all("Classifier")
    assert version("dar-hf") == dar_hf.__version__


def test_the_licences_of_what_it_follows_come_along():
    setup = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert 'license_files=["LICENSE", "NOTICE", "licenses/Apache-2.0.txt"]' in setup


def test_type_checkers_use_the_types():
    assert resources.files("dar_hf").joinpath("py.typed").is_file()


def test_every_dependency_has_a_lower_bound():
    for requirement in map(Requirement, requires("dar-hf")):
        bounds = [bound.operator for bound in requirement.specifier]
        assert bounds.count(">=") == 1, f"{requirement}: `make test-versions` needs one lower bound"


def test_packages_import_in_one_direction():
    for place, package in enumerate(ORDER):
        for path in (ROOT / "src" / "dar_hf" / package).glob("*.py"):
            imported = set(re.findall(r"^\s*from \.\.(\w+)", path.read_text(encoding="utf-8"), re.MULTILINE))
            assert not imported & set(ORDER[place + 1 :]), f"{path} imports a package above its own"
