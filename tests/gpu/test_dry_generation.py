"""Texts written on the pretended GPU are the CPU's, and the host does not wait at every token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack
from transformers import AutoConfig, AutoModelForCausalLM

from gpu.pretended import pretended
from selectkd.rollouts.few_rows import FewRows
from selectkd.rollouts.generate import Ends, Request, generate
from selectkd.rollouts.rules import Draw, Interleaved, Mixed
from selectkd.rollouts.sampling import Sampling
from training.tiny import VOCABULARY, tiny_llama

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13], [5, 9]]
RULES = {
    "greedy": Draw(Sampling(temperature=0.0)),
    "sampled": Draw(Sampling(top_p=0.9, top_k=20)),
    "interleaved": Interleaved(window=3),
    "mixed": Mixed(share=0.5),
}
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
OTHERS = {
    "gpt2": {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4},
    "opt": {**SMALL, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    "gemma2": {
        **SMALL,
        "intermediate_size": 64,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 4,
    },
    "mistral": {**SMALL, "intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 4},
}  # some learn their positions, some read them off the mask, some see the last few tokens alone


def written(
    models: list[Any], rule: Any, device: str, limits: tuple[int, ...] = (9, 24, 20, 1), **options: Any
) -> Any:
    requests = [Request(prompt, limit) for prompt, limit in zip(PROMPTS, limits, strict=True)]
    models = [model.to(device).eval() for model in models]
    return generate(models, requests, rule, width=VOCABULARY, seed=3, **{"ends": {2, 9}, **options})


def made(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, initializer_range=0.2, **settings)
    return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", RULES)
def test_a_text_written_on_a_gpu_is_the_cpus(name):
    models = [tiny_llama(2), tiny_llama(1, hidden=48)][: RULES[name].models]
    ends = Ends({2, 9}, ["7 7"], lambda ids: " ".join(map(str, ids)))
    here = written(models, RULES[name], "cpu", ends=ends)
    with pretended() as gpu:
        there = written(models, RULES[name], "cuda", ends=ends)
        assert gpu.launches > 0
    assert there == here


@pytest.mark.parametrize("kind", OTHERS)
def test_other_kinds_of_attention_write_the_same_on_a_gpu(kind):
    model = made(kind, **OTHERS[kind])
    here = written([model], RULES["greedy"], "cpu")
    with pretended():
        assert written([model], RULES["greedy"], "cuda") == here


@pytest.mark.parametrize("prompts", [PROMPTS, [[5, 6, 7]] * 2])
def test_the_host_waits_once_in_sixteen_tokens(prompts):
    waits = []
    with pretended() as gpu:
        model = tiny_llama(2).to("cuda").eval()
        written([model], RULES["greedy"], "cuda")  # the first text of a model also tries its cache
        for limit in (16, 32):
            gpu.reset()
            requests = [Request(prompt, limit, copy=i) for i, prompt in enumerate(prompts)]
            generate([model], requests, RULES["sampled"], ends=set(), width=VOCABULARY)
            waits.append(sum(gpu.syncs.values()))
            assert not gpu.pageable, gpu.report()
    assert waits[1] - waits[0] == 1, gpu.report()  # what is left is asked once a batch


class Watched:
    """A greedy rule that notes the rows it is given and the modes torch is in; memory ends at ``most`` rows."""

    uniforms = models = 1

    def __init__(self, most: int = 10**9) -> None:
        self.most, self.rows, self.modes = most, set[int](), set[type]()

    def __call__(self, logits: Any, uniform: Any) -> Any:
        rows = logits[0].shape[0]
        if rows > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        self.rows.add(rows)
        self.modes |= {type(mode) for mode in _get_current_function_mode_stack()}
        return RULES["greedy"](logits, uniform)


def test_the_products_of_few_rows_are_the_cpus_alone():
    rule = Watched()
    written([tiny_llama(2)], rule, "cpu")
    assert FewRows in rule.modes
    with pretended():
        rule = Watched()
        written([tiny_llama(2)], rule, "cuda")
    assert rule.modes and FewRows not in rule.modes


def test_a_batch_on_a_gpu_is_what_its_memory_holds():
    found = {}
    for free, count in ((1 << 20, 200), (1 << 40, 1100)):
        requests = [Request([5, 6], 3, copy=i) for i in range(count)]
        with pretended(free=free):
            rule = Watched()
            generate([tiny_llama(2).to("cuda")], requests, rule, ends=set(), width=VOCABULARY)
            found[free] = max(rule.rows)
    assert found[1 << 20] in (16, 32, 64, 128) and found[1 << 40] == 1024


def test_a_batch_that_does_not_fit_is_written_in_halves():
    here = written([tiny_llama(2)], RULES["greedy"], "cpu")
    rule = Watched(most=1)
    assert written([tiny_llama(2)], rule, "cpu") == here and rule.rows == {1}
    with pytest.raises(torch.OutOfMemoryError):
        written([tiny_llama(2)], Watched(most=0), "cpu")
