import pytest
import torch
from safetensors.torch import save_file
from tiny import difference, noise
from wan_cases import same, tiny_wan, wan_policy, write_folder

from policy.attention import KVCache
from policy.causal import freeze
from policy.files import WeightsError
from policy.lora import LoraSettings, merge_own_lora
from policy.policy import PolicySource, load_policy
from policy.wan_formats import read_wan
from rl.weights import install, pack

LORA = LoraSettings(rank=2, alpha=4.0, targets=("to_q", "ffn.net.2"))
X, TEXT = noise(2, 36, 2, 4, 6), noise(2, 5, 8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("wan"), in_channels=36)


def taught(folder, seed=0, **changed):
    """A policy whose adapters have learnt something."""
    policy = wan_policy(folder, LORA, **changed)
    generator = torch.Generator().manual_seed(seed)
    for p in policy.state_dict().values():
        p.data += 0.3 * torch.randn(p.shape, generator=generator)
    return policy


@torch.no_grad()
def block(policy):
    return policy.net.block(X, 700.0, TEXT, KVCache())


def packed(net):
    sizes = (1, 1)
    return net(X, X[:, :, 1:], torch.full((2, 1), 700.0), TEXT, sizes, [1])


def test_fresh_adapters_change_nothing_and_are_the_same_everywhere(folder):
    torch.manual_seed(1)
    policy, base = wan_policy(folder, LORA), wan_policy(folder)
    torch.manual_seed(2)
    again = wan_policy(folder, LORA)
    assert torch.equal(block(policy), block(base))
    assert all(torch.equal(a, b) for a, b in zip(policy.state_dict().values(), again.state_dict().values()))
    assert difference(block(taught(folder)), block(base)) > 1e-2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapters_alone_are_trained_in_float32(folder, tmp_path, dtype):
    policy = wan_policy(folder, LORA, dtype=dtype, text_cache=str(tmp_path))
    freeze(policy.net.model, [])
    trained = {name: p for name, p in policy.net.named_parameters() if p.requires_grad}
    assert len(trained) == len(policy.state_dict()) == 2 * 2 * 3  # A and B, two blocks, to_q of both attentions and ffn
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in trained.items())
    packed(policy.net).square().sum().backward()
    assert any(p.grad.any() for p in trained.values())
    assert all(p.grad is None for p in policy.net.parameters() if not p.requires_grad)


def test_the_reference_is_the_policy_without_its_adapters_and_training_goes_on_after_it(folder):
    policy, base = taught(folder), wan_policy(folder)
    reference = policy.reference()
    v = packed(policy.net)
    with torch.no_grad():
        assert difference(packed(reference), packed(base.net)) < 1e-6
        assert torch.equal(packed(policy.net), v) and difference(v, packed(reference)) > 1e-2
    v.square().sum().backward()
    plain = taught(folder)
    packed(plain.net).square().sum().backward()
    for p, q in zip(policy.net.parameters(), plain.net.parameters()):
        assert p.requires_grad == q.requires_grad and (p.grad is q.grad is None or torch.equal(p.grad, q.grad))


def test_adapters_that_are_frozen_stay_so_when_the_reference_has_run(folder):
    policy = taught(folder)
    reference, (first, *others) = policy.reference(), [p for p in policy.net.parameters() if p.requires_grad]
    first.requires_grad_(False)
    packed(reference)
    assert not first.requires_grad and all(p.requires_grad for p in others)


def test_a_full_policys_reference_does_not_follow_it(folder):
    policy = wan_policy(folder)
    reference = policy.reference()
    before = packed(policy.net)
    with torch.no_grad():
        for p in policy.net.parameters():
            p.add_(0.1)
    assert torch.equal(packed(reference), before) and difference(packed(policy.net), before) > 1e-2
    assert not any(p.requires_grad for p in reference.parameters())


def test_checkpointing_goes_together_with_adapters(folder):
    gradients = []
    for checkpointing in (False, True):
        policy = taught(folder, gradient_checkpointing=checkpointing)
        packed(policy.net).square().sum().backward()
        gradients.append(torch.cat([p.grad.flatten() for p in policy.net.parameters() if p.grad is not None]))
    assert difference(*gradients) < 1e-6 * gradients[0].abs().max() and len(gradients[0])


def test_adapters_travel_alone_and_arrive_whole(folder, tmp_path):
    learner, worker = taught(folder), wan_policy(folder, LORA)
    weights = pack(learner.state_dict(), 1)
    assert sum(a.size for a in weights.arrays.values()) < 0.05 * learner.net.model.num_parameters()
    assert install(worker, weights) == weights.digest and torch.equal(block(worker), block(learner))
    save_file(learner.state_dict(), tmp_path / "policy.safetensors")
    source = PolicySource(str(folder), learner.settings, LORA)
    assert torch.equal(block(load_policy(source, tmp_path / "policy.safetensors")), block(learner))
    with pytest.raises(WeightsError, match="does not fit this policy"):
        load_policy(PolicySource(str(folder), learner.settings), tmp_path / "policy.safetensors")


def test_a_bfloat16_policy_holds_what_the_learner_sent(folder, tmp_path):
    learner = wan_policy(folder, dtype="bfloat16", text_cache=str(tmp_path))
    worker = wan_policy(folder, dtype="bfloat16", text_cache=str(tmp_path))
    with torch.no_grad():
        for p in learner.net.parameters():
            p.add_(0.1)
    weights = pack(learner.state_dict(), 1)
    assert install(worker, weights) == weights.digest and torch.equal(block(worker), block(learner))


def test_merged_adapters_leave_a_stock_model_that_computes_the_same(folder):
    policy = taught(folder)
    expected = block(policy)
    merge_own_lora(policy.net.model)
    assert policy.net.model.state_dict().keys() == read_wan(folder).state_dict().keys()
    assert difference(block(policy), expected) < 1e-5 and not same(policy.net.model, tiny_wan(in_channels=36))


def test_adapters_are_merged_before_a_policy_is_saved(folder, tmp_path):
    with pytest.raises(ValueError, match=r"jobs\.export merges them"):
        wan_policy(folder, LORA).save(tmp_path)


@pytest.mark.parametrize(("changed", "named"), [
    ({"targets": ("nothing",)}, r"policy\.lora\.targets=\['nothing'\]"), ({"targets": ()}, r"policy\.lora needs"),
    ({"rank": 0}, r"policy\.lora needs a rank of at least 1"),
])  # fmt: skip
def test_adapters_that_cannot_be_are_named(folder, changed, named):
    with pytest.raises(ValueError, match=named) as error:
        wan_policy(folder, LoraSettings(**{**vars(LORA), **changed}))
    assert "\n" not in str(error.value)
