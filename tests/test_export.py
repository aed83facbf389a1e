import json
import subprocess
import sys

import pytest
import torch
from jobs_cases import run_job
from safetensors.torch import load_file, save_file
from tiny import tiny_policy
from wan_cases import WanTransformer3DModel, same, tiny_wan, velocity

from policy.policy import WeightsError
from policy.wan_formats import LAYOUTS, merge_lora, read_wan, write_wan

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "net.2"]


def export(tmp_path, *overrides: str) -> int:
    return run_job("export", f"out={tmp_path / 'out'}", *overrides)


def complaint(capsys, tmp_path, *overrides: str) -> str:
    capsys.readouterr()
    assert export(tmp_path, *overrides) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


@pytest.fixture
def wan(tmp_path):
    write_wan(tiny_wan(), tmp_path / "wan", "original")
    return f"policy.path={tmp_path / 'wan'}"


@pytest.fixture
def adapter(tmp_path):
    """A PEFT adapter folder, and the model with the adapter active."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(3)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=False)
    adapted = peft.get_peft_model(tiny_wan(), config)
    adapted.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", adapted.base_model.model.eval()


def test_the_command_writes_a_policy_with_its_trained_weights_as_stock_diffusers_reads_it(tmp_path):
    tiny_policy().save(tmp_path / "policy")
    trained = tiny_policy(seed=1).state_dict()
    save_file(trained, tmp_path / "policy.safetensors")
    overrides = [f"policy.path={tmp_path / 'policy'}", f"policy.weights={tmp_path / 'policy.safetensors'}"]
    command = [sys.executable, "-m", "jobs.export", *overrides, f"out={tmp_path / 'out'}"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    parameters = sum(tensor.numel() for tensor in trained.values())
    assert done.stdout == f"wrote {tmp_path / 'out'}: {parameters:,} parameters, diffusers names\n"
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "out", local_files_only=True).state_dict()
    assert stock.keys() == trained.keys() and all(torch.equal(stock[name], trained[name]) for name in trained)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_exported(tmp_path, wan, layout):
    assert export(tmp_path, wan, f"layout={layout}") == 0
    assert same(read_wan(tmp_path / "out"), tiny_wan())


def test_control_channels_and_a_dtype_are_given_on_the_way(tmp_path, wan):
    assert export(tmp_path, wan, "in_channels=36", "dtype=bfloat16") == 0
    written = read_wan(tmp_path / "out")
    assert written.config.in_channels == 36
    assert same(written, read_wan(tmp_path / "wan", torch.bfloat16, 36)) and not same(
        written, read_wan(tmp_path / "wan")
    )


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("layout=onnx", "layout=onnx is none of diffusers, original, self_forcing"),
        ("dtype=int8", "dtype=int8 is none of float32, bfloat16, float16"),
        ("policy.path=nowhere", "nowhere is no file or folder"),
        ("policy.weights=nowhere.safetensors", "nowhere.safetensors"),
        ("adapter=nowhere", "nowhere is no PEFT adapter: no adapter_config.json"),
        ("in_channels=8", "takes 16 input channels, not 8"),
    ],
)
def test_a_wrong_value_is_named_and_nothing_is_written(capsys, tmp_path, wan, override, named):
    before = sorted(tmp_path.rglob("*"))
    assert named in complaint(capsys, tmp_path, wan, override)
    assert sorted(tmp_path.rglob("*")) == before


def test_weights_of_another_policy_are_named(capsys, tmp_path, wan):
    save_file(tiny_wan("i2v").state_dict(), tmp_path / "policy.safetensors")
    line = complaint(capsys, tmp_path, wan, f"policy.weights={tmp_path / 'policy.safetensors'}")
    assert "[24, 36, 1, 2, 2] given, [24, 16, 1, 2, 2] needed" in line


def test_a_folder_that_exists_is_left_alone(capsys, tmp_path, wan):
    assert export(tmp_path, wan) == 0
    assert "exists; remove it or choose another" in complaint(capsys, tmp_path, wan, "layout=original")
    assert same(read_wan(tmp_path / "out"), tiny_wan())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_merged_adapter_computes_what_it_did_beside_the_weights(tmp_path, adapter, layout):
    folder, adapted = adapter
    source = tmp_path / "source"
    write_wan(tiny_wan(), source, layout)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    assert export(tmp_path, f"policy.path={source}", f"adapter={folder}") == 0
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "out", local_files_only=True)
    torch.testing.assert_close(velocity(stock), velocity(adapted), atol=1e-5, rtol=0)
    assert (velocity(stock) - velocity(tiny_wan())).abs().max() > 0.05
    assert stock.state_dict().keys() == tiny_wan().state_dict().keys()
    assert before == {file.name: file.read_bytes() for file in source.iterdir()}


def rank_three(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))


def without_a_target(folder):
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor for name, tensor in load_file(file).items() if "to_q" not in name}, file)


def of_another_module(folder):
    file = folder / "adapter_model.safetensors"
    save_file({name.replace("blocks.1", "blocks.7"): tensor for name, tensor in load_file(file).items()}, file)


def pickled(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


def cut(folder):
    file = folder / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def without_its_config(folder):
    (folder / "adapter_config.json").unlink()


@pytest.mark.parametrize("damage", [rank_three, without_a_target, of_another_module, pickled, cut, without_its_config])
def test_an_adapter_that_does_not_fit_is_named(adapter, damage):
    folder, _ = adapter
    merge_lora(tiny_wan(), folder)
    damage(folder)
    with pytest.raises(WeightsError, match=str(folder)) as error:
        merge_lora(tiny_wan(), folder)
    assert "\n" not in str(error.value)
