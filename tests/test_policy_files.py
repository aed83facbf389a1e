import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import SETTINGS, noise, plans, prompts, tiny_policy

from policy.policy import PolicySettings, WeightsError, load_policy
from rl.weights import Weights, digest, install, pack
from rollout.sampler import Sampler

CODEC, TRANSFORMER = "codec.safetensors", "transformer/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("policies") / "saved"
    tiny_policy().save(path)
    return path


@pytest.fixture
def folder(saved, tmp_path):
    """A policy folder of the test's own, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / "policy"))


def film(policy):
    some = prompts(2)
    return Sampler(policy).generate(some, plans(some, "trunk"))


def test_a_saved_policy_comes_back_bit_for_bit(saved):
    policy, again = tiny_policy(window=4, sink=1), load_policy(saved)
    assert again.settings == SETTINGS != policy.settings
    for a, b in ((policy.state_dict(), again.state_dict()), (policy.codec.state_dict(), again.codec.state_dict())):
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    np.testing.assert_array_equal(film(tiny_policy()), film(again))
    assert (film(tiny_policy(seed=1)) != film(again)).any()


def test_every_setting_is_saved(tmp_path):
    tiny_policy(window=4, sink=1, frames=5, sigmas=(1.0, 0.4, 0.0)).save(tmp_path)
    assert load_policy(tmp_path).settings == tiny_policy(window=4, sink=1, frames=5, sigmas=(1.0, 0.4, 0.0)).settings


def test_other_weights_replace_the_saved_ones(saved, tmp_path):
    other, file = tiny_policy(seed=1).state_dict(), tmp_path / "policy.safetensors"
    save_file(other, file)
    loaded = load_policy(saved, file)
    assert all(torch.equal(p, other[name]) for name, p in loaded.state_dict().items())
    assert torch.equal(loaded.codec.encode(noise(1, 3, 1, 32, 32)), tiny_policy().codec.encode(noise(1, 3, 1, 32, 32)))


def cut(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def without_its_first_entry(file):
    state = load_file(file)
    state.pop(min(state))
    save_file(state, file, {"format": "pt"})


def misshapen(file):
    state = load_file(file)
    save_file({**state, min(state): torch.zeros(3, 3)}, file, {"format": "pt"})


def with_an_entry_too_many(file):
    save_file({**load_file(file), "extra": torch.zeros(1)}, file, {"format": "pt"})


@pytest.mark.parametrize("damage", [Path.unlink, cut, without_its_first_entry, misshapen, with_an_entry_too_many])
@pytest.mark.parametrize("name", [CODEC, TRANSFORMER])
def test_weights_that_are_missing_damaged_or_misshapen_are_named(folder, name, damage):
    load_policy(folder)
    damage(folder / name)
    with pytest.raises(WeightsError, match="choose") as error:
        load_policy(folder)
    assert str(folder / Path(name).parts[0]) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [Path.unlink, cut, misshapen, without_its_first_entry])
def test_replacing_weights_that_do_not_fit_are_named(saved, tmp_path, damage):
    file = tmp_path / "policy.safetensors"
    save_file(tiny_policy().state_dict(), file)
    damage(file)
    with pytest.raises(WeightsError) as error:
        load_policy(saved, file)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("name", ["policy.json", "transformer/config.json"])
@pytest.mark.parametrize("damage", [Path.unlink, cut])
def test_settings_that_are_missing_or_damaged_are_named(folder, name, damage):
    damage(folder / name)
    with pytest.raises(WeightsError) as error:
        load_policy(folder)
    assert str((folder / name).parent) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_a_policy_is_refused(tmp_path):
    with pytest.raises(WeightsError, match=r"is no policy folder \(no policy.json\)"):
        load_policy(tmp_path)


def test_pickled_weights_are_not_read(folder):
    torch.save(load_file(folder / TRANSFORMER), folder / "transformer" / "diffusion_pytorch_model.bin")
    (folder / TRANSFORMER).unlink()
    with pytest.raises(WeightsError):
        load_policy(folder)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"frames": 8}, "frames=8"),
        ({"frames": 1}, "frames=1"),
        ({"window": 2, "sink": 1}, "window=2 must hold"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        tiny_policy(**changed)


def test_the_sizes_are_the_given_frame_and_whole_blocks():
    assert SETTINGS.sizes == (1, 2, 2, 2, 2) and sum(SETTINGS.sizes) == SETTINGS.frames
    assert PolicySettings(**{**vars(SETTINGS), "block": 4}).sizes == (1, 4, 4)


def test_a_policy_after_a_sync_is_the_learners_policy():
    learner, worker = tiny_policy(), tiny_policy()
    learner.load_state_dict(tiny_policy(seed=1).state_dict())
    assert (film(learner) != film(worker)).any()
    weights = pack(learner.state_dict(), version=3)
    assert install(worker, weights) == weights.digest and weights.version == 3
    np.testing.assert_array_equal(film(learner), film(worker))


def test_packed_weights_do_not_follow_the_learner():
    learner = tiny_policy()
    weights = pack(learner.state_dict(), 0)
    with torch.no_grad():
        next(iter(learner.net.parameters())).add_(1)
    assert digest(weights.arrays) == weights.digest != pack(learner.state_dict(), 1).digest


def test_weights_that_changed_before_they_arrived_are_refused():
    learner, worker = tiny_policy(), tiny_policy()
    weights = pack(learner.state_dict(), 2, copy=False)
    install(worker, weights)
    with torch.no_grad():
        next(iter(learner.net.parameters())).add_(1)
    with pytest.raises(ValueError, match="weights of version 2 arrived damaged"):
        install(worker, weights)


def read_only(weights: Weights) -> Weights:
    """As they come from the object store."""
    arrays = {name: array.copy() for name, array in weights.arrays.items()}
    for array in arrays.values():
        array.flags.writeable = False
    return replace(weights, arrays=arrays)


def test_gathered_weights_travel_as_one_block_and_are_what_they_were():
    learner, worker, apart = tiny_policy(), tiny_policy(), tiny_policy()
    before = pack(learner.state_dict(), 1)
    learner.gather()
    weights = pack(learner.state_dict(), 1, copy=False)
    assert before.block is None and weights.digest == before.digest
    buffers: list[pickle.PickleBuffer] = []
    sent = pickle.dumps(weights, protocol=5, buffer_callback=buffers.append)
    assert len(buffers) == 1 and len(sent) < 0.1 * weights.block.nbytes
    arrived = pickle.loads(sent, buffers=[bytes(buffers[0])])
    assert not any(array.flags.writeable for array in arrived.arrays.values())
    assert install(worker, arrived) == before.digest and worker.borrows
    np.testing.assert_array_equal(film(worker), film(apart))
    copied = pack(learner.state_dict(), 1)
    with torch.no_grad():
        next(iter(learner.net.parameters())).add_(1)
    assert digest(copied.arrays) == before.digest != digest(weights.arrays)
    with pytest.raises(ValueError, match="arrived damaged"):
        install(tiny_policy(), pickle.loads(pickle.dumps(weights)))


def places(policy) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in policy.state_dict().items()}


def test_weights_that_cannot_change_are_used_where_they_lie_and_others_are_copied():
    learner, workers = tiny_policy(), [tiny_policy(), tiny_policy()]
    learner.load_state_dict(tiny_policy(seed=1).state_dict())
    weights = read_only(pack(learner.state_dict(), 3))
    for worker in workers:
        assert install(worker, weights) == weights.digest
        np.testing.assert_array_equal(film(learner), film(worker))
    assert places(workers[0]) == places(workers[1]) == {k: a.ctypes.data for k, a in weights.arrays.items()}
    own = tiny_policy()
    before = places(own)
    install(own, pack(learner.state_dict(), 3))
    assert places(own) == before


def test_a_policy_on_borrowed_weights_takes_its_own_memory_before_it_writes():
    policy, lent = tiny_policy(), read_only(pack(tiny_policy(seed=1).state_dict(), 1))
    install(policy, lent)
    install(policy, weights := pack(tiny_policy(seed=2).state_dict(), 2))
    assert digest(lent.arrays) == lent.digest and digest(pack(policy.state_dict(), 2).arrays) == weights.digest
    assert not {*places(policy).values()} & {array.ctypes.data for array in lent.arrays.values()}


def test_weights_of_another_type_are_not_borrowed():
    learner, worker = tiny_policy(seed=1), tiny_policy()
    learner.net.to(torch.bfloat16)
    install(worker, read_only(pack(learner.state_dict(), 1)))
    assert not worker.borrows and worker.state_dict().popitem()[1].dtype == torch.float32


def test_a_single_flipped_bit_is_found_wherever_it_is():
    policy = tiny_policy()
    weights = pack(policy.state_dict(), 0)
    rng = np.random.default_rng(0)
    for name, array in weights.arrays.items():
        bits = array.copy().reshape(-1).view(np.uint8)
        bits[rng.integers(bits.size)] ^= np.uint8(1 << rng.integers(8))
        damaged = {**weights.arrays, name: bits.view(array.dtype).reshape(array.shape)}
        with pytest.raises(ValueError, match="arrived damaged"):
            install(policy, Weights(0, weights.digest, damaged))
    assert install(policy, weights) == weights.digest


def test_bfloat16_travels_in_16_bits_also_to_a_policy_of_float32():
    learner, worker = tiny_policy(seed=1), tiny_policy()
    learner.net.to(torch.bfloat16)
    weights = pack(learner.state_dict(), 1)
    assert {array.dtype for array in weights.arrays.values()} == {np.dtype(np.int16)}
    assert install(worker, weights) == weights.digest
    for name, own in worker.state_dict().items():
        assert own.dtype == torch.float32 and torch.equal(own, learner.state_dict()[name].float())


def test_the_digest_sees_every_value_and_every_name_but_not_the_order():
    arrays = pack(tiny_policy().state_dict(), 0).arrays
    assert digest(dict(reversed(arrays.items()))) == digest(arrays)
    for name in arrays:
        changed = arrays[name].copy()
        changed.flat[-1] = np.nextafter(changed.flat[-1], np.float32(9))
        assert digest({**arrays, name: changed}) != digest(arrays)
    assert digest({name + "x": array for name, array in arrays.items()}) != digest(arrays)


def test_weights_damaged_on_their_way_are_refused():
    weights = pack(tiny_policy().state_dict(), 5)
    name = next(iter(weights.arrays))
    flipped = {**weights.arrays, name: weights.arrays[name] + 1e-3}
    with pytest.raises(ValueError, match="weights of version 5 arrived damaged"):
        install(tiny_policy(), Weights(5, weights.digest, flipped))
    lost = {key: array for key, array in weights.arrays.items() if key != name}
    with pytest.raises(WeightsError, match=f"the learner's weights does not fit this policy \\(missing {name}"):
        install(tiny_policy(), Weights(5, weights.digest, lost))


def test_the_shipped_policy_is_saved_again_byte_for_byte(tmp_path):
    shipped = Path(__file__).parents[1] / "policy/weights/tiny"
    load_policy(shipped).save(tmp_path)
    for name in ("policy.json", CODEC, TRANSFORMER, "transformer/config.json"):
        assert (tmp_path / name).read_bytes() == (shipped / name).read_bytes(), name
