"""How long a run waits for its text, and how much memory that takes: records of about 500 tokens, made on the spot.

``python benchmarks/text.py all 50000 200000 --record`` measures both ways, each in a process of its own, and writes
rows into results.csv. Ours and TRL's take turns. What was measured is kept in ``.cache/text``, so that a benchmark that
was stopped goes on; ``--peer`` is the Python that has TRL.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESSES = 2
LENGTH = 1024
WORDS = 478
"""Words of a record: some 500 tokens of the tokenizer below."""
TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TRL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def vocabulary() -> list[str]:
    """A few thousand words of one to three syllables."""
    draw = random.Random(0)
    syllables = [a + b + c for a in "bdfgklmnprst" for b in "aeiou" for c in ("", "n", "r", "s")]
    return ["".join(draw.choices(syllables, k=draw.randint(1, 3))) for _ in range(4000)]


def write(file: Path, records: int) -> None:
    """``records`` conversations of one turn."""
    words, draw = vocabulary(), random.Random(1)
    with file.open("w") as out:
        for number in range(records):
            text = draw.choices(words, k=WORDS)
            turns = [
                {"role": "user", "content": f"{number} " + " ".join(text[:80])},
                {"role": "assistant", "content": " ".join(text[80:])},
            ]
            out.write(json.dumps({"messages": turns}) + "\n")


def tokenizer(folder: Path) -> None:
    """A byte-level BPE tokenizer of 8,000 tokens, trained on such words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    words, draw = vocabulary(), random.Random(2)
    trainer = trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False,
    )  # fmt: skip
    bpe.train_from_iterator((" ".join(draw.choices(words, k=400)) for _ in range(300)), trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    made.chat_template = TEMPLATE
    made.save_pretrained(folder)


def anonymous(processes: list[Any]) -> int:
    """Bytes of memory of processes that no file backs; pages that a fork shares with its parent count once."""
    total = 0
    for one in processes:
        try:
            rows = Path(f"/proc/{one.pid}/smaps_rollup").read_text().splitlines()
            total += sum(int(row.split()[1]) * 1024 for row in rows if row.startswith("Pss_Anon:"))
        except OSError:  # it has ended
            continue
    return total


def timed(work: Callable[[], Any]) -> dict[str, Any]:
    """Seconds, processor seconds and growth of memory in bytes at the most, of this process and those it starts, while
    ``work`` is done; and what it says of itself. A thread takes samples of memory and processor time; they cost at
    most a twentieth of a processor and are not counted.
    """
    import threading

    import psutil

    me, used, most, looking = psutil.Process(), dict[int, float](), [0], [0.0]

    def look() -> None:
        processes = [me, *me.children(recursive=True)]
        most[0] = max(most[0], anonymous(processes))
        for one in processes:
            try:
                times = one.cpu_times()
                used[one.pid] = times.user + times.system
            except psutil.Error:  # it has ended
                continue

    def look_on() -> None:
        while True:
            start = time.thread_time()
            look()
            looking[0] = time.thread_time()
            time.sleep(min(1, max(0.1, 20 * (looking[0] - start))))

    look()
    begun, before = most[0], sum(used.values())
    threading.Thread(target=look_on, daemon=True).start()
    began = time.perf_counter()
    about = work()
    seconds = time.perf_counter() - began
    look()
    spent = sum(used.values()) - before - looking[0]
    return {"seconds": seconds, "processor": spent, "growth": most[0] - begun, **about}


def ours(folder: Path, cache: Path) -> dict[str, Any]:
    """Our way to the first batch."""
    from transformers import AutoTokenizer

    from selectkd.data.order import BatchOptions
    from selectkd.data.render import TextRules
    from selectkd.data.sources import batches, dataset_source
    from selectkd.data.text_cache import TextCache

    loaded = AutoTokenizer.from_pretrained(folder / "tokenizer")
    say = lambda message: print(message, file=sys.stderr, flush=True)  # noqa: E731

    def work() -> dict[str, Any]:
        source = dataset_source(
            {"path": str(folder / "data.jsonl")},
            loaded,
            TextRules(LENGTH),
            cache=TextCache(cache, PROCESSES, say),
        )
        epoch = batches([source], BatchOptions(8, 0), 0)
        first = epoch[0]
        lengths = source.examples.lengths
        return {"tokens": int(lengths.sum()), "batches": len(epoch), "shape": list(first.input_ids.shape)}

    return timed(work)


def trl(folder: Path, cache: Path) -> dict[str, Any]:
    """The SFT path of TRL to the first batch, as its trainer prepares a data set: datasets.map."""
    os.environ["HF_DATASETS_CACHE"] = str(cache)
    import datasets
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    loaded = AutoTokenizer.from_pretrained(folder / "tokenizer")
    loaded.chat_template = TRL_TEMPLATE
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(loaded), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                    num_attention_heads=2, num_key_value_heads=2)
    )  # fmt: skip

    def work() -> dict[str, Any]:
        data = datasets.load_dataset("json", data_files=str(folder / "data.jsonl"), split="train")
        config = SFTConfig(
            output_dir=str(folder / "out"), dataset_num_proc=PROCESSES, max_length=LENGTH, assistant_only_loss=True,
            per_device_train_batch_size=8, report_to="none", use_cpu=True, bf16=False,
        )  # fmt: skip
        trainer = SFTTrainer(model, args=config, train_dataset=data, processing_class=loaded)
        loader = trainer.get_train_dataloader()
        first = next(iter(loader))
        prepared.append(trainer.train_dataset)
        return {"batches": len(loader), "shape": list(first["input_ids"].shape)}

    prepared: list[Any] = []
    found = timed(work)
    lengths = prepared[0].with_format("arrow").map(  # outside what is measured
        lambda rows: {"length": [len(one) for one in rows["input_ids"]]}, batched=True,
        remove_columns=prepared[0].column_names, keep_in_memory=True,
    )  # fmt: skip
    return {**found, "tokens": sum(lengths.with_format(None)["length"])}


def run(python: str, who: str, folder: Path) -> dict[str, Any]:
    """One way in a process of its own."""
    done = subprocess.run(
        [python, __file__, who, "--folder", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def measured(folder: Path, records: int, peer: str) -> dict[str, dict[str, Any]]:
    """What is measured of so many records, by way and start; what is there from an earlier time is kept."""
    file = folder / "found.json"
    found = json.loads(file.read_text()) if file.is_file() else {}
    if not (folder / "tokenizer" / "tokenizer_config.json").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / "data.jsonl", records)
        tokenizer(folder / "tokenizer")
    for start in ("first", "second"):
        for who, python in (("ours", sys.executable), ("trl", peer)):
            if f"{who}, {start}" in found:
                continue
            if start == "first":
                shutil.rmtree(folder / f"cache-{who}", ignore_errors=True)
            found[f"{who}, {start}"] = run(python, who, folder)
            print(records, who, start, found[f"{who}, {start}"], flush=True)
            file.write_text(json.dumps(found))
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=["ours", "trl", "all"])
    parser.add_argument("sizes", type=int, nargs="*", default=[50_000, 200_000])
    parser.add_argument("--folder", type=Path, default=Path(".cache/text"))
    parser.add_argument("--peer", default=os.environ.get("PEER", sys.executable))
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    if given.way != "all":
        way = {"ours": ours, "trl": trl}[given.way]
        print(json.dumps(way(given.folder, given.folder / f"cache-{given.way}")))
        return
    rows = []
    for records in given.sizes:
        for about, found in measured(given.folder / str(records), records, given.peer).items():
            who, start = about.split(", ")
            values = {
                "seconds": found["seconds"],
                "processor seconds": found["processor"],
                "peak growth, MB": found["growth"] / 1e6,
                **({"tokens a second": found["tokens"] / found["seconds"]} if start == "first" else {}),
            }
            case = f"{records} records of {found['tokens'] / records:.0f} tokens, {PROCESSES} processes, {start} start"
            rows += [(case, who, name, value, 0, 1) for name, value in values.items()]
            print(case, who, {name: round(value, 2) for name, value in values.items()}, flush=True)
    if given.record:
        from record import record

        record("text", rows)
        shutil.rmtree(given.folder)


if __name__ == "__main__":
    main()
