import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_wan_transformer_to_diffusers
from safetensors.torch import load_file, save_file
from wan_cases import KINDS, WanTransformer3DModel, same, tiny_wan, velocity

from policy.policy import WeightsError
from policy.wan_formats import LAYOUTS, locate, read_wan, to_diffusers, to_original, write_wan

WEIGHTS = "diffusion_pytorch_model.safetensors"
TOP = """patch_embedding.weight patch_embedding.bias text_embedding.0.weight text_embedding.0.bias
text_embedding.2.weight text_embedding.2.bias time_embedding.0.weight time_embedding.0.bias time_embedding.2.weight
time_embedding.2.bias time_projection.1.weight time_projection.1.bias head.modulation head.head.weight head.head.bias"""
IMAGE = """img_emb.proj.0.weight img_emb.proj.0.bias img_emb.proj.1.weight img_emb.proj.1.bias img_emb.proj.3.weight
img_emb.proj.3.bias img_emb.proj.4.weight img_emb.proj.4.bias"""
BLOCK = """modulation norm3.weight norm3.bias ffn.0.weight ffn.0.bias ffn.2.weight ffn.2.bias self_attn.q.weight
self_attn.q.bias self_attn.k.weight self_attn.k.bias self_attn.v.weight self_attn.v.bias self_attn.o.weight
self_attn.o.bias self_attn.norm_q.weight self_attn.norm_k.weight cross_attn.q.weight cross_attn.q.bias
cross_attn.k.weight cross_attn.k.bias cross_attn.v.weight cross_attn.v.bias cross_attn.o.weight cross_attn.o.bias
cross_attn.norm_q.weight cross_attn.norm_k.weight"""
IMAGE_BLOCK = """cross_attn.k_img.weight cross_attn.k_img.bias cross_attn.v_img.weight cross_attn.v_img.bias
cross_attn.norm_k_img.weight"""


def published_names(kind: str, layers: int = 2) -> set[str]:
    """Names in the checkpoints of Wan's own repository."""
    image = kind in ("i2v", "flf2v")
    block = BLOCK.split() + image * IMAGE_BLOCK.split()
    top = TOP.split() + image * IMAGE.split() + (kind == "flf2v") * ["img_emb.emb_pos"]
    return {*top, *(f"blocks.{i}.{name}" for i in range(layers) for name in block)}


def original_state(model):
    return {to_original(name): tensor for name, tensor in model.state_dict().items()}


def self_forcing(model, prefix="model."):
    return {prefix + name: tensor for name, tensor in original_state(model).items()}


@pytest.fixture
def folders(tmp_path):
    """A T2V transformer in each layout."""
    for layout in LAYOUTS:
        write_wan(tiny_wan(), tmp_path / layout, layout)
    return tmp_path


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_read_back_bit_for_bit(tmp_path, kind, layout):
    model = tiny_wan(kind)
    write_wan(model, tmp_path / "out", layout)
    again = read_wan(tmp_path / "out")
    assert same(model, again) and not same(tiny_wan(kind, seed=1), again)
    assert json.loads(again.to_json_string()) == json.loads(model.to_json_string())
    assert not again.training and all(p.requires_grad and not p.is_meta for p in again.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_read_computes_what_was_written(folders, layout):
    expected = velocity(tiny_wan())
    assert torch.equal(velocity(read_wan(folders / layout)), expected)
    assert not torch.equal(velocity(tiny_wan(seed=1)), expected)


@pytest.mark.parametrize("kind", ["t2v", "i2v", "flf2v"])
def test_the_original_names_are_the_published_ones(kind):
    names = original_state(tiny_wan(kind)).keys()
    assert names == published_names(kind)
    assert {to_diffusers(name) for name in names} == tiny_wan(kind).state_dict().keys()


@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_diffusers_own_converter_agrees_with_the_names(kind):
    state = tiny_wan(kind).state_dict()
    converted = convert_wan_transformer_to_diffusers(original_state(tiny_wan(kind)))
    assert converted.keys() == state.keys() and all(torch.equal(converted[name], state[name]) for name in state)


def test_stock_diffusers_reads_what_is_written(folders):
    stock = WanTransformer3DModel.from_pretrained(folders / "diffusers", local_files_only=True)
    file, config = folders / "original" / WEIGHTS, str(folders / "diffusers")
    single = WanTransformer3DModel.from_single_file(str(file), config=config, local_files_only=True)
    assert same(stock, tiny_wan()) and same(single, tiny_wan())
    assert "path" not in (folders / "diffusers/config.json").read_text()


def test_shards_of_stock_diffusers_are_read_and_a_lost_one_is_named(tmp_path):
    tiny_wan().save_pretrained(tmp_path / "transformer", max_shard_size="30KB")
    shards = sorted((tmp_path / "transformer").glob("*.safetensors"))
    assert len(shards) > 1 and same(read_wan(tmp_path), tiny_wan()) and same(read_wan(shards[0].parent), tiny_wan())
    shards[1].unlink()
    with pytest.raises(WeightsError, match=shards[1].name):
        read_wan(tmp_path)
    next((tmp_path / "transformer").glob("*.index.json")).write_text("{}")
    with pytest.raises(WeightsError, match=r"index\.json names no file of weights"):
        read_wan(tmp_path)


@pytest.mark.parametrize("prefix", ["model.", "model._fsdp_wrapped_module.", "model.diffusion_model.", ""])
@pytest.mark.parametrize("entry", ["generator_ema", "generator", "model", None])
def test_every_wrapping_of_a_self_forcing_checkpoint_is_read(folders, entry, prefix):
    state = self_forcing(tiny_wan(seed=5), prefix)
    torch.save({entry: state, "step": 600} if entry else state, folders / "original/step.pt")
    assert same(read_wan(folders / "original/step.pt"), tiny_wan(seed=5))


def test_the_averaged_weights_of_a_self_forcing_checkpoint_come_first(folders):
    entries = {"critic": 1, "generator": self_forcing(tiny_wan()), "generator_ema": self_forcing(tiny_wan(seed=5))}
    torch.save(entries, folders / "original/both.pt")
    assert same(read_wan(folders / "original/both.pt"), tiny_wan(seed=5))


def test_the_content_and_not_the_name_says_what_a_file_is(folders):
    save_file(tiny_wan(seed=2).state_dict(), folders / "original/b.pt")
    assert same(read_wan(folders / "original/b.pt"), tiny_wan(seed=2))
    (folders / "self_forcing/generator.pt").rename(folders / "self_forcing/diffusion_pytorch_model.bin")
    assert same(read_wan(folders / "self_forcing/diffusion_pytorch_model.bin"), tiny_wan())


def test_a_lone_file_of_wans_head_width_needs_no_config(tmp_path):
    model = tiny_wan(num_attention_heads=1, attention_head_dim=128, num_layers=1)
    save_file(original_state(model), tmp_path / "wan.safetensors")
    again = read_wan(tmp_path / "wan.safetensors")
    assert same(again, model) and torch.equal(velocity(again), velocity(model))
    save_file(original_state(tiny_wan()), tmp_path / "narrow.safetensors")
    with pytest.raises(WeightsError, match=r"narrow.safetensors.*config\.json"):
        read_wan(tmp_path / "narrow.safetensors")


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_a_dtype_is_given_as_stock_diffusers_gives_it(tmp_path, stored):
    write_wan(tiny_wan().to(stored), tmp_path / "out")
    stock = WanTransformer3DModel.from_pretrained(tmp_path / "out", torch_dtype=torch.bfloat16, local_files_only=True)
    assert {p.dtype for p in stock.parameters()} == {torch.bfloat16, torch.float32}
    assert same(read_wan(tmp_path / "out", torch.bfloat16), stock)
    assert same(read_wan(tmp_path / "out"), tiny_wan().to(stored))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_added_control_channels_leave_the_function_unchanged(folders, layout):
    plain, wide = read_wan(folders / layout), read_wan(folders / layout, in_channels=36)
    assert wide.config.in_channels == 36 and wide.patch_embedding.in_channels == 36
    for control in (0.0, 3.0):
        torch.testing.assert_close(velocity(wide, control), velocity(plain), atol=1e-6, rtol=0)
    with torch.no_grad():
        wide.patch_embedding.weight[:, 16:].normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    assert (velocity(wide, 3.0) - velocity(plain)).abs().max() > 0.1
    write_wan(wide, folders / "wide", layout)
    assert same(read_wan(folders / "wide", in_channels=36), wide)


def test_an_image_to_video_checkpoint_is_taken_as_it_is(tmp_path):
    write_wan(tiny_wan("i2v"), tmp_path / "i2v", "original")
    assert same(read_wan(tmp_path / "i2v", in_channels=36), tiny_wan("i2v"))
    for channels in (16, 48):
        with pytest.raises(WeightsError, match=f"takes 36 input channels, not {channels}"):
            read_wan(tmp_path / "i2v", in_channels=channels)


def test_a_projection_that_only_some_i2v_checkpoints_carry_is_passed_over(tmp_path):
    write_wan(tiny_wan("i2v"), tmp_path / "i2v")
    file = tmp_path / "i2v" / WEIGHTS
    save_file({**load_file(file), "blocks.0.attn2.norm_added_q.weight": torch.ones(24)}, file, {"format": "pt"})
    assert same(read_wan(tmp_path / "i2v"), tiny_wan("i2v"))


@pytest.mark.parametrize(
    ("layout", "key", "value", "shapes"),
    [
        ("diffusers", "in_channels", 36, r"patch_embedding.weight: .*\[24, 16, 1, 2, 2\].*\[24, 36, 1, 2, 2\]"),
        ("original", "in_dim", 36, r"patch_embedding.weight: .*\[24, 16, 1, 2, 2\].*\[24, 36, 1, 2, 2\]"),
        ("self_forcing", "dim", 48, r"scale_shift_table: .*\[1, 2, 24\].*\[1, 2, 48\]"),
        ("original", "ffn_dim", 40, r"blocks.0.ffn.net.0.proj.weight: .*\[32, 24\].*\[40, 24\]"),
        ("original", "num_layers", 3, r"Missing key.*blocks.2.scale_shift_table"),
    ],
)
def test_a_config_of_another_shape_is_an_error_that_names_both_shapes(folders, layout, key, value, shapes):
    config = folders / layout / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), key: value}))
    with pytest.raises(WeightsError, match=shapes) as error:
        read_wan(folders / layout)
    assert str(config) in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 700


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file):
    file.write_bytes(b"")


def changed(change):
    def damage(file):
        archive = file.suffix == ".pt"
        state = torch.load(file, weights_only=True)["generator"] if archive else load_file(file)
        change(state)
        torch.save({"generator": state}, file) if archive else save_file(state, file, {"format": "pt"})

    damage.__name__ = change.__name__
    return damage


@changed
def one_tensor_less(state):
    del state[next(name for name in state if name.endswith("bias"))]


@changed
def one_tensor_more(state):
    state["extra"] = torch.zeros(1)


@changed
def misshapen(state):
    state[next(name for name in state if name.endswith("bias"))] = torch.zeros(3, 3)


@changed
def another_model(state):
    state.clear()
    state["layer.weight"] = torch.zeros(3, 3)


@pytest.mark.parametrize(
    "damage",
    [Path.unlink, cut, empty, one_tensor_less, one_tensor_more, misshapen, another_model],
    ids=lambda d: d.__name__,
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_are_missing_damaged_or_misshapen_are_named(folders, layout, damage):
    read_wan(folders / layout)
    damage(folders / layout / ("generator.pt" if layout == "self_forcing" else WEIGHTS))
    with pytest.raises(WeightsError) as error:
        read_wan(folders / layout)
    assert str(folders / layout) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [cut, empty])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_config_is_named(folders, layout, damage):
    damage(folders / layout / "config.json")
    with pytest.raises(WeightsError, match=r"config\.json") as error:
        read_wan(folders / layout)
    assert "\n" not in str(error.value)


class Trap:
    """Leaves a mark where its pickle is run."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_pickled_code_is_refused_and_not_run(tmp_path):
    file, mark = tmp_path / "wan.pt", tmp_path / "mark"
    torch.save({"generator": Trap(mark)}, file)
    with pytest.raises(WeightsError, match=r"wan.pt holds more than tensors"):
        read_wan(file)
    file.write_bytes(pickle.dumps({"generator": Trap(mark)}))
    with pytest.raises(WeightsError, match=r"wan.pt"):
        read_wan(file)
    assert not mark.exists()
    pickle.loads(file.read_bytes())  # the trap is live: it is the reader that did not spring it
    assert mark.exists()


@pytest.mark.parametrize("content", [{"critic": {}, "step": 3}, {0: torch.zeros(2)}, {"generator": {}}, torch.zeros(2)])
def test_a_checkpoint_without_a_generator_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "wan.pt")
    with pytest.raises(WeightsError, match="no weights under generator_ema, generator or model"):
        read_wan(tmp_path / "wan.pt")


def test_a_folder_with_no_or_several_candidates_is_refused(tmp_path):
    with pytest.raises(WeightsError, match="holds 0 files of weights"):
        read_wan(tmp_path)
    for name in ("a.pt", "b.pt"):
        torch.save(self_forcing(tiny_wan()), tmp_path / name)
    with pytest.raises(WeightsError, match="holds 2 files of weights and no index; name the one to read"):
        read_wan(tmp_path)


def test_what_exists_is_never_overwritten_and_a_failed_write_leaves_nothing(folders):
    before = (folders / "diffusers" / WEIGHTS).read_bytes()
    with pytest.raises(WeightsError, match="exists; remove it or choose another"):
        write_wan(tiny_wan(seed=1), folders / "diffusers")
    assert (folders / "diffusers" / WEIGHTS).read_bytes() == before
    with pytest.raises(WeightsError, match="cannot write"):
        write_wan(tiny_wan(), folders / "original/config.json/out")
    assert {p.name for p in folders.iterdir()} == {*LAYOUTS}


def test_a_hub_id_is_fetched_only_when_asked_and_a_local_path_comes_first(folders, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(folders / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert locate(folders / "original", download=True) == folders / "original"
    with pytest.raises(WeightsError, match=r"someone/wan is no file or folder.*download=true"):
        locate("someone/wan")
    with pytest.raises(WeightsError, match=r"cannot download someone/wan: .*give a local folder"):
        locate("someone/wan", download=True)
    repository, commit = folders / "hub/models--someone--wan", "0" * 40
    (repository / "refs").mkdir(parents=True)
    (repository / "refs/main").write_text(commit)
    write_wan(tiny_wan(), repository / "snapshots" / commit)
    assert same(read_wan(locate("someone/wan", download=True)), tiny_wan())


MEASURE = """
import os, sys, torch
from pathlib import Path
from wan_cases import WanTransformer3DModel
from policy.wan_formats import read_wan

def memory(line):
    return int(Path("/proc/self/status").read_text().split(line + ":")[1].split()[0]) * 1024

def initialised_first(path):
    source = read_wan(path)
    model = WanTransformer3DModel.from_config(source.config)
    model.load_state_dict(source.state_dict())
    return model

torch.set_num_threads(1)
for kind, path in (argument.split("=") for argument in sys.argv[2:]):
    if not os.fork():
        read_wan(sys.argv[1], torch.bfloat16)  # pages of the libraries are not counted
        start = memory("VmRSS")
        dtype = torch.bfloat16 if kind == "cast" else None
        model = initialised_first(path) if kind == "twice" else read_wan(path, dtype)
        assert all(p.flatten()[::1024].isfinite().all() for p in model.parameters())  # touches a mapped file's pages
        print((memory("VmHWM") - start) / sum(p.nbytes for p in model.parameters()), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


@pytest.mark.slow
def test_reading_takes_at_most_a_fifth_more_memory_than_the_weights(tmp_path):
    model = tiny_wan(num_attention_heads=4, attention_head_dim=128, ffn_dim=2048, num_layers=16)
    for layout in LAYOUTS:
        write_wan(model, tmp_path / layout, layout)
    cases = {**{layout: layout for layout in LAYOUTS}, "cast": "original", "twice": "original"}
    write_wan(tiny_wan(), tmp_path / "tiny")
    arguments = [str(tmp_path / "tiny"), *(f"{kind}={tmp_path / layout}" for kind, layout in cases.items())]
    command = [sys.executable, "-c", MEASURE, *arguments]
    here = Path(__file__).parent
    environment = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    *read, initialised_first = map(float, done.stdout.split())
    assert len(read) == 4 and max(read) <= 1.2, read
    assert initialised_first > 1.5
