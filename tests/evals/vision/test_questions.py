# ruff: noqa: E501  (tables of answers, one line for several; full-width letters are among them)
"""Benchmarks' files in VLMEvalKit's and the hub's formats: read one at a time, asked, graded, counted."""

from __future__ import annotations

import base64
import csv
import io
import re
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from selectkd.data import images
from selectkd.errors import ConfigError, DataError
from selectkd.evals.memory import Memory
from selectkd.evals.run_suite import Scores
from selectkd.evals.vision.asking import Message, graded
from selectkd.evals.vision.benchmarks import BENCHMARKS, chosen_benchmarks, file_of
from selectkd.evals.vision.leaderboard import average_row, task_values
from selectkd.evals.vision.questions import read_questions
from selectkd.evals.vision.run import VisionRun, run_benchmark


def png(shade: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (4, 4), (shade, shade, shade)).save(stream, "PNG")
    return stream.getvalue()


def text64(shade: int) -> str:
    return base64.b64encode(png(shade)).decode()


class Answering:
    """Answers by what stands in the text of a question; keeps the chats."""

    identity = ("a table of answers",)

    def __init__(self, answer: Callable[[str], str]) -> None:
        self.answer, self.chats = answer, list[list[Message]]()

    def __call__(self, chats: Sequence[list[Message]]) -> list[str]:
        self.chats += chats
        return [
            self.answer("\n".join(part["text"] for part in chat[0]["content"] if part["type"] == "text"))
            for chat in chats
        ]


def table(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, delimiter="\t")
        writer.writeheader()
        writer.writerows(rows)
    return path


def parquet(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def scored(task: str, path: Path, answer: Callable[[str], str], tmp_path: Path) -> list[Scores]:
    return run_benchmark(
        "m", task, path, Answering(answer), VisionRun((task,)), Memory(tmp_path / "memory.jsonl")
    )


PET = {"question": "Which animal?", "A": "cat", "B": "dog", "C": "bird"}


def names_the(option: str) -> Callable[[str], str]:
    """An answerer that finds the letter of an option's text among those it is asked."""

    def answer(text: str) -> str:
        found = re.search(rf"^([A-Z])\. {option}$", text, re.M)
        return f"The answer is {found[1] if found else 'missing'}."

    return answer


def test_every_rotation_must_be_right_made_here_or_held_by_the_file(tmp_path: Path) -> None:
    rows = [
        {"index": 0, "image": text64(1), "answer": "B", **PET},
        {"index": 1, "image": text64(2), "answer": "A", **PET},
    ]
    turned = [
        {**rows[0], "index": 1_000_000, "image": "0", "A": "dog", "B": "bird", "C": "cat", "answer": "A"},
        {**rows[0], "index": 2_000_000, "image": "0", "A": "bird", "B": "cat", "C": "dog", "answer": "C"},
    ]
    plain, whole = (
        table(tmp_path / "MMBench.tsv", rows),
        table(tmp_path / "MMBench_turned.tsv", [*rows, *turned]),
    )
    for path, asked in ((plain, 6), (whole, 4)):
        (row,) = scored("mmbench", path, names_the("dog"), tmp_path)
        assert (row.metric, row.scores, row.settings["questions"]) == ("circular_accuracy", [1.0, 0.0], asked)
    always_b = scored("mmbench", plain, lambda _: "B", tmp_path / "b")
    assert always_b[0].scores == [0.0, 0.0], "one letter cannot be right in every rotation"
    answering = Answering(lambda _: "B")
    run_benchmark("m", "mmbench", whole, answering, VisionRun(("mmbench",)), Memory(tmp_path / "c.jsonl"))
    shown = [chat[0]["content"][0]["image"] for chat in answering.chats]
    assert shown == [png(1), png(2), png(1), png(1)], "a row that names another row's image has it"


def test_nan_that_fills_empty_cells_is_no_option_and_no_hint(tmp_path: Path) -> None:
    rows = [
        {"index": 0, "image": {"bytes": png(1), "path": None}, "hint": "nan", "question": "Which?", "A": "cat", "B": "dog",
         "C": "nan", "D": "nan", "answer": "B"},
        {"index": 1, "image": {"bytes": png(2), "path": None}, "hint": "look", "question": "Which?", "A": "nan", "B": "nan",
         "C": "inf", "D": "nan", "answer": "A"},
        {"index": 2, "image": {"bytes": png(3), "path": None}, "hint": "look", "question": "Which?", "A": "1", "B": "2",
         "C": "inf", "D": "nan", "answer": "D"},
        {"index": 3, "image": {"bytes": png(4), "path": None}, "hint": "look", "question": "Which?", "A": "1", "B": "nan",
         "C": "nan", "D": "nan", "answer": "A"},
    ]  # fmt: skip
    found = list(read_questions(parquet(tmp_path / "MMBench.parquet", rows)))
    assert [list(one.options.values()) for one in found] == [
        ["cat", "dog"], ["nan", "nan", "inf"], ["1", "2", "inf", "nan"], ["1", "nan"],
    ]  # fmt: skip
    asked = [BENCHMARKS["mmbench"].ask(one) for one in found]
    assert "Hint" not in asked[0] and asked[1].startswith("Hint: look")


def test_a_limit_counts_questions_and_keeps_their_rotations_together(tmp_path: Path) -> None:
    rows = [
        {"index": at + turn * 1_000_000, "image": text64(1), "answer": "B", **PET}
        for turn in range(3)
        for at in range(4)
    ]
    found = list(read_questions(table(tmp_path / "t.tsv", rows), limit=2, circular=True))
    assert [one.index for one in found] == ["0", "1", "1000000", "1000001", "2000000", "2000001"]


def test_an_answer_that_cannot_be_read_is_counted_and_never_drawn(tmp_path: Path) -> None:
    path = table(
        tmp_path / "MMStar.tsv", [{"index": at, "image": text64(at), "answer": "A", **PET} for at in range(8)]
    )
    (row,) = scored("mmstar", path, lambda _: "I cannot tell.", tmp_path)
    assert row.interval.value == 0.0 and row.settings["unknown"] == 8


def test_hallusionbench_has_its_three_accuracies_and_skips_questions_without_an_image(tmp_path: Path) -> None:
    # two figures and two questions of one set; the second question is wrong on figure 1
    rows = [
        {"index": f"bench_a_b_0_{figure}_{question}", "question": f"Q{question}?", "answer": answer, "l2-category": "map",
         "image": image}
        for figure, question, answer, image in (
            (0, 0, "No", ""), (1, 0, "Yes", text64(1)), (1, 1, "No", text64(1)), (2, 0, "Yes", text64(2)), (2, 1, "Yes", text64(2)),
        )
    ]  # fmt: skip
    found = scored("hallusionbench", table(tmp_path / "HallusionBench.tsv", rows), lambda _: "Yes", tmp_path)
    assert {one.metric: one.interval.value for one in found} == {"aAcc": 0.75, "fAcc": 0.5, "qAcc": 0.5}
    columns = [
        {"subcategory": "map", "set_id": "0", "figure_id": str(figure), "question_id": str(question),
         "question": f"Q{question}?", "gt_answer": answer, "image": {"bytes": png(figure), "path": "a.png"}}
        for figure, question, answer in ((1, 0, "1"), (1, 1, "0"), (2, 0, "1"), (2, 1, "1"))
    ]  # fmt: skip
    again = scored(
        "hallusionbench", parquet(tmp_path / "HallusionBench.parquet", columns), lambda _: "Yes", tmp_path
    )
    assert [one.interval.value for one in again] == [one.interval.value for one in found]


HUB: list[tuple[str, dict[str, Any], str, str]] = [
    ("mmstar", {"index": 3, "question": "Which?\nOptions: A: red, B: dark red, C: blue, D: green", "answer": "B",
                "image": png(1)}, "It is dark red.", "It is red."),
    ("ai2d", {"question": "Which?", "options": ["sun", "moon", "star"], "answer": "2", "image": {"bytes": png(1)}},
     "C", "B"),
    ("ai2d", {"question": "How many?", "options": ["1", "2", "3", "4"], "answer": "2", "image": {"bytes": png(1)}},
     "C", "B"),
    ("ai2d", {"question": "How many?", "options": ["4", "5", "6"], "answer": "5", "image": {"bytes": png(1)}}, "B", "C"),
    ("mathvista", {"pid": "6", "question": "How many?", "choices": ["1", "2", "3", "4"], "answer": "2",
                   "question_type": "multi_choice", "answer_type": "text", "image": {"bytes": png(1)}}, "B", "C"),
    ("mmmu", {"id": "val_1", "question": "<image 1> or <image 2>?", "options": "['sun', 'moon']", "answer": "B",
              "question_type": "multiple-choice", "image_1": {"bytes": png(1)}, "image_2": {"bytes": png(2)}},
     "(B) moon", "(A)"),
    ("mmmu", {"id": "val_2", "question": "How much <image 1>?", "options": "[]", "answer": "['12.5', 'twelve']",
              "question_type": "open", "image_1": {"bytes": png(1)}}, "It is 12.50 N", "It is 13 N"),
    ("mathvista", {"pid": "7", "query": "Hint: an integer.\nQuestion: How many?", "question": "How many?", "answer": "14",
                   "question_type": "free_form", "answer_type": "integer", "decoded_image": {"bytes": png(1)}},
     "The answer is 14.", "The answer is 15."),
    ("mathvista", {"pid": "8", "question": "Which?", "choices": ["3/11", "8/11"], "answer": "8/11",
                   "question_type": "multi_choice", "answer_type": "text", "image": {"bytes": png(1)}}, "8/11", "A"),
    ("mathvista", {"pid": "9", "question": "How long?", "answer": "1.45", "question_type": "free_form", "precision": 2.0,
                   "answer_type": "float", "image": {"bytes": png(1)}}, "1.449", "1.4"),
    ("ocrbench", {"question": "Which word?", "answer": ["STOP", "HALT"], "question_type": "Regular Text Recognition",
                  "image": {"bytes": png(1)}}, "It reads halt", "It reads go"),
]  # fmt: skip


@pytest.mark.parametrize(("task", "record", "right", "wrong"), HUB)
def test_the_hubs_records_are_read_and_graded(
    task: str, record: dict[str, Any], right: str, wrong: str, tmp_path: Path
) -> None:
    path = parquet(tmp_path / f"{task}.parquet", [record])
    assert scored(task, path, lambda _: right, tmp_path / "a")[0].scores == [1.0]
    assert scored(task, path, lambda _: wrong, tmp_path / "b")[0].scores == [0.0]


def test_images_stand_where_mmmus_text_names_them(tmp_path: Path) -> None:
    record = {"index": 1, "question": "Is <image 2> before <image 1>?", "A": "yes", "B": "no", "answer": "A",
              "split": "validation", "image": str([text64(1), text64(2)])}  # fmt: skip
    path = table(tmp_path / "MMMU.tsv", [record, {**record, "index": 2, "split": "dev"}])
    answering = Answering(lambda _: "A")
    run_benchmark("m", "mmmu", path, answering, VisionRun(("mmmu",)), Memory(tmp_path / "memory.jsonl"))
    (chat,) = answering.chats
    assert [part.get("image") or part["text"][:8] for part in chat[0]["content"]] == [
        "Is ", png(2), " before ", png(1), "?\nA. yes",
    ]  # fmt: skip


BAD: list[tuple[dict[str, Any], str]] = [
    ({"image": "%" * 80}, "no base64"),
    ({"image": "7"}, "no row before has this index"),
    ({"image": "missing.png"}, "no image 'missing.png'"),
    ({"image": "../outside.png"}, "'../outside.png' lies outside"),
    ({"answer": ""}, "no question with its answer"),
    ({"question": ""}, "no question with its answer"),
    ({"answer": "E"}, "none of the options A, B, C"),
]


@pytest.mark.parametrize(("change", "problem"), BAD)
def test_a_bad_record_is_refused_with_its_line(change: dict[str, Any], problem: str, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "outside.png").write_bytes(png(1))
    good = {"index": 0, "image": text64(1), "answer": "B", **PET}
    path = table(tmp_path / "data" / "MMStar.tsv", [good, {**good, "index": 1, **change}])
    with pytest.raises(DataError, match=rf"MMStar\.tsv:3: .*{re.escape(problem)}"):
        list(read_questions(path))


def test_images_are_bounded_in_bytes_and_a_file_without_any_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = {"index": 0, "image": text64(1), "answer": "B", **PET}
    with pytest.raises(DataError, match="no question with an image"):
        list(read_questions(table(tmp_path / "a.tsv", [{**good, "image": ""}])))
    monkeypatch.setattr(images, "MOST_BYTES", 50)
    with pytest.raises(
        DataError,
        match=r"b\.tsv:2: the image has more than 50 bytes|b\.tsv:2: the image has \d+ bytes; at most 50",
    ):
        list(read_questions(table(tmp_path / "b.tsv", [good])))


@pytest.mark.parametrize("kind", ["tsv", "parquet"])
def test_a_file_of_five_times_the_images_takes_no_more_memory(kind: str, tmp_path: Path) -> None:
    size, peaks = 1 << 17, []
    image = base64.b64encode(bytes(size)).decode()
    for count in (8, 40):
        rows = [
            {"index": at, "image": image if kind == "tsv" else bytes(size), "answer": "B", **PET}
            for at in range(count)
        ]
        path = tmp_path / f"MMStar-{count}.{kind}"
        if kind == "tsv":
            table(path, rows)
        else:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
        del rows
        tracemalloc.start()
        assert sum(1 for _ in read_questions(path)) == count
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0], f"{peaks[0] / size:.1f} and {peaks[1] / size:.1f} images' bytes"


def test_a_run_that_was_cut_asks_only_for_what_is_left(tmp_path: Path) -> None:
    path = table(
        tmp_path / "MMStar.tsv",
        [{"index": at, "image": text64(at), "answer": "AB"[at % 2], **PET} for at in range(7)],
    )

    class Cut(Answering):
        def __call__(self, chats: Sequence[list[Message]]) -> list[str]:
            if self.chats:
                raise KeyboardInterrupt
            return super().__call__(chats)

    run, memory = VisionRun(("mmstar",), batch_size=3), tmp_path / "memory.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run_benchmark("m", "mmstar", path, Cut(lambda _: "A"), run, Memory.opened(memory))
    rest = Answering(lambda _: "A")
    (row,) = run_benchmark("m", "mmstar", path, rest, run, Memory.opened(memory))
    assert len(rest.chats) == 4 and row.scores == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    other = Answering(lambda _: "B")
    other.identity = ("another model",)
    assert run_benchmark("m", "mmstar", path, other, run, Memory.opened(memory))[0].interval.value < 0.5


def test_answers_to_equal_questions_are_asked_once_and_those_to_other_images_are_not_theirs(
    tmp_path: Path,
) -> None:
    path = table(
        tmp_path / "MMStar.tsv",
        [{"index": at, "image": text64(at // 2), "answer": "A", **PET} for at in range(4)],
    )
    answering = Answering(lambda _: "A")
    run_benchmark("m", "mmstar", path, answering, VisionRun(("mmstar",)), Memory(tmp_path / "memory.jsonl"))
    assert len(answering.chats) == 2


def test_the_average_is_the_leaderboards_and_there_only_for_all_eight() -> None:
    from selectkd.evals.statistics import wilson

    def row(task: str, metric: str, right: int) -> Scores:
        return Scores("m", task, metric, [], wilson(right, 10), {}, [])

    hallusion = [
        row("hallusionbench", "aAcc", 6),
        row("hallusionbench", "fAcc", 3),
        row("hallusionbench", "qAcc", 0),
    ]
    rest = [row(task, "accuracy", 5) for task in BENCHMARKS if task != "hallusionbench"]
    assert task_values(hallusion)["hallusionbench"].value == pytest.approx(0.3, abs=1e-12)
    found = average_row("m", [*rest, *hallusion], {})
    assert found is not None and found["value"] == pytest.approx((7 * 0.5 + 0.3) / 8, abs=1e-12)
    assert found["low"] < found["value"] < found["high"]
    assert average_row("m", rest, {}) is None


def test_a_benchmarks_file_is_found_by_its_name_and_a_wrong_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "MMStar.tsv").touch()
    (tmp_path / "MMMU_DEV_VAL.tsv").touch()
    (tmp_path / "AI2D_TEST.tsv").touch()
    (tmp_path / "AI2D_TEST_NO_MASK.tsv").touch()
    assert file_of("mmmu", tmp_path).name == "MMMU_DEV_VAL.tsv"
    with pytest.raises(ConfigError, match="not: none"):
        file_of("ocrbench", tmp_path)
    with pytest.raises(ConfigError, match=r"AI2D_TEST\.tsv, AI2D_TEST_NO_MASK\.tsv"):
        file_of("ai2d", tmp_path)
    with pytest.raises(ConfigError, match="Did you mean 'mmstar'"):
        chosen_benchmarks("mmsta")
    with pytest.raises(ConfigError, match="needs --data"):
        VisionRun(("mmstar",)).check()
    assert chosen_benchmarks("MMStar, synthetic,mmstar") == ["mmstar", "synthetic"]
    assert graded([], Answering(lambda _: "")) == []
