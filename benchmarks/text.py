"""How long a run waits for its text, and how much memory that takes: records of about 500 tokens, made on the spot.

``python benchmarks/text.py ours|trl|rows`` in a process each; ``all`` runs them and writes rows into results.csv.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PROCESSES = 2
LENGTH = 1024
WORDS = 380
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


def peak() -> dict[str, int]:
    """The memory of this process and its children in bytes, sampled by a thread: anonymous, and with mapped files."""
    import threading

    import psutil

    found = {"anonymous": 0, "resident": 0}
    me = psutil.Process()

    def look() -> None:
        while True:
            anonymous = resident = 0
            for one in [me, *me.children(recursive=True)]:
                try:
                    rows = dict(
                        line.split(":", 1)
                        for line in Path(f"/proc/{one.pid}/status").read_text().splitlines()
                    )
                    anonymous += int(rows["RssAnon"].split()[0]) * 1024
                    resident += int(rows["VmRSS"].split()[0]) * 1024
                except (OSError, KeyError, psutil.Error):
                    continue
            found["anonymous"] = max(found["anonymous"], anonymous)
            found["resident"] = max(found["resident"], resident)
            time.sleep(0.1)

    before = Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]
    found["begun"] = int(before) * 1024
    threading.Thread(target=look, daemon=True).start()
    return found


def timed(work: Callable[[], Any]) -> dict[str, Any]:
    """Seconds, processor seconds (children included) and peak memory growth of ``work``, and what it says of itself."""
    memory = peak()
    began = time.perf_counter()
    about = work()
    seconds = time.perf_counter() - began
    used = os.times()
    return {
        "seconds": seconds,
        "processor": used.user + used.system + used.children_user + used.children_system,
        "growth": memory["anonymous"] - memory["begun"],
        "resident": memory["resident"],
        **about,
    }


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
        return {
            "tokens": int(source.examples.lengths.sum()),
            "batches": len(epoch),
            "shape": list(first.input_ids.shape),
        }

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
        tokens = -1
        return {"tokens": tokens, "batches": len(loader), "shape": list(first["input_ids"].shape)}

    return timed(work)


def run(python: str, who: str, folder: Path, cache: Path) -> dict[str, Any]:
    """One way in a process of its own."""
    done = subprocess.run(
        [python, __file__, who, str(folder), str(cache)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main(sizes: list[int], peer: str) -> None:
    from record import record

    for records in sizes:
        folder = Path(tempfile.mkdtemp(prefix="text-"))
        try:
            write(folder / "data.jsonl", records)
            tokenizer(folder / "tokenizer")
            rows = []
            for who, python in (("ours", sys.executable), ("trl", peer)):
                for start in ("first", "second"):
                    found = run(python, who, folder, folder / f"cache-{who}")
                    print(records, who, start, found, flush=True)
                    rows += [
                        (f"{records} records, {start} start", who, "seconds", found["seconds"], 0, 1),
                        (
                            f"{records} records, {start} start",
                            who,
                            "processor seconds",
                            found["processor"],
                            0,
                            1,
                        ),
                        (
                            f"{records} records, {start} start",
                            who,
                            "peak growth, MB",
                            found["growth"] / 1e6,
                            0,
                            1,
                        ),
                    ]
                    if who == "ours" and start == "first":
                        rate = found["tokens"] / found["seconds"]
                        rows.append((f"{records} records, first start", who, "tokens a second", rate, 0, 1))
            record("text", rows)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1] in ("ours", "trl"):
        way = {"ours": ours, "trl": trl}[sys.argv[1]]
        print(json.dumps(way(Path(sys.argv[2]), Path(sys.argv[3]))))
    else:
        main([int(size) for size in sys.argv[2:]], os.environ.get("PEER", ".venv-bench/bin/python"))
