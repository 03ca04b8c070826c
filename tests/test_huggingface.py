from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from functools import partial

import pytest
import torch

import hub_server
from kdpipe.errors import ConfigError
from kdpipe.huggingface import Checkpoint, quietly
from kdpipe.models.pretrained import causal_lm, image_classifier, sequence_classifier
from toy_text import BERT, save_bert, save_tokenizer

GPT2 = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
VIT = {
    "model_type": "vit",
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "patch_size": 4,
}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return save_bert(tmp_path_factory.mktemp("bert"))


def tokens(num_tokens, rows=2, length=5):
    ids = torch.randint(1, num_tokens, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


# From a configuration


def test_a_configuration_makes_a_model_of_the_tasks_classes_and_the_tokenizers_tokens():
    model = sequence_classifier(3, config=BERT, vocab_size=40, pad_id=1, max_length=8)
    assert model.get_input_embeddings().num_embeddings == 40
    assert model.get_input_embeddings().padding_idx == 1
    assert model(**tokens(40)).logits.shape == (2, 3)


def test_what_the_configuration_says_counts_more():
    model = sequence_classifier(3, config=BERT | {"vocab_size": 64, "hidden_dropout_prob": 0.3}, vocab_size=40)
    assert model.get_input_embeddings().num_embeddings == 64, "embeddings may be padded"
    assert model.config.hidden_dropout_prob == 0.3


def test_a_decoder_classifies_by_its_last_token():
    model = sequence_classifier(3, config=GPT2, vocab_size=40, pad_id=7).eval()
    inputs = tokens(7, rows=1)
    longer = {
        name: torch.cat([each, torch.full((1, 3), 7 * (name == "input_ids"))], 1) for name, each in inputs.items()
    }
    torch.testing.assert_close(model(**longer).logits, model(**inputs).logits)


def test_the_last_token_is_the_one_before_the_preprocess_pads(tmp_path):
    """Whatever token the configuration of a model, or of a checkpoint, takes for padding."""
    config = GPT2 | {"pad_token_id": 3}
    made = sequence_classifier(3, config=config, vocab_size=40, pad_id=7).eval()
    with quietly() as transformers:
        other = transformers.GPT2Config(vocab_size=40, n_layer=1, n_embd=16, n_head=2, num_labels=3, pad_token_id=3)
        transformers.GPT2ForSequenceClassification(other).save_pretrained(tmp_path)
    read = sequence_classifier(3, path=tmp_path, vocab_size=40, pad_id=7).eval()
    inputs = {"input_ids": torch.tensor([[1, 2, 3, 4, 7, 7], [1, 2, 3, 7, 7, 7]])}
    for model in (made, read):
        both = model(**inputs).logits
        for row, length in enumerate((4, 3)):
            alone = model(input_ids=inputs["input_ids"][row : row + 1, :length]).logits
            torch.testing.assert_close(both[row : row + 1], alone)


def test_a_configuration_with_a_part_about_text_pads_as_well():
    """T5Gemma's head reads its own `pad_token_id`, Gemma 3's that of the text."""
    part = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "head_dim": 8}
    part |= {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = {"model_type": "t5gemma", "encoder": part, "decoder": part, "is_encoder_decoder": False}
    model = sequence_classifier(3, config=config, pad_id=7).eval()
    assert model.config.pad_token_id == model.config.get_text_config().pad_token_id == 7
    inputs = torch.tensor([[1, 2, 3, 4, 7, 7], [1, 2, 3, 7, 7, 7]])
    both = model(input_ids=inputs, attention_mask=(inputs != 7).long()).logits
    torch.testing.assert_close(both[1:], model(input_ids=inputs[1:, :3]).logits)


def test_images_and_language():
    vit = image_classifier(4, config=VIT, input_shape=(1, 8, 12))
    assert vit(torch.randn(2, 1, 8, 12)).logits.shape == (2, 4)
    resnet = image_classifier(
        4, config={"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8], "depths": [1]}
    )
    assert resnet(torch.randn(2, 3, 32, 32)).logits.shape == (2, 4)
    said = causal_lm(40, config=GPT2, max_length=16)(**tokens(40))
    assert said.logits.shape == (2, 5, 40)
    assert set(said) == {"logits"}, "no cache"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, r"config\.model_type is None; expected a type that transformers knows, such as bert"),
        ({"model_type": "brt"}, r"config\.model_type is 'brt'; .*; did you mean 'bert'\?"),
        (BERT | {"hiden_size": 4}, r"config\.hiden_size: bert has no such key; did you mean 'hidden_size'\?"),
        (BERT | {"hidden_size": "wide"}, r"config: .*'hidden_size' expected int, got str"),
        (BERT | {"hidden_size": 15}, r"config makes no AutoModelForSequenceClassification: .*15.* not a multiple"),
        (VIT, r"config makes no AutoModelForSequenceClassification: .*Unrecognized configuration class"),
    ],
)
def test_a_wrong_configuration_is_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        sequence_classifier(3, config=config)


def test_dtype():
    assert sequence_classifier(3, config=BERT, vocab_size=9, dtype="bfloat16").dtype == torch.bfloat16


# Tokenizer and model


@pytest.mark.parametrize("vocab_size", [13, 1000])
def test_a_tokenizer_of_more_tokens_than_the_model_knows_is_refused(bert, vocab_size):
    message = rf"the model has embeddings for 12 tokens, its tokenizer makes {vocab_size}"
    for make in (
        partial(sequence_classifier, path=bert),
        partial(sequence_classifier, config=BERT | {"vocab_size": 12}),
    ):
        make(3, vocab_size=12)
        with pytest.raises(ConfigError, match=message):
            make(3, vocab_size=vocab_size)


def test_rows_longer_than_the_models_positions_are_refused(bert):
    with pytest.raises(ConfigError, match="embeddings for 512 positions, its preprocess makes rows of 513 tokens"):
        sequence_classifier(3, path=bert, max_length=513)
    with pytest.raises(ConfigError, match=r"embeddings for 4 positions.*of language modelling: task\.block_tokens"):
        causal_lm(20, config=GPT2 | {"n_positions": 4}, max_length=5)


@pytest.mark.parametrize("kind", ["roberta", "mpnet"])
def test_positions_that_are_counted_from_behind_the_padding(kind):
    config = BERT | {"model_type": kind, "max_position_embeddings": 10}
    model = sequence_classifier(3, config=config, vocab_size=40, pad_id=1, max_length=8)
    assert model(**tokens(40, length=8)).logits.shape == (2, 3)
    with pytest.raises(ConfigError, match="the model has embeddings for 8 positions, its preprocess makes rows of 9"):
        sequence_classifier(3, config=config, vocab_size=40, pad_id=1, max_length=9)


# From a checkpoint


def test_a_checkpoint_is_read_as_it_was_saved(bert):
    with quietly() as transformers:
        theirs = transformers.BertForSequenceClassification.from_pretrained(str(bert)).eval()
    ours = sequence_classifier(3, path=bert, vocab_size=12).eval()
    assert torch.equal(ours(**tokens(12)).logits, theirs(**tokens(12)).logits)
    assert sequence_classifier(3, path=bert, dtype="bfloat16").dtype == torch.bfloat16


def test_a_checkpoint_without_a_head_gets_one(tmp_path, bert):
    sequence_classifier(3, path=bert).base_model.save_pretrained(tmp_path)
    model, full = sequence_classifier(5, path=tmp_path), sequence_classifier(3, path=bert)
    assert model(**tokens(12)).logits.shape == (2, 5)
    assert torch.equal(model.get_input_embeddings().weight, full.get_input_embeddings().weight)


def test_weights_of_another_architecture_are_refused(tmp_path, bert):
    causal_lm(12, config=GPT2).save_pretrained(tmp_path)
    shutil.copy(bert / "config.json", tmp_path)
    with pytest.raises(ConfigError, match=r"no weights for bert\.embeddings.*…, which BertForSequence"):
        sequence_classifier(3, path=tmp_path)


def test_a_checkpoint_of_other_classes_is_refused(bert):
    message = r"does not fit: classifier\.bias has shape \[3\] there, \[4\] in this model"
    with pytest.raises(ConfigError, match=message):
        sequence_classifier(4, path=bert)


def test_pickled_weights_are_refused(tmp_path, bert):
    shutil.copy(bert / "config.json", tmp_path)
    torch.save(sequence_classifier(3, path=bert).state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"weights in pytorch_model\.bin, which would have to be unpickled"):
        sequence_classifier(3, path=tmp_path)


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    marker = tmp_path / "ran"
    folder = save_tokenizer(tmp_path / "own", auto_map={"AutoTokenizer": ["own.Own", None]}, tokenizer_class="Own")
    (folder / "own.py").write_text(f"open({str(marker)!r}, 'w')\nclass Own: pass\n")
    (folder / "config.json").write_text('{"model_type": "own", "auto_map": {"AutoConfig": "own.Own"}}')
    for read in (Checkpoint(path=folder).tokenizer, partial(sequence_classifier, 3, path=folder)):
        with pytest.raises(ConfigError, match=r"cannot be read as Auto.*custom code"):
            read()
    assert not marker.exists()


def test_a_folder_without_a_tokenizer_is_refused(bert, tmp_path):
    with pytest.raises(ConfigError, match=r"holds no tokenizer, such as a tokenizer\.json"):
        Checkpoint(path=bert).tokenizer()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="cannot be read as AutoTokenizer"):
        Checkpoint(path=tmp_path).tokenizer()
    with pytest.raises(ConfigError, match=r"tokenizer\.json cannot be read as PreTrainedTokenizerFast"):
        Checkpoint(path=tmp_path / "tokenizer.json").tokenizer()


@pytest.mark.parametrize("arguments", [{}, {"path": "here", "hub": f"a/b@{COMMIT}"}, {"path": "here", "config": BERT}])
def test_a_model_has_one_origin(tmp_path, arguments):
    given = {key: tmp_path if key == "path" else value for key, value in arguments.items()}
    with pytest.raises(ConfigError, match=r"give one of config .*, path and hub"):
        sequence_classifier(3, **given)


def test_an_absent_folder_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"there is no .*/nowhere"):
        sequence_classifier(3, path=tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"give path .* or hub"):
        Checkpoint()


def test_fingerprints_cover_the_folder(tmp_path, bert):
    shutil.copytree(bert, tmp_path / "bert")
    assert sequence_classifier.reads({"config": BERT}, tmp_path) == {}
    before = sequence_classifier.reads({"path": "bert"}, tmp_path)
    assert before.keys() == {"bert"}
    (tmp_path / "bert" / "config.json").write_text("{}")
    assert sequence_classifier.reads({"path": "bert"}, tmp_path) != before
    assert image_classifier.reads({"path": "bert"}, tmp_path) == causal_lm.reads({"path": "bert"}, tmp_path) != before


# From the Hub


@pytest.mark.parametrize("hub", ["a/b", "a/b@main", "a/b@0123456", f"@{COMMIT}", f"a/b@{COMMIT}0"])
def test_the_hub_is_asked_for_one_commit(hub):
    with pytest.raises(ConfigError, match="expected the name and the commit, 40 digits"):
        Checkpoint(hub=hub)


def test_without_a_network_and_a_copy_the_way_out_is_told(tmp_path):
    code = (
        "from kdpipe.errors import ConfigError\n"
        "from kdpipe.huggingface import Checkpoint\n"
        f"checkpoint = Checkpoint(hub='someone/bert@{COMMIT}')\n"
        "for read in (checkpoint.tokenizer, lambda: checkpoint.model('AutoModelForCausalLM', 'float32')):\n"
        "    try:\n"
        "        read()\n"
        "    except ConfigError as error:\n"
        "        print(error)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=True
    )
    assert said.stdout.count("Give a folder on this machine in place of hub (path), or set HF_HOME to a cache") == 2


def test_a_commit_that_was_fetched_before_is_found(tmp_path, bert):
    snapshot = tmp_path / "hub" / "models--someone--bert" / "snapshots" / COMMIT
    shutil.copytree(bert, snapshot)
    save_tokenizer(snapshot)
    code = (
        "from kdpipe.models.pretrained import sequence_classifier\n"
        "from kdpipe.preprocess import PretrainedTokenizer\n"
        f"tokenizer = PretrainedTokenizer(hub='someone/bert@{COMMIT}', max_length=9)\n"
        f"model = sequence_classifier(3, hub='someone/bert@{COMMIT}', **tokenizer.offers)\n"
        "print(dict(tokenizer.state()), type(model).__name__)"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    said = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert "BertForSequenceClassification" in said.stdout, said.stderr
    assert COMMIT in said.stdout


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("someone/bert", r"Can't load the model .*\(\w+: peer closed connection without sending complete message body"),
        ("someone/brt", r"someone/brt is not a local folder and is not a valid model identifier"),
    ],
)
def test_what_does_not_come_from_the_hub_is_told(tmp_path, bert, name, message):
    shutil.copytree(bert, tmp_path / "models" / "someone" / "bert")
    code = f"from kdpipe.models.pretrained import causal_lm; causal_lm(3, hub='{name}@{COMMIT}')"
    with hub_server.hub(tmp_path, COMMIT, cut="model.safetensors") as environment:
        said = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=False
        )
    assert re.search(f"ConfigError: {name}@{COMMIT} cannot be read as AutoModelForCausalLM: .*{message}", said.stderr)


def test_bars_and_verbosity_come_back():
    with quietly() as transformers:
        logging = transformers.utils.logging
        assert not logging.is_progress_bar_enabled()
    before = logging.get_verbosity()
    with pytest.raises(ZeroDivisionError), quietly():
        raise ZeroDivisionError
    assert logging.is_progress_bar_enabled()
    assert logging.get_verbosity() == before
