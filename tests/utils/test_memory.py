"""What a process does with memory that it has freed."""

import subprocess
import sys

import pytest

# how many pages the system hands out while tensors of 64 MB in all are allocated and freed, again and again
COUNT_FAULTS = """
import resource, sys, torch
from dar_hf.utils.memory import keep_freed_memory
if sys.argv[1] == "keep":
    print(keep_freed_memory())
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def allocate():
    [torch.zeros(2**20) for _ in range(16)]
for _ in range(3):
    allocate()
before = faults()
for _ in range(10):
    allocate()
print(faults() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's")
def test_freed_memory_is_used_again():
    command = [sys.executable, "-c", COUNT_FAULTS, "keep"]
    is_kept, faults = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    if is_kept != "True":
        pytest.skip("this C library has no mallopt")
    assert int(faults) < 16384  # the pages of 64 MB, which else are handed out ten times
