"""On a tiny CLIP with random weights that are written to disk in the formats that open_clip and LAION use."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from reward_cases import batch_of, film, static
from safetensors.torch import save_file

from rewards.clip_scores import AestheticMlp, Clip, ClipScore, LaionAesthetic
from rewards.contract import RewardError
from rewards.terms import Term, score
from torchvision_cpu import ensure_torchvision

TINY = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "head_width": 16, "layers": 2},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
}
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP
MODEL = "tiny-test-quickgelu"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weights as a file, a folder with the same weights, and one head of each version."""
    ensure_torchvision()
    import open_clip

    home = tmp_path_factory.mktemp("clip")
    for name, quick in ((MODEL, True), ("tiny-test", False)):
        (home / f"{name}.json").write_text(json.dumps({**TINY, "quick_gelu": quick}))
        open_clip.add_model_config(home / f"{name}.json")
    torch.manual_seed(0)
    model = open_clip.create_model(MODEL, pretrained=None)
    with torch.no_grad():
        for parameter in model.parameters():  # of a size at which the activation matters
            parameter.mul_(3)
    torch.save(model.state_dict(), home / "clip.pt")
    (home / "folder").mkdir()
    save_file(model.state_dict(), home / "folder/open_clip_model.safetensors")
    (home / "folder/open_clip_config.json").write_text(json.dumps({"model_cfg": TINY, "preprocess_cfg": {}}))
    torch.save(torch.nn.Linear(32, 1).state_dict(), home / "v1.pth")
    torch.save(AestheticMlp(32).state_dict(), home / "v2.pth")
    return home


@pytest.fixture(scope="module")
def clip(files):
    return Clip(files / "clip.pt", MODEL)


@pytest.fixture(scope="module")
def batch():
    return batch_of([film(0), static(1)], [0, 1], frames=[3, 4], prompt=("a red disc", "a star on grass"))


def with_bias(files, tmp_path, bias):
    """A v1 head that rates everything near `bias`."""
    torch.save({"weight": torch.full((1, 32), 0.1), "bias": torch.tensor([bias])}, tmp_path / "head.pth")
    return LaionAesthetic(tmp_path / "head.pth", files / "clip.pt", MODEL)


def test_embeddings_have_unit_length_and_do_not_depend_on_the_batch(clip):
    frames = np.concatenate([film(0)[:3], film(1)[:2]])
    embedded = clip.embed(frames)
    assert embedded.shape == (5, 32) and embedded.dtype == torch.float32
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(5))
    torch.testing.assert_close(clip.embed(frames[2:3])[0], embedded[2], atol=1e-5, rtol=0)
    torch.testing.assert_close(clip.embed_text(["a dog", "a cat"]).norm(dim=-1), torch.ones(2))


def test_a_folder_of_open_clip_and_a_file_with_its_name_are_the_same_model(files, clip):
    torch.testing.assert_close(Clip(files / "folder").embed(film(0)), clip.embed(film(0)))


def test_frames_are_preprocessed_as_clip_was_trained(clip):
    frame = np.full((40, 64, 3), 128, np.uint8)
    frame[:, 14:50] = 200
    wide = clip.preprocess(Image.fromarray(frame))
    assert wide.shape == (3, 32, 32)
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    assert (wide * std + mean)[:, 16, 16].sub(200 / 255).abs().max() < 1e-3
    assert (wide * std + mean).mean() > 180 / 255  # of the whole frame: 155


def test_a_v1_head_is_the_linear_map_of_its_file_on_the_unit_embedding(files, clip, batch):
    state = torch.load(files / "v1.pth", weights_only=True)
    term = LaionAesthetic(files / "v1.pth", files / "clip.pt", MODEL)
    rating = clip.embed(batch.video[batch.scored]) @ state["weight"][0] + state["bias"]
    np.testing.assert_allclose(term(batch).metrics["rating"], rating.view(2, 2).mean(1), atol=1e-5)


def test_a_v2_head_runs_without_dropout(files, clip, batch):
    state = torch.load(files / "v2.pth", weights_only=True)
    assert set(state) == {f"layers.{i}.{part}" for i in (0, 2, 4, 6, 7) for part in ("weight", "bias")}
    term = LaionAesthetic(files / "v2.pth", files / "clip.pt", MODEL)
    x = clip.embed(batch.video[batch.scored])
    for i in (0, 2, 4, 6, 7):
        x = x @ state[f"layers.{i}.weight"].T + state[f"layers.{i}.bias"]
    np.testing.assert_allclose(term(batch).metrics["rating"], x.view(2, 2).mean(1), atol=1e-5)
    np.testing.assert_array_equal(term(batch).score, term(batch).score)
    term.head.train()
    assert (term(batch).metrics["rating"] != term(batch).metrics["rating"]).all()


def test_a_rating_of_ten_is_the_best_score_and_what_lies_outside_is_cut(files, tmp_path, batch):
    for bias, expected in ((6.0, 0.6), (25.0, 1.0), (-3.0, 0.0)):
        output = with_bias(files, tmp_path, bias)(batch)
        np.testing.assert_allclose(output.score, expected, atol=0.06)
        np.testing.assert_allclose(output.metrics["rating"], bias, atol=0.6)


def test_only_scored_frames_get_a_score(files, batch):
    for term in (LaionAesthetic(files / "v1.pth", files / "folder"), ClipScore(files / "folder")):
        output = term(batch)
        np.testing.assert_array_equal(np.isfinite(output.frame_score), batch.scored)


def test_clip_score_is_the_scaled_cosine_of_frame_and_prompt(files, clip, batch):
    output = ClipScore(files / "clip.pt", MODEL)(batch)
    frames, texts = clip.embed(batch.video[batch.scored]).view(2, 2, -1), clip.embed_text(batch.prompt)
    cosine = (frames * texts[:, None]).sum(-1)
    np.testing.assert_allclose(output.metrics["cosine"], cosine.mean(1), atol=1e-5)
    np.testing.assert_allclose(output.score, (2.5 * cosine).clip(0, 1).mean(1), atol=1e-5)
    swapped = ClipScore(files / "clip.pt", MODEL)(replace(batch, prompt=batch.prompt[::-1]))
    assert (np.abs(swapped.metrics["cosine"] - output.metrics["cosine"]) > 1e-3).all()


def test_a_clip_without_a_prompt_is_not_scored(files, batch):
    term = ClipScore(files / "clip.pt", MODEL)
    scores = term(replace(batch, prompt=("", "a star on grass"))).score
    assert np.isnan(scores).tolist() == [True, False] and scores[1] == pytest.approx(term(batch).score[1], abs=1e-5)
    assert np.isnan(term(replace(batch, prompt=("", " "))).score).all()


def test_both_work_as_terms(files, batch):
    terms = [
        Term("aesthetic", LaionAesthetic(files / "v1.pth", files / "folder")),
        Term("clip", ClipScore(files / "folder")),
    ]
    outputs, faults = score(terms, batch)
    assert not faults and all(np.isfinite(output.score).all() for output in outputs.values())


def test_the_architecture_without_quick_gelu_gives_other_embeddings_and_the_heads_refuse_it(files, clip):
    wrong = Clip(files / "clip.pt", "tiny-test")
    assert (wrong.embed(film(0)) - clip.embed(film(0))).abs().max() > 1e-3
    with pytest.raises(RewardError, match=r"tiny-test: the aesthetic heads .* take ViT-L-14-quickgelu"):
        LaionAesthetic(files / "v1.pth", files / "clip.pt", "tiny-test")


def broken(files, tmp_path, how):
    file = tmp_path / "clip.pt"
    if how == "missing":
        return file
    state = torch.load(files / "clip.pt", weights_only=True)
    if how == "key":
        del state["visual.proj"]
    torch.save(state, file)
    if how == "script":
        torch.jit.script(torch.nn.Linear(2, 2)).save(str(file))
    if how == "text":
        file.write_text("version https://git-lfs.github.com/spec/v1")
    return file


@pytest.mark.parametrize("how", ["missing", "key", "text", "script"])
def test_clip_weights_that_are_missing_or_do_not_fit_are_refused(files, tmp_path, how):
    with pytest.raises(
        RewardError, match="nothing is downloaded" if how == "missing" else "damaged or not those of"
    ) as e:
        ClipScore(broken(files, tmp_path, how), MODEL)
    assert "\n" not in str(e.value) and "clip.pt" in str(e.value)


def test_a_folder_without_weights_is_an_error_and_no_random_model(files, tmp_path):
    for text in ((files / "folder/open_clip_config.json").read_text(), "{", "{}"):
        (tmp_path / "open_clip_config.json").write_text(text)
        with pytest.raises(RewardError, match="damaged or not those of"):
            Clip(tmp_path)


@pytest.mark.parametrize(
    ("where", "model", "message"),
    [
        ("clip.pt", None, "needs model=<open_clip architecture>"),
        ("folder", MODEL, "a folder says its own"),
        ("clip.pt", "ViT-L-14-quickgel", "has no model 'ViT-L-14-quickgel'"),
        ("clip.pt", "hf-hub:openai/clip", "has no model 'hf-hub:openai/clip'"),
        ("", None, "has no open_clip_config.json"),
    ],
)
def test_weights_and_architecture_must_be_named_rightly(files, where, model, message):
    with pytest.raises(RewardError, match=message):
        Clip(files / where, model)


@pytest.mark.parametrize("how", ["missing", "width", "text"])
def test_a_head_that_is_missing_or_does_not_fit_is_refused(files, tmp_path, how):
    file = tmp_path / "head.pth"
    if how == "width":
        torch.save(torch.nn.Linear(768, 1).state_dict(), file)
    if how == "text":
        file.write_text("<html>not found</html>")
    with pytest.raises(RewardError, match="no aesthetic head" if how == "missing" else "damaged, or no aesthetic head"):
        LaionAesthetic(file, files / "clip.pt", MODEL)
