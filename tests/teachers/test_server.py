from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from completions_server import CLASSES, VOCABULARY, log_probs, running
from kdpipe.errors import ConfigError, TeacherError
from kdpipe.teachers.base import Teacher, abstains
from kdpipe.teachers.server import ServedClassifier, ServedLanguageModel, _written

TOKENS = np.random.default_rng(0).integers(0, 250, (5, 9)).astype(np.int32)
COUNTED = np.random.default_rng(1).random((5, 8)) < 0.6
COUNTED[3] = False
COLUMNS = {"tokens": TOKENS, "counted": COUNTED}
PROBE = {name: each[:1] for name, each in COLUMNS.items()}
K = 4


@pytest.fixture
def server(tmp_path):
    with running(tmp_path) as process:
        yield process


def language_model(server, said=None, k=K, num_classes=VOCABULARY, probe=PROBE, **settings):
    say = [] if said is None else said
    return ServedLanguageModel(num_classes, k, probe, "toy", server.section(**settings), say.append)


def test_each_counted_position_gets_the_next_tokens_of_its_own_context(server):
    teacher = language_model(server)
    assert isinstance(teacher, Teacher)
    said = teacher.predict(COLUMNS)
    assert said["class_ids"].shape == (5, 8, K)
    for row, position in np.argwhere(COUNTED):
        ids = said["class_ids"][row, position]
        found = dict(zip(ids.tolist(), said["log_probs"][row, position].tolist(), strict=True))
        assert found == pytest.approx(log_probs(int(TOKENS[row, position]), K))
        assert ids.tolist() == sorted(ids.tolist())
        assert said["tail_log_mass"][row, position].exp() == pytest.approx(0.5**K)
    assert torch.isneginf(said["log_probs"][~torch.from_numpy(COUNTED)]).all()


def test_rows_that_predict_nothing_are_not_asked_about(server):
    teacher = language_model(server)
    before = len(server.requests)
    teacher.predict(COLUMNS)
    assert len(server.requests) == before + 4


def test_a_busy_server_is_asked_again(server):
    server.behave(busy_first=2)
    teacher = language_model(server)
    assert len(server.requests) == 3
    assert teacher.predict(COLUMNS)["class_ids"].shape == (5, 8, K)


UNTOLD = {"Content-Length": None, "Connection": "close"}


@pytest.mark.parametrize("headers", [{}, UNTOLD])
def test_an_answer_that_is_cut_short_is_asked_for_again(server, headers):
    whole = language_model(server).predict(COLUMNS)
    before = len(server.requests)
    server.behave(cut_every=2, headers=headers)
    said = language_model(server, at_once=1).predict(COLUMNS)
    assert len(server.requests) - before == 10, "five questions, every second answer cut short"
    for name, expected in whole.items():
        assert torch.equal(said[name], expected)


@pytest.mark.parametrize(("headers", "name"), [({}, "ProtocolError"), (UNTOLD, "JSONDecodeError")])
def test_a_server_that_cuts_every_answer_short_is_an_error(server, headers, name):
    server.behave(cut_every=1, headers=headers)
    with pytest.raises(TeacherError, match=rf"does not answer \({name}\)"):
        language_model(server, retries=1)
    assert len(server.requests) == 2


def test_a_page_that_is_no_answer_is_not_asked_for_again(server):
    server.behave(body="log in")
    with pytest.raises(TeacherError, match=r"gives no completions: .*log in"):
        language_model(server)
    assert len(server.requests) == 1


def test_a_long_wait_is_said_once(server, monkeypatch):
    monkeypatch.setattr("kdpipe.teachers.server._SAID_S", 0.4)
    teacher = language_model(server, say := [], at_once=4, retries=5)
    assert not say
    server.behave(busy_first=5, retry_after="1")
    teacher.predict(COLUMNS)
    assert say == [f"{server.url}/completions answered 429: asking again in 1 s"]


@pytest.mark.parametrize("retry_after", ["0.5", "soon", ""])
def test_a_wait_that_cannot_be_read_is_the_clients_own(server, retry_after):
    server.behave(busy_first=1, retry_after=retry_after)
    language_model(server)
    assert len(server.requests) == 2


def test_a_wait_that_is_too_long_is_refused(server):
    server.behave(busy_first=1, retry_after="86400")
    message = r"answered 429 .*\(Retry-After: 86400\), more than the 3,600 s"
    with pytest.raises(TeacherError, match=message):
        language_model(server)


def test_an_answer_that_never_ends_is_none(server):
    server.behave(drips_after=0)
    with pytest.raises(TeacherError, match=r"does not answer \(ReadTimeout\)"):
        language_model(server, retries=0, timeout_s=0.2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("log_prob", [math.nan, 0.5, 1000.0])
def test_log_probs_that_are_none_are_the_servers(server, log_prob):
    server.behave(log_prob=log_prob)
    message = f"the server gives a log-prob of {log_prob:g}; expected 0 or below"
    with pytest.raises(TeacherError, match=message):
        language_model(server)
    with pytest.raises(TeacherError, match=message):
        classifier(server).predict({"rows": np.array([0])})


def test_requests_are_spread_over_time(server):
    teacher = language_model(server, requests_per_minute=600)
    teacher.predict(COLUMNS)
    times = sorted(each["time"] for each in server.requests[1:])
    assert times[-1] - times[0] >= 0.25, "four requests, a tenth of a second apart"


def test_requests_that_are_tried_again_keep_the_pace(server):
    server.behave(busy_first=1)
    language_model(server, requests_per_minute=120)
    first, again = sorted(each["time"] for each in server.requests)
    assert again - first >= 0.45, "a first retry waits for nothing else"


def test_the_key_comes_from_the_environment(server, monkeypatch):
    with pytest.raises(ConfigError, match="the environment variable TOY_KEY holds no key"):
        language_model(server, api_key_env="TOY_KEY")
    monkeypatch.setenv("TOY_KEY", "secret")
    teacher = language_model(server, api_key_env="TOY_KEY")
    assert server.requests[-1]["key"] == "Bearer secret"
    assert "secret" not in json.dumps(dict(teacher.fingerprint))


def test_a_key_that_the_server_repeats_is_not_shown(server, monkeypatch):
    monkeypatch.setenv("TOY_KEY", "secret-e" * 40 + "\n")
    server.behave(status=401, error=f"bad key {'secret-e' * 40} of yours")
    with pytest.raises(TeacherError, match=r"answered 401: .*bad key <key> of yours") as refused:
        language_model(server, api_key_env="TOY_KEY")
    assert "secret" not in str(refused.value)
    assert server.requests[-1]["key"] == "Bearer " + "secret-e" * 40, "the end of the line is no part of it"
    monkeypatch.setenv("TOY_KEY", "secret/e")
    server.behave()
    asked = language_model(server, api_key_env="TOY_KEY")._server
    for written in ("secret/e", r"secret\/e"):
        assert asked._shown(bytearray(f"bad key {written}.".encode())) == "bad key <key>."


@pytest.mark.parametrize(
    ("key", "message"), [(" ", "TOY_KEY holds no key"), ("sé", "TOY_KEY holds is no key"), ("a\nb", "is no key")]
)
def test_what_cannot_be_a_key_is_refused(server, monkeypatch, key, message):
    monkeypatch.setenv("TOY_KEY", key)
    with pytest.raises(ConfigError, match=rf"server\.api_key_env: .*{message}"):
        language_model(server, api_key_env="TOY_KEY")
    assert not (server.folder / "requests.log").exists()


def test_a_server_that_dies_is_an_error_and_goes_on_when_it_is_back(server):
    teacher = language_model(server, retries=1)
    server.behave(dies_after=3)
    with pytest.raises(TeacherError, match=r"does not answer .* What was committed stays"):
        teacher.predict(COLUMNS)
    server.behave()
    server.start()
    assert language_model(server).predict(COLUMNS)["class_ids"].shape == (5, 8, K)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"status": 401, "error": "wrong key"}, "answered 401: .*wrong key"),
        ({"status": 400, "error": "max 20 logprobs"}, "answered 400: .*max 20 logprobs"),
        ({"no_prompt_logprobs": True}, "gives no log-probs of .* prompt tokens .*vLLM does"),
        ({"at_most": 2}, "gives [23] tokens where 4 were asked; .*--max-logprobs"),
        ({"body": {"choices": []}}, "gives no completions"),
        ({"body": ["choices"]}, "gives no completions"),
        ({"body": {"choices": [{"prompt_logprobs": 3}]}}, "gives no log-probs"),
    ],
)
def test_what_the_server_cannot_give_is_said(server, how, message):
    server.behave(**how)
    with pytest.raises(TeacherError, match=message):
        language_model(server)


def test_tokens_beyond_the_vocabulary_are_refused(server):
    columns = {"tokens": np.array([[85, 1]]), "counted": np.array([[True]])}  # 3 * 85 + 1 = 256
    with pytest.raises(TeacherError, match=r"names token 256, but there are 256 \(task.num_classes\)"):
        language_model(server, num_classes=256, probe=columns)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k": None}, "set encoding: topk and k"),
        ({"probe": {"features": np.zeros((1, 2))}}, "must be language modelling"),
    ],
)
def test_what_cannot_be_asked_is_refused(server, arguments, message):
    with pytest.raises(ConfigError, match=message):
        language_model(server, **arguments)


# Classes


TEXTS = np.array(["dull", "fine!", "grand!!", "what?"])
TASK = SimpleNamespace(num_classes=2, column_values=lambda columns: {"text": TEXTS[columns["rows"]]})


def classifier(server, prompt="Review: {text}\nIt is", answers=tuple(CLASSES), task=TASK, **settings):
    return ServedClassifier(task, "toy", server.section(), prompt, answers, **settings)


def test_a_class_is_the_next_token(server):
    teacher = classifier(server)
    assert isinstance(teacher, Teacher)
    assert abstains(teacher)
    said = teacher.predict({"rows": np.array([1, 0, 2, 3])})
    assert said["covered"].tolist() == [True, True, True, False]
    found = said["logits"].softmax(dim=1)[:, 1].tolist()
    assert found[:2] == pytest.approx([0.6 / 0.9, 0.1 / 0.9], rel=1e-5)
    assert found[2] == pytest.approx(0.7 / 0.8, rel=1e-5), "the other class had 0.1 at most: what is left of 1"
    assert torch.isfinite(said["logits"]).all()


def test_a_class_that_the_server_rules_out_is_impossible(server):
    server.behave(body={"choices": [{"logprobs": {"top_logprobs": [{CLASSES[0]: -math.inf, CLASSES[1]: 0.0}]}}]})
    said = classifier(server).predict({"rows": np.array([0])})
    assert said["covered"].tolist() == [True]
    assert said["logits"].softmax(dim=1).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"answers": [" good"]}, "expected 2 different texts"),
        ({"answers": [" good", " good"]}, "expected 2 different texts"),
        ({"task": SimpleNamespace(num_classes=2)}, "has no columns by name"),
        ({"top": 0}, "top is 0; expected how many of its most probable tokens"),
        ({"prompt": "Good or bad?"}, "prompt is 'Good or bad[?]', the same for every row; name a column in it"),
    ],
)
def test_what_is_no_question_is_refused(server, arguments, message):
    with pytest.raises(ConfigError, match=message):
        classifier(server, **arguments)


def test_a_prompt_that_names_no_column_is_refused_before_any_row_is_asked_about(server):
    with pytest.raises(ConfigError, match=r"prompt: 'review' in .*the columns are text"):
        ServedClassifier(TASK, "toy", server.section(), "{review}", CLASSES, probe={"rows": np.array([0])})


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("{text", r"prompt: expected '}' before end of string in '\{text'; a column stands in braces"),
        ("{text.length}", r"no attribute 'length' in '\{text.length\}'; expected columns by name"),
        ("{text:d}", r"format code 'd' .* in '\{text:d\}'; expected columns by name"),
    ],
)
def test_a_prompt_that_cannot_be_written_is_shown(server, prompt, message):
    with pytest.raises(ConfigError, match=message):
        ServedClassifier(TASK, "toy", server.section(), prompt, CLASSES, probe={"rows": np.array([0])})


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({}, "there is no logprobs"),
        ({"logprobs": None}, "logprobs is null"),
        ({"logprobs": {"content": [{"token": " bad", "logprob": -0.1}]}}, r"logprobs has the chat format \(content\)"),
        ({"logprobs": {"top_logprobs": [{" bad": None}]}}, r'logprobs is .*" bad": null'),
        ({"logprobs": {"top_logprobs": []}}, r'logprobs is \{"top_logprobs": \[\]\}'),
        ({"logprobs": 3}, "logprobs is 3"),
    ],
)
def test_a_server_without_log_probs_is_refused(server, choice, message):
    server.behave(body={"choices": [{"text": " good", **choice}]})
    with pytest.raises(TeacherError, match=rf"no log-probs of the next token: {message}.*; expected .*/v1/completions"):
        classifier(server).predict({"rows": np.array([0])})


def test_probabilities_that_are_more_than_1_are_refused(server):
    server.behave(top={each: math.log(0.9) for each in CLASSES})
    with pytest.raises(TeacherError, match=r"probabilities sum to 1\.9; expected 1 at most"):
        classifier(server).predict({"rows": np.array([0])})
    server.behave(log_prob=math.log(0.8))
    with pytest.raises(TeacherError, match=r"probabilities sum to 1\.\d+; expected 1 at most"):
        language_model(server)


def test_values_stand_in_a_prompt_as_in_the_source():
    numbers = np.array([0.1, 2, 16777216, np.nan], np.float32)
    tenth, *others = [_written(each) for each in [*numbers, None, "a {b}"]]
    assert [f"{each}" for each in others] == ["2", "16777216", "", "", "a {b}"]
    assert f"{tenth} {tenth!r} {tenth:>5} {tenth:.2f} {others[2]:.2f} {others[4][0]} {others[4]!r}" == (
        "0.1 0.1   0.1 0.10  a 'a {b}'"
    )
