"""A teacher behind a server that is shown images: equal to a live one, and refused where it read anything else."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from selectkd.cli import main
from selectkd.config import load_recipe
from selectkd.data.images import ImageRules, found
from selectkd.errors import ConfigError, TeacherError
from selectkd.models.load import load_model, load_tokenizer, load_vision
from selectkd.rollouts.completion_server import CompletionServer
from selectkd.rollouts.generate import Request, generate
from selectkd.rollouts.rules import Draw
from selectkd.rollouts.sampling import Sampling
from selectkd.teachers.remote.connection import Connection
from selectkd.teachers.remote.own import OwnServer
from selectkd.teachers.remote.sample import Sample
from selectkd.training.checks import prepare
from selectkd.training.preflight.doctor import doctor
from selectkd.training.run import train
from selectkd.training.run_folder import read_run
from teachers.served import on_a_port
from vision import tiny
from vision.conftest import Recipes
from vision.served import ServedImages
from vision.test_runs import _text_model, ran

Serves = Callable[..., ServedImages]


@pytest.fixture
def serves(folder_of: Any) -> Serves:
    """A server of a family's teacher, as ``recipe`` names it in memory."""

    def made(family: str = "internvl", **keys: Any) -> ServedImages:
        folder = folder_of(family, 1)
        return ServedImages(load_model(str(folder)).model, load_vision(str(folder)), **keys)

    return made


def tokens_of(folder: Path) -> int:
    return len(load_tokenizer(str(folder)))


def at(url: str, folder: Path, **keys: Any) -> dict[str, Any]:
    """The section of a server; with the logits of all tokens that the tokenizer has."""
    return {
        "url": url,
        "kind": "vllm",
        "k": tokens_of(folder),
        "tokenizer": str(folder),
        "retries": 0,
        **keys,
    }


def refusal(recipe: Recipes, served: ServedImages, folder: Path, **keys: Any) -> str:
    with on_a_port(served) as url, pytest.raises((TeacherError, ConfigError)) as error:
        prepare(load_recipe(recipe("refused", teacher=at(url, folder), **keys), []))
    return str(error.value)


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl", "smolvlm", "gemma3"])
def test_a_run_with_all_tokens_of_a_server_has_the_losses_of_a_live_teacher(
    recipe: Recipes, folder_of: Any, serves: Serves, family: str
) -> None:
    three = {"training": {"max_steps": 3}}  # batches of text and images, and of one and two images
    live, _ = ran(recipe("live", family, **three))
    with on_a_port(serves(family)) as url:
        remote, _ = ran(recipe("remote", family, teacher=at(url, folder_of(family, 1)), **three))
    assert len(live) == 3
    torch.testing.assert_close(remote, live, rtol=0, atol=1e-5)


def test_few_best_tokens_bound_the_loss_of_a_live_teacher(
    recipe: Recipes, folder_of: Any, serves: Serves
) -> None:
    one = {"training": {"max_steps": 1}}
    (live,), _ = ran(recipe("live", **one))
    with on_a_port(serves()) as url:
        few, more = (
            ran(recipe(f"k{k}", teacher=at(url, folder_of("internvl", 1), k=k), **one))[0][0]
            for k in (10, 64)
        )
    assert few < more < live  # merging the tail never raises forward KL


def test_an_image_is_sent_once_and_widened_by_the_server_alone(
    recipe: Recipes, folder_of: Any, serves: Serves
) -> None:
    served = serves()
    with on_a_port(served) as url:
        prepare(load_recipe(recipe(teacher=at(url, folder_of("internvl", 1))), []))
    bodies = [json.loads(body) for path, _, body in served.requests if path.endswith("/generate")]
    marker, known = served.vision.placeholder_id, served.vision.image_ids
    assert {len(body["content_parts"]) for body in bodies} == {1, 2}
    for body in bodies:
        assert body["token_ids"].count(marker) == len(body["content_parts"])
        assert sum(one in known for one in body["token_ids"]) == len(body["content_parts"])
    texts = [json.loads(body) for path, _, body in served.requests if path == "/v1/completions"]
    assert texts and not any(known & set(body["prompt"]) for body in texts)


def test_a_cache_of_a_servers_rows_equals_the_live_teacher(
    recipe: Recipes, folder_of: Any, serves: Serves, tmp_path: Path
) -> None:
    live, _ = ran(recipe("live"))
    cache, folder = tmp_path / "cache", folder_of("internvl", 1)
    with on_a_port(serves()) as url:
        teacher = {
            "cache": str(cache), "payload": "top_k", "k": tokens_of(folder), "precision": "float32",
            "server": at(url, folder),
        }  # fmt: skip
        path = recipe("of-cache", teacher=teacher)
        assert main(["cache", "build", path]) == 0
        assert main(["cache", "verify", path]) == 0
    cached, _ = ran(recipe("read", teacher={"cache": str(cache)}))
    torch.testing.assert_close(cached, live, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("slip", "told"),
    [
        ("twice", r"data\.jsonl:1: .*the server read 31 tokens of the prompt with .*0\.png, 12 of them for images; "
                  r"the student's processor makes 25, 6 for images\. They differ from token 7 on"),
        ("dropped", r"data\.jsonl:1.*was shown 0 images of the 1 of the prompt"),
        ("blind", r"was shown 0 images of the 1 of the prompt"),
        ("silent", r"does not say which tokens were read.*--enable-scale-out"),
    ],
)  # fmt: skip
def test_a_server_that_read_another_prompt_is_refused_by_the_record(
    recipe: Recipes, folder_of: Any, serves: Serves, slip: Any, told: str
) -> None:
    said = refusal(recipe, serves(slip=slip), folder_of("internvl", 1))
    assert re.search(told, said, re.DOTALL), said


def test_a_servers_processor_that_makes_more_tokens_is_refused(
    recipe: Recipes, folder_of: Any, serves: Serves, tmp_path: Path
) -> None:
    other = tiny.saved("internvl", tmp_path / "other", seed=1)
    settings = json.loads((other / "processor_config.json").read_text())
    (other / "processor_config.json").write_text(json.dumps({**settings, "image_seq_length": 8}))
    served = serves(slip="twice")
    served.vision, served.slip = load_vision(str(other)), None
    served.rows = lambda ids, images: torch.zeros(len(ids), served.tokens).log_softmax(-1)
    said = refusal(recipe, served, folder_of("internvl", 1))
    assert "10 of them for images; the student's processor makes 25, 6 for images" in said
    # and where the server's files are named, before it is asked
    untouched = serves()
    said = refusal(recipe, untouched, other)
    assert "image_seq_length: 8 of the teacher, 4 of the student" in said and not untouched.requests


def test_a_slip_in_the_middle_of_a_run_ends_it_and_names_the_image(
    recipe: Recipes, folder_of: Any, serves: Serves, tmp_path: Path
) -> None:
    served = serves()

    class Slips:
        def stage(self, name: str, total: int | None = None, done: int = 0) -> None: ...

        def line(self, line: dict[str, Any]) -> None:
            served.slip = "dropped" if "loss" in line else None

    with on_a_port(served) as url, pytest.raises(TeacherError, match=r"was shown . images .*\.png"):
        path = recipe(teacher=at(url, folder_of("internvl", 1)), training={"max_steps": 4})
        train(load_recipe(path, []), progress=Slips())


def test_a_server_whose_vision_tower_changes_is_found_out(
    recipe: Recipes, folder_of: Any, serves: Serves, tmp_path: Path, capsys: Any
) -> None:
    served = serves()
    same, other = served.model, copy.deepcopy(served.model)
    with torch.no_grad():
        for name, weight in other.named_parameters():
            if "vision_tower" in name:
                weight.mul_(1.3)

    class Stops:
        def stage(self, name: str, total: int | None = None, done: int = 0) -> None: ...

        def line(self, line: dict[str, Any]) -> None:
            if line.get("step") == 2:
                raise KeyboardInterrupt

    with on_a_port(served) as url:
        path = recipe(teacher=at(url, folder_of("internvl", 1)), training={"max_steps": 4, "save_every": 1})
        with pytest.raises(KeyboardInterrupt):
            train(load_recipe(path, []), progress=Stops())
        served.model = other
        assert main(["train", path]) == 4
        assert "another model than this run" in capsys.readouterr().err
        served.model = same
        assert main(["train", path]) == 0
    noted = read_run(tmp_path / "run")["teacher_weights"]
    assert [bool(one) for one in noted["seen"]] == [False, False, True] and "shown" not in noted


def test_kinds_of_servers_that_take_no_images_and_tokenizers_without_processor_are_refused_by_name(
    recipe: Recipes, folder_of: Any, serves: Serves, tmp_path: Path
) -> None:
    folder = folder_of("internvl", 1)

    def asked(**keys: Any) -> str:
        with pytest.raises(ConfigError) as error:
            prepare(load_recipe(recipe("refused", teacher=at("http://127.0.0.1:9", folder, **keys)), []))
        return str(error.value)

    for kind in ("sglang", "openai"):
        assert f"(kind: {kind}) gets token ids alone" in asked(kind=kind)
    assert "has no processor of a model that sees images" in asked(tokenizer=_text_model(tmp_path))
    said = refusal(recipe, serves(on=False), folder)
    assert "switched off (status 403)" in said and "--enable-scale-out" in said and "key" not in said
    old = serves()
    old.fault = lambda path, answer: (404, {}, b'{"detail":"Not Found"}') if "inference" in path else answer
    said = refusal(recipe, old, folder)
    assert "is not there (status 404)" in said and "need vLLM 0.32 or later" in said


def test_our_own_server_is_not_asked_about_images(serves: Serves) -> None:
    served = serves()
    ids, places = served.widened([3, served.vision.placeholder_id, 5], [tiny.picture(0)])
    shown = served.shown([tiny.picture(0)], places, len(ids))
    server = OwnServer(Connection("http://127.0.0.1:9"), k=4)
    server._about = {"vocabulary": served.tokens}
    with pytest.raises(ConfigError, match=r"\(kind: selectkd\) gets token ids alone"):
        server.top_k([Sample(ids, [1], shown)])


def test_the_doctors_look_at_what_a_server_makes_of_images(
    recipe: Recipes, folder_of: Any, serves: Serves, capsys: Any
) -> None:
    folder = folder_of("internvl", 1)

    def examined(served: ServedImages) -> Any:
        with on_a_port(served) as url:
            findings = list(doctor(load_recipe(recipe(teacher=at(url, folder)), []), device="cpu"))
        return {finding.check: finding for finding in findings}["images"]

    sound, white = examined(serves()), examined(serves(slip="white"))
    assert sound.ok and "the server's best tokens move by" in sound.message
    assert not white.ok and "do not reach its model" in white.message
    for on, told in ((True, "taken"), (False, "--enable-scale-out")):
        with on_a_port(serves(on=on)) as url:
            arguments = ["--tokenizer", str(folder), "--k", "9"]
            assert main(["teacher", "doctor", url, *arguments]) == 0
        assert f"prompts with images: {'taken' if on else ''}" in (out := capsys.readouterr().out)
        assert told in out


def test_a_student_that_sees_images_is_served_with_its_processor_and_without_its_old_features(
    recipe: Recipes, serves: Serves, tmp_path: Path
) -> None:
    folder = tmp_path / "served"
    served = serves(folder=folder)
    policy = {"name": "student", "max_new_tokens": 4, "temperature": 0.0}
    memory, _ = ran(recipe("memory", data={"policy": policy}))
    with on_a_port(served) as url:
        where = {"url": url, "kind": "vllm", "model": "tiny", "folder": str(folder)}
        found, _ = ran(recipe("server", data={"policy": {**policy, "served": where}}))
        sglang = {"data": {"policy": {**policy, "served": {**where, "kind": "sglang"}}}}
        with pytest.raises(ConfigError, match=r"\(kind: sglang\) gets token ids alone, and the student sees"):
            prepare(load_recipe(recipe("refused", **sglang), []))
    torch.testing.assert_close(found, memory, rtol=0, atol=1e-5)
    asked = [path for path, _, _ in served.requests]
    fresh = ["/collective_rpc", "/reset_prefix_cache", "/reset_encoder_cache"]
    assert [path for path in asked if path in fresh] == fresh * 2
    assert {"/inference/v1/generate", "/v1/completions"} <= set(asked)


@pytest.mark.parametrize("family", ["internvl", "qwen2_5_vl"])
def test_a_server_writes_to_images_as_the_model_in_memory(
    folder_of: Any, serves: Serves, family: str
) -> None:
    served = serves(family)
    requests = []
    for number, size in enumerate(((24, 20), (18, 40))):
        ref = found(tiny.picture(number, *size), ImageRules(), "an image")
        ids, places = served.widened([3, served.vision.placeholder_id, 20, 21, 5, 4], [ref.image()])
        requests.append(Request(ids, 6, images=served.shown([ref.image()], places, len(ids))))
    greedy = Sampling(temperature=0.0)
    ours = [
        generate([served.model], [one], Draw(greedy), ends={2}, width=served.tokens)[0] for one in requests
    ]
    tokenizer = served.vision.processor.tokenizer
    with on_a_port(served) as url:
        server = CompletionServer(url, "tiny")
        texts = server.complete(requests, greedy, tokenizer=tokenizer, end=2)
        assert [text.ids for text in texts] == [text.ids for text in ours]
        served.slip = "twice"
        with pytest.raises(TeacherError, match="They differ from token"):
            server.complete(requests[:1], greedy, tokenizer=tokenizer, end=2)
