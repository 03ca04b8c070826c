from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from kdpipe.data.columns import Ragged
from kdpipe.errors import ConfigError, TeacherError
from kdpipe.huggingface import quietly
from kdpipe.models.pretrained import image_classifier, sequence_classifier
from kdpipe.preprocess import ImageTensor, PretrainedTokenizer, Utf8Bytes
from kdpipe.teachers.pretrained import PretrainedTeacher
from kdpipe.testing import TeacherContract
from toy_text import TEXTS, ragged, save_bert, save_tokenizer

ONE = {"text": ragged(TEXTS[:1])}
ALL = {"text": ragged(TEXTS)}


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_tokenizer(save_bert(tmp_path_factory.mktemp("bert")))


def teacher_in(folder: Path, num_classes: int = 3, max_length: int = 24, **settings) -> PretrainedTeacher:
    preprocess = PretrainedTokenizer(path=folder, max_length=max_length)
    return PretrainedTeacher(num_classes, preprocess, ONE, path=folder, **settings)


def test_it_says_what_transformers_says(bert):
    teacher = teacher_in(bert)
    with quietly() as transformers:
        model = transformers.AutoModelForSequenceClassification.from_pretrained(str(bert)).eval()
        tokenizer = transformers.AutoTokenizer.from_pretrained(str(bert))
    inputs = tokenizer(TEXTS, truncation=True, max_length=24, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).logits
    torch.testing.assert_close(teacher.predict(ALL)["logits"], expected)
    assert teacher.lengths(ALL).tolist() == inputs["attention_mask"].sum(dim=1).tolist()
    assert teacher.description["parameters"] == sum(each.numel() for each in model.parameters())


@pytest.mark.parametrize("parts", ["auto", "cpu", "several"])
def test_a_model_that_transformers_places_says_the_same(bert, parts):
    alone = teacher_in(bert)
    device_map = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "cpu"}
    placed = teacher_in(bert, device_map=device_map if parts == "several" else parts)
    torch.testing.assert_close(placed.predict(ALL)["logits"], alone.predict(ALL)["logits"])
    assert placed.fingerprint == alone.fingerprint


class TestCheckpoint(TeacherContract):
    """The laws of every teacher."""

    def teacher(self, folder):
        return teacher_in(save_tokenizer(save_bert(folder)), outputs=("logits", "bert.pooler"))

    def another(self, folder):
        return teacher_in(save_tokenizer(save_bert(folder, seed=1)), outputs=("logits", "bert.pooler"))

    def columns(self):
        return ALL


def test_hidden_states_are_features(bert):
    teacher = teacher_in(bert, outputs=("logits", "bert.pooler"))
    assert {each.name: each.shape for each in teacher.outputs} == {"logits": (3,), "bert.pooler": (16,)}
    assert teacher.predict(ALL)["bert.pooler"].shape == (len(TEXTS), 16)


def test_hidden_states_are_called_as_transformers_calls_them(bert):
    teacher = teacher_in(bert, outputs=("logits", "hidden_states.1", "bert.encoder.layer.0"))
    said = teacher.predict(ALL)
    assert said["hidden_states.1"].shape == (len(TEXTS), 24, 16)
    assert torch.equal(said["hidden_states.1"], said["bert.encoder.layer.0"])


BLOCKS = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
OF_IMAGES = {
    "vit": {**BLOCKS, "patch_size": 8},
    "resnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
    "convnext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    "mobilenet_v2": {"depth_multiplier": 0.35},
    "regnet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "groups_width": 4},
}


@pytest.mark.parametrize("kind", OF_IMAGES)
def test_images_may_be_classified_by_models_of_any_kind(tmp_path, kind):
    """Those of images alone have no embeddings of tokens to look at."""
    images = np.random.default_rng(0).integers(0, 256, size=(3, 32, 32, 3), dtype=np.uint8)
    pixels = ImageTensor(mean=[0.5] * 3, std=[0.25] * 3)
    model = image_classifier(5, config={"model_type": kind, **OF_IMAGES[kind]}, input_shape=(3, 32, 32)).eval()
    with quietly():
        model.save_pretrained(tmp_path)
    teacher = PretrainedTeacher(5, pixels, {"image": images[:1]}, path=tmp_path, auto="image_classification")
    with torch.inference_mode():
        expected = model(pixels({"image": images})).logits
    torch.testing.assert_close(teacher.predict({"image": images})["logits"], expected)


def test_relative_positions_take_texts_of_any_length(tmp_path):
    preprocess = Utf8Bytes(max_length=24)
    config = {"model_type": "xlnet", "d_model": 16, "n_layer": 1, "n_head": 2, "d_inner": 32}
    model = sequence_classifier(3, config=config, **preprocess.offers)
    with quietly():
        model.save_pretrained(tmp_path)
    logits = PretrainedTeacher(3, preprocess, ONE, path=tmp_path).predict(ALL)["logits"]
    assert logits.shape == (len(TEXTS), 3)
    assert logits.isfinite().all()


def test_the_fingerprint_covers_weights_configuration_and_tokenizer(tmp_path, bert):
    digests = {}

    def another(name):
        shutil.copytree(bert, tmp_path / name)
        return tmp_path / name

    digests["same"] = teacher_in(another("same")).fingerprint
    weights = another("weights") / "model.safetensors"
    state = load_file(weights)
    state["classifier.bias"] += 1
    save_file(state, weights, {"format": "pt"})
    digests["weights"] = teacher_in(tmp_path / "weights").fingerprint
    config = another("config") / "config.json"
    config.write_text(config.read_text().replace('"layer_norm_eps": 1e-12', '"layer_norm_eps": 0.5'))
    digests["config"] = teacher_in(tmp_path / "config").fingerprint
    save_tokenizer(another("tokenizer"), words=["a", "film", "fine"])
    digests["tokenizer"] = teacher_in(tmp_path / "tokenizer").fingerprint
    expected = teacher_in(bert).fingerprint
    assert {name for name, found in digests.items() if found == expected} == {"same"}
    assert digests["tokenizer"]["preprocess_state"] != expected["preprocess_state"]


def test_a_checkpoint_without_a_head_is_no_teacher(tmp_path, bert):
    sequence_classifier(3, path=bert).base_model.save_pretrained(tmp_path)
    preprocess = PretrainedTokenizer(path=bert, max_length=24)
    message = r"no weights for classifier\.bias, classifier\.weight: it was not trained for sequence classification"
    with pytest.raises(TeacherError, match=message):
        PretrainedTeacher(3, preprocess, ONE, path=tmp_path)


def test_a_teacher_of_other_classes_is_refused(bert):
    with pytest.raises(TeacherError, match=r"returned \[1, 3\] for 1 rows; expected logits .*num_classes is 5"):
        teacher_in(bert, num_classes=5)


def test_a_tokenizer_of_other_tokens_is_refused(tmp_path, bert):
    save_tokenizer(tmp_path, words=[f"word{number}" for number in range(20)])
    preprocess = PretrainedTokenizer(path=tmp_path, max_length=24)
    with pytest.raises(ConfigError, match=r"another tokenizer than .*: 'word0' is unknown there and 5 here"):
        PretrainedTeacher(3, preprocess, ONE, path=bert)
    with pytest.raises(ConfigError, match="embeddings for 12 tokens, its tokenizer makes 25"):
        PretrainedTeacher(3, preprocess, ONE, path=save_bert(tmp_path / "without a tokenizer"))


def test_the_same_words_in_another_order_are_another_tokenizer(tmp_path, bert):
    save_tokenizer(tmp_path, words=["fine", "a", "film", "##s", "not"])
    with pytest.raises(ConfigError, match=r"another tokenizer than .*: 'fine' is 6 there and 5 here"):
        PretrainedTeacher(3, PretrainedTokenizer(path=tmp_path, max_length=24), ONE, path=bert)


def test_rows_are_what_the_task_prepared(bert):
    teacher = teacher_in(bert)
    empty = {"text": Ragged(values=ALL["text"].values[:0], offsets=ALL["text"].offsets[:1].repeat(3))}
    logits = teacher.predict(empty)["logits"]
    assert torch.isfinite(logits).all()
    assert torch.equal(logits[0], logits[1])
