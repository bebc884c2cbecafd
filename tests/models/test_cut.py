from __future__ import annotations

import pytest
import torch
import transformers as hf

from selectkd.data.collate import collate
from selectkd.data.example import Example
from selectkd.errors import ConfigError
from selectkd.models import cut
from selectkd.models.cut import cut_student, even_layers
from selectkd.models.removals import removals_of

from .conftest import SIZES


@pytest.fixture
def batches():
    g = torch.Generator().manual_seed(3)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[2, 6:] = 0
    first = {"input_ids": torch.randint(4, 64, (3, 9), generator=g), "attention_mask": mask}
    second = {"input_ids": torch.randint(4, 64, (1, 90), generator=g)}
    return [(first, None), (second, torch.arange(40, 89))]


def held_out_kl(teacher, student, batches):
    total, rows = 0.0, 0
    for inputs, chosen in batches:
        if chosen is None:
            chosen = inputs["attention_mask"].flatten().nonzero().flatten()
        with torch.no_grad():
            logp, logq = (
                m(**inputs).logits.flatten(0, 1)[chosen].log_softmax(-1) for m in (teacher, student.eval())
            )
        total += (logp.exp() * (logp - logq)).sum().item()
        rows += len(chosen)
    return total / rows


def test_even_layers_keep_both_ends():
    assert even_layers(30, 10) == [0, 3, 6, 10, 13, 16, 19, 23, 26, 29]
    assert even_layers(4, 4) == [0, 1, 2, 3] and even_layers(4, 1) == [0]
    assert all(len(set(even_layers(n, k))) == k for n in range(1, 40) for k in range(1, n + 1))


def test_a_measured_cut_removes_what_trying_every_layer_would(llama, batches):
    heard = []
    _, kept, report = cut_student(llama, 2, "measured", batches, on_progress=lambda *args: heard.append(args))
    left = [0, 1, 2, 3]
    for removed, kl in zip(report.removed, report.kl, strict=True):
        tried = {i: cut_student(llama, len(left) - 1, [j for j in left if j != i])[0] for i in left}
        costs = {i: held_out_kl(llama, student, batches) for i, student in tried.items()}
        best = min(costs, key=costs.get)
        assert removed == best
        # two orders of adding up the same fp32 numbers
        assert kl == pytest.approx(costs[best], rel=1e-4)
        left.remove(removed)
    assert kept == report.kept == left and report.rows == 24 + 49
    assert [h[0] for h in heard] == report.removed and heard[-1][1] == tuple(kept)


def test_a_batch_is_compared_where_it_is_trained(llama):
    examples = [
        Example(
            input_ids=[5, 6, 7, 8, 2], completion=[False, False, True, True, True], stream=0, origin="a:1"
        ),
        Example(input_ids=[9, 4, 2], completion=[False, True, True], stream=1, origin="a:2"),
    ]
    batch = collate(examples, pad_id=0)
    student, _, report = cut_student(llama, 3, "measured", [batch])
    apart = [
        ({"input_ids": torch.tensor([[5, 6, 7, 8, 2]])}, torch.tensor([1, 2, 3])),
        ({"input_ids": torch.tensor([[9, 4, 2]])}, torch.tensor([0, 1])),
    ]
    assert report.rows == 5 and report.kl[0] == pytest.approx(held_out_kl(llama, student, apart), rel=1e-4)


def test_a_bfloat16_teacher_is_measured_and_its_student_stays_bfloat16(llama, batches):
    student, _, report = cut_student(llama.bfloat16(), 3, "measured", batches)
    assert student.dtype == torch.bfloat16 and llama.dtype == torch.bfloat16 and len(report.kl) == 1
    assert student.model.rotary_emb.inv_freq.dtype == torch.float32


def test_the_student_is_renumbered_tied_trainable_and_apart_from_its_teacher(llama):
    student, kept, _ = cut_student(llama, 2, [3, 1])
    assert kept == [1, 3] and student.config.num_hidden_layers == 2 and llama.config.num_hidden_layers == 4
    assert [layer.self_attn.layer_idx for layer in student.model.layers] == [0, 1]
    assert student.lm_head.weight is student.model.embed_tokens.weight
    assert torch.equal(student.model.layers[1].mlp.up_proj.weight, llama.model.layers[3].mlp.up_proj.weight)
    assert all(p.requires_grad for p in student.parameters())
    with torch.no_grad():
        student.model.norm.weight.zero_()
    assert llama.model.norm.weight.abs().sum() > 0
    student.generate(input_ids=torch.tensor([[5, 6]]), max_new_tokens=3, do_sample=False)


def test_a_cut_of_all_layers_is_the_teacher(llama):
    ids = torch.tensor([[5, 9, 7]])
    student, _, _ = cut_student(llama, 4, "even")
    assert torch.equal(student.eval()(ids).logits, llama(ids).logits)


@pytest.mark.parametrize("choose", [[0, 2, 3], "measured"])
def test_per_layer_types_are_cut_with_the_layers(choose):
    types = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    torch.manual_seed(0)
    config = hf.Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4, layer_types=types)
    teacher = hf.Gemma3ForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(4, 64, (2, 20))}
    student, kept, report = cut_student(teacher, 3, choose, [(inputs, None)])
    assert student.config.layer_types == [types[index] for index in kept]
    if choose == "measured":
        rows = torch.arange(40)
        assert report.kl[0] == pytest.approx(held_out_kl(teacher, student, [(inputs, rows)]), rel=1e-3)


def test_cutting_leaves_the_random_generator_as_it_was(llama):
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    cut_student(llama, 2, "even")
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize(
    "layers, choose",
    [(0, "even"), (5, "even"), (2, "best"), (2, "measured"), (2, [0, 4]), (2, [1, 1]), (3, [0, 1])],
)
def test_a_cut_that_cannot_work_says_what_would(llama, layers, choose):
    with pytest.raises(ConfigError):
        cut_student(llama, layers, choose)


def test_what_was_measured_is_not_measured_again_and_fewer_layers_go_on_from_it(
    llama, batches, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _, kept, whole = cut_student(llama, 1, "measured", batches)
    first = removals_of(llama, batches)
    cut_student(llama, 3, "measured", batches, known=first)
    again = removals_of(llama, batches)
    assert again.order == first.order and len(again.order) == 1 and again.rows == whole.rows
    _, more, report = cut_student(llama, 1, "measured", batches, known=again)
    assert more == kept and (report.removed, report.kl, report.rows) == (whole.removed, whole.kl, whole.rows)

    monkeypatch.setattr(cut, "_cheapest", None)  # whoever measures fails
    heard = []
    _, last, report = cut_student(
        llama, 2, "measured", batches, known=removals_of(llama, batches),
        on_progress=lambda *args: heard.append(args),
    )  # fmt: skip
    assert (
        report.kl == whole.kl[:2]
        and [h[0] for h in heard] == whole.removed[:2]
        and heard[-1][1] == tuple(last)
    )

    assert removals_of(llama, batches[:1]).order == []  # other text
    with torch.no_grad():
        llama.model.norm.weight[0] += 1
    assert removals_of(llama, batches).order == []  # other weights


def test_a_damaged_or_unwritable_memory_of_removals_costs_only_time(llama, batches, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    known = removals_of(llama, batches)
    cut_student(llama, 3, "measured", batches, known=known)
    content = known.file.read_bytes()
    known.file.write_bytes(content[: len(content) // 2])
    assert removals_of(llama, batches).order == []
    monkeypatch.setenv("XDG_CACHE_HOME", str(known.file))  # a file where a folder should be
    known = removals_of(llama, batches)
    cut_student(llama, 3, "measured", batches, known=known)
    assert len(known.order) == 1
