import shutil
from pathlib import Path

import pytest
import torch
from diffusers import WanPipeline
from safetensors.torch import save_file
from tiny import difference, noise
from transformers import AutoTokenizer, UMT5EncoderModel
from wan_cases import write_text_encoder

from policy.files import WeightsError
from policy.text import NoText
from policy.wan_text import WanText

TEXTS = ["a cat walks left", "a dog", "", "a &amp;  cat\n"]
LENGTH, DIM = 12, 8


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    write_text_encoder(folder / "one", DIM)
    write_text_encoder(folder / "two", DIM, seed=1)
    return folder


def text(cache, folder=None, **changed):
    return WanText(cache, **{"length": LENGTH, "dim": DIM, "folder": folder, "dtype": torch.float32, **changed})


@torch.no_grad()
def stock(folder, texts, length=LENGTH):
    """What diffusers' pipeline gives its transformer."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    encoder = UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    pipeline = WanPipeline(tokenizer, encoder, None, None)
    return pipeline.encode_prompt(texts, None, False, max_sequence_length=length, device=torch.device("cpu"))[0]


def test_embeddings_are_those_of_the_stock_pipeline(models, tmp_path):
    embeddings = text(tmp_path, models / "one")(TEXTS)
    expected = stock(models / "one", TEXTS)
    assert embeddings.shape == (4, LENGTH, DIM) and difference(embeddings, expected) < 1e-6
    used = embeddings.ne(0).any(2).sum(1)
    assert used.tolist() == [5, 3, 1, expected[3].ne(0).any(1).sum()] and used[3] < LENGTH
    assert difference(embeddings, stock(models / "two", TEXTS)) > 1e-2


def test_a_text_of_more_tokens_is_cut_where_the_pipeline_cuts_it(models, tmp_path):
    long = ["a cat walks left " * 5]
    assert difference(text(tmp_path, models / "one")(long), stock(models / "one", long)) < 1e-6


def test_a_text_is_encoded_once_and_later_without_the_encoder(models, tmp_path):
    home, cache = tmp_path / "wan", tmp_path / "cache"
    shutil.copytree(models / "one", home)
    first = text(cache, home)(TEXTS)
    written = {file: file.stat().st_mtime_ns for file in cache.iterdir()}
    assert len(written) == len(TEXTS) + 1 and all(".partial" not in file.name for file in written)
    assert torch.equal(text(cache, home)(TEXTS[::-1]).flip(0), first)
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir()} == written
    shutil.rmtree(home)
    assert torch.equal(text(cache, home)(TEXTS), first) and torch.equal(text(cache)(TEXTS), first)


def test_a_text_that_is_not_cached_is_named_where_there_is_no_encoder(models, tmp_path):
    text(tmp_path, models / "one")(TEXTS[:1])
    with pytest.raises(WeightsError, match=r"no embedding of the text 'a dog' in .*run jobs.embed"):
        text(tmp_path)(TEXTS[:2])
    with pytest.raises(WeightsError, match="no embedding of the text 'a cat walks left'"):
        text(tmp_path, length=LENGTH + 1)(TEXTS[:1])


def test_the_cache_of_another_encoder_is_refused(models, tmp_path):
    text(tmp_path, models / "one")(TEXTS)
    text(tmp_path, models / "one")
    for other in ({"folder": models / "two"}, {"folder": models / "one", "dtype": torch.bfloat16}):
        with pytest.raises(WeightsError, match="embeddings of another encoder"):
            text(tmp_path, **other)


def test_given_embeddings_need_no_encoder(tmp_path):
    given = noise(5, DIM)
    text(tmp_path).put("mine", given)
    loaded = text(tmp_path)(["mine", "mine"])
    assert torch.equal(loaded[:, :5], given.expand(2, 5, DIM)) and not loaded[:, 5:].any()
    for wrong in (noise(LENGTH + 1, DIM), noise(5, DIM + 1), noise(DIM)):
        with pytest.raises(WeightsError, match="the embedding of 'mine' is"):
            text(tmp_path).put("mine", wrong)


def test_embeddings_that_the_transformer_cannot_read_are_refused(tmp_path):
    text(tmp_path).put("mine", noise(5, DIM))
    with pytest.raises(WeightsError, match=r"holds \[5, 8\], but the transformer reads 16"):
        text(tmp_path, dim=16)(["mine"])


def cut(file: Path):
    file.write_bytes(file.read_bytes()[:20])


def other_entries(file: Path):
    save_file({"something": torch.zeros(1)}, file)


@pytest.mark.parametrize("damage", [cut, other_entries])
def test_a_damaged_embedding_is_named(tmp_path, damage):
    text(tmp_path).put("mine", noise(5, DIM))
    (file,) = tmp_path.glob("*.safetensors")
    damage(file)
    with pytest.raises(WeightsError, match=f"cannot read the embedding {file}"):
        text(tmp_path)(["mine"])


@pytest.mark.parametrize(
    "name", ["tokenizer/tokenizer.json", "text_encoder/model.safetensors", "text_encoder/config.json"]
)
def test_an_encoder_that_is_not_whole_is_named(models, tmp_path, name):
    home = tmp_path / "wan"
    shutil.copytree(models / "one", home)
    (home / name).unlink()
    with pytest.raises(WeightsError, match=str(home)) as error:
        text(tmp_path / "cache", home)(TEXTS)
    assert "\n" not in str(error.value)


def test_a_policy_without_texts_reads_zeros():
    assert torch.equal(NoText(DIM)(TEXTS), torch.zeros(4, 1, DIM))
