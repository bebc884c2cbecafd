"""One row of each shape that data sets of the hub have, in words of our own: (row, format, what is left aside)."""

from __future__ import annotations

import json
from typing import Any

Q, A = "How many apples are 2 and 3?", "There are 5 apples."
ASK, ANSWER = {"role": "user", "content": Q}, {"role": "assistant", "content": A}
BAD = {"role": "assistant", "content": "There are 6."}
HUMAN, GPT = {"from": "human", "value": Q}, {"from": "gpt", "value": A}
TOOL = {"type": "function", "function": {"name": "add", "description": "adds", "parameters": {}}}
CALL = {"id": "call00001", "type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 3}'}}

ROWS: dict[str, tuple[dict[str, Any], str, list[str]]] = {
    "ultrafeedback_binarized": (
        {
            "prompt": Q, "prompt_id": "0a", "chosen": [ASK, ANSWER], "rejected": [ASK, BAD], "messages": [ASK, ANSWER],
            "score_chosen": 8.5, "score_rejected": 2.0,
        },
        "preference", [],
    ),
    "ultrachat_200k": ({"prompt": Q, "prompt_id": "0a", "messages": [ASK, ANSWER]}, "messages", ["prompt"]),
    "tulu-3-sft-mixture": ({"id": "t_1", "messages": [ASK, ANSWER], "source": "flan"}, "messages", []),
    "no_robots": (
        {"prompt": Q, "prompt_id": "0a", "messages": [{"role": "system", "content": "Be brief."}, ASK, ANSWER],
         "category": "QA"},
        "messages", ["prompt"],
    ),
    "alpaca": (
        {"instruction": "Add.", "input": "2 and 3", "output": A, "text": f"### Instruction:\nAdd.\n{A}"},
        "instruction", ["text"],
    ),
    "dolly": ({"instruction": Q, "context": "", "response": A, "category": "open_qa"}, "instruction", []),
    "magpie": (
        {"uuid": "0a", "model": "m", "instruction": Q, "response": A, "conversations": [HUMAN, GPT]},
        "conversations", ["instruction", "response"],
    ),
    "sharegpt": (
        {"id": "x_1", "conversations": [{"from": "gpt", "value": "Go on."}, HUMAN, GPT]}, "conversations", [],
    ),
    "the_cauldron": ({"images": [], "texts": [{"user": Q, "assistant": A, "source": "x"}]}, "conversations", []),
    "finevision": (
        {"images": None, "texts": [{"user": "And 4?", "assistant": "9."}, {"user": Q, "assistant": A}], "source": "x",
         "relevance_ratings": [5, 4], "relevance_min": 4},
        "conversations", [],
    ),
    "slimorca": (
        {"conversations": [{"from": "system", "value": "Be brief.", "weight": None}, {**HUMAN, "weight": 0.0},
                           {**GPT, "weight": 1.0}]},
        "conversations", [],
    ),
    "openorca": ({"id": "cot.1", "system_prompt": "Be brief.", "question": Q, "response": A}, "prompt_completion", []),
    "openthoughts": (
        {"system": "Think first.", "conversations": [
            {"from": "user", "value": Q}, {"from": "assistant", "value": f"<think>\n2 + 3 = 5\n</think>\n\n{A}"}]},
        "conversations", [],
    ),
    "toolace": (
        {"system": "Use tools.", "conversations": [
            {"from": "user", "value": Q}, {"from": "assistant", "value": "[add(2, 3)]"},
            {"from": "tool", "value": "5"}, {"from": "assistant", "value": A}]},
        "conversations", [],
    ),
    "sharegpt with function calls": (
        {"conversations": [
            HUMAN, {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2, "b": 3}}'},
            {"from": "observation", "value": "5"}, GPT], "system": "", "tools": json.dumps([TOOL])},
        "conversations", [],
    ),
    "openai fine-tuning": (
        {"messages": [ASK, {"role": "assistant", "content": None, "tool_calls": [CALL]},
                      {"role": "tool", "tool_call_id": "call00001", "content": "5"}, {**ANSWER, "weight": 1}],
         "tools": [TOOL], "parallel_tool_calls": False},
        "messages", [],
    ),
    "wildchat": (
        {"conversation_hash": "0a", "model": "m", "conversation": [
            {**ASK, "language": "English", "toxic": False}, {**ANSWER, "language": "English", "toxic": False}],
         "turn": 1, "language": "English"},
        "conversations", [],
    ),
    "capybara": ({"source": "s", "conversation": [{"input": Q, "output": A}]}, "conversations", []),
    "lima": ({"conversations": [Q, A], "source": "s"}, "conversations", []),
    "metamathqa": ({"type": "GSM", "query": Q, "original_question": Q, "response": A}, "prompt_completion", []),
    "gsm8k": ({"question": Q, "answer": f"2 + 3 = <<2+3=5>>5\n#### 5. {A}"}, "prompt_completion", []),
    "math": ({"problem": Q, "level": "Level 1", "type": "Algebra", "solution": A}, "prompt_completion", []),
    "openmath": (
        {"problem": Q, "generated_solution": A, "expected_answer": "5", "problem_source": "s"}, "prompt_completion", [],
    ),
    "xlam": (
        {"id": 1, "query": Q, "answers": json.dumps([{"name": "say", "arguments": {"text": A}}]),
         "tools": json.dumps([{"name": "say", "description": "says", "parameters": {"text": {"type": "str"}}}])},
        "prompt_completion", [],
    ),
    "math-500": (
        {"problem": Q, "solution": A, "answer": "5", "subject": "Algebra", "level": 1, "unique_id": "t/1"},
        "prompt_completion", ["answer"],
    ),
    "numinamath": (
        {"source": "s", "problem": Q, "solution": A, "messages": [ASK, ANSWER]}, "messages", ["problem", "solution"],
    ),
    "orca_dpo_pairs": ({"system": "Be brief.", "question": Q, "chosen": A, "rejected": "6."}, "preference", []),
    "distilabel-intel-orca-dpo-pairs": (
        {"system": "", "input": Q, "chosen": A, "rejected": "6.", "generations": [A, "6."]}, "preference", [],
    ),
    "orca pairs with whole conversations": (
        {"system": "Be brief.", "question": Q, "chosen": [{"role": "system", "content": "Be brief."}, ASK, ANSWER],
         "rejected": [{"role": "system", "content": "Be brief."}, ASK, BAD]},
        "preference", [],
    ),
    "dpo-mix": ({"dataset": "d", "chosen": [ASK, ANSWER], "rejected": [ASK, BAD]}, "preference", []),
    "hh-rlhf": (
        {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {A}", "rejected": f"\n\nHuman: {Q}\n\nAssistant: Six."},
        "preference", [],
    ),
    "kto-mix": ({"prompt": [ASK], "completion": [ANSWER], "label": True}, "unpaired_preference", []),
    "aya": ({"inputs": Q, "targets": A, "language": "English", "annotation_type": "original"}, "prompt_completion", []),
    "nemotron post-training": (
        {"input": [ASK], "output": A, "category": "math", "reasoning": "off", "system_prompt": "Be brief."},
        "prompt_completion", ["reasoning"],
    ),
    "fineweb": ({"text": f"{Q} {A}", "id": "<u>", "dump": "CC", "url": "u", "token_count": 9}, "text", []),
    "the stack": ({"hexsha": "0a", "size": 9, "ext": "py", "content": f"# {A}\n"}, "text", []),
    "pretokenised": (
        {"input_ids": [60, 61, 62, 63], "attention_mask": [1, 1, 1, 1], "labels": [-100, -100, 62, 63], "text": "ab"},
        "tokens", ["text"],
    ),
}  # fmt: skip
