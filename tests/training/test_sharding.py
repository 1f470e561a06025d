"""Gathering parameters that torch's fully_shard has spread over two processes."""

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from accelerate.utils import DistributedType
from torch import nn

from dar_hf import DARPipeline
from dar_hf.training import make_accelerator
from dar_hf.training.launcher import check_layout, configure_deepspeed
from dar_hf.training.loop import TrainingLoop
from dar_hf.training.sharding import gather_into

from .commands import Script
from .helpers import ar_args, ar_stage, tiny_tokenizer, tokenizer_args

CONFIGS = Path(__file__).parents[2] / "examples" / "accelerate_configs"

SCRIPT = """
import sys
import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from dar_hf import DARConfig, DARForCausalLM
from dar_hf.training.sharding import gather_into

dist.init_process_group("gloo")
torch.manual_seed(0)
sizes = dict(hidden_size=36, intermediate_size=50, num_hidden_layers=2, num_attention_heads=2, codebook_size=7)
model = DARForCausalLM(DARConfig(**sizes, num_classes=3, num_image_tokens=4, tokens_per_group=2))
torch.nn.init.normal_(model.lm_head.weight)
main = dist.get_rank() == 0
torch.manual_seed(1)
whole = DARForCausalLM(model.config) if main else None
mesh = dist.device_mesh.init_device_mesh("cpu", (2,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
local = sum(p.to_local().numel() for p in model.parameters())
assert local < 0.6 * sum(p.numel() for p in model.parameters())  # it is sharded
ids = torch.tensor([[7, 1, 2, 3], [9, 4, 5, 6]])
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
for _ in range(3):
    model.train()
    torch.manual_seed(5)
    model(input_ids=ids, labels=ids.masked_fill(ids > 6, -100)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
gather_into(model, whole)
model.eval()
with torch.no_grad():
    expected = model(input_ids=ids).logits  # all processes: a forward pass gathers, too
if main:
    whole.eval().save_pretrained(sys.argv[1])
    loaded = DARForCausalLM.from_pretrained(sys.argv[1]).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(input_ids=ids).logits, expected, atol=1e-6, rtol=1e-5)
    fresh = DARForCausalLM(model.config)
    assert not any(torch.equal(a, b) for a, b in zip(loaded.parameters(), fresh.parameters()) if a.ndim > 1)
    print("gathered")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_gather_what_they_trained(environment, tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    line = [tmp_path / "script.py", tmp_path / "model"]
    script = Script(line, environment, tmp_path / "script", processes=2).run().finished()
    assert "gathered" in script.said("stdout")


def test_plain_parameters_are_copied():
    one, other = nn.Linear(3, 2), nn.Linear(3, 2)
    gather_into(one, other)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    gather_into(one, None)
    with pytest.raises(ValueError, match="different parameters: bias"):
        gather_into(one, nn.Linear(3, 2, bias=False))


@pytest.fixture
def tokenizer(tmp_path):
    tiny_tokenizer().save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def test_a_sharded_run_validates_and_saves_the_whole_copy(tmp_path, tokenizer):
    """As under FSDP: the model that trains never meets validation or saving."""
    stage, args = ar_stage(tmp_path / "run", tokenizer, ema_decay=None)
    loop = TrainingLoop(stage, args, make_accelerator(args))
    loop.sharded, loop.whole, trained = True, copy.deepcopy(stage.model), stage.model
    judged = []
    validate = stage.validate
    stage.validate = lambda step: judged.append(stage.model) or validate(step)
    loop.train_and_save()
    assert judged == [loop.whole] and stage.model is trained and trained.training
    saved = DARPipeline.from_pretrained(tmp_path / "run").transformer
    assert all(torch.equal(a, b) for a, b in zip(saved.parameters(), trained.parameters(), strict=True))


def test_layouts_that_would_give_a_wrong_model_are_refused(tmp_path, tokenizer):
    stage_one, stage_two = tokenizer_args(tmp_path, ema_decay=None), ar_args(tmp_path, tokenizer, ema_decay=None)
    check_layout(stage_two, DistributedType.FSDP, True)
    check_layout(stage_two, DistributedType.DEEPSPEED, False)
    check_layout(stage_one, DistributedType.MULTI_GPU, False)
    mistakes = [
        (stage_two, DistributedType.FSDP, False, "fsdp_version: 2"),
        (stage_one, DistributedType.FSDP, True, "train it with DDP"),
        (ar_args(tmp_path, tokenizer), DistributedType.FSDP, True, "set ema_decay to 0"),
        (stage_one, DistributedType.DEEPSPEED, False, "train it with DDP"),
        (ar_args(tmp_path, tokenizer), DistributedType.DEEPSPEED, False, "set ema_decay to 0"),
    ]
    for args, kind, is_fsdp2, message in mistakes:
        with pytest.raises(ValueError, match=message):
            check_layout(args, kind, is_fsdp2)


def deepspeed(precision="no", **config):
    """An accelerator's share of DeepSpeed, which need not be installed."""
    plugin = SimpleNamespace(deepspeed_config={"zero_optimization": {"stage": 3}} | config)
    return SimpleNamespace(deepspeed_plugin=plugin, mixed_precision=precision, num_processes=8)


def test_deepspeed_is_told_what_the_command_was_told(tmp_path, tokenizer):
    accelerator = deepspeed(gradient_clipping="auto", train_batch_size="auto", gradient_accumulation_steps=1)
    args = ar_args(tmp_path, tokenizer, train_batch_size=4, gradient_accumulation_steps=2, max_grad_norm=0.5)
    configure_deepspeed(args, accelerator)
    assert accelerator.deepspeed_plugin.deepspeed_config == {
        "zero_optimization": {"stage": 3},
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": 2,
        "train_batch_size": 64,
        "gradient_clipping": 0.5,
        "data_types": {"grad_accum_dtype": "fp32"},
    }


@pytest.mark.parametrize(
    "options, message",
    [
        ({"zero_optimization": {"stage": 1}}, "ZeRO 2 and 3"),
        ({"optimizer": {"type": "Adam"}}, "its own optimizer"),
        ({"scheduler": {"type": "WarmupLR"}}, "its own scheduler"),
        ({"precision": "fp16"}, "fp16"),
        ({"precision": "bf16"}, "trains in bf16, but mixed_precision is no"),
        ({"gradient_clipping": 0.5}, "says 0.5, but max_grad_norm is 1"),
        ({"gradient_accumulation_steps": 2}, "says 2, but gradient_accumulation_steps is 1"),
        ({"train_micro_batch_size_per_gpu": 8}, "says 8, but train_batch_size is 4"),
        ({"train_batch_size": 4}, "says 4, but the number of images in a step is 32"),
    ],
)
def test_deepspeed_settings_that_would_give_a_wrong_model_are_refused(tmp_path, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        configure_deepspeed(ar_args(tmp_path, tokenizer), deepspeed(**options))


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configurations(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.distributed_type in (DistributedType.MULTI_GPU, DistributedType.FSDP, DistributedType.DEEPSPEED)
    assert config.mixed_precision == "bf16" and config.num_processes == 8 * config.num_machines
    wrapped = yaml.safe_load(path.read_text()).get("fsdp_config", {}).get("fsdp_transformer_layer_cls_to_wrap")
    assert wrapped in (None, "DARDecoderLayer")
