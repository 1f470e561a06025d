"""Display names of metrics."""

import pytest

from dar_hf.metrics import metric_name


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("rFID", ("fid", "reconstruction")),
        ("gFD (network)", ("frechet_distance", "generation", "network")),
        ("sFID", ("sfid", "generation")),
        ("PSNR (dB)", ("psnr", "reconstruction")),
        ("reference label agreement (network)", ("reference_label_agreement", "", "network")),
    ],
)
def test_names_of_metrics(name, arguments):
    assert metric_name(*arguments) == name
