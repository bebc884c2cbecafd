"""Text that is large in one way: a line of 50 MB, a file of 2 GB, a million records the last of which is bad.

    python benchmarks/large_text.py [--scale 1] [--cases line,array,file,records] [--record]

Each case in a process of its own, with seconds, peak growth of memory, and what was counted. line: three records, one
of 50 MB, tokenised. array: a JSON array of 2 GB on one line, read. file: 2 GB of JSON Lines, indexed and streamed for
200 batches. records: a million records of 15 tokens, tokenised; then the same with the bad one skipped.
``--scale 100`` makes everything a hundredth.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from record import Row, record
from text import timed, tokenizer, vocabulary

from selectkd.data.chunks import of_file
from selectkd.data.order import BatchOptions
from selectkd.data.places import DataFile
from selectkd.data.render import TextRules
from selectkd.data.sources import batches, dataset_source, streamed_source
from selectkd.data.text_cache import TextCache
from selectkd.errors import DataError

LINE, FILE, RECORDS = 50_000_000, 2_000_000_000, 1_000_000
CASES = ("line", "array", "file", "records")


def rows(count: int, words: int) -> Iterator[dict[str, str]]:
    known = vocabulary()
    for number in range(count):
        text = [known[(number * 7 + place * 31) % len(known)] for place in range(words)]
        yield {
            "prompt": f"{number} " + " ".join(text[: words // 4]),
            "completion": " ".join(text[words // 4 :]),
        }


def write(file: Path, case: str, scale: int) -> None:
    """The file of a case."""
    with file.open("w") as out:
        if case == "line":
            part = " ".join(vocabulary())
            for size in (1, LINE // scale // len(part), 1):
                out.write(json.dumps({"prompt": "a question", "completion": " ".join([part] * size)}) + "\n")
        elif case == "records":
            for row in rows(RECORDS // scale - 1, 6):
                out.write(json.dumps(row) + "\n")
            out.write('{"prompt": "cut sho\n')
        else:
            array = case == "array"
            out.write("[" * array)
            for number, row in enumerate(rows(FILE // scale // 2050, 340)):
                out.write(", " * (array and number > 0) + json.dumps(row) + "\n" * (not array))
            out.write("]" * array)


def measured(case: str, folder: Path) -> dict[str, Any]:
    """What a case takes; {"counted": what it says of the text} with it."""
    from transformers import AutoTokenizer

    loaded: Any = AutoTokenizer.from_pretrained(folder / "tokenizer")
    file, cache = folder / ("text.json" if case == "array" else "text.jsonl"), TextCache(folder / "cache", 2)

    def work() -> dict[str, Any]:
        if case == "array":
            read = of_file(DataFile(str(file), file.name))
            return {"counted": f"{sum(len(chunk) for chunk in read):,} records"}
        if case == "file":
            source = streamed_source({"path": str(file)}, loaded, TextRules(512), cache=cache)
            epoch = batches([source], BatchOptions(8, 0), 0)
            tokens = sum(int(epoch[index].attention_mask.sum()) for index in range(min(200, len(epoch))))
            return {"counted": f"{source.summary}; {tokens:,} tokens"}
        found = []
        for policy in ("error", "skip") if case == "records" else ("error",):
            try:
                rules = TextRules(512, on_bad_record=policy)
                found.append(dataset_source({"path": str(file)}, loaded, rules, cache=cache).summary)
            except DataError as error:
                found.append(str(error))
        return {"counted": "; ".join(found)}

    return timed(work)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scale", type=int, default=1)
    parser.add_argument("--cases", default=",".join(CASES))
    parser.add_argument(
        "--folder", type=Path, default=Path(".cache"), help="where the files are while they are read"
    )
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--inside", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.inside:
        print(json.dumps(measured(given.inside[0], Path(given.inside[1]))))
        return
    found: list[Row] = []
    for case in given.cases.split(","):
        given.folder.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="large-", dir=given.folder) as name:
            folder = Path(name)
            tokenizer(folder / "tokenizer")
            write(folder / ("text.json" if case == "array" else "text.jsonl"), case, given.scale)
            ran = subprocess.run(
                [sys.executable, __file__, "--inside", case, name],
                capture_output=True,
                text=True,
                check=False,
            )
            if ran.returncode:
                raise SystemExit(ran.stderr[-2000:])
            about = json.loads(ran.stdout.splitlines()[-1])
        print(case, about, flush=True)
        size = {"line": LINE, "array": FILE, "file": FILE, "records": RECORDS}[case] // given.scale
        unit = "records, one bad" if case == "records" else "bytes"
        for metric, key, factor in (
            ("seconds", "seconds", 1.0), ("processor seconds", "processor", 1.0), ("peak growth, MB", "growth", 1e-6),
        ):  # fmt: skip
            found.append((f"{case}: {size} {unit}", "ours", metric, about[key] * factor, 0.0, 1))
    if given.record:
        record("large text", found)


if __name__ == "__main__":
    main()
