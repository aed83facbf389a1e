import numpy as np
import pytest
import torch
from reward_cases import WORLD, batch_of, film, static

from rewards.contract import RewardError
from rewards.cotracker import CoTracker3
from rewards.trajectory import Trajectory

HUBCONF = """
def cotracker3_offline(*, pretrained=True, **kwargs):
    from tiny_cotracker.predictor import Predictor
    if pretrained:
        raise OSError("this would be a download")
    return Predictor()
"""
PREDICTOR = '''
import torch
from torch.nn import functional as F

torch.manual_seed(0)


class Model(torch.nn.Module):
    """Finds the 9x9 patch of frame 0 around each query in every frame, by squared difference."""

    def __init__(self):
        super().__init__()
        self.colour = torch.nn.Conv2d(3, 3, 1)
        self.sharpness = torch.nn.Parameter(torch.rand(()))

    def forward(self, video, queries, iters=4, is_train=False, add_space_attn=True, fmaps_chunk_size=200):
        self.calls = {"video": video, "queries": queries, "iters": iters, "chunk": fmaps_chunk_size}
        assert len(video) == 1 and not self.training and (queries[..., 0] == 0).all()
        x = torch.cat([self.colour(chunk) for chunk in (video[0] / 255).split(fmaps_chunk_size)])
        height, width = x.shape[-2:]
        offset = torch.arange(-4.0, 5)
        at = queries[0, :, None, None, 1:] + torch.stack(torch.meshgrid(offset, offset, indexing="xy"), -1)
        at = at / torch.tensor([width - 1, height - 1]) * 2 - 1
        patches = F.grid_sample(x[:1].expand(len(at), -1, -1, -1), at, align_corners=True, padding_mode="border")
        padded = F.pad(x, (4, 4, 4, 4), mode="replicate")
        square = F.conv2d(padded**2, torch.ones(1, 3, 9, 9))
        away = (patches**2).sum((1, 2, 3))[:, None, None] - 2 * F.conv2d(padded, patches) + square
        least, cell = away.flatten(2).min(-1)
        tracks = torch.stack([cell % width, cell // width], -1).float()
        visible = torch.exp(-self.sharpness * least.clamp(min=0))
        return tracks[None], visible[None], torch.ones_like(visible)[None], None


class Predictor(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.model = Model()
        self.interp_shape = (128, 192)
'''


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder in the layout of the genuine repository, and a checkpoint."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "hubconf.py").write_text(HUBCONF)
    (folder / "tiny_cotracker").mkdir()
    (folder / "tiny_cotracker/__init__.py").touch()
    (folder / "tiny_cotracker/predictor.py").write_text(PREDICTOR)
    torch.save(state(), folder / "scaled_offline.pth")
    return folder


def state(sharpness=0.5):
    colour = {"colour.weight": torch.eye(3)[:, :, None, None], "colour.bias": torch.zeros(3)}
    return {**colour, "sharpness": torch.tensor(sharpness)}


@pytest.fixture(scope="module")
def tracker(home):
    return CoTracker3(home, home / "scaled_offline.pth")


def test_it_follows_points_through_a_resize_that_changes_the_aspect(tracker):
    away = []
    for index in range(6):
        prompt = WORLD.prompt("heldout", index)
        frames = [3, 8, 12]
        positions, found = tracker.track(film(index), prompt.tracks[0], frames, np.zeros_like(prompt.tracks))
        assert positions.shape == (3, *prompt.tracks.shape[1:]) and positions.dtype == np.float32
        np.testing.assert_array_equal(np.isfinite(positions).all(-1), found)
        away.extend(np.linalg.norm(positions - prompt.tracks[frames], axis=-1)[found])
    assert len(away) >= 12 and np.median(away) < 0.5


def test_in_a_trajectory_reward_the_true_video_beats_a_static_one(tracker):
    scenes = [i for i in range(20) if WORLD.prompt("heldout", i).visible.all()][:3]
    term = Trajectory(tracker=tracker)
    true, still = (term(batch_of([make(i) for i in scenes], scenes)).score for make in (film, static))
    assert (true > still + 0.3).all()


def test_visibility_is_soft_and_a_point_that_is_not_surely_visible_is_lost(home, tracker):
    prompt, video = WORLD.prompt("heldout", 0), film(0)
    video[6] = np.random.default_rng(0).integers(0, 256, video[6].shape, np.uint8)
    positions, sure = tracker.follow(video, prompt.tracks[0])
    assert np.isfinite(positions).all() and (sure[6] < 0.1).all() and (sure[0] == 1).all()
    assert 0.1 < sure[5, 0] < 1
    np.testing.assert_array_equal(positions[0], prompt.tracks[0])
    for least, found in ((0.9 * sure[5, 0], True), (1.1 * sure[5, 0], False)):
        tracker.least = least
        assert tracker.track(video, prompt.tracks[0], [5, 6], prompt.tracks)[1][:, 0].tolist() == [found, False]
    tracker.least = 0.5


def test_the_model_is_called_as_the_genuine_one_wants_it(home):
    tracker = CoTracker3(home, home / "scaled_offline.pth", chunk=5, iters=2, support=3)
    video, points = film(0), np.float32([[0, 0], [63, 63]])
    tracker.follow(video, points)
    calls = tracker.model.calls
    assert calls["chunk"] == 5 and calls["iters"] == 2
    assert calls["video"].shape == (1, 13, 3, 128, 192) and calls["video"].max() > 200
    assert calls["queries"].shape == (1, 2 + 9, 3)
    torch.testing.assert_close(calls["queries"][0, :2], torch.tensor([[0.0, 0, 0], [0, 191, 127]]))
    in_one_go = CoTracker3(home, home / "scaled_offline.pth", chunk=100, iters=2, support=3).follow(video, points)
    np.testing.assert_allclose(tracker.follow(video, points)[0], in_one_go[0], atol=1e-4)


def test_no_points_cost_nothing(tracker):
    positions, found = tracker.track(film(0), np.zeros((0, 2), np.float32), [1, 2], np.zeros((13, 0, 2), np.float32))
    assert positions.shape == (2, 0, 2) and found.shape == (2, 0)


def forget(monkeypatch):
    """As in a fresh process: the modules of the repository are imported again."""
    for name in ("tiny_cotracker", "tiny_cotracker.predictor"):
        monkeypatch.delitem(__import__("sys").modules, name, raising=False)


def test_loading_leaves_the_random_numbers_of_the_process_alone(home, monkeypatch):
    torch.manual_seed(7)
    expected = torch.rand(3)
    forget(monkeypatch)
    torch.manual_seed(7)
    CoTracker3(home, home / "scaled_offline.pth")
    torch.testing.assert_close(torch.rand(3), expected, rtol=0, atol=0)
    forget(monkeypatch)
    torch.manual_seed(7)
    torch.hub.load(str(home), "cotracker3_offline", source="local", pretrained=False)
    assert not torch.equal(torch.rand(3), expected), "without the fork, loading would have reseeded the process"


def test_a_checkpoint_whose_weights_lie_under_model_is_the_same(home, tmp_path):
    torch.save({"model": state()}, tmp_path / "training.pth")
    plain, nested = (CoTracker3(home, file) for file in (home / "scaled_offline.pth", tmp_path / "training.pth"))
    for name, value in plain.model.state_dict().items():
        assert torch.equal(value, nested.model.state_dict()[name])


def test_a_pinned_revision_is_taken_from_the_cache_of_torch_hub(home, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    commit = "82e02e8" + 33 * "0"
    name = f"facebookresearch/co-tracker:{commit}"
    with pytest.raises(RewardError, match=f"git clone https://github.com/facebookresearch/co-tracker .*{commit}"):
        CoTracker3(name, home / "scaled_offline.pth")
    (tmp_path / f"facebookresearch_co-tracker_{commit}").symlink_to(home)
    assert CoTracker3(name, home / "scaled_offline.pth").shape == (128, 192)
    with pytest.raises(RewardError, match="pin a commit of 40 hex digits"):
        CoTracker3("facebookresearch/co-tracker:main", home / "scaled_offline.pth")


def test_what_is_missing_is_named_with_the_command_that_gets_it(home, tmp_path):
    with pytest.raises(RewardError, match=r"no .*nowhere/hubconf\.py; fetch it with `git clone"):
        CoTracker3(tmp_path / "nowhere", home / "scaled_offline.pth")
    with pytest.raises(RewardError, match=r"no checkpoint .*gone\.pth; fetch it with `curl"):
        CoTracker3(home, tmp_path / "gone.pth")


@pytest.mark.parametrize("damage", ["key", "shape", "text", "empty", "pickle"])
def test_a_checkpoint_that_does_not_fit_is_refused_in_one_line(home, tmp_path, damage):
    file, weights = tmp_path / "bad.pth", state()
    if damage == "key":
        del weights["sharpness"]
    if damage == "shape":
        weights["colour.bias"] = torch.zeros(4)
    torch.save(weights if damage != "pickle" else {"model": Trajectory()}, file)
    if damage in ("text", "empty"):
        file.write_text("version https://git-lfs.github.com/spec/v1" if damage == "text" else "")
    with pytest.raises(RewardError, match=r"bad\.pth is damaged or of another model") as found:
        CoTracker3(home, file)
    assert "\n" not in str(found.value)


def test_a_folder_without_the_entry_is_refused(home, tmp_path):
    (tmp_path / "hubconf.py").write_text("def raft():\n    pass\n")
    with pytest.raises(RewardError, match="no usable cotracker3_offline"):
        CoTracker3(tmp_path, home / "scaled_offline.pth")
