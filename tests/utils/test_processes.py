import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from dar_hf.utils import processes
from dar_hf.utils.processes import join_processes


def test_one_process():
    assert join_processes().num_processes == 1


@pytest.mark.slow
def test_processes_of_torchrun_find_each_other_without_a_gpu(tmp_path):
    (tmp_path / "job.py").write_text(
        "import os\n"
        "from dar_hf.utils.processes import join_processes\n"
        "accelerator = join_processes()\n"
        "rank, count = accelerator.process_index, accelerator.num_processes\n"
        # in one piece: print may write the end of the line by itself, and the other process before it
        "os.write(1, f'{rank} of {count} on {accelerator.device.type}\\n'.encode())\n"
        "accelerator.end_training()\n"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "job.py"]
    result = subprocess.run(
        launch,
        cwd=tmp_path,
        env=environment | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert sorted(result.stdout.splitlines()) == ["0 of 2 on cpu", "1 of 2 on cpu"]


def test_processes_that_are_not_joined_are_refused(monkeypatch):
    for name, value in {"LOCAL_RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "false"}.items():
        monkeypatch.setenv(name, value)
    alone = SimpleNamespace(num_processes=1, device=torch.device("mps"))
    monkeypatch.setattr(processes, "Accelerator", lambda: alone)
    with pytest.raises(ValueError, match="2 processes were started, but on mps accelerate does not join them"):
        join_processes()
